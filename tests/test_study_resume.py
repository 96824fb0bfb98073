"""Studies as programs of their own: killed with -9 at any moment, interrupted, spread over several workers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_bench import quick_compose, records
from study_bench import run as fake_run

from dyno import runner, study
from dyno.study import settings, workers
from dyno.study.locks import FileLock
from dyno.study.storage import mend

BENCH = [sys.executable, str(Path(__file__).with_name("study_bench.py"))]
SPACE = "workload.batch=range(24,200)"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    return [SPACE, f"results_dir={tmp_path / 'results'}", "hardware=cpu"]


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*BENCH, *words], env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit it ignored
    )  # fmt: skip


def finish(words: list[str]) -> dict:
    process = start(words)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def check(tmp_path: Path, summary: dict, trials: int) -> None:
    """The trials asked for, every one with a record of its own, no recipe twice, nothing left open."""
    hashes = [r["recipe_hash"] for r in records(tmp_path / "results")]
    assert summary["trials_done"] == trials
    assert len(set(hashes)) == len(hashes) == trials
    import optuna

    journal = tmp_path / "results" / "studies" / "custom.journal"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    trials_told = optuna.load_study(study_name="custom", storage=storage).trials
    assert not [t for t in trials_told if t.state.name in ("RUNNING", "WAITING")]
    told = {t.user_attrs["recipe"]["hash"] for t in trials_told if "result" in t.user_attrs}
    assert told <= set(hashes)
    assert len(set(hashes) - told) <= 1  # the baseline lies outside the space


def test_killed_ten_times_ends_with_the_trials_and_no_duplicate(tmp_path, words):
    """The first kills come while it starts, the rest within its trials."""
    draw, words = random.Random(), [*words, "study.trials=60"]
    runs, kills = tmp_path / "results" / "runs", 0
    while kills < 10:
        before = len(list(runs.glob("2*"))) if runs.exists() else 0
        process = start(words)
        if kills >= 2:  # wait for the first run of this process, then a moment
            while process.poll() is None and len(list(runs.glob("*"))) <= before:
                time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        if process.poll() is not None:
            pytest.fail(f"ended after {kills} kills: {process.communicate()[1]}")
        process.kill()
        process.communicate()
        kills += 1
    check(tmp_path, finish(words), 60)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_round_a_publication(tmp_path, words, moment):
    """Before it the recipe is run again; after it the record is found, and not run again."""
    words = [*words, "study.trials=5"]
    process = start(words, DIE_AT=moment)
    process.communicate(timeout=150)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "results" / "runs").glob("2*"))) == (2 if moment == "before" else 3)
    process = start(words)
    out, err = process.communicate(timeout=150)
    assert "1 broken-off trial found: queued again" in err
    assert ("(record found)" in err) == (moment == "after")
    check(tmp_path, json.loads(out.splitlines()[-1]), 5)


def test_ctrl_c_of_the_program(tmp_path, words):
    words = [*words, "study.trials=400"]
    process = start(words)
    runs = tmp_path / "results" / "runs"
    while not runs.exists() or len(list(runs.glob("2*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "resume with: dyno tune" in err and "Traceback" not in err
    done = len(list(runs.glob("2*")))
    check(tmp_path, finish([*words[:-1], f"study.trials={done + 2}"]), done + 2)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are none: each worker is the stand-in's."""
    monkeypatch.setattr(workers, "COMMAND", [*BENCH, "--worker"])
    monkeypatch.setattr(workers, "count", lambda settings, asked: 2)
    monkeypatch.setattr(workers, "gpu_masks", lambda number: ["a", "b"][:number])


def test_several_workers_share_a_study(tmp_path, words, several):
    said: list[str] = []
    summary = study.tune([*words, "study.trials=12"], [], lambda text: None, say=said.append)
    check(tmp_path, summary, 12)
    numbers = [line.split()[1] for line in said if line.startswith("trial ")]
    assert len(numbers) == 12 and summary["stopped"] == "done"


def test_a_lost_worker_is_replaced(tmp_path, words, several, monkeypatch):
    monkeypatch.setenv("DIE_AT", "before")  # every worker is killed in its third run
    said: list[str] = []
    summary = study.tune([*words, "study.trials=8"], [], lambda text: None, say=said.append)
    check(tmp_path, summary, 8)
    assert any("a worker was lost" in line for line in said)


def test_a_workers_mistake_reaches_the_user(tmp_path, words, several, monkeypatch):
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", 'print(\'noise\\n{"end": "error: no room"}\')'])
    with pytest.raises(settings.UserError, match="no room"):
        study.tune([*words, "study.trials=8"], [], lambda text: None, say=lambda text: None)


def test_another_living_worker_is_left_alone(tmp_path, words, monkeypatch):
    """A second command on a study whose trial another process is at neither fails that trial nor runs its recipe."""
    words = [*words, "study.trials=3"]
    monkeypatch.setattr(settings, "compose", quick_compose)
    inner: list[dict] = []

    def run(recipe, **kw):
        if len(list((tmp_path / "results" / "runs").glob("2*"))) == 1 and not inner:
            inner.append(finish([*words[:-1], "study.trials=2"]))  # while this trial runs
        return fake_run(recipe, seconds=0.0)

    monkeypatch.setattr(runner, "run", run)
    summary = study.tune(words, [], lambda text: None, say=lambda text: None)
    assert inner[0]["stopped"] == "other workers are at the last trials" and inner[0]["trials_done"] == 1
    check(tmp_path, summary, 3)


@pytest.mark.parametrize("tail", [b"", b'{"op_code":', b"x" * 200_000])
def test_mend_cuts_an_unfinished_line(tmp_path, tail):
    path = tmp_path / "a.journal"
    path.write_bytes(b'{"a":1}\n{"b":2}\n' + tail)
    mend(path)
    assert path.read_bytes() == b'{"a":1}\n{"b":2}\n'
    path.write_bytes(tail)
    mend(path)
    assert path.read_bytes() == b""
    mend(tmp_path / "none")


def test_file_lock_excludes_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    code = f"""
import time
from dyno.study.locks import FileLock
lock = FileLock({str(path)!r})
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    lock = FileLock(path)
    assert not lock.acquire(wait=False)
    holder.kill()
    holder.communicate()
    assert lock.acquire(wait=False)
    assert not FileLock(path).acquire(wait=False)
    lock.release()
    assert FileLock(path).acquire(wait=False)
