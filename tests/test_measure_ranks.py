"""Runs of several ranks: time that messages take and hide, and one row made of every rank's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyno.measure.communication import Activity, activity_of, covered_s
from dyno.measure.together import together
from dyno.measure.validity import flag, of_ranks
from dyno.record import Metric, unmeasured


def counted(spans: np.ndarray, cells: int = 4000) -> float:
    """The covered length by counting small cells of [0, 1]."""
    middles = (np.arange(cells) + 0.5) / cells
    inside = (middles[:, None] >= spans[:, 0]) & (middles[:, None] < spans[:, 1])
    return inside.any(1).sum() / cells


@pytest.mark.parametrize("count", [0, 1, 2, 5, 40])
def test_covered_time_is_that_of_the_union(count):
    rng = np.random.default_rng(count)
    for _ in range(5):
        start = rng.random(count) * 0.9
        spans = np.stack((start, start + rng.random(count) * 0.1), 1)
        assert covered_s(spans) == pytest.approx(counted(spans), abs=2e-3 * max(1, count))


def test_only_what_nothing_hides_is_exposed():
    work = np.array([[0.0, 4.0], [3.0, 5.0], [8.0, 10.0]])
    messages = np.array([[4.0, 7.0], [4.5, 6.0], [9.0, 9.5]])
    seen = Activity(messages, work)
    assert seen.seconds == 10 and seen.messages_s == pytest.approx(3.5) and seen.exposed_s == pytest.approx(2.0)
    assert Activity(messages[:0], work).exposed_s == 0 and Activity(messages[:0], work[:0]).seconds == 0


class Event:
    """A raw event of the profiler, such as torch.autograd.profiler itself reads."""

    def __init__(self, name: str, begin: int, nanoseconds: int, device: str = "CUDA", annotation: bool = False):
        self.name, self.start_ns, self.duration_ns = (lambda: name), (lambda: begin), (lambda: nanoseconds)
        self.device_type = lambda: getattr(torch.autograd.DeviceType, device)
        self.is_user_annotation = lambda: annotation


def test_a_profiler_tells_messages_from_work_on_the_device():
    origin = 1_795_870_319_386_513_000  # nanoseconds since 1970: more digits than a float has
    found = activity_of([
        Event("ncclDevKernel_AllReduce_Sum_bf16", origin + 500, 1500), Event("gemm", origin, 1000),
        Event("Memcpy DtoD", origin + 3000, 1000), Event("step", origin, 9000, annotation=True),
        Event("cudaLaunchKernel", origin, 9000, "CPU"),
    ])  # fmt: skip
    np.testing.assert_allclose(found.work, np.array([[0, 1], [3, 4]]) * 1e-6, atol=1e-12)
    np.testing.assert_allclose(found.messages, np.array([[0.5, 2.0]]) * 1e-6, atol=1e-12)
    assert found.exposed_s == pytest.approx(1e-6) and found.seconds == pytest.approx(4e-6)
    assert activity_of([]).seconds == 0


def test_the_profilers_raw_events_can_be_read():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(4).add_(1)
    events = profile.profiler.kineto_results.events()
    told = {(e.name(), e.duration_ns() >= 0, e.is_user_annotation(), str(e.device_type())) for e in events}
    assert ("aten::add_", True, False, "DeviceType.CPU") in told and all(e.start_ns() > 0 for e in events)
    assert activity_of(events).seconds == 0  # nothing of it ran on a GPU


def row(energy: float | None, peak: float) -> dict[str, Metric]:
    told = unmeasured("J", "too short") if energy is None else Metric(energy, "J", source="nvml_counter")
    return {"energy_j": told, "peak_memory_bytes": Metric(peak, "B", source="torch_allocator")}


def test_gpus_energy_is_added_up_and_the_fullest_rank_tells_the_memory():
    every = [row(100.0, 5.0), row(150.0, 7.0)]
    metrics = every[0] | {"tokens_per_s": Metric(9.0, "token/s")}
    out = together(metrics, every, "cuda")
    assert out["energy_j"].value == 250 and "sum of 2 GPUs" in out["energy_j"].source
    peak = out["peak_memory_bytes"]
    assert (peak.value, peak.low, peak.high) == (7, 5, 7) and out["tokens_per_s"].value == 9
    assert out["ranks"].value == 2
    assert together(metrics, every, "cpu")["energy_j"].value == 100  # the machine's, which both ranks read


def test_a_figure_that_one_rank_lacks_is_empty_with_its_reason():
    out = together(row(100.0, 5.0), [row(100.0, 5.0), row(None, 7.0)], "cuda")
    assert out["energy_j"].value is None and out["energy_j"].reason == "rank 1: too short"
    assert out["peak_memory_bytes"].value == 7


def test_a_flag_of_another_rank_says_which_and_the_hosts_come_once():
    first = {"ok": True, "flags": [flag("host_busy", "3 of 4 cores")]}
    second = {"ok": False, "flags": [flag("host_busy", "3.1 of 4 cores"), flag("hw_thermal", "hot")]}
    out = of_ranks([first, second])
    assert not out["ok"] and out["flags"] == [flag("host_busy", "3 of 4 cores"), flag("hw_thermal", "rank 1: hot")]
