"""One self-contained HTML page: styles, scripts, libraries and data inside, nothing loaded from anywhere.

Text is escaped, data travels as JSON that cannot leave its element, and the page's own policy lets only the two scripts
run whose hashes it names: a hostile string in a record stays a string.
"""

from __future__ import annotations

import base64
import hashlib
import html as markup
import os
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.report import sections
from dyno.report.payload import embed, payload
from dyno.report.rows import rows
from dyno.report.summary import Objective, Summary, summarise
from dyno.report.trust import environment

if TYPE_CHECKING:
    import pandas as pd

_HERE = Path(__file__).parent
_SCRIPTS = ("page.js", "plots.js", "runs.js")


def html(
    frame: pd.DataFrame | None,
    records: Iterable[dict[str, Any]] | None,
    out: str | Path,
    *,
    title: str = "Dyno report",
    constraints: list[str] | None = None,
    objectives: list[Objective] | None = None,
    baseline_id: str | None = None,
) -> Path:
    """Write the report of a table as one HTML file.

    Args:
        frame: the table (`dyno.record.table`); None takes every record.
        records: the records of its rows, joined by id; without them the page lacks intervals' sources and environments.
        out: the file to write; written aside and renamed.
        title: the page's heading.
        constraints: as in a study, e.g. `perplexity <= 1.01 * baseline`.
        objectives: (metric, "minimize" | "maximize"), the most important first; None picks a speed and a cost.
        baseline_id: the row that ratios are taken over; None finds the row whose every axis is plain.

    Returns:
        The path written.

    Raises:
        UserError: an unreadable constraint, an unknown direction or baseline, or a folder that does not exist.
    """
    summary = summarise(rows(frame, records), constraints, objectives, baseline_id)
    return write_text(Path(out), page(summary, title))


def page(summary: Summary, title: str) -> str:
    """The whole document as text; the same input gives the same bytes."""
    scripts = [_bundle(), "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();"]
    # Scripts by hash only; no origin at all for anything else, so that nothing can be fetched or sent.
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    others = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    policy = f"default-src 'none'; script-src {allowed}; {others}"
    body = [
        sections.header(summary, title),
        "<main>",
        sections.banners(summary),
        sections.best(summary),
        *(sections.PLACES.values() if summary.rows else ()),
        environment(summary),
        "</main>",
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{markup.escape(title)}</title>",
            f"<style>{_asset('page.css')}</style></head><body>",
            *body,
            f'<script type="application/json" id="data">{embed(payload(summary))}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from the wheel of vl-convert: no network."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version="6.4")
    assert "</script" not in bundle.lower()
    return bundle


def write_text(path: Path, text: str) -> Path:
    """Write a file aside and rename it: a reader sees the old report or the new one, never half of one."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(aside, 0o644)
    os.replace(aside, path)
    return path
