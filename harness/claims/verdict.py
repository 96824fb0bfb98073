"""The rule by which a measured figure is held against a claimed range.

A figure with a 95% interval `holds` when the whole interval lies in the range, `does not hold` when none of it does, and
is `inconclusive` when it reaches over an edge: so a figure that truly lies outside is called right in at most one of
twenty judgements, one on the edge itself is hardly ever called wrong, and the nearer the edge the more samples a verdict
takes. The interval holds what the samples within a run vary by, and of several runs of a recipe what those do; a single
run says nothing of the latter. A figure that is counted and not sampled is a point.

A claim of several figures holds when all of them do. Some that hold and some that do not: `holds in part`, and so is one
whose other figures could not be told here. None that holds: `does not hold`. Else, where a figure is undecided, so is the
claim: `inconclusive`.
"""

from __future__ import annotations

from collections.abc import Iterable

from dyno.claims.claim import Range

HOLDS, PART, FAILS, UNSURE = "holds", "holds in part", "does not hold", "inconclusive"
NOT_HERE, NOT_RUN = "not testable here", "not run"
PLANNED = "planned"
DECIDED = (HOLDS, PART, FAILS)


def of_figure(value: float, low: float | None, high: float | None, range_: Range) -> tuple[str, str]:
    """(verdict, the reason where it does not hold) of a value with its interval, None for one that is counted."""
    bottom, top = value if low is None else low, value if high is None else high
    least = float("-inf") if range_.low is None else range_.low
    most = float("inf") if range_.high is None else range_.high
    if least <= bottom and top <= most:
        return HOLDS, ""
    if top < least:
        return FAILS, "below the range"
    if bottom > most:
        return FAILS, "above the range"
    return UNSURE, "the interval reaches over an end of the range"


def of_claim(verdicts: Iterable[str]) -> str:
    """One verdict of a claim's figures."""
    found = set(verdicts)
    if not found:
        return NOT_HERE
    if len(found) == 1:
        return found.pop()
    if UNSURE in found or NOT_RUN in found:
        both = {HOLDS, FAILS} <= found
        return PART if both else UNSURE if UNSURE in found else NOT_RUN
    return PART if HOLDS in found else FAILS
