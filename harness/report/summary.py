"""What a set of rows says: the baseline, the constraints, the best rows and the effect of every axis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations

from dyno.constraints import Constraint, constraint
from dyno.errors import UserError
from dyno.report.rows import (
    Cell,
    Row,
    axes_of,
    baseline_option,
    comparable,
    default_objectives,
    metric_names,
    varied,
)

Objective = tuple[str, str]
FEW = 3  # pairs under which an effect is shown but not judged
FEW_NOTE = (
    f"Fewer than {FEW} pairs (hollow): what these runs did, not yet what the option does. The interval of a single pair "
    "holds only the noise within its two runs."
)
# Two-sided 95% points of Student's t for 1 to 30 degrees of freedom; 1.96 beyond.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Limit:
    """A constraint and its bound; None, with the reason, where it hangs on a baseline figure that is not there."""

    constraint: Constraint
    bound: float | None
    reason: str = ""

    @property
    def text(self) -> str:
        return self.constraint.text

    def holds(self, row: Row) -> bool | None:
        """Whether a row satisfies it; None where that cannot be told."""
        value = row.value(self.constraint.metric)
        if value is None or self.bound is None:
            return None
        return self.constraint.violation(value, self.bound) <= 0


@dataclass(frozen=True)
class Effect:
    """The ratio of a metric, option over reference, in pairs of rows where only this axis differs."""

    axis: str
    option: str
    reference: str
    metric: str
    pairs: int
    ratio: float
    low: float | None
    high: float | None
    points: list[float] = field(default_factory=list)

    @property
    def few(self) -> bool:
        return self.pairs < FEW

    def verdict(self, direction: str) -> str:
        """'better' or 'worse' where the interval leaves out 1 and the pairs are enough; else 'unsure'."""
        if self.few or self.low is None or self.high is None or self.low <= 1 <= self.high:
            return "unsure"
        return "better" if (self.ratio > 1) == (direction == "maximize") else "worse"


@dataclass
class Summary:
    """Rows with everything derived from them that both pages show."""

    rows: list[Row]
    objectives: list[Objective]
    limits: list[Limit]
    baseline: Row | None
    best: list[Row]
    axes: list[str]

    @property
    def ok(self) -> list[Row]:
        return [row for row in self.rows if row.ok]

    def violated(self, row: Row) -> list[Limit]:
        return [limit for limit in self.limits if limit.holds(row) is False]

    def unknown(self, row: Row) -> list[Limit]:
        """Limits with a bound that this row has no figure for; one without a bound binds nobody."""
        return [limit for limit in self.limits if limit.bound is not None and limit.holds(row) is None]

    def counts(self) -> dict[str, int]:
        """How many rows ended in each status, ok first."""
        out = {"ok": len(self.ok)}
        for row in self.rows:
            if not row.ok:
                out[row.status] = out.get(row.status, 0) + 1
        return out


def summarise(
    rows: list[Row],
    constraints: list[str] | None = None,
    objectives: list[Objective] | None = None,
    baseline_id: str | None = None,
    most: int = 5,
) -> Summary:
    """Find the baseline, bind the constraints to it and pick the best rows.

    Raises:
        UserError: an objective with a direction that is none, a constraint that cannot be read, or a baseline id that
            no row has.
    """
    for metric, direction in objectives or ():
        if direction not in ("minimize", "maximize"):
            raise UserError(f"objective {metric}: direction {direction!r} is neither minimize nor maximize")
    baseline = _baseline(rows, baseline_id)
    limits = [limit_of(text, baseline) for text in constraints or ()]
    chosen = list(objectives or default_objectives(rows))
    summary = Summary(rows, chosen, limits, baseline, [], [n for n in varied(rows) if n in _axes(rows)])
    summary.best = _best(summary, most)
    return summary


def limit_of(text: str, baseline: Row | None) -> Limit:
    """A constraint from its text, bound to what the baseline row measured."""
    asked = constraint(text)
    figure = baseline.value(asked.metric) if baseline is not None else None
    bound = asked.bound({} if figure is None else {asked.metric: figure})
    absent = "there is no baseline row" if baseline is None else f"the baseline has no {asked.metric}"
    return Limit(asked, bound, absent if bound is None else "")


def front(rows: list[Row], objectives: list[Objective]) -> list[Row]:
    """The rows that no other row beats: at least as good in every objective and better in one."""
    scored = []
    for row in rows:
        values = [row.value(metric) for metric, _ in objectives]
        if all(v is not None for v in values):
            signs = [-1.0 if direction == "maximize" else 1.0 for _, direction in objectives]
            scored.append((tuple(s * v for s, v in zip(signs, values, strict=True) if v is not None), row))
    scored.sort(key=lambda pair: pair[0])
    kept: list[tuple[tuple[float, ...], Row]] = []
    for score, row in scored:  # sorted: whatever dominates a row stands before it
        if not any(other != score and all(x <= y for x, y in zip(other, score, strict=True)) for other, _ in kept):
            kept.append((score, row))
    return [row for _, row in kept]


def gain(row: Row, baseline: Row | None, metric: str) -> tuple[float, float | None, float | None] | None:
    """The ratio of a metric over the baseline's with its 95% interval; None where it would mean nothing."""
    if baseline is None or not comparable(row, baseline):
        return None
    return cell_ratio(baseline.metrics.get(metric), row.metrics.get(metric) if row.ok else None)


