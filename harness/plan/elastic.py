"""Training that survives its machines: checkpoint intervals, expected throughput under failures, and memory far away.

Simulated closed forms, for plans; nothing here was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dyno.plan.links import Link

YEAR_S = 365.25 * 86400


def young_interval_s(checkpoint_s: float, mean_between_failures_s: float) -> float:
    """Compute between checkpoints, first order (Young 1974, doi:10.1145/361147.361115)."""
    return math.sqrt(2 * checkpoint_s * mean_between_failures_s)


def daly_interval_s(checkpoint_s: float, mean_between_failures_s: float) -> float:
    """The same with higher orders (Daly 2006, doi:10.1016/j.future.2004.11.016)."""
    if checkpoint_s >= 2 * mean_between_failures_s:
        return mean_between_failures_s
    x = checkpoint_s / (2 * mean_between_failures_s)
    return math.sqrt(2 * checkpoint_s * mean_between_failures_s) * (1 + math.sqrt(x) / 3 + x / 9) - checkpoint_s


def useful_share(interval_s: float, checkpoint_s: float, restart_s: float, mean_between_failures_s: float) -> float:
    """Useful work over wall time with exponential failures: each segment of work and checkpoint repeats until whole.

    Expected wall time of a segment is exp(R/M) M (exp((T + C)/M) - 1) (Daly 2006, equation 20).
    """
    m = mean_between_failures_s
    return interval_s / (m * math.exp(restart_s / m) * math.expm1((interval_s + checkpoint_s) / m))


@dataclass(frozen=True)
class Failures:
    """How a job on `nodes` alike nodes fails and recovers; failures are independent and exponential."""

    nodes: int
    failures_per_node_year: float
    repair_s: float
    checkpoint_s: float
    restart_s: float

    @property
    def mean_between_failures_s(self) -> float:
        return YEAR_S / (self.nodes * self.failures_per_node_year)

    @property
    def interval_s(self) -> float:
        """Daly's compute between checkpoints."""
        return daly_interval_s(self.checkpoint_s, self.mean_between_failures_s)

    @property
    def available(self) -> float:
        """The share of its time that a node is up: 1/rate of it, then down for the repair."""
        up = YEAR_S / self.failures_per_node_year
        return up / (up + self.repair_s)

    @property
    def spares(self) -> int:
        """The fewest spare nodes that are all in repair for less than 1% of the time (Poisson)."""
        mean = self.nodes * self.failures_per_node_year * self.repair_s / YEAR_S
        count, chance = 0, math.exp(-mean)
        below = chance
        while below < 0.99:
            count += 1
            chance *= mean / count
            below += chance
        return count

    def share(self, restart_s: float) -> float:
        """Useful work over wall time when each failure costs so long before the job runs again."""
        return useful_share(self.interval_s, self.checkpoint_s, restart_s, self.mean_between_failures_s)

    def fixed_share(self) -> float:
        """A job that needs all its nodes and has no spare one: it waits until every node is repaired."""
        return self.share(self.repair_s + self.restart_s)

    def spared_share(self) -> float:
        """A job whose failed node is replaced at once by a spare one."""
        return self.share(self.restart_s)

    def elastic_share(self, group: int = 1, wanted: int | None = None) -> float:
        """A job that goes on with fewer nodes and takes repaired ones in again, in whole replicas of `group` nodes.

        It re-forms at each arrival too, so that every failure costs two restarts, the second after a checkpoint.
        `wanted`: nodes that work at most, and that the share is of; others stand by.
        """
        most = wanted or self.nodes
        working = sum(chance * min(k // group * group, most) for k, chance in binomial(self.nodes, self.available))
        return self.share(2 * self.restart_s + self.checkpoint_s) * working / most


def binomial(n: int, p: float) -> Iterator[tuple[int, float]]:
    """(k, chance of k) of n tries; what is too unlikely for a float is zero."""
    if p >= 1:
        yield n, 1.0
        return
    for k in range(n + 1):
        log = (
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(p)
            + (n - k) * math.log1p(-p)
        )
        yield k, math.exp(log)


def remote_step_s(
    step_s: float, local_bytes: float, needed_bytes: float, touches: float, tier: Link, overlap: float
) -> float:
    """A step whose state does not fit and lies partly in a remote memory tier.

    Args:
        needed_bytes: what the step touches; what is over `local_bytes` moves over the tier `touches` times a step.
        overlap: the share of the step during which the tier can move data beside the compute.
    """
    moved = touches * max(0.0, needed_bytes - local_bytes)
    traffic = moved / tier.bytes_per_s + (tier.latency_s * touches if moved else 0.0)
    return step_s + max(0.0, traffic - overlap * step_s)
