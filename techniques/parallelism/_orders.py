"""The order of a pipeline rank's work, as PyTorch's schedules take it, and what that keeps in memory. No torch.

An action is (kind, local stage): F forward, B backward, or, of a split backward, I the inputs' half and W the weights'.
The stages of a rank are numbered from the first that data meets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.techniques.parallelism import _stages

if TYPE_CHECKING:
    from dyno.technique import Shape
    from dyno.techniques.parallelism.mesh import Mesh

Order = list[tuple[str, int]]


@dataclass(frozen=True)
class Held:
    """What a rank keeps at its fullest moment. `blocks`: blocks x micro-batches with their insides; `losses` and
    `outputs`: micro-batches whose log-softmax, and whose logits or their gradients, lie beside the one at its loss;
    `gradients`: whether a micro-batch before has left its weight gradients."""

    blocks: float
    losses: float = 0.0
    outputs: float = 0.0
    gradients: bool = True


def round_robin(stages: int, micro: int, in_a_round: int, warm: int, split: bool, behind: int) -> Order:
    """`warm` forward passes, then one forward and one backward in turns, round after round over the stages.

    In a split backward the weights' half of one follows `behind` backward passes later.
    """
    total, order, back = stages * micro, [], []
    for step in range(total + warm):
        if step < total:
            order.append(("F", step // in_a_round % stages))
        if step >= warm:
            back.append(stages - 1 - (step - warm) // in_a_round % stages)
            order.append(("I" if split else "B", back[-1]))
            if split and step - warm >= behind:
                order.append(("W", back[step - warm - behind]))
    return order + [("W", stage) for stage in (back[len(back) - behind :] if split and behind else [])]


def down_and_up(ranks: int, micro: int, rank: int) -> Order:
    """The V: stage 0 of a rank on the way down, stage 1 on the way back."""
    done: Counter[tuple[str, int]] = Counter()
    order: Order = []

    def take(*actions: tuple[str, int]) -> None:
        """What PyTorch plans beyond the last micro-batch is left out."""
        for action in actions:
            done[action] += 1
            if done[action] <= micro:
                order.append(action)

    planned = max(2 * ranks - 1, micro)
    take(*[("F", 0)] * (2 * (ranks - rank) - 1), *[("F", 1), ("F", 0)] * rank)
    take(*[("F", 1), ("I", 1), ("W", 1)] * (ranks - rank))
    while done["F", 1] < done["F", 0] or done["F", 0] < planned:
        take(*[("F", 0)] * (done["F", 0] < planned), ("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    take(*[("I", 0), ("I", 1)] * rank, *[("I", 0), ("W", 0)] * (ranks - rank))
    take(*[("W", 1)] * (done["I", 1] - done["W", 1]), *[("W", 0)] * (done["I", 0] - done["W", 0]))
    return order


def order(layout: Mesh, rank: int) -> Order:
    """All that a rank of the pipeline does in a step."""
    ranks, micro, stages = layout.pp, layout.micro_batches, _stages.stages_per_rank(layout)
    if layout.schedule == "gpipe":
        return [("F", 0)] * micro + [("B", 0)] * micro
    if layout.schedule == "1f1b":
        return round_robin(1, micro, micro, min(micro, ranks - rank) - 1, False, 0)
    if layout.schedule == "zbv":
        return down_and_up(ranks, micro, rank)
    split = layout.schedule in _stages.SPLIT_BACKWARD
    in_a_round = micro // max(1, micro // ranks)
    warm = (stages - 1) * in_a_round + (1 if split else 2) * (ranks - 1 - rank)
    return round_robin(stages, micro, in_a_round, min(stages * micro, warm), split, rank if split else 0)


def held(layout: Mesh, shape: Shape, cuts: Sequence[range], rank: int, weights: float) -> Held:
    """The fullest moment of a rank that has so many weights in these blocks, one range a stage of its own.

    A graph is kept until its last half has run, and between the halves the gradient of every product's output with it:
    5 hidden + 2 ffn numbers a token of a block that keeps 14 hidden + 4 ffn. Log-softmaxes and weight gradients are
    twice as wide.
    """
    inside = 14.0 * shape.hidden + 4.0 * shape.ffn
    waiting = (5.0 * shape.hidden + 2.0 * shape.ffn) / inside
    head = len(cuts) - 1 if cuts[-1].stop == shape.layers else -1
    alive: Counter[int] = Counter()
    halved: Counter[int] = Counter()
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp * layout.micro_batches)
    fullest, most, before = Held(0.0), -1.0, False
    for kind, stage in order(layout, rank):
        if kind == "F":
            alive[stage] += 1
        at_loss = stage == head and kind != "W"
        blocks = sum(len(cut) * (alive[s] + waiting * halved[s]) for s, cut in enumerate(cuts))
        now = Held(blocks, alive[head] - at_loss, alive[head] + halved[head], before)
        numbers = blocks * inside + shape.vocab * (2 * now.losses + now.outputs + 5 * at_loss)
        numbers += 2 * before * weights / layout.tp / tokens
        if numbers > most:
            fullest, most = now, numbers
        halved[stage] += {"I": 1, "W": -1}.get(kind, 0)
        alive[stage] -= kind in "BW"
        before = before or kind in "BW"
    return fullest
