"""From readings to metrics: carbon, cost, roofline, the hardware's options, the environment, validity."""

import dataclasses

import numpy as np
import pytest

from dyno.errors import UserError
from dyno.measure import environment, hardware, validity
from dyno.measure.carbon import carbon_g, carbon_metric
from dyno.measure.cost import cost_metric, cost_per_mtok_metric, energy_cost_usd, rent_usd
from dyno.measure.energy import Energy
from dyno.measure.nvml import NotMeasured
from dyno.measure.power import EMPTY_LOG
from dyno.measure.roofline import roofline_fraction, roofline_metrics
from dyno.measure.row import Readings, window_metrics
from dyno.record import Metric, unmeasured

STATED = {
    "price_usd_per_hour": {"value": 3.6, "source": "list", "date": "2026-01"},
    "kwh_price_usd": {"value": 0.1, "source": "bill", "date": "2026-01"},
    "pue": {"value": 1.5, "source": "site", "date": "2026-01"},
    "grid_gco2_per_kwh": {"value": 400, "source": "grid", "date": "2026-01"},
    "peak_flop_per_s": {"bf16": 1e15, "source": "sheet", "date": "2026-01"},
    "peak_byte_per_s": {"value": 4e12, "source": "sheet", "date": "2026-01"},
}
CEILINGS = {"matrix_flop_per_s": {"bf16": 8e14, "fp32": 5e13}, "copy_byte_per_s": 2e12}


def test_carbon_arithmetic():
    assert carbon_g(3.6e6, 1.5, 400) == pytest.approx(600)
    metric = carbon_metric(Metric(3.6e6, "J", source="nvml_counter"), STATED)
    assert metric.value == pytest.approx(600)
    assert "nvml_counter" in metric.source
    assert "too_short" in carbon_metric(unmeasured("J", "too_short"), STATED).reason
    assert "pue" in carbon_metric(Metric(1.0, "J"), {}).reason


def test_cost_arithmetic():
    assert rent_usd(100, 3.6) == pytest.approx(0.1)
    assert energy_cost_usd(3.6e6, 1.5, 0.1) == pytest.approx(0.15)
    energy, none = Metric(3.6e6, "J"), unmeasured("J", "too_short")
    assert cost_metric(100, energy, STATED).value == pytest.approx(0.1)
    assert cost_metric(100, none, STATED).value == pytest.approx(0.1)
    owned = STATED | {"price_includes_energy": False}
    assert cost_metric(100, energy, owned).value == pytest.approx(0.25)
    assert "too_short" in cost_metric(100, none, owned).reason
    assert "price_usd_per_hour" in cost_metric(100, energy, {}).reason
    assert cost_per_mtok_metric(Metric(0.1, "USD"), 50_000).value == pytest.approx(2.0)
    assert cost_per_mtok_metric(Metric(0.1, "USD"), None).value is None


def test_roofline():
    assert roofline_fraction(8e14, 1.0, 2.0, 8e14, 2e12) == pytest.approx(0.5)  # bound by arithmetic
    assert roofline_fraction(1.0, 2e12, 4.0, 8e14, 2e12) == pytest.approx(0.25)  # bound by traffic
    out = roofline_metrics(4e14, 1e12, 1.0, "bf16", STATED, CEILINGS)
    assert out["mfu"].value == pytest.approx(0.4)
    assert out["mbu"].value == pytest.approx(0.25)
    assert out["arithmetic_intensity"].value == pytest.approx(400)
    assert out["roofline_fraction"].value == pytest.approx(0.5)
    measured = roofline_metrics(4e14, 1e12, 1.0, "bf16", {}, CEILINGS)
    assert measured["mfu"].value == pytest.approx(0.5)
    assert measured["mfu"].source == "measured ceiling"
    assert roofline_metrics(4e14, 1e12, 1.0, "int3", {}, CEILINGS)["mfu"].value is None
    assert all(m.reason for m in roofline_metrics(None, None, 1.0, "bf16", STATED, None).values())


