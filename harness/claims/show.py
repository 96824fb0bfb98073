"""Judged claims as text for a terminal, Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyno.claims.claim import Range
from dyno.claims.judge import Judged, Row, summary
from dyno.errors import UserError
from dyno.units import digits, quantity

RULE = (
    "A figure holds when its whole 95% interval lies in the range, does not hold when none of it does, and is inconclusive "
    "in between. The interval holds the samples within a run, and of several runs what those differ by; counted figures "
    "are points. Predicted figures are arithmetic and say nothing about a machine. Every verdict is about the model, the "
    "setting and the machine in its row."
)


def text(rows: list[Row]) -> str:
    """A line a claim, its figures under it."""
    width = max((len(row.claim.id) for row in rows), default=0)
    lines = []
    for row in rows:
        flags = f"flags: {', '.join(row.flags)}" if row.flags else ""
        where = ", ".join(part for part in (row.model, row.machine, flags) if part)
        lines.append(f"{row.claim.id:<{width}}  {row.verdict}{f'  [{where}]' if where else ''}")
        lines.append(f"{'':<{width}}  {row.claim.claim}")
        for judged in row.figures:
            lines.append(f"{'':<{width}}    {judged.figure.what}: {_told(judged)}")
        if row.claim.corrected:
            verdict = f"  ({row.corrected_verdict})" if row.corrected_verdict else ""
            lines.append(f"{'':<{width}}  rather: {row.claim.corrected}{verdict}")
    counts = ", ".join(f"{n} {verdict}" for verdict, n in summary(rows).items())
    return "\n".join([*lines, counts])


def markdown(rows: list[Row]) -> str:
    """A table for a report or a pull request."""
    head = "| claim | published | verdict | figure | claimed | found | rather | tested on |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = [(j.figure.what, _span(j.figure.claimed, j.figure.unit), _found(j)) for j in row.figures]
        what, claimed, found = ("<br>".join(_cell(part) for part in column) for column in zip(*figures, strict=True))
        rather = row.claim.corrected or ""
        rather += f" ({row.corrected_verdict})" if row.corrected_verdict else ""
        where = " on ".join(part for part in (row.model, row.machine) if part)
        where += f"<br>`{' '.join(row.place.given)}`" if row.place.given and row.runs else ""
        where += f"<br>runs {', '.join(run.rpartition('-')[2] for run in row.runs)}" if row.runs else ""
        where += f"<br>flags {', '.join(row.flags)}" if row.flags else ""
        cells = (_cell(row.claim.claim), f"**{row.verdict}**", what, claimed, found, _cell(rather), where)
        lines.append(f"| {row.claim.id} | {' | '.join(cells)} |")
    return "\n".join(["# Claims", "", RULE, "", *lines, ""])


def to_json(rows: list[Row]) -> dict[str, Any]:
    return {"claims": [row.to_json() for row in rows], "verdicts": summary(rows)}


def write(rows: list[Row], path: str | None) -> None:
    """To a .md or a .json file, where one is named."""
    if path is None:
        return
    target = Path(path)
    if target.suffix not in (".md", ".json"):
        raise UserError(f"--to {path}: it writes a .md or a .json file")
    made = markdown(rows) if target.suffix == ".md" else json.dumps(to_json(rows), indent=1) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(made)
    except OSError as error:
        raise UserError(f"--to {path} cannot be written: {error}") from error


def _told(judged: Judged) -> str:
    claimed = _span(judged.figure.claimed, judged.figure.unit)
    rather = _span(judged.figure.corrected, judged.figure.unit)
    said = [_found(judged)]
    why = f", {judged.reason}" if judged.reason and judged.value is not None else ""
    said += [f"claimed {claimed}: {judged.verdict}{why}"] if claimed else []
    said += [f"rather {rather}: {judged.corrected}"] if rather else []
    return "; ".join(said)


def _found(judged: Judged) -> str:
    """'7.99× (7.98 to 8.01)'; the reason where there is no figure."""
    if judged.value is None:
        return judged.reason
    unit = judged.figure.unit
    label = ", predicted" if judged.label == "predicted" else ""
    if judged.low is None or judged.high is None:
        return f"{_number(judged.value, unit)}{label}"
    return f"{_number(judged.value, unit)} ({_number(judged.low, unit)} to {_number(judged.high, unit)}){label}"


def _span(range_: Range | None, unit: str) -> str:
    if range_ is None:
        return ""
    if range_.low is None:
        return f"at most {_number(range_.high, unit)}"
    if range_.high is None:
        return f"at least {_number(range_.low, unit)}"
    return f"{_number(range_.low, unit)} to {_number(range_.high, unit)}"


def _number(value: float | None, unit: str) -> str:
    assert value is not None
    if unit == "x":
        return f"{value:.6g}×" if 0.9 < value < 1.1 else f"{digits(value, 3)}×"
    if unit == "%":
        return f"{digits(100 * value, 3)}%"
    return quantity(value, unit)


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")
