"""Training that survives its machines: checkpoint intervals, expected throughput under failures, and memory far away.

Simulated closed forms, for plans; nothing here was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dyno.plan.links import Link


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
class Elastic:
    """A job that goes on with fewer nodes after a failure and takes repaired ones in again."""

    nodes: int
    failures_per_node_year: float
    repair_s: float
    checkpoint_s: float
    restart_s: float

    @property
    def mean_between_failures_s(self) -> float:
        return 365.25 * 86400 / (self.nodes * self.failures_per_node_year)

    @property
    def available_nodes(self) -> float:
        """Nodes up on average: each alternates between up for 1/rate and down for the repair."""
        up = 365.25 * 86400 / self.failures_per_node_year
        return self.nodes * up / (up + self.repair_s)

    def throughput_share(self) -> float:
        """Expected throughput over that of all nodes that never fail, at Daly's interval; it re-forms at each arrival
        too, so that every failure costs two restarts."""
        interval = daly_interval_s(self.checkpoint_s, self.mean_between_failures_s)
        share = useful_share(interval, self.checkpoint_s, 2 * self.restart_s, self.mean_between_failures_s)
        return share * self.available_nodes / self.nodes


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
