"""The plots of a Markdown report as SVG: drawn by Altair, rendered by vl-convert, no browser and no network."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import altair as alt

from dyno.report.charts import theme
from dyno.report.rows import Row, metric_unit, short_name, varied, varied_knobs
from dyno.report.summary import Effect, Summary, front
from dyno.units import prefix

_WIDTH, _HEIGHT = 640, 360
_MOST_EFFECTS = 20
_MOST_LETTERS = 64
_NARROWEST = 1.02  # a scale of ratios reaches at least so far from 1, so that noise does not look like an effect


@dataclass(frozen=True)
class Figure:
    """One plot: `name` ends its file's name, `alt` says in words what it shows."""

    name: str
    alt: str
    svg: str


def tradeoff(summary: Summary) -> Figure | None:
    """The first two objectives against each other, with the front; None where no run has both."""
    if len(summary.objectives) < 2:
        return None
    (y, _), (x, direction) = summary.objectives[:2]
    rows = [row for row in summary.ok if row.value(x) is not None and row.value(y) is not None]
    if not rows:
        return None
    kept = [row for row in rows if not summary.violated(row) and not summary.unknown(row)]
    best = front(kept, summary.objectives[:2])
    axis_x, axis_y = _Axis(alt.X, "x", x, summary, rows), _Axis(alt.Y, "y", y, summary, rows)
    layers = [*axis_x.limits(summary, angle=90, dy=-7), *axis_y.limits(summary, dy=-5)]
    groups = {
        "infeasible": [row for row in rows if row not in kept and row is not summary.baseline],
        "others": [row for row in kept if row not in best and row is not summary.baseline],
        "front": best,
        "baseline": [row for row in rows if row is summary.baseline],
    }
    names, knobs = varied(summary.rows), varied_knobs(summary.rows)
    for style, members in groups.items():
        points = [
            axis_x.figures(row) | axis_y.figures(row) | {"text": _drawable(short_name(row, names, knobs))}
            for row in members
        ]
        base = alt.Chart(alt.Data(values=sorted(points, key=lambda point: point["x"])))
        placed = base.encode(axis_x.at("x"), axis_y.at("y"))
        layers.append(base.mark_rule(style="interval").encode(axis_x.at("xl"), axis_y.at("y"), x2="xh:Q"))
        layers.append(base.mark_rule(style="interval").encode(axis_x.at("x"), axis_y.at("yl"), y2="yh:Q"))
        if style == "front":
            step: Any = "step-after" if direction == "minimize" else "step-before"
            layers.append(placed.mark_line(style="front_line", interpolate=step))
        shape, size = {"baseline": ("diamond", 150), "front": ("circle", 90)}.get(style, ("circle", 48))
        layers.append(placed.mark_point(style=style, shape=shape, size=size))
        if style in ("front", "baseline"):
            layers += [
                placed.mark_text(style=text, dx=9, dy=-9, align="left").encode(text="text:N")
                for text in ("halo", "label")
            ]
    chart = alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)
    return Figure("tradeoff", f"{y} against {x}: {len(rows)} runs, {len(best)} on the Pareto front", _svg(chart))


def axis_effects(summary: Summary, found: list[Effect]) -> Figure | None:
    """What each option does to each objective, a panel an objective; None where no pair of runs tells."""
    panels = []
    for metric, direction in summary.objectives:
        told = [effect for effect in found if effect.metric == metric][:_MOST_EFFECTS]
        if told:
            better = "lower" if direction == "minimize" else "higher"
            panels.append(_panel(told, f"{_drawable(metric)}, ratio ({better} is better)", direction))
    if not panels:
        return None
    names = " and ".join(metric for metric, _ in summary.objectives)
    return Figure("effects", f"Effect of each axis on {names}", _svg(alt.vconcat(*panels)))


