"""Windows, warm-up, memory and the probe on a CPU. Nothing here depends on how fast the machine is."""

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyno import turns
from dyno.measure import hardware, probe
from dyno.measure.clock import HostClock
from dyno.measure.memory import graph_bytes
from dyno.measure.power import NullPower
from dyno.measure.warmup import steps_to_fill, warm_up
from dyno.measure.window import Meter

CPU = torch.device("cpu")
MEASURE = {
    "min_steps": 5, "max_steps": 50, "min_seconds": 0.0, "warmup_min_steps": 3, "warmup_max_steps": 20,
    "warmup_tolerance": 0.2, "energy": True, "codecarbon": False, "bootstrap": 200, "time_limit_s": 60, "seed": 0,
}  # fmt: skip


@pytest.fixture
def meter(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path))
    fake = {"matrix_flop_per_s": {"fp32": 1e11}, "copy_byte_per_s": 1e10}
    monkeypatch.setattr(probe, "ceilings", lambda device: fake)
    with Meter(CPU, MEASURE, hardware.options()["cpu"], tmp_path) as meter:
        yield meter


def test_a_window_on_a_cpu(meter):
    with meter.window("train") as w:
        for _ in w.steps():
            time.sleep(0.001)
        w.tokens, w.flops, w.bytes = 500, 1e6, 1e5
    assert len(w.step_times_s) == 5
    assert w.step_times_s.min() >= 0.001
    assert w.seconds == pytest.approx(w.step_times_s.sum())
    m = w.metrics()
    assert m["tokens_per_s"].value == pytest.approx(500 / w.seconds)
    assert m["tokens_per_s"].low <= m["tokens_per_s"].value <= m["tokens_per_s"].high
    assert m["step_time_s"].source == "perf_counter"
    assert m["step_time_p95_s"].value is None
    assert m["peak_memory_bytes"].value >= m["process_memory_bytes"].value > 0
    assert m["energy_j"].value is None
    assert "CPU" in m["energy_j"].reason
    assert m["cost_usd"].value == pytest.approx(w.seconds / 3600 * 0.09)
    assert m["roofline_fraction"].value > 0
    assert all(metric.reason for metric in m.values() if metric.value is None)
    json.dumps(w.summary(), allow_nan=False)
    assert set(w.samples()) == {"step_time_s"}
    assert meter.validity()["ok"] is True


def test_fixed_minimal_and_maximal_numbers_of_steps(meter, monkeypatch):
    with meter.window("a") as w:
        assert list(w.steps(3)) == [0, 1, 2]
    assert w.ended_by == "count"
    monkeypatch.setitem(meter.measure, "min_seconds", 3600.0)
    with meter.window("b") as w:
        assert len(list(w.steps())) == 50
    assert w.ended_by == "max_steps"
    monkeypatch.setitem(meter.measure, "max_steps", 4)
    with pytest.raises(ValueError, match="cannot be filled"), meter.window("c") as w:
        list(w.steps())


def test_explicit_ticks(meter):
    with meter.window("decode") as w:
        for _ in range(4):
            w.tick()
    assert len(w.step_times_s) == 4


def test_parts_of_a_step_add_up_to_it(meter, monkeypatch):
    marks = itertools.accumulate([0, 0, 3, 1, 1, 0, 5, 2, 2, 0])  # window, loop, two steps of four
    monkeypatch.setattr(HostClock, "start", lambda self: setattr(self, "_marks", [next(marks)]))
    monkeypatch.setattr(HostClock, "mark", lambda self: self._marks.append(next(marks)))
    with meter.window("generate") as w:
        for _ in w.steps(2):
            w.tick("prefill")
            w.tick("decode")
            w.tick("decode")
    assert list(w.times_s("prefill") * 1e9) == pytest.approx([3, 5])
    assert list(w.times_s("decode") * 1e9) == pytest.approx([1, 1, 2, 2])
    assert list(w.step_times_s * 1e9) == pytest.approx([5, 9])
    assert set(w.samples()) == {"step_time_s", "prefill_time_s", "decode_time_s"}


def test_an_error_inside_a_window_is_not_hidden(meter):
    with pytest.raises(RuntimeError, match="mine"), meter.window("x") as w:
        raise RuntimeError("mine")
    assert w.ended_by == "error"
    assert meter.validity() == {"ok": True, "flags": []}


