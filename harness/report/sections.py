"""The parts of the page that need no script: what won, by how much, how to repeat it, and what to trust."""

from __future__ import annotations

import html as markup
from collections.abc import Iterable
from typing import Any

from dyno.report.payload import shown_rows
from dyno.report.rows import (
    BINDING,
    Row,
    fingerprint_parts,
    metric_names,
    metric_unit,
    short_name,
    unexplained,
    varied,
    varied_knobs,
)
from dyno.report.summary import Summary, gain
from dyno.report.units import quantity, ratio_text

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
    links = "".join(f'<a href="#{key}">{_e(name)}</a>' for key, name in _SECTIONS) if summary.rows else ""
    return (
        f'<header><div class="top"><h1>{_e(title)}</h1>'
        '<button type="button" id="theme" title="Light, dark or as the system says">Theme</button></div>'
        f'<p class="counts">{" ".join(words)}</p><nav>{links}</nav></header>'
    )


def _subjects(summary: Summary, name: str) -> list[str]:
    return sorted({row.choices[name] for row in summary.rows if row.choices.get(name)})[:4]


def banners(summary: Summary) -> str:
    out = []
    parts = unexplained(summary.rows)
    if parts:
        told = ", ".join(f"{len(values)} values of <code>{_e(part)}</code>" for part, values in parts.items())
        out.append(
            f'<p class="banner"><strong>These rows are not all comparable.</strong> Their fingerprints differ: {told}. '
            'Ratios across them mix machines, data or work; see <a href="#environment">Environment</a>.</p>'
        )
    unbound = [c for c in summary.constraints if c.bound is None]
    for constraint in unbound:
        out.append(
            f'<p class="banner">Constraint <code>{_e(constraint.text)}</code> was not applied: {_e(constraint.reason)}.</p>'
        )
    shown = len(shown_rows(summary))
    if shown < len(summary.rows):
        out.append(
            f'<p class="banner">The page carries {shown} of {len(summary.rows)} rows: the best, the baseline and the latest.</p>'
        )
    return "".join(out)


def best(summary: Summary) -> str:
    head = '<section id="best"><h2>Best rows</h2>'
    if not summary.rows:
        return f'{head}<p class="empty">There are no runs yet. <code>dyno run</code> makes the first.</p></section>'
    if not summary.best:
        return f'{head}<p class="empty">{_e(_nothing(summary))}</p></section>'
    names, knobs = varied(summary.rows), varied_knobs(summary.rows)
    columns = best_columns(summary)
    units = {metric: metric_unit(summary.rows, metric) for metric in columns}
    lead = f'<p class="lead">{_lead(summary, names, knobs)}</p>'
    goals = {metric: direction for metric, direction in summary.objectives}
    arrows = {"maximize": "↑", "minimize": "↓"}
    cells = "".join(
        f'<th class="num"><code>{_e(m)}</code>{f" <span class=goal title={goals[m]}>{arrows[goals[m]]}</span>" if m in goals else ""}</th>'
        for m in columns
    )
    lines = []
    listed = [*summary.best, *([summary.baseline] if summary.baseline and summary.baseline not in summary.best else [])]
    for row in listed:
        mark = (
            ' <span class="chip base">baseline</span>'
            if row is summary.baseline and short_name(row, names, knobs) != "baseline"
            else ""
        )
        figures = "".join(_figure(row, summary.baseline, metric, units[metric]) for metric in columns)
        lines.append(
            f'<tr><td class="recipe">{_e(short_name(row, names, knobs))}{mark}</td>{figures}</tr>'
            f'<tr class="command"><td colspan="{len(columns) + 1}">{_command(row)}</td></tr>'
        )
    return f'{head}{lead}{_rules(summary)}<div class="scroll"><table class="best"><thead><tr><th>Recipe</th>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></section>'


def best_columns(summary: Summary) -> list[str]:
    """The objectives, then a few figures that every reader asks for, where a best row has them."""
    names = [metric for metric, _ in summary.objectives]
    have = {m for row in summary.best for m in metric_names([row]) if row.value(m) is not None}
    return list(dict.fromkeys([*names, *(m for m in _ASIDE if m in have)]))[:5]


def _lead(summary: Summary, names: list[str], knobs: list[str]) -> str:
    """The finding in one sentence an objective."""
    said = []
    for metric, direction in summary.objectives:
        sign = -1.0 if direction == "maximize" else 1.0
        row = min(summary.best, key=lambda r: sign * v if (v := r.value(metric)) is not None else float("inf"))  # noqa: B023
        ratio = gain(row, summary.baseline, metric)
        value = quantity(row.value(metric), metric_unit(summary.rows, metric))
        over = (
            f", <strong>{_e(ratio_text(*ratio))}</strong> the baseline" if ratio and row is not summary.baseline else ""
        )
        who = "the baseline itself" if row is summary.baseline else short_name(row, names, knobs)
        said.append(
            f"{'Highest' if direction == 'maximize' else 'Lowest'} <code>{_e(metric)}</code>: {_e(value)}{over} ({_e(who)})."
        )
    return "<br>".join(said)


