"""Activation checkpointing over transformer blocks: keep the inputs of segments, run their insides again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique
from dyno.techniques.checkpointing._chain import Schedule, Segment, described, segments

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


HOST = 1.5  # host time of an eager step over that of its kernels alone: recomputing is Python's work (H100 records)


@dataclass
class Recomputing(Technique):
    """What every way of recomputing shares. Paper: Chen et al. 2016, arXiv:1604.06174."""

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.config["workload"]["measures"] in ("infer", "kernel"):
            return "checkpointing trades memory of a backward pass; this workload measures no training"
        return None


@dataclass
class Segments(Recomputing):
    """Keep the input of every segment of blocks and recompute its inside during the backward pass.

    Paper: Chen et al. 2016, arXiv:1604.06174. A segment is one block unless a subclass says else.
    """

    def lengths(self, layers: int) -> list[int]:
        """Blocks in each segment, in order."""
        return [1] * layers

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Kept: one boundary a segment; recomputed: the inside of one segment at a time."""
        lengths = self.lengths(shape.layers)
        return Footprint(
            activation_factor=0.0,
            boundaries=len(lengths),
            recompute_blocks=max(lengths),
            blocks_again=1.0,
            flops_factor=1 + blocks_share(shape) / 3,
            host_factor=HOST,
        )

    def apply(self, run: Run) -> None:
        assert run.model is not None
        follow(run, segments(self.lengths(len(run.model.blocks))), by=self)


@dataclass
class Uniform(Segments):
    """Segments of `every` blocks; every=1 recomputes each block from its own input.

    Paper: Chen et al. 2016, arXiv:1604.06174.
    """

    every: int = 1

    def lengths(self, layers: int) -> list[int]:
        return split(layers, max(1, self.every))

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.every < 1:
            return f"checkpointing.every is {self.every}; it takes 1 or more blocks"
        return super().unsupported(recipe, device)


@dataclass
class Sqrt(Segments):
    """Segments of about sqrt(L) blocks: memory of O(sqrt(L)) for one more forward pass.

    Paper: Chen et al. 2016, arXiv:1604.06174.
    """

    def lengths(self, layers: int) -> list[int]:
        return split(layers, max(1, round(math.sqrt(layers))))


@dataclass
class Fibonacci(Segments):
    """Segments of 1, 1, 2, 3, 5, ... blocks counted from the end, what is left over first.

    Source: folklore, often called optimal; it is not: blocks hold far more inside than at their boundary. The backward
    pass meets the short segments while most boundaries are still held, and the long ones when few are.
    """

    def lengths(self, layers: int) -> list[int]:
        found, length, following, left = [], 1, 1, layers
        while left >= length:
            found.append(length)
            left -= length
            length, following = following, length + following
        return [left] * (left > 0) + found[::-1]


def split(layers: int, size: int) -> list[int]:
    """Segments of so many blocks; the last has what is left."""
    return [min(size, layers - start) for start in range(0, layers, size)]


def boundary_share(shape: Shape) -> float:
    """A block's input over everything that the block keeps for its backward pass."""
    return shape.hidden / (14.0 * shape.hidden + 4.0 * shape.ffn)


def blocks_share(shape: Shape) -> float:
    """The blocks' share of the forward pass's FLOPs; the rest is the head over the vocabulary."""
    attention = shape.layers * shape.heads * shape.head_dim * shape.seq
    return 1 - shape.vocab * shape.hidden / (shape.linear_parameters + attention)


def follow(run: Run, schedule: Schedule, *, by: Technique) -> None:
    """Make the model run its blocks by a schedule."""
    from torch.utils.checkpoint import checkpoint

    model = run.model
    assert model is not None
    blocks = list(model.blocks)
    position = {id(block): i for i, block in enumerate(blocks)}
    at = {item.start if isinstance(item, Segment) else item: item for item in schedule}

    def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
        def play(items: Schedule, x: Any, *rest: Any) -> Any:
            for item in items:
                if isinstance(item, Segment):
                    # No random state is kept: nothing in a block draws a random number.
                    x = checkpoint(play, item.inner, x, *rest, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = call(blocks[item], x, *rest)
            return x

        def call_block(block: Any, x: Any, *rest: Any) -> Any:
            index = position[id(block)]
            if not x.requires_grad and not model.training:
                return call(block, x, *rest)
            # Blocks inside a segment ran when its first block was called.
            return play((at[index],), x, *rest) if index in at else x

        return call_block

    run.wrap("call_block", wrapper, by=by)
    run.note("checkpointing_schedule", described(schedule))
