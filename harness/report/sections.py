"""The parts of the page that need no script: what won, by how much, and how to repeat it."""

from __future__ import annotations

import html as markup
from typing import Any

from dyno.report.payload import shown_rows
from dyno.report.rows import (
    Row,
    metric_names,
    metric_unit,
    short_name,
    unexplained,
    varied,
    varied_knobs,
)
from dyno.report.summary import Summary, first_by, gain
from dyno.units import quantity, ratio_text

_SECTIONS = (
    ("best", "Best"),
    ("pareto", "Trade-off"),
    ("effects", "Effect of each axis"),
    ("parallel", "All choices"),
    ("energy", "Energy and memory"),
    ("runs", "Runs"),
    ("environment", "Environment"),
)
# Columns of the table of best rows beside the objectives, where they were measured.
_ASIDE = ("tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", "validation_loss", "energy_j_per_token")


def header(summary: Summary, title: str) -> str:
    counts = summary.counts()
    words = [f"<span><strong>{len(summary.rows)}</strong> run{'s' if len(summary.rows) != 1 else ''}</span>"]
    words += [f'<span class="chip {_e(s)}">{n} {_e(s.replace("_", " "))}</span>' for s, n in counts.items() if n]
    days = sorted({row.created[:10] for row in summary.rows if row.created})
    if days:
        words.append(f"<span>{_e(days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}')}</span>")
    words += [
        f"<span>{name} {_e('/'.join(found))}</span>"
        for name in ("model", "workload")
        if (found := _subjects(summary, name))
    ]
    links = "".join(f'<a href="#{key}">{_e(name)}</a>' for key, name in _SECTIONS)
    links = f"<nav>{links}</nav>" if summary.rows else ""
    return (
        f'<header><div class="top"><h1>{_e(title)}</h1>'
        '<button type="button" id="theme" title="Light, dark or as the system says">Theme</button></div>'
        f'<p class="counts">{" ".join(words)}</p>{links}</header>'
    )


def _subjects(summary: Summary, name: str) -> list[str]:
    return sorted({row.choices[name] for row in summary.rows if row.choices.get(name)})[:4]


def banners(summary: Summary) -> str:
    """What a reader must know before reading on: rows that do not compare, constraints not applied, rows left out."""
    said = []
    parts = unexplained(summary.rows)
    if parts:
        told = ", ".join(f"{len(values)} values of <code>{_e(part)}</code>" for part, values in parts.items())
        said.append(
            f"<strong>These rows are not all comparable.</strong> Their fingerprints differ: {told}. "
            'Ratios across them mix machines, data or work; see <a href="#environment">Environment</a>.'
        )
    for limit in summary.limits:
        if limit.bound is None:
            said.append(f"Constraint <code>{_e(limit.text)}</code> was not applied: {_e(limit.reason)}.")
    shown, every = len(shown_rows(summary)), len(summary.rows)
    if shown < every:
        said.append(f"The page carries {shown} of {every} rows: the best, the baseline and the latest.")
    return "".join(f'<p class="banner">{text}</p>' for text in said)


def best(summary: Summary) -> str:
    """The best rows over the objectives, their gains over the baseline, and the command that repeats each."""
    if not summary.rows:
        return _section('<p class="empty">There are no runs yet. <code>dyno run</code> makes the first.</p>')
    if not summary.best:
        return _section(f'<p class="empty">{_e(_nothing(summary))}</p>')
    names, knobs = varied(summary.rows), varied_knobs(summary.rows)
    columns, goals = best_columns(summary), dict(summary.objectives)
    head = "<th>Recipe</th>" + "".join(_heading(metric, goals.get(metric)) for metric in columns)
    lines = []
    for row in listed(summary):
        name = short_name(row, names, knobs)
        chip = ' <span class="chip base">baseline</span>' if row is summary.baseline and name != "baseline" else ""
        figures = "".join(_figure(summary, row, metric) for metric in columns)
        lines.append(f'<tr><td class="recipe">{_e(name)}{chip}</td>{figures}</tr>')
        lines.append(f'<tr class="command"><td colspan="{len(columns) + 1}">{_command(row)}</td></tr>')
    lead = f'<p class="lead">{_lead(summary, names, knobs)}</p>{_rules(summary)}'
    table = f'<table class="best"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return _section(f'{lead}<div class="scroll">{table}</div>')


def listed(summary: Summary) -> list[Row]:
    """The best rows, and the baseline below them where it is none of them."""
    extra = [summary.baseline] if summary.baseline is not None and summary.baseline not in summary.best else []
    return [*summary.best, *extra]


def _section(body: str) -> str:
    return f'<section id="best"><h2>Best rows</h2>{body}</section>'


def _heading(metric: str, goal: str | None) -> str:
    arrow = {"maximize": "↑", "minimize": "↓"}.get(goal or "")
    mark = f' <span class="goal" title="{goal}">{arrow}</span>' if arrow else ""
    return f'<th class="num"><code>{_e(metric)}</code>{mark}</th>'


