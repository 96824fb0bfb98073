"""What calibration found, kept under Dyno's home: a coefficient a term, and the error that remained.

One file for a kind of device and, where records come from several machines, one for each of these: hosts differ more than
their devices do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dyno.home import home
from dyno.plan.memory import Phases
from dyno.record import write_json

MEMORY_TERMS = {
    "weights": "state", "optimizer": "state", "master": "state", "gradients": "state", "standing buffers": "state",
    "cast weights": "cast weights", "visiting weights": "cast weights", "activations": "activations", "logits": "logits",
    "recomputed inside": "recomputed inside", "temporaries": "temporaries", "extra": "extra",
}  # fmt: skip
MEMORY_GROUPS = tuple(dict.fromkeys(MEMORY_TERMS.values()))


@dataclass
class Fit:
    """Coefficients of one kind of run on one device, and the relative errors on held-out runs (median, 95%)."""

    coefficients: dict[str, float] = field(default_factory=dict)
    median_error: float | None = None
    p95_error: float | None = None
    fitted: int = 0
    held_out: int = 0


@dataclass
class Calibration:
    """`memory` and `time` by "eager" and "compiled"; what is missing there is uncalibrated. `machine` is empty where the
    runs of all machines with such a device were fitted together."""

    device: str
    machine: str = ""
    memory: dict[str, Fit] = field(default_factory=dict)
    time: dict[str, Fit] = field(default_factory=dict)
    records: int = 0
    left_out: int = 0


def corrected_memory(phases: Phases, fit: Fit | None) -> Phases:
    """Phases with each term by its coefficient."""
    if fit is None:
        return phases
    of = fit.coefficients
    return {p: {n: x * of.get(MEMORY_TERMS.get(n, n), 1.0) for n, x in t.items()} for p, t in phases.items()}


def corrected_time(terms: dict[str, float], fit: Fit | None) -> dict[str, float]:
    return terms if fit is None else {n: x * fit.coefficients.get(n, 1.0) for n, x in terms.items()}


def path_of(device: str, machine: str = "") -> Path:
    name = hashlib.sha256(f"{device}{machine}".encode()).hexdigest()[:16]
    return home() / "plan" / f"{name}.json"


def store(calibration: Calibration) -> Path:
    path = path_of(calibration.device, calibration.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(calibration))
    return path


def load(device: str, machine: str = "") -> Calibration | None:
    """The stored calibration of a device, or None where there is none that can be read."""
    try:
        data = json.loads(path_of(device, machine).read_bytes())
        fits = {what: {kind: Fit(**fit) for kind, fit in data[what].items()} for what in ("memory", "time")}
        return Calibration(data["device"], machine, **fits, records=data["records"], left_out=data["left_out"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fit_of(found: Sequence[Calibration | None], what: str, kind: str) -> Fit | None:
    """The first calibration's word on `what`, memory or time, of a kind of run, or the next one's that has one."""
    return next((fit for one in found if one and (fit := getattr(one, what).get(kind))), None)
