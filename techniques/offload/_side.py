"""A second stream of a device for copies to and from the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dyno import host_memory


class Side:
    """Copies beside the computation. On a CPU there is no stream: copies are plain, and waiting does nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        """What is enqueued inside runs on the side stream, once everything computed so far is done."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def event(self) -> torch.cuda.Event | None:
        """A mark behind everything that is enqueued on the side stream so far."""
        return self.stream.record_event() if self.stream is not None else None

    def compute_waits(self, event: torch.cuda.Event | None) -> None:
        """What is computed from now on comes after a mark."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def holds(self, tensor: Tensor) -> None:
        """Keep a device tensor's memory until the side stream has got so far."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def pin(self, tensor: Tensor) -> Tensor:
        """Let the device copy from and to a part of a `host_memory.zeros` while the host goes on."""
        return host_memory.pin(tensor) if self.stream is not None and len(tensor) else tensor

    def pinned(self, numbers: int) -> Tensor:
        """A flat fp32 host tensor of zeros that a device copies from and to."""
        return self.pin(host_memory.zeros(numbers).zero_())


def host_waits(event: torch.cuda.Event | None) -> None:
    """The calling thread waits for a mark."""
    if event is not None:
        event.synchronize()
