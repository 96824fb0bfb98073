"""The meter of a run and its windows: the measured regions, with everything that is read at their two ends.

    with Meter(device, measure, hardware, run_dir) as meter:
        with meter.window("decode") as w:
            for _ in w.steps():
                step()
            w.tokens, w.flops, w.bytes = tokens, flops, traffic      # totals of the window
        metrics = w.metrics()

Inside a window nothing synchronises and nothing is read: a boundary costs one device event (GPU) or one reading of the
host's clock (CPU). Counters, memory and validity are read before the first and after the last boundary.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from dyno import turns
from dyno.errors import UserError
from dyno.measure import energy as energy_rules
from dyno.measure import probe, validity
from dyno.measure.carbon import CodeCarbon
from dyno.measure.clock import gpu_uuid, make_clock, synchronize
from dyno.measure.environment import cpu_name
from dyno.measure.hardware import resolve
from dyno.measure.memory import MemoryMeter
from dyno.measure.nvml import NotMeasured, NvmlDevice
from dyno.measure.power import EMPTY_LOG, NullPower, PowerLog, PowerSource
from dyno.measure.row import Readings, window_metrics
from dyno.measure.sampler import Sampler
from dyno.measure.statistics import summarise
from dyno.measure.warmup import largest_over_ranks, ranks
from dyno.record import Metric, unmeasured

_PREPARED_MARKS = 4096


class Meter:
    """What measures one run on one device. A context manager; its windows do not overlap.

    Enter it before the model is loaded: idle power is read at once, and the sampler and codecarbon take two seconds to
    be ready, which then pass unnoticed. Enter and leave it in the thread that lives as long as the run.

    Args:
        device: the torch device. measure: a `conf/measure` option. hardware: a `conf/hardware` option.
        run_dir: where the sampler writes its log.
        power: stands in for NVML in tests and where another library reads the device; no sampler starts for it.
        locks: files to lock before anything is measured, where other runs may be starting on the device by intent; they
            stand still while this one has them.
    """

    def __init__(
        self,
        device: torch.device,
        measure: Mapping[str, Any],
        hardware: Mapping[str, Any],
        run_dir: Path,
        power: PowerSource | None = None,
        locks: Sequence[str] | None = None,
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        self.device, self.measure, self.run_dir = device, measure, run_dir
        self.hardware = resolve(hardware, device.type, name)
        self.nvml: NvmlDevice | None = None
        self._given_power = power
        self.power: PowerSource = power or NullPower("a CPU has no NVML energy counter")
        self.idle_power_w = unmeasured("W", "the meter was not entered")
        self.sampler: Sampler | None = None
        self.codecarbon: CodeCarbon | None = None
        self.codecarbon_reason = "measure.codecarbon is off"
        self.windows: list[Window] = []
        self._flags: list[dict[str, str]] = []
        self.alone = locks is None
        self._turns, self._locks = list(locks or ()), ExitStack()
        self._began = math.inf  # its turn
        self._ceilings: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            try:
                self.nvml = NvmlDevice(gpu_uuid(self.device))
                self.power = self._given_power or self.nvml
            except NotMeasured as error:
                self.power = self._given_power or NullPower(str(error))
        if not self.measure["energy"]:
            self.power = NullPower("measure.energy is off")
        if self.alone:
            self._expect_an_idle_gpu()
            self.idle_power_w = self._read_idle_power()
        else:
            self.idle_power_w = unmeasured(
                "W", "other runs may start on the device meanwhile (measure.exclusive=window)"
            )
        if self.nvml is not None and self.power is self.nvml:
            self.sampler = Sampler(self.run_dir / f"power-{os.getpid()}.log", ["--uuid", self.nvml.uuid()])
        if self.measure["codecarbon"]:
            country = self.hardware.get("region")
            if country:
                self.codecarbon = CodeCarbon(str(country), self.hardware.get("state"))
            else:
                self.codecarbon_reason = "hardware.region states no country"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.sampler:
            self.sampler.stop()
            self.sampler.log.unlink(missing_ok=True)  # every window has taken its part into its samples
        if self.codecarbon:
            self.codecarbon.close()
        if time.monotonic() - self._began > turns.STILL_S:
            self.flag("others_went_on", f"its turn took over {turns.STILL_S:g} s, for which other runs stand still")
        self._locks.close()

    def take_turn(self) -> None:
        """Wait until no other run measures on the device, and keep it until the meter is left; done once."""
        while self._turns:
            self._locks.enter_context(turns.take(Path(self._turns.pop(0)), self.run_dir.name))
            self._began = time.monotonic()

    def window(self, name: str) -> Window:
        """A new measured region; enter it with `with`."""
        window = Window(self, name)
        self.windows.append(window)
        return window

    def flag(self, code: str, detail: str) -> None:
        """Add a fact that the reader of the row must know, for instance that warm-up never became steady."""
        self._flags.append(validity.flag(code, detail))

    def validity(self) -> dict[str, Any]:
        """{ok, flags} over all windows that ended, and the caller's own flags."""
        mine = {"ok": not any(f["code"] in validity.DISQUALIFYING for f in self._flags), "flags": self._flags}
        return validity.merge([*(w.verdict for w in self.windows if w.verdict), mine])

    def ceilings(self) -> dict[str, Any]:
        """The machine's measured ceilings; asked for after a window, so that no probe heats what is measured."""
        if self._ceilings is None:
            self.take_turn()  # also a run without a window: probes wait for each other
            self._ceilings = probe.ceilings(self.device)
        return self._ceilings

    def lose_codecarbon(self, reason: str) -> None:
        """Go on without codecarbon."""
        if self.codecarbon:
            self.codecarbon.close()
        self.codecarbon, self.codecarbon_reason = None, reason

    def _expect_an_idle_gpu(self) -> None:
        """Flag the run as contaminated when the GPU stays busy while this process gives it nothing to do.

        In a container whose NVML lists no processes this is the only sight of a neighbour. NVML's figure covers up to
        the last second, so work of our own may show in it at first.
        """
        if self.nvml is None:
            return
        synchronize(self.device)
        deadline = time.monotonic() + 1.5
        with suppress(NotMeasured):
            while (busy := self.nvml.utilization()) > validity.BUSY_SHARE:
                if time.monotonic() > deadline:
                    self.flag("contaminated", f"the GPU was {busy:.0%} busy while this run gave it nothing to do")
                    return
                time.sleep(0.05)

    def _read_idle_power(self) -> Metric:
        """The lowest of five readings before any work: the context exists, no kernel runs."""
        try:
            synchronize(self.device)
            readings = []
            for _ in range(5):
                readings.append(self.power.power_w())
                time.sleep(0.05)
        except NotMeasured as error:
            return unmeasured("W", str(error))
        return Metric(min(readings), "W", count=len(readings), source="nvml_power")


