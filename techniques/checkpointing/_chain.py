"""A chain of blocks under a memory budget: which to keep, which to recompute, and how deep, by dynamic programming.

A schedule is a sequence of items, run in order: the number of a block whose inside is kept, or a `Segment` of which
only the input is kept and which, in the backward pass, is run again by a schedule of its own.

Papers: Griewank and Walther 2000, Revolve, doi:10.1145/347837.347846 (equal blocks); Beaumont et al. 2019, Optimal
checkpointing for heterogeneous chains, arXiv:1911.13214 (unequal ones). No torch: plans are made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

SLOTS = 1000  # steps of memory at most; sizes that do not divide are rounded up, so a budget is never overrun


@dataclass(frozen=True)
class Segment:
    """Blocks start..end-1, of which only the input is kept; `inner` says how they run again."""

    start: int
    end: int
    inner: Schedule


Schedule = tuple[int | Segment, ...]


@dataclass(frozen=True)
class Chain:
    """What each block holds, in any one unit of memory, and what its forward pass costs, in any unit of work.

    boundary: its input. inside: what it keeps for its backward pass, its input apart. keeps_input: whether it needs the
    input in its backward pass too.
    """

    boundary: list[int]
    inside: list[int]
    keeps_input: list[bool]
    cost: list[float]

    def __len__(self) -> int:
        return len(self.cost)

    def whole(self, block: int) -> int:
        """All that a kept block holds."""
        return self.inside[block] + self.boundary[block] * self.keeps_input[block]

    @property
    def everything(self) -> int:
        """What the plain forward pass holds at its end."""
        return sum(self.whole(block) for block in range(len(self)))


def all_kept(start: int, end: int) -> Schedule:
    return tuple(range(start, end))


def segments(lengths: list[int]) -> Schedule:
    """One level: consecutive segments of so many blocks, each recomputed whole."""
    ends = list(accumulate(lengths))
    return tuple(Segment(end - n, end, all_kept(end - n, end)) for n, end in zip(lengths, ends, strict=True))


def kept(chain: Chain, schedule: Schedule) -> int:
    """What the forward pass of a schedule leaves behind."""
    return sum(chain.whole(i) if isinstance(i, int) else chain.boundary[i.start] for i in schedule)


def recomputed(chain: Chain, schedule: Schedule) -> float:
    """Forward work beyond the one pass of each block that is always done."""
    return sum(
        sum(chain.cost[i.start : i.end]) + recomputed(chain, i.inner) for i in schedule if isinstance(i, Segment)
    )


def peak(chain: Chain, schedule: Schedule, held: bool = False) -> int:
    """The most that forward and backward hold of blocks; `held`: somebody else holds the first block's input."""
    free = 0
    if held and schedule:
        first = schedule[0]
        free = chain.boundary[first.start] if isinstance(first, Segment) else chain.whole(first) - chain.inside[first]
    most, before = kept(chain, schedule) - free, -free
    for item in schedule:
        before += kept(chain, (item,))
        if isinstance(item, Segment):
            most = max(most, before + peak(chain, item.inner, held=True))
    return most


def depth(schedule: Schedule) -> int:
    """How many segments lie inside each other: 0 when all is kept."""
    return max((1 + depth(item.inner) for item in schedule if isinstance(item, Segment)), default=0)


def described(schedule: Schedule) -> str:
    """Kept blocks as numbers, segments in brackets: "[0 1] [2] 3"."""
    return " ".join(str(i) if isinstance(i, int) else f"[{described(i.inner)}]" for i in schedule)


