"""Worker processes: started together, waited for without spinning, and never left behind.

Linux only where it must be (parent-death signal, pidfd, /proc). Every process of a run inherits DYNO_RUN_ID, so that
even a child that left the process group is found and killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

RUN_ID = "DYNO_RUN_ID"
RUNNER = "DYNO_RUNNER_PID"
PR_SET_PDEATHSIG = 1
PROGRESS_BYTES = 65536


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux prctl); does nothing elsewhere.

    `parent` is the pid of whoever started it; a worker finds its runner's in the environment.
    """
    # The runner tells its pid: getppid() alone cannot show that it ended while this interpreter started.
    parent = parent or int(os.environ.pop(RUNNER, os.getppid()))
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request was in place
        os._exit(1)


@dataclass
class Outcome:
    """How a group of processes ended: return codes by rank, the rank that failed first, and whether the limit struck.

    A rank that was killed because another one failed has a code too, so only `first` tells who began.
    """

    codes: list[int | None] = field(default_factory=list)
    first: int | None = None
    timed_out: bool = False


def run_group(
    commands: list[list[str]],
    environments: list[dict[str, str]],
    run_id: str,
    log: Path,
    time_limit_s: float,
    progress: Callable[[str], None],
) -> Outcome:
    """Run one process a rank until all end, one fails, or the limit strikes; then nothing of them is left alive.

    Rank 0's stdout lines are progress; everything else goes to `log`.
    """
    deadline = time.monotonic() + time_limit_s
    processes: list[subprocess.Popen[bytes]] = []
    outcome = Outcome()
    with log.open("ab", buffering=0) as sink:
        try:
            for rank, (command, extra) in enumerate(zip(commands, environments, strict=True)):
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else sink,
                        stderr=sink,
                        env={**os.environ, **extra, RUN_ID: run_id, RUNNER: str(os.getpid())},
                        start_new_session=True,
                    )
                )
            outcome.timed_out, outcome.first = _wait(processes, deadline, progress, sink)
        finally:
            for process in processes:
                _kill_group(process.pid)
            reap(run_id)
            for process in processes:
                process.wait()
                if process.stdout:
                    process.stdout.close()
    outcome.codes = [p.returncode for p in processes]
    return outcome


def _wait(
    processes: list[subprocess.Popen[bytes]], deadline: float, progress: Callable[[str], None], sink: IO[bytes]
) -> tuple[bool, int | None]:
    """Sleep until the processes end or one of them fails: (whether the deadline came first, the rank that failed)."""
    pipe = processes[0].stdout
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    poller, handles = select.poll(), {}
    poller.register(pipe.fileno(), select.POLLIN)
    for process in processes:
        handle = os.pidfd_open(process.pid)
        handles[handle] = process
        poller.register(handle, select.POLLIN)
    rest = b""
    failed: int | None = None
    try:
        while handles and failed is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return True, None
            for handle, event in poller.poll(min(left, 3600.0) * 1000):
                if handle == pipe.fileno():
                    rest = _relay(pipe, rest, progress, sink)
                    if event & select.POLLHUP and not event & select.POLLIN:
                        poller.unregister(pipe.fileno())
                    continue
                process = handles.pop(handle)
                poller.unregister(handle)
                os.close(handle)
                if process.wait() != 0 and failed is None:
                    failed = processes.index(process)
        return False, failed
    finally:
        for handle in handles:
            os.close(handle)
        _relay(pipe, rest, progress, sink)


def _relay(pipe: IO[bytes], rest: bytes, progress: Callable[[str], None], sink: IO[bytes]) -> bytes:
    """Hand whole lines on; a line that nobody finishes is cut, so that a noisy worker cannot fill the memory."""
    data = pipe.read(PROGRESS_BYTES) or b""
    *lines, rest = (rest + data).split(b"\n")
    for line in lines:
        with contextlib.suppress(OSError):  # a full disk costs the log, not the record
            sink.write(line + b"\n")
        progress(line.decode(errors="replace"))
    return rest[-PROGRESS_BYTES:]


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def members(run_id: str) -> list[int]:
    """Process ids, of any session or parent, that carry a run's id in their environment."""
    mark = f"{RUN_ID}={run_id}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or somebody else's
    return found


def reap(run_id: str, patience_s: float = 5.0) -> None:
    """Kill every process of a run and wait until the kernel has let go of them."""
    deadline = time.monotonic() + patience_s
    while (pids := members(run_id)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.02)
