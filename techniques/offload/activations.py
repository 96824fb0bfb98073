"""Activations in host memory between the forward pass and the backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape
from dyno.techniques.offload.states import Offload

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class HostActivations(Offload):
    """What blocks save for their backward pass goes to pinned host memory meanwhile, copied beside the computation.

    Paper: Rhu et al. 2016, vDNN, arXiv:1602.08124. Storages under `min_kib` stay, and so do the last `keep_blocks`
    blocks, whose backward pass comes at once. With checkpointing it is the boundaries that go.
    """

    min_kib: int = 1024
    keep_blocks: int = 1

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.min_kib < 0 or self.keep_blocks < 0:
            return f"offload.min_kib={self.min_kib}, offload.keep_blocks={self.keep_blocks}: neither can be negative"
        if recipe.option("compile") != "off" and not recipe.config["compile"].get("per_block"):
            return "a graph of the whole model saves all blocks' tensors at once; take compile=off or compile.per_block=true"
        from dyno.plan import shape_of

        shape, recomputes = shape_of(recipe), recipe.techniques["checkpointing"]
        kept = shape is not None and any(t.footprint(shape, device).keeps_products for t in recomputes)
        if kept and recipe.option("compile") == "off":
            return (
                f"checkpointing={recipe.option('checkpointing')} keeps products where this does not see them; compile the "
                "blocks (compile=on compile.per_block=true), or take another checkpointing"
            )
        return super().unsupported(recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Two blocks are on the way beside those that stay."""
        stay = min(1.0, (self.keep_blocks + 2) / shape.layers)
        return Footprint(stay_factor=stay, host_blocks=max(0, shape.layers - self.keep_blocks))

    def apply(self, run: Run) -> None:
        from dyno.techniques.offload._activations import Stasher
        from dyno.techniques.offload._side import Side

        model = run.model
        assert model is not None

        def stays() -> set[int]:
            return {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        stasher = Stasher(Side(run.device), self.min_kib * 1024, stays)
        position = {id(block): i for i, block in enumerate(model.blocks)}
        going = len(position) - self.keep_blocks

        def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
            def call_block(block: Any, x: Any, *rest: Any) -> Any:
                index = position[id(block)]
                if index >= going or not x.requires_grad:
                    return call(block, x, *rest)
                with stasher.block(index == 0, shared=rest):
                    return call(block, x, *rest)

            return call_block

        run.wrap("call_block", wrapper, by=self)
