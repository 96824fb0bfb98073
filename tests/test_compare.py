"""Comparison: ratios and intervals against known samples, matching, and the refusal of unlike rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import synthetic

from dyno.compare import FingerprintMismatch, compare
from dyno.errors import UserError
from dyno.record import table


def test_ratio_and_words_from_intervals() -> None:
    found = compare(synthetic.record(0), synthetic.record(1, precision="bf16"))
    pair = found.pairs[0]
    assert pair.differs == {"precision": ("fp32", "bf16")}
    speed = pair["tokens_per_s"]
    assert speed.ratio == pytest.approx(1.9) and speed.verdict == "faster"
    assert speed.low is not None and speed.high is not None and speed.low < 1.9 < speed.high
    assert pair["step_time_s"].verdict == "faster" and pair["step_time_s"].ratio == pytest.approx(1 / 1.9)
    assert pair["peak_memory_bytes"].verdict == "smaller (no interval)"
    assert pair["validation_loss"].verdict == "same within interval"
    assert pair["parameters"].verdict == "same"
    energy = pair["energy_j_per_token"]
    assert energy.ratio is None and energy.verdict == "not measured" and "no energy counter" in energy.reason


def test_bootstrap_of_step_times(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, b = synthetic.record(0), synthetic.record(1, precision="bf16")
    times = {a["id"]: rng.normal(1.0, 0.05, 200), b["id"]: rng.normal(0.5, 0.025, 200)}
    for record in (a, b):
        middle = float(np.median(times[record["id"]]))
        record["metrics"]["step_time_s"]["value"] = middle
        record["metrics"]["tokens_per_s"]["value"] = 1000 / middle
    samples = {key: {"train.step_times_s": values, "train.power_w": values} for key, values in times.items()}
    where = synthetic.write(tmp_path, [a, b], samples)
    pair = compare(where / "runs" / a["id"], b["id"], results_dir=where).pairs[0]
    for name, truth in (("step_time_s", 0.5), ("tokens_per_s", 2.0)):
        metric = pair[name]
        assert metric.method == "bootstrap of step times" and metric.verdict == "faster"
        assert metric.low is not None and metric.high is not None and metric.ratio is not None
        assert metric.low < truth < metric.high and metric.high / metric.low < 1.04
        assert metric.low < metric.ratio < metric.high


@pytest.mark.parametrize("part", ["machine", "device", "data", "weights", "workload"])
def test_refuses_other_fingerprints_unless_forced(part: str) -> None:
    a, b = synthetic.record(0), synthetic.record(1, compile="on")
    b["fingerprint"][part] = "another"
    if part == "weights":  # compile is a choice of the train stage, which may explain other weights: take it away
        b["choices"] = a["choices"]
    with pytest.raises(FingerprintMismatch, match=f"{part} .* and 'another'"):
        compare(a, b)
    forced = compare(a, b, force=True)
    assert forced.pairs[0]["tokens_per_s"].ratio == pytest.approx(1.35)
    assert any(note.startswith("forced although") and part in note for note in forced.notes)


def test_differences_that_the_recipes_explain_are_told_not_refused() -> None:
    a, b = synthetic.record(0), synthetic.record(1, data_filters=["exact_dedup"])
    b["fingerprint"]["data"] = "another"
    assert compare(a, b).notes == ["data differ, as the recipes do in data_filters"]
    b["fingerprint"] = a["fingerprint"] | {"software": "torch 2.11"}
    assert compare(a, b).notes == []


def test_tables_are_matched_by_recipe_then_by_axes(tmp_path: Path) -> None:
    left = [
        synthetic.record(i, precision=p, attention=a)
        for i, (p, a) in enumerate([("fp32", "math"), ("bf16", "math"), ("fp32", "sdpa")])
    ]
    right = [
        synthetic.record(i + 10, noise=0.1, precision=p, attention=a)
        for i, (p, a) in enumerate([("bf16", "math"), ("fp32", "math"), ("fp16", "sdpa")])
    ]
    right[1]["recipe_hash"] = "another code, the same choices"
    found = compare(left, right)
    assert {(pair.a[0], pair.b[0]) for pair in found.pairs} == {
        (left[1]["id"], right[0]["id"]),
        (left[0]["id"], right[1]["id"]),
    }
    assert found.only_a == [left[2]["id"]] and found.only_b == [right[2]["id"]]
    assert all(pair["tokens_per_s"].ratio == pytest.approx(np.exp(0.1)) for pair in found.pairs)
    table(left).to_parquet(tmp_path / "a.parquet")
    table(right).to_csv(tmp_path / "b.csv", index=False)
    again = compare(tmp_path / "a.parquet", tmp_path / "b.csv")
    assert [pair.a for pair in again.pairs] == [pair.a for pair in found.pairs]
    assert any("not checked" in note for note in again.notes)


def test_repeats_are_pooled() -> None:
    a = [synthetic.record(i, noise=n) for i, n in enumerate((-0.02, 0.0, 0.02))]
    b = [synthetic.record(i + 9, noise=n) for i, n in enumerate((0.0, 0.01))]
    found = compare(a, b)
    assert len(found.pairs) == 1 and len(found.pairs[0].a) == 3
    assert found.pairs[0]["tokens_per_s"].verdict == "same within interval"


def test_failures_zeros_and_rendering() -> None:
    a, b = synthetic.record(0), synthetic.record(1, status="out_of_memory", precision="bf16")
    found = compare(a, b)
    assert "B ended out_of_memory: predicted 91.2 GB" in found.text()
    assert json.loads(json.dumps(found.to_json()))["pairs"][0]["metrics"] == {}
    b = synthetic.record(1, quantization="int8")
    a["metrics"]["kl_divergence"] = synthetic.metric(0.0, "nats")
    b["metrics"]["kl_divergence"] = synthetic.metric(0.02, "nats")
    found = compare(a, b)
    assert found.pairs[0]["kl_divergence"].ratio is None
    assert found.pairs[0]["kl_divergence"].verdict == "worse (no interval)"
    lines = found.text().splitlines()
    head = next(line for line in lines if line.lstrip().startswith("metric"))
    row = next(line for line in lines if "tokens_per_s" in line)
    assert row.index("1.25×") == head.index("B / A")
    assert json.loads(json.dumps(found.to_json()))["pairs"][0]["metrics"]["tokens_per_s"]["verdict"] == "faster"
    assert "nothing to compare" in compare([], []).text()


def test_a_side_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not name one thing"):
        compare("20260901", synthetic.record(0), results_dir=tmp_path)
    synthetic.write(tmp_path, [synthetic.record(0), synthetic.record(1, precision="bf16")])
    with pytest.raises(UserError, match="2 runs begin so"):
        compare("20260901", synthetic.record(0), results_dir=tmp_path)
