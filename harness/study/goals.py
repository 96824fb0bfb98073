"""What a study asks of a row: objectives with directions, and constraints on its figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyno.constraints import METRIC, Constraint
from dyno.errors import UserError
from dyno.recipe import close

DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Objective:
    metric: str
    direction: str


def objective(node: Any) -> Objective:
    """An objective from `{metric: ..., direction: minimize or maximize}`."""
    if not isinstance(node, dict) or set(node) != {"metric", "direction"}:
        raise UserError(f"study.objectives: {node!r} is not {{metric: NAME, direction: minimize or maximize}}")
    if node["direction"] not in DIRECTIONS or not re.fullmatch(METRIC, str(node["metric"])):
        raise UserError(f"study.objectives: {node['metric']}: {node['direction']!r} is neither minimize nor maximize")
    return Objective(node["metric"], node["direction"])


@dataclass(frozen=True)
class Verdict:
    """A result against the goals: objective values, or None with the reason; and each constraint's violation."""

    values: list[float] | None
    violations: dict[str, float]
    reason: str | None = None

    @property
    def broken(self) -> list[str]:
        return [text for text, violation in self.violations.items() if violation > 0]

    @property
    def feasible(self) -> bool:
        return self.values is not None and not self.broken


@dataclass(frozen=True)
class Goals:
    objectives: list[Objective]
    constraints: list[Constraint]

    @property
    def metrics(self) -> list[str]:
        """Every metric that is asked for."""
        return list(dict.fromkeys([o.metric for o in self.objectives] + [c.metric for c in self.constraints]))

    def judge(self, result: Mapping[str, Any], baseline: Mapping[str, float]) -> Verdict:
        """Weigh a result (see session.summary_of). A constraint relative to a figure the baseline lacks is left out."""
        if result["status"] != "ok":
            return Verdict(None, {}, result["reason"])
        metrics: Mapping[str, float] = result["metrics"]
        bounds = {c: c.bound(baseline) for c in self.constraints}
        wanted = [o.metric for o in self.objectives] + [c.metric for c, bound in bounds.items() if bound is not None]
        for name in wanted:
            if name not in metrics:
                return Verdict(None, {}, _missing(name, result))
        violations = {c.text: c.violation(metrics[c.metric], b) for c, b in bounds.items() if b is not None}
        return Verdict([metrics[o.metric] for o in self.objectives], violations)

    def front(self, candidates: list[tuple[Any, list[float]]]) -> list[Any]:
        """Whichever of (thing, objective values) no other beats: at least as good in all, better in one."""
        signs = [1.0 if o.direction == "minimize" else -1.0 for o in self.objectives]
        scored = [(thing, [s * v for s, v in zip(signs, values, strict=True)]) for thing, values in candidates]

        def beaten(score: list[float]) -> bool:
            return any(s != score and all(a <= b for a, b in zip(s, score, strict=True)) for _, s in scored)

        return [thing for thing, score in sorted(scored, key=lambda pair: pair[1]) if not beaten(score)]


def _missing(name: str, result: Mapping[str, Any]) -> str:
    """Why a row that ended well has no value for a metric."""
    if name in result.get("empty", {}):
        return f"{name} was not measured: {result['empty'][name]}"
    return f"there is no metric '{name}' in this row{close(name, result['metrics'])}"
