"""The keeper: a small process between the runner and the ranks of one run, which ends when nothing of the run is left.

    python -IS keeper.py    with the link to the runner as 0, rank 0's stdout as 1 and the log as 2

It is a subreaper (Linux prctl): whatever a rank starts, in whatever session and with whatever environment, becomes the
keeper's own child once its parent is dead. So a keeper without children is a run without processes, whoever else the
runner has started. It ends a run when every rank has ended, when one has failed, and when the runner closes the link,
which the kernel does for a runner that is killed with -9. Only a kill -9 of the keeper itself escapes it: then the
ranks die (see `die_with_parent`), but not what they had detached.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

PARENT = "DYNO_PARENT_PID"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STOP, CONTINUE = b"s", b"c"  # what the runner says of all processes of the run
PATIENCE_S = 10.0  # for the kernel to let go of what was killed; another user's process never goes


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


@dataclass(frozen=True)
class Rank:
    """A process to be: its command, its whole environment, and the process group that it joins (0: its own)."""

    command: list[str]
    environment: dict[str, str]
    group: int


def keep(start: Callable[[Rank], int]) -> Rank | None:
    """Start the ranks that the runner asks for, wait, kill what is left of them, report their ends.

    Args:
        start: makes a rank's process and gives its pid; or forks, and gives 0 in the new one as os.fork does.

    Returns:
        None in the keeper, once all is over; its Rank in a process that `start` forked.
    """
    link = socket.socket(fileno=0)
    request, words = _read_request(link)
    if not request:  # the runner is gone already
        return None
    asked = json.loads(request)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    bell, rope = socket.socketpair()
    for end in (bell, rope):
        end.setblocking(False)
    signal.set_wakeup_fd(rope.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)

    ranks: dict[int, int] = {}
    codes: list[int | None] = [None] * asked["ranks"]
    report: dict[str, object] = {}
    try:
        for number in range(asked["ranks"]):
            told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": asked["ranks"], PARENT: os.getpid()}
            environment = asked["environment"] | {name: str(value) for name, value in told.items()}
            rank = Rank(asked["command"], environment, next(iter(ranks), 0))
            if number == 1:
                os.dup2(2, 1)  # only rank 0 speaks to the runner
            pid = start(rank)
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (bell, rope):
                    end.close()
                link.detach()  # its number 0 is the rank's stdin
                return rank
            ranks[pid] = number
        os.dup2(2, 1)  # ours is no longer a writer of what rank 0 says
        _obey(words)
        report["first"] = _wait(link, bell, ranks, codes)
    except OSError as error:
        report["error"] = [error.errno, error.strerror, error.filename]
    _kill(bell, ranks, codes)
    with contextlib.suppress(OSError):
        link.sendall(json.dumps(report | {"codes": codes}).encode())
    return None


def _read_request(link: socket.socket) -> tuple[bytes, bytes]:
    """The runner's first line, empty if it is gone, and the words that it may have said after that."""
    data = b""
    while b"\n" not in data:
        more = link.recv(65536)
        if not more:
            return b"", b""
        data += more
    request, _, words = data.partition(b"\n")
    return request, words


def _obey(words: bytes) -> None:
    """Stop all processes of the run, or have them go on, whichever was said last."""
    if words:
        number = signal.SIGSTOP if words[-1:] == STOP else signal.SIGCONT
        told: set[int] = set()
        while new := set(descendants(os.getpid())) - told:  # some may have been born while we looked
            for pid in new:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            told |= new
            if number == signal.SIGCONT:  # what goes on may start others
                break


def _wait(link: socket.socket, bell: socket.socket, ranks: dict[int, int], codes: list[int | None]) -> int | None:
    """Sleep until every rank has ended, one has failed (which it returns), or the runner wants the end."""
    while _collect(ranks, codes) and None in codes:
        if any(codes):
            break
        ready, _, _ = select.select([link, bell], [], [])
        if link in ready:
            words = link.recv(4096)
            if not words:
                return None
            _obey(words)
        if bell in ready:
            bell.recv(4096)
    return next((number for number, code in enumerate(codes) if code), None)


def _collect(ranks: dict[int, int], codes: list[int | None]) -> bool:
    """Take the ends of children, the ranks' and the orphans'; whether there are children left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid in ranks:
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)


def _kill(bell: socket.socket, ranks: dict[int, int], codes: list[int | None]) -> None:
    """Kill children until there are none: the children of a killed one become ours, and are next.

    A child's pid is its own until we collect its end, so that no stranger can be hit.
    """
    deadline = time.monotonic() + PATIENCE_S
    while _collect(ranks, codes):
        if time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                os.write(2, f"processes that could not be killed: {children(os.getpid())}\n".encode())
            return
        for pid in children(os.getpid()):
            with contextlib.suppress(PermissionError):
                os.kill(pid, signal.SIGKILL)
        if select.select([bell], [], [], 0.05)[0]:
            bell.recv(4096)


def parents() -> dict[int, int]:
    """The parent of every process, from /proc."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                found[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    return found


def children(parent: int) -> list[int]:
    """The pids of a process's children."""
    return [pid for pid, its in parents().items() if its == parent]


def descendants(ancestor: int) -> list[int]:
    """The pids of a process's children and theirs, parents first."""
    every = parents()
    found = [ancestor]
    for one in found:
        found += [pid for pid, its in every.items() if its == one]
    return found[1:]


def spawn(rank: Rank) -> int:
    """Start a rank as a new program."""
    nothing = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    return os.posix_spawn(
        rank.command[0], rank.command, rank.environment, file_actions=nothing, setpgroup=rank.group
    )  # fmt: skip


if __name__ == "__main__":
    keep(spawn)
