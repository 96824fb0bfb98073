"""From two readings of the energy counter and the sampler's log to an energy, or to the reason why there is none."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dyno.measure.power import EMPTY_LOG, PowerLog

TICK_S = 0.1
"""How often the counter moves on an H100, where nobody probed it."""
MINIMUM_TICKS = 100
"""Counter steps that a region must hold: an error of a step at each end is then two per cent."""
DISAGREEMENT = 0.05
POWER_FLOOR = 0.1
"""The least plausible mean power as a share of the power limit: 70 W of an H100's 700 W."""
POWER_CEILING = 1.1
TEMPERATURE_C = (20.0, 95.0)


@dataclass(frozen=True)
class Energy:
    """The energy of one region. Invalid: `energy_j` is None and `code` and `reason` say why.

    `counter_j` and `sampled_j` (the integral of the sampled power) are kept either way, for whoever wants to judge.
    """

    energy_j: float | None
    seconds: float
    mean_power_w: float | None = None
    counter_j: float | None = None
    sampled_j: float | None = None
    samples: int = 0
    tick_s: float = TICK_S
    source: str = "nvml_counter"
    code: str | None = None
    reason: str | None = None

    def summary(self) -> dict[str, Any]:
        return asdict(self)


def integrate(log: PowerLog, start_s: float, end_s: float) -> float | None:
    """Joules in [start_s, end_s] by the trapezoid rule over the log's power; None if the log does not cover it.

    Covered means a reading at or before each end, within a quarter of a second of it, and no hole longer than that.
    """
    known = np.isfinite(log.power_w)
    times, power = log.time_s[known], log.power_w[known]
    inside = (times > start_s) & (times < end_s)
    if not inside.any():
        return None
    edges = np.interp([start_s, end_s], times, power)
    t = np.concatenate([[start_s], times[inside], [end_s]])
    p = np.concatenate([edges[:1], power[inside], edges[1:]])
    return None if np.max(np.diff(t)) > 0.25 else float(np.trapezoid(p, t))


def judge(
    counter_j: float | None,
    start_s: float,
    end_s: float,
    log: PowerLog = EMPTY_LOG,
    *,
    limit_w: float | None = None,
    tick_s: float | None = None,
    source: str = "nvml_counter",
    reason: str | None = None,
) -> Energy:
    """The energy of the region [start_s, end_s] (CLOCK_MONOTONIC), judged by the rules of the trusted tools.

    Args:
        counter_j: difference of the energy counter over the region, or None if it could not be read (`reason`).
        log: the sampler's readings, for the cross-check and the plausibility of power and temperature.
        limit_w: the device's power limit. tick_s: how often the counter moves.
    """
    seconds, tick = end_s - start_s, tick_s or TICK_S
    window = log.between(start_s, end_s)
    sampled = integrate(window, start_s, end_s)
    facts: dict[str, Any] = {
        "seconds": seconds, "counter_j": counter_j, "sampled_j": sampled, "samples": len(window), "tick_s": tick,
        "source": source,
    }  # fmt: skip

    def invalid(code: str, why: str) -> Energy:
        return Energy(None, code=code, reason=why, **facts)

    if counter_j is None:
        return invalid("not_measured", reason or "the energy counter was not read")
    if seconds < MINIMUM_TICKS * tick:
        why = f"energy needs {MINIMUM_TICKS} steps of the counter = {MINIMUM_TICKS * tick:.1f} s, not {seconds:.2f} s"
        sampled_power = None if sampled is None or len(window) < 10 else sampled / seconds
        return Energy(None, mean_power_w=sampled_power, code="too_short", reason=why, **facts)
    if sampled is None:
        return invalid("no_cross_check", "the sampler's log does not cover the region")
    if not math.isclose(counter_j, sampled, rel_tol=0, abs_tol=DISAGREEMENT * max(abs(counter_j), abs(sampled))):
        return invalid("counter_disagrees", f"the counter says {counter_j:.1f} J, the sampled power {sampled:.1f} J")
    power = counter_j / seconds
    if limit_w is not None and not POWER_FLOOR * limit_w <= power <= POWER_CEILING * limit_w:
        bounds = f"{POWER_FLOOR * limit_w:.0f} to {POWER_CEILING * limit_w:.0f} W"
        return invalid("implausible_power", f"the mean power of {power:.1f} W is outside {bounds}")
    heat = window.temperature_c[np.isfinite(window.temperature_c)]
    if len(heat) and not (TEMPERATURE_C[0] <= heat.min() and heat.max() <= TEMPERATURE_C[1]):
        seen = f"{heat.min():.0f} to {heat.max():.0f} C"
        return invalid("implausible_temperature", f"the temperature of {seen} is outside {TEMPERATURE_C} C")
    return Energy(counter_j, mean_power_w=power, **facts)