def best_columns(summary: Summary) -> list[str]:
    """The objectives, then a few figures that every reader asks for, where a best row has them."""
    names = [metric for metric, _ in summary.objectives]
    have = {m for row in summary.best for m in metric_names([row]) if row.value(m) is not None}
    return list(dict.fromkeys([*names, *(m for m in _ASIDE if m in have)]))[:5]


def _lead(summary: Summary, names: list[str], knobs: list[str]) -> str:
    """The finding in one sentence an objective."""
    said = []
    for metric, direction in summary.objectives:
        row = first_by(summary.best, metric, direction)
        value = row.value(metric) if row else None
        if row is None or value is None:
            continue
        ratio = gain(row, summary.baseline, metric) if row is not summary.baseline else None
        over = f", <strong>{_e(ratio_text(*ratio))}</strong> the baseline" if ratio else ""
        who = "the baseline itself" if row is summary.baseline else short_name(row, names, knobs)
        most = "Highest" if direction == "maximize" else "Lowest"
        figure = quantity(value, metric_unit(summary.rows, metric))
        said.append(f"{most} <code>{_e(metric)}</code>: {_e(figure)}{over} ({_e(who)}).")
    return "<br>".join(said)


def _rules(summary: Summary) -> str:
    """Which rows were picked, and how."""
    goals = " and ".join(f"{metric} {direction}d" for metric, direction in summary.objectives)
    what = f"On the Pareto front of {goals}" if len(summary.objectives) > 1 else f"Ranked by {goals}"
    told = [f"<code>{_e(limit.text)}</code>" for limit in summary.limits if limit.bound is not None]
    held = f"; constraints {', '.join(told)}" if told else ""
    missing = "" if summary.baseline else " No row has every axis plain: there is no baseline to take ratios over."
    return f'<p class="note">{_e(what)}{held}.{missing}</p>'


def _nothing(summary: Summary) -> str:
    if not summary.ok:
        return "No run ended well: every row below carries its reason."
    if summary.limits:
        return f"None of the {len(summary.ok)} runs that ended well satisfies every constraint and has every objective."
    return "No run that ended well has a figure for every objective."


def _figure(summary: Summary, row: Row, metric: str) -> str:
    cell, unit = row.metrics.get(metric), metric_unit(summary.rows, metric)
    if cell is None or row.value(metric) is None:
        reason = (cell.reason if cell else "") or row.reason or "not recorded by this run"
        return f'<td class="num none" title="{_e(reason)}"></td>'
    ratio = gain(row, summary.baseline, metric) if row is not summary.baseline else None
    under = f'<span class="ratio">{_e(ratio_text(*ratio))}</span>' if ratio else ""
    ends = f"{quantity(cell.low, unit)} to {quantity(cell.high, unit)}" if cell.low is not None else "no interval"
    return f'<td class="num" title="{_e(ends)}">{_e(quantity(cell.value, unit))}{under}</td>'


def _command(row: Row) -> str:
    button = f'<button type="button" class="copy" data-copy="{_e(row.command)}">Copy</button>'
    return f'<code class="cmd">{_e(row.command)}</code>{button}'


PLACES = {
    "pareto": (
        '<section id="pareto"><h2>Trade-off</h2><div class="controls" id="pareto-controls"></div>'
        '<div class="plot" id="pareto-plot"></div><div id="pareto-front"></div></section>'
    ),
    "effects": (
        '<section id="effects"><h2>Effect of each axis</h2><div class="controls" id="effects-controls"></div>'
        '<p class="note">Pairs of runs in which only this axis differs: the ratio of the metric, option over '
        "reference. Dot and bar: geometric mean and its 95% interval; ticks: single pairs.</p>"
        '<div class="scroll" id="effects-table"></div><div id="effects-notes"></div></section>'
    ),
    "parallel": (
        '<section id="parallel"><h2>All choices at once</h2>'
        '<p class="note">A line a run; figures are turned so that better is up. Colour follows the first objective.</p>'
        '<div class="plot" id="parallel-plot"></div></section>'
    ),
    "energy": (
        '<section id="energy"><h2>Energy and memory</h2><div class="columns">'
        '<div><div class="controls" id="energy-controls"></div><div class="plot" id="energy-plot"></div></div>'
        '<div><div class="controls" id="memory-controls"></div><div class="plot" id="memory-plot"></div></div>'
        "</div></section>"
    ),
    "runs": (
        '<section id="runs"><h2>Runs</h2><div class="controls" id="runs-controls"></div>'
        '<div class="scroll tall" id="runs-table"><noscript>The table of runs needs JavaScript.</noscript></div>'
        '<p class="note" id="runs-note"></p></section>'
    ),
}


def _e(text: Any) -> str:
    return markup.escape(str(text), quote=True)
