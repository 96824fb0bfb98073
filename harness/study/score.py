"""From a record to what Optuna is told: objective values, constraint excesses, or the reason why there are none."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.report.rows import rows
from dyno.report.summary import parse_constraint

if TYPE_CHECKING:
    from dyno.study.tune import Study


@dataclass
class Outcome:
    """`values` by objective, or None with a reason; `constraints` are at most 0 where they hold."""

    values: tuple[float, ...] | None
    reason: str = ""
    constraints: dict[str, float] = field(default_factory=dict)


class Score:
    """The objectives and constraints of a study."""

    def __init__(self, study: dict[str, Any]):
        self.objectives: list[dict[str, str]] = study["objectives"]
        self.constraints: list[str] = list(study.get("constraints") or [])
        for objective in self.objectives:
            if objective.get("direction") not in ("minimize", "maximize"):
                raise UserError(f"objective {objective.get('metric')} needs direction: minimize or maximize")
        for text in self.constraints:
            parse_constraint(text, None)

    def judge(self, record: dict[str, Any], baseline: dict[str, Any]) -> Outcome:
        """Objective values and constraint excesses of a record, `baseline` being the record that the word means."""
        if record["status"] != "ok":
            return Outcome(None, f"{record['status']}: {record['reason']}")
        values = []
        for objective in self.objectives:
            metric = record["metrics"].get(objective["metric"])
            if metric is None:
                return Outcome(None, f"the record has no metric {objective['metric']}")
            if metric["value"] is None:
                return Outcome(None, f"{objective['metric']} was not measured: {metric.get('reason')}")
            values.append(float(metric["value"]))
        return Outcome(tuple(values), "", self._excesses(record, baseline))

    def _excesses(self, record: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
        """How far a record is past each bound, as a share of the bound; what cannot be told counts as violated."""
        (row,), (base,) = rows(None, [record]), rows(None, [baseline])
        found = {}
        for text in self.constraints:
            constraint = parse_constraint(text, base)
            value = row.value(constraint.metric)
            if value is None or constraint.bound is None:
                found[text] = 1.0
                continue
            over = value - constraint.bound if constraint.op[0] == "<" else constraint.bound - value
            found[text] = over / (abs(constraint.bound) or 1.0)
        return found

    def best(self, values: list[float]) -> str:
        """The best value of the first objective so far, for the progress line."""
        if not values:
            return ""
        from dyno import show

        chosen = max(values) if self.objectives[0]["direction"] == "maximize" else min(values)
        return show.si(chosen)


def summarise(study: Study, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The end of a study: its front with the command that repeats each recipe, on stderr and as plain data."""
    from dyno import show

    finished = study._finished()
    measured = study._measured()
    failures: dict[str, int] = {}
    for trial in finished:
        if trial.state.name != "COMPLETE":
            status = trial.user_attrs.get("status", "crashed")
            failures[status] = failures.get(status, 0) + 1
    front = []
    for trial in study.study.best_trials if any(t.state.name == "COMPLETE" for t in finished) else []:
        record = records.get(trial.user_attrs.get("run", ""))
        if record is None or any(f["id"] == record["id"] for f in front):
            continue
        metrics = {o["metric"]: record["metrics"][o["metric"]] for o in study.score.objectives}
        repeat = [
            o for o in record["overrides"] if o.split("=")[0].split(".")[0] not in ("study", "sampler", "results_dir")
        ]
        command = "dyno run " + " ".join(shlex.quote(o) for o in repeat)
        front.append({"id": record["id"], "overrides": record["overrides"], "metrics": metrics, "command": command})
    first = study.score.objectives[0]
    front.sort(key=lambda f: f["metrics"][first["metric"]]["value"], reverse=first["direction"] == "maximize")
    said = "".join(f", {n} {status.replace('_', ' ')}" for status, n in sorted(failures.items()))
    lines = [f"\nstudy {study.node['name']}: {len(measured)} of {study.node['trials']} trials{said}; {study.where}"]
    lines += ["best recipes:"] if front else ["no trial reached its objectives and constraints"]
    for place in front:
        figures = "  ".join(f"{n} {show.si(m['value'], m['unit'])}" for n, m in place["metrics"].items())
        lines += [f"  {figures}", f"    {place['command']}"]
    print("\n".join(lines), file=sys.stderr)
    return {
        "name": study.node["name"],
        "storage": study.where,
        "results_dir": str(study.results_dir),
        "objectives": [[o["metric"], o["direction"]] for o in study.score.objectives],
        "constraints": study.score.constraints,
        "trials_done": len(measured),
        "trials_asked": study.node["trials"],
        "front": front,
        "failures": failures,
        "interrupted": study.interrupted,
        "resume_command": study.command,
    }
