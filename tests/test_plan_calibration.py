"""Calibration on simulated records: coefficients come back, one wild run bends nothing, a stranger's record runs no code."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from dyno.errors import UserError
from dyno.measure.environment import Device
from dyno.plan import calibrate, corrections, predict, time
from dyno.plan.fit import coefficients, non_negative
from dyno.recipe import compose

CEILINGS = {
    "uuid": "GPU-0", "matrix_flop_per_s": {"bf16": 7e14, "tf32": 4e14, "fp32": 5e13}, "copy_byte_per_s": 3e12,
    "created": "2026-01-01",
}  # fmt: skip
NAME = "a simulated card"
TRUE_MEMORY = {"state": 1.0, "activations": 1.2, "logits": 0.9, "temporaries": 1.5, "extra": 2.0}
TRUE_TIME = {"products": 1.3, "attention": 0.8, "elementwise": 1.6, "host": 2.0}


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def plain():
    return compose(["model=160m", "precision=bf16"])


def record(plain, i: int, noise: float = 0.0, **sizes) -> dict:
    """A finished run whose peak and step are the arithmetic's under known coefficients, times (1 + noise)."""
    config = json.loads(json.dumps(plain.config))
    for key, number in sizes.items():
        config["model" if key in config["model"] else "workload"][key] = number
    made = {
        "id": f"run-{i}", "status": "ok", "config": config, "choices": plain.choices, "metrics": {},
        "environment": {"gpus": [{"name": NAME}], "ceilings": CEILINGS}, "fingerprint": {"device": NAME},
    }  # fmt: skip
    sample = calibrate.sample_of(made)
    assert sample is not None and sample.seconds is not None
    phases = corrections.corrected_memory(sample.phases, corrections.Fit(TRUE_MEMORY))
    terms = corrections.corrected_time(sample.seconds, corrections.Fit(TRUE_TIME))
    made["metrics"] = {
        "peak_memory_bytes": {"value": calibrate.peak(phases) * (1 + noise)},
        "step_time_s": {"value": time.step_s(terms) * (1 + noise)},
    }
    return made


def records(plain, noise: float = 0.0, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    sizes = itertools.product((2, 6, 12), (512, 1024, 2048), (4, 16), (256, 1024))
    return [
        record(plain, i, noise * float(rng.standard_normal()), layers=layers, hidden=hidden, ffn_width=3 * hidden,
               batch=batch, seq=seq, vocab_size=(8000, 64000)[i % 2])
        for i, (layers, hidden, batch, seq) in enumerate(sizes)
    ]  # fmt: skip


def write(folder, made) -> None:
    for one in made:
        path = folder / "runs" / one["id"] / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(one))


def test_least_squares_without_negatives_is_the_optimum():
    rng = np.random.default_rng(1)
    for rows, n in ((5, 3), (40, 7), (123, 5)):
        matrix, target = rng.random((rows, n)), rng.standard_normal(rows)
        x = non_negative(matrix, target)
        slope = matrix.T @ (matrix @ x - target)
        assert (x >= 0).all()
        assert slope.min() > -1e-6 and np.abs(slope * x).max() < 1e-6  # Karush-Kuhn-Tucker
    exact = np.array([0.5, 2.0, 0.0])
    matrix = rng.random((50, 3))
    assert non_negative(matrix, matrix @ exact) == pytest.approx(exact, abs=1e-6)


def test_one_wild_run_bends_nothing_and_what_nobody_measured_stays_as_derived():
    rng = np.random.default_rng(2)
    terms = np.c_[rng.random((40, 2)) + 0.1, np.zeros(40)]
    measured = terms @ np.array([1.5, 0.7, 9.0])
    measured[3] *= 20
    found = coefficients(terms, measured, draw=0.01)
    assert found[:2] == pytest.approx([1.5, 0.7], rel=0.03) and found[2] == pytest.approx(1.0)


def test_coefficients_come_back_and_held_out_errors_fall(plain, tmp_path):
    write(tmp_path, records(plain, noise=0.02))
    samples, left_out = calibrate.read(tmp_path)
    assert len(samples) == 36 and left_out == 0
    held = [s for s in samples if calibrate.is_held_out(s)]
    found = calibrate.calibrated(samples, NAME)
    for what, fits in (("memory", found.memory), ("time", found.time)):
        fit = fits["eager"]
        before = np.median(np.abs(calibrate.errors(held, None, what)))
        assert fit.held_out == len(held) >= 6 and fit.fitted == 36 - len(held)
        assert fit.median_error < 0.04 < before and fit.median_error <= fit.p95_error < 0.15
    assert found.memory["eager"].coefficients["activations"] == pytest.approx(1.2, abs=0.1)
    assert found.time["eager"].coefficients["products"] == pytest.approx(1.3, abs=0.25)
    assert not found.memory.get("compiled")


