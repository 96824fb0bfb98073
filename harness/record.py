"""Records: one directory a run, written aside and renamed into place; and the table made of them."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import STATUSES, UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1


@dataclass(frozen=True)
class Metric:
    """One number: value, unit, sample count, interval and source. Not measured is None with a reason, never zero."""

    value: float | None
    unit: str
    count: int = 1
    low: float | None = None
    high: float | None = None
    source: str = ""
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)
            object.__setattr__(self, "reason", self.reason or "the value was not finite")
        if self.value is None and not self.reason:
            raise ValueError("a metric with no value needs a reason")


def unmeasured(unit: str, reason: str) -> Metric:
    return Metric(None, unit, 0, reason=reason)


def new_id(recipe_hash: str) -> str:
    """Sortable by time, readable, and unique across machines and processes."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{recipe_hash[:8]}-{secrets.token_hex(3)}"


def to_json(metrics: dict[str, Metric]) -> dict[str, Any]:
    """Metrics as JSON; fields that say nothing are left out."""
    always = ("value", "unit", "count")
    return {
        name: {k: v for k, v in asdict(metric).items() if k in always or v not in (None, "")}
        for name, metric in metrics.items()
    }


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all: aside, flushed to disk, renamed. NaN is refused, JSON has none."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1, allow_nan=False, default=str)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def publish(aside: Path, record: dict[str, Any], runs: Path) -> Path:
    """Put a finished run directory in its place under `runs`; nobody ever sees half of it."""
    assert record["status"] in STATUSES
    write_json(aside / "record.json", record)
    target = runs / record["id"]
    os.rename(aside, target)
    return target


def discard(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)


def runs_dir(results_dir: str | Path) -> Path:
    path = Path(results_dir) / "runs"
    path.mkdir(parents=True, exist_ok=True)
    return path


def find(where: str | Path) -> list[Path]:
    """Every record.json under a results directory, a runs directory, one run, or a record file."""
    root = Path(where)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{root} does not exist; name a results directory or a run directory")
    if (root / "record.json").is_file():
        return [root / "record.json"]
    base = root / "runs" if (root / "runs").is_dir() else root
    with os.scandir(base) as entries:
        paths = [os.path.join(e.path, "record.json") for e in entries if e.is_dir() and not e.name.startswith(".")]
    found = [Path(p) for p in sorted(paths) if os.path.exists(p)]
    return found or sorted(
        p for p in base.rglob("record.json") if not any(x.startswith(".") for x in p.parts[len(base.parts) :])
    )


def read_records(where: str | Path) -> list[dict[str, Any]]:
    """The records under a directory, oldest first. A file that is no record is told, not guessed at."""
    records = []
    for path in find(where):
        try:
            record = json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not a record: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UserError(f"{path} is not a record of schema {SCHEMA}; it was written by another version")
        record["_path"] = str(path.parent)
        records.append(record)
    return sorted(records, key=lambda r: r["id"])


def row(record: dict[str, Any]) -> dict[str, Any]:
    """One record as a flat row: a column an axis, a knob, a metric."""
    out = {k: record.get(k) for k in ("id", "created", "status", "reason", "recipe_hash", "duration_s")}
    for axis, option in record["choices"].items():
        out[axis] = "+".join(option) if isinstance(option, list) else option
        node = record["config"].get(axis)
        if isinstance(node, dict):
            for knob, value in node.items():
                if isinstance(value, bool | int | float | str) and knob != "_target_":
                    out[f"{axis}.{knob}"] = value
    for name, metric in record["metrics"].items():
        out[name] = metric["value"]
        if "low" in metric:
            out[f"{name}_low"], out[f"{name}_high"] = metric["low"], metric.get("high")
    return out


def table(where: str | Path | list[dict[str, Any]]) -> pd.DataFrame:
    """Records as one frame: a row a run. Axes first, then knobs, then metrics."""
    import pandas as pd

    records = where if isinstance(where, list) else read_records(where)
    return pd.DataFrame([row(record) for record in records])
