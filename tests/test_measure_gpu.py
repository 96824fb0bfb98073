"""What only a GPU can show: events, the energy counter with its cross-check, and what measuring costs."""

import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from dyno.measure import hardware, probe, validity  # noqa: E402
from dyno.measure.environment import detect  # noqa: E402
from dyno.measure.statistics import ratio_interval  # noqa: E402
from dyno.measure.warmup import warm_up  # noqa: E402
from dyno.measure.window import Meter  # noqa: E402

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
MEASURE = {
    "min_steps": 100, "max_steps": 100_000, "min_seconds": 0.0, "warmup_min_steps": 10, "warmup_max_steps": 100,
    "warmup_tolerance": 0.1, "energy": True, "codecarbon": False, "bootstrap": 1000, "time_limit_s": 300, "seed": 0,
}  # fmt: skip


@pytest.fixture
def product():
    a = torch.randn(4096, 4096, device=GPU, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    step = lambda: torch.mm(a, a, out=out)  # noqa: E731
    assert warm_up(step, GPU, MEASURE)["first_step_s"] > 0
    return step


def test_detection_agrees_with_torch():
    device = detect(hardware.options()["auto"])
    assert device.kind == "cuda"
    assert device.name == torch.cuda.get_device_name(0)
    assert device.capability == torch.cuda.get_device_capability(0)
    assert device.count == torch.cuda.device_count()


def test_energy_of_eleven_seconds(product, tmp_path):
    auto = hardware.options()["auto"]
    with Meter(GPU, MEASURE | {"min_seconds": 11.0}, auto, tmp_path) as meter, meter.window("mm") as w:
        for _ in w.steps():
            product()
    steps = len(w.step_times_s)
    w.tokens, w.flops, w.bytes = steps, 2 * 4096**3 * steps, 3 * 2 * 4096**2 * steps
    metrics = w.metrics()
    print({name: m.value if m.value is not None else m.reason for name, m in metrics.items()})
    print(w.energy.summary(), w.verdict["flags"])
    assert w.energy.code is None, w.energy.reason
    assert metrics["energy_above_idle_j"].value > 0
    assert 0.2 < metrics["mfu"].value < 1
    assert 0.3 < metrics["roofline_fraction"].value < 1.3
    assert metrics["step_time_p99_s"].value is not None
    assert "contaminated" not in [flag["code"] for flag in w.verdict["flags"]]


def test_memory_peak(tmp_path):
    with Meter(GPU, MEASURE | {"energy": False}, {"device": "cuda"}, tmp_path) as meter, meter.window("w") as w:
        torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
        list(w.steps(1))
    assert w.metrics()["peak_memory_bytes"].value >= 1 << 30
    assert w.metrics()["device_memory_bytes"].value >= 1 << 30


def test_memory_of_a_graph_that_allocates_nothing_when_it_is_replayed(tmp_path):
    x, graph = torch.ones(1 << 26, device=GPU), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ((x + 1) * 2).sum()
    with Meter(GPU, MEASURE | {"energy": False}, {"device": "cuda"}, tmp_path) as meter, meter.window("w") as w:
        for _ in w.steps(1):
            graph.replay()
    peak = w.metrics()["peak_memory_bytes"]
    assert peak.value >= torch.cuda.memory_allocated(GPU) + (1 << 28) and "graphs" in peak.source
    assert y.item() == 4 << 26


def test_measuring_costs_less_than_half_a_per_cent_of_a_millisecond(tmp_path):
    """The same loop with all meters on and with none, alternating; the interval of the ratio is the verdict."""
    a = torch.randn(6144, 6144, device=GPU, dtype=torch.bfloat16)  # about 0.7 ms
    out = torch.empty_like(a)

    def seconds(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in steps:
            torch.mm(a, a, out=out)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(range(2000))
    metered, bare = [], []
    with Meter(GPU, MEASURE | {"codecarbon": True}, hardware.options()["auto"], tmp_path) as meter:
        for i in range(16):
            for with_meter in (True, False) if i % 2 else (False, True):
                if with_meter:
                    with meter.window(f"w{i}") as w:
                        metered.append(seconds(w.steps(1000)))
                else:
                    bare.append(seconds(range(1000)))
    ratio, low, high = ratio_interval(metered, bare)
    print(f"overhead {ratio - 1:+.3%}, 95% interval {low - 1:+.3%} to {high - 1:+.3%}")
    assert low < 1.005


def test_ceilings(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path))
    found = probe.ceilings(GPU)
    print(found)
    figures = found["matrix_flop_per_s"]
    assert figures["bf16"] > figures["tf32"] > figures["fp32"]
    assert found["copy_byte_per_s"] > 1e11


def test_snapshot_reads_the_gpu(tmp_path):
    with Meter(GPU, MEASURE, {"device": "cuda"}, tmp_path) as meter:
        now = validity.snapshot(meter.nvml)
    print(now, meter.idle_power_w)
    assert now.temperature_c and now.power_limit_w and now.clock_mhz
    assert meter.idle_power_w.value