def test_a_plan_uses_what_was_stored_for_its_device(plain, tmp_path):
    device = Device("cuda", 0, NAME, 80 * 2**30, (9, 0), None, 1)
    before = predict(plain, device)
    write(tmp_path, records(plain))
    (found,) = calibrate.from_records(tmp_path)
    after, other = predict(plain, device), predict(plain, Device("cuda", 0, "another", 80 * 2**30, (9, 0), None, 1))
    assert not before.calibrated and after.calibrated and not other.calibrated
    assert after.memory_band == found.memory["eager"].p95_error < before.memory_band
    assert after.peak_memory_bytes > before.peak_memory_bytes == other.peak_memory_bytes


def test_a_record_older_than_an_axis_still_teaches(plain):
    made = record(plain, 0)
    older = {**made, "config": {k: v for k, v in made["config"].items() if k != "packing"}}
    assert calibrate.sample_of(older) == calibrate.sample_of(made)


def test_a_stranger_s_record_is_data_and_a_bad_one_is_counted(plain, tmp_path):
    good, foreign, broken, half = (record(plain, i) for i in range(4))
    foreign["config"]["attention"] = {"_target_": "os.system"}
    broken["config"]["model"]["layers"] = None
    half["metrics"]["peak_memory_bytes"]["value"] = None
    write(tmp_path, [good, foreign, broken, half])
    (tmp_path / "runs" / "text").mkdir()
    (tmp_path / "runs" / "text" / "record.json").write_text("{not json")
    samples, left_out = calibrate.read(tmp_path)
    assert [s.id for s in samples] == ["run-0", "run-3"] and left_out == 3
    assert [s.id for s in calibrate.usable(samples, "memory")] == ["run-0"]
    with pytest.raises(UserError, match=r"2 finished training runs \(3 records left out\)"):
        calibrate.from_records(tmp_path)


def test_a_stored_file_that_is_none_is_no_calibration(tmp_path):
    assert corrections.load(NAME) is None
    path = corrections.store(corrections.Calibration(NAME, records=3))
    assert corrections.load(NAME) == corrections.Calibration(NAME, records=3)
    path.write_text("[]")
    assert corrections.load(NAME) is None


@pytest.mark.parametrize(
    ("times", "spread"),
    [({"median": 0.02, "iqr": 0.001}, 0.05), ({"median": 0.02, "iqr": 0.0}, 0.0), ({"median": None, "iqr": None}, math.inf),
     ({}, math.inf), (None, math.inf)],
)  # fmt: skip
def test_how_far_the_steps_of_a_run_lie_apart(times, spread):
    assert calibrate.spread_of({"windows": {"train": {"step_time_s": times}}}) == pytest.approx(spread)
    assert calibrate.spread_of({"windows": {}}) == math.inf


def test_each_of_several_machines_has_its_own_calibration_and_others_take_the_device_s(plain, tmp_path, monkeypatch):
    lean = records(plain)
    large = json.loads(json.dumps(lean))
    for one, other in zip(lean, large, strict=True):
        one["fingerprint"]["machine"], other["fingerprint"]["machine"] = "lean", "large"
        other["id"] += "-large"
        other["metrics"]["peak_memory_bytes"]["value"] *= 1.5
    write(tmp_path, [*lean, *large])
    found = calibrate.from_records(tmp_path)
    assert [(c.machine, c.records) for c in found] == [("large", 36), ("lean", 36), ("", 72)]
    device = Device("cuda", 0, NAME, 80 * 2**30, (9, 0), None, 1)

    def peak(machine: str) -> float:
        monkeypatch.setattr("dyno.plan.machine_id", lambda: machine)
        return predict(plain, device).peak_memory_bytes

    assert peak("large") == pytest.approx(1.5 * peak("lean"), rel=0.1)
    assert peak("lean") < peak("a third") < peak("large")
    corrections.path_of(NAME, "large").write_text("[]")
    assert peak("large") == peak("a third")


def test_a_pipeline_that_idles_is_fitted_as_bound_by_its_device(plain):
    """The device's 9 s take 15 with the idle share; the host's 10 s do not decide."""
    made = calibrate.sample_of(record(plain, 0))
    terms = dict.fromkeys(calibrate.TIME_TERMS, 0.0) | {"products": 9.0, "host": 10.0}
    runs = [
        dataclasses.replace(made, id=str(i), seconds=terms, bubble=0.4, step_time_s=1.2 * time.step_s(terms, 0.4))
        for i in range(12)
    ]
    found = calibrate.fit_time(runs, 0.05).coefficients
    assert found["products"] == pytest.approx(1.2, abs=0.03) and found["host"] == 1.0
