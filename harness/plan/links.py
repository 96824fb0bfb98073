"""Collectives over links, by the alpha-beta model: a latency a message and a bandwidth (Thakur et al. 2005,
doi:10.1177/1094342005051521). Bytes are those of the whole buffer that each rank holds; bandwidths one way."""

from __future__ import annotations

import math
from dataclasses import dataclass


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


def flat_s(nodes: int, each: int, size: float, inside: Link, between: Link) -> float:
    """All-reduce by one ring or tree through all ranks: every step waits for the slowest link."""
    slow = between if nodes > 1 else inside
    return min(ring_s(nodes * each, size, slow), tree_s(nodes * each, size, slow))


def hierarchical_s(nodes: int, each: int, size: float, inside: Link, between: Link) -> float:
    """All-reduce inside each node first: reduce-scatter there, all-reduce of a share between nodes, all-gather there."""
    share = size / each
    across = min(ring_s(nodes, share, between), tree_s(nodes, share, between))
    return 2 * ring_half_s(each, size, inside) + across


def half_s(nodes: int, each: int, size: float, inside: Link, between: Link) -> float:
    """All-gather or reduce-scatter of a buffer, inside the nodes and between them."""
    return ring_half_s(each, size, inside) + ring_half_s(nodes, size / each, between)
