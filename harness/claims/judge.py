"""Claims against what is recorded: one row a claim, and machine and setting on which it was tested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyno.claims import formula, planned
from dyno.claims.claim import Claim, Figure, Range
from dyno.claims.evidence import DRAWS, Absent, Measured, Missing, Number, Predicted
from dyno.claims.verdict import DECIDED, NOT_HERE, NOT_RUN, PLANNED, of_claim, of_figure
from dyno.errors import UserError
from dyno.measure.statistics import interval

STUDY = "claims"  # what a record of a claim's run says in config.study.name
CHANCE = ("crashed", "timeout", "contaminated")  # ends that say nothing about a recipe: it is run again

Evidence = Measured | Predicted | Absent


@dataclass(frozen=True)
class Judged:
    """One figure: its value with a 95% interval (None: counted or predicted), and its verdicts."""

    figure: Figure
    value: float | None
    low: float | None
    high: float | None
    verdict: str | None
    corrected: str | None
    reason: str
    label: str

    def to_json(self) -> dict[str, Any]:
        f = self.figure
        ends = {name: r and [r.low, r.high] for name, r in (("claimed", f.claimed), ("corrected", f.corrected))}
        return {
            "what": f.what, "formula": f.formula, "unit": f.unit, "value": self.value, "low": self.low,
            "high": self.high, "label": self.label, **ends, "verdict": self.verdict,
            "corrected_verdict": self.corrected, "reason": self.reason or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where records come from: `given` are the command line's overrides."""

    device: str
    machine: str = ""
    given: tuple[str, ...] = ()


@dataclass
class Row:
    """One claim, judged. `flags`: what its runs say against themselves, such as a busy host."""

    claim: Claim
    place: Place
    figures: list[Judged]
    model: str = ""
    machine: str = ""
    runs: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`planned: ...` where every figure that says something is predicted."""
        return self._verdict([(j.verdict, j.label) for j in self.figures if j.verdict])

    @property
    def corrected_verdict(self) -> str | None:
        """The same of the corrected statement; None where none has a figure."""
        found = [(j.corrected, j.label) for j in self.figures if j.corrected]
        return self._verdict(found) if found else None

    def _verdict(self, found: list[tuple[str, str]]) -> str:
        said = of_claim(verdict for verdict, _ in found)
        told = {label for verdict, label in found if verdict not in (NOT_HERE, NOT_RUN)}
        return f"{PLANNED}: {said}" if told == {"predicted"} and said in DECIDED else said

    @property
    def reason(self) -> str:
        """Why it is not `holds`, figure by figure."""
        return "; ".join(dict.fromkeys(f"{j.figure.what}: {j.reason}" for j in self.figures if j.reason))

    def to_json(self) -> dict[str, Any]:
        c = self.claim
        return {
            "id": c.id, "axis": c.axis, "kind": c.kind, "claim": c.claim, "corrected": c.corrected,
            "verdict": self.verdict, "corrected_verdict": self.corrected_verdict, "reason": self.reason or None,
            "figures": [j.to_json() for j in self.figures], "untested": c.untested, "device": self.place.device,
            "model": self.model or None, "machine": self.machine or None, "given": list(self.place.given),
            "runs": self.runs, "flags": self.flags,
        }  # fmt: skip


def judge(claim: Claim, records: Mapping[str, list[dict[str, Any]]], place: Place) -> Row:
    """A claim by records of its recipes, {recipe: its records}; a recipe without any was not run."""
    evidence: dict[str, Evidence] = {
        name: Measured(records[name]) if records.get(name) else Absent("not run yet", NOT_RUN) for name in claim.recipes
    }
    for name, plan in claim.plans.items():
        evidence[name] = Predicted(planned.quantities(plan, f"claim {claim.id}: plans.{name}"))
    figures = [judge_figure(figure, evidence, place.device) for figure in claim.figures]
    used = [r for name in claim.needed(place.device) for r in records.get(name, ())]
    good = [r for r in used if r["status"] == "ok"] or used
    flags = sorted({flag["code"] for r in used for flag in r["validity"].get("flags", ())})
    return Row(claim, place, figures, model_of(good), machine_of(good), [r["id"] for r in used], flags)


def judge_figure(figure: Figure, evidence: Mapping[str, Evidence], device: str) -> Judged:
    label = "predicted" if all(isinstance(evidence[s], Predicted) for s in figure.sources) else "measured"
    try:
        if figure.device not in (None, device):
            raise Missing(f"needs {'a GPU' if figure.device == 'cuda' else 'a CPU'}", NOT_HERE)
        value, low, high = number(figure, evidence)
    except Missing as why:
        claimed, rather = (why.verdict if range_ else None for range_ in (figure.claimed, figure.corrected))
        return Judged(figure, None, None, None, claimed, rather, str(why), label)

    def against(range_: Range | None) -> tuple[str | None, str]:
        return of_figure(value, low, high, range_) if range_ else (None, "")

    (verdict, reason), (corrected, reason_corrected) = against(figure.claimed), against(figure.corrected)
    return Judged(figure, value, low, high, verdict, corrected, reason if verdict else reason_corrected, label)


def number(figure: Figure, evidence: Mapping[str, Evidence]) -> tuple[float, float | None, float | None]:
    """(value, low, high) of a figure. Raises Missing."""
    found = {pair: evidence[pair[0]].number(pair[1]) for pair in formula.quantities(figure.formula)}

    def drawn(n: Number) -> np.ndarray:
        return np.full(DRAWS, n.value) if n.draws is None else n.draws

    try:
        value = formula.evaluate(figure.formula, lambda *pair: found[pair].value)
    except ZeroDivisionError:
        raise Missing(f"{figure.formula} divides by zero") from None
    if all(n.draws is None for n in found.values()):
        return float(value), None, None
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(value), *interval(formula.evaluate(figure.formula, lambda *pair: drawn(found[pair])))


def model_of(records: list[dict[str, Any]]) -> str:
    """The models that were run, each by its option's name."""
    ran = [r for r in records if r["choices"]["workload"] != "kernel"]
    return ", ".join(dict.fromkeys(str(r["choices"]["model"]) for r in ran))


