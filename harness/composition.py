"""Overrides -> a config, by Hydra; options that were composed before are not composed again."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Container
from functools import lru_cache
from pathlib import Path
from typing import Any

from dyno.errors import UserError

CONF = Path(importlib.import_module("dyno.conf").__path__[0])


@lru_cache(maxsize=1)
def hydra_and_parser() -> Any:
    """Hydra, imported when it is first needed, and its parser of overrides."""
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return hydra, OverridesParser.create()


def parse(overrides: list[str]) -> list[Any]:
    """Hydra's override objects, or a UserError with the offending word."""
    _, parser = hydra_and_parser()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except Exception as error:  # noqa: BLE001  the parser raises several antlr types; all mean the same to the user
            raise UserError(f"'{text}' is not an override; write axis=option or axis.knob=value") from error
    return parsed


def _quoted(text: str) -> str:
    """Text as a word of Hydra's grammar, whatever is in it."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def by_hydra(overrides: tuple[str, ...], plugins: tuple[str, ...] = ()) -> tuple[Any, dict[str, Any]]:
    """(config, option of every group), nothing resolved yet."""
    hydra, _ = hydra_and_parser()
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    search = ",".join(_quoted(f"file://{Path(p) / 'conf'}") for p in plugins)
    extra = [f"hydra.searchpath=[{search}]"] if plugins else []
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("recipe", overrides=[*overrides, *extra], return_hydra_config=True)
    chosen = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    plain = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    OmegaConf.set_struct(plain, True)
    return plain, {str(name): option for name, option in chosen.items()}


_kept_options = lru_cache(maxsize=64)(by_hydra)  # of Dyno's own options, whose files stay as they are


def configured(
    overrides: list[str], parsed: list[Any], known: Container[str], plugins: list[str]
) -> tuple[Any, dict[str, Any]]:
    """`by_hydra`, or what it would give: `parsed` are the overrides again, `known` the names of groups."""
    found = None if plugins else _with_values(parsed, known)
    return found or by_hydra(tuple(overrides), tuple(plugins))


def _with_values(parsed: list[Any], known: Container[str]) -> tuple[Any, dict[str, Any]] | None:
    """Options alone, kept from before if they were the same, and then the values put in: recipes of a study differ in
    little else. None where an override is more than that, or wrong, for Hydra to take or to refuse.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if any(o.package is not None or o.is_add() or o.is_force_add() for o in parsed):
        return None
    options = tuple(o.input_line for o in parsed if o.key_or_group in known)
    cfg, chosen = _kept_options(options)
    cfg = copy.deepcopy(cfg)
    try:
        for override in parsed:
            if override.key_or_group not in known:
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    except OmegaConfBaseException:
        return None
    return cfg, chosen


def written(group: str, option: str, plugins: list[str]) -> Any:
    """An option file as it is written, nothing inherited or interpolated; None where there is none."""
    for root in [CONF, *[Path(p) / "conf" for p in plugins]]:
        path = root / group / f"{option}.yaml"
        if path.is_file():
            return _kept_file(path) if root == CONF else _file(path)
    return None


def _file(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


_kept_file = lru_cache(maxsize=256)(_file)  # whoever asks only reads
