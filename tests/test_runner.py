"""Whatever a worker does, the runner leaves one typed record, no process and no half directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dyno import processes, record, runner
from dyno.errors import UserError
from dyno.recipe import Recipe, compose

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def done(status="ok", name="result.json", **more):
    (directory / name).write_text(json.dumps({"status": status, **more}))
"""


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


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make the given lines the worker's program: no torch, a start of milliseconds."""

    def use(body: str) -> None:
        script = tmp_path / "fake_worker.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        monkeypatch.setattr(runner, "WORKER", [sys.executable, "-S", str(script)])

    return use


def two_ranks(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "world_size", lambda _: 2)


def run(recipe: Recipe) -> dict:
    """Run, then check what holds after every run."""
    out = runner.run(recipe)
    assert processes.members(out["id"]) == []
    runs = Path(recipe.config["results_dir"]) / "runs"
    assert [p.name for p in runs.iterdir()] == [out["id"]]
    read = record.read_records(runs.parent)[0]
    assert (read["status"], read["reason"]) == (out["status"], out["reason"])
    assert not (runs / out["id"] / "request.json").exists()
    assert (runs / out["id"] / "recipe.yaml").is_file()
    return read


def test_good_worker(recipe, worker):
    worker('print("step 1", flush=True); done(metrics={"x": {"value": 1.5, "unit": "s", "count": 1}})')
    lines: list[str] = []
    out = runner.run(recipe, progress=lines.append)
    assert out["status"] == "ok" and out["metrics"]["x"]["value"] == 1.5
    assert lines == ["step 1"]
    assert (Path(out["_path"]) / "log.txt").read_text() == "step 1\n"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed", "ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "ended by SIGSEGV"),
        ("pass", "crashed", "left no result"),
        ("print('the last words', file=sys.stderr); sys.exit(3)", "crashed", "ended with code 3: the last words"),
        ("done(); sys.exit(3)", "crashed", "ended with code 3"),
        ("(directory / 'result.json').write_text('{\"status\": \"ok')", "crashed", "left no result"),
        ("(directory / 'result.json').write_bytes(b'{\"status\": \"\\xc3')", "crashed", "left no result"),
        ("done('splendid')", "crashed", "left no result"),
        ("done('non_finite', reason='the loss is nan')", "non_finite", "the loss is nan"),
        ("done('out_of_memory', reason='at a step')", "out_of_memory", "at a step"),
    ],
)
def test_bad_ends(recipe, worker, body, status, reason):
    worker(body)
    out = run(recipe)
    assert out["status"] == status and reason in out["reason"]


def test_nan_in_a_result_becomes_empty(recipe, worker):
    worker('done(metrics={"x": {"value": float("nan"), "unit": "s", "count": 1}})')
    out = run(recipe)
    assert out["status"] == "ok" and out["metrics"]["x"]["value"] is None


def test_hanging_worker_is_killed_at_the_limit(recipe, worker):
    worker("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    recipe.config["measure"]["time_limit_s"] = 0.5
    started = time.monotonic()
    out = run(recipe)
    assert out["status"] == "timeout" and "time_limit_s=0.5" in out["reason"]
    assert time.monotonic() - started < 10


def test_children_in_other_sessions_die_with_the_run(recipe, worker):
    worker("""
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        grandchild = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
        subprocess.run([sys.executable, "-S", "-c", grandchild])
        done(details={"child": child.pid})
    """)
    out = run(recipe)  # run() looks for members
    assert out["status"] == "ok"
    assert not Path(f"/proc/{out['details']['child']}/cmdline").exists() or not (
        Path(f"/proc/{out['details']['child']}/cmdline").read_bytes()
    )


def test_full_disk(recipe, worker):
    worker("""
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        (directory / "samples.npz").write_bytes(bytes(100_000))
    """)
    out = run(recipe)
    assert out["status"] == "crashed" and "OSError" in out["reason"]


def test_full_disk_of_the_runner_costs_the_samples_not_the_record(recipe, worker, monkeypatch):
    worker("(directory / 'samples.npz').write_bytes(bytes(1000)); (directory / 'deep').mkdir(); print(1); done()")
    write = record.write_json

    def full(path: Path, value: object) -> None:
        if (path.parent / "samples.npz").exists() or (path.parent / "deep").exists():
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(record, "write_json", full)
    out = runner.run(recipe)
    assert out["status"] == "ok" and [p.name for p in Path(out["_path"]).iterdir()] == ["record.json"]

    def fuller(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_json", fuller)
    with pytest.raises(UserError, match="no record can be written .* No space left"):
        runner.run(recipe)
    assert len(list((Path(recipe.config["results_dir"]) / "runs").iterdir())) == 1


def test_log_that_cannot_grow_is_no_reason_to_fail(tmp_path):
    """/dev/full refuses every byte: the worker's lines are lost, its progress and end are not."""
    lines: list[str] = []
    command = [sys.executable, "-S", "-c", "print('hello')"]
    outcome = processes.run_group([command], [{}], "full-log", Path("/dev/full"), 10, lines.append)
    assert outcome.codes == [0] and lines == ["hello"]


def test_worker_that_cannot_start(recipe, monkeypatch):
    monkeypatch.setattr(runner, "WORKER", ["/nonexistent/python"])
    out = run(recipe)
    assert out["status"] == "crashed" and "could not be started" in out["reason"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        # the rank that began is named, not the one that the runner killed
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)", "crashed", "rank 1 of 2 was ended by"),
        ("time.sleep(60) if rank else sys.exit(3)", "crashed", "rank 0 of 2 ended with code 3"),
        # a rank that knows the reason outranks one whose collective broke because of it, or that hangs
        ("""
         if rank:
             done('out_of_memory', 'result-rank1.json', reason='rank 1 is full')
         else:
             time.sleep(0.3); done('crashed', reason='connection closed by peer')
         """, "out_of_memory", "rank 1 is full"),
        ("""
         if rank:
             done('non_finite', 'result-rank1.json', reason='rank 1 diverged')
         else:
             time.sleep(60)
         """, "non_finite", "rank 1 diverged"),
        # a rank killed from outside is the reason, not the broken connection that it left
        ("""
         if rank:
             os.kill(os.getpid(), signal.SIGKILL)
         done('crashed', reason='connection closed by peer'); time.sleep(60)
         """, "crashed", "rank 1 of 2 was ended by SIGKILL"),
    ],
)  # fmt: skip
def test_two_ranks(recipe, worker, monkeypatch, body, status, reason):
    worker(body)
    two_ranks(recipe, monkeypatch)
    recipe.config["measure"]["time_limit_s"] = 1.5
    out = run(recipe)
    assert out["status"] == status and reason in out["reason"]


