"""A study's settings: the option file `study=...`, what the command line adds, and the space that both make."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.composition import parse
from dyno.constraints import constraint
from dyno.errors import UserError
from dyno.recipe import Recipe, close, compose
from dyno.study import samplers
from dyno.study.goals import Goals, objective
from dyno.study.space import Condition, Parameter, Space, Value, conditions, parameter, value_of
from dyno.study.storage import Place

if TYPE_CHECKING:
    from dyno.measure.environment import Device

OWN_GROUPS = ("study", "sampler")
KEYS = {
    "name", "storage", "trials", "time_budget_s", "workers", "objectives", "constraints", "overrides", "baseline", "space",
    "plan_gate", "plan_first",
}  # fmt: skip
DEFAULT_OBJECTIVES = {
    "train": [("tokens_per_s", "maximize"), ("validation_loss", "minimize")],
    "infer": [("decode_tokens_per_s", "maximize"), ("perplexity", "minimize")],
    "data": [("documents_per_s", "maximize")],
}


@dataclass
class Settings:
    """Everything that `dyno tune` was told, checked before any work.

    Attributes:
        trials: how many distinct recipes are run, failures included. A recipe that the plan refuses, or that the study
            knows already, costs nothing and is not counted.
        time_budget_s: no run starts later than this after the command; None for no limit.
        overrides: the fixed part of every trial's recipe.
        baseline: overrides on top of it for the recipe that `* baseline` refers to; none: the options' defaults.
        workers: how many processes at most (workers.count); None for as many as there are devices.
        plan_gate: whether a recipe that is predicted to run out of memory is refused; false runs it all the same.
        plan_first: how many trials come first that the plan finds best, of a sample of the space.
    """

    name: str
    place: Place
    trials: int
    time_budget_s: float | None
    workers: int | None
    plan_gate: bool
    plan_first: int
    goals: Goals
    space: Space
    overrides: list[str]
    baseline: list[str]
    sampler: dict[str, Any]
    device: Device
    results_dir: str
    plugins: list[str]
    command: list[str]

    def recipe(self, extra: list[str]) -> Recipe:
        """A recipe of this study; its record carries the study's name, which is no part of its hash."""
        made = compose(merge([*self.overrides, *extra]), self.plugins)
        made.config["study"] = {"name": self.name}
        return made

    def trial_overrides(self, chosen: dict[str, Value]) -> list[str]:
        return [f"{key}={value}" for key, value in chosen.items()]

    @property
    def spec(self) -> dict[str, Any]:
        """What must stay the same while a study is under way, as JSON."""
        fixed = [o for o in self.overrides if key_of(o) != "results_dir"]
        return {
            "device": self.device.name,
            "objectives": [[o.metric, o.direction] for o in self.goals.objectives],
            "constraints": [c.text for c in self.goals.constraints],
            "overrides": sorted(fixed),
            "baseline": self.baseline,
            "space": self.space.describe(),
        }

    def tune_command(self, *more: str) -> str:
        """The words that make the study go on, with other overrides in place of their own."""
        return self._words("tune", merge([*self.command, *more]))

    def run_command(self, overrides: list[str]) -> str:
        return self._words("run", overrides)

    def _words(self, verb: str, overrides: list[str]) -> str:
        plugins = [word for folder in self.plugins for word in ("--plugins", folder)]
        return shlex.join(["dyno", verb, *overrides, *plugins])


def key_of(override: str) -> str:
    return parse([override])[0].get_key_element().lstrip("+")


def merge(overrides: list[str]) -> list[str]:
    """One override a key: the last one wins, Hydra refuses two."""
    return list({key_of(override): override for override in overrides}.values())


def read(command: list[str], plugins: list[str]) -> Settings:
    """Settings from the words after `dyno tune`.

    A plain override fixes a key, also one that the study would search; a sweep adds a key to the space or replaces its
    values. Without `study=` the space is what the command line sweeps.

    Raises:
        UserError: anything in them is wrong.
    """
    from dyno.measure.environment import detect

    own, fixed, sweeps = split(command)
    if not any(key_of(override) == "study" for override in own):
        own.insert(0, "study=custom")
    first = compose([*own, *fixed], plugins)
    study, sampler = checked(first.config["study"]), first.config["sampler"]
    device = detect(first.config["hardware"])
    overrides = merge([*_when_met(study["overrides"], first, device.kind), *fixed])
    base = compose(overrides, plugins)
    name = str(study["name"])
    space = _space(study["space"], sweeps, [key_of(o) for o in fixed], base, device.kind)
    if samplers.order(sampler) and not space.combinations():
        raise UserError(
            "this sampler tries every combination, and an interval, or more than 20,000 values, has too many"
        )
    return Settings(
        name=name,
        place=Place.of(study["storage"], name, base.config["results_dir"]),
        trials=study["trials"],
        time_budget_s=study["time_budget_s"],
        workers=None if study["workers"] == "auto" else study["workers"],
        plan_gate=study["plan_gate"],
        plan_first=study["plan_first"],
        goals=_goals(study, base),
        space=space,
        overrides=overrides,
        baseline=study["baseline"],
        sampler=sampler,
        device=device,
        results_dir=base.config["results_dir"],
        plugins=plugins,
        command=command,
    )


