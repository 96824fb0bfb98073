"""Two runs or two tables side by side: per metric the ratio b / a with its 95% interval and a word for it.

Rows of different machines, devices, data, weights or workloads are refused, with the reason, unless forced; a
difference that the recipes' own choices explain (other filters give other data) is what is compared, and is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dyno.errors import UserError
from dyno.report.rows import BINDING, Cell, Row, explanation, metric_unit, rows
from dyno.report.summary import cell_ratio
from dyno.units import direction_of, kind_of, quantity, ratio_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    Source: TypeAlias = pd.DataFrame | dict[str, Any] | list[dict[str, Any]] | str | Path

_WORDS = {  # (better, worse); sizes and amounts have no better, only less and more
    "speed": ("faster", "slower"),
    "size": ("smaller", "larger"),
    "quality": ("better", "worse"),
    "amount": ("lower", "higher"),
}
# Metrics that follow a window's step times, and the power with which they do. None: the only window, or `train`.
SAMPLED: dict[str, tuple[str | None, int]] = {
    "step_time_s": (None, 1),
    "tokens_per_s": (None, -1),
    "ttft_s": ("prefill", 1),
    "prefill_tokens_per_s": ("prefill", -1),
    "tpot_s": ("decode", 1),
    "decode_tokens_per_s": ("decode", -1),
}
_STEP_TIMES = re.compile(r"^(?P<window>.+)\.step_times?_s$")


class FingerprintMismatch(UserError):
    """The two sides did not measure the same thing, or not on the same machine."""


@dataclass(frozen=True)
class MetricRatio:
    """One metric of one pair. `ratio` None carries the reason; `method` says where the interval comes from."""

    name: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str
    method: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """The same recipe on both sides, or two recipes: what differs between them, and every metric."""

    a: list[str]
    b: list[str]
    differs: dict[str, tuple[str, str]]
    metrics: list[MetricRatio]
    failed: str = ""

    def __getitem__(self, metric: str) -> MetricRatio:
        return next(m for m in self.metrics if m.name == metric)


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` found; `text()` for a terminal, `to_json()` for a program."""

    pairs: list[Pair]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        pairs = [
            {
                "a": pair.a,
                "b": pair.b,
                "differs": {name: list(values) for name, values in pair.differs.items()},
                "failed": pair.failed or None,
                "metrics": {m.name: {k: v for k, v in asdict(m).items() if k != "name"} for m in pair.metrics},
            }
            for pair in self.pairs
        ]
        return {"pairs": pairs, "only_a": self.only_a, "only_b": self.only_b, "notes": self.notes}

    def text(self) -> str:
        """An aligned table a pair; metrics that neither side measured are left out."""
        parts = [f"note: {note}" for note in self.notes]
        for pair in self.pairs:
            parts.append("\n".join(_head(pair)))
            if pair.failed:
                parts.append(f"  {pair.failed}")
            elif shown := [m for m in pair.metrics if m.a is not None or m.b is not None]:
                parts.append(_grid(shown))
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"only in {side}: {', '.join(names[:10])}{more}")
        return "\n\n".join(parts or ["nothing to compare: neither side has a row"]) + "\n"

    __str__ = text


def compare(a: Source, b: Source, *, force: bool = False, results_dir: str | Path = "results") -> Comparison:
    """Compare two sides, each a record, records, a table, a directory, a table's file, or the id of a run.

    Rows are matched by recipe hash, then by the axes and knobs that all rows of both sides have; one recipe on either
    side is compared whatever it is. Repeats of a recipe are pooled.

    Args:
        a: the reference.
        b: what is held against it; ratios are b / a.
        force: compare although fingerprints differ; the differences are then noted.
        results_dir: where run ids (or their unique beginnings) are looked up.

    Raises:
        FingerprintMismatch: the sides differ in machine, device, data, weights or workload.
        UserError: a side that cannot be found.
    """
    left, right = _load(a, results_dir), _load(b, results_dir)
    matched, only_a, only_b = _match(left, right)
    different: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    for one, other in matched:
        for part, values in _differences(one, other):
            different.setdefault(part, values)
        for note in _explained(one, other):
            notes[note] = None
    if any(not row.fingerprint for one, other in matched for row in (*one, *other)):
        notes[
            "some rows carry no fingerprint (a table without its records): that they are comparable was not checked"
        ] = None
    if different:
        told = "; ".join(f"{part} {values[0]!r} and {values[1]!r}" for part, values in different.items())
        if not force:
            raise FingerprintMismatch(
                f"these rows are not comparable, their fingerprints differ: {told}; --force compares them all the same"
            )
        notes[f"forced although fingerprints differ: {told}"] = None
    pairs = [_pair(one, other) for one, other in matched]
    return Comparison(pairs, [_name(row) for row in only_a], [_name(row) for row in only_b], list(notes))