def test_good_ranks_are_one_record(recipe, worker, monkeypatch):
    worker("done(ranks=[{'world': os.environ['WORLD_SIZE']}]) if rank == 0 else None")
    two_ranks(recipe, monkeypatch)
    assert run(recipe)["ranks"] == [{"world": "2"}]


def test_failures_leave_siblings_alone(recipe, worker):
    worker("done()")
    first = Path(runner.run(recipe)["_path"]) / "record.json"
    before = first.read_bytes()
    worker("os.kill(os.getpid(), signal.SIGKILL)")
    runner.run(recipe)
    assert first.read_bytes() == before
    assert sorted(r["status"] for r in record.read_records(recipe.config["results_dir"])) == ["crashed", "ok"]


def test_refused_by_the_plan_costs_no_worker(recipe, worker, monkeypatch):
    from dyno import plan

    worker("done()")
    monkeypatch.setattr(runner, "work", lambda *a: pytest.fail("a worker was started"))
    monkeypatch.setattr(plan.Plan, "verdict", lambda self: ("unsupported", "no such unit here"))
    out = run(recipe)
    assert (out["status"], out["reason"]) == ("unsupported", "no such unit here")


def test_interrupt_kills_the_worker_and_leaves_nothing(recipe, worker, tmp_path):
    worker("print(os.getpid(), flush=True); time.sleep(60)")
    pids: list[int] = []

    def interrupted(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(recipe, progress=interrupted)
    assert not Path(f"/proc/{pids[0]}").exists()
    assert list((tmp_path / "results" / "runs").iterdir()) == []


def test_killed_runner_takes_its_worker_along(recipe, tmp_path):
    """The runner dies by -9 and can clean nothing: the kernel kills the worker, its directory goes later."""
    script = tmp_path / "fake_worker.py"
    script.write_text(
        "import os, time\nfrom dyno.processes import die_with_parent\n"
        "die_with_parent()\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import json, sys\nfrom dyno import runner\nfrom dyno.recipe import Recipe\n"
        f"runner.WORKER = [sys.executable, {str(script)!r}]\n"
        f"recipe = Recipe.from_json(json.loads({json.dumps(recipe.to_json())!r}))\n"
        "runner.run(recipe, progress=lambda text: print(text, flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()

    left = next((tmp_path / "results" / "runs").iterdir())
    assert left.name.startswith(".running-") and record.find(tmp_path / "results") == []
    assert runner.clean_leftovers(tmp_path / "results") == 0  # it may be starting
    os.utime(left, (0, 0))
    assert runner.clean_leftovers(tmp_path / "results") == 1 and not left.exists()


def test_worker_born_after_its_runner_died_ends_at_once():
    code = "from dyno.processes import die_with_parent; die_with_parent(); print('alive')"
    gone = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, processes.RUNNER: "999999999"}, capture_output=True
    )
    assert (gone.returncode, gone.stdout) == (1, b"")


def test_one_measurement_at_a_time(recipe, worker):
    """Two runs at once on one device: the second waits, and neither sees the other's worker."""
    worker("""
        mark = directory.parent.parent / "busy"
        mark.touch(exist_ok=False)
        time.sleep(0.3)
        mark.unlink()
        done()
    """)
    told: list[str] = []
    runs = [threading.Thread(target=runner.run, args=(recipe,), kwargs={"progress": told.append}) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert [r["status"] for r in record.read_records(recipe.config["results_dir"])] == ["ok", "ok"]
    assert sum("waiting" in text for text in told) == 1


def test_results_dir_that_is_a_file(recipe, tmp_path):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(UserError, match="results_dir=.* cannot be used"):
        runner.run(recipe)


def test_describe_names_signals():
    assert "SIGKILL" in runner.describe(-signal.SIGKILL, 0, 1) and "memory" in runner.describe(-9, 0, 1)
    assert runner.describe(7, 2, 4) == "rank 2 of 4 ended with code 7"
