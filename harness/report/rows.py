"""A table and its records as plain rows: what the pages and the comparison are made from. No pandas needed here."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dyno.axes import BY_NAME, SUBJECTS
from dyno.errors import UserError
from dyno.recipe import make
from dyno.units import direction_of, unit_of

if TYPE_CHECKING:
    import pandas as pd

# Columns of a table that are no axis, knob or metric.
FIXED = ("id", "created", "status", "reason", "recipe_hash", "duration_s")
# Parts of a fingerprint that must agree before two rows may be compared; the others are only told.
BINDING = ("machine", "device", "data", "weights", "workload")
# Stages whose choices make the data or the weights another by design: that is what is compared, not an accident.
_EXPLAINED_BY = {"data": ("data",), "weights": ("data", "train", "compress")}


@dataclass(frozen=True)
class Cell:
    """One metric of one row. `value` None carries the reason why it is empty."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    source: str = ""
    reason: str = ""
    unit: str | None = None


@dataclass
class Row:
    """One run: its choices, its figures, and what a reader needs to trust and to repeat it."""

    id: str
    status: str
    reason: str
    created: str
    recipe_hash: str
    choices: dict[str, str]
    knobs: dict[str, str]
    metrics: dict[str, Cell]
    idle: frozenset[str] = frozenset()  # of the knobs, those that mean nothing beside the others
    overrides: list[str] = field(default_factory=list)
    flags: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    path: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def command(self) -> str:
        """The command that repeats this run."""
        words = self.overrides or [f"{axis}={_grammar(option)}" for axis, option in self.choices.items()]
        return " ".join(["dyno", "run", *(shlex.quote(word) for word in words)])

    def value(self, metric: str) -> float | None:
        cell = self.metrics.get(metric)
        return None if cell is None or not self.ok else cell.value


def baseline_option(axis: str) -> str:
    return BY_NAME[axis].baseline if axis in BY_NAME else "none"


def axes_of(row: Row) -> dict[str, str]:
    """The choices that are techniques; the model, the workload and the bench are subjects, not axes."""
    return {name: option for name, option in row.choices.items() if name not in SUBJECTS}


def rows(frame: pd.DataFrame | None, records: Iterable[dict[str, Any]] | None) -> list[Row]:
    """Every run of a table, the records' details joined by id.

    Args:
        frame: a table as `dyno.record.table` makes it; says which rows there are and their order; None: the records'.
        records: record dicts; a row without one keeps what its columns say (a table read back from CSV).
    """
    known = {str(record.get("id")): record for record in records or ()}
    if frame is None:
        return [_from_record(record) for record in known.values()]
    columns = [str(c) for c in frame.columns]
    words = {name for i, name in enumerate(columns) if any(isinstance(v, str) for v in frame.iloc[:, i])}
    out = []
    for values in frame.itertuples(index=False, name=None):
        flat = dict(zip(columns, values, strict=True))
        record = known.get(str(flat.get("id")))
        out.append(_from_flat(flat, words) if record is None else _from_record(record))
    return out


def _from_record(record: dict[str, Any]) -> Row:
    choices = {str(axis): _text(option) for axis, option in (record.get("choices") or {}).items()}
    config = record.get("config") or {}
    knobs: dict[str, str] = {}
    idle: set[str] = set()
    for axis in choices:
        node = config.get(axis)
        if axis in BY_NAME and isinstance(node, dict) and len(node) > 1:
            idle.update(f"{axis}.{knob}" for knob in _idle_knobs(json.dumps(node, sort_keys=True, default=str)))
        for knob, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, bool | int | float | str) and knob != "_target_":
                knobs[f"{axis}.{knob}"] = str(value)
    for subject in ("model", "workload"):
        name = config.get(subject)
        if subject not in choices and isinstance(name, str | dict):
            choices[subject] = name if isinstance(name, str) else _text(name.get("name", ""))
    validity = record.get("validity") or {}
    return Row(
        id=str(record.get("id", "")),
        status=str(record.get("status", "")),
        reason=str(record.get("reason") or ""),
        created=str(record.get("created") or ""),
        recipe_hash=str(record.get("recipe_hash") or ""),
        choices={axis: option for axis, option in choices.items() if option},
        knobs=knobs,
        metrics={str(n): _cell(m) for n, m in (record.get("metrics") or {}).items()},
        idle=frozenset(idle),
        overrides=[str(o) for o in record.get("overrides") or ()],
        flags=[(str(f.get("code", "")), str(f.get("detail", ""))) for f in validity.get("flags") or ()],
        fingerprint={str(k): _text(v) for k, v in (record.get("fingerprint") or {}).items() if v is not None},
        environment=dict(record.get("environment") or {}),
        path=record.get("_path"),
    )


