"""What a pipeline is by arithmetic: its schedules, its stages of equal cost, its idle share. No torch: plans need it."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

from dyno.technique import Shape

if TYPE_CHECKING:
    from dyno.techniques.parallelism.mesh import Mesh

# option: (the class in torch.distributed.pipelining, whether it takes several stages a rank, its paper)
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", False, "arXiv:1811.06965"),
    "1f1b": ("Schedule1F1B", False, "arXiv:2006.09503"),
    "interleaved": ("ScheduleInterleaved1F1B", True, "arXiv:2104.04473"),
    "zero_bubble": ("ScheduleInterleavedZeroBubble", True, "arXiv:2401.10241"),
    "zbv": ("ScheduleZBVZeroBubble", True, "arXiv:2401.10241"),
}
SPLIT_BACKWARD = ("zero_bubble", "zbv")  # input gradients first, weight gradients where the rank would wait

RIDGE = 200.0  # FLOPs in the time of one byte, about an A100's and an H100's: weighs memory traffic against products


def stages_per_rank(layout: Mesh) -> int:
    if layout.schedule == "zbv":
        return 2
    return layout.virtual_stages if SCHEDULES[layout.schedule][1] else 1


def rank_of(stage: int, layout: Mesh) -> int:
    """Where a stage lives: round and round; the V goes down the ranks and back up."""
    if layout.schedule == "zbv":
        return min(stage, 2 * layout.pp - 1 - stage)
    return stage % layout.pp


def costs(shape: Shape, tokens: float) -> tuple[float, float, float]:
    """(embedding, one block, norm and head): FLOPs of a step over so many tokens, and the optimizer's traffic.

    Every weight costs 28 bytes of traffic a step (weight, gradient and Adam's two moments, read and written): it is all
    that an embedding costs, whose lookup multiplies nothing.
    """
    update = 28.0 * RIDGE
    head = shape.vocab * shape.hidden
    block = shape.block_parameters / shape.layers
    attention = 6.0 * shape.heads * shape.head_dim * shape.seq
    return update * head, (6.0 * tokens + update) * block + tokens * attention, (6.0 * tokens + update) * head


@lru_cache(256)  # every rank of a pipeline asks
def balance(shape: Shape, stages: int, tokens: float) -> tuple[range, ...]:
    """The blocks of each stage so that the costliest stage is as cheap as can be; every stage has one at least."""
    first, block, last = costs(shape, tokens)

    def cost(start: int, end: int) -> float:
        return (end - start) * block + first * (start == 0) + last * (end == shape.layers)

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """(cost of the costliest stage, where the stages end) for the blocks from `start` on in `left` stages."""
        if left == 1:
            return cost(start, shape.layers), (shape.layers,)
        found = []
        for end in range(start + 1, shape.layers - left + 2):
            rest, ends = best(end, left - 1)
            found.append((max(cost(start, end), rest), (end, *ends)))
        return min(found)

    ends = best(0, stages)[1]
    return tuple(range(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True))


def bubble(layout: Mesh) -> float:
    """The idle share of a step when all stages cost the same and a backward pass is two forward passes.

    A backward pass in two halves leaves only the ranks' late starts: zero bubble is a name, not a number.
    """
    p, m, v = layout.pp, layout.micro_batches, stages_per_rank(layout)
    work = (3 if layout.schedule in SPLIT_BACKWARD else 1) * v * m
    return (p - 1) / (work + p - 1)


def sends(layout: Mesh, pp_rank: int) -> int:
    """Boundaries that a rank sends over for one micro-batch: activations forward, gradients back."""
    count = 0
    for stage in range(layout.pp * stages_per_rank(layout) - 1):
        ends = rank_of(stage, layout), rank_of(stage + 1, layout)
        count += (ends[0] != ends[1]) * ends.count(pp_rank)
    return count
