"""What a step spends on talking to other ranks, read off the kernels of a profiled one; and what their links give.

A message that runs while nothing else does is exposed: the step waits for it. A kernel of NCCL runs from when its rank
enters the collective until the last rank did its part, so a rank that is ahead of the others is seen waiting for them. What
messages cost is what the rank that waits least spends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from dyno.measure.clock import make_clock, synchronize
from dyno.measure.together import gathered
from dyno.record import Metric, unmeasured

STEPS = 2  # profiled together
MESSAGE = "nccl"  # is in the name of every kernel that sends or receives
BUS_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
REPEATS = 10


def covered_s(spans: np.ndarray) -> float:
    """Seconds that intervals (n, 2) cover together, overlaps counted once."""
    if not len(spans):
        return 0.0
    start, end = spans[np.argsort(spans[:, 0])].T
    reached = np.maximum.accumulate(end)
    begun_before = np.concatenate(([start[0]], reached[:-1]))  # where what came before had got to
    return float(np.maximum(0.0, reached - np.maximum(start, begun_before)).sum())


@dataclass(frozen=True)
class Activity:
    """When a device was busy in some steps: intervals (n, 2) in seconds of messages, and of everything else."""

    messages: np.ndarray
    work: np.ndarray

    @property
    def seconds(self) -> float:
        """From the first beginning to the last end."""
        both = np.concatenate((self.messages, self.work))
        return float(both[:, 1].max() - both[:, 0].min()) if len(both) else 0.0

    @property
    def messages_s(self) -> float:
        return covered_s(self.messages)

    @property
    def exposed_s(self) -> float:
        """Seconds in which messages ran and nothing else did."""
        return covered_s(np.concatenate((self.messages, self.work))) - covered_s(self.work)

    def summary(self) -> dict[str, float]:
        return {"seconds": self.seconds, "messages_s": self.messages_s, "exposed_s": self.exposed_s}


def profiled(step: Callable[[], object], device: torch.device) -> Activity:
    """Take STEPS steps under the profiler and read when the GPU ran what; all ranks call this together.

    A step before them is left out: to start a profiler takes a rank up to seconds, and the others wait for the last.
    """
    synchronize(device)
    phases = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], schedule=phases) as profile:
        step()
        dist.barrier()
        synchronize(device)
        profile.step()
        for _ in range(STEPS):
            step()
        synchronize(device)
    # profile.events() builds a tree first: 43 us an event where reading it takes 2, seconds for the kernels of two steps.
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return activity_of(profile.profiler.kineto_results.events())


def activity_of(events: Iterable[Any]) -> Activity:
    """A device's kernels and copies among a profiler's raw events."""
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            begin = event.start_ns()
            spans[MESSAGE in event.name().lower()].append((begin, begin + event.duration_ns()))
    origin = min((begin for some in spans.values() for begin, _ in some), default=0)  # keeps the digits of a float
    messages, work = ((np.array(spans[kind], dtype=np.int64).reshape(-1, 2) - origin) / 1e9 for kind in (True, False))
    return Activity(messages, work)


def communication(
    step: Callable[[], object], device: torch.device, note: Callable[[str, Any], None]
) -> dict[str, Metric]:
    """communication_share, the exposed share of a step on the rank where it is the least, and bus_byte_per_s.

    All ranks call this together. Each rank's seconds of the profiled steps are noted as `communication`.
    """
    if device.type != "cuda":
        return {
            "communication_share": unmeasured("1", "a CPU's collectives leave no kernels to tell from the rest"),
            "bus_byte_per_s": bus_byte_per_s(device),
        }
    every = gathered(profiled(step, device).summary())
    note("communication", every)
    shares = [rank["exposed_s"] / rank["seconds"] for rank in every if rank["seconds"]]
    if not shares:
        share = unmeasured("1", "the profiler saw no kernels")
    else:
        source = f"kernels of {STEPS} profiled steps: messages that nothing hides; the rank that waits least"
        share = Metric(min(shares), "1", len(shares), min(shares), max(shares), source)
    return {"communication_share": share, "bus_byte_per_s": bus_byte_per_s(device)}


def bus_byte_per_s(device: torch.device) -> Metric:
    """What the slowest link of a ring carries in an all-reduce: 2 (n - 1) / n of the bytes over the median time."""
    ranks, size = dist.get_world_size(), BUS_BYTES[device.type]
    buffer = torch.zeros(size // 4, device=device)
    clock = make_clock(device, REPEATS + 1)
    for _ in range(3):
        dist.all_reduce(buffer)
    synchronize(device)
    clock.start()
    for _ in range(REPEATS):
        dist.all_reduce(buffer)
        clock.mark()
    rates = 2 * (ranks - 1) / ranks * size / clock.durations()
    source = f"all-reduce of {size >> 20} MiB over {ranks} ranks, 2 (n - 1) / n of its bytes"
    return Metric(float(np.median(rates)), "B/s", len(rates), float(rates.min()), float(rates.max()), source)
