"""Samplers by name, from the config group `sampler`: a fixed list, no code named by a configuration."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.recipe import close

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

ENUMERATION = "Enumeration"  # every combination, found by the session itself; random only where a trial is repeated
# Whether a worker that begins at trial n gets a seed of its own: a resumed study must not draw the first points again.
# QMC continues its one sequence from the storage.
NAMES = {"TPESampler": True, "RandomSampler": True, "NSGAIISampler": True, "GPSampler": True, "QMCSampler": False}


def make(node: Any, trials_before: int, worker: int) -> BaseSampler:
    """The Optuna sampler of a config node `{name, seed, keywords}`.

    Raises:
        UserError: a name that is not listed, a keyword that the sampler does not take.
    """
    import optuna

    knobs = dict(node) if isinstance(node, dict) else {}
    name, seed = knobs.pop("name", None), knobs.pop("seed", 0)
    if name == ENUMERATION:
        return optuna.samplers.RandomSampler(seed=seed)
    if name not in NAMES:
        raise UserError(f"sampler.name is {name!r}{close(str(name), {*NAMES, ENUMERATION})}")
    if NAMES[name] and seed is not None:
        seed = random.Random(f"{seed}/{trials_before}/{worker}").randrange(2**31)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return getattr(optuna.samplers, name)(seed=seed, **knobs)
    except (TypeError, ValueError) as error:
        raise UserError(f"sampler {name}: {error}") from error


def order(node: dict[str, Any]) -> str | None:
    """In which order a sampler tries every combination: written or random; None if it does not."""
    if node.get("name") != ENUMERATION:
        return None
    if node.get("order") not in ("written", "random"):
        raise UserError(f"sampler.order is {node.get('order')!r}; it is written or random")
    return node["order"]
