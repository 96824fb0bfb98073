"""Values of the plan's compound flags: `key=value,key=value`, with units, mistakes told in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dyno.errors import UserError


def settings(
    flag: str, text: str, known: Mapping[str, Callable[[str], float]], needed: str, example: str
) -> dict[str, float]:
    """'failures=2,repair=24h' -> {'failures': 2.0, 'repair': 86400.0}.

    Raises:
        UserError: an unknown key, a value that is no such quantity or is negative, or `needed` is missing.
    """
    found = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in known:
            raise UserError(f"{flag} {text}: there is no '{part.strip()}'; write {example}")
        try:
            found[key] = known[key](value)
        except (ValueError, UserError) as error:
            raise UserError(f"{flag} {key}={value}: not understood; write {example}") from error
        if not 0 <= found[key] < math.inf:
            raise UserError(f"{flag} {key}={value}: takes a number of 0 or more; write {example}")
    if not found.get(needed):
        raise UserError(f"{flag} needs {needed}= above 0; write {example}")
    return found


def tokens(text: str) -> float:
    """'1e11' -> 100000000000.0.

    Raises:
        UserError: the text is no number of tokens.
    """
    try:
        count = float(text)
    except ValueError:
        count = math.nan
    if not 1 <= count < math.inf:
        raise UserError(f"--tokens {text}: takes a number of 1 or more; write --tokens 1e11")
    return count


def share(text: str) -> float:
    """'5%' or '0.05' -> 0.05."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)
