"""Graph compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHED = ("reduce-overhead", "max-autotune")


@dataclass
class TorchCompile(Technique):
    """TorchDynamo captures the model, Inductor fuses and generates kernels; the first steps pay for it.

    Paper: Ansel et al. 2024, PyTorch 2, doi:10.1145/3620665.3640366. `per_block` compiles one block and reuses it.
    `join_projections` makes queries, keys and values by one product in training, of weights that are put beside each
    other for it; and so is the gradient of its input, which three products would leave in parts for others to add.
    """

    per_block: bool = False
    mode: str = "default"
    join_projections: bool = False

    @property
    def records_graphs(self) -> bool:
        """Whether compiled code replays CUDA graphs of its own."""
        return self.mode in GRAPHED

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        import shutil

        if self.mode not in MODES:
            return f"compile.mode is {self.mode}; it takes {', '.join(MODES)}"
        if device.kind == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            return "torch.compile on a CPU needs a C++ compiler (g++ or clang++) on the path"
        if self.join_projections and (why := self.keeps_apart(recipe, device)):
            return f"{why}; leave out compile.join_projections=true"
        if recipe.config["workload"]["measures"] == "infer":
            decode = recipe.option("decoding")
            if recipe.option("kv_cache") == "none":
                return f"compile with kv_cache=none would recompile at every length of {decode} decoding"
        return None

    def keeps_apart(self, recipe: Recipe, device: Device) -> str | None:
        """Why projections cannot be joined, or are joined already."""
        from dyno.plan import shape_of

        if recipe.config["workload"]["measures"] == "infer":
            return "projections are joined in training only"
        if recipe.config["parallelism"].get("tp", 1) > 1:
            return "tensor ranks split each projection by itself"
        shape, precisions = shape_of(recipe), recipe.techniques["precision"]
        if shape is not None and any(t.footprint(shape, device).input_bytes is not None for t in precisions):
            return f"precision={recipe.option('precision')} joins projections by itself"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Fused elementwise chains keep fewer intermediates; joined weights lie beside each other once more."""
        joined = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim if self.join_projections else 0
        share = joined / (shape.block_parameters / shape.layers)
        return Footprint(fused=True, fused_loss=not self.per_block, joined_share=share)

    def apply(self, run: Run) -> None:
        import torch

        assert run.model is not None
        mode = None if self.mode == "default" else self.mode
        if self.join_projections and run.stage != "infer":
            for block in run.model.blocks:
                block.attention.project = project_joined  # type: ignore[union-attr]
        if self.per_block or run.stage == "infer":
            # Dynamo would cut a block that DDP holds at the bounds of DDP's buckets, a large one into some ten graphs.
            torch._dynamo.config.optimize_ddp = False
            for block in run.model.blocks:
                block.compile(mode=mode, dynamic=run.stage == "infer" or None)
            return
        # The loss is compiled with the model in it: the softmax over the vocabulary fuses, evaluation stays eager.
        run.wrap("loss", lambda loss: torch.compile(loss, mode=mode), by=self)


def project_joined(x: Any, *layers: Any) -> tuple[Any, ...]:
    """The decoder's seam `project` by one product, where layers are plain ones."""
    import torch
    from torch.nn.functional import linear

    from dyno.model.decoder import project_each, with_bias

    if len(layers) == 1 or any(type(layer) is not torch.nn.Linear or "forward" in vars(layer) for layer in layers):
        return project_each(x, *layers)
    made = linear(x, torch.cat([layer.weight for layer in layers])).split([layer.out_features for layer in layers], -1)
    # The last, values, is kept as it is: as a part of the product it would keep the whole of it.
    made = [*made[:-1], made[-1].contiguous()]
    return tuple(with_bias(y, layer.bias) for y, layer in zip(made, layers, strict=True))
