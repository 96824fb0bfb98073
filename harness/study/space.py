"""The search space: Hydra's sweep grammar turned into what Optuna asks for.

`choice(a,b)` or `a,b` is categorical, `range(2,9)` an integer, `interval(a,b)` a float; `tag(log, ...)` searches the
logarithm, `tag(int, interval(a,b))` integers. A mapping `{values: ..., when: axis=option}` is asked for only then.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.recipe import Recipe, parse

if TYPE_CHECKING:
    from optuna import Trial

MAX_GRID = 20000


@dataclass(frozen=True)
class Dimension:
    """One searched key: `choices` (text), or the numbers from low to high, by `step` when they are discrete."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    integer: bool = False
    log: bool = False
    when: str | None = None

    def suggest(self, trial: Trial) -> str:
        """Ask Optuna; the answer as an override's right side."""
        if self.choices:
            return str(trial.suggest_categorical(self.key, self.choices))
        if self.integer:
            return str(
                trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
            )
        return repr(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    def values(self) -> list[Any] | None:
        """Every value when they can be listed, else None."""
        if self.choices:
            return list(self.choices)
        if self.integer and not self.log:
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step:
            return [self.low + i * self.step for i in range(math.floor((self.high - self.low) / self.step + 1e-9) + 1)]
        return None

    def nearest(self, value: Any) -> Any:
        """The parameter that stands for a recipe's own value, for the baseline trial."""
        if self.choices:
            text = plain(value)
            return text if text in self.choices else self.choices[0]
        number = min(max(float(value), self.low), self.high) if isinstance(value, int | float) else self.low
        if self.step:
            number = self.low + round((number - self.low) / self.step) * self.step
        return int(number) if self.integer else number


def plain(value: Any) -> str:
    """A value as an override spells it."""
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if not isinstance(value, list)
        else str(value)
    )


def dimension(key: str, text: str, when: str | None = None) -> Dimension:
    """Parse one key's sweep. Raises UserError with the key and what is expected."""
    (override,) = parse([f"{key}={text}"])
    if not override.is_sweep_override():
        raise UserError(f"study.space.{key}={text} is one value; write choice(a,b), range(2,9) or interval(1e-4,1e-2)")
    sweep = override.value()
    tags = set(getattr(sweep, "tags", ()))
    if override.is_interval_sweep():
        low, high = float(sweep.start), float(sweep.end)
        if low > high or ("log" in tags and low <= 0):
            raise UserError(f"{key}: interval({sweep.start},{sweep.end}) is empty, or not positive for a log scale")
        integer = "int" in tags
        return Dimension(
            key, low=low, high=high, integer=integer, log="log" in tags, step=1 if integer else None, when=when
        )
    if override.is_range_sweep():
        step = sweep.step or 1
        listed = list(sweep.range())
        if not listed:
            raise UserError(f"{key}: {text} is empty")
        integer = all(isinstance(value, int) for value in listed)
        return Dimension(key, low=min(listed), high=max(listed), step=abs(step), integer=integer, when=when)
    return Dimension(key, choices=tuple(override.sweep_string_iterator()), when=when)


def space_of(study: dict[str, Any], sweeps: list[str], fixed: set[str]) -> list[Dimension]:
    """The study's space, extended or overridden by sweeps of the command line, without the keys that are fixed there."""
    found: dict[str, Dimension] = {}
    for key, entry in (study.get("space") or {}).items():
        if isinstance(entry, dict):
            if "values" not in entry:
                raise UserError(f"study.space.{key} needs values: and may have when:")
            found[key] = dimension(key, str(entry["values"]), entry.get("when"))
        else:
            found[key] = dimension(key, str(entry))
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        found[key] = dimension(key, text, found[key].when if key in found else None)
    return [d for key, d in found.items() if key not in fixed]


def applies(when: str | None, values: dict[str, str], base: Recipe) -> bool:
    """Whether a condition `key=value` holds, by what was chosen before or by the base recipe."""
    if when is None:
        return True
    key, _, wanted = when.partition("=")
    return values.get(key, plain(current(base, key))) == wanted


def current(base: Recipe, key: str) -> Any:
    """What the base recipe has under a key: the option of an axis, or a knob's value (None if it has no such knob)."""
    if key in base.choices:
        return base.choices[key]
    node: Any = base.config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def suggest(dimensions: list[Dimension], trial: Trial, base: Recipe) -> dict[str, str]:
    """Key -> value for one trial; conditional keys only where their condition holds."""
    values: dict[str, str] = {}
    for d in dimensions:
        if applies(d.when, values, base):
            values[d.key] = d.suggest(trial)
    return values


def grid(dimensions: list[Dimension]) -> list[dict[str, Any]] | None:
    """Every combination when there are few enough, else None."""
    listed = [d.values() for d in dimensions]
    if any(values is None for values in listed):
        return None
    if math.prod(len(values) for values in listed if values) > MAX_GRID:
        return None
    keys = [d.key for d in dimensions]
    return [dict(zip(keys, combo, strict=True)) for combo in itertools.product(*[v for v in listed if v is not None])]
