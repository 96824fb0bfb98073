"""A recipe: compose it with Hydra, validate it before any work, hash it, and make its techniques.

Overrides are Hydra's. Every mistake in them becomes one UserError line with the close matches. No code runs from a
config: a `_target_` must lie in `dyno.techniques`, be `dyno.technique.Baseline`, or live in a directory that the user
named with --plugins.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import itertools
import json
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from dyno.axes import AXES, BY_NAME, SUBJECTS
from dyno.composition import CONF, configured, hydra_and_parser, parse, written
from dyno.errors import UserError
from dyno.model.config import BYTE_VOCABULARY, config_of
from dyno.technique import Technique
from dyno.values import check_finite, check_kind, check_sizes

MEASURES = ("train", "infer", "data", "kernel")
EXCLUSIVE = ("run", "window")  # for how long a run has the device to itself
BASELINE = {"_target_": "dyno.technique.Baseline"}


@dataclass
class Recipe:
    """A resolved configuration: plain data (`config`), the option chosen for each axis, and where plug-ins live."""

    config: dict[str, Any]
    choices: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)

    @cached_property
    def hash(self) -> str:
        """Names what is measured: everything but where results go."""
        kept = {k: v for k, v in self.config.items() if k not in ("results_dir", "study", "sampler")}
        return digest([kept, self.choices])[:16]

    @property
    def world_size(self) -> int:
        """Ranks that a run needs."""
        return max(t.world_size for chosen in self.techniques.values() for t in chosen)

    @property
    def writes_state(self) -> bool:
        """Whether a run writes its training state as it goes, or goes on from one."""
        workload = self.config["workload"]
        return bool(workload.get("checkpoint_every") or workload.get("resume"))

    def option(self, axis: str) -> str:
        chosen = self.choices[axis]
        return "+".join(chosen) if isinstance(chosen, list) else chosen

    @cached_property
    def techniques(self) -> dict[str, list[Technique]]:
        """The techniques of each axis, in order of application."""
        return {axis.name: [make(node, self.plugins) for node in self._nodes(axis.name)] for axis in AXES}

    def _nodes(self, axis: str) -> list[dict[str, Any]]:
        node = self.config.get(axis, BASELINE) or {}  # a record older than the axis did without it
        if BY_NAME[axis].many:
            return [node[name] for name in node if isinstance(node[name], dict)]
        return [node]

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "choices": self.choices,
            "overrides": self.overrides,
            "plugins": self.plugins,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        return cls(**data)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def make(node: dict[str, Any], plugins: list[str]) -> Technique:
    """Build one technique from its config node. The only place where a config names code."""
    target = node.get("_target_")
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"an option needs a _target_ such as dyno.techniques.axis.module.Class, got {target!r}")
    module, _, name = target.rpartition(".")
    builtin = target == "dyno.technique.Baseline" or module.startswith("dyno.techniques.")
    if not builtin and not _lies_in_plugins(module, plugins):
        raise UserError(f"_target_ {target} is neither in dyno.techniques nor in a directory named with --plugins")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise UserError(f"_target_ {target} cannot be loaded: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Technique)):
        raise UserError(f"_target_ {target} is not a Technique")
    knobs = {k: v for k, v in node.items() if k != "_target_"}
    known = {f.name for f in fields(cls)}
    for knob in knobs:
        if knob not in known:
            raise UserError(f"{cls.__name__} has no knob '{knob}'{close(knob, known)}")
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name in knobs:
            check_kind(f"{cls.__name__}.{f.name}", knobs[f.name], default)
        elif default is MISSING:
            raise UserError(f"{cls.__name__} needs the knob '{f.name}'")
    return cls(**knobs)


def _lies_in_plugins(module: str, plugins: list[str]) -> bool:
    relative = Path(*module.split("."))
    for folder in plugins:
        if (Path(folder) / relative).with_suffix(".py").is_file():
            if folder not in sys.path:
                sys.path.insert(0, folder)
            return True
    return False


def close(word: str, known: Any) -> str:
    """'; did you mean a, b?' or what there is."""
    names = sorted(known)
    matches = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if matches:
        return f"; did you mean {', '.join(matches)}?"
    return f"; there is {', '.join(names)}" if names else ""


def groups(plugins: list[str] | None = None) -> dict[str, list[str]]:
    """Every config group with its options, plug-ins included."""
    found: dict[str, set[str]] = {}
    for root in [CONF, *[Path(p) / "conf" for p in plugins or []]]:
        for path in root.glob("*/*.yaml"):
            if path.parent.name != "claims":  # what is said about recipes, no part of one
                found.setdefault(path.parent.name, set()).add(path.stem)
    return {name: sorted(options) for name, options in sorted(found.items())}


def option_help(group: str, option: str, plugins: list[str] | None = None) -> str:
    """The one-line help of an option: the first comment of its file that is no directive."""
    for root in [CONF, *[Path(p) / "conf" for p in plugins or []]]:
        path = root / group / f"{option}.yaml"
        if path.is_file():
            for line in path.read_text().splitlines():
                if line.startswith("#") and not line.startswith("# @"):
                    return line[1:].strip()
    return ""


def compose(overrides: list[str], plugins: list[str] | None = None) -> Recipe:
    """Overrides -> a validated Recipe. Raises UserError before any work is done."""
    plugins = [str(Path(p).resolve()) for p in plugins or []]
    for folder in plugins:
        if not Path(folder).is_dir():
            raise UserError(f"--plugins {folder} is not a directory")
    known, parsed = groups(plugins), parse(overrides)
    for override in parsed:
        _check_group(override, known)
    hydra, _ = hydra_and_parser()
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from dyno import resolvers

    resolvers.register()
    try:
        cfg, chosen = configured(overrides, parsed, known, plugins)
        with_hydra = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides, plugins)) from error
    assert isinstance(with_hydra, dict)
    config = {str(k): v for k, v in with_hydra.items()}
    choices = {name: chosen.get(name) for name in (*[a.name for a in AXES], *SUBJECTS)}
    for axis in AXES:
        if axis.many:  # Hydra does not tell the options of a list
            node = config.get(axis.name) or {}
            options = [name for name in node if name != axis.baseline] or [axis.baseline]
            config[axis.name] = {name: node.get(name, BASELINE) for name in options}
            choices[axis.name] = options if len(options) > 1 else options[0]
    _check_values(config, choices, plugins)
    if config["model"]["source"] == "config":  # sizes that do not go together are told now, not by a worker
        config_of(config["model"], config["tokenizer"].get("vocab_size") or BYTE_VOCABULARY)
    recipe = Recipe(config, choices, list(overrides), plugins)
    assert recipe.techniques is not None  # builds every technique, so that a wrong knob is told now
    return recipe


def _check_values(config: dict[str, Any], choices: dict[str, Any], plugins: list[str]) -> None:
    """What describes the subject and the bench has no class with typed knobs: the option file says the kinds."""
    check_kind("seed", config["seed"], 0)
    config["results_dir"] = str(_present("results_dir", config["results_dir"]))
    for group in SUBJECTS:
        _check_like(group, config[group], written(group, choices[group], plugins))
    if config["workload"]["measures"] not in MEASURES:
        raise UserError(f"workload.measures={config['workload']['measures']}: it is one of {', '.join(MEASURES)}")
    if config["workload"]["measures"] == "kernel" and "op" not in config["workload"]:
        raise UserError("workload.measures=kernel needs an op: use workload=kernel")
    if config["measure"]["exclusive"] not in EXCLUSIVE:
        raise UserError(f"measure.exclusive={config['measure']['exclusive']}: it is one of {', '.join(EXCLUSIVE)}")
    check_finite(config)
    check_sizes(config)


def _present(name: str, value: Any) -> Any:
    if value is None:
        raise UserError(f"{name} must not be null")
    return value


def _check_like(name: str, value: Any, written: Any) -> None:
    if isinstance(written, str) and "${" in written:
        return
    if value is None and name.startswith("hardware.") and (isinstance(written, dict) or name.endswith(".value")):
        return  # a quantity that is not stated, as other options leave it
    check_kind(name, value, written)
    if isinstance(written, dict) and "defaults" not in written:
        for key, inner in value.items():
            if key not in written:
                raise UserError(f"{name} has no knob '{key}'{close(str(key), written)}")
            _check_like(f"{name}.{key}", inner, written[key])


def _check_group(override: Any, known: dict[str, list[str]]) -> None:
    key = override.get_key_element().lstrip("+~").split("@")[0]
    first = key.split(".")[0]
    tops = {*known, "results_dir", "seed"}
    if first not in tops:
        raise UserError(f"there is no axis or key '{first}'{close(first, tops)}")
    if override.is_delete():
        raise UserError(f"'{override.input_line}': nothing can be removed; `dyno list {first}` shows the plain option")
    if override.is_sweep_override():
        raise UserError(f"'{override.input_line}' names several values: use `dyno sweep` or `dyno tune`")
    if "." in key or first not in known:
        return
    value = override.value()
    if isinstance(value, list) and not (first in BY_NAME and BY_NAME[first].many):
        raise UserError(f"{first} takes one option, not a list")
    options = value if isinstance(value, list) else [value]
    for option in options:
        if str(option) not in known[first]:
            raise UserError(f"{first} has no option '{option}'{close(str(option), known[first])}")


def _explain(error: Exception, overrides: list[str], plugins: list[str]) -> str:
    """Hydra's several-line error as one line with the close matches of a misspelt knob."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    first = first.removeprefix("UserError raised while resolving interpolation: ")  # what a resolver found
    match = re.search(r"Could not (?:override|append to config\.[^']*) ?'([\w.]+)'", first)
    if not match or "." not in match.group(1):
        return first
    *path, knob = match.group(1).split(".")
    plain = compose([o for o in overrides if "." not in o.partition("=")[0]], plugins)
    node: Any = plain.config
    for i, part in enumerate(path):
        if part not in node:
            return f"{'.'.join(path[:i])}={plain.option(path[0])} has no option '{part}'{close(part, node)}"
        node = node[part] or {}
    known = [name for name in node if name != "_target_"]
    where = f"{path[0]}={plain.option(path[0])}" if path[0] in plain.choices else path[0]
    return f"{where} has no knob '{knob}'{close(knob, known) or '; it has none'}"


def expand(overrides: list[str]) -> list[list[str]]:
    """A sweep written in Hydra's grammar -> every combination as plain overrides, in the order given."""
    lists: list[list[str]] = []
    for override in parse(overrides):
        if override.is_sweep_override():
            key = override.get_key_element()
            if override.is_interval_sweep():
                raise UserError(f"'{override.input_line}' is an interval: a sweep needs values, a tune takes intervals")
            try:
                lists.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            except (hydra_and_parser()[0].errors.HydraException, ValueError, TypeError, ZeroDivisionError) as error:
                raise UserError(f"'{override.input_line}' is no sweep of plain values") from error
        else:
            lists.append([override.input_line])
    return [list(combination) for combination in itertools.product(*lists)]
