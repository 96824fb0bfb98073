"""Activation checkpointing over transformer blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Segments(Technique):
    """Keep the input of every segment of blocks and recompute its inside during the backward pass.

    Paper: Chen et al. 2016, arXiv:1604.06174. A segment is one block unless a subclass says else.
    """

    def segment(self, layers: int) -> int:
        """Blocks in a segment."""
        return 1

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.config["workload"]["measures"] in ("infer", "kernel"):
            return "checkpointing trades memory of a backward pass; this workload measures no training"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Kept: one boundary a segment; recomputed: the inside of one segment at a time."""
        segment = max(1, min(self.segment(shape.layers), shape.layers))
        return Footprint(
            activation_factor=0.0,
            boundaries=math.ceil(shape.layers / segment),
            recompute_blocks=segment,
            flops_factor=4 / 3,
        )

    def apply(self, run: Run) -> None:
        from torch.utils.checkpoint import checkpoint

        model = run.model
        assert model is not None
        blocks = list(model.blocks)
        segment = max(1, min(self.segment(len(blocks)), len(blocks)))
        position = {id(block): i for i, block in enumerate(blocks)}

        def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
            def call_block(block: Any, x: Any, *rest: Any) -> Any:
                index = position[id(block)]
                if not x.requires_grad and not model.training:
                    return call(block, x, *rest)
                if index % segment:
                    return x  # ran inside the segment that started before it

                def run_segment(x: Any) -> Any:
                    for member in blocks[index : index + segment]:
                        x = call(member, x, *rest)
                    return x

                return checkpoint(run_segment, x, use_reentrant=False)

            return call_block

        run.wrap("call_block", wrapper, by=self)
        run.note("checkpointed_segment_blocks", segment)


@dataclass
class Uniform(Segments):
    """Segments of `every` blocks; every=1 recomputes each block from its own input.

    Paper: Chen et al. 2016, arXiv:1604.06174.
    """

    every: int = 1

    def segment(self, layers: int) -> int:
        return self.every

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.every < 1:
            return f"checkpointing.every is {self.every}; it takes 1 or more blocks"
        return super().unsupported(recipe, device)


@dataclass
class Sqrt(Segments):
    """Segments of about sqrt(L) blocks: memory of O(sqrt(L)) for one more forward pass.

    Paper: Chen et al. 2016, arXiv:1604.06174.
    """

    def segment(self, layers: int) -> int:
        return max(1, round(math.sqrt(layers)))
