"""What the measured stages share: warm-up as metrics, and when the first step began."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dyno.measure.warmup import steps_to_fill
from dyno.measure.warmup import warm_up as warm_until_steady
from dyno.measure.window import Meter
from dyno.record import Metric, unmeasured

FIRST_STEP: list[float] = []  # time.time() at the first step of this process
MARKS: dict[str, float] = {}  # time.time() when a phase of the run was over


def mark(phase: str) -> None:
    """A phase of the run (imports, meters, data, model, warmup, costs, ...) is over."""
    MARKS.setdefault(phase, time.time())


def phases(born: float) -> dict[str, float]:
    """Seconds of each marked phase, from the birth of the worker on: what a run's time went to."""
    ends = [born, *MARKS.values()]
    return {f"{phase}_s": round(end - begin, 3) for phase, begin, end in zip(MARKS, ends, MARKS.values(), strict=False)}


@dataclass
class Warm:
    """A finished warm-up: its metrics, and the steps that fill a window (the same on every rank)."""

    metrics: dict[str, Metric]
    steps_to_fill: int


def warm_up(meter: Meter, step: Callable[[], object]) -> Warm:
    """Run `step` until it is steady; a warm-up that never was becomes a flag of the row."""
    if not FIRST_STEP:
        FIRST_STEP.append(time.time())
    report = warm_until_steady(step, meter.device, meter.measure, meter.take_turn)
    if not report["steady"]:
        meter.flag("not_steady", f"step times still drifted after {report['steps']} warm-up steps")
    compiled, source = report["compile_time_s"], "first step less the median of later warm-up steps"
    metrics = {
        "compile_time_s": unmeasured("s", "one warm-up step")
        if compiled is None
        else Metric(compiled, "s", source=source),
        "warmup_steps": Metric(report["steps"], "steps", source="count"),
    }
    usual = float(np.median(report["times"][1:] or report["times"]))
    return Warm(metrics, steps_to_fill(usual, meter.device, meter.measure))