def machine_of(records: list[dict[str, Any]]) -> str:
    """Device and the machine's first digits, several ranks told."""
    ranks = max((len(r.get("ranks") or ()) for r in records), default=0)
    for r in records:
        if r.get("fingerprint"):
            several = f", up to {ranks} ranks" if ranks else ""
            return f"{r['fingerprint']['device']} ({r['fingerprint']['machine'][:8]}){several}"
    return ""


def from_records(claims: list[Claim], records: Iterable[dict[str, Any]], device: str) -> list[Row]:
    """Judge by what `dyno claims run` recorded: a row for every setting and machine on which a claim was tested.

    A record says by which overrides its recipe was asked for (`spellings`: several claims may ask for one in their own
    words), so that it is found even after an option file got another knob, which changes the recipe's hash.

    Args:
        device: the kind of device here, for what was not run anywhere.
    """
    places: dict[Place, dict[frozenset[str], list[dict[str, Any]]]] = {}
    for record in records:
        mark = record["config"].get("study") or {}
        if mark.get("name") == STUDY:
            place = Place(mark["device"], mark["machine"], tuple(mark["given"]))
            for words in mark["spellings"]:
                places.setdefault(place, {}).setdefault(frozenset(words), []).append(record)
    rows = []
    for claim in claims:
        tested = []
        for place, known in places.items():
            try:
                found = of_claim_in(claim, place, known)
            except UserError:  # an override that this version does not know
                continue
            if found:
                tested.append(judge(claim, found, place))
        rows += tested or [judge(claim, {}, Place(device))]
    return rows


def of_claim_in(
    claim: Claim, place: Place, known: Mapping[frozenset[str], list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The records of each of a claim's recipes at a place."""
    found = {}
    for name in claim.needed(place.device):
        made = known.get(frozenset(claim.overrides(name, place.device, list(place.given))))
        if made:
            found[name] = repeats(made)
    return found


def repeats(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of what the newest one ran: an option file may have changed in between."""
    newest = max(records, key=lambda r: r["id"])
    return [r for r in records if r["recipe_hash"] == newest["recipe_hash"]]


def summary(rows: list[Row]) -> dict[str, int]:
    """How many claims have each verdict."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    return counts
