"""What the page's script needs, as one JSON document: columns rather than rows, figures rounded to six digits."""

from __future__ import annotations

import json
from typing import Any

from dyno.report import charts
from dyno.report.rows import Row, metric_names, metric_unit, short_name, varied, varied_knobs
from dyno.report.summary import FEW_NOTE, Effect, Summary, effects, untold
from dyno.units import direction_of

MOST_ROWS = 2_500  # keeps the file under 4 MB; the best rows, the baseline and the latest stay
MOST_EFFECTS = 1_500


def shown_rows(summary: Summary) -> list[Row]:
    """The rows that the page carries: all, or, of a very long table, the best, the baseline and the latest."""
    if len(summary.rows) <= MOST_ROWS:
        return summary.rows
    keep = {id(row) for row in [*summary.best, *([summary.baseline] if summary.baseline else [])]}
    left = MOST_ROWS - len(keep)
    rest = sorted((row for row in summary.rows if id(row) not in keep), key=lambda row: row.created, reverse=True)
    keep |= {id(row) for row in rest[:left]}
    return [row for row in summary.rows if id(row) in keep]


def payload(summary: Summary) -> dict[str, Any]:
    """The document: rows column-wise, metrics with values, intervals and notes, effects, specs and themes."""
    rows = shown_rows(summary)
    names, knobs = varied(summary.rows), varied_knobs(summary.rows)
    notes: dict[str, int] = {"": 0}
    goals = dict(summary.objectives)
    metrics = [_column(rows, name, metric_unit(rows, name), goals, notes) for name in metric_names(summary.rows)]
    found = effects(summary.rows, _effect_metrics(summary))
    labels = [short_name(row, names, knobs) for row in rows]
    best = {id(row) for row in summary.best}
    return {
        "ids": [row.id for row in rows],
        "names": labels,
        "status": [row.status for row in rows],
        "reason": [row.reason for row in rows],
        "created": [row.created for row in rows],
        "command": [row.command for row in rows],
        "flags": [[f"{code}: {detail}" if detail else code for code, detail in row.flags] for row in rows],
        "violates": [_violations(summary, row) for row in rows],
        "best": [i for i, row in enumerate(rows) if id(row) in best],
        "baseline": next((i for i, row in enumerate(rows) if row is summary.baseline), None),
        "axes": {name: [row.choices.get(name, "") for row in rows] for name in names},
        "axis_names": summary.axes,
        "knobs": {knob: [row.knobs.get(knob, "") for row in rows] for knob in knobs},
        "metrics": metrics,
        "notes": list(notes),
        "objectives": [[metric, direction] for metric, direction in summary.objectives],
        "limits": [{"metric": a.constraint.metric, "bound": a.bound, "text": a.text} for a in summary.limits],
        "effects": [_effect(e, goals.get(e.metric, direction_of(e.metric))) for e in found[:MOST_EFFECTS]],
        "effects_few": FEW_NOTE,
        "effects_untold": untold(summary.rows, found),
        "specs": {"pareto": charts.pareto(), "intervals": charts.intervals(), "parallel": charts.parallel()},
        "themes": {"light": charts.theme(False), "dark": charts.theme(True)},
    }


def embed(document: Any) -> str:
    """JSON that is safe inside a script element: no character that could end the element or start a comment."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _violations(summary: Summary, row: Row) -> list[str]:
    """Constraints that an ok row breaks or has no figure for; a failed run is neither."""
    if not row.ok:
        return []
    return [a.text for a in summary.violated(row)] + [f"{a.text} (no figure)" for a in summary.unknown(row)]


def _effect_metrics(summary: Summary) -> list[str]:
    """Objectives first, then every metric that differs between ok rows."""
    first = [metric for metric, _ in summary.objectives]
    varying = [m for m in metric_names(summary.ok) if len({row.value(m) for row in summary.ok} - {None}) > 1]
    return list(dict.fromkeys([*first, *varying]))


def _column(rows: list[Row], name: str, unit: str, goals: dict[str, str], notes: dict[str, int]) -> dict[str, Any]:
    """One metric over all rows. `note` indexes the pool of sources (where there is a value) and reasons (where not)."""
    value, low, high, note = [], [], [], []
    for row in rows:
        cell = row.metrics.get(name)
        figure = cell.value if cell is not None and row.ok else None
        if figure is None:
            why = cell.reason if cell is not None and cell.reason else row.reason or row.status
            text = (
                why
                if row.ok and cell is not None
                else f"{row.status}: {why}"
                if not row.ok
                else "not recorded by this run"
            )
            ends: tuple[float | None, float | None] = (None, None)
        else:
            assert cell is not None
            text = " · ".join(filter(None, [cell.source, f"n = {cell.count}" if cell.count else ""]))
            ends = (cell.low, cell.high)
        value.append(_round(figure))
        low.append(_round(ends[0]))
        high.append(_round(ends[1]))
        note.append(notes.setdefault(text, len(notes)))
    out = {"name": name, "unit": unit, "direction": goals.get(name, direction_of(name)), "value": value, "note": note}
    if any(x is not None for x in low):
        out |= {"low": low, "high": high}
    return out


def _effect(effect: Effect, direction: str) -> dict[str, Any]:
    return {
        "axis": effect.axis,
        "option": effect.option,
        "reference": effect.reference,
        "metric": effect.metric,
        "pairs": effect.pairs,
        "few": effect.few,
        "verdict": effect.verdict(direction),
        "ratio": _round(effect.ratio),
        "low": _round(effect.low),
        "high": _round(effect.high),
        "points": [_round(p) for p in effect.points],
    }


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
