"""Reports: one self-contained HTML page, and Markdown for a pull request, from a table and its records."""

from dyno.report.page import html
from dyno.report.text import markdown

__all__ = ["html", "markdown"]
