"""What a record, or a plan, says about a quantity: its value and bootstrap draws of it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyno.claims.verdict import NOT_HERE, UNSURE
from dyno.compare import SAMPLED, step_times
from dyno.measure.statistics import bootstrap_means, bootstrap_medians
from dyno.report.rows import rows

DRAWS = 2000
PER_WINDOW = {"validation_loss": "validation_losses"}  # metric: the samples in the train stage's details


class Missing(Exception):
    """A quantity that is not there; `verdict` is what that makes of a figure."""

    def __init__(self, reason: str, verdict: str = UNSURE):
        super().__init__(reason)
        self.verdict = verdict


@dataclass(frozen=True)
class Number:
    """A value and its draws (DRAWS,); no draws where it is counted or predicted."""

    value: float
    draws: np.ndarray | None = None


@dataclass(frozen=True)
class Absent:
    """No evidence, and why."""

    reason: str
    verdict: str

    def number(self, name: str) -> Number:
        raise Missing(self.reason, self.verdict)


@dataclass(frozen=True)
class Predicted:
    """The quantities of a plan."""

    values: Mapping[str, float]

    def number(self, name: str) -> Number:
        if name not in self.values:
            raise Missing(f"the plan has no {name}; it has {', '.join(sorted(self.values))}")
        return Number(self.values[name])


@dataclass(frozen=True)
class Measured:
    """Records of one recipe on one machine. Repeats are pooled: the median value, and draws from all of them."""

    records: list[dict[str, Any]]

    @property
    def ok(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["status"] == "ok"]

    def number(self, name: str) -> Number:
        """Raises Missing when no run ended well, or none of them measured it."""
        if not self.ok:
            last = self.records[-1]
            refused = last["status"] == "unsupported"
            raise Missing(
                last["reason"] if refused else f"{last['status']}: {last['reason']}", NOT_HERE if refused else UNSURE
            )
        found = [of_record(record, name) for record in self.ok]
        value = float(np.median([n.value for n in found]))
        if len(found) == 1 or all(n.draws is None and n.value == value for n in found):
            return found[0]
        spread = [np.full(DRAWS, n.value) if n.draws is None else n.draws for n in found]
        turns = np.arange(DRAWS) % len(found)
        return Number(value, np.stack(spread)[turns, np.arange(DRAWS)])


def of_record(record: dict[str, Any], name: str) -> Number:
    """A metric of a record, or `step_flops`: the model FLOPs of a step of all ranks."""
    if name == "step_flops":
        window = record["windows"].get("train", {})
        if not window.get("steps") or not window.get("flops"):
            raise Missing("the run counted no FLOPs of a step")
        return Number(window["flops"] / window["steps"] * max(1, len(record.get("ranks") or ())))
    metric = record["metrics"].get(name)
    if metric is None or metric.get("value") is None:
        raise Missing(f"{name} was not measured: {(metric or {}).get('reason') or 'the run has no such metric'}")
    return Number(float(metric["value"]), draws(record, name, metric))


def draws(record: dict[str, Any], name: str, metric: dict[str, Any]) -> np.ndarray | None:
    """Draws of a metric from its samples: step times, or losses of the text's windows, which pair up between runs.

    Where only an interval is recorded, normal draws that have it.
    """
    value, seed = float(metric["value"]), zlib.crc32(f"{record['id']} {name}".encode())
    losses = (record.get("details", {}).get("train") or {}).get(PER_WINDOW.get(name, ""))
    if losses and len(losses) > 1:
        return bootstrap_means(np.array(losses), DRAWS, seed=0)  # the same windows in every run
    window, power = SAMPLED.get(name, ("", 0))
    if power:
        times = step_times(rows(None, [record])).get(window or "train")
        if times is not None and len(times) > 1:
            medians = bootstrap_medians(times, DRAWS, seed)
            return value * (medians / float(np.median(times))) ** power
    low, high = metric.get("low"), metric.get("high")
    if low is None or high is None or low == high:
        return None
    return np.random.default_rng(seed).normal(value, (high - low) / (2 * 1.96), DRAWS)
