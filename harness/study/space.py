"""The space of a study: parameters in Hydra's sweep grammar, some of them asked for only where a condition holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dyno.composition import parse
from dyno.errors import UserError
from dyno.recipe import Recipe

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = str | int | float
MOST_COMBINATIONS = 20_000  # a finite space beyond this is searched like an infinite one


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """One spelling for values that mean the same: '1e-3' and '0.001', "'int8'" and 'int8', '[a]' and 'a'."""
    return plain(parse([f"value={text}"])[0].value())


def plain(value: Any) -> str:
    """The canonical spelling of a value of a configuration."""
    return str(value[0] if isinstance(value, list) and len(value) == 1 else value)


def value_of(recipe: Recipe, key: str) -> str | None:
    """What a recipe has at an axis, a group or a dotted key, in canonical spelling; None where it has nothing."""
    if key in recipe.choices:
        return plain(recipe.choices[key])
    node: Any = recipe.config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return plain(node)


@dataclass(frozen=True)
class Condition:
    """`key=value` or `key=a,b`: holds where the key has one of the values. The key `device` is cpu or cuda."""

    key: str
    values: tuple[str, ...]

    def holds(self, look: Callable[[str], str | None]) -> bool:
        return look(self.key) in self.values


def conditions(when: Any, where: str) -> tuple[Condition, ...]:
    """Conditions from `when:`, one text or a list of them that must all hold."""
    texts = [when] if isinstance(when, str) else when
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: `when` is {when!r}; write 'axis=option', 'axis=a,b' or a list of these")
    found = []
    for override in parse(texts):
        if override.is_interval_sweep():
            raise UserError(f"{where}: `when` takes values, not the interval '{override.input_line}'")
        swept = override.is_sweep_override()
        values = list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
        found.append(Condition(override.get_key_element(), tuple(canonical(value) for value in values)))
    return tuple(found)


@dataclass(frozen=True)
class Parameter:
    """One searched key: `choices` (texts), or numbers from `low` to `high`, both included."""

    key: str
    choices: tuple[str, ...] = ()
    low: int | float = 0
    high: int | float = 0
    step: int | float | None = None
    log: bool = False
    when: tuple[Condition, ...] = ()

    def suggest(self, trial: Trial) -> Value:
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def tidy(self, value: Value) -> Value:
        """The value as it stands in a recipe: no binary dust behind a step, six digits of an interval."""
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}" if self.step is None else f"{value:.12g}")

    def values(self) -> list[Value] | None:
        """Every value, or None for an interval of real numbers."""
        if self.choices:
            return list(self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return list(range(self.low, self.high + 1, int(self.step or 1)))
        if self.step is None:
            return None
        count = round((self.high - self.low) / self.step) + 1
        return [self.tidy(float(self.low + i * self.step)) for i in range(count)]

    def locate(self, text: str) -> Value | None:
        """The value that a recipe's canonical text stands for; None if the parameter does not take it."""
        for value in self.values() or ():
            if canonical(str(value)) == text:
                return value
        try:
            number = float(text)
        except ValueError:
            return None
        return number if self.values() is None and self.low <= number <= self.high else None


def parameter(key: str, text: str, when: tuple[Condition, ...] = ()) -> Parameter:
    """A parameter from `key` and the text of a sweep: `choice(a,b)`, `a,b`, `range(2,9,2)`, `tag(log,interval(..))`."""
    override = parse([f"{key}={text}"])[0]
    where = f"space: '{key}={text}'"
    if not override.is_sweep_override():
        return Parameter(key, choices=(override.get_value_element_as_str(),), when=when)
    sweep = override.value()
    tags: set[str] = getattr(sweep, "tags", set())  # a glob has none
    strange = sorted(tags - {"log"})
    if strange:
        raise UserError(f"{where}: there is no tag '{strange[0]}'; the only one is log")
    log, step = "log" in tags, None
    low: int | float
    high: int | float
    if override.is_interval_sweep():
        low, high = sweep.start, sweep.end
    elif override.is_range_sweep():
        try:
            numbers = sorted(float(value) for value in sweep.range())
        except (ArithmeticError, ValueError) as error:
            raise UserError(f"{where} is no range of numbers") from error
        if not numbers:
            raise UserError(f"{where} holds no value; the end of a range does not belong to it")
        whole = all(isinstance(x, int) for x in (sweep.start, sweep.stop, sweep.step))
        step, low, high = abs(float(sweep.step)), float(f"{numbers[0]:.12g}"), float(f"{numbers[-1]:.12g}")
        if whole:
            step, low, high = int(step), int(low), int(high)
    else:
        if log:
            raise UserError(f"{where}: the tag log is for range and interval")
        return Parameter(key, choices=_choices(override, where), when=when)
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise UserError(f"{where} must run from a smaller to a larger number")
    if log and (low <= 0 or (step is not None and step != 1)):
        raise UserError(f"{where}: a log scale needs positive numbers, and no step")
    if log and isinstance(low, float):
        step = None
    return Parameter(key, low=low, high=high, step=step, log=log, when=when)


