"""Studies in this process, on the stand-in runner: what is run, what is told, what is never run twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from study_bench import quick_compose, records
from study_bench import run as fake_run

from dyno import runner, study
from dyno.errors import UserError
from dyno.study import samplers, session, settings


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tune(*overrides) -> (summary, lines); on the stand-in runner, whose function can be replaced as `tune.run`."""
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(settings, "compose", quick_compose)

    def call(*overrides: str, run: Any = None, plugins: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[str]]:
        monkeypatch.setattr(runner, "run", run or (lambda recipe, **kw: fake_run(recipe, seconds=0.0, **kw)))
        lines: list[str] = []
        words = [*overrides, f"results_dir={tmp_path / 'results'}", "hardware=cpu"]
        summary = study.tune(words, list(plugins), lambda text: None, say=lines.append)
        assert json.loads(json.dumps(summary)) == summary
        return summary, lines

    return call


def hashes(tmp_path: Path) -> list[str]:
    return [r["recipe_hash"] for r in records(tmp_path / "results")]


def test_a_study_of_the_command_line(tune, tmp_path):
    summary, lines = tune(
        "workload.batch=choice(8,16,32)", "workload.lr=tag(log,interval(1e-4,1e-2))", "study.trials=8"
    )
    assert summary["trials_done"] == summary["trials_asked"] == 8 and summary["stopped"] == "done"
    assert len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 8
    assert {r["config"]["study"]["name"] for r in records(tmp_path / "results")} == {"custom"}
    assert len([line for line in lines if line.startswith("trial ")]) == 8
    assert lines[0].startswith("trial 1/8  ok  tokens_per_s 1.6 k  validation_loss") and "(baseline)" in lines[0]
    assert "left" in lines[0] and "left" not in lines[7]
    best = summary["front"][0]
    assert best["command"].startswith("dyno run ") and best["metrics"]["tokens_per_s"] in (800, 1600, 3200)
    assert quick_compose(best["overrides"]).hash == next(
        r["recipe_hash"] for r in records(tmp_path / "results") if r["id"] == best["id"]
    )
    assert best["command"] in lines[-1] and "study.trials=16" in lines[-1]


def test_goes_on_and_then_has_nothing_to_do(tune, tmp_path):
    words = ("workload.batch=range(24,60)", "study.name=again")
    tune(*words, "study.trials=3")
    summary, lines = tune(*words, "study.trials=5")
    assert summary["trials_done"] == 5 and lines[0] == "study again goes on: 3 of 5 trials are done"
    assert len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 5
    summary, lines = tune(*words, "study.trials=5")
    assert len(lines) == 2 and len(hashes(tmp_path)) == 5


def test_failures_and_nan_do_not_end_a_study(tune, tmp_path):
    summary, lines = tune("workload.batch=choice(13,17,19,23,8)", "study.trials=20", "workload.seq=64")
    assert summary["failures"] == {"out_of_memory": 1, "unmeasured": 1, "crashed": 1}
    assert summary["refused"] == {"unsupported": 1}
    assert "exhausted: all of its 5 combinations" in summary["stopped"]
    assert summary["trials_done"] == 5  # the baseline lies outside the space and counts; what the plan refused does not
    text = "\n".join(lines)
    assert "validation_loss was not measured: not finite" in text and "a batch of 13" in text
    assert "trial -/20  unsupported  predicted: a batch of 23" in text
    assert len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 6


def test_all_infeasible_stops(tune, monkeypatch):
    monkeypatch.setattr(session, "MOST_BARREN", 8)
    summary, _ = tune("workload.batch=23", "workload.lr=interval(1e-4,1e-2)", "study.trials=3")
    assert summary["trials_done"] == 0 and "in a row were recipes that cannot run" in summary["stopped"]
    assert summary["front"] == []


def test_constraints_relative_to_the_baseline(tune):
    limit = "study.constraints=['perplexity <= 1.5 * baseline']"
    summary, lines = tune("workload.batch=choice(8,16,32,64)", "sampler=grid", limit, "study.trials=4")
    assert summary["front"] and {entry["metrics"]["perplexity"] for entry in summary["front"]} <= {18.0, 26.0}
    assert any("breaks perplexity <= 1.5 * baseline" in line for line in lines)


def test_a_failed_baseline_is_told_and_its_constraints_left_out(tune):
    limit = "study.constraints=['perplexity <= 1.5 * baseline']"
    summary, lines = tune("workload.batch=choice(8,64)", limit, "study.baseline=['workload.batch=19']")
    assert summary["failures"] == {"crashed": 1} and summary["baseline"]["status"] == "crashed"
    assert any("is not applied: the baseline has no perplexity" in line for line in lines)
    assert len(summary["front"]) == 1


def test_unknown_metric_is_each_trials_reason(tune):
    goal = "study.objectives=[{metric: tokens_per_sec, direction: maximize}]"
    summary, lines = tune("workload.batch=choice(8,32)", goal, "study.trials=2")
    assert summary["failures"] == {"unmeasured": 2}
    assert "did you mean tokens_per_s" in lines[0]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "brute_force", "nsga2", "gp", "qmc"])
