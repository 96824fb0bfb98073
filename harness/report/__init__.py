"""Reports: one self-contained HTML page, and Markdown for a pull request, from a table and its records."""

from __future__ import annotations

from pathlib import Path

from dyno.errors import UserError
from dyno.report.page import html, write_text
from dyno.report.summary import Objective
from dyno.report.text import markdown

__all__ = ["html", "markdown", "write"]


def write(
    where: str | Path,
    out: str | Path,
    *,
    title: str = "Dyno report",
    constraints: list[str] | None = None,
    objectives: list[Objective] | None = None,
    baseline_id: str | None = None,
) -> Path:
    """Report the records under a directory into `out`: a page for .html, Markdown for .md. Else as `html`."""
    from dyno.record import read_records

    path = Path(out)
    if path.suffix not in (".html", ".htm", ".md"):
        raise UserError(f"cannot tell from {path} which report to write; name a .html or a .md file")
    records = read_records(where)
    if path.suffix != ".md":
        return html(
            None, records, path, title=title, constraints=constraints, objectives=objectives, baseline_id=baseline_id
        )
    text = markdown(None, records, title=title, constraints=constraints, objectives=objectives, baseline_id=baseline_id)
    return write_text(path, text)
