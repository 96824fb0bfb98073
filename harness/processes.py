"""The processes of a run, from the runner's side: started together, waited for without spinning, never left behind.

Linux only. The ranks are children of a keeper (see `keeper.py`), which answers for everything that they start.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dyno.forkserver import ForkServer
from dyno.keeper import CONTINUE, PARENT, PR_SET_PDEATHSIG, STOP, prctl
from dyno.turns import STILL_S

KEEPER = [sys.executable, "-IS", str(Path(__file__).with_name("keeper.py"))]
PROGRESS_BYTES = 65536
LOOK_S = 0.05  # between looks whether to stand still


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux prctl); does nothing elsewhere.

    `parent` is the pid of whoever started it; by default the one that the environment tells.
    """
    # The parent tells its pid: getppid() alone cannot show that it ended while this interpreter started.
    parent = parent or int(os.environ.pop(PARENT, os.getppid()))
    if sys.platform != "linux":
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request was in place
        os._exit(1)


@dataclass
class Outcome:
    """How a group of processes ended: return codes by rank, the rank that failed first, and whether the limit struck.

    A rank that was killed because another one failed has a code too, so only `first` tells who began. `stood_s` seconds it
    stood still, which the limit does not count.
    """

    codes: list[int | None] = field(default_factory=list)
    first: int | None = None
    timed_out: bool = False
    stood_s: float = 0.0


class Keeper:
    """A keeper at work: the link to it, and what rank 0 says.

    Args:
        start: makes its process, with the two files that it gets as 0 and 1; a child of ours is returned.
    """

    def __init__(self, start: Callable[[list[int]], subprocess.Popen[bytes] | None]):
        self.link, theirs = socket.socketpair()
        reader, writer = os.pipe()
        self.said = io.FileIO(reader)
        try:
            with theirs, open(writer, "wb", buffering=0):
                self.process = start([theirs.fileno(), writer])
        except BaseException:
            self.close()
            raise

    def end(self) -> bytes:
        """Have it kill what is left of the run; its report, empty if it was killed itself."""
        report = b""
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_WR)
            while data := self.link.recv(65536):
                report += data
        if self.process is not None:
            self.process.wait()
        return report

    def close(self) -> None:
        self.link.close()
        self.said.close()


def run_group(
    command: list[str],
    ranks: int,
    environment: dict[str, str],
    log: Path,
    time_limit_s: float,
    progress: Callable[[str], None],
    *,
    server: ForkServer | None = None,
    held: Sequence[int] = (),
    stands: Callable[[], str] | None = None,
) -> Outcome:
    """Run one process a rank until all end, one fails, or the limit strikes; then nothing of them is left alive.

    Rank 0's stdout lines are progress; everything else goes to `log`, which stays locked while the run has a process.

    Args:
        environment: the whole of it; a rank finds RANK, LOCAL_RANK and WORLD_SIZE as well.
        server: forks the ranks where it can, of a `command` that is python -m MODULE; otherwise they are spawned.
        held: descriptors of locked files that stay locked until the run has no process, even if this one is killed.
        stands: asked often who wants the processes to stand still, "" for nobody; the limit's clock stands still too.

    Raises:
        OSError: a process could not be started.
    """
    deadline, stand = time.monotonic() + time_limit_s, Stand(stands, progress)
    with log.open("ab", buffering=0) as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)
        files = [sink.fileno(), *held]
        forks = server if command[:2] == [sys.executable, "-m"] else None
        keeper = _begin(forks, environment, files, time_limit_s)
        timed_out = False
        try:
            request = {"command": command, "ranks": ranks, "environment": environment}
            keeper.link.sendall(json.dumps(request).encode() + b"\n")
            timed_out = _wait(keeper, deadline, progress, sink, stand)
        finally:
            report = keeper.end()
            keeper.close()
    # A keeper that was killed has no report, and the kernel has killed the ranks with it.
    ends: dict[str, Any] = json.loads(report) if report else {"codes": [-signal.SIGKILL] * ranks, "first": 0}
    if "error" in ends:
        raise OSError(*ends["error"])
    return Outcome(ends["codes"], ends["first"], timed_out, stand.seconds)


def _begin(server: ForkServer | None, environment: dict[str, str], files: list[int], patience_s: float) -> Keeper:
    """A keeper with `files` as 2, 3, ...: forked if there is a server that can, else started."""

    def start(ends: list[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            KEEPER, stdin=ends[0], stdout=ends[1], stderr=files[0], pass_fds=files[1:], start_new_session=True
        )

    if server is not None:
        with contextlib.suppress(ConnectionError):
            return Keeper(lambda ends: server.fork([*ends, *files], environment, patience_s))
    return Keeper(start)


class Stand:
    """Keeps a run's processes still, by words to their keeper, while `asked` names somebody who wants it."""

    def __init__(self, asked: Callable[[], str] | None, progress: Callable[[str], None]):
        self.asked, self.progress = asked, progress
        self.seconds = 0.0  # in all
        self._since: float | None = None  # when they stopped
        self._looked = 0.0
        self._last = self._given_up = ""

    def look(self, keeper: Keeper) -> float:
        """Stop them or let them go on; the seconds until the next look.

        Two looks in a row have to find the same name: of one who was killed it stands there until the next has written its own.
        Those that stand already stay so when the turn passes to another.
        """
        if self.asked is None:
            return math.inf
        now, name = time.monotonic(), self.asked()
        if self._since is not None:
            self.seconds += now - self._looked
            if name != self._last:
                self._since = now
            elif now - self._since > STILL_S:
                self._given_up = name
        if name != self._given_up:
            self._given_up = ""
        still = name != "" and (name == self._last or self._since is not None) and not self._given_up
        self._looked, self._last = now, name
        if still != (self._since is not None):
            self._since = now if still else None
            if still:
                self.progress("stands still: another run measures")
            with contextlib.suppress(OSError):  # the keeper may have ended
                keeper.link.send(STOP if still else CONTINUE)
        return LOOK_S


def _wait(keeper: Keeper, deadline: float, progress: Callable[[str], None], sink: IO[bytes], stand: Stand) -> bool:
    """Sleep until the keeper reports, handing on what rank 0 says; whether the deadline came first."""
    os.set_blocking(keeper.said.fileno(), False)
    poller = select.poll()
    for end in (keeper.said, keeper.link):
        poller.register(end.fileno(), select.POLLIN)
    rest = b""
    try:
        while (left := deadline + stand.seconds - time.monotonic()) > 0:
            for handle, event in poller.poll(min(left, stand.look(keeper), 3600.0) * 1000):
                if handle == keeper.link.fileno():
                    return False
                rest = _relay(keeper.said, rest, progress, sink)
                if event & select.POLLHUP and not event & select.POLLIN:
                    poller.unregister(handle)
        return True
    finally:
        _relay(keeper.said, rest, progress, sink)


def _relay(pipe: IO[bytes], rest: bytes, progress: Callable[[str], None], sink: IO[bytes]) -> bytes:
    """Hand whole lines on; a line that nobody finishes is cut, so that a noisy worker cannot fill the memory."""
    data = pipe.read(PROGRESS_BYTES) or b""
    *lines, rest = (rest + data).split(b"\n")
    for line in lines:
        with contextlib.suppress(OSError):  # a full disk costs the log, not the record
            sink.write(line + b"\n")
        progress(line.decode(errors="replace"))
    return rest[-PROGRESS_BYTES:]


def is_held(log: Path) -> bool:
    """Whether the run that writes this log still has a process, or its runner."""
    try:
        with log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