def test_every_sampler_covers_a_small_space_once(tune, tmp_path, sampler):
    summary, _ = tune(
        "workload.batch=range(1,4)", "workload.seq=choice(32,64)", f"sampler={sampler}", "study.trials=99"
    )
    assert "exhausted: all of its 6" in summary["stopped"]
    assert len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 6 + 1  # and the baseline, batch 16


def test_grid_goes_in_the_order_written(tune, tmp_path):
    tune("workload.batch=choice(16,8)", "workload.seq=choice(128,32)", "sampler=grid")
    made = [(r["config"]["workload"]["batch"], r["config"]["workload"]["seq"]) for r in records(tmp_path / "results")]
    assert sorted(made) == sorted([(16, 128), (16, 32), (8, 128), (8, 32)])


def test_a_crash_in_this_process_is_one_failed_trial(tune):
    def run(recipe, **kw):
        if recipe.config["workload"]["batch"] == 8:
            raise ZeroDivisionError("a plug-in's footprint")
        return fake_run(recipe, seconds=0.0)

    summary, lines = tune("workload.batch=choice(8,16)", run=run)
    assert summary["failures"] == {"crashed": 1} and any("ZeroDivisionError: a plug-in's" in line for line in lines)


def test_no_space_for_records_ends_the_command_and_leaves_the_study(tune, tmp_path):
    def full(recipe, **kw):
        if len(list((tmp_path / "results" / "runs").iterdir())) >= 2:
            raise UserError("no record can be written")
        return fake_run(recipe, seconds=0.0)

    with pytest.raises(UserError, match="no record can be written"):
        tune("workload.batch=range(30,40)", "study.trials=5", run=full)
    summary, _ = tune("workload.batch=range(30,40)", "study.trials=5")
    assert summary["trials_done"] == 5 and len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 5


def test_ctrl_c_says_how_to_resume_and_loses_nothing(tune, tmp_path):
    seen: list[str] = []

    def run(recipe, **kw):
        seen.append(recipe.hash)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return fake_run(recipe, seconds=0.0)

    words = ("workload.batch=range(24,60)", "study.trials=6")
    with pytest.raises(KeyboardInterrupt) as stop:
        tune(*words, run=run)
    said = str(stop.value)
    assert said.startswith(
        "2 of 6 trials are kept; resume with: dyno tune 'workload.batch=range(24,60)' study.trials=6"
    )
    summary, _ = tune(*words)
    assert summary["trials_done"] == 6
    assert seen[2] in hashes(tmp_path) and len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 6


def test_time_budget(tune):
    summary, _ = tune("workload.batch=range(24,60)", "study.time_budget_s=1e-9")
    assert summary["trials_done"] == 1 and "the time budget of 1e-09 s is spent" in summary["stopped"]


@pytest.mark.parametrize("storage", ["sqlite:///{}/study.db", "{}/elsewhere/own.journal"])
def test_other_storages(tune, tmp_path, storage):
    where = storage.format(tmp_path)
    for trials in (3, 5):
        summary, _ = tune("workload.batch=range(24,60)", f"study.storage='{where}'", f"study.trials={trials}")
        assert summary["trials_done"] == trials and summary["storage"] == where
    assert len(set(hashes(tmp_path))) == len(hashes(tmp_path)) == 5


def test_a_lost_journal_is_made_again_from_the_records(tune, tmp_path):
    words = ("workload.batch=choice(8,16,32)", "sampler=grid", "study.trials=3")
    tune(*words)
    journal = tmp_path / "results" / "studies" / "custom.journal"
    journal.write_text("{no journal\n{at all\n")
    with pytest.raises(UserError, match="damaged"):
        tune(*words)
    journal.unlink()
    summary, lines = tune(*words)
    assert summary["trials_done"] == 3 and len(hashes(tmp_path)) == 3
    assert sum("(record found)" in line for line in lines) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study.trials=0"], "study.trials is 0"),
        (["study.name=a/b"], "it names a file"),
        (["study.no_such=1"], "study has no knob 'no_such'"),
        (["study=no_such"], "study has no option 'no_such'"),
        (["sampler=no_such"], "sampler has no option 'no_such'"),
        (["sampler.name=AutoSampler"], "sampler.name is 'AutoSampler'"),
        (["+sampler.no_such=1"], "sampler TPESampler"),
        (["study.trials=1,2"], "a study cannot be swept"),
        (["attention=math,no_such"], "attention has no option 'no_such'"),
        (["workload.no_such=1,2"], "no knob 'no_such'"),
        (
            ["quantization=none,int8", "quantization.no_such=1,2"],
            "no option of quantization in this study has the knob",
        ),
        (["study.constraints=['x is 3']"], "cannot be read"),
        (["study.workers=none"], "study.workers"),
        (["study=none"], "study=none searches nothing"),
        (["sampler=grid", "workload.lr=interval(1,2)"], "an interval"),
        (["study.storage='nosuch://x'"], "cannot be opened"),
    ],
)
def test_mistakes_are_told_before_any_work(tune, tmp_path, words, said):
    swept = [] if any("," in w.partition("=")[2] for w in words) else ["workload.batch=8,16"]
    with pytest.raises(UserError) as error:
        tune(*swept, *words)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "results").glob("runs/*"))


