"""Training with the matrix products of the blocks in 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique
from dyno.techniques.precision.bf16_weights import masters

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


GAIN = 1.7  # of large products over bf16 ones; assumed, no ceiling of fp8 is probed
HOST = 2.75  # of a step's launches: scales, casts, operators of Python (of the least error over 25 random recipes)


@dataclass
class FP8(Technique):
    """e4m3 values and e5m2 gradients in the products of the blocks, scaled by their own largest magnitude each time.

    Paper: Micikevicius et al. 2022, arXiv:2209.05433. `scaling` is tensorwise (one scale a tensor) or rowwise (one a
    row or column: finer, slower). `weights` float32 is bf16 autocast over fp32 weights, bfloat16 holds weights and
    gradients in bf16 with fp32 masters in the optimizer. `fast_backward` sums gradients in fewer bits, as the forward
    pass always does. Embedding, head and norms stay wide. Layers of one input are one product. Without a compiler a
    block's casts and launches take the host 7 to 9 ms (random recipes on H200s): compile=on leaves a part of that.
    """

    scaling: str = "tensorwise"
    weights: str = "float32"
    fast_backward: bool = False

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.scaling not in ("tensorwise", "rowwise"):
            return f"precision.scaling is {self.scaling}; it takes tensorwise or rowwise"
        if self.weights not in ("float32", "bfloat16"):
            return f"precision.weights is {self.weights}; it takes float32 or bfloat16"
        if recipe.config["workload"]["measures"] == "infer":
            return "precision=fp8 casts anew at every step, which is for training; serve with precision=bf16"
        if device.kind != "cuda":
            return "fp8 products need the tensor cores of an NVIDIA GPU (compute capability 8.9); this run is on a CPU"
        if device.capability and device.capability < (8, 9):
            return f"fp8 products need compute capability 8.9, {device.name} has {device.capability}"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """What 16 bits keep, but inputs of linear layers in a byte, and so the blocks' weights for the backward pass."""
        sixteen = self.weights == "bfloat16"
        return replace(
            masters(shape) if sixteen else Footprint(),
            parameter_bytes=2.0 if sixteen else None,
            activation_width=2.0,
            cast_bytes=1.0,
            input_bytes=1.0,
            matmul_dtype="fp8",
            wide_dtype="bf16",
            matmul_gain=GAIN,
            host_factor=HOST,
        )

    def apply(self, run: Run) -> None:
        import torch

        from dyno.kernels import _fp8

        assert run.model is not None
        run.replace("matmul_dtype", "fp8", by=self)
        if self.weights == "bfloat16":
            from dyno.techniques.precision._wide_optimizer import widened

            run.replace("weights_dtype", torch.bfloat16, by=self)
            run.wrap("optimizer", widened, by=self)
        else:
            run.replace("autocast", lambda: torch.autocast(run.device.type, dtype=torch.bfloat16), by=self)
        project = projection(_fp8.Recipe(self.scaling == "rowwise", self.fast_backward))
        for block in run.model.blocks:
            for part in (block.attention, block.mlp):
                part.project = project  # type: ignore[union-attr]
        wide = [
            name
            for name, layer in run.model.named_modules()
            if isinstance(layer, torch.nn.Linear) and not (name.startswith("blocks.") and fits(layer))
        ]
        run.note("wide_layers", ["embed", "norms", *wide])


def fits(layer: Any) -> bool:
    """Whether fp8 products take a linear layer's sizes."""
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0


def projection(recipe: Any) -> Any:
    """The decoder's seam `project` in fp8: one product for all layers that fit, the plain layer for the others."""
    from dyno.kernels import _fp8
    from dyno.model.decoder import with_bias

    def project(x: Any, *layers: Any) -> tuple[Any, ...]:
        narrow = [layer for layer in layers if fits(layer)]
        made = iter(_fp8.linear(x, [layer.weight for layer in narrow], recipe) if narrow else ())
        return tuple(with_bias(next(made), layer.bias) if fits(layer) else layer(x) for layer in layers)

    return project