def test_the_caller_can_flag(meter):
    meter.flag("not_steady", "drifts")
    assert meter.validity() == {"ok": True, "flags": [{"code": "not_steady", "detail": "drifts"}]}


PEAKS = """
import sys, pathlib, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from test_measure_window import CPU, MEASURE
from dyno.measure.window import Meter
with Meter(CPU, MEASURE, {"device": "cpu"}, pathlib.Path(sys.argv[2])) as meter:
    block = np.ones(200 << 17)  # 200 MiB, touched before the window and gone in it
    del block
    with meter.window("small") as w:
        list(w.steps(1))
    small = w.metrics()["peak_memory_bytes"]
    with meter.window("large") as w:
        for _ in w.steps(1):
            np.ones(200 << 17)
    large = w.metrics()["peak_memory_bytes"]
print(small.source, int(large.value - small.value))
"""


def test_memory_peak_is_the_window_s_own(tmp_path):
    """In a process of its own, as a worker is: what other tests left in memory would hide the difference."""
    command = [sys.executable, "-c", PEAKS, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    source, difference = done.stdout.split()
    if source == "rss_peak":  # where the kernel lets a process reset its own peak
        assert int(difference) > 150 << 20


def test_energy_off_says_so(tmp_path):
    with Meter(CPU, MEASURE | {"energy": False}, {"device": "cpu"}, tmp_path) as meter, meter.window("w") as w:
        list(w.steps(2))
    metrics = w.metrics()
    assert "measure.energy is off" in metrics["energy_j"].reason
    assert metrics["cost_usd"].reason == "hardware.price_usd_per_hour.value is not stated"
    assert metrics["idle_power_w"].reason == "measure.energy is off"


def test_a_source_can_be_given(tmp_path):
    power = NullPower("my own reason")
    with Meter(CPU, MEASURE, {"device": "cpu"}, tmp_path, power=power) as meter, meter.window("w") as w:
        list(w.steps(2))
    assert "my own reason" in w.metrics()["energy_j"].reason


def test_codecarbon_runs_in_its_own_process(tmp_path):
    pytest.importorskip("codecarbon")
    cpu = hardware.options()["cpu"]
    with Meter(CPU, MEASURE | {"codecarbon": True}, cpu, tmp_path) as meter:
        assert meter.codecarbon is not None
        with meter.window("short") as w:
            list(w.steps(2))
        process = meter.codecarbon.process
        emissions = meter.codecarbon
        emissions.start("direct")
        said = emissions.finish("direct")
    assert "window of" in w.metrics()["cpu_energy_j"].reason
    assert said["source"] in ("estimate", "rapl")
    assert said["country"] == "USA"
    assert process.poll() is not None


def test_a_lost_codecarbon_costs_its_cells_only(tmp_path):
    with Meter(CPU, MEASURE | {"codecarbon": True}, hardware.options()["cpu"], tmp_path) as meter:
        meter.codecarbon.process.kill()
        meter.codecarbon.process.wait()
        with meter.window("w") as w:
            list(w.steps(3))
    assert "ended" in w.metrics()["cpu_energy_j"].reason
    assert w.metrics()["step_time_s"].value is not None


def test_warm_up_keeps_the_first_step_apart(monkeypatch):
    now = iter(np.cumsum([0, 5.0, *[0, 1.0] * 20]))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    out = warm_up(lambda: None, CPU, MEASURE)
    assert out["steady"] is True
    assert out["first_step_s"] == 5.0
    assert out["compile_time_s"] == 4.0
    assert out["steps"] == 6  # the first, and five flat ones
    assert out["seconds"] == 10.0


def test_warm_up_that_never_settles_says_so(monkeypatch):
    now = iter(np.cumsum([x for i in range(20) for x in (0, 1.2**i)]))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    out = warm_up(lambda: None, CPU, MEASURE)
    assert out["steady"] is False
    assert out["steps"] == 20


def test_steps_to_fill():
    measure = MEASURE | {"min_seconds": 2.0}
    assert steps_to_fill(0.1, CPU, measure) == 20
    assert steps_to_fill(10.0, CPU, measure) == 5
    assert steps_to_fill(0.001, CPU, measure) == 50


def test_ceilings_are_probed_once_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path))
    calls = []
    figures = {"matrix_flop_per_s": {"fp32": 1e11}, "copy_byte_per_s": 1e10}
    monkeypatch.setattr(probe, "probe", lambda device: calls.append(device) or figures)
    first, second = probe.ceilings(CPU), probe.ceilings(CPU)
    assert first == second
    assert len(calls) == 1
    assert len(list((tmp_path / "ceilings").glob("*.json"))) == 1
    probe.ceilings(CPU, refresh=True)
    assert len(calls) == 2


