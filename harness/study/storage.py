"""Where a study lives: a journal file that survives kill -9, or any Optuna storage URL."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dyno.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "grid": "GridSampler",
    "brute_force": "BruteForceSampler",
    "nsga2": "NSGAIISampler",
    "gp": "GPSampler",
    "qmc": "QMCSampler",
}


class KernelLock:
    """A journal lock that the kernel releases with its process, and that mends a line which a killed writer cut short."""

    def __init__(self, path: Path):
        self.path = path
        self.held: IO[bytes] | None = None

    def acquire(self) -> bool:
        self.held = self.path.with_suffix(".lock").open("ab")
        fcntl.flock(self.held, fcntl.LOCK_EX)
        if self.path.exists() and self.path.stat().st_size:
            data = self.path.read_bytes() if not _ends_whole(self.path) else b"\n"
            if not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        if self.held is not None:
            self.held.close()
            self.held = None


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def open_storage(study: dict[str, Any], results_dir: Path) -> tuple[BaseStorage | str, str]:
    """(storage, its name for people): the journal <results_dir>/studies/<name>.journal unless study.storage says else."""
    where = study.get("storage")
    if where and "://" in str(where):
        return str(where), str(where)
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(where) if where else results_dir / "studies" / f"{study['name']}.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=KernelLock(path))), str(path)  # type: ignore[arg-type]


def make_sampler(node: dict[str, Any], combinations: list[dict[str, Any]] | None, seed: int) -> Any:
    """The sampler that conf/sampler names, seeded. AutoSampler is none of them: it fetches code at run time."""
    import optuna

    name = node["name"]
    if name not in SAMPLERS:
        raise UserError(f"sampler.name={name} is none of {', '.join(SAMPLERS)}")
    options = {k: v for k, v in node.items() if k != "name"}
    if name == "grid":
        if combinations is None:
            raise UserError("sampler=grid needs a space of choices and ranges; an interval has no grid")
        keys = combinations[0]
        options["search_space"] = {key: sorted({c[key] for c in combinations}, key=str) for key in keys}
    try:
        return getattr(optuna.samplers, SAMPLERS[name])(seed=seed, **options)
    except TypeError as error:
        raise UserError(f"sampler={name}: {error}") from error
