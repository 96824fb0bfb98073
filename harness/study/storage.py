"""Where a study's trials are kept: a journal file by default, any Optuna storage URL otherwise.

Machines that share a database but no disk cannot see each other's locks. There a running trial has a sign of life in the
database, by its clock (Optuna's heartbeat), and one that was silent for SILENT_S is taken for broken off. So a trial that
was lost with another machine comes back after minutes, when some worker next looks; and a worker whose machine slept, or
lost the database, for so long has lost its trial, whose recipe another one may then run as well.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dyno.errors import UserError
from dyno.study.locks import FileLock

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

HEARTBEAT_S, SILENT_S = 60, 300


@dataclass(frozen=True)
class Place:
    """The storage of a study as it is written, and the folder of its locks; `journal` is None for a URL."""

    name: str
    text: str
    journal: Path | None
    locks: Path

    @classmethod
    def of(cls, storage: str | None, name: str, results_dir: str | Path) -> Place:
        folder = Path(results_dir) / "studies"
        if storage and "://" in storage:
            return cls(name, storage, None, folder / f"{name}.workers")
        journal = Path(storage) if storage else folder / f"{name}.journal"
        return cls(name, str(journal), journal, journal.parent / f"{name}.workers")

    def open(self) -> BaseStorage:
        """The Optuna storage, made if it is not there.

        Raises:
            UserError: it cannot be opened, or a journal holds what is none.
        """
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            return self._open_url() if self.journal is None else self._open_journal(self.journal)
        except OSError as error:
            raise UserError(f"study.storage {self.text} cannot be opened: {error}") from error

    def _open_url(self) -> BaseStorage:
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import RDBStorage
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return RDBStorage(self.text, heartbeat_interval=HEARTBEAT_S, grace_period=SILENT_S)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise UserError(f"study.storage {self.text} cannot be opened: {str(error).splitlines()[0]}") from error

    def _open_journal(self, path: Path) -> BaseStorage:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire()
        try:
            mend(path)
        finally:
            lock.release()
        try:
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no journal of a study, or a damaged one: move it away; the same command then makes a new "
                "one and takes over the runs that have records"
            ) from error


def mend(path: Path) -> None:
    """Cut off a last line that a killed writer, or a full disk, left unfinished: nobody could append after it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)