def _load(source: Source, results_dir: str | Path) -> list[Row]:
    if isinstance(source, dict):
        return rows(None, [source])
    if isinstance(source, list):
        return rows(None, source)
    if not isinstance(source, str | Path):
        return rows(source, None)
    from dyno.record import read_records

    path = Path(source)
    if path.suffix in (".parquet", ".csv") and path.is_file():
        import pandas as pd

        return rows(
            pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, keep_default_na=True), None
        )
    if path.exists():
        return rows(None, read_records(path))
    runs = Path(results_dir) / "runs"
    found = sorted(p for p in runs.iterdir() if p.name.startswith(path.name)) if runs.is_dir() and path.name else []
    if len(found) != 1 or len(path.parts) != 1:
        what = f"{len(found)} runs begin so" if found else "it is no file or directory, and no run there begins so"
        raise UserError(f"{source} does not name one thing to compare: {what}; look in {runs} or name a path")
    return rows(None, read_records(found[0]))


def _match(left: list[Row], right: list[Row]) -> tuple[list[tuple[list[Row], list[Row]]], list[Row], list[Row]]:
    """Pairs of repeats, and what is left over on either side."""
    pairs = []
    for key in (_by_hash, _by_axes(left, right)):
        groups_a, groups_b = _grouped(left, key), _grouped(right, key)
        for name in [n for n in groups_a if n is not None and n in groups_b]:
            pairs.append((groups_a.pop(name), groups_b.pop(name)))
        left = [row for group in groups_a.values() for row in group]
        right = [row for group in groups_b.values() for row in group]
    if not pairs and left and right and all(len(_grouped(side, _by_hash_or_id)) == 1 for side in (left, right)):
        return [(left, right)], [], []
    return pairs, left, right


def _grouped(side: list[Row], key: Any) -> dict[Any, list[Row]]:
    out: dict[Any, list[Row]] = {}
    for row in side:
        out.setdefault(key(row), []).append(row)
    return out


def _by_hash(row: Row) -> str | None:
    return row.recipe_hash or None


def _by_hash_or_id(row: Row) -> str:
    return row.recipe_hash or row.id


def _by_axes(left: list[Row], right: list[Row]) -> Any:
    everything = [set(row.choices) for row in (*left, *right)]
    common = sorted(set.intersection(*everything)) if everything else []

    def key(row: Row) -> tuple[Any, ...] | None:
        return (*(row.choices[name] for name in common), *sorted(row.knobs.items())) if common else None

    return key


def _differences(one: list[Row], other: list[Row]) -> Iterable[tuple[str, list[str]]]:
    """Binding parts of the fingerprint that differ although no choice of the recipes explains it."""
    for part in BINDING:
        for a in one:
            for b in other:
                x, y = a.fingerprint.get(part), b.fingerprint.get(part)
                if x is not None and y is not None and x != y and explanation(a, part) == explanation(b, part):
                    yield part, [x, y]


def _explained(one: list[Row], other: list[Row]) -> Iterable[str]:
    a, b = one[0], other[0]
    for part in BINDING:
        x, y = a.fingerprint.get(part), b.fingerprint.get(part)
        if (
            x is not None
            and y is not None
            and x != y
            and (why := set(explanation(a, part)) ^ set(explanation(b, part)))
        ):
            yield f"{part} differ, as the recipes do in {', '.join(sorted({name for name, _ in why}))}"


def _pair(one: list[Row], other: list[Row]) -> Pair:
    ids = [row.id for row in one], [row.id for row in other]
    a, b = one[0], other[0]
    both = {name: (a.choices.get(name, ""), b.choices.get(name, "")) for name in {**a.choices, **b.choices}}
    both |= {name: (a.knobs.get(name, ""), b.knobs.get(name, "")) for name in {**a.knobs, **b.knobs}}
    # Where the option itself differs its knobs differ with it: naming the option is enough.
    differs = {
        n: v
        for n, v in both.items()
        if v[0] != v[1] and ("." not in n or len(set(both.get(n.partition(".")[0], ()))) < 2)
    }
    ok_a, ok_b = [row for row in one if row.ok], [row for row in other if row.ok]
    if not ok_a or not ok_b:
        told = [
            f"{side} ended {row[0].status}: {row[0].reason}"
            for side, row, ok in (("A", one, ok_a), ("B", other, ok_b))
            if not ok
        ]
        return Pair(*ids, differs, [], "; ".join(told))
    names = dict.fromkeys(name for row in (*ok_a, *ok_b) for name in row.metrics)
    times = step_times(ok_a), step_times(ok_b)
    return Pair(*ids, differs, [_ratio(name, ok_a, ok_b, times) for name in names])


