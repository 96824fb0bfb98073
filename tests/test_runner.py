"""Whatever a worker does, the runner leaves one typed record, no process and no half directory."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from runner_bench import is_gone, run

from dyno import processes, record, runner
from dyno.errors import UserError
from dyno.plan import Plan
from dyno.recipe import Recipe


def two_ranks(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "world_size", 2)


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
    outcome = processes.run_group(command, 1, {}, Path("/dev/full"), 10, lines.append)
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
    assert is_gone(pids[0])
    assert list((tmp_path / "results" / "runs").iterdir()) == []


def test_results_dir_that_is_a_file(recipe, tmp_path):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(UserError, match="results_dir=.* cannot be used"):
        runner.run(recipe)


def test_describe_names_signals():
    assert "SIGKILL" in runner.describe(-signal.SIGKILL, 0, 1) and "memory" in runner.describe(-9, 0, 1)
    assert runner.describe(7, 2, 4) == "rank 2 of 4 ended with code 7"


@pytest.mark.parametrize("status", ["out_of_memory", "unsupported"])
def test_without_a_gate_what_may_not_fit_is_tried_and_what_cannot_run_is_not(recipe, worker, monkeypatch, status):
    worker("done()")
    monkeypatch.setattr(Plan, "verdict", lambda self: (status, "predicted"))
    assert runner.run(recipe)["status"] == status
    assert runner.run(recipe, gate=False)["status"] == ("ok" if status == "out_of_memory" else status)
