"""Studies as programs: kill -9 at any moment, a journal cut mid-way, two processes on one study."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_bench import records

from dyno.study.storage import mend

BENCH = Path(__file__).with_name("study_bench.py")
KILLS, TRIALS = 10, 40


def start(results: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCH), "hardware=cpu", f"results_dir={results}", *words]
    environment = {**os.environ, "DYNO_HOME": str(results.parent / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    return json.loads(out)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def each_recipe_once(results: Path, count: int) -> None:
    made = [r["recipe_hash"] for r in records(results)]
    assert len(made) == len(set(made)) == count


@pytest.mark.timeout(150)
def test_killed_ten_times(tmp_path):
    results, chance = tmp_path / "results", random.Random(7)
    journal = results / "studies" / "custom.journal"
    words = ("workload.batch=range(24,600)", f"study.trials={TRIALS}")
    for _ in range(KILLS):
        before, process = size(journal), start(results, *words)
        while size(journal) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.communicate()
        assert process.returncode == -9
    assert 0 < len(records(results)) < TRIALS
    assert finish(start(results, *words))["trials_done"] == TRIALS
    each_recipe_once(results, TRIALS)


@pytest.mark.timeout(120)
def test_a_cut_last_line_is_mended_and_the_study_goes_on(tmp_path):
    results = tmp_path / "results"
    words = ("workload.batch=range(24,60)",)
    finish(start(results, *words, "study.trials=3"))
    journal = results / "studies" / "custom.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: -len(whole.splitlines()[-1]) // 2])
    summary = finish(start(results, *words, "study.trials=5"))
    assert summary["trials_done"] == 5
    each_recipe_once(results, 5)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b"', b'{"a": 1}\n'),
        (b'{"a"', b""),
        (b'{"a": 1}\n' + b"x" * 200_000, b'{"a": 1}\n'),
    ],
)
def test_mend(tmp_path, data, kept):
    path = tmp_path / "journal"
    path.write_bytes(data)
    mend(path)
    assert path.read_bytes() == kept


@pytest.mark.timeout(120)
def test_two_processes_share_a_study_and_run_no_recipe_twice(tmp_path):
    results = tmp_path / "results"
    words = ("workload.batch=range(24,60)", "study.trials=12")
    both = [start(results, *words), start(results, *words)]
    done = [finish(process)["trials_done"] for process in both]
    assert max(done) == 12
    each_recipe_once(results, 12)
