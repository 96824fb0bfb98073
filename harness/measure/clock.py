"""Clocks: a mark at every boundary, durations afterwards. Device events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch


class Clock(Protocol):
    """Marks boundaries cheaply; `durations` reads them after the last one."""

    def start(self) -> None: ...
    def mark(self) -> None: ...
    def durations(self) -> np.ndarray: ...


class HostClock:
    """For a CPU, where a step is over when its Python is: one reading of the nanosecond clock a boundary."""

    source = "perf_counter"

    def __init__(self) -> None:
        self._marks: list[int] = []

    def start(self) -> None:
        self._marks = [time.perf_counter_ns()]

    def mark(self) -> None:
        self._marks.append(time.perf_counter_ns())

    def durations(self) -> np.ndarray:
        """Seconds between consecutive boundaries, (n,)."""
        return np.diff(np.array(self._marks, dtype=np.int64)) / 1e9


class EventClock:
    """For a GPU: one event a boundary in the current stream, so that the host runs ahead as it would without us.

    The host may lead by RUN_AHEAD boundaries and then waits for the one that far back: the queue never empties, and a
    window that ends after some seconds does not leave minutes of queued work behind it. Events are made and recorded
    once beforehand, as CUDA creates them at their first use.
    """

    source = "cuda_event"
    RUN_AHEAD = 32

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(capacity)]
        with torch.cuda.device(device):
            for event in self._events:
                event.record()
            torch.cuda.synchronize()
        self._used = 0

    def start(self) -> None:
        self._used = 0
        self.mark()

    def mark(self) -> None:
        i = self._used
        if i == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[i].record()
        self._used = i + 1
        if i >= self.RUN_AHEAD:
            self._events[i - self.RUN_AHEAD].synchronize()

    def durations(self) -> np.ndarray:
        """Seconds between consecutive boundaries, (n,); waits for the last one. Resolution: half a microsecond."""
        used = self._events[: self._used]
        if used:
            used[-1].synchronize()
        return np.array([a.elapsed_time(b) for a, b in zip(used, used[1:], strict=False)]) / 1e3


def make_clock(device: torch.device, capacity: int) -> HostClock | EventClock:
    """The clock for a device; `capacity` boundaries are prepared (more are possible)."""
    return EventClock(device, capacity) if device.type == "cuda" else HostClock()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_uuid(device: torch.device) -> str:
    """The UUID of a CUDA device in NVML's spelling; NVML's own index need not be torch's."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
