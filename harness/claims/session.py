"""`dyno claims run`: what the chosen claims need and nobody recorded yet, in the order that decides most claims soonest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dyno.claims.claim import Claim
from dyno.claims.formula import quantities
from dyno.claims.judge import CHANCE, STUDY, Place, Row, judge
from dyno.compare import SAMPLED
from dyno.errors import UserError
from dyno.recipe import Recipe, compose


@dataclass
class Session:
    """The runs of some claims: `recipes` by hash, each once, and `uses`: which of them a claim's recipe is."""

    claims: list[Claim]
    place: Place
    recipes: dict[str, Recipe] = field(default_factory=dict)
    uses: dict[str, dict[str, str]] = field(default_factory=dict)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def missing(self, repeats: int = 1) -> list[str]:
        """Hashes that lack a record, in order: the claim that needs the fewest comes first, then the most shared.

        Further rounds follow, up to `repeats` of each recipe whose time a figure takes: runs of one recipe differ by more
        than the steps within them tell. Another round of what failed would fail again.
        """
        out: list[str] = []
        timed = self.timed()
        for turn in range(repeats):
            lacking = {h for h in self.recipes if len(self.records.get(h, ())) <= turn}
            if turn:
                failed = {h for h, made in self.records.items() if made[-1]["status"] != "ok"}
                lacking = (lacking & timed) - failed
            out += self.ordered(lacking)
        return out

    def ordered(self, lacking: set[str]) -> list[str]:
        left = {c.id: {h for h in self.uses[c.id].values() if h in lacking} for c in self.claims}
        out: list[str] = []
        while any(left.values()):
            sharing = {h: sum(h in need for need in left.values()) for need in left.values() for h in need}
            pending = [name for name, need in left.items() if need]
            first = min(pending, key=lambda name: (len(left[name]), -sum(sharing[h] for h in left[name])))
            turn = [h for h in self.uses[first].values() if h in left[first]]
            out += dict.fromkeys(turn)
            left = {name: need - set(turn) for name, need in left.items()}
        return out

    def timed(self) -> set[str]:
        """Hashes of the recipes whose step times a figure takes."""
        return {
            self.uses[c.id][source]
            for c in self.claims
            for f in c.told_on(self.place.device)
            for source, name in quantities(f.formula)
            if name in SAMPLED and source in c.recipes
        }

    def serves(self, recipe_hash: str) -> list[str]:
        """The claims that need a recipe."""
        return [name for name, uses in self.uses.items() if recipe_hash in uses.values()]

    def rows(self) -> list[Row]:
        return [
            judge(c, {name: self.records.get(h, []) for name, h in self.uses[c.id].items()}, self.place)
            for c in self.claims
        ]


def prepared(claims: list[Claim], given: list[str], plugins: list[str] | None = None) -> Session:
    """Compose every recipe that the claims need here, and find what is recorded of them.

    Raises:
        UserError: an override of the command line is wrong, or does not go with a claim.
    """
    from dyno.measure.environment import detect, machine_id
    from dyno.study.settings import merge

    base = compose(given, plugins)
    place = Place(detect(base.config["hardware"]).kind, machine_id(), tuple(_lasting(merge(given))))
    session = Session(claims, place)
    spellings: dict[str, list[list[str]]] = {}
    composed: dict[frozenset[str], Recipe] = {}
    for claim in claims:
        session.uses[claim.id] = {}
        for name in claim.needed(place.device):
            overrides = claim.overrides(name, place.device, given)
            key = frozenset(overrides)
            if key not in composed:
                try:
                    composed[key] = compose(overrides, plugins)
                except UserError as error:
                    raise UserError(f"claim {claim.id}, recipe {name}: {error}") from error
                spellings.setdefault(composed[key].hash, []).append(_lasting(overrides))
            recipe = composed[key]
            session.recipes.setdefault(recipe.hash, recipe)
            session.uses[claim.id][name] = recipe.hash
    for recipe_hash, recipe in session.recipes.items():
        recipe.config["study"] = {
            "name": STUDY, "given": list(place.given), "device": place.device, "machine": place.machine,
            "spellings": spellings[recipe_hash],
        }  # fmt: skip
    session.records = recorded(session, base.config["results_dir"])
    return session


def _lasting(given: list[str]) -> list[str]:
    return [word for word in given if not word.startswith("results_dir=")]


def recorded(session: Session, results_dir: str) -> dict[str, list[dict[str, Any]]]:
    """Records of this machine for the session's recipes; one that ended by chance counts as none."""
    from dyno.record import read_records, runs_dir

    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(runs_dir(results_dir)):
        mark = record["config"].get("study") or {}
        ours = mark.get("name") == STUDY and mark["machine"] == session.place.machine
        if ours and record["recipe_hash"] in session.recipes and record["status"] not in CHANCE:
            found.setdefault(record["recipe_hash"], []).append(record)
    return found


def run(
    session: Session,
    progress: Callable[[str], Any],
    say: Callable[[str], None],
    seconds: float | None = None,
    repeats: int = 1,
) -> list[dict[str, Any]]:
    """Run what is missing; returns the new records. No run starts later than `seconds` after the call."""
    from dyno import runner, show

    started, made, todo = time.monotonic(), [], session.missing(repeats)
    if not todo:
        say("every run that these claims need is recorded")
    for i, recipe_hash in enumerate(todo, 1):
        if seconds is not None and time.monotonic() - started > seconds:
            say(f"{seconds:g} s are over: {len(todo) - i + 1} of {len(todo)} runs were not started")
            break
        record = runner.run(session.recipes[recipe_hash], progress=progress(f"{i}/{len(todo)} "))
        session.records.setdefault(recipe_hash, []).append(record)
        made.append(record)
        say(f"{i}/{len(todo)}  {show.line(record)}  for {', '.join(session.serves(recipe_hash))}")
    return made