def split(command: list[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """(what sets the study and its sampler, what is fixed, what is swept as key: text) of a command line."""
    own, fixed, sweeps = [], [], {}
    for override in parse(command):
        key = override.get_key_element().lstrip("+")
        swept = override.is_sweep_override()
        if key.split(".")[0] in OWN_GROUPS:
            if swept:
                raise UserError(f"'{override.input_line}': a study cannot be swept")
            own.append(override.input_line)
        elif swept:
            sweeps[key] = override.input_line.partition("=")[2]
        else:
            fixed.append(override.input_line)
    return own, merge(fixed), sweeps


def checked(study: dict[str, Any]) -> dict[str, Any]:
    """The study's node with every key there and of its kind."""
    if not study:
        raise UserError("study=none searches nothing: leave it out, or name a study; `dyno list study` shows them")
    for key in study:
        if key not in KEYS:
            raise UserError(f"study has no knob '{key}'{close(key, KEYS)}")
    filled = {
        "storage": None, "time_budget_s": None, "workers": "auto", "objectives": None, "plan_gate": True, "plan_first": 0,
    } | study  # fmt: skip
    for key in ("constraints", "overrides", "baseline"):
        filled[key] = _is(list, filled.get(key) or [], f"study.{key}", "a list")
    filled["space"] = _is(dict, filled.get("space") or {}, "study.space", "a mapping of a key to its values")
    if not re.fullmatch(r"\w[\w.+-]*", str(filled.get("name", ""))):
        raise UserError(f"study.name is {filled.get('name')!r}; it takes letters, digits and _ . + - (it names a file)")
    _is(str, filled["storage"] or "", "study.storage", "null, a path or an Optuna URL")
    _is(bool, filled["plan_gate"], "study.plan_gate", "true or false")
    if filled["plan_first"] != 0 or isinstance(filled["plan_first"], bool):
        _positive(filled["plan_first"], int, "study.plan_first", "a whole number, 0 or more")
    _positive(filled.get("trials"), int, "study.trials", "a whole number of at least 1")
    if filled["time_budget_s"] is not None:
        _positive(filled["time_budget_s"], (int, float), "study.time_budget_s", "a number of seconds, or null")
    if filled["workers"] != "auto":
        _positive(filled["workers"], int, "study.workers", "auto or a whole number of at least 1")
    return filled


def _is(kind: type, value: Any, name: str, takes: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{name} is {value!r}; it takes {takes}")
    return value


def _positive(value: Any, kind: Any, name: str, takes: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        raise UserError(f"{name} is {value!r}; it takes {takes}")


def _when_met(nodes: list[Any], recipe: Recipe, device: str) -> list[str]:
    """The study's overrides: plain texts, and `{set: [...], when: ...}` where the condition holds."""
    found: list[str] = []
    for node in nodes:
        if isinstance(node, str):
            found.append(node)
            continue
        if not isinstance(node, dict) or set(node) != {"set", "when"} or not isinstance(node["set"], list):
            raise UserError(
                f"study.overrides: {node!r} is neither 'key=value' nor {{set: [key=value], when: key=value}}"
            )
        met = conditions(node["when"], "study.overrides")
        if all(c.holds(lambda key: device if key == "device" else value_of(recipe, key)) for c in met):
            found += node["set"]
    return found


def _goals(study: dict[str, Any], base: Recipe) -> Goals:
    constraints = [constraint(text) for text in study["constraints"]]
    if study["objectives"] is None:
        measures = base.config["workload"]["measures"]
        if measures not in DEFAULT_OBJECTIVES:
            raise UserError(f"workload.measures={measures} has no usual goal: write study.objectives=[{{metric: ..}}]")
        study["objectives"] = [{"metric": m, "direction": d} for m, d in DEFAULT_OBJECTIVES[measures]]
    objectives = [objective(node) for node in _is(list, study["objectives"], "study.objectives", "a list")]
    if not objectives:
        raise UserError("study.objectives is empty; it takes {metric: NAME, direction: minimize or maximize}")
    return Goals(objectives, constraints)


def _space(nodes: dict[str, Any], sweeps: dict[str, str], fixed: list[str], base: Recipe, device: str) -> Space:
    parameters: dict[str, Parameter] = {}
    for key, node in nodes.items():
        values: Any = node
        when: tuple[Condition, ...] = ()
        if isinstance(node, dict):
            if set(node) != {"values", "when"}:
                raise UserError(
                    f"study.space.{key}: {node!r} is neither a sweep nor {{values: a sweep, when: key=value}}"
                )
            values, when = node["values"], conditions(node["when"], f"study.space.{key}")
        parameters[key] = parameter(str(key), str(values), when)
    for key, text in sweeps.items():
        known = parameters.get(key)
        parameters[key] = parameter(key, text, known.when if known else ())
    for key in fixed:
        parameters.pop(key, None)
    for key, p in parameters.items():
        group, _, knob = key.partition(".")
        if knob and not p.when and group in parameters:  # a knob is asked for where the chosen option has it
            having = [o for o in parameters[group].choices if _has_knob(group, o, knob, base)]
            parameters[key] = Parameter(key, p.choices, p.low, p.high, p.step, p.log,
                                        conditions(f"{group}={','.join(having or ['-'])}", key))  # fmt: skip
            if not having:
                raise UserError(f"no option of {group} in this study has the knob '{knob}'")
    space = Space(list(parameters.values()), base, device)
    if not space.parameters:
        raise UserError("the study has nothing to search: name values, such as attention=math,sdpa")
    return space


def _has_knob(group: str, option: str, knob: str, base: Recipe) -> bool:
    kept = [o for o in base.overrides if key_of(o).split(".")[0] != group]
    return value_of(compose([*kept, f"{group}={option}"], base.plugins), f"{group}.{knob}") is not None
