"""The one grammar of constraints, for studies, reports and the command line: `metric op bound`.

peak_memory_bytes <= 8 GiB        a number, with a unit where one reads better
tokens_per_s >= 50 k              or with a prefix alone
perplexity <= 1.01 * baseline     a multiple of what the baseline has; `baseline * 1.01` and `baseline` too
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyno.errors import UserError
from dyno.recipe import close
from dyno.units import unit_of

METRIC = r"[A-Za-z_][\w.]*"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GRAMMAR = re.compile(
    rf"(?P<metric>{METRIC})\s*(?P<op><=|>=|<|>)\s*"
    rf"(?:(?P<number>{_NUMBER})\s*(?:(?P<suffix>[^\W\d_]+)|(?P<times>\*\s*baseline))?"
    rf"|(?P<baseline>baseline)(?:\s*\*\s*(?P<factor>{_NUMBER}))?)"
)
# Each unit takes the prefixes that people write: (unit as records name it, its short name, prefixes).
_DECIMAL = {"n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS = {
    "B": ("", "k", "M", "G", "T"),
    "s": ("n", "u", "µ", "m", ""),
    "J": ("u", "µ", "m", "", "k", "M"),
    "W": ("m", "", "k"),
    "g": ("u", "µ", "m", "", "k"),
}
# Suffix -> (factor, unit); a prefix alone goes with any unit.
SUFFIXES: dict[str, tuple[float, str]] = {
    **{prefix + unit: (_DECIMAL[prefix], unit) for unit, prefixes in _UNITS.items() for prefix in prefixes},
    **{f"{prefix}iB": (2.0**power, "B") for prefix, power in (("K", 10), ("M", 20), ("G", 30), ("T", 40))},
    **{prefix: (_DECIMAL[prefix], "") for prefix in ("k", "M", "G", "T")},
}


@dataclass(frozen=True)
class Constraint:
    """`metric op number`, or `metric op number * baseline`: a multiple of what the baseline measured."""

    text: str
    metric: str
    op: str
    number: float
    relative: bool

    def bound(self, baseline: Mapping[str, float]) -> float | None:
        """The number to compare with; None where the baseline has no such figure."""
        if not self.relative:
            return self.number
        figure = baseline.get(self.metric)
        return None if figure is None else self.number * figure

    def violation(self, value: float, bound: float) -> float:
        """How far on the wrong side, as a share of the bound, so that bytes and nats weigh alike; <= 0 is met."""
        excess = value - bound if self.op[0] == "<" else bound - value
        if excess == 0 and len(self.op) == 1:
            return math.ulp(1.0)
        return excess / abs(bound) if bound else excess


def constraint(text: Any) -> Constraint:
    """A constraint from its text.

    Raises:
        UserError: the text is none, names a unit that is unknown or not the metric's, or a number out of range.
    """
    match = _GRAMMAR.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise _unreadable(text, "write 'metric <= number', 'metric <= 8 GiB' or 'metric <= 1.01 * baseline'")
    metric, suffix = match["metric"], match["suffix"] or ""
    if suffix and suffix not in SUFFIXES:
        hint = close(suffix, SUFFIXES) or f"; there are {', '.join(SUFFIXES)}"
        raise _unreadable(text, f"there is no unit '{suffix}'{hint}")
    factor, unit = SUFFIXES.get(suffix, (1.0, ""))
    own = unit_of(metric)
    if unit and own and unit != own:
        raise _unreadable(text, f"{metric} is in {own}, not in {suffix}")
    number = float(match["number"] or match["factor"] or 1.0) * factor
    if not math.isfinite(number):
        raise _unreadable(text, "its number is out of range")
    return Constraint(match.string, metric, match["op"], number, bool(match["times"] or match["baseline"]))


def _unreadable(text: Any, why: str) -> UserError:
    return UserError(f"constraint {text!r} cannot be read: {why}")