def _rules(summary: Summary) -> str:
    told = [f"<code>{_e(c.text)}</code>" for c in summary.constraints if c.bound is not None]
    if len(summary.objectives) > 1:
        goals = " and ".join(f"{metric} {direction}d" for metric, direction in summary.objectives)
        what = f"On the Pareto front of {goals}"
    else:
        what = "Ranked by " + "".join(f"{metric}, {direction}d" for metric, direction in summary.objectives)
    held = f"; constraints {', '.join(told)}" if told else ""
    note = (
        "" if summary.baseline else " No single row has every axis plain, so there is no baseline to take ratios over."
    )
    return f'<p class="note">{_e(what)}{held}.{note}</p>'


def _nothing(summary: Summary) -> str:
    if not summary.ok:
        return "No run ended well: every row below carries its reason."
    if summary.constraints:
        return f"None of the {len(summary.ok)} runs that ended well satisfies every constraint and has every objective."
    return "No run that ended well has a figure for every objective."


def _figure(row: Row, baseline: Row | None, metric: str, unit: str) -> str:
    cell = row.metrics.get(metric)
    if cell is None or row.value(metric) is None:
        reason = (cell.reason if cell else "") or row.reason or "not recorded by this run"
        return f'<td class="num none" title="{_e(reason)}"></td>'
    ratio = gain(row, baseline, metric) if row is not baseline else None
    under = f'<span class="ratio">{_e(ratio_text(*ratio))}</span>' if ratio else ""
    ends = f"{quantity(cell.low, unit)} to {quantity(cell.high, unit)}" if cell.low is not None else "no interval"
    return f'<td class="num" title="{_e(ends)}">{_e(quantity(cell.value, unit))}{under}</td>'


def _command(row: Row) -> str:
    return f'<code class="cmd">{_e(row.command)}</code><button type="button" class="copy" data-copy="{_e(row.command)}">Copy</button>'


def environment(summary: Summary) -> str:
    out = ['<section id="environment"><h2>Environment and validity</h2>', _flags(summary), _fingerprints(summary)]
    groups: dict[tuple[tuple[str, str], ...], int] = {}
    for row in summary.rows:
        if row.environment:
            key = tuple(sorted(_flat(row.environment)))
            groups[key] = groups.get(key, 0) + 1
    shown = sorted(groups.items(), key=lambda item: -item[1])[:4]
    if shown:
        tables = [dict(key) for key, _ in shown]
        head = "".join(f'<th class="num">{n} row{"s" if n != 1 else ""}</th>' for _, n in shown)
        lines = []
        for key in sorted({key for table in tables for key in table}):
            values = [table.get(key, "") for table in tables]
            mark = ' class="differs"' if len(set(values)) > 1 else ""
            lines.append(f"<tr{mark}><th>{_e(key)}</th>{''.join(f'<td>{_e(v)}</td>' for v in values)}</tr>")
        more = (
            f'<p class="note">{len(groups) - len(shown)} more environments are in the records.</p>'
            if len(groups) > len(shown)
            else ""
        )
        out.append(
            f'<h3>Environment</h3><div class="scroll"><table class="plain"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>{more}'
        )
    elif summary.rows:
        out.append('<p class="empty">These rows carry no environment.</p>')
    return "".join(out) + "</section>" if summary.rows else ""


def _flags(summary: Summary) -> str:
    found: dict[str, list[str]] = {}
    for row in summary.rows:
        for code, detail in row.flags:
            found.setdefault(code, []).append(detail)
    if not found:
        return '<p class="note">No validity flag was raised.</p>' if summary.rows else ""
    lines = "".join(
        f'<tr><th>{_e(code)}</th><td class="num">{len(details)}</td><td>{_e(next((d for d in details if d), ""))}</td></tr>'
        for code, details in sorted(found.items())
    )
    return f'<h3>Validity flags</h3><div class="scroll"><table class="plain"><thead><tr><th>Flag</th><th class="num">Rows</th><th>First detail</th></tr></thead><tbody>{lines}</tbody></table></div>'


def _fingerprints(summary: Summary) -> str:
    parts = fingerprint_parts(summary.rows)
    lines = []
    for part, values in parts.items():
        mark = ' class="differs"' if len(values) > 1 else ""
        listed = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        told = "<br>".join(
            f"{_e(value)} <span class=unit>{n} row{'s' if n != 1 else ''}</span>" for value, n in listed[:5]
        )
        told += f"<br>and {len(listed) - 5} more" if len(listed) > 5 else ""
        binding = "must agree" if part in BINDING else "told"
        lines.append(f"<tr{mark}><th>{_e(part)}</th><td>{told}</td><td class=ratio>{binding}</td></tr>")
    if not lines:
        return ""
    return (
        f'<h3>Fingerprints</h3><div class="scroll"><table class="plain"><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        elif item not in (None, "", []):
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            yield f"{prefix}{key}", text if len(text) <= 400 else f"{text[:397]}..."


PLACES = {
    "pareto": (
        '<section id="pareto"><h2>Trade-off</h2><div class="controls" id="pareto-controls"></div>'
        '<div class="plot" id="pareto-plot"></div><div id="pareto-front"></div></section>'
    ),
    "effects": (
        '<section id="effects"><h2>Effect of each axis</h2><div class="controls" id="effects-controls"></div>'
        '<p class="note">Pairs of runs in which only this axis differs: the ratio of the metric, option over reference. '
        "Dot and bar: geometric mean and its 95% interval; ticks: single pairs.</p>"
        '<div class="scroll" id="effects-table"></div></section>'
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