def _choices(override: Any, where: str) -> tuple[str, ...]:
    from hydra.errors import HydraException

    try:
        return tuple(dict.fromkeys(override.sweep_string_iterator()))
    except (HydraException, ValueError, TypeError) as error:
        raise UserError(f"{where} is no list of values") from error


@dataclass
class Space:
    """Parameters in an order in which every condition's key comes before whoever asks for it."""

    parameters: list[Parameter]
    base: Recipe
    device: str
    _combinations: list[dict[str, Value]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.parameters = _ordered(self.parameters)
        searched = {p.key for p in self.parameters}
        # what no parameter can change is decided now: a parameter that is never asked for is none
        self.parameters = [
            p for p in self.parameters if all(c.key in searched or c.holds(self._look({})) for c in p.when)
        ]

    def _look(self, chosen: Mapping[str, Value]) -> Callable[[str], str | None]:
        def look(key: str) -> str | None:
            if key == "device":
                return self.device
            return canonical(str(chosen[key])) if key in chosen else value_of(self.base, key)

        return look

    def choose(self, pick: Callable[[Parameter], Value]) -> dict[str, Value]:
        """Pick a value for every parameter whose conditions hold, given those before it."""
        chosen: dict[str, Value] = {}
        for p in self.parameters:
            if all(c.holds(self._look(chosen)) for c in p.when):
                chosen[p.key] = p.tidy(pick(p))
        return chosen

    def suggest(self, trial: Trial) -> dict[str, Value]:
        return self.choose(lambda p: p.suggest(trial))

    def tidy(self, params: Mapping[str, Value]) -> frozenset[tuple[str, Value]]:
        """What tells two suggestions apart."""
        by_key = {p.key: p for p in self.parameters}
        return frozenset((k, by_key[k].tidy(v) if k in by_key else v) for k, v in params.items())

    def locate(self, recipe: Recipe) -> dict[str, Value] | None:
        """The point of the space that a recipe lies at; None if it lies outside."""
        outside: list[str] = []

        def pick(p: Parameter) -> Value:
            value = p.locate(value_of(recipe, p.key) or "")
            if value is None:
                outside.append(p.key)
                return p.choices[0] if p.choices else p.low
            return value

        point = self.choose(pick)
        return None if outside else point

    def combinations(self) -> list[dict[str, Value]] | None:
        """Every point in the order written, the last parameter fastest; None where there are too many to list."""
        if self._combinations is None:
            every = list(itertools.islice(self._walk({}, 0), MOST_COMBINATIONS + 1))
            finite = all(p.values() is not None for p in self.parameters) and len(every) <= MOST_COMBINATIONS
            self._combinations = every if finite else []
        return self._combinations or None

    def _walk(self, chosen: dict[str, Value], index: int) -> Iterator[dict[str, Value]]:
        if index == len(self.parameters):
            yield dict(chosen)
            return
        p = self.parameters[index]
        if not all(c.holds(self._look(chosen)) for c in p.when):
            yield from self._walk(chosen, index + 1)
            return
        for value in p.values() or ():
            yield from self._walk({**chosen, p.key: value}, index + 1)

    def samples(self) -> list[dict[str, Value]]:
        """A few points that between them show every value of a choice: what is checked before any work."""
        most = max((len(p.choices) or 1 for p in self.parameters), default=1)

        def first(i: int) -> Callable[[Parameter], Value]:
            return lambda p: p.choices[i % len(p.choices)] if p.choices else p.low

        return [self.choose(first(i)) for i in range(most)]

    def describe(self) -> dict[str, Any]:
        """As JSON: a study's space must not change while it is under way."""
        return {
            p.key: {
                "values": list(p.choices) or [p.low, p.high, p.step, p.log],
                "when": [f"{c.key}={','.join(c.values)}" for c in p.when],
            }
            for p in self.parameters
        }


def _ordered(parameters: list[Parameter]) -> list[Parameter]:
    waiting, ordered = {p.key: p for p in parameters}, []
    while waiting:
        ready = [p for p in waiting.values() if not any(c.key in waiting for c in p.when)]
        if not ready:
            raise UserError(f"space: the conditions of {', '.join(waiting)} hang on each other")
        ordered += ready
        for p in ready:
            del waiting[p.key]
    return ordered