def _panel(told: list[Effect], title: str, direction: str) -> Any:
    dots: list[dict[str, Any]] = [
        {
            "name": _drawable(f"{e.axis}: {e.option} over {e.reference} ({e.pairs} pair{'s' if e.pairs > 1 else ''})"),
            "ratio": e.ratio,
            "low": e.low or e.ratio,
            "high": e.high or e.ratio,
            "few": e.few,
            "verdict": e.verdict(direction),
        }
        for e in told
    ]
    reach = [1 / _NARROWEST, _NARROWEST, *(dot[end] for dot in dots for end in ("low", "high"))]
    scale = alt.Scale(type="log", nice=False, padding=12, domain=[min(reach), max(reach)])
    across: dict[str, Any] = {"type": "quantitative", "title": title, "scale": scale, "axis": alt.Axis(tickCount=5)}
    colour = alt.Color("verdict:N", legend=None).scale(
        domain=["better", "worse", "unsure"], range=["#23733a", "#b3261e", "#6b6c66"]
    )
    one = alt.Chart(alt.Data(values=[{"ratio": 1}])).mark_rule(style="pole").encode(alt.X("ratio", **across))
    base = alt.Chart(alt.Data(values=dots), width=_WIDTH - 200, height=alt.Step(22)).encode(
        alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=340))
    )
    bars = base.mark_rule(strokeWidth=2).encode(alt.X("low", **across), colour, x2="high:Q")
    hollow = alt.condition("datum.few", alt.value("#ffffff"), colour)
    points = base.mark_point(size=70, opacity=1, strokeWidth=1.6)
    return alt.layer(one, bars, points.encode(alt.X("ratio", **across), stroke=colour, fill=hollow))


class _Axis:
    """One metric along x or y, in the prefix under which its middle figure reads as 1 to 999."""

    def __init__(self, channel: Any, letter: str, metric: str, summary: Summary, rows: list[Row]) -> None:
        self.channel, self.letter, self.metric = channel, letter, metric
        values = sorted(abs(value) for row in rows if (value := row.value(metric)))
        unit = metric_unit(summary.rows, metric)
        self.factor, mark = prefix(values[len(values) // 2], unit) if values else (1.0, "")
        better = "lower" if dict(summary.objectives)[metric] == "minimize" else "higher"
        self.title = _drawable(f"{metric}{f' ({mark}{unit})' if unit else ''}, {better} is better")

    def at(self, field: str) -> Any:
        return self.channel(field, type="quantitative", title=self.title, scale=alt.Scale(zero=False, padding=16))

    def figures(self, row: Row) -> dict[str, Any]:
        """The value and its interval, which is the value where there is none."""
        cell = row.metrics[self.metric]
        ends = {"": cell.value, "l": cell.low, "h": cell.high}
        return {
            self.letter + end: (cell.value if value is None else value) / self.factor  # type: ignore[operator]
            for end, value in ends.items()
        }

    def limits(self, summary: Summary, **turned: Any) -> list[alt.Chart]:
        """A line and its text for each constraint on this metric."""
        drawn = [
            {self.letter: limit.bound / self.factor, "text": _drawable(limit.text)}
            for limit in summary.limits
            if limit.constraint.metric == self.metric and limit.bound is not None
        ]
        base = alt.Chart(alt.Data(values=drawn)).encode(self.at(self.letter))
        start = alt.YValue(4) if self.letter == "x" else alt.XValue(4)
        return [
            base.mark_rule(style="limit"),
            base.mark_text(style="limit_text", **turned).encode(start, text="text:N"),
        ]


def _drawable(text: str) -> str:
    """Text that XML can hold, cut to a length that a plot has room for."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= _MOST_LETTERS else f"{shown[: _MOST_LETTERS - 1]}…"


def _svg(chart: Any) -> str:
    """Light, on white: the page that shows the file may be dark."""
    buffer = io.StringIO()
    chart.properties(background="white", padding=12, config=theme(dark=False)).save(buffer, format="svg")
    return buffer.getvalue()
