"""Which collective of a layout crosses which level, how long it takes, and what the order of the levels is worth.

GPUs are numbered tp first, then cp, dp, pp: neighbours of a tensor group are the nearest, pipeline stages the farthest.
Times are of the wire alone, before any of it hides behind compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dyno.plan.cluster import RECOMPUTED, Cluster, Layout, data_group, slowest, trained_on_a_rank
from dyno.plan.links import Spans, half_s, halves_s, hierarchical_s, merged, ring_s, spans, tree_s
from dyno.technique import Shape


@dataclass(frozen=True)
class Collective:
    """One kind of a step's collectives. `bytes` of the whole buffer of one call; `by_level` seconds of one call level
    by level, innermost first, and `flat_s` of one call as one ring (or tree) through all ranks."""

    what: str
    operation: str
    calls: float
    bytes: float
    crosses: Spans
    by_level: dict[str, float]
    flat_s: float

    @property
    def levels_s(self) -> float:
        return sum(self.by_level.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what, "operation": self.operation, "calls": self.calls, "bytes": self.bytes,
            "crosses": {span.name: span.ranks for span in self.crosses}, "by_level_s": self.by_level,
            "level_by_level_s": self.levels_s, "flat_s": self.flat_s,
        }  # fmt: skip


def halves(what: str, operation: str, calls: float, size: float, crossed: Spans) -> Collective:
    """All-gathers or reduce-scatters; the flat way is a ring."""
    return Collective(what, operation, calls, size, crossed, halves_s(crossed, size), half_s(merged(crossed), size))


def all_reduce(what: str, calls: float, size: float, crossed: Spans) -> Collective:
    """All-reduces: halves on the way out and back; the outermost level and the flat way by ring or tree."""
    by_level, outer, left = {}, crossed, size
    while len(outer) > 1:
        by_level[outer[0].name] = 2 * half_s(outer[:1], left)
        left, outer = left / outer[0].ranks, outer[1:]
    by_level[outer[0].name] = hierarchical_s(outer, left)
    one = merged(crossed)[0]
    flat = min(ring_s(one.ranks, size, one.link), tree_s(one.ranks, size, one.link))
    return Collective(what, "all-reduce", calls, size, crossed, by_level, flat)


def collectives(shape: Shape, layout: Layout, cluster: Cluster) -> list[Collective]:
    """All that a rank of the layout takes part in during a step."""
    count = shape.batch // (layout.dp * layout.micro)
    tokens = layout.micro * shape.seq / layout.cp
    layers, message = shape.layers / layout.pp, 2 * tokens * shape.hidden
    found: list[Collective] = []
    if layout.tp > 1:
        calls = count * layers * (4 + 2 * RECOMPUTED[layout.recompute])
        crossed = spans(layout.tp, 1, cluster.levels)
        found += [
            halves("activations over tp", name, calls, message, crossed) for name in ("all-gather", "reduce-scatter")
        ]
    if layout.cp > 1:
        keys = 2 * 2 * tokens * shape.kv_heads * shape.head_dim / layout.tp * layout.cp
        crossed = merged(spans(layout.cp, layout.tp, cluster.levels))
        found.append(halves("keys and values over cp", "ring", count * layers * 3, keys, crossed))
    if layout.pp > 1:
        crossed = spans(layout.pp, layout.gpus // layout.pp, cluster.levels)
        link, size = slowest(crossed), message / layout.tp
        once = link.latency_s + size / link.bytes_per_s
        name = merged(crossed)[0].name
        found.append(
            Collective("stage boundaries", "send", 2 * layout.virtual * count, size, crossed, {name: once}, once)
        )
    if crossed := data_group(layout, cluster):
        mine = trained_on_a_rank(shape, layout)
        if layout.zero == 0:
            found.append(all_reduce("gradients over dp", 1, 4 * mine, crossed))
        else:
            gathers = 2 * count if layout.zero == 3 else 1
            scatters = count if layout.zero >= 2 else 1
            wide = 2 if layout.zero == 3 else 4  # as `time_terms` counts them
            found.append(halves("gradients over dp", "reduce-scatter", scatters, wide * mine, crossed))
            found.append(halves("weights over dp", "all-gather", gathers, 2 * mine, crossed))
    return found


def orders(found: Collective) -> dict[str, float]:
    """Seconds of one call by the number of levels that are kept apart: all in one ring, the innermost first, ... ."""
    cost: Callable[[Spans, float], float] = hierarchical_s if found.operation == "all-reduce" else half_s
    apart = {"one ring": cost(merged(found.crosses), found.bytes)}
    for kept in range(1, len(found.crosses)):
        rest = merged(found.crosses[kept:])
        names = [span.name for span in found.crosses[:kept]] + [rest[0].name]
        apart[", then ".join(names)] = cost((*found.crosses[:kept], *rest), found.bytes)
    return apart


def verdict(found: list[Collective]) -> str:
    """The best order for the largest collective that crosses several levels, in one sentence."""
    wide = [c for c in found if len(c.crosses) > 1 and c.operation != "send"]
    if not wide:
        return "no collective of the layout crosses more than one level: there is no order to choose"
    largest = max(wide, key=lambda c: c.calls * c.levels_s)
    times = orders(largest)
    best = min(times, key=lambda name: times[name])
    ring = times["one ring"]
    if best == "one ring":
        return f"{largest.what}: one ring through all is quickest"
    gain = ring / times[best] if times[best] else math.inf
    return f"{largest.what}: {best} is {gain:.1f}x quicker than one ring through all"