class Optimum:
    """The schedules of least recomputation for every budget up to `limit`, by memory in slots.

    Two tables over spans [s, t) and memory m hold the least work of running the span forward and backward: `open`,
    where the input of block s must still be paid for, and `held`, where somebody holds it already. A span either keeps
    its first block, or makes its first blocks a segment, which leaves the input behind and gets the memory again when
    the rest is done. `nested=False` allows segments of the first level only.
    """

    def __init__(self, chain: Chain, limit: int, nested: bool = True):
        self.chain, self.nested = chain, nested
        sizes = [*chain.boundary, *chain.inside]
        self.unit = max(math.gcd(*sizes), math.ceil(limit / SLOTS), 1)
        self.slots = limit // self.unit
        self.boundary = [math.ceil(b / self.unit) for b in chain.boundary]
        self.inside = [math.ceil(b / self.unit) for b in chain.inside]
        self.whole = [i + b * k for i, b, k in zip(self.inside, self.boundary, chain.keeps_input, strict=True)]
        self.work = [0.0, *accumulate(chain.cost)]
        n = len(chain)
        nothing = np.zeros(self.slots + 1)
        nothing = np.zeros(self.slots + 1)
        self.open = {(s, s): nothing for s in range(n + 1)}
        self.held: dict[tuple[int, int], np.ndarray] = {}
        for s in reversed(range(n)):
            for t in range(s + 1, n + 1):
                self.held[s, t] = np.minimum.reduce([table for table, _ in self._when_held(s, t)])
                self.open[s, t] = np.minimum.reduce([table for table, _ in self._when_open(s, t)])

    def _when_held(self, s: int, t: int) -> list[tuple[np.ndarray, int]]:
        """What may come first in [s, t) when its input is held: (table of work, end of the segment or s for a kept one)."""
        if not self.nested:
            return [(after(self.inside[s] + sum(self.whole[s + 1 : t]), self.open[t, t]), s)]
        splits = [(self._split(s, k, t), k) for k in range(s + 1, t)]
        return [*splits, (after(self.inside[s], self.open[s + 1, t]), s)]

    def _when_open(self, s: int, t: int) -> list[tuple[np.ndarray, int]]:
        """The same when the input must be paid for too; and then the whole span may be one segment."""
        splits = [(after(self.boundary[s], self._split(s, k, t)), k) for k in range(s + 1, t + 1)]
        return [*splits, (after(self.whole[s], self.open[s + 1, t]), s)]

    def _split(self, s: int, k: int, t: int) -> np.ndarray:
        """[s, k) a segment whose input is held, then [k, t)."""
        return self.open[k, t] + (self.work[k] - self.work[s]) + self.held[s, k]

    @property
    def least_budget(self) -> int | None:
        """The smallest budget, in the chain's unit, for which there is a schedule; None when `limit` is too small."""
        found = np.flatnonzero(np.isfinite(self.open[0, len(self.chain)]))
        return int(found[0]) * self.unit if len(found) else None

    def schedule(self, budget: int) -> Schedule | None:
        """The schedule of least recomputation whose peak is at most the budget; None when there is none."""
        slots = min(budget // self.unit, self.slots)
        if slots < 0 or not np.isfinite(self.open[0, len(self.chain)][slots]):
            return None
        return self._trace(0, len(self.chain), slots, held=False)

    def _trace(self, s: int, t: int, m: int, held: bool) -> Schedule:
        """The choices that the tables' values came from."""
        if s == t:
            return ()
        if held and not self.nested:
            return all_kept(s, t)
        options = self._when_held(s, t) if held else self._when_open(s, t)
        end = min(options, key=lambda option: option[0][m])[1]
        if end == s:
            left = m - (self.inside[s] if held else self.whole[s])
            return (s, *self._trace(s + 1, t, left, held=False))
        left = m - (0 if held else self.boundary[s])
        return (Segment(s, end, self._trace(s, end, left, held=True)), *self._trace(end, t, left, held=False))


def after(memory: int, table: np.ndarray) -> np.ndarray:
    """A table over memory once `memory` of it is taken: what does not fit costs infinity."""
    if memory >= len(table):
        return np.full(len(table), np.inf)
    return np.concatenate([np.full(memory, np.inf), table[: len(table) - memory]])
