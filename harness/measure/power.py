"""Where power readings come from: NVML, nothing (with the reason), or a replayed log. No torch, no GPU needed to test.

A log is what the sampler writes: one line a reading, tab separated, seconds of the machine's monotonic clock first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from dyno.measure.nvml import NotMeasured, NvmlDevice


class PowerSource(Protocol):
    """A device that knows its power. Each reading may raise NotMeasured with the reason."""

    source: str

    def energy_j(self) -> float: ...
    def power_w(self) -> float: ...
    def temperature_c(self) -> float: ...
    def limit_w(self) -> float: ...
    def clock_mhz(self) -> float: ...
    def throttle_bits(self) -> int: ...


@dataclass(frozen=True)
class PowerLog:
    """Readings of one device, one a row: all arrays (n,), times in seconds of CLOCK_MONOTONIC, ascending."""

    time_s: np.ndarray
    power_w: np.ndarray
    energy_j: np.ndarray
    temperature_c: np.ndarray
    clock_mhz: np.ndarray
    throttle_bits: np.ndarray

    def __len__(self) -> int:
        return len(self.time_s)

    def between(self, start_s: float, end_s: float) -> PowerLog:
        """The readings in [start_s, end_s], and the one before and the one after, which integration needs."""
        first = max(0, int(np.searchsorted(self.time_s, start_s, side="right")) - 1)
        last = int(np.searchsorted(self.time_s, end_s, side="left")) + 1
        return PowerLog(*(getattr(self, f.name)[first:last] for f in fields(self)))


EMPTY_LOG = PowerLog(*(np.empty(0) for _ in fields(PowerLog)))


def read_log(path: Path) -> PowerLog:
    """Read a sampler's log; lines that begin with '#' and a last line cut short by a kill are left out."""
    columns = len(fields(PowerLog))
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    rows = [[float(x) for x in line.split("\t")] for line in whole if line and not line.startswith("#")]
    table = np.array([row for row in rows if len(row) == columns], dtype=np.float64).reshape(-1, columns)
    return PowerLog(*table.T)


def log_line(now_s: float, source: PowerSource) -> str:
    """One reading of `source` as a line of the log. A field that this device does not give is nan."""
    readings = (source.power_w, source.energy_j, source.temperature_c, source.clock_mhz, source.throttle_bits)
    return "\t".join(f"{value:.12g}" for value in (now_s, *map(_or_nan, readings))) + "\n"


def _or_nan(reading: Callable[[], float]) -> float:
    try:
        return float(reading())
    except NotMeasured:
        return float("nan")


class NullPower:
    """A device whose power nobody can read; every reading says why."""

    source = "none"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def energy_j(self) -> float:
        raise NotMeasured(self.reason)

    def power_w(self) -> float:
        raise NotMeasured(self.reason)

    def temperature_c(self) -> float:
        raise NotMeasured(self.reason)

    def limit_w(self) -> float:
        raise NotMeasured(self.reason)

    def clock_mhz(self) -> float:
        raise NotMeasured(self.reason)

    def throttle_bits(self) -> int:
        raise NotMeasured(self.reason)


class ReplayPower:
    """A recorded log played back against a clock: each reading is the newest one logged by `now()` seconds."""

    source = "replay"

    def __init__(self, log: PowerLog, limit_w: float, now: Callable[[], float] = time.monotonic) -> None:
        self.log, self._limit_w, self._now = log, limit_w, now

    def _value(self, column: np.ndarray) -> float:
        value = float(column[max(0, int(np.searchsorted(self.log.time_s, self._now(), side="right")) - 1)])
        if np.isnan(value):
            raise NotMeasured("the log has no such reading at this time")
        return value

    def energy_j(self) -> float:
        return self._value(self.log.energy_j)

    def power_w(self) -> float:
        return self._value(self.log.power_w)

    def temperature_c(self) -> float:
        return self._value(self.log.temperature_c)

    def limit_w(self) -> float:
        return self._limit_w

    def clock_mhz(self) -> float:
        return self._value(self.log.clock_mhz)

    def throttle_bits(self) -> int:
        return int(self._value(self.log.throttle_bits))


def open_power(uuid: str | None, index: int | None = None) -> PowerSource:
    """NVML for this GPU, or a NullPower that says why there is none."""
    try:
        return NvmlDevice(uuid, index)
    except NotMeasured as error:
        return NullPower(str(error))


def probe_tick_s(source: PowerSource, now: Callable[[], float] = time.monotonic, limit_s: float = 0.5) -> float | None:
    """How often the energy counter moves: the time between two of its steps. None if it stood still for `limit_s`.

    Polls, so it belongs into the sampler's process before any work, never into the measured one.
    """
    start = now()
    last, moved_at = source.energy_j(), None
    while now() - start < limit_s:
        value = source.energy_j()
        if value != last:
            if moved_at is not None:
                return now() - moved_at
            last, moved_at = value, now()
        time.sleep(0.0005)
    return None
