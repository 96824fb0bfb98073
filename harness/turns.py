"""Turns on a device: whoever measures holds its lock, and names itself there so that others can stand still meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

STILL_S = 300.0  # the longest that a run stands still for another: it may have what that one waits for


@contextlib.contextmanager
def take(path: Path, owner: str = "", waits: Callable[[], None] = lambda: None) -> Iterator[IO[str]]:
    """Hold the lock, as `owner`, once it is free; yields its file. `waits` is called if somebody else has it.

    With an owner others stand still (`Watch`): only who has all else that it needs may ask for that.
    """
    with path.open("a") as lock:  # not "w": whoever has the lock is named there
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waits()
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk costs the others' stillness, not the run
            os.write(lock.fileno(), owner.encode())
        try:
            yield lock
        finally:
            lock.truncate(0)  # or the next one would go by this name until it has written its own


class Watch:
    """Whose turn it is, asked again and again for a run: it has no reason to stand still once it has had its own."""

    def __init__(self, paths: Sequence[Path], me: str):
        self.paths, self.me, self.over = paths, me, False

    def other(self) -> str:
        """The owner of the first lock that is another's, "" where none is."""
        owners = [] if self.over else [owner_of(path) for path in self.paths]
        self.over = self.over or self.me in owners
        return next((owner for owner in owners if owner and not self.over), "")


def owner_of(path: Path) -> str:
    """Who holds the lock; "" if nobody does, whatever one who was killed has left there, or if it gave no name."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:  # nobody has taken it yet
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.read(file, 4096).decode(errors="replace")
    else:
        return ""
    finally:
        os.close(file)