class Window:
    """One measured region. The caller sets `tokens`, `flops` and `bytes` to the totals of the region.

    Attributes:
        step_times_s: (steps,) seconds of each step, once the window has ended.
        dtype: of the matrix products, for the peak to compare with; bf16 on a GPU and fp32 on a CPU unless set.
        verdict: validity, {ok, flags, before, after}; energy: the judged Energy.
    """

    def __init__(self, meter: Meter, name: str) -> None:
        self.meter, self.name = meter, name
        self.tokens: float | None = None
        self.flops: float | None = None
        self.bytes: float | None = None
        self.dtype = "bf16" if meter.device.type == "cuda" else "fp32"
        self.step_times_s = np.empty(0)
        self.verdict: dict[str, Any] = {}
        self.energy = energy_rules.judge(None, 0.0, 0.0, reason="the window did not end")
        self.memory: dict[str, Metric] = {}
        self.emissions: dict[str, Any] | None = None
        self.emissions_reason = meter.codecarbon_reason
        self.ended_by = "caller"
        self.log: PowerLog = EMPTY_LOG
        self._labels: list[str] = []
        self._durations = np.empty(0)
        self._looped = False
        self._metrics: dict[str, Metric] | None = None

    def __enter__(self) -> Self:
        meter = self.meter
        meter.take_turn()
        self._start_codecarbon()
        self._clock = make_clock(meter.device, min(int(meter.measure["max_steps"]) + 1, _PREPARED_MARKS))
        self._memory = MemoryMeter(meter.device, meter.nvml)
        gc.collect()
        if meter.sampler:
            meter.sampler.wait_for(time.monotonic(), patience_s=10.0)
        synchronize(meter.device)
        self._before = validity.snapshot(meter.nvml)
        self._memory.reset()
        self._counter_start_j, self._counter_reason = self._counter()
        self._start_s = time.monotonic()
        self._clock.start()
        return self

    def tick(self, label: str = "step") -> None:
        """The end of a step; or, with another label, the end of a part of the step (`times_s` gives them apart)."""
        self._clock.mark()
        self._labels.append(label)

    def steps(self, count: int | None = None) -> Iterator[int]:
        """Yield step numbers, with a boundary after each, until the window is full.

        Full: `count` steps if given; else at least min_steps and min_seconds, at most max_steps. A run of several ranks
        must give a count (`warmup.steps_to_fill`), or its ranks would stop at different steps.
        """
        assert not self._looped, "one window, one loop"
        assert count is not None or ranks() == 1, "several ranks need a fixed number of steps"
        self._looped = True
        measure = self.meter.measure
        low, high = (count, count) if count is not None else (int(measure["min_steps"]), int(measure["max_steps"]))
        if low > high or high < 1:
            raise UserError(f"a window of at least {low} and at most {high} steps cannot be filled")
        patience_ns = 0 if count is not None else int(float(measure["min_seconds"]) * 1e9)
        largest_over_ranks(0.0, self.meter.device)  # they begin together: no first step waits for the last to come
        if not self._labels:
            self._clock.start()  # whatever the caller prepared since the window began is no part of the first step
        begin = time.perf_counter_ns()
        for i in range(high):
            yield i
            self.tick()
            if i + 1 >= low and time.perf_counter_ns() - begin >= patience_ns:
                self.ended_by = "count" if count is not None else "filled"
                return
        self.ended_by = "max_steps"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        meter = self.meter
        if error is not None:  # the device may be unusable: read nothing from it, and hide nothing of the error
            self.ended_by = "error"
            return
        synchronize(meter.device)
        end_s = time.monotonic()
        counter_end_j, reason = self._counter()
        self._durations = self._clock.durations()
        self.memory = self._memory.read()
        after = validity.snapshot(meter.nvml)
        self._stop_codecarbon(end_s - self._start_s)
        self._judge_energy(end_s, counter_end_j, self._counter_reason or reason)
        self.step_times_s = self._steps_of(self._durations)
        self.verdict = validity.judge(self._before, after, self.log, self._busy() if meter.alone else None)
        if self.energy.code not in (None, "not_measured", "too_short"):
            self.verdict["flags"].append(validity.flag(f"energy_{self.energy.code}", str(self.energy.reason)))

    @property
    def seconds(self) -> float:
        """From the first boundary to the last, in seconds."""
        return float(self._durations.sum())

    def times_s(self, label: str) -> np.ndarray:
        """(n,) seconds of the parts that ended with `tick(label)`, each from the boundary before."""
        return self._durations[np.array([x == label for x in self._labels], dtype=bool)]

    def metrics(self) -> dict[str, Metric]:
        """Every metric of the window by its flat name; what was not measured is there with its reason."""
        if self._metrics is None:
            needed = bool(self.flops or self.bytes) and self.seconds > 0
            self._metrics = window_metrics(self._readings(), self.meter.ceilings() if needed else None)
        return self._metrics

    def samples(self) -> dict[str, np.ndarray]:
        """The raw arrays: step times, the times of labelled parts, and the sampler's readings."""
        out = {"step_time_s": self.step_times_s}
        out |= {f"{label}_time_s": self.times_s(label) for label in dict.fromkeys(self._labels) if label != "step"}
        if len(self.log):
            out |= {
                "power_at_s": self.log.time_s - self._start_s, "power_w": self.log.power_w,
                "temperature_c": self.log.temperature_c, "clock_mhz": self.log.clock_mhz,
            }  # fmt: skip
        return out

    def summary(self) -> dict[str, Any]:
        """The window as plain JSON, for the record's `windows`."""
        return {
            "seconds": self.seconds,
            "steps": len(self.step_times_s),
            "ended_by": self.ended_by,
            "clock": self._clock.source,
            "tokens": self.tokens,
            "flops": self.flops,
            "bytes": self.bytes,
            "dtype": self.dtype,
            "step_time_s": summarise(self.step_times_s) if len(self.step_times_s) else None,
            "energy": self.energy.summary(),
            "codecarbon": self.emissions or {"reason": self.emissions_reason},
            "validity": self.verdict,
        }

    def _readings(self) -> Readings:
        measure = self.meter.measure
        return Readings(
            device=self.meter.device.type, step_times_s=self.step_times_s, seconds=self.seconds,
            clock=self._clock.source, tokens=self.tokens, flops=self.flops, traffic_bytes=self.bytes, dtype=self.dtype,
            energy=self.energy, idle_power_w=self.meter.idle_power_w, memory=self.memory, emissions=self.emissions,
            emissions_reason=self.emissions_reason, hardware=self.meter.hardware,
            resamples=int(measure["bootstrap"]), seed=int(measure["seed"]),
        )  # fmt: skip

    def _steps_of(self, durations: np.ndarray) -> np.ndarray:
        """Sum the parts of each step: (boundaries,) -> (steps,). Parts after the last step's end are no step."""
        ends = np.flatnonzero([label == "step" for label in self._labels])
        return np.diff(np.concatenate([[0.0], np.cumsum(durations)[ends]])) if len(ends) else np.empty(0)

    def _counter(self) -> tuple[float | None, str | None]:
        try:
            return self.meter.power.energy_j(), None
        except NotMeasured as error:
            return None, str(error)

    def _judge_energy(self, end_s: float, counter_end_j: float | None, reason: str | None) -> None:
        tick_s = limit_w = None
        if self.meter.sampler:
            self.meter.sampler.wait_for(end_s)
            self.log = self.meter.sampler.read().between(self._start_s, end_s)
            tick_s = self.meter.sampler.tick_s()
        both = self._counter_start_j is not None and counter_end_j is not None
        counter_j = counter_end_j - self._counter_start_j if both else None  # type: ignore[operator]
        with suppress(NotMeasured):  # without it the power's plausibility goes unchecked; the cross-check remains
            limit_w = self.meter.power.limit_w()
        self.energy = energy_rules.judge(
            counter_j, self._start_s, end_s, self.log, limit_w=limit_w, tick_s=tick_s,
            source=self.meter.power.source, reason=reason,
        )  # fmt: skip

    def _busy(self) -> dict[int, float] | None:
        if self.meter.nvml is None:
            return None
        try:
            return self.meter.nvml.busy_since(self._before.unix_us)
        except NotMeasured:
            return None

    def _start_codecarbon(self) -> None:
        if self.meter.codecarbon:
            try:
                self.meter.codecarbon.start(self.name)
            except NotMeasured as error:
                self.meter.lose_codecarbon(str(error))
        self.emissions_reason = self.meter.codecarbon_reason

    def _stop_codecarbon(self, seconds: float) -> None:
        if self.meter.codecarbon is None:
            return
        try:
            emissions = self.meter.codecarbon.finish(self.name)
        except NotMeasured as error:
            self.meter.lose_codecarbon(str(error))
            self.emissions_reason = str(error)
            return
        if seconds < 2:
            self.emissions_reason = f"codecarbon samples once a second, too slowly for a window of {seconds:.2f} s"
        else:
            self.emissions = emissions
