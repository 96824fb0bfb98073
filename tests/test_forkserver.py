"""The server that forks workers with torch imported: the same figures as a plain start, and nothing left in it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runner_bench import await_that, is_gone

from dyno import processes, runner
from dyno.forkserver import ForkServer
from dyno.recipe import compose

PROBE = """
import json, os, random, sys
import numpy, torch
drawn = [random.random(), numpy.random.rand(), torch.rand(()).item()]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(37, 123), torch.nn.GELU(), torch.nn.Linear(123, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
losses = []
for _ in range(8):
    loss = torch.nn.functional.cross_entropy(model(torch.randn(13, 37)), torch.randint(5, (13,)))
    loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(loss.item())
rss = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
print(json.dumps({
    "forked": "DYNO_FORKED" in os.environ, "losses": losses, "threads": torch.get_num_threads(), "rss_kib": rss,
    "drawn": drawn, "argv": sys.argv[1:], "rank": os.environ["RANK"],
    "bad_fork": torch.cuda._is_in_bad_fork(),
}))
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """probe(server, **environment) -> what a run of PROBE says."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two spin, and take seconds for steps of this size on a busy machine
    command = [sys.executable, "-m", "probe", "a word"]

    def run(server: ForkServer | None, **environment: str) -> dict:
        lines: list[str] = []
        whole = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        log = tmp_path / "log.txt"
        outcome = processes.run_group(command, 1, whole, log, 100, lines.append, server=server)
        assert outcome.codes == [0], log.read_text()
        return json.loads(lines[-1])

    return run


@pytest.fixture
def server():
    made = ForkServer(("torch", "numpy"))
    yield made
    made.close()


def test_forked_is_as_started_and_the_server_stays_clean(probe, server):
    """The same losses from the same seed, other draws without one, and as much memory."""
    started, *forked = probe(None), probe(server), probe(server)
    assert (started["forked"], [f["forked"] for f in forked]) == (False, [True, True])
    for run in forked:
        assert run["losses"] == started["losses"] and run["threads"] == started["threads"]
        assert run["rss_kib"] == pytest.approx(started["rss_kib"], rel=0.05)
        assert (run["argv"], run["rank"], run["bad_fork"]) == (["a word"], "0", False)
    assert not set(forked[0]["drawn"]) & set(forked[1]["drawn"])
    assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1


def test_an_environment_of_its_own_reaches_what_is_read_at_import(probe, server):
    """As TRITON_INTERPRET and CUDA_VISIBLE_DEVICES: another environment is another server."""
    for threads in (2, 1):
        before = server.process
        run = probe(server, OMP_NUM_THREADS=str(threads))
        assert run["forked"] and run["threads"] == threads
        assert server.process is not before and (before is None or is_gone(before.pid))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """small(server) -> whether a run of a program without imports was forked."""
    (tmp_path / "small.py").write_text("import os; print('DYNO_FORKED' in os.environ)")
    (tmp_path / "threaded.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(server: ForkServer) -> bool:
        lines: list[str] = []
        command = [sys.executable, "-m", "small"]
        outcome = processes.run_group(command, 1, dict(os.environ), tmp_path / "log", 60, lines.append, server=server)
        assert outcome == processes.Outcome([0], None, False)
        return {"True": True, "False": False}[lines[-1]]

    return run


@pytest.mark.parametrize("module", ["no_such_module", "threaded"])
def test_a_server_that_cannot_serve_is_not_asked_again(small, module, monkeypatch):
    server = ForkServer((module,))
    assert not small(server) and server.process is None
    monkeypatch.setattr(server, "_start", lambda *a: pytest.fail("tried again"))
    assert not small(server)


def test_a_dead_server_gives_way_to_plain_starts(small):
    server = ForkServer(())
    assert small(server)
    os.kill(server.process.pid, signal.SIGKILL)
    assert not small(server) and server.process is None


def test_the_server_ends_with_its_runner(tmp_path):
    program = (
        "import os; from dyno.forkserver import ForkServer; server = ForkServer(()); server._start(dict(os.environ), 60);"
        "print(server.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).stdout)
    assert await_that(lambda: is_gone(pid))


def test_forked_from_the_second_run_on(tmp_path, monkeypatch):
    """Whole workers: the second run of a process is forked and measures the same model's loss as the first."""
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(runner, "_earlier_runs", itertools.count())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "model=micro",
        "workload=eval",
        "measure=quick",
        "hardware=cpu",
        "corpus=stories",
        "corpus.size_bytes=60000",
    ]
    words += [f"workload.{size}" for size in ("steps=2", "batch=2", "seq=32", "eval_tokens=512")]
    try:
        made = [runner.run(compose([*words, f"results_dir={tmp_path / name}"])) for name in "ab"]
    finally:
        runner.SERVERS["cpu"].close()
    assert [m["status"] for m in made] == ["ok", "ok"], [m["reason"] for m in made]
    assert [m["environment"]["birth"].split(",")[0] for m in made] == ["started", "forked"]
    assert made[0]["metrics"]["validation_loss"]["value"] == made[1]["metrics"]["validation_loss"]["value"]


@pytest.mark.gpu
def test_forked_workers_have_the_gpu_and_the_server_has_not(tmp_path, monkeypatch):
    (tmp_path / "cuda.py").write_text("import torch; print(torch.ones(7, device='cuda').sum().item())")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server, lines = ForkServer(runner.IMPORTS), []
    try:
        for _ in range(2):
            command = [sys.executable, "-m", "cuda"]
            processes.run_group(command, 1, dict(os.environ), tmp_path / "log", 200, lines.append, server=server)
        assert server.process is not None and lines == ["7.0", "7.0"]
        assert not any("nvidia" in os.readlink(file) for file in Path(f"/proc/{server.process.pid}/fd").iterdir())
    finally:
        server.close()