def test_nothing_to_search(tune):
    with pytest.raises(UserError, match="nothing to search"):
        tune("workload.batch=8")


def test_a_study_keeps_its_space_and_goals(tune):
    tune("workload.batch=choice(8,16)", "study.trials=1")
    with pytest.raises(UserError, match="made with other space: workload.batch was"):
        tune("workload.batch=choice(8,32)", "study.trials=1")
    with pytest.raises(UserError, match=r"made with other overrides.*model=micro.*choose another study.name"):
        tune("workload.batch=choice(8,16)", "model=micro")


def test_knobs_of_a_searched_axis_are_asked_for_where_they_exist(tune, tmp_path):
    words = ("accumulation=none,gradients", "accumulation.micro_batches=range(2,5,2)", "sampler=grid")
    tune(*words)
    made = [
        (r["choices"]["accumulation"], r["config"]["accumulation"].get("micro_batches"))
        for r in records(tmp_path / "results")
    ]
    assert sorted(made, key=str) == [("gradients", 2), ("gradients", 4), ("none", None)]


def test_a_plain_override_fixes_a_key_of_the_study(tune, tmp_path):
    summary, _ = tune("study=quickstart", "attention=math", "workload.batch=8,16", "study.trials=99")
    assert {r["choices"]["attention"] for r in records(tmp_path / "results")} == {"math"}
    assert summary["trials_done"] == 3 * 2
    config = records(tmp_path / "results")[0]["config"]
    assert config["workload"]["steps"] == 30 and config["measure"]["energy"] is False


@pytest.mark.parametrize("gate", [True, False])
def test_a_study_without_the_plan_s_gate_tells_the_runner(tune, tmp_path, gate):
    tune("workload.batch=2,4", "study.trials=2", f"study.plan_gate={str(gate).lower()}")
    assert {r["plan"]["gate"] for r in records(tmp_path / "results")} == {gate}


@pytest.mark.parametrize("gate", [True, False])
def test_a_recipe_that_was_run_against_the_plan_counts(tune, gate):
    """5013 is predicted to run out of memory and does, 5027 is and does not; 13 does unforeseen."""
    words = (
        "workload.batch=choice(13,23,5013,5027,8)",
        "study.trials=20",
        "workload.seq=64",
        f"study.plan_gate={gate}",
    )
    summary, lines = tune(*words)
    text = "\n".join(lines)
    assert "trial -/20  unsupported  predicted: a batch of 23" in text
    if gate:
        assert summary["trials_done"] == 3 and summary["failures"] == {"out_of_memory": 1}
        assert summary["refused"] == {"unsupported": 1, "out_of_memory": 2}
        assert text.count("trial -/20  out_of_memory  predicted: a batch of") == 2
        return
    assert summary["trials_done"] == 5 and summary["failures"] == {"out_of_memory": 2}
    assert summary["refused"] == {"unsupported": 1}
    assert "run without a result: 2 out_of_memory;" in text and "before a run: 1 unsupported; they cost" in text
    assert text.count("trial -/") == 1 and {e["metrics"]["tokens_per_s"] for e in summary["front"]} >= {502700.0}
    assert tune(*words)[0]["trials_done"] == 5  # as the storage tells it again


def test_shipped_studies_read_on_both_devices(monkeypatch):
    from dyno.measure import environment

    monkeypatch.setattr(settings, "compose", quick_compose)
    device = environment.Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), "GPU-1", 1)
    monkeypatch.setattr(environment, "detect", lambda hardware: device)
    read = settings.read(["study=quickstart", "model=160m"], [])
    assert {"precision", "compile", "compile.per_block", "attention", "checkpointing", "workload.batch"} == {
        p.key for p in read.space.parameters
    }
    assert read.space.base.config["measure"]["min_seconds"] > 10 and read.space.base.config["workload"]["seq"] == 1024
    assert read.space.locate(read.recipe([])) is not None
    read = settings.read(["study=memory_limit"], [])
    assert read.space.base.config["measure"]["memory_limit_gib"] == 24 and read.plan_gate
    assert {"precision", "checkpointing", "compile", "workload.batch", "offload"} < {
        p.key for p in read.space.parameters
    }
    read = settings.read(["study=compression"], [])
    assert read.goals.objectives[0].metric == "decode_tokens_per_s"
    for point in read.space.samples():
        read.recipe(read.trial_overrides(point))


def test_sampler_seeds_differ_after_a_resume():
    node = {"name": "RandomSampler", "seed": 0}
    first, resumed = samplers.make(node, 0, 0), samplers.make(node, 5, 0)
    assert first._rng.rng.rand() != resumed._rng.rng.rand()
    assert samplers.make(node, 0, 0)._rng.rng.rand() == samplers.make(node, 0, 0)._rng.rng.rand()


def test_the_parent_needs_no_torch(tmp_path):
    script = Path(__file__).with_name("study_bench.py")
    code = (
        f"import sys, runpy; sys.argv = ['x', 'workload.batch=8,16', 'hardware=cpu', 'results_dir={tmp_path}']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
