"""Calibration on the user's own records: a coefficient a term, eager and compiled apart, and the error that remains.

A record is read as data: its techniques are built only from Dyno's own package, and a record that cannot be read so is
left out and counted. Two thirds of the runs are fitted, the errors are those of the last third, which the fit
never saw. How far a correction may leave the terms as derived, and whether at all, is settled within the first two.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyno.errors import UserError
from dyno.measure.environment import Device
from dyno.measure.hardware import resolve
from dyno.plan import memory, time
from dyno.plan.corrections import (
    MEMORY_GROUPS,
    MEMORY_TERMS,
    Calibration,
    Fit,
    corrected_memory,
    corrected_time,
    store,
)
from dyno.plan.fit import coefficients
from dyno.plan.machine import Machine, from_ceilings
from dyno.recipe import Recipe
from dyno.record import decode, find
from dyno.technique import of_ranks

FOLDS = 3
DRAWS = (0.05, 0.2, 0.8)  # how strongly coefficients are drawn to 1, see `fit.coefficients`
FEWEST = 8  # runs of a kind before anything is fitted
TIME_TERMS = (*time.DEVICE, "host", "fixed", "wire", "waited", "offload", "host update")


@dataclass(frozen=True)
class Sample:
    """One run: what arithmetic says of it, and what was measured."""

    id: str
    device: str
    machine: str
    fused: bool
    phases: memory.Phases
    seconds: dict[str, float] | None
    bubble: float
    peak_memory_bytes: float | None
    step_time_s: float | None
    choices: dict[str, Any]
    spread: float  # of the steps' times: the range of their middle half over their median


def sample_of(record: dict[str, Any]) -> Sample | None:
    """What a finished training record teaches; None where it holds nothing for a planner.

    Raises:
        UserError, KeyError, TypeError, ValueError: it is no record of techniques that are Dyno's own.
    """
    from dyno.plan import shape_of, with_kept_bytes

    config, metrics = record["config"], record["metrics"]
    if config["workload"]["measures"] != "train" or record["status"] != "ok":
        return None
    recipe = Recipe(config, record["choices"])
    shape = shape_of(recipe)
    assert shape is not None
    ceilings = record["environment"].get("ceilings") or {}
    kind = "cuda" if record["environment"].get("gpus") and ceilings.get("uuid") else "cpu"
    device = Device(kind, 0, str(record["fingerprint"]["device"]), 0, None, None, 1)
    shape = with_kept_bytes(recipe, shape, device)
    prints = of_ranks([t for chosen in recipe.techniques.values() for t in chosen], shape, device)
    share = prints[0]
    machine: Machine | None = None
    with contextlib.suppress(KeyError):
        machine = from_ceilings(ceilings, resolve(config["hardware"], kind, device.name))
    return Sample(
        str(record["id"]), device.name, str(record["fingerprint"].get("machine", "")), share.fused,
        memory.fullest(shape, prints, kind),
        time.slowest(shape, prints, machine, kind) if machine else None, share.bubble,
        value(metrics, "peak_memory_bytes"), value(metrics, "step_time_s"), record["choices"], spread_of(record),
    )  # fmt: skip


def spread_of(record: dict[str, Any]) -> float:
    """How far the step times of a training record lie apart; infinite where it does not say."""
    times = record.get("windows", {}).get("train", {}).get("step_time_s") or {}
    median, iqr = times.get("median"), times.get("iqr")
    return float(iqr) / float(median) if median and iqr is not None else float("inf")


def value(metrics: dict[str, Any], name: str) -> float | None:
    found = metrics.get(name, {}).get("value")
    return float(found) if isinstance(found, int | float) and found > 0 else None


def read(where: str | Path) -> tuple[list[Sample], int]:
    """(samples, records left out because they could not be read as Dyno's)."""
    samples, left_out = [], 0
    for path in find(where):
        try:
            sample = sample_of(decode(path.read_bytes()))
        except (OSError, UserError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            left_out += 1
            continue
        if sample:
            samples.append(sample)
    return samples, left_out


def is_held_out(sample: Sample) -> bool:
    """A third of the runs, by a hash of their names, so that a run stays on its side as others come."""
    return hashlib.sha256(sample.id.encode()).digest()[0] % 3 == 0


def kind_of(sample: Sample) -> str:
    return "compiled" if sample.fused else "eager"


def phase_row(terms: dict[str, float]) -> np.ndarray:
    """A phase's terms as the groups that have a coefficient each."""
    row = dict.fromkeys(MEMORY_GROUPS, 0.0)
    for name, number in terms.items():
        row[MEMORY_TERMS[name]] += number
    return np.array([row[group] for group in MEMORY_GROUPS])


def binding_phase(phases: memory.Phases) -> str:
    return max(phases, key=lambda phase: memory.total(phases[phase]))


def peak(phases: memory.Phases) -> float:
    return memory.total(phases[binding_phase(phases)])


def fit_memory(samples: list[Sample], draw: float) -> Fit:
    """The peak is the largest phase: fit the phases that bind, see which bind then, and fit those."""
    fit = Fit(dict.fromkeys(MEMORY_GROUPS, 1.0), fitted=len(samples))
    measured = np.array([s.peak_memory_bytes for s in samples], dtype=float)
    for _ in range(6):
        binding = [binding_phase(corrected_memory(s.phases, fit)) for s in samples]
        rows = np.array([phase_row(s.phases[p]) for s, p in zip(samples, binding, strict=True)])
        found = dict(zip(MEMORY_GROUPS, coefficients(rows, measured, draw).tolist(), strict=True))
        if found == fit.coefficients:
            break
        fit.coefficients = found
    return fit


def fit_time(samples: list[Sample], draw: float) -> Fit:
    """Device-bound runs fit the device's terms, host-bound ones the host's; who is which follows from the fit."""
    fit = Fit(dict.fromkeys(TIME_TERMS, 1.0), fitted=len(samples))
    measured = np.array([s.step_time_s for s in samples], dtype=float)
    for _ in range(8):
        rows = []
        for sample in samples:
            assert sample.seconds is not None
            now = corrected_time(sample.seconds, fit)
            busy = 1 - sample.bubble  # only the device is idle in a pipeline's bubble
            device = (sum(now[n] for n in time.DEVICE) + now["waited"]) / busy
            on_device = (*time.DEVICE, "wire", "waited")
            bound = max((device, on_device), (now["host"], ("host",)), (now["offload"], ("offload",)))[1]
            shares = dict.fromkeys(bound, 1 / busy if bound is on_device else 1.0)
            shares |= {"fixed": 1.0, "host update": 1.0}
            shares["wire"] = (1 - time.OVERLAP) * shares.get("wire", 0.0)
            rows.append([shares.get(n, 0.0) * sample.seconds[n] for n in TIME_TERMS])
        found = dict(zip(TIME_TERMS, coefficients(np.array(rows), measured, draw).tolist(), strict=True))
        if found == fit.coefficients:
            break
        fit.coefficients = found
    return fit


def errors(samples: list[Sample], fit: Fit | None, what: str) -> np.ndarray:
    """Relative errors of predictions, signed: predicted / measured - 1."""
    out = []
    for s in samples:
        if what == "memory":
            out.append(peak(corrected_memory(s.phases, fit)) / float(s.peak_memory_bytes or np.nan) - 1)
        else:
            terms = corrected_time(s.seconds or {}, fit)
            out.append(time.step_s(terms, s.bubble) / float(s.step_time_s or np.nan) - 1)
    return np.array(out)


def usable(samples: list[Sample], what: str) -> list[Sample]:
    if what == "memory":
        return [s for s in samples if s.peak_memory_bytes]
    return [s for s in samples if s.step_time_s and s.seconds]


def calibrated(samples: list[Sample], device: str, left_out: int = 0, machine: str = "") -> Calibration:
    """Fit every kind of run of one device, on one machine or on all, that has enough of them."""
    mine = [s for s in samples if s.device == device and machine in ("", s.machine)]
    out = Calibration(device, machine, records=len(mine), left_out=left_out)
    for what, fitter in (("memory", fit_memory), ("time", fit_time)):
        for kind in ("eager", "compiled"):
            chosen = [s for s in usable(mine, what) if kind_of(s) == kind]
            held = [s for s in chosen if is_held_out(s)]
            fitted = [s for s in chosen if not is_held_out(s)]
            if len(fitted) < FEWEST:
                continue
            draw = strength(fitter, fitted, what)
            fit = fitter(fitted, draw) if draw else unchanged(fitted, what)
            if held:
                absolute = np.abs(errors(held, fit, what))
                fit.median_error, fit.p95_error = float(np.median(absolute)), float(np.quantile(absolute, 0.95))
                fit.held_out = len(held)
            getattr(out, what)[kind] = fit
    return out


def unchanged(samples: list[Sample], what: str) -> Fit:
    """No correction: the terms as derived, with the error that records show of them."""
    return Fit(dict.fromkeys(MEMORY_GROUPS if what == "memory" else TIME_TERMS, 1.0), fitted=len(samples))


def strength(fitter: Callable[[list[Sample], float], Fit], samples: list[Sample], what: str) -> float | None:
    """How strongly to draw: the most that predicts what its fits did not see, in thirds of `samples`, as well as the
    best does within that one's standard error (Breiman et al. 1984, the rule of one standard error).

    None: the terms as derived do. The error is relative and counted up to 1, so that one wild run does not decide.
    """

    def error(draw: float | None) -> np.ndarray:
        found = []
        for i in range(FOLDS):
            rest, third = [s for j, s in enumerate(samples) if j % FOLDS != i], samples[i::FOLDS]
            found.append(np.minimum(np.abs(errors(third, fitter(rest, draw) if draw else None, what)), 1.0))
        return np.concatenate(found)

    found = {draw: error(draw) for draw in (None, *sorted(DRAWS, reverse=True))}
    best = min(found.values(), key=np.mean)
    enough = best.mean() + best.std() / np.sqrt(len(best))
    return next(draw for draw, errors_ in found.items() if errors_.mean() <= enough)


def of_all(samples: list[Sample], device: str, left_out: int = 0) -> list[Calibration]:
    """A calibration for each machine, where there are several, and one for all with such a device; those with a fit."""
    machines = sorted({s.machine for s in samples if s.device == device} - {""})
    found = [calibrated(samples, device, left_out, machine) for machine in machines if len(machines) > 1]
    return [c for c in (*found, calibrated(samples, device, left_out)) if c.memory or c.time]


def from_records(where: str | Path) -> list[Calibration]:
    """Read records, fit every device among them, keep the results for later plans.

    Raises:
        UserError: no device has enough training runs.
    """
    samples, left_out = read(where)
    found = [c for device in sorted({s.device for s in samples}) for c in of_all(samples, device, left_out)]
    if not found:
        raise UserError(
            f"{where} has {len(samples)} finished training runs ({left_out} records left out): a calibration needs at "
            f"least {FEWEST} to fit of one device, eager or compiled, and as many again to check"
        )
    for calibration in found:
        store(calibration)
    return found
