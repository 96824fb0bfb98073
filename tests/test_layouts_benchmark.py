"""The cells of benchmarks/layouts.py: they are recipes that the plan lets through, and rows are held to one GPU's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from dyno.measure.environment import Device
from dyno.plan import predict, reasons
from dyno.recipe import compose

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import layouts  # noqa: E402
import planner_recipes  # noqa: E402
import readme_layouts  # noqa: E402

CARD = 80 * 2**30


def device(gpus: int) -> Device:
    return Device("cuda", 0, "NVIDIA H100 80GB HBM3", CARD, (9, 0), None, gpus)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_cells_have_names_of_their_own_and_take_as_many_gpus_as_they_say(gpus):
    cells = layouts.cells(gpus)
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in [c for c in cells if c.key.startswith("160m/")]:
        (layout,) = cell.recipe().techniques["parallelism"]
        assert layout.world_size == (1 if cell.key.endswith("/one") else gpus), cell.key


@pytest.mark.parametrize("gpus", [2, 4])
def test_every_layout_of_the_small_model_can_run(gpus):
    for cell in layouts.cells(gpus):
        if cell.key.startswith(("160m/", "deep/")):
            assert not reasons(cell.recipe(), device(gpus)), cell.key


def test_the_deep_model_is_too_large_for_one_gpu_and_fits_two():
    deep = {c.key: predict(c.recipe(), device(2)).verdict() for c in layouts.cells(2) if c.key.startswith("deep/")}
    assert (deep.pop("deep/one") or ("fits",))[0] == "out_of_memory"
    assert set(deep) >= {"deep/zero3", "deep/tensor", "deep/1f1b"} and not any(deep.values())


def test_strong_cells_keep_the_batch_and_weak_ones_the_rows_a_gpu():
    found = {name: words[-1] for name, words in layouts.scaling(8, 64).items()}
    assert found == {
        "weak1": "workload.batch=8", "weak2_ddp": "workload.batch=16", "strong2_ddp": "workload.batch=64",
        "weak2_zero1": "workload.batch=16", "strong2_zero1": "workload.batch=64", "weak2_zero3": "workload.batch=16",
        "strong2_zero3": "workload.batch=64", "weak4_ddp": "workload.batch=32", "strong4_ddp": "workload.batch=64",
        "weak4_zero1": "workload.batch=32", "strong4_zero1": "workload.batch=64", "weak4_zero3": "workload.batch=32",
        "strong4_zero3": "workload.batch=64",
    }  # fmt: skip


def record(losses: list[float], ranks: int, rate: float, precision: str = "bf16") -> dict:
    recipe = compose([f"precision={precision}"])
    return {
        "config": recipe.config, "choices": recipe.choices, "status": "ok", "reason": None,
        "ranks": [{}] * ranks if ranks > 1 else [],
        "metrics": {"tokens_per_s": {"value": rate}}, "details": {"train": {"first_losses": losses}},
    }  # fmt: skip


def test_a_row_is_a_gpus_share_and_its_losses_are_held_to_one_gpu():
    one, two = record([3.0, 2.5, 2.0], 1, 100.0), record([3.001, 2.47], 2, 180.0)
    row = layouts.row_of("160m/ddp", two, one)
    assert row["gpus"] == 2 and row["tokens_per_s_per_gpu"] == 90 and row["mfu"] is None
    assert row["loss_apart"] == pytest.approx(0.03 / 2.5)
    rounded = [record(r["details"]["train"]["first_losses"], 2, 1.0, "bf16_stochastic") for r in (two, one)]
    assert layouts.row_of("deep/ddp", *rounded)["loss_apart"] == pytest.approx(0.001 / 3)  # only before a step
    assert layouts.row_of("160m/weak1", one, two)["loss_apart"] is None  # it took another batch
    failed = {
        "config": one["config"],
        "choices": one["choices"],
        "status": "crashed",
        "reason": "rank 1",
        "ranks": [],
        "metrics": {},
        "details": {},
    }
    assert layouts.row_of("160m/ddp", failed, one)["loss_apart"] is None


def test_outdated_cells_and_those_without_a_record_are_run_and_no_other(tmp_path, monkeypatch):
    chosen, ran = layouts.cells(2, "cpu")[:3], []

    def run(recipe, gate):
        ran.append(recipe.overrides)
        return {"id": f"new{len(ran)}", "status": "ok", "reason": None, "metrics": {}, "duration_s": 0.0}

    monkeypatch.setattr(layouts.runner, "run", run)
    for cell, name in zip(chosen[:2], ("old", "good"), strict=True):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "record.json").write_text(json.dumps({"id": name, "status": "ok"}))
        with (tmp_path / "done.jsonl").open("a") as file:
            file.write(json.dumps({"key": cell.key, "id": name, "status": "ok"}) + "\n")
    (tmp_path / "outdated.json").write_text(json.dumps({"old": "another step"}))
    layouts.run(chosen, argparse.Namespace(again=False, seconds=60, overrides=[], try_all=False), tmp_path)
    kept = [json.loads(line)["key"] for line in (tmp_path / "done.jsonl").read_text().splitlines()[2:]]
    assert len(ran) == 2 and kept == [chosen[0].key, chosen[2].key]


@pytest.mark.parametrize("share", ["0", "1", "1.5"])
def test_an_audit_of_no_share_is_refused(share, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planner_recipes.py", "--audit", share, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        planner_recipes.main()
    assert end.value.code == 2 and "lies between 0 and 1" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_marks_tell_older_steps_apart_by_reason():
    signs, lines = readme_layouts.marks([{"id": "a"}, {"id": "b"}, {"id": "c"}], {"a": "Of one.", "c": "Of another."})
    assert signs == {"a": r"\*\*", "c": r"\*"}
    assert lines == ["", r"\* Of another.", "", r"\*\* Of one."]
    assert readme_layouts.marks([{"id": "b"}], {"a": "Of one."}) == ({}, [])
