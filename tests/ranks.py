"""Several ranks for a test: one process imports torch, then forks them; gloo over a file; a hard limit for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def fork(count: int, work: Callable[[int], None], directory: Path, limit_s: float) -> None:
    """Run work(rank) in `count` forked ranks of one process group; raise when one fails or the limit strikes."""
    meeting = directory / f"rendezvous-{time.monotonic_ns()}"
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                store = torch.distributed.FileStore(str(meeting), count)
                torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
                work(rank)
                torch.distributed.destroy_process_group()
                code = 0
            except BaseException:  # noqa: BLE001  whatever it is, the parent hears of it by the code
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    deadline, left = time.monotonic() + limit_s, set(children)
    failed = False
    while left and not failed and time.monotonic() < deadline:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                failed = failed or status != 0
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if failed or left:
        raise RuntimeError("a rank failed" if failed else f"the ranks took more than {limit_s} s")


def run_program(file: str, directory: Path, limit_s: float) -> None:
    """Run a test file as a program in its own session; its whole output is the assertion's message when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = directory / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, file, str(directory)], env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, log.read_text()[-6000:]


def ranks_of(directory: Path) -> dict[str, int]:
    """RANK -> process id of a run's workers, which were started and not forked."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(
                line.split(b"=", 1) for line in (entry / "environ").read_bytes().split(b"\0") if b"=" in line
            )
        except OSError:
            continue  # ended meanwhile
        if str(directory).encode() in words and b"RANK" in environment:
            found[environment[b"RANK"].decode()] = int(entry.name)
    return found