def readings(**changes):
    times = np.full(100, 0.12)
    base = Readings(
        device="cuda", step_times_s=times, seconds=12.0, clock="cuda_event", tokens=24_000, flops=4.8e15,
        traffic_bytes=1.2e13, dtype="bf16", energy=Energy(6000.0, 12.0, mean_power_w=500.0, samples=240),
        idle_power_w=Metric(100.0, "W", 5), memory={"peak_memory_bytes": Metric(1, "B")}, emissions=None,
        emissions_reason="off", hardware=STATED,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_a_full_row():
    out = window_metrics(readings(), CEILINGS)
    assert out["step_time_s"].value == pytest.approx(0.12)
    assert out["step_time_p95_s"].value is not None
    assert out["step_time_p99_s"].reason == "p99 needs 459 samples, there are 100"
    assert out["tokens_per_s"].value == pytest.approx(2000)
    assert out["energy_j_per_token"].value == pytest.approx(0.25)
    assert out["energy_above_idle_j"].value == pytest.approx(4800)
    assert out["cost_usd_per_mtok"].value == pytest.approx(0.012 / 24_000 * 1e6)
    assert out["carbon_g"].value == pytest.approx(1.0)
    assert out["cpu_energy_j"].reason == "off"


def test_an_invalid_energy_empties_its_cells_and_no_other():
    bad = Energy(None, 12.0, counter_j=1.0, code="counter_disagrees", reason="by much")
    out = window_metrics(readings(energy=bad), CEILINGS)
    for name in ("energy_j", "energy_j_per_token", "power_w", "energy_above_idle_j", "carbon_g"):
        assert out[name].value is None
        assert "counter_disagrees" in out[name].reason
    assert out["tokens_per_s"].value is not None
    assert out["cost_usd"].value is not None


def test_a_row_of_nothing_has_reasons_everywhere():
    out = window_metrics(readings(step_times_s=np.empty(0), seconds=0.0, tokens=None, hardware={}), None)
    assert out.keys() == window_metrics(readings(), CEILINGS).keys()
    assert all(metric.reason for name, metric in out.items() if metric.value is None)
    assert out["step_time_s"].value is None
    assert out["tokens_per_s"].value is None


def test_what_codecarbon_models_is_an_estimate_and_what_rapl_reads_is_energy():
    none = Energy(None, 12.0, code="not_measured", reason="a CPU")
    said = {"cpu_energy_j": 240.0, "ram_energy_j": 60.0, "source": "estimate"}
    out = window_metrics(readings(device="cpu", dtype="fp32", energy=none, emissions=said), CEILINGS)
    assert out["cpu_energy_j"].source == "estimate"
    assert out["energy_j"].value is None
    out = window_metrics(readings(device="cpu", energy=none, emissions=said | {"source": "rapl"}), CEILINGS)
    assert out["energy_j"].value == 240.0
    assert out["power_w"].value == pytest.approx(20.0)
    assert out["ram_energy_j"].source == "estimate"


# hardware options


@pytest.mark.parametrize("name", ["h100", "h200", "a100", "cpu"])
def test_every_option_states_price_and_grid_with_source_and_date(name):
    option = hardware.options()[name]
    for key in ("price_usd_per_hour", "kwh_price_usd", "pue", "grid_gco2_per_kwh"):
        value, source = hardware.quantity(option, key)
        assert value > 0
        assert "un" not in source.split()[-1]
        assert option[key]["source"]
        assert option[key]["date"]
    assert len(option["region"]) == 3


def test_h100_peaks():
    option = hardware.options()["h100"]
    assert hardware.peak_flop_per_s(option, "bf16")[0] == 989e12
    assert hardware.quantity(option, "peak_byte_per_s")[0] == 3.35e12
    with pytest.raises(NotMeasured, match="int3"):
        hardware.peak_flop_per_s(option, "int3")


def test_auto_takes_the_matching_option_and_keeps_what_the_user_states():
    auto = hardware.options()["auto"]
    found = hardware.resolve(auto, "cuda", "NVIDIA H100 80GB HBM3")
    assert found["resolved_from"] == "h100"
    assert found["power_limit_w"] == 700
    mine = auto | {"price_usd_per_hour": {"value": 1.0, "source": "contract", "date": "2026"}}
    assert hardware.resolve(mine, "cuda", "NVIDIA H100 80GB HBM3")["price_usd_per_hour"]["value"] == 1.0
    assert hardware.resolve(auto, "cuda", "NVIDIA GB200")["resolved_from"] == "gb200"
    assert hardware.resolve(auto, "cuda", "NVIDIA B200")["resolved_from"] == "b200"
    assert hardware.resolve(auto, "cpu", "Some CPU")["resolved_from"] == "cpu"
    unknown = hardware.resolve(auto, "cuda", "NVIDIA Nobody 1")
    assert unknown["resolved_from"] is None
    with pytest.raises(NotMeasured):
        hardware.quantity(unknown, "price_usd_per_hour")
    named = hardware.options()["h100"]
    assert hardware.resolve(named, "cuda", "whatever") == named


# environment


class FakeGpu:
    def __init__(self, uuid, name="NVIDIA H100 80GB HBM3"):
        self._uuid, self._name = uuid, name

    def uuid(self):
        return self._uuid

    def name(self):
        return self._name

    def memory_total_bytes(self):
        return 80 << 30

    def capability(self):
        return (9, 0)


def test_visible_devices_mask():
    gpus = [FakeGpu("GPU-aa"), FakeGpu("GPU-ab"), FakeGpu("GPU-c")]

    def seen(mask):
        return [gpu.uuid() for gpu in environment.visible(gpus, mask)]

    assert seen(None) == ["GPU-aa", "GPU-ab", "GPU-c"]
    assert seen("2,0") == ["GPU-c", "GPU-aa"]
    assert seen("GPU-ab") == ["GPU-ab"]
    assert seen("GPU-a") == []  # ambiguous
    assert seen("") == []
    assert seen("-1") == []
    assert seen("1,9,0") == ["GPU-ab"]


def test_detect(monkeypatch):
    monkeypatch.setattr(environment, "devices", list)
    cpu = environment.detect({"device": "auto"})
    assert cpu.kind == "cpu"
    assert cpu.memory_bytes > 0
    with pytest.raises(UserError, match="none is visible"):
        environment.detect({"device": "cuda"})
    with pytest.raises(UserError, match="auto, cpu, cuda"):
        environment.detect({"device": "tpu"})
    monkeypatch.setattr(environment, "devices", lambda: [FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpu = environment.detect({"device": "auto", "match": None})
    assert (gpu.kind, gpu.uuid, gpu.count, gpu.capability) == ("cuda", "GPU-b", 1, (9, 0))
    assert environment.detect({"device": "cpu"}).kind == "cpu"
    with pytest.raises(UserError, match="hardware=auto"):
        environment.detect({"device": "cuda", "match": "A100"})


def test_a_configuration_can_stand_in_for_a_device():
    device = environment.planned(hardware.options()["h100"])
    assert (device.kind, device.capability, device.memory_bytes >> 30) == ("cuda", (9, 0), 79)
    assert (
        device.node == 8 and device.count > 10**6
    )  # of a node the links are as fast; a network takes as many as one likes
    assert environment.planned(hardware.options()["gb200"]).node == 72
    alone = environment.planned(hardware.options()["h100"] | {"network": None})
    assert alone.count == alone.node == 8
    assert environment.planned(hardware.options()["h100"] | {"network": None, "node": None}).count == 1
    assert environment.planned(hardware.options()["auto"]) is None


def test_environment_names_no_host():
    found = environment.environment()
    assert found["machine"] == environment.machine_id()
    assert len(found["machine"]) == 16
    assert found["torch"]
    assert found["packages"]["numpy"]
    assert environment.platform.node() not in str(found["hostname_hash"])


# validity

QUIET = validity.Snapshot(0.0, 0, 0.0, 0.0, 0.0, 0, 0)


def codes(before, after, log=EMPTY_LOG, busy=None):
    verdict = validity.judge(before, after, log, busy)
    return verdict["ok"], [flag["code"] for flag in verdict["flags"]]


def test_validity_of_a_quiet_window():
    assert codes(QUIET, dataclasses.replace(QUIET, time_s=1.0)) == (True, [])
    now = validity.snapshot(None)
    assert now.cpu_busy_s > 0
    assert now.own_cpu_s > 0


def test_throttling_within_the_window_is_seen_in_the_log():
    bits = np.array([0.0, 0x4, 0x40, np.nan])
    log = dataclasses.replace(EMPTY_LOG, throttle_bits=bits)
    assert codes(QUIET, QUIET, log) == (False, ["sw_power_cap", "hw_thermal"])
    assert codes(QUIET, QUIET, dataclasses.replace(EMPTY_LOG, throttle_bits=bits[:2])) == (True, ["sw_power_cap"])
    assert codes(QUIET, dataclasses.replace(QUIET, throttle_bits=1)) == (True, [])  # idle at the end is no throttling


def test_power_limit_host_and_disk():
    assert codes(QUIET, dataclasses.replace(QUIET, power_limit_w=600.0))[0] is False
    assert codes(QUIET, dataclasses.replace(QUIET, time_s=1.0, cpu_busy_s=1e4)) == (True, ["host_busy"])
    assert codes(QUIET, dataclasses.replace(QUIET, time_s=1.0, cpu_busy_s=9.0, own_cpu_s=9.0)) == (True, [])
    assert codes(QUIET, dataclasses.replace(QUIET, major_faults=3)) == (True, ["page_faults"])


def test_another_process_on_the_gpu():
    me, other = validity.os.getpid(), 2**22 + 1
    both = dataclasses.replace(QUIET, processes=(me, other))
    assert codes(both, both, busy={me: 0.9, other: 0.5}) == (False, ["contaminated"])
    assert codes(both, both, busy={me: 0.9, other: 0.0}) == (True, ["other_process"])
    assert codes(both, both) == (True, ["other_process"])
    alone = dataclasses.replace(QUIET, processes=(me,))
    assert codes(alone, alone, busy={me: 0.9}) == (True, [])
    # a container that shows the host's process numbers: one of them is us, nobody knows which
    hidden = dataclasses.replace(QUIET, processes=(other,))
    assert codes(hidden, hidden, busy={other: 0.9}) == (True, [])
    hidden = dataclasses.replace(QUIET, processes=(other, other + 1))
    assert codes(hidden, hidden, busy={other: 0.9, other + 1: 0.8}) == (False, ["contaminated"])
    assert codes(hidden, hidden, busy={other: 0.9}) == (True, ["other_process"])


def test_merged_verdicts():
    flag = validity.flag("host_busy", "x")
    merged = validity.merge([{"ok": True, "flags": [flag]}, {"ok": False, "flags": [flag]}])
    assert merged == {"ok": False, "flags": [flag]}


def test_a_source_that_is_no_checkout_may_be_told_its_commit(monkeypatch):
    from dyno.measure import environment

    monkeypatch.setattr(environment, "_git", lambda folder, *words: None)
    monkeypatch.delenv("DYNO_COMMIT", raising=False)
    assert environment.source_state() == {"commit": None, "dirty": None}
    monkeypatch.setenv("DYNO_COMMIT", "abc123")
    assert environment.source_state() == {"commit": "abc123", "dirty": None}
