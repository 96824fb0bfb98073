"""Weight-only quantisation without calibration data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class RoundToNearest(Technique):
    """Every weight to the nearest of 2^bits values of its group; activations stay in 16 or 32 bits.

    Source: the baseline of Frantar et al. 2022, arXiv:2210.17323. Weights are really packed (two a byte at 4 bits) and
    stay so in memory. Knobs: `bits` 8 or 4; `group_size` inputs that share a scale, 0 for a whole row; `symmetric`
    drops the zero points; `skip` lists module names or patterns to leave alone. A CPU unpacks a layer each time it is
    used: smaller, not faster. Weights that pruning set to zero stay zero.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    skip: list[str] = field(default_factory=lambda: ["lm_head"])

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.bits not in (4, 8):
            return f"quantization.bits is {self.bits}; it takes 4 or 8"
        if self.group_size < 0:
            return f"quantization.group_size is {self.group_size}; it takes 0 (a whole row) or more"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        overhead = 0.0 if self.group_size == 0 else (2 if self.symmetric else 3) / self.group_size
        packed = self.bits / 8 + overhead
        head = shape.vocab * shape.hidden / shape.linear_parameters if "lm_head" in self.skip else 0.0
        dense_width = 2.0 if device.kind == "cuda" else 4.0
        unpacked = 0.0 if device.kind == "cuda" else 4.0 * shape.hidden * max(shape.ffn, shape.hidden)
        return Footprint(weight_bytes=(1 - head) * packed + head * dense_width, extra_bytes=unpacked)

    def apply(self, run: Run) -> None:
        from dyno.kernels.quantized_linear import quantize
        from dyno.techniques.quantization._linear import QuantizedLinear, linears, stored_bytes

        model = run.model
        assert model is not None
        parameters = sum(p.numel() for p in model.parameters())
        layers = linears(model, self.skip)
        layer_bytes, layer_weights = 0, 0
        for name, layer in layers.items():
            packed = quantize(layer.weight, self.bits, self.group_size, self.symmetric)
            layer_bytes += packed.bytes
            layer_weights += layer.weight.numel()
            model.set_submodule(name, QuantizedLinear(packed, layer.bias))
        if "lm_head" in layers and model.config.tied_embeddings:
            model.config = replace(model.config, tied_embeddings=False)  # the embedding keeps the dense matrix
        model_bytes = stored_bytes(model)
        run.note("bits_per_weight", 8 * model_bytes / parameters)
        run.note("model_bytes", model_bytes)
        run.note(
            "quantization",
            {
                "layers": len(layers),
                "weights": layer_weights,
                "bits_per_quantized_weight": 8 * layer_bytes / layer_weights if layer_weights else None,
                "scales": "fp16, or fp32 where fp16 does not reach; rounded before the codes are chosen",
            },
        )
