"""Machines that share a study's database but no disk: what one of them leaves when it is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from study_bench import quick_compose
from study_bench import run as fake_run

from dyno import runner, study
from dyno.study import settings, storage

SPACE = "workload.batch=range(24,200)"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(settings, "compose", quick_compose)
    monkeypatch.setattr(runner, "run", lambda recipe, **kw: fake_run(recipe, seconds=0.0))
    return [SPACE, "hardware=cpu", f"study.storage='sqlite:///{tmp_path}/study.db'", "study.trials=4"]


def trials(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="custom", storage=f"sqlite:///{tmp_path}/study.db").trials


def test_a_trial_lost_with_another_machine_is_run_again_once_it_was_silent(tmp_path, words, monkeypatch):
    there = tmp_path / "there"
    bench = [sys.executable, str(Path(__file__).with_name("study_bench.py")), *words, f"results_dir={there}"]
    lost = subprocess.run(
        bench, env={**os.environ, "MACHINE": "another", "DIE_AT": "before"}, stderr=subprocess.PIPE, check=False
    )
    assert lost.returncode == -signal.SIGKILL, lost.stderr
    shutil.rmtree(there)  # its disk was never ours
    (open_trial,) = [t for t in trials(tmp_path) if t.state.name == "RUNNING"]
    assert open_trial.user_attrs["owner"]["machine"] == "another"

    said: list[str] = []
    here = [*words, f"results_dir={tmp_path / 'here'}"]
    summary = study.tune(here, [], lambda text: None, say=said.append)
    assert summary["stopped"] == "other workers are at the last trials" and summary["trials_done"] == 3
    assert not any("broken-off" in line for line in said)

    monkeypatch.setattr(storage, "SILENT_S", 1)
    time.sleep(2.1)  # the database tells whole seconds
    summary = study.tune(here, [], lambda text: None, say=said.append)
    assert summary["stopped"] == "done" and summary["trials_done"] == 4
    assert "1 broken-off trial found: queued again" in said
    told = [t for t in trials(tmp_path) if t.number != open_trial.number]
    assert all(t.state.is_finished() for t in told)
    assert open_trial.params in [t.params for t in told if "result" in t.user_attrs]


def test_a_living_trial_keeps_its_place(tmp_path, words, monkeypatch):
    """It runs for longer than the silence that is allowed, and renews its sign of life meanwhile."""
    monkeypatch.setattr(storage, "HEARTBEAT_S", 1)
    monkeypatch.setattr(storage, "SILENT_S", 2)
    looked: list[int] = []

    def run(recipe, **kw):
        if trials(tmp_path) and not looked:
            time.sleep(4)
            other = optuna.load_study(study_name="custom", storage=settings.Place("", where, None, tmp_path).open())
            optuna.storages.fail_stale_trials(other)
            looked.append(sum(t.state.name == "RUNNING" for t in other.trials))
        return fake_run(recipe, seconds=0.0)

    where = f"sqlite:///{tmp_path}/study.db"
    monkeypatch.setattr(runner, "run", run)
    summary = study.tune([*words, f"results_dir={tmp_path / 'here'}"], [], lambda text: None, say=lambda text: None)
    assert summary["trials_done"] == 4 and looked == [1]


def test_a_worker_that_was_taken_for_dead_goes_on(tmp_path, words, monkeypatch):
    taken: list[int] = []

    def run(recipe, **kw):
        running = [t.number for t in trials(tmp_path) if t.state.name == "RUNNING"]
        if running and not taken:
            other = optuna.load_study(study_name="custom", storage=f"sqlite:///{tmp_path}/study.db")
            other.tell(running[0], state=optuna.trial.TrialState.FAIL)
            taken.append(running[0])
        return fake_run(recipe, seconds=0.0)

    monkeypatch.setattr(runner, "run", run)
    said: list[str] = []
    summary = study.tune([*words, f"results_dir={tmp_path / 'here'}"], [], lambda text: None, say=said.append)
    assert summary["trials_done"] == 4 and any("taken for broken off" in line for line in said)
    assert all(t.state.is_finished() for t in trials(tmp_path))
    # the recipe was queued again, and its record found
    assert sum("(record found)" in line for line in said) == 1
