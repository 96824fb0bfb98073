"""A claim as its file says it, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyno.axes import AXES
from dyno.claims import formula
from dyno.claims.planned import KEYS as PLAN_KEYS
from dyno.composition import CONF
from dyno.errors import UserError
from dyno.recipe import close

KINDS = ("measure", "plan", "scale")
DEVICES = ("cpu", "cuda")
KEYS = {"axis", "claim", "corrected", "kind", "setting", "recipes", "plans", "figures", "untested"}
FIGURE_KEYS = {"what", "formula", "unit", "claimed", "corrected", "device"}
UNITS = ("x", "%", "B", "s", "USD", "tokens", "nats", "")


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, ends included; None is an open end."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class Figure:
    """One number of a claim: its formula, the range that was claimed and the range of the corrected statement.

    `device`: cpu or cuda where it can be told on that only. `unit`: x is a ratio, % a share.
    """

    what: str
    formula: str
    unit: str = "x"
    claimed: Range | None = None
    corrected: Range | None = None
    device: str | None = None

    @property
    def sources(self) -> list[str]:
        """The recipes and plans whose quantities it takes."""
        return list(dict.fromkeys(source for source, _ in formula.quantities(self.formula)))


@dataclass(frozen=True)
class Claim:
    """A published figure and its test.

    `setting` are overrides by device which the command line may change, `recipes` those, by device too, that make the
    test and which it may not. `plans` are predictions (see planned.py). `untested`: what of the
    claim is not put to the test, and why.
    """

    id: str
    axis: str
    claim: str
    kind: str
    figures: list[Figure]
    corrected: str | None = None
    setting: dict[str, list[str]] = field(default_factory=dict)
    recipes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    untested: str | None = None

    def told_on(self, device: str) -> list[Figure]:
        """The figures that can be told on a kind of device."""
        return [f for f in self.figures if f.device in (None, device)]

    def needed(self, device: str) -> list[str]:
        """The recipes that its figures need there, in the file's order."""
        used = {source for figure in self.told_on(device) for source in figure.sources}
        return [name for name in self.recipes if name in used]

    def overrides(self, recipe: str, device: str, given: list[str]) -> list[str]:
        """A recipe's overrides: the setting for the device, what the command line gave, what makes the test."""
        from dyno.study.settings import merge

        return merge([*self.setting.get(device, []), *given, *self.recipes[recipe][device]])


def load(plugins: list[str] | None = None) -> dict[str, Claim]:
    """Every claim by its id, those of plug-in directories (`DIR/conf/claims/`) too."""
    import yaml

    found = {}
    for root in [CONF, *[Path(p) / "conf" for p in plugins or []]]:
        for path in sorted((root / "claims").glob("*.yaml")):
            try:
                node = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
            found[path.stem] = read(path.stem, node)
    return found


def chosen(ids: list[str], plugins: list[str] | None = None) -> list[Claim]:
    """The named claims in that order, all where none is named."""
    known = load(plugins)
    for name in ids:
        if name not in known:
            raise UserError(f"there is no claim '{name}'{close(name, known)}")
    return [known[name] for name in dict.fromkeys(ids or known)]


def read(name: str, node: Any) -> Claim:
    """A claim from its file's mapping. Raises UserError with the close matches of what is wrong."""
    where = f"claim {name}"
    _known(where, node, KEYS)
    axes = [*(axis.name for axis in AXES), "plan"]
    if node.get("axis") not in axes:
        raise UserError(f"{where}: axis is {node.get('axis')!r}{close(str(node.get('axis')), axes)}")
    if node.get("kind") not in KINDS:
        raise UserError(f"{where}: kind is {node.get('kind')!r}; it is one of {', '.join(KINDS)}")
    if not isinstance(node.get("claim"), str):
        raise UserError(f"{where}: `claim` is what was published, as text")
    setting, recipes, plans = (_mapping(where, key, node) for key in ("setting", "recipes", "plans"))
    _known(f"{where}: setting", setting, set(DEVICES))
    for label, words in setting.items():
        _words(f"{where}: setting.{label}", words)
    recipes = {label: _by_device(f"{where}: recipes.{label}", words) for label, words in recipes.items()}
    for label, plan in plans.items():
        _known(f"{where}: plans.{label}", plan, PLAN_KEYS)
    figures = node.get("figures")
    if not isinstance(figures, list) or not figures:
        raise UserError(f"{where}: figures is a list of at least one")
    known = {*recipes, *plans}
    return Claim(
        name, node["axis"], node["claim"], node["kind"], [_figure(where, f, known) for f in figures],
        node.get("corrected"), setting, recipes, plans, node.get("untested"),
    )  # fmt: skip


def _figure(where: str, node: Any, known: set[str]) -> Figure:
    _known(f"{where}: a figure", node, FIGURE_KEYS)
    for key in ("what", "formula"):
        if not isinstance(node.get(key), str):
            raise UserError(f"{where}: a figure needs `{key}`, as text")
    if node.get("unit", "x") not in UNITS:
        raise UserError(f"{where}: unit is {node['unit']!r}; it is one of {', '.join(u for u in UNITS if u)}")
    if node.get("device") not in (None, *DEVICES):
        raise UserError(f"{where}: device is {node['device']!r}; it is one of {', '.join(DEVICES)}")
    formula.parsed(node["formula"], where)
    ranges = {key: _range(f"{where}: {key}", node[key]) for key in ("claimed", "corrected") if key in node}
    if not ranges:
        raise UserError(f"{where}: '{node['what']}' has no range: write claimed or corrected as [low, high]")
    made = Figure(node["what"], node["formula"], node.get("unit", "x"), device=node.get("device"), **ranges)
    for source in made.sources:
        if source not in known:
            raise UserError(f"{where}: '{made.formula}' names no recipe or plan '{source}'{close(source, known)}")
    return made


def _range(where: str, node: Any) -> Range:
    ends = node if isinstance(node, list) and len(node) == 2 else [True]
    if not all(end is None or type(end) in (int, float) for end in ends) or ends == [None, None]:
        raise UserError(f"{where} is {node!r}; it is [low, high], null for an open end")
    if None not in ends and ends[0] > ends[1]:
        raise UserError(f"{where} is {node!r}; its low end lies above its high one")
    return Range(*ends)


def _by_device(where: str, node: Any) -> dict[str, list[str]]:
    """A recipe's list, the same for every device unless it is a mapping of one each."""
    if not isinstance(node, dict):
        return dict.fromkeys(DEVICES, _words(where, node))
    _known(where, node, set(DEVICES))
    return {device: _words(f"{where}.{device}", node.get(device)) for device in DEVICES}


def _words(where: str, node: Any) -> list[str]:
    if not isinstance(node, list) or not all(isinstance(word, str) for word in node):
        raise UserError(f"{where} is {node!r}; it is a list of overrides, each as text")
    return node


def _mapping(where: str, key: str, node: dict[str, Any]) -> dict[str, Any]:
    inner = node.get(key) or {}
    if not isinstance(inner, dict):
        raise UserError(f"{where}: {key} is a mapping")
    return inner


def _known(where: str, node: Any, keys: set[str]) -> None:
    if not isinstance(node, dict):
        raise UserError(f"{where} is no mapping; its keys are {', '.join(sorted(keys))}")
    for key in node:
        if key not in keys:
            raise UserError(f"{where} has no key '{key}'{close(str(key), keys)}")
