"""Records: one directory a run, written aside and renamed into place; and the table made of them."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

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
        if self.value is not None and hasattr(self.value, "item"):  # a numpy or torch scalar
            object.__setattr__(self, "value", self.value.item())
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
    text = json.dumps(value, indent=1, allow_nan=False, default=_plain)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp: others may read records
    try:
        with aside.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """A numpy scalar as the number it is; paths and the like as text."""
    return value.item() if hasattr(value, "item") else str(value)


# NaN and Infinity are no JSON, but other programs write them: they become empty.
_lenient = json.JSONDecoder(parse_constant=lambda name: None)


def decode(data: bytes) -> Any:
    """JSON from bytes. Raises ValueError for anything else."""
    try:
        return from_json(data, allow_inf_nan=False)  # half the time of the standard library's, and stricter
    except ValueError:
        return _lenient.decode(data.decode())


def publish(aside: Path, record: dict[str, Any], runs: Path) -> Path:
    """Put a finished run directory in its place under `runs`; nobody ever sees half of it."""
    assert record["status"] in STATUSES
    write_json(aside / "record.json", record)
    target = runs / record["id"]
    os.rename(aside, target)
    return target


def discard(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)


def empty(aside: Path) -> None:
    """Remove everything in a run directory, to make room."""
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def runs_dir(results_dir: str | Path) -> Path:
    path = Path(results_dir) / "runs"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"results_dir={results_dir} cannot be used: {error}") from error
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
    """The records under a directory, oldest first. A file that is no record is told, not guessed at.

    A run that lies there twice counts once.

    Raises:
        UserError: a file is broken, of another schema, or two different records carry one id.
    """
    records = []
    for path, record in _each(where, whole=True):
        for metric in record["metrics"].values():
            if metric.get("value") is None:
                metric.setdefault("reason", "the value was not finite")
        records.append(record | {"_path": str(path.parent)})
    return sorted(records, key=itemgetter("id"))


def _each(where: str | Path, whole: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every run once, with its file; one at a time, for a long table of short-lived records is read twice as fast."""
    seen: dict[str, Path] = {}
    for path in find(where):
        record = _load(path, whole)
        first = seen.setdefault(record["id"], path)
        if first is path:
            yield path, record
        elif _load(first, whole=True) != _load(path, whole=True):
            raise UserError(f"{path} and {first.parent} are different runs with one id: remove one of them")


def _load(path: Path, whole: bool) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        record = decode(data if whole else _head(data))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a record: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a record of schema {SCHEMA}; it was written by another version")
    if not (isinstance(record.get("id"), str) and all(isinstance(record.get(key), dict) for key in _TABLED)):
        raise UserError(f"{path} is not a record: it lacks id, {', '.join(_TABLED)}")
    return record


_TABLED = ("choices", "config", "metrics")
_REST = b'\n "details":'  # what run() writes after the metrics, at the outermost indentation


def _head(data: bytes) -> bytes:
    """The part of a record that a table shows, up to its metrics, as JSON: half the bytes, half the time.

    A raw newline cannot lie in a JSON string, so the marks stand for the outermost level; a file that does not end
    there is broken or somebody else's, and is decoded whole.
    """
    end = data.find(_REST)
    return data[:end].rstrip().rstrip(b",") + b"}" if end > 0 and data.rstrip().endswith(b"\n}") else data


_FIXED = ("id", "created", "status", "reason", "recipe_hash", "duration_s")


# Prices and window lengths are in each record; a hundred columns of them would drown what a table is read for.
BENCH = ("hardware", "measure")


def _parts(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """(what every row has, choices, knobs, metrics) of a record as flat columns."""
    chosen: dict[str, Any] = {}
    knobs: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for axis, option in record["choices"].items():
        chosen[axis] = "+".join(option) if isinstance(option, list) else option
        node = record["config"].get(axis)
        if isinstance(node, dict) and axis not in BENCH:
            _flatten(axis, node, knobs)
    for name, metric in record["metrics"].items():
        metrics[name] = metric["value"]
        if "low" in metric:
            metrics[_joined(name, "_low")], metrics[_joined(name, "_high")] = metric["low"], metric.get("high")
    return {name: record.get(name) for name in _FIXED}, chosen, knobs, metrics


def _flatten(prefix: str, node: dict[str, Any], out: dict[str, Any]) -> None:
    """Knobs as `axis.knob`, of listed options as `axis.option.knob`; a list as text; null is an empty cell."""
    for name, value in node.items():
        if value is None or name == "_target_":
            continue
        column = _joined(prefix, ".", name)
        if isinstance(value, dict):
            _flatten(column, value, out)
        else:
            out[column] = "+".join(map(str, value)) if isinstance(value, list) else value


@cache
def _joined(*parts: str) -> str:
    """One string a column name: ten thousand rows then share it, and find it in a dict by its address."""
    return "".join(parts)


def table(where: str | Path | list[dict[str, Any]]) -> pd.DataFrame:
    """Records as one frame: a row a run. Axes first, then knobs, then metrics."""
    import pandas as pd

    with _no_collection():
        if isinstance(where, list):
            rows = [_parts(record) for record in where]
        else:
            rows = sorted((_parts(record) for _, record in _each(where, whole=False)), key=lambda row: row[0]["id"])
        return pd.DataFrame(_columns(rows))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No cyclic garbage collection: it would walk millions of new objects again and again, a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _columns(rows: list[tuple[dict[str, Any], ...]]) -> dict[str, list[Any]]:
    """The parts of all rows as columns: all of one kind of part before the next, each in order of first appearance.

    Only cells that are there are visited: a few rows with many metrics of their own make wide tables of empty cells.
    """
    columns: dict[str, list[Any]] = {}
    kinds: dict[str, set[type]] = {}
    for group in zip(*rows, strict=True):
        fresh: dict[str, list[Any]] = {}
        for i, part in enumerate(group):
            for name, value in part.items():
                if name in columns:
                    continue
                if name not in fresh:
                    fresh[name], kinds[name] = [None] * len(rows), set()
                fresh[name][i] = value
                kinds[name].add(type(value))
        columns |= fresh
    for name, found in kinds.items():
        if str in found and len(found - {type(None)}) > 1:  # options of one axis may share a knob's name; one type each
            columns[name] = [value if value is None else str(value) for value in columns[name]]
    return columns
