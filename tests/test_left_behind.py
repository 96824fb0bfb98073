"""No process outlives its run, wherever it hid and whoever was killed; and none but the run's is touched."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from runner_bench import PRELUDE, await_that, is_gone, run

from dyno import keeper, processes, record, runner


def test_a_forked_worker_was_forked(recipe, worker, request):
    worker("done(details={'forked': 'DYNO_FORKED' in os.environ, 'stdin': os.readlink('/proc/self/fd/0')})")
    details = run(recipe)["details"]
    assert details == {"forked": "forked" in request.node.name.split("[")[1], "stdin": "/dev/null"}


@pytest.mark.parametrize(
    ("end", "status"),
    [("done()", "ok"), ("time.sleep(60)", "timeout"), ("os.kill(os.getpid(), signal.SIGKILL)", "crashed")],
)
def test_what_escaped_dies_with_the_run(recipe, worker, end, status):
    worker(f"print(escape(), escape(), flush=True); {end}")
    recipe.config["measure"]["time_limit_s"] = 4
    lines: list[str] = []
    assert run(recipe, progress=lines.append)["status"] == status
    pids = [int(pid) for pid in lines[0].split()]
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)


def test_a_run_ends_no_process_of_another_or_of_the_runner(recipe, worker, tmp_path):
    """Two runs of one process at a time, and a child and an orphan of its own: each keeper kills what is its run's."""
    worker("print(escape(), flush=True); time.sleep(60)")
    lines: list[str] = []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command, server = [*runner.WORKER, str(tmp_path)], runner.SERVERS["cpu"]
    longer = threading.Thread(
        target=processes.run_group, args=(command, 1, environment, tmp_path / "log", 4, lines.append),
        kwargs={"server": server},
    )  # fmt: skip
    longer.start()
    assert await_that(lambda: len(lines) == 1)
    child = subprocess.Popen(["sleep", "60"])
    orphan = int(subprocess.run(["sh", "-c", "sleep 60 >&- & echo $!"], stdout=subprocess.PIPE, check=True).stdout)
    processes.run_group(command, 1, environment, tmp_path / "other", 1, lines.append, server=server)
    assert is_gone(int(lines[1])) and not any(is_gone(pid) for pid in (int(lines[0]), child.pid, orphan))
    longer.join()
    assert is_gone(int(lines[0])) and not is_gone(child.pid) and not is_gone(orphan)
    os.kill(orphan, signal.SIGKILL)
    os.waitpid(orphan, 0)
    child.kill()
    child.wait()


def test_killed_keeper_takes_its_ranks_along(recipe, worker):
    worker("""
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # as die_with_parent
        print(os.getpid(), flush=True)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    """)
    lines: list[str] = []
    out = runner.run(recipe, progress=lines.append)
    assert out["status"] == "crashed" and "ended by SIGKILL" in out["reason"]
    assert os.waitpid(int(lines[0]), 0)[1] == signal.SIGKILL  # ours now: this process is a subreaper in these tests


@pytest.fixture
def doomed(recipe, tmp_path):
    """doomed(body) -> a runner as a process of its own, with a worker of this program, and the worker's first line."""
    script, parent = tmp_path / "fake_worker.py", tmp_path / "parent.py"
    parent.write_text(
        "import json, sys\nfrom dyno import runner\nfrom dyno.recipe import Recipe\n"
        f"runner.WORKER = [sys.executable, '-S', {str(script)!r}]\n"
        f"recipe = Recipe.from_json(json.loads({json.dumps(recipe.to_json())!r}))\n"
        "runner.run(recipe, progress=lambda text: print(text, flush=True))\n"
    )

    def start(body: str) -> tuple[subprocess.Popen[str], list[int]]:
        script.write_text(PRELUDE + body)
        process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, [int(pid) for pid in process.stdout.readline().split()]

    return start


def test_killed_runner_takes_its_run_along(tmp_path, doomed):
    """The runner dies by -9 and can clean nothing: its keeper kills what the run started, its directory goes later."""
    process, pids = doomed("print(os.getpid(), escape(), flush=True); time.sleep(60)")
    assert len(pids) == 2 and not any(is_gone(pid) for pid in pids)
    left = next((tmp_path / "results" / "runs").iterdir())
    os.utime(left, (0, 0))
    assert runner.clean_leftovers(tmp_path / "results") == 0  # it lives
    process.kill()
    process.communicate()
    assert await_that(lambda: all(is_gone(pid) for pid in pids))

    assert left.name.startswith(".running-") and record.find(tmp_path / "results") == []
    os.utime(left)
    assert runner.clean_leftovers(tmp_path / "results") == 0  # it may be starting
    os.utime(left, (0, 0))
    assert await_that(lambda: not processes.is_held(left / "log.txt"))
    assert runner.clean_leftovers(tmp_path / "results") == 1 and not left.exists()


def test_killed_runner_holds_its_device_until_its_run_is_gone(tmp_path, doomed):
    process, (kept,) = doomed("print(os.getppid(), flush=True); time.sleep(60)")
    os.kill(kept, signal.SIGSTOP)
    process.kill()
    process.communicate()
    (path,) = (tmp_path / "home" / "locks").iterdir()
    with path.open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(kept, signal.SIGCONT)
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_worker_born_after_its_runner_died_ends_at_once():
    code = "from dyno.processes import die_with_parent; die_with_parent(); print('alive')"
    gone = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, keeper.PARENT: "999999999"}, capture_output=True
    )
    assert (gone.returncode, gone.stdout) == (1, b"")