@lru_cache(maxsize=4096)
def _idle_knobs(node: str) -> frozenset[str]:
    """What one of Dyno's own techniques says of its knobs, from its config; nothing of any other."""
    try:
        return make(json.loads(node), []).idle_knobs
    except (UserError, TypeError, ValueError):
        return frozenset()


def _from_flat(flat: dict[str, Any], words: set[str]) -> Row:
    texts = {k: _text(flat.get(k)) for k in FIXED}
    choices, knobs, metrics = {}, {}, {}
    for name, value in flat.items():
        if name in FIXED:
            continue
        if "." in name:
            if not _missing(value):
                knobs[name] = str(value)
        elif name in words or name in BY_NAME or name in SUBJECTS:
            if not _missing(value):
                choices[name] = str(value) or "none"
        elif not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in flat):
            number = _number(value)
            why = "" if number is not None else texts["reason"] or "not in this table"
            metrics[name] = Cell(
                number, _number(flat.get(f"{name}_low")), _number(flat.get(f"{name}_high")), reason=why
            )
    return Row(
        id=texts["id"],
        status=texts["status"] or "ok",
        reason=texts["reason"],
        created=texts["created"],
        recipe_hash=texts["recipe_hash"],
        choices=choices,
        knobs=knobs,
        metrics=metrics,
    )


def _cell(metric: dict[str, Any]) -> Cell:
    value = _number(metric.get("value"))
    count = metric.get("count")
    return Cell(
        value=value,
        low=_number(metric.get("low")),
        high=_number(metric.get("high")),
        count=int(count) if isinstance(count, int | float) else None,
        source=str(metric.get("source") or ""),
        reason="" if value is not None else str(metric.get("reason") or "no reason was recorded"),
        unit=metric.get("unit"),
    )


def metric_names(all_rows: list[Row]) -> list[str]:
    """Every metric that some row names, in order of first appearance."""
    return list(dict.fromkeys(name for row in all_rows for name in row.metrics))


def metric_unit(all_rows: list[Row], metric: str) -> str:
    units = (row.metrics[metric].unit for row in all_rows if metric in row.metrics)
    return unit_of(metric, next((str(u) for u in units if u is not None), None))


def varied(all_rows: list[Row]) -> list[str]:
    """Axes (then subjects) with two or more options in these rows."""
    seen: dict[str, set[str]] = {}
    for row in all_rows:
        for name, option in row.choices.items():
            seen.setdefault(name, set()).add(option)
    names = [name for name, options in seen.items() if len(options) > 1]
    order = {name: i for i, name in enumerate(BY_NAME)}
    return sorted(names, key=lambda name: (name in SUBJECTS, order.get(name, len(order)), name))


def varied_knobs(all_rows: list[Row]) -> list[str]:
    """Knobs whose value differs between rows that chose the same option of their axis; how a row was measured is none."""
    seen: dict[str, dict[str, set[str]]] = {}
    for row in all_rows:
        for knob, value in row.knobs.items():
            if knob.startswith("measure."):
                continue
            option = row.choices.get(knob.partition(".")[0], "")
            seen.setdefault(knob, {}).setdefault(option, set()).add(value)
    return sorted(knob for knob, options in seen.items() if any(len(values) > 1 for values in options.values()))


