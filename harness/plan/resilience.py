"""What failures make of a planned job: fixed, with spare nodes and elastic. Predicted by closed forms, never measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dyno.errors import UserError
from dyno.plan.budget import budget
from dyno.plan.elastic import Failures
from dyno.plan.settings import settings
from dyno.show import seconds

EXAMPLE = "--elastic failures=1.4,repair=24h,restart=10m (failures a node and year; the others may be left out)"
KNOWN: dict[str, Callable[[str], float]] = {"failures": float, "repair": seconds, "restart": seconds}


@dataclass(frozen=True)
class Job:
    """A planned training job: what it does without failures and what a checkpoint of it weighs.

    `replica_nodes`: nodes that hold one copy of the model together; a failure takes all of them out of an elastic job
    that cannot be regrouped into whole copies.
    """

    nodes: int
    gpus: int
    tokens_per_s: float
    state_bytes: float
    replica_nodes: int = 1


@dataclass(frozen=True)
class Way:
    """One way to live with failures; days and money are empty without a number of tokens."""

    name: str
    nodes: int
    share: float
    tokens_per_s: float
    days: float | None
    cost_usd: float | None


@dataclass(frozen=True)
class Resilience:
    """The failures, what a checkpoint takes and how often it pays, and the ways."""

    failures: Failures
    state_bytes: float
    storage: str
    ways: list[Way]

    def to_json(self) -> dict[str, Any]:
        return {
            "label": "predicted", "failures_per_node_year": self.failures.failures_per_node_year,
            "repair_s": self.failures.repair_s, "restart_s": self.failures.restart_s,
            "mean_between_failures_s": self.failures.mean_between_failures_s, "state_bytes": self.state_bytes,
            "checkpoint_s": self.failures.checkpoint_s, "checkpoint_interval_s": self.failures.interval_s,
            "storage": self.storage, "ways": [vars(way) for way in self.ways],
        }  # fmt: skip


def failures_of(text: str) -> dict[str, float]:
    """What --elastic says, with what it leaves out.

    Raises:
        UserError: it says something else.
    """
    return {"repair": 86400.0, "restart": 600.0} | settings("--elastic", text, KNOWN, "failures", EXAMPLE)


def storage_of(hardware: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint is written to.

    Raises:
        UserError: the hardware does not state it.
    """
    storage = hardware.get("storage")
    if not storage or not storage.get("byte_per_s"):
        raise UserError(
            "--elastic needs the bandwidth of a checkpoint: hardware.storage.byte_per_s, written by each GPU"
        )
    return storage


def resilience(job: Job, asked: Mapping[str, float], hardware: Mapping[str, Any], tokens: float | None) -> Resilience:
    """The ways of a job under the failures asked for (`failures_of`)."""
    storage = storage_of(hardware)
    checkpoint_s = job.state_bytes / (float(storage["byte_per_s"]) * job.gpus)
    failing = Failures(job.nodes, asked["failures"], asked["repair"], checkpoint_s, asked["restart"])
    per_node = job.gpus / job.nodes

    def way(name: str, nodes: int, share: float) -> Way:
        rate = job.tokens_per_s * share
        total = budget(tokens, rate, round(nodes * per_node), hardware) if tokens and rate else None
        return Way(name, nodes, share, rate, total.hours / 24 if total else None, total.cost_usd if total else None)

    spares = failing.spares
    ways = [
        way("no failures", job.nodes, 1.0),
        way("fixed, waits for repairs", job.nodes, failing.fixed_share()),
        way(f"fixed, spare nodes: {spares}", job.nodes + spares, failing.spared_share()),
        way("elastic", job.nodes, failing.elastic_share(job.replica_nodes)),
    ]
    if job.replica_nodes > 1:
        more = replace(failing, nodes=job.nodes + job.replica_nodes)
        share = more.elastic_share(job.replica_nodes, wanted=job.nodes)
        ways.append(way("elastic, a spare replica", more.nodes, share))
    return Resilience(failing, job.state_bytes, str(storage.get("source") or "unsourced"), ways)
