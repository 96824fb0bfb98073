"""The verb `dyno claims`: which claims, from which records, with which runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from dyno.claims import session as sessions
from dyno.claims.claim import chosen
from dyno.claims.judge import Row, from_records
from dyno.errors import UserError


def main(
    words: list[str],
    directory: str | None,
    plugins: list[str],
    seconds: float | None,
    repeats: int,
    progress: Callable[[str], Any],
) -> tuple[list[Row], bool]:
    """Judged claims, and whether every run that was made here ended well.

    Args:
        words: `run` first where runs are wanted, then ids of claims and overrides.
        repeats: runs of each recipe whose time is judged.
        progress: makes a line of progress from its prefix, as the command line's Progress does.
    """
    runs = words[:1] == ["run"]
    rest = words[runs:]
    given = [word for word in rest if "=" in word]
    claims = chosen([word for word in rest if "=" not in word], plugins)
    if not runs:
        if given or seconds is not None:
            extra = given[0] if given else "--seconds"
            raise UserError(
                f"'{extra}' is for runs: write `dyno claims run`; without it records are judged as they are"
            )
        return recorded(claims, directory), True
    if directory is not None:
        raise UserError("--from judges records as they are: leave out `run`, or say results_dir=DIR")
    session = sessions.prepared(claims, given, plugins)
    lines: list[Any] = []

    def line(prefix: str) -> Any:
        _end(lines)
        lines.append(progress(prefix))
        return lines[-1]

    def say(text: str) -> None:
        _end(lines)
        print(text, file=sys.stderr, flush=True)

    made = sessions.run(session, line, say, seconds, repeats)
    return session.rows(), all(record["status"] in ("ok", "unsupported") for record in made)


def recorded(claims: list[Any], directory: str | None) -> list[Row]:
    """Verdicts by the records of a directory; a default directory that is not there has none."""
    from pathlib import Path

    from dyno.measure.environment import detect
    from dyno.record import read_records

    found = [] if directory is None and not Path("results").is_dir() else read_records(directory or "results")
    return from_records(claims, found, detect({"device": "auto"}).kind)


def _end(lines: list[Any]) -> None:
    while lines:
        lines.pop().end()
