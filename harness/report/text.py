"""Markdown for a pull request: what won and how to repeat it, what failed and why, and where it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dyno.report.rows import Row, fingerprint_parts, metric_unit, rows, short_name, unexplained, varied, varied_knobs
from dyno.report.sections import best_columns, listed
from dyno.report.summary import FEW_NOTE, Objective, Summary, effects, gain, summarise, untold
from dyno.units import quantity, ratio_text

if TYPE_CHECKING:
    import pandas as pd

_MOST_FAILURES = 20
_KEY = "Blue: the Pareto front; orange diamond: the baseline; hollow: breaks a constraint. Bars are 95% intervals."


def markdown(
    frame: pd.DataFrame | None,
    records: Iterable[dict[str, Any]] | None,
    *,
    title: str = "Dyno report",
    constraints: list[str] | None = None,
    objectives: list[Objective] | None = None,
    baseline_id: str | None = None,
) -> str:
    """The report of a table as GitHub Markdown. Arguments and errors as `dyno.report.html`."""
    return page(summarise(rows(frame, records), constraints, objectives, baseline_id), title)


def page(summary: Summary, title: str, pictures: Mapping[str, str] | None = None) -> str:
    """The whole document; `pictures` maps the name of a figure (see figures.py) to the Markdown that shows it."""
    names, knobs = varied(summary.rows), varied_knobs(summary.rows)
    counts = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in summary.counts().items() if n)
    parts = [f"## {_cell(title)}", f"{len(summary.rows)} runs{': ' + counts if counts else ''}."]
    differing = unexplained(summary.rows)
    if differing:
        parts.append(f"> **These rows are not all comparable**: their fingerprints differ in {', '.join(differing)}.")
    for limit in summary.limits:
        state = f" (not applied: {_cell(limit.reason)})" if limit.bound is None else ""
        parts.append(f"Constraint: {_code(limit.text)}{state}")
    shown = pictures or {}
    parts += _best(summary, names, knobs)
    parts += ["### Trade-off", shown["tradeoff"], _KEY] if "tradeoff" in shown else []
    parts += _effects(summary, shown.get("effects"))
    parts += _failures(summary, names, knobs)
    parts += _environment(summary)
    return "\n\n".join(parts) + "\n"


def picture(alt: str, file: str) -> str:
    """An image by its relative file name."""
    return f"![{_cell(alt)}]({quote(file)})"


def _effects(summary: Summary, shown: str | None) -> list[str]:
    """What each option did to the objectives; nothing where no axis was varied."""
    metrics = [metric for metric, _ in summary.objectives]
    found = effects(summary.rows, metrics)
    silent = untold(summary.rows, found)
    parts = ["### Effect of each axis"] if found or silent else []
    if found:
        cells: dict[tuple[str, str, str], dict[str, str]] = {}
        for e in found:
            told = f"{ratio_text(e.ratio, e.low, e.high)}, {e.pairs} pair{'s' if e.pairs > 1 else ''}"
            cells.setdefault((e.axis, e.option, e.reference), {})[e.metric] = told
        lines = ["| axis | option | " + " | ".join(map(_cell, metrics)) + " |", "|---|---|" + "---:|" * len(metrics)]
        for (axis, option, reference), by_metric in cells.items():
            figures = " | ".join(by_metric.get(metric, "*not in both runs*") for metric in metrics)
            lines.append(f"| {_cell(axis)} | {_cell(option)} over {_cell(reference)} | {figures} |")
        parts += [*([shown] if shown else []), "\n".join(lines)]
        parts.append("Ratios over pairs of runs in which only this axis differs: geometric mean and 95% interval.")
    parts += [FEW_NOTE] if any(e.few for e in found) else []
    return parts + ([_cell(silent)] if silent else [])


def _best(summary: Summary, names: list[str], knobs: list[str]) -> list[str]:
    if not summary.best:
        return ["No run that ended well meets every constraint and has every objective."] if summary.rows else []
    columns = best_columns(summary)
    goals = dict(summary.objectives)
    arrow = {"maximize": " ↑", "minimize": " ↓"}
    lines = [
        "| recipe | " + " | ".join(f"{_cell(m)}{arrow.get(goals.get(m, ''), '')}" for m in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in listed(summary):
        name = short_name(row, names, knobs)
        name += " (baseline)" if row is summary.baseline and name != "baseline" else ""
        lines.append(f"| {_cell(name)} | " + " | ".join(_figure(summary, row, m) for m in columns) + " |")
    over = "; ratios over the baseline with 95% intervals" if summary.baseline else "; no baseline row"
    commands = "\n".join(row.command.replace("\n", " ") for row in listed(summary))
    fence = "`" * max(3, _longest_run(commands) + 1)
    return [f"### Best rows{over}", "\n".join(lines), f"Repeat them:\n\n{fence}sh\n{commands}\n{fence}"]


def _figure(summary: Summary, row: Row, metric: str) -> str:
    value = row.value(metric)
    if value is None:
        cell = row.metrics.get(metric)
        return f"*{_cell((cell.reason if cell else '') or row.reason or 'not recorded')}*"
    ratio = gain(row, summary.baseline, metric) if row is not summary.baseline else None
    return quantity(value, metric_unit(summary.rows, metric)) + (f"<br>{ratio_text(*ratio)}" if ratio else "")


def _failures(summary: Summary, names: list[str], knobs: list[str]) -> list[str]:
    failed = [row for row in summary.rows if not row.ok]
    if not failed:
        return []
    lines = ["| recipe | status | reason |", "|---|---|---|"]
    lines += [
        f"| {_cell(short_name(r, names, knobs))} | {_cell(r.status)} | {_cell(r.reason)} |"
        for r in failed[:_MOST_FAILURES]
    ]
    more = [f"and {len(failed) - _MOST_FAILURES} more."] if len(failed) > _MOST_FAILURES else []
    return [f"### Failures ({len(failed)})", "\n".join(lines), *more]


def _environment(summary: Summary) -> list[str]:
    lines = []
    for part, values in fingerprint_parts(summary.rows).items():
        told = ", ".join(f"{_code(v)} ({n})" if len(values) > 1 else _code(v) for v, n in sorted(values.items())[:4])
        lines.append(f"- {part}: {told}{f' and {len(values) - 4} more' if len(values) > 4 else ''}")
    codes: dict[str, int] = {}
    for row in summary.rows:
        for code, _ in row.flags:
            codes[code] = codes.get(code, 0) + 1
    lines += [f"- flag {_code(code)} on {n} rows" for code, n in sorted(codes.items())]
    return ["### Environment", "\n".join(lines)] if lines else []


def _cell(text: str) -> str:
    """Text that stays text in a table cell: no pipe, line break, markup or mention gets through."""
    flat = " ".join(str(text).split())
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\\", "\\\\"), ("|", "\\|"), ("@", "@\u200b")):
        flat = flat.replace(mark, safe)
    for mark in "*`[]!#~":
        flat = flat.replace(mark, f"\\{mark}")
    return flat


def _code(text: str) -> str:
    """An inline code span that the text cannot end."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (_longest_run(flat) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{pad}{flat}{pad}{ticks}"


def _longest_run(text: str) -> int:
    longest = run = 0
    for letter in text:
        run = run + 1 if letter == "`" else 0
        longest = max(longest, run)
    return longest
