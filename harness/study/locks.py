"""Locks that die with their holder, and what a worker leaves behind so that others see whether it lives."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import Any

from dyno.measure.environment import machine_id


class FileLock:
    """An exclusive flock on a file. The kernel releases it however the process ends; nothing grows stale.

    Has the two methods that Optuna's journal asks of a lock, whose own ones make a survivor of kill -9 wait for 30 s.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._handle: int | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; False if somebody holds it and `wait` is off."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return False
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def release(self) -> None:
        """Let go; does nothing where the lock is not held."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)


class Owner:
    """This worker's sign of life: a file that it keeps locked. Make one only while holding the study's gate."""

    def __init__(self, folder: Path):
        self._lock = FileLock(folder / f"worker-{os.getpid()}-{secrets.token_hex(4)}")
        self._lock.acquire()
        self.mark = {"machine": machine_id(), "file": str(self._lock.path.resolve())}

    def close(self) -> None:
        self._lock.path.unlink(missing_ok=True)
        self._lock.release()

    def is_alive(self, mark: dict[str, Any]) -> bool:
        """Whether the worker that left `mark` may still be at work. Our own marks are of work that broke off."""
        if mark["file"] == self.mark["file"]:
            return False
        path = Path(mark["file"])
        if not path.exists():  # on a machine that shares no disk with us: its heartbeat tells, not we
            return mark["machine"] != self.mark["machine"]
        probe = FileLock(path)
        if not probe.acquire(wait=False):
            return True
        path.unlink(missing_ok=True)
        probe.release()
        return False
