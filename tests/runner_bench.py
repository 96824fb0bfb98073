"""Runs whose worker is a few lines of a test: fixtures, and what holds after every run."""

from __future__ import annotations

import itertools
import json
import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dyno import keeper, record, runner
from dyno.forkserver import ForkServer
from dyno.recipe import Recipe, compose

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def done(status="ok", name="result.json", **more):
    (directory / name).write_text(json.dumps({"status": status, **more}))
def escape():  # a process of another session, with no parent in the run and no environment; its pid
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.write(writer, str(os.getpid()).encode())
            os.execve("/bin/sleep", ["sleep", "60"], {})
        os._exit(0)
    os.wait()
    return int(os.read(reader, 20))
"""


EARLIER: set[int] = set()


@pytest.fixture(scope="module")
def composed() -> dict:
    return compose(["hardware=cpu", "workload=data"]).to_json()


@pytest.fixture
def recipe(composed: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    made = Recipe.from_json(json.loads(json.dumps(composed)))
    made.config["results_dir"] = str(tmp_path / "results")
    made.config["measure"]["time_limit_s"] = 20
    return made


@pytest.fixture(params=["started", "forked"])
def worker(request, subreaper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make the given lines the worker's program: no torch, a start of milliseconds. Forked by a server of its own, too."""
    script, forked = tmp_path / "fake_worker.py", request.param == "forked"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(runner, "SERVERS", dict.fromkeys(("cpu", "cuda"), ForkServer(())))
    monkeypatch.setattr(runner, "_earlier_runs", itertools.repeat(int(forked)))

    def use(body: str) -> None:
        script.write_text(PRELUDE + textwrap.dedent(body))
        command = ["-m", "fake_worker"] if forked else ["-S", str(script)]
        monkeypatch.setattr(runner, "WORKER", [sys.executable, *command])

    yield use
    runner.SERVERS["cpu"].close()


@pytest.fixture
def subreaper():
    """Whatever escapes a keeper becomes a child of this process; children of earlier tests do not count."""
    EARLIER.update(keeper.children(os.getpid()))
    keeper.prctl(keeper.PR_SET_CHILD_SUBREAPER, 1)
    yield
    keeper.prctl(keeper.PR_SET_CHILD_SUBREAPER, 0)


def left_behind() -> list[int]:
    """Children of this process besides the fork server, and the server's."""
    server = runner.SERVERS["cpu"].process
    found = [pid for pid in keeper.children(os.getpid()) if pid not in EARLIER]
    return found if server is None else [p for p in [*found, *keeper.children(server.pid)] if p != server.pid]


def await_that(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def run(recipe: Recipe, **more) -> dict:
    """Run, then check what holds after every run."""
    out = runner.run(recipe, **more)
    assert await_that(lambda: left_behind() == [])  # a forked keeper tells of its end a moment before it
    runs = Path(recipe.config["results_dir"]) / "runs"
    assert [p.name for p in runs.iterdir()] == [out["id"]]
    read = record.read_records(runs.parent)[0]
    assert (read["status"], read["reason"]) == (out["status"], out["reason"])
    assert not (runs / out["id"] / "request.json").exists()
    assert (runs / out["id"] / "recipe.yaml").is_file()
    return read
