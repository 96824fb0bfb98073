"""Turns on a device: whoever measures holds its lock, and names itself there so that others can stand still meanwhile."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

STILL_S = 300.0  # the longest that a run stands still in one go: it may hold what the one that measures waits for


def take(path: Path, owner: str = "", waits: Callable[[], None] = lambda: None) -> IO[str]:
    """Wait for the lock and take it, as `owner`; it is free when the file is closed. `waits` is called if somebody has it.

    With an owner others stand still (`held_by_another`): only who has all else that it needs may ask for that.
    """
    lock = path.open("a")  # not "w": whoever has the lock is named there
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waits()
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(owner)
        lock.flush()
    except BaseException:
        lock.close()
        raise
    return lock


def held_by_another(paths: Sequence[Path], me: str) -> bool:
    """Whether one of the locks is another owner's. A lock whose holder died is free, whatever stands in it."""
    return any(owner not in ("", me) for owner in map(_owner, paths))


def _owner(path: Path) -> str:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(file, 4096).decode(errors="replace")
    else:
        return ""
    finally:
        os.close(file)