def test_a_real_probe(monkeypatch):
    monkeypatch.setattr(probe, "_BUDGET_S", 0.0)
    found = probe.probe(CPU)
    assert found["matrix_flop_per_s"]["fp32"] > 1e8
    assert found["copy_byte_per_s"] > 1e8


@pytest.mark.parametrize("dtype", ["tf32", "fp32", "bf16"])
@pytest.mark.parametrize("state", ["plain", "tf32", "ieee", "legacy", "mixed"])
def test_a_probe_finds_and_leaves_any_precision_of_fp32_products(state, dtype, monkeypatch):
    """Names old and new for one switch; once they disagree, torch raises where the old one is read."""
    matmul, during = torch.backends.cuda.matmul, []

    def seen() -> list[Any]:
        found: list[Any] = [matmul.fp32_precision]
        for read in (lambda: matmul.allow_tf32, torch.get_float32_matmul_precision):
            try:
                found.append(read())
            except RuntimeError:
                found.append("raises")
        return found

    def best_s(work, device):
        during.append(matmul.fp32_precision)
        if state == "mixed":
            raise MemoryError
        return 1.0

    monkeypatch.setattr(probe, "_best_s", best_s)
    monkeypatch.setattr(probe, "_SIZE", {"cpu": 8})
    try:
        if state in ("legacy", "mixed"):
            torch.set_float32_matmul_precision("high")
        if state in ("tf32", "ieee", "mixed"):
            matmul.fp32_precision = "ieee" if state == "mixed" else state
        before = seen()
        assert ("raises" in before) == (state in ("tf32", "mixed"))
        with pytest.raises(MemoryError) if state == "mixed" else contextlib.nullcontext():
            probe._matrix_flop_per_s(CPU, dtype)
        assert seen() == before and during == ["tf32" if dtype == "tf32" else "ieee"]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_meter_that_takes_turns_waits_for_the_other_to_be_left(tmp_path):
    lock, order = str(tmp_path / "cpu.lock"), []

    def second() -> None:
        with Meter(CPU, MEASURE, {"device": "cpu"}, tmp_path, locks=[lock]) as meter:
            started.set()
            with meter.window("w") as w:
                order.append("second")
                for _ in w.steps():
                    pass

    started = threading.Event()
    with Meter(CPU, MEASURE, {"device": "cpu"}, tmp_path, locks=[lock]) as meter:
        meter.take_turn()
        thread = threading.Thread(target=second)
        thread.start()
        assert started.wait(10)
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
        meter.take_turn()  # is its own already
    thread.join(10)
    assert order == ["first", "second"]


def test_a_long_turn_is_flagged_and_ceilings_are_measured_in_one(tmp_path, monkeypatch):
    path = tmp_path / "cpu.lock"
    monkeypatch.setattr(probe, "ceilings", lambda device: {"owner": turns.owner_of(path)})
    for patience_s, codes in ((300.0, []), (0.0, ["others_went_on"])):
        monkeypatch.setattr(turns, "STILL_S", patience_s)
        with Meter(CPU, MEASURE, {"device": "cpu"}, tmp_path, locks=[str(path)]) as meter:
            assert turns.owner_of(path) == "" and meter.ceilings() == {"owner": tmp_path.name}
        assert [f["code"] for f in meter.validity()["flags"]] == codes


def test_what_graphs_work_in_counts_though_the_allocator_calls_it_free(monkeypatch):
    sizes = [(0, (0, 0), 9, 4), (0, (1, 0), 100, 30), (0, (0, 2), 8, 8), (1, (1, 0), 1000, 0)]
    segments = [
        {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": live}
        for device, pool, total, live in sizes
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert [graph_bytes(torch.device("cuda", i)) for i in range(3)] == [70, 1000, 0]