def short_name(row: Row, names: list[str], knobs: list[str]) -> str:
    """What sets this run apart, in few words: 'bf16 · int8 group_size=64'; 'baseline' where nothing does."""
    words = []
    for name in names:
        option = row.choices.get(name, "")
        if not option or (name not in SUBJECTS and option == baseline_option(name)):
            continue
        words.append(option if option not in ("on", "off", "none") else f"{name}={option}")
    for knob in knobs:
        axis = knob.partition(".")[0]
        if (
            knob in row.knobs
            and knob not in row.idle
            and (axis not in BY_NAME or row.choices.get(axis) != baseline_option(axis))
        ):
            words.append(f"{knob.partition('.')[2]}={row.knobs[knob]}")
    plain = " · ".join(f"{axis}={option}" for axis, option in axes_of(row).items() if option != baseline_option(axis))
    return " · ".join(words) or plain or ("baseline" if axes_of(row) else row.id or "run")


def fingerprint_parts(all_rows: list[Row]) -> dict[str, dict[str, int]]:
    """For every part of the fingerprint, its distinct values and how many rows have each; binding parts first."""
    out: dict[str, dict[str, int]] = {}
    for part in (*BINDING, *sorted({part for row in all_rows for part in row.fingerprint} - {*BINDING})):
        for row in all_rows:
            if part in row.fingerprint:
                values = out.setdefault(part, {})
                values[row.fingerprint[part]] = values.get(row.fingerprint[part], 0) + 1
    return out


def explanation(row: Row, part: str, study: bool = False) -> tuple[tuple[str, str], ...]:
    """The choices and knobs of a row that decide this part of its fingerprint.

    Within a `study` the workload's own knobs (the batch, say) are searched over like an axis; between two strangers
    another workload is other work.

    Two rows that differ here may differ in the part: filtered data are other data because a filter was chosen. Two rows
    that agree here and differ in the part have silently read something else.
    """
    stages = _EXPLAINED_BY.get(part, ())
    workload = {k: v for k, v in row.knobs.items() if k.startswith("workload.")} if study else {}
    if part == "workload":
        return tuple(sorted(workload.items()))
    chosen = {k: v for k, v in axes_of(row).items() if k not in BY_NAME or BY_NAME[k].stage in stages}
    knobs = {k: v for k, v in row.knobs.items() if k.partition(".")[0] in chosen}
    trained = workload if part == "weights" else {}  # a batch that the study searched makes other weights too
    return tuple(sorted((chosen | knobs | trained).items())) if stages else ()


def unexplained(all_rows: list[Row]) -> dict[str, list[str]]:
    """Binding parts whose values differ between rows whose choices do not say why: part to its values."""
    out = {}
    for part in BINDING:
        seen: dict[tuple[tuple[str, str], ...], set[str]] = {}
        for row in all_rows:
            if part in row.fingerprint:
                seen.setdefault(explanation(row, part, study=True), set()).add(row.fingerprint[part])
        values = set().union(*(v for v in seen.values() if len(v) > 1))
        if values:
            out[part] = sorted(values)
    return out


def comparable(a: Row, b: Row) -> bool:
    """Whether a ratio of two rows of one table means something: no unexplained difference of their fingerprints."""
    return not unexplained([a, b])


def default_objectives(all_rows: list[Row]) -> list[tuple[str, str]]:
    """A speed and a cost to look at where nobody named objectives: the first of each that was measured."""
    have = {name for row in all_rows for name, cell in row.metrics.items() if row.ok and cell.value is not None}
    speed = ("decode_tokens_per_s", "tokens_per_s", "step_time_s", "end_to_end_s")
    cost = ("perplexity", "validation_loss", "peak_memory_bytes", "model_bytes", "train_loss")
    picked = [next((m for m in group if m in have), None) for group in (speed, cost)]
    names = [m for m in picked if m] or sorted(have)[:2]
    return [(name, direction_of(name)) for name in names]


def _text(value: Any) -> str:
    """A choice or a fingerprint part as text: lists joined with '+', mappings as canonical JSON."""
    if isinstance(value, list | tuple):
        return "+".join(_text(v) for v in value) or "none"
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, default=str)
    return "" if _missing(value) else str(value)


def _missing(value: Any) -> bool:
    # NaN is the only value that differs from itself; pandas' NA refuses to be a truth value, so it is told by its type.
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _number(value: Any) -> float | None:
    if _missing(value) or isinstance(value, str | bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _grammar(option: str) -> str:
    return f"[{option.replace('+', ',')}]" if "+" in option else option
