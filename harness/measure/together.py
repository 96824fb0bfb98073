"""One row of a run of several ranks: what every GPU draws and costs is added up, of memory the fullest rank tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import distributed as dist

from dyno.record import Metric

# Each rank has a GPU of its own, and all divide by the tokens of all of them. A CPU is one device to all ranks.
ADDED = (
    "energy_j", "energy_j_per_token", "power_w", "idle_power_w", "energy_above_idle_j", "carbon_g", "cost_usd",
    "cost_usd_per_mtok",
)  # fmt: skip
FULLEST = (
    "peak_memory_bytes", "reserved_memory_bytes", "process_memory_bytes", "device_memory_bytes", "activation_bytes",
    "parameter_bytes", "gradient_bytes", "optimizer_bytes",
)  # fmt: skip


def gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank, which call this together. It is pickled: of this run's own ranks only."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(metrics: Mapping[str, Metric], every: Sequence[Mapping[str, Metric]], device: str) -> dict[str, Metric]:
    """Rank 0's metrics with those of ADDED (on GPUs) and FULLEST over all ranks, whose own are in `every`; and `ranks`.

    A figure that one rank lacks is empty for all, with that rank's reason.
    """
    ranks = len(every)
    out = {**metrics, "ranks": Metric(ranks, "ranks", source="count")}
    for name in (*(ADDED if device == "cuda" else ()), *FULLEST):
        if name not in metrics:
            continue
        found = [row[name] for row in every]
        missing = [(rank, metric) for rank, metric in enumerate(found) if metric.value is None]
        values = [metric.value for metric in found if metric.value is not None]
        if missing:
            rank, metric = missing[0]
            out[name] = replace(metric, reason=f"rank {rank}: {metric.reason}")
        elif name in ADDED:
            out[name] = Metric(sum(values), found[0].unit, ranks, source=f"{found[0].source}; sum of {ranks} GPUs")
        else:
            source = f"{found[0].source}; the fullest of {ranks} ranks"
            out[name] = Metric(max(values), found[0].unit, ranks, min(values), max(values), source)
    return out
