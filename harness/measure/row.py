"""From a window's readings to the metrics of a row. No torch: pure arithmetic, tested on made-up readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyno.measure.carbon import carbon_metric
from dyno.measure.cost import cost_metric, cost_per_mtok_metric
from dyno.measure.energy import Energy
from dyno.measure.roofline import roofline_metrics
from dyno.measure.statistics import mean_interval, median_interval, percentile
from dyno.record import Metric, unmeasured


@dataclass(frozen=True)
class Readings:
    """All that one window read. `tokens`, `flops` and `traffic_bytes` are the caller's totals, None if not counted."""

    device: str
    step_times_s: np.ndarray
    seconds: float
    clock: str
    tokens: float | None
    flops: float | None
    traffic_bytes: float | None
    dtype: str
    energy: Energy
    idle_power_w: Metric
    memory: dict[str, Metric]
    emissions: dict[str, Any] | None
    emissions_reason: str
    hardware: Mapping[str, Any]
    resamples: int = 2000
    seed: int = 0


def time_metrics(
    name: str, times_s: np.ndarray, source: str, resamples: int = 2000, seed: int = 0
) -> dict[str, Metric]:
    """`<name>_s` (the median with its interval), `<name>_iqr_s`, `<name>_p95_s` and `<name>_p99_s` of times (n,)."""
    count = len(times_s)
    if count == 0:
        return {f"{name}{part}_s": unmeasured("s", "no samples") for part in ("", "_iqr", "_p95", "_p99")}
    low, high = median_interval(times_s, resamples, seed)
    q1, median, q3 = (float(x) for x in np.percentile(times_s, [25, 50, 75]))
    out = {
        f"{name}_s": Metric(median, "s", count, low, high, source),
        f"{name}_iqr_s": Metric(q3 - q1, "s", count, source=source),
    }
    for q in (95, 99):
        value, reason = percentile(times_s, q)
        out[f"{name}_p{q}_s"] = Metric(value, "s", count, source=source, reason=reason)
    return out


def window_metrics(r: Readings, ceilings: Mapping[str, Any] | None) -> dict[str, Metric]:
    """The row of a window: time, rate, memory, energy, carbon, money and the roofline."""
    out = time_metrics("step_time", r.step_times_s, r.clock, r.resamples, r.seed)
    out["tokens_per_s"] = _rate(r)
    out |= r.memory
    out |= _energy_metrics(r)
    if r.seconds > 0:
        out |= roofline_metrics(r.flops, r.traffic_bytes, r.seconds, r.dtype, r.hardware, ceilings)
        out["cost_usd"] = cost_metric(r.seconds, out["energy_j"], r.hardware)
    else:
        out |= {name: unmeasured("", "no samples") for name in ("mfu", "mbu", "roofline_fraction")}
        out["arithmetic_intensity"] = unmeasured("FLOP/B", "no samples")
        out["cost_usd"] = unmeasured("USD", "no samples")
    out["cost_usd_per_mtok"] = cost_per_mtok_metric(out["cost_usd"], r.tokens)
    return out


def _rate(r: Readings) -> Metric:
    """Tokens over the whole time, hiccups included; the interval is that of the mean step."""
    if not r.tokens or r.seconds <= 0:
        return unmeasured("token/s", "the window counted no tokens" if r.seconds > 0 else "no samples")
    low, high = mean_interval(r.step_times_s, r.resamples, r.seed)
    mean = float(np.mean(r.step_times_s)) if len(r.step_times_s) else 0.0
    rate = r.tokens / r.seconds
    bounds = (None, None) if low is None or high is None else (rate * mean / high, rate * mean / low)
    return Metric(rate, "token/s", max(1, len(r.step_times_s)), bounds[0], bounds[1], r.clock)


def _energy_metrics(r: Readings) -> dict[str, Metric]:
    cpu, memory = _modelled(r, "cpu_energy_j"), _modelled(r, "ram_energy_j")
    if r.device == "cpu" and cpu.source == "rapl":  # read, not modelled: it is this device's energy
        energy, power = cpu, Metric((cpu.value or 0.0) / r.energy.seconds, "W", source="rapl")
    else:
        e = r.energy
        why = f"{e.code}: {e.reason}"
        energy = unmeasured("J", why) if e.energy_j is None else Metric(e.energy_j, "J", source=e.source)
        power = unmeasured("W", why)
        if e.mean_power_w is not None:
            power = Metric(e.mean_power_w, "W", e.samples, source=e.source if e.code is None else "nvml_sampler")
    return {
        "energy_j": energy,
        "energy_j_per_token": _per_token(energy, r.tokens),
        "power_w": power,
        "idle_power_w": r.idle_power_w,
        "energy_above_idle_j": _above_idle(energy, r),
        "carbon_g": carbon_metric(energy, r.hardware),
        "cpu_energy_j": cpu,
        "ram_energy_j": memory,
        "cpu_carbon_g": carbon_metric(cpu, r.hardware),
    }


def _modelled(r: Readings, key: str) -> Metric:
    """codecarbon's figure for the whole machine: read from RAPL, or modelled and called an estimate."""
    if r.emissions is None:
        return unmeasured("J", r.emissions_reason)
    source = r.emissions["source"] if key == "cpu_energy_j" else "estimate"
    return Metric(r.emissions[key], "J", source=source)


def _per_token(energy: Metric, tokens: float | None) -> Metric:
    if energy.value is None:
        return unmeasured("J/token", str(energy.reason))
    if not tokens:
        return unmeasured("J/token", "the window counted no tokens")
    return Metric(energy.value / tokens, "J/token", source=energy.source)


def _above_idle(energy: Metric, r: Readings) -> Metric:
    if energy.value is None:
        return unmeasured("J", str(energy.reason))
    if r.idle_power_w.value is None:
        return unmeasured("J", f"no idle power: {r.idle_power_w.reason}")
    return Metric(energy.value - r.idle_power_w.value * r.energy.seconds, "J", source=energy.source)
