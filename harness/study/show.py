"""What a study says: a line a trial, and the summary at the end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from dyno.show import si

if TYPE_CHECKING:
    from dyno.study.session import Session, Tried


def figure(metric: str, value: float) -> str:
    """A value with the unit that the metric's name ends in."""
    unit = "B" if metric.endswith("_bytes") else "s" if metric.endswith("_s") and not metric.endswith("per_s") else ""
    return f"{metric} {si(value, unit)}"


def clock(seconds: float) -> str:
    """80 -> '1:20', 5000 -> '1:23:20'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def trial_line(
    session: Session, result: dict[str, Any], what: str | list[str], done: int, tried: list[Tried], left: float | None
) -> str:
    """`trial 5/12  ok  tokens_per_s 12.3 k  ...  (precision=bf16)  | best ... | ~1:20 left`.

    A recipe that was not run has a dash for its number. `tried` are the results before this one.
    """
    goals, verdict = session.settings.goals, session.judge(result)
    number = f"{done}/{session.settings.trials}" if result["ran"] else f"-/{session.settings.trials}"
    parts = [f"trial {number}", result["status"] + (" (record found)" if result.get("adopted") else "")]
    if verdict.values is None:
        parts.append(verdict.reason or "")
    else:
        parts += [figure(o.metric, v) for o, v in zip(goals.objectives, verdict.values, strict=True)]
        parts += [f"breaks {text}" for text in verdict.broken]
    parts.append(f"({what})" if isinstance(what, str) else " ".join(what))
    line = "  ".join(part for part in parts if part)
    values = [e.verdict.values for e in tried if e.verdict.feasible and e.verdict.values is not None]
    if verdict.feasible and verdict.values is not None:
        values.append(verdict.values)
    if values:
        first = goals.objectives[0]
        pick = max if first.direction == "maximize" else min
        line += f" | best {figure(first.metric, pick(v[0] for v in values))}"
    if left is not None and done < session.settings.trials:
        line += f" | ~{clock(left)} left"
    return line


def front(session: Session) -> list[Tried]:
    """The recipes that keep every constraint and that no other beats."""
    entries = [e for e in session.tried().values() if e.verdict.feasible]
    return session.settings.goals.front([(e, e.verdict.values) for e in entries if e.verdict.values is not None])


def failures(session: Session) -> dict[str, int]:
    """How many distinct recipes were run and ended in each status; `unmeasured`: well, but without a figure that was
    asked for."""
    entries = [e for e in session.tried().values() if not e.refused]
    found = [e.result["status"] for e in entries if e.result["status"] != "ok"]
    found += ["unmeasured" for e in entries if e.result["status"] == "ok" and e.verdict.values is None]
    return dict(Counter(found))


def refusals(session: Session) -> dict[str, int]:
    """How many distinct recipes were refused before a run, by the status that the plan foresaw."""
    return dict(Counter(e.result["status"] for e in session.tried().values() if e.refused))


def counted(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in found.items())


def summary(session: Session, stopped: str) -> dict[str, Any]:
    """The study as plain data for JSON."""
    settings = session.settings
    base = session.baseline
    return {
        "name": settings.name,
        "storage": settings.place.text,
        "results_dir": settings.results_dir,
        "trials_done": session.done(),
        "trials_asked": settings.trials,
        "stopped": stopped,
        "objectives": [[o.metric, o.direction] for o in settings.goals.objectives],
        "constraints": [c.text for c in settings.goals.constraints],
        "baseline": {"id": base["result"]["id"], "status": base["result"]["status"]} if base else None,
        "front": [
            {
                "id": e.result["id"],
                "overrides": e.overrides,
                "metrics": e.result["metrics"],
                "command": settings.run_command(e.overrides),
            }
            for e in front(session)
        ],
        "failures": failures(session),
        "refused": refusals(session),
        "resume_command": settings.tune_command(),
    }


MOST_SHOWN = 6


def text(session: Session, summary: dict[str, Any]) -> str:
    """The summary for a terminal: the best recipes with the command that repeats each, failures, paths."""
    lines = [f"study {summary['name']}: {summary['trials_done']} of {summary['trials_asked']} trials"]
    if summary["stopped"] != "done":
        lines[0] += f"; stopped: {summary['stopped']}"
    best = summary["front"]
    lines.append(f"best recipes ({len(best)}):" if best else "no recipe has every objective and keeps every constraint")
    for entry in best[:MOST_SHOWN]:
        figures = "  ".join(figure(metric, entry["metrics"][metric]) for metric, _ in summary["objectives"])
        mark = "  (baseline)" if summary["baseline"] and entry["id"] == summary["baseline"]["id"] else ""
        lines += [f"  {figures}{mark}", f"    {entry['command']}"]
    if len(best) > MOST_SHOWN:
        lines.append(f"  and {len(best) - MOST_SHOWN} more in the JSON on stdout")
    if summary["failures"]:
        counts = counted(summary["failures"])
        lines.append(f"run without a result: {counts}; `dyno table {summary['results_dir']}` shows the reasons")
    if summary["refused"]:
        lines.append(f"refused by the plan before a run: {counted(summary['refused'])}; they cost no trial")
    lines.append(f"records: {summary['results_dir']}/runs   study: {summary['storage']}")
    if summary["stopped"] == "done":
        more = session.settings.tune_command(f"study.trials={2 * summary['trials_asked']}")
        lines.append(f"more trials: {more}")
    return "\n".join(lines)