def _ratio(
    name: str, one: list[Row], other: list[Row], times: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
) -> MetricRatio:
    a, b, unit = _pooled(one, name), _pooled(other, name), metric_unit([*one, *other], name)
    if a.value is None or b.value is None:
        told = [f"{side}: {cell.reason}" for side, cell in (("A", a), ("B", b)) if cell.value is None]
        return MetricRatio(name, unit, a.value, b.value, None, None, None, "not measured", reason="; ".join(told))
    found = cell_ratio(a, b)
    if found is None:
        apart = None not in (a.low, b.low) and (a.low > b.high or b.low > a.high)  # type: ignore[operator]
        word = "same" if a.value == b.value else _word(name, b.value > a.value)
        word = (
            word
            if word == "same" or apart
            else f"{word} (no interval)"
            if a.low is None or b.low is None
            else "same within interval"
        )
        return MetricRatio(
            name, unit, a.value, b.value, None, None, None, word, reason="no ratio: not both are above zero"
        )
    ratio, low, high = found
    method = "" if low is None else "intervals of both rows"
    sampled = _from_samples(name, times)
    if sampled is not None:
        # The samples give the relative width; the recorded values give the ratio, for batches may differ in size.
        low, high, method = ratio * sampled[0], ratio * sampled[1], "bootstrap of step times"
    if a.value == b.value:
        verdict = "same" if low is None else "same within interval"
    elif low is None or high is None:
        verdict = f"{_word(name, ratio > 1)} (no interval)"
    else:
        verdict = "same within interval" if low <= 1 <= high else _word(name, ratio > 1)
    return MetricRatio(name, unit, a.value, b.value, ratio, low, high, verdict, method)


def _word(name: str, more: bool) -> str:
    kind = kind_of(name)
    if kind in ("size", "amount"):
        return _WORDS[kind][int(more)]
    return _WORDS[kind][int(more != (direction_of(name) == "maximize"))]


def _pooled(side: list[Row], name: str) -> Cell:
    """One cell of several repeats: the median value, and an interval that spans all of theirs."""
    cells = [row.metrics[name] for row in side if name in row.metrics]
    good = sorted((c for c in cells if c.value is not None), key=lambda c: c.value or 0.0)
    if not good:
        return cells[0] if cells else Cell(None, reason="not recorded")
    if len(good) == 1:
        return good[0]
    values = [c.value for c in good if c.value is not None]
    half = len(values) // 2
    middle = values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
    low = min(c.value if c.low is None else c.low for c in good)  # type: ignore[type-var]
    high = max(c.value if c.high is None else c.high for c in good)  # type: ignore[type-var]
    return Cell(middle, low, high, sum(c.count or 1 for c in good), good[0].source, unit=good[0].unit)


def step_times(side: list[Row]) -> dict[str, np.ndarray]:
    """Step times (n,) in seconds by window, the repeats' put together, from the samples.npz beside each record."""
    import numpy as np

    found: dict[str, list[np.ndarray]] = {}
    for row in side:
        path = Path(row.path) / "samples.npz" if row.path else None
        if path is None or not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                match = _STEP_TIMES.match(name)
                if match and arrays[name].size:
                    found.setdefault(match["window"], []).append(np.asarray(arrays[name], dtype=np.float64).ravel())
    return {window: np.concatenate(parts) for window, parts in found.items()}


def _from_samples(name: str, times: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> tuple[float, float] | None:
    """The interval of a metric's ratio relative to the ratio itself, by bootstrap on step times."""
    if name not in SAMPLED:
        return None
    window, power = SAMPLED[name]
    shared = sorted(set(times[0]) & set(times[1]))
    window = window or ("train" if "train" in shared else shared[0] if len(shared) == 1 else None)
    if window is None or window not in shared:
        return None
    from dyno.measure.statistics import ratio_interval

    ratio, low, high = ratio_interval(times[1][window], times[0][window])
    if low is None or high is None or not (ratio > 0 and low > 0 and math.isfinite(high)):
        return None
    return (low / ratio, high / ratio) if power > 0 else (ratio / high, ratio / low)


def _name(row: Row) -> str:
    return row.id or row.recipe_hash or "a row without id"


def _head(pair: Pair) -> list[str]:
    told = [f"{name}: {a or '(unset)'} -> {b or '(unset)'}" for name, (a, b) in pair.differs.items()]
    lines = [
        f"{label}  {', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''}"
        for label, ids in (("A", pair.a), ("B", pair.b))
    ]
    return [*lines, "   " + ("; ".join(told) if told else "the same recipe on both sides")]


def _grid(metrics: list[MetricRatio]) -> str:
    table = [("metric", "A", "B", "B / A", "verdict")]
    for m in metrics:
        ratio = ratio_text(m.ratio, m.low, m.high) if m.ratio is not None else ""
        verdict = f"{m.verdict}: {m.reason}" if m.reason else m.verdict
        table.append((m.name, quantity(m.a, m.unit), quantity(m.b, m.unit), ratio, verdict))
    widths = [max(len(line[i]) for line in table) for i in range(4)]
    lines = []
    for name, a, b, ratio, verdict in table:
        lines.append(
            f"  {name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {ratio:<{widths[3]}}  {verdict}".rstrip()
        )
    return "\n".join(lines)