def cell_ratio(a: Cell | None, b: Cell | None) -> tuple[float, float | None, float | None] | None:
    """b / a with an interval from the intervals of both, taken as independent (MOVER on the log scale).

    Source: Donner and Zou, "Closed-form confidence intervals for functions of the normal mean and standard deviation",
    Statistical Methods in Medical Research 21 (2012).
    """
    if a is None or b is None or a.value is None or b.value is None or a.value <= 0 or b.value <= 0:
        return None
    ratio = b.value / a.value
    ends = (a.low, a.high, b.low, b.high)
    if any(end is None or end <= 0 for end in ends):
        return ratio, None, None
    a_down, a_up = math.log(a.value / a.low), math.log(a.high / a.value)  # type: ignore[operator]
    b_down, b_up = math.log(b.value / b.low), math.log(b.high / b.value)  # type: ignore[operator]
    return ratio, ratio * math.exp(-math.hypot(b_down, a_up)), ratio * math.exp(math.hypot(b_up, a_down))


def effects(rows: list[Row], metrics: list[str] | None = None, most_points: int = 40) -> list[Effect]:
    """What each option of each axis does to each metric, all else equal.

    Rows are paired where every other choice and every knob of every other axis agree; repeats of one recipe count once,
    by their median. The ratio is the geometric mean over pairs with Student's interval on the log scale; a single pair
    has the interval of its two rows.
    """
    ok = [row for row in rows if row.ok]
    names = metrics if metrics is not None else metric_names(ok)
    out: list[Effect] = []
    for axis in varied(ok):
        if axis not in _axes(ok):
            continue
        groups: dict[tuple[tuple[str, str], ...], dict[str, list[Row]]] = {}
        for row in ok:
            rest = {k: v for k, v in row.choices.items() if k != axis}
            rest |= {k: v for k, v in row.knobs.items() if k.partition(".")[0] != axis}
            rest |= {f"fingerprint {k}": row.fingerprint.get(k, "") for k in ("machine", "device", "workload")}
            groups.setdefault(tuple(sorted(rest.items())), {}).setdefault(row.choices.get(axis, ""), []).append(row)
        options = sorted({option for group in groups.values() for option in group} - {""})
        for reference, option in _contrasts(axis, options):
            pairs = [(g[reference], g[option]) for g in groups.values() if reference in g and option in g]
            for metric in names if pairs else ():
                effect = _effect(axis, option, reference, metric, pairs, most_points)
                if effect is not None:
                    out.append(effect)
    return out


def untold(rows: list[Row], found: list[Effect]) -> str:
    """A sentence on the axes that were varied but never alone; empty where there is none."""
    ok = [row for row in rows if row.ok]
    silent = [axis for axis in varied(ok) if axis in _axes(ok) and axis not in {effect.axis for effect in found}]
    told = f"No two runs differ in one of these alone, so its effect cannot be told: {', '.join(silent)}."
    return told if silent else ""


