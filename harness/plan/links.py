"""Collectives over links, by the alpha-beta model: a latency a message and a bandwidth (Thakur et al. 2005,
doi:10.1177/1094342005051521). Bytes are those of the whole buffer that each rank holds; bandwidths one way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """bytes_per_s one way for each GPU, and the seconds before a message's first byte."""

    bytes_per_s: float
    latency_s: float


def ring_half_s(ranks: int, size: float, link: Link) -> float:
    """All-gather or reduce-scatter round a ring."""
    return 0.0 if ranks <= 1 else (ranks - 1) * (link.latency_s + size / ranks / link.bytes_per_s)


def ring_s(ranks: int, size: float, link: Link) -> float:
    """All-reduce round a ring: reduce-scatter, then all-gather."""
    return 2 * ring_half_s(ranks, size, link)


def tree_s(ranks: int, size: float, link: Link) -> float:
    """All-reduce up and down a double binary tree: few messages, for small buffers on many ranks."""
    return 0.0 if ranks <= 1 else 2 * math.ceil(math.log2(ranks)) * link.latency_s + 2 * size / link.bytes_per_s


@dataclass(frozen=True)
class Level:
    """A level of the hierarchy: groups of `gpus` GPUs (infinite: all there are) and the link between what lies inside."""

    name: str
    gpus: float
    link: Link


@dataclass(frozen=True)
class Span:
    """What a group of ranks crosses at one level: `ranks` parts of it meet over the level's link."""

    name: str
    ranks: int
    link: Link


Spans = tuple[Span, ...]


def levels_of(hardware: Mapping[str, Any]) -> tuple[Level, ...]:
    """What a hardware option states of node, rack and network, from the node outwards; the network has no end."""
    stated = ((name, hardware.get(key)) for name, key in (("node", "node"), ("rack", "rack"), ("cluster", "network")))
    return tuple(
        Level(name, float(x.get("gpus", math.inf)), Link(float(x["byte_per_s"]), float(x["latency_s"])))
        for name, x in stated if x
    )  # fmt: skip


def domain_of(levels: Sequence[Level]) -> int:
    """GPUs that reach each other as fast as those of one node do; the network, which has no end, is none of it."""
    fast = [level.gpus for level in levels if level.link.bytes_per_s >= levels[0].link.bytes_per_s]
    return int(max(gpus for gpus in fast if math.isfinite(gpus)))


def group_rate(ranks: int, stride: int, levels: Sequence[Level]) -> float:
    """Bytes/s at which each of so many ranks, `stride` GPUs apart, passes on what it gathers, level by level, at its best."""
    found = spans(ranks, stride, levels)
    if not found:
        return levels[0].link.bytes_per_s
    # Of a buffer a rank sends (n - 1) / n at a level of n parts, and further out only its share of it.
    sent, seconds, share = 0.0, 0.0, 1.0
    for span in found:
        part = share * (span.ranks - 1) / span.ranks
        sent, seconds, share = sent + part, seconds + part / span.link.bytes_per_s, share / span.ranks
    return sent / seconds


def spans(ranks: int, stride: int, levels: Sequence[Level]) -> Spans:
    """The levels that a group of ranks crosses, innermost first; its neighbours are `stride` GPUs apart.

    A group of the level below that does not divide a level's GPUs leaves some of them idle; they are not counted.
    """
    found, inside = [], 1
    for level in levels:
        reach = max(inside, math.floor(min(ranks, level.gpus / stride)))
        if (parts := math.ceil(reach / inside)) > 1:
            found.append(Span(level.name, parts, level.link))
        inside = reach
    return tuple(found)


def merged(found: Spans) -> Spans:
    """One ring through all of these: every step waits for the slowest link, every message for the longest way."""
    if not found:
        return ()
    slow = Link(min(s.link.bytes_per_s for s in found), max(s.link.latency_s for s in found))
    return (Span(" x ".join(s.name for s in found), math.prod(s.ranks for s in found), slow),)


def hierarchical_s(found: Spans, size: float) -> float:
    """All-reduce inside the innermost level first: reduce-scatter there, all-reduce of a share further out, all-gather."""
    if not found:
        return 0.0
    here, *outer = found
    if not outer:
        return min(ring_s(here.ranks, size, here.link), tree_s(here.ranks, size, here.link))
    return 2 * ring_half_s(here.ranks, size, here.link) + hierarchical_s(tuple(outer), size / here.ranks)


def half_s(found: Spans, size: float) -> float:
    """All-gather or reduce-scatter of a buffer, level by level."""
    return sum(halves_s(found, size).values())


def halves_s(found: Spans, size: float) -> dict[str, float]:
    """The same by level: only a share of the buffer goes further out."""
    out = {}
    for span in found:
        out[span.name] = ring_half_s(span.ranks, size, span.link)
        size /= span.ranks
    return out
