"""Ctrl-C at moments of our choosing.

A KeyboardInterrupt in the middle of a write to the storage leaves its copy in memory torn, and libraries that catch
everything turn one into an error of the configuration. So it is noted, and raised where nothing can tear.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Raises at once inside `allowed()`, elsewhere at the next `check()`; a second Ctrl-C raises wherever it comes."""

    def __init__(self) -> None:
        self._asked = self._open = False

    def _note(self, signum: int, frame: Any) -> None:
        again, self._asked = self._asked, True
        if self._open or again:
            raise KeyboardInterrupt

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """A region that may end with a KeyboardInterrupt at any point."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Handle SIGINT here. Does nothing in a thread, or where SIGINT is ignored, as under nohup."""
        plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not plain or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
