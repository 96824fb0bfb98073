"""How much of a rank's state may lie in pooled memory behind a link before a step slows down. Predicted, not measured.

What crosses the link least often a step moves first: the optimizer's state is read and written once, activations are
written and read by each micro-batch, weights are read twice by each. The link is taken to carry nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dyno.plan.links import Link
from dyno.plan.settings import settings, share

EXAMPLE = "--remote-memory gb_per_s=64,slower=5%,latency_us=2,overlap=50% (the last three may be left out)"
KNOWN: dict[str, Callable[[str], float]] = {"gb_per_s": float, "slower": share, "latency_us": float, "overlap": share}


@dataclass(frozen=True)
class Tenant:
    """One kind of state: its bytes on a rank, how often each crosses in a step, and how many of them may be far."""

    name: str
    bytes: float
    touches: float
    remote_bytes: float


@dataclass(frozen=True)
class Pooled:
    """The split that slows the step by at most what was asked, and what it then takes."""

    tier: Link
    overlap: float
    slower: float
    step_s: float
    slowed_s: float
    tenants: list[Tenant]

    @property
    def remote_bytes(self) -> float:
        return sum(t.remote_bytes for t in self.tenants)

    def to_json(self) -> dict[str, Any]:
        return {
            "label": "predicted", "link_byte_per_s": self.tier.bytes_per_s, "link_latency_s": self.tier.latency_s,
            "overlap": self.overlap, "slower": self.slower, "step_time_s": self.step_s, "slowed_step_time_s": self.slowed_s,
            "remote_bytes": self.remote_bytes, "share": self.remote_bytes / sum(t.bytes for t in self.tenants),
            "state": [vars(t) for t in self.tenants],
        }  # fmt: skip


def touches(micro_batches: float, in_flight: float) -> dict[str, float]:
    """How often a byte crosses the link in a step, by kind; what is not named stays."""
    return {
        "optimizer": 2.0,
        "master": 2.0,
        "gradients": 2.0 * micro_batches,
        "activations": 2.0 * micro_batches / in_flight,
        "weights": 2.0 * micro_batches + 1.0,
    }


def remote_of(text: str) -> dict[str, float]:
    """What --remote-memory says, with what it leaves out.

    Raises:
        UserError: it says something else.
    """
    asked = {"slower": 0.05, "latency_us": 2.0, "overlap": 0.5}
    return asked | settings("--remote-memory", text, KNOWN, "gb_per_s", EXAMPLE)


def pooled(state: Mapping[str, float], often: Mapping[str, float], step_s: float, asked: Mapping[str, float]) -> Pooled:
    """The most bytes that may be far over the link asked for (`remote_of`)."""
    tier = Link(asked["gb_per_s"] * 1e9, asked["latency_us"] * 1e-6)
    left = allowed = (asked["overlap"] + asked["slower"]) * step_s
    tenants = []
    for name in sorted(state.keys() & often.keys(), key=lambda n: (often[n], n)):
        room = max(0.0, left - often[name] * tier.latency_s) * tier.bytes_per_s / often[name]
        remote = min(state[name], room)
        left -= remote * often[name] / tier.bytes_per_s + (often[name] * tier.latency_s if remote else 0.0)
        tenants.append(Tenant(name, state[name], often[name], remote))
    slowed = step_s + max(0.0, allowed - left - asked["overlap"] * step_s)
    return Pooled(tier, asked["overlap"], asked["slower"], step_s, slowed, tenants)
