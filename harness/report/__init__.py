"""Reports: one self-contained HTML page, and Markdown for a pull request, from a table and its records."""

from __future__ import annotations

from pathlib import Path

from dyno.errors import UserError
from dyno.report import page, text
from dyno.report.page import html, write_text
from dyno.report.rows import rows
from dyno.report.summary import Objective, Summary, effects, summarise
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
    """Report the records under a directory into `out`: a page for .html, Markdown for .md. Else as `html`.

    Beside summary.md lie its plots, summary-tradeoff.svg and summary-effects.svg.
    """
    from dyno.record import read_records

    path = Path(out)
    if path.suffix not in (".html", ".htm", ".md"):
        raise UserError(f"cannot tell from {path} which report to write; name a .html or a .md file")
    summary = summarise(rows(None, read_records(where)), constraints, objectives, baseline_id)
    if path.suffix != ".md":
        return write_text(path, page.page(summary, title))
    return write_text(path, text.page(summary, title, _pictures(summary, path)))


def _pictures(summary: Summary, path: Path) -> dict[str, str]:
    """Draw the plots of a Markdown report beside it; the name of each with the Markdown that shows it."""
    from dyno.report.figures import axis_effects, tradeoff  # imports Altair

    found = effects(summary.rows, [metric for metric, _ in summary.objectives])
    shown = {}
    for figure in (tradeoff(summary), axis_effects(summary, found)):
        if figure is not None:
            file = write_text(path.with_name(f"{path.stem}-{figure.name}.svg"), figure.svg)
            shown[figure.name] = text.picture(figure.alt, file.name)
    return shown