def _contrasts(axis: str, options: list[str]) -> list[tuple[str, str]]:
    """Every option against the axis's baseline; against each other where the baseline was not run."""
    base = baseline_option(axis)
    return [(base, o) for o in options if o != base] if base in options else list(combinations(options, 2))


def _effect(
    axis: str, option: str, reference: str, metric: str, pairs: list[tuple[list[Row], list[Row]]], most: int
) -> Effect | None:
    ratios = [r for a, b in pairs if (r := cell_ratio(_median(a, metric), _median(b, metric))) is not None]
    if not ratios:
        return None
    logs = [math.log(r[0]) for r in ratios]
    n, mean = len(logs), sum(logs) / len(logs)
    low, high = ratios[0][1], ratios[0][2]
    if n > 1:
        deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / (n - 1))
        half = (_T95[n - 2] if n - 2 < len(_T95) else 1.96) * deviation / math.sqrt(n)
        low, high = math.exp(mean - half), math.exp(mean + half)
    points = sorted(r[0] for r in ratios)
    step = max(1, math.ceil(n / most))
    return Effect(axis, option, reference, metric, n, math.exp(mean), low, high, points[::step])


def _median(rows: list[Row], metric: str) -> Cell | None:
    """The middle row's cell: repeats of one recipe are one observation of a pair."""
    cells = [row.metrics[metric] for row in rows if metric in row.metrics and row.metrics[metric].value is not None]
    cells.sort(key=lambda cell: cell.value or 0.0)
    return cells[(len(cells) - 1) // 2] if cells else None


def _baseline(rows: list[Row], baseline_id: str | None) -> Row | None:
    if baseline_id is not None:
        found = next((row for row in rows if row.id == baseline_id), None)
        if found is None:
            raise UserError(f"baseline {baseline_id!r} is in none of the {len(rows)} rows; name the id of one of them")
        return found
    names = varied(rows)
    if "model" in names or "workload" in names:
        return None  # each has a baseline of its own: the caller has to say which
    searched = [name for name in names if name in _axes(rows)]
    plain = [row for row in rows if axes_of(row) and _plain(row, searched or list(axes_of(row)))]
    return next((row for row in plain if row.ok), plain[0] if plain else None)


def _plain(row: Row, axes: list[str]) -> bool:
    return all(row.choices.get(axis, baseline_option(axis)) == baseline_option(axis) for axis in axes)


def _best(summary: Summary, most: int) -> list[Row]:
    """The front over the objectives among feasible rows, best in the first objective first; one objective: the top.

    Of a longer front too the best row of every objective is among them: it is what a reader is told first.
    """
    feasible = [row for row in summary.ok if not summary.violated(row) and not summary.unknown(row)]
    if not summary.objectives:
        return []
    metric, direction = summary.objectives[0]
    sign = -1.0 if direction == "maximize" else 1.0
    pool = front(feasible, summary.objectives) if len(summary.objectives) > 1 else feasible
    scored = [(sign * value, row) for row in pool if (value := row.value(metric)) is not None]
    ranked = [row for _, row in sorted(scored, key=lambda pair: pair[0])]
    unique = {row.recipe_hash or row.id: row for row in reversed(ranked)}
    kept = [row for row in ranked if unique[row.recipe_hash or row.id] is row]
    firsts = {id(row) for metric, way in summary.objectives if (row := first_by(ranked, metric, way))}
    others = [row for row in kept if id(row) not in firsts][: max(0, most - len(firsts))]
    chosen = firsts | {id(row) for row in others}
    return [row for row in ranked if id(row) in chosen]


def first_by(rows: list[Row], metric: str, direction: str) -> Row | None:
    """The row with the best value of a metric; None where no row has one."""
    scored = [(value, row) for row in rows if (value := row.value(metric)) is not None]
    return (max if direction == "maximize" else min)(scored, key=lambda pair: pair[0])[1] if scored else None


def _axes(rows: list[Row]) -> set[str]:
    return {axis for row in rows for axis in axes_of(row)}
