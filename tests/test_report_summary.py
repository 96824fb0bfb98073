"""Fronts, constraints, effects and figures as text, against answers known beforehand."""

from __future__ import annotations

import math

import pytest
import synthetic

from dyno.report.rows import Cell, rows, short_name, unexplained, varied, varied_knobs
from dyno.report.summary import cell_ratio, effects, front, gain, limit_of, summarise
from dyno.units import digits, direction_of, quantity, ratio_text, unit_of


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12_345.0, "tokens/s", "12.35 ktokens/s"),
        (8.05e9, "B", "8.050 GB"),
        (512, "B", "512.0 B"),
        (0.0031, "s", "3.100 ms"),
        (4200.0, "s", "4\u202f200 s"),
        (3.2, "", "3.200"),
        (0, "B", "0 B"),
        (0.25, "USD", "$0.2500"),
        (None, "s", ""),
        (math.nan, "s", ""),
        (1e-12, "s", "0.001000 ns"),
    ],
)
def test_quantity(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_how_a_row_was_measured_does_not_name_it() -> None:
    records = [
        {
            "id": f"r{i}",
            "status": "ok",
            "choices": {"workload": "train", "measure": "quick"},
            "config": {"workload": {"batch": i}, "measure": {"min_steps": i}},
        }
        for i in range(2)
    ]
    assert varied_knobs(rows(None, records)) == ["workload.batch"]


def test_units_and_directions() -> None:
    assert unit_of("peak_memory_bytes") == unit_of("peak_memory_bytes", "bytes") == "B"
    assert unit_of("tokens_per_s", "token/s") == "tokens/s"
    assert unit_of("perplexity", "1") == ""
    assert direction_of("decode_tokens_per_s") == direction_of("mfu") == "maximize"
    assert direction_of("energy_j_per_token") == direction_of("itl_p95_s") == "minimize"
    assert ratio_text(1.0042, 0.998, 1.01) == "1.004× (0.998–1.010)"
    assert digits(1234567.0) == "1\u202f234\u202f567"


def test_limits_are_bound_to_the_baseline() -> None:
    baseline = rows(None, [synthetic.record()])[0]
    assert limit_of("peak_memory_bytes <= 8 GiB", None).bound == 8 * 2**30
    half = limit_of("tokens_per_s >= 0.5 * baseline", baseline)
    assert half.bound == pytest.approx(1700) and half.holds(baseline) is True
    assert limit_of("perplexity <= baseline", baseline).holds(baseline) is True
    assert limit_of("perplexity < baseline", baseline).holds(baseline) is False
    assert limit_of("perplexity <= baseline", None).reason == "there is no baseline row"
    unknown = limit_of("mystery <= baseline", baseline)
    assert unknown.holds(baseline) is None and unknown.reason == "the baseline has no mystery"


def test_front_has_what_nothing_beats() -> None:
    records = [synthetic.record(i) for i in range(5)]
    for record, (speed, memory) in zip(records, [(1, 1), (2, 2), (2, 3), (3, 3), (0.5, 1)], strict=True):
        record["metrics"] = {"s": synthetic.metric(speed, ""), "m": synthetic.metric(memory, "")}
    every = rows(None, records)
    assert {row.id for row in front(every, [("s", "maximize"), ("m", "minimize")])} == {every[i].id for i in (0, 1, 3)}
    assert {row.id for row in front(every, [("s", "minimize"), ("m", "minimize")])} == {every[4].id}


def test_the_best_rows_of_a_long_front_hold_the_best_of_every_objective() -> None:
    records = [synthetic.record(i) for i in range(9)]
    for i, record in enumerate(records):
        record["metrics"] = {"s": synthetic.metric(i + 1, ""), "m": synthetic.metric(i + 1, "")}
        record["recipe_hash"] = str(i)
    goals = [("s", "maximize"), ("m", "minimize")]
    best = summarise(rows(None, records), objectives=goals).best
    assert [row.value("s") for row in best] == [9, 8, 7, 6, 1]
    records[0]["recipe_hash"] = records[8]["recipe_hash"]  # the least memory by another run of the fastest recipe
    assert [row.value("s") for row in summarise(rows(None, records), objectives=goals).best] == [9, 8, 7, 6, 1]


def test_best_rows_hold_the_constraints_and_the_baseline_is_found() -> None:
    records = synthetic.study(36)
    summary = summarise(rows(None, records), ["perplexity <= 1.02 * baseline"], [("tokens_per_s", "maximize")])
    assert summary.baseline is not None and summary.baseline.id == records[0]["id"]
    assert (
        short_name(summary.best[0], varied(summary.rows), varied_knobs(summary.rows))
        == "bf16 · sdpa · compile=on · int8"
    )
    assert all(row.choices["quantization"] != "int4" for row in summary.best)
    assert sum(summary.counts().values()) == 36


def test_a_runs_name_leaves_out_knobs_that_mean_nothing_beside_the_others() -> None:
    records = [synthetic.record(i) for i in range(3)]
    knobs = ({"dp": 2, "zero": 2}, {"pp": 2, "schedule": "gpipe"}, {"cp": 2, "context": "ulysses", "tp": 1.5})
    for record, some in zip(records, knobs, strict=True):
        record["choices"]["parallelism"] = "mesh"
        plain = {"dp": 1, "tp": 1, "pp": 1, "cp": 1, "zero": 0, "schedule": "1f1b", "context": "ring"}
        target = "dyno.techniques.parallelism.mesh.Mesh"
        record["config"]["parallelism"] = {"_target_": target} | plain | some
    every = rows(None, records)
    names = [short_name(row, ["parallelism"], varied_knobs(every)) for row in every]
    assert names[0] == "mesh · dp=2 · zero=2"
    assert names[1] == "mesh · pp=2 · schedule=gpipe"
    assert "context=ulysses" in names[2] and "dp=1" in names[2]  # no layout that can be made: every knob is told


def test_two_models_have_no_common_baseline() -> None:
    records = [synthetic.record(0), synthetic.record(1, gpu=True)]
    assert summarise(rows(None, records)).baseline is None
    assert summarise(rows(None, records), baseline_id=records[1]["id"]).baseline is not None


def test_effects_recover_the_factors_that_were_put_in() -> None:
    found = {(e.axis, e.option, e.metric): e for e in effects(rows(None, synthetic.study(36)))}
    for axis, option, factor in (("precision", "bf16", 1.9), ("attention", "sdpa", 1.3), ("compile", "on", 1.35)):
        effect = found[axis, option, "tokens_per_s"]
        assert effect.low is not None and effect.high is not None
        assert effect.low < factor < effect.high and effect.ratio == pytest.approx(factor, rel=0.02)
        assert effect.pairs == len(effect.points) >= 8
    assert ("precision", "fp32", "tokens_per_s") not in found


def test_effects_pair_only_what_is_alike() -> None:
    records = [synthetic.record(0), synthetic.record(1, precision="bf16", attention="sdpa")]
    assert effects(rows(None, records)) == []
    records = [synthetic.record(0), synthetic.record(1, machine="other", precision="bf16")]
    assert effects(rows(None, records)) == []


def test_ratio_interval_of_two_cells() -> None:
    assert cell_ratio(Cell(2.0), Cell(3.0)) == (1.5, None, None)
    assert cell_ratio(Cell(0.0), Cell(3.0)) is None
    found = cell_ratio(Cell(100.0, 99.0, 101.0), Cell(200.0, 198.0, 202.0))
    assert found is not None and found[1] is not None and found[2] is not None
    assert found[0] == 2 and found[1] == pytest.approx(2 * (1 - 0.0141), rel=1e-3)
    assert found[2] == pytest.approx(2 * (1 + 0.0141), rel=1e-3)


def test_no_ratio_over_a_baseline_of_another_machine() -> None:
    records = [
        synthetic.record(0),
        synthetic.record(1, precision="bf16"),
        synthetic.record(2, machine="x", precision="bf16"),
    ]
    base, near, far = rows(None, records)
    assert gain(near, base, "tokens_per_s") is not None
    assert gain(far, base, "tokens_per_s") is None


def test_a_batch_searched_over_keeps_its_ratio() -> None:
    records = [synthetic.record(0), synthetic.record(1, knobs={"workload.batch": 64}, precision="bf16")]
    records[1]["fingerprint"] |= {"workload": "train-64"}
    base, other = rows(None, records)
    assert gain(other, base, "tokens_per_s") is not None
    assert unexplained([base, other]) == {}


def test_weights_of_another_batch_are_explained_by_it_and_others_are_not() -> None:
    records = [synthetic.record(0), synthetic.record(1, knobs={"workload.batch": 64}), synthetic.record(2)]
    for record, weights in zip(records, ("of 16", "of 64", "of 16"), strict=True):
        record["fingerprint"]["weights"] = weights
    assert unexplained(rows(None, records)) == {}
    records[2]["fingerprint"]["weights"] = "of something else"
    assert unexplained(rows(None, records)) == {"weights": ["of 16", "of something else"]}


def test_a_lone_recipe_is_no_baseline_of_itself() -> None:
    assert summarise(rows(None, [synthetic.record(0, precision="bf16")])).baseline is None
    assert summarise(rows(None, [synthetic.record(0)])).baseline is not None
