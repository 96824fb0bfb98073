"""The last section of the page: under which conditions the rows were measured, and which of them to doubt."""

from __future__ import annotations

import html as markup
from collections.abc import Iterable
from typing import Any

from dyno.report.rows import BINDING, fingerprint_parts
from dyno.report.summary import Summary

_MOST_VALUES = 4
_MOST_LETTERS = 400
_MOST_FACTS = 16


def environment(summary: Summary) -> str:
    """Validity flags, fingerprints and the environment; empty where there are no rows."""
    if not summary.rows:
        return ""
    body = _flags(summary) + _fingerprints(summary) + _surroundings(summary)
    return f'<section id="environment"><h2>Environment and validity</h2>{body}</section>'


def _flags(summary: Summary) -> str:
    found: dict[str, list[str]] = {}
    for row in summary.rows:
        for code, detail in row.flags:
            found.setdefault(code, []).append(detail)
    if not found:
        return '<p class="note">No validity flag was raised.</p>'
    lines = []
    for code, details in sorted(found.items()):
        first = next((detail for detail in details if detail), "")
        lines.append(f'<tr><th>{_e(code)}</th><td class="num">{len(details)}</td><td>{_e(first)}</td></tr>')
    return _table("Validity flags", lines, '<th>Flag</th><th class="num">Rows</th><th>First detail</th>')


def _fingerprints(summary: Summary) -> str:
    lines = []
    for part, values in fingerprint_parts(summary.rows).items():
        role = "must agree" if part in BINDING else "told"
        lines.append(f'<tr{_mark(values)}><th>{_e(part)}</th><td>{_told(values)}</td><td class="unit">{role}</td></tr>')
    return _table("Fingerprints", lines) if lines else ""


def _surroundings(summary: Summary) -> str:
    """Every fact of the environment with its values: one where it is the same for all rows, else the commonest."""
    facts: dict[str, dict[str, int]] = {}
    for row in summary.rows:
        for name, value in _flat(row.environment):
            values = facts.setdefault(name, {})
            values[value] = values.get(value, 0) + 1
    if not facts:
        return '<p class="empty">These rows carry no environment.</p>'
    groups: dict[str, list[str]] = {}
    for name, values in sorted(facts.items()):
        line = f"<tr{_mark(values)}><th>{_e(name)}</th><td>{_told(values)}</td></tr>"
        groups.setdefault(name.partition(".")[0] if len(values) == 1 else "", []).append(line)
    # A long list that is the same in every row, such as the packages, stands folded.
    folded = {group: lines for group, lines in groups.items() if group and len(lines) > _MOST_FACTS}
    shown = [line for group, lines in groups.items() if group not in folded for line in lines]
    return _table("Environment", shown) + "".join(_fold(group, lines) for group, lines in folded.items())


def _fold(group: str, lines: list[str]) -> str:
    table = f'<table class="plain"><tbody>{"".join(lines)}</tbody></table>'
    return f'<details class="fold"><summary>{_e(group)}: {len(lines)}, the same in all rows</summary>{table}</details>'


def _table(title: str, lines: list[str], head: str = "") -> str:
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    table = f'<table class="plain">{top}<tbody>{"".join(lines)}</tbody></table>'
    return f'<h3>{title}</h3><div class="scroll">{table}</div>'


def _mark(values: dict[str, int]) -> str:
    return ' class="differs"' if len(values) > 1 else ""


def _told(values: dict[str, int]) -> str:
    """One value, or each with its number of rows, the commonest first; many numbers as their range."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) == 1:
        return _e(ordered[0][0])
    numbers = [float(text) for text in values if _is_number(text)]
    if len(numbers) == len(values) > _MOST_VALUES:
        return f"{min(numbers):g} to {max(numbers):g}"
    told = [f'{_e(v)} <span class="unit">{n} row{"s" if n != 1 else ""}</span>' for v, n in ordered[:_MOST_VALUES]]
    more = [f"and {len(ordered) - _MOST_VALUES} more"] if len(ordered) > _MOST_VALUES else []
    return "<br>".join([*told, *more])


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdecimal()


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        elif item not in (None, "", []):
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            yield f"{prefix}{key}", text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."


def _e(text: Any) -> str:
    return markup.escape(str(text), quote=True)
