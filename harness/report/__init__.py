"""Reports: one self-contained HTML page, and Markdown for a pull request, from a table and its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyno.report.page import html
from dyno.report.text import markdown

__all__ = ["html", "markdown", "write"]


def write(directory: str | Path, output: str | Path, **options: Any) -> None:
    """Report the records of a directory: Markdown when `output` ends in .md, else HTML. Options as for `html`."""
    from dyno.record import read_records, table

    records = read_records(directory)
    frame = table(records)
    if str(output).endswith(".md"):
        Path(output).write_text(markdown(frame, records, **options))
    else:
        html(frame, records, Path(output), **options)
