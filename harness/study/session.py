"""A study under way: its trials as results, what a killed worker left, and what is to be tried next.

Every decision about trials is made while holding the study's gate, a lock that dies with its holder. So a trial that is
marked as running, without a living owner, was broken off, whenever that was. Whether an owner on another machine lives,
the storage tells (see `storage.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dyno import record
from dyno.errors import UserError
from dyno.study import samplers
from dyno.study.goals import Verdict
from dyno.study.locks import FileLock, Owner
from dyno.study.settings import Settings

MOST_BARREN = 50  # suggestions in a row that gave no run
PATIENCE = 4  # of them, before a finite space is walked instead
YOUNG_S = 60.0  # a remote trial without an owner may be another machine's, between two writes


def summary_of(made: Mapping[str, Any], metrics: list[str]) -> dict[str, Any]:
    """What the study keeps of a record: status, figures, and why one that the goals name is empty."""
    values = {name: m.get("value") for name, m in made["metrics"].items()}
    reasons = {n: made["metrics"][n].get("reason") or "no reason given" for n in metrics if n in values}
    return {
        "id": made["id"],
        "status": made["status"],
        "reason": made["reason"],
        "ran": was_run(made),
        "seconds": made["duration_s"],
        "metrics": {name: value for name, value in values.items() if value is not None},
        "empty": {name: reason for name, reason in reasons.items() if values[name] is None},
    }


def was_run(made: Mapping[str, Any]) -> bool:
    """Whether a worker was started for a record. What the plan refused ends with the plan's own reason; without the
    plan's gate a recipe may be run against it, and end as it will."""
    plan = made["plan"]
    return plan.get("feasible") is not False or made["reason"] != plan["reason"]


@dataclass(frozen=True)
class Tried:
    """One distinct recipe of the study with its result."""

    hash: str
    overrides: list[str]
    result: dict[str, Any]
    verdict: Verdict

    @property
    def refused(self) -> bool:
        """Whether it was known not to run before a worker was started for it."""
        return not self.result["ran"] and self.result["status"] in ("unsupported", "out_of_memory")


class Session:
    """A worker's hold on the study. `study` is Optuna's."""

    def __init__(self, settings: Settings, worker: int = 0):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.settings = settings
        self.storage = settings.place.open()
        self.gate = FileLock(settings.place.locks / "gate")
        directions: list[Any] = [o.direction for o in settings.goals.objectives]
        self.gate.acquire()
        try:
            self.study = optuna.create_study(
                storage=self.storage, study_name=settings.name, directions=directions, load_if_exists=True
            )
            self._check_spec()
            self.owner = Owner(settings.place.locks)
            self.study.sampler = samplers.make(settings.sampler, len(self.trials()), worker)
        finally:
            self.gate.release()

    def _check_spec(self) -> None:
        known, spec = self.study.user_attrs.get("spec"), self.settings.spec
        if known is None:
            for point in self.settings.space.samples():  # a wrong option or knob is told before any work
                self.settings.recipe(self.settings.trial_overrides(point))
            self.study.set_user_attr("spec", spec)
            return
        for key, value in spec.items():
            if known[key] != value:
                raise UserError(
                    f"the study '{self.settings.name}' in {self.settings.place.text} was made with other {key}: "
                    f"{_differing(known[key], value)}; choose another study.name"
                )

    def close(self) -> None:
        self.owner.close()
        self.gate.release()

    def trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    # what is known

    @property
    def baseline(self) -> dict[str, Any] | None:
        """{hash, overrides, result} of the baseline recipe, once it was tried."""
        return self.study.user_attrs.get("baseline")

    @property
    def baseline_metrics(self) -> dict[str, float]:
        base = self.baseline
        return base["result"]["metrics"] if base and base["result"]["status"] == "ok" else {}

    def judge(self, result: Mapping[str, Any]) -> Verdict:
        return self.settings.goals.judge(result, self.baseline_metrics)

    def tried(self) -> dict[str, Tried]:
        """Every distinct recipe that has a result, by its hash, the baseline first."""
        found: dict[str, Tried] = {}
        goals, base, figures = self.settings.goals, self.baseline, self.baseline_metrics
        entries = [base] if base else []
        entries += [
            {**t.user_attrs["recipe"], "result": t.user_attrs["result"]}
            for t in self.trials()
            if t.state.is_finished() and "result" in t.user_attrs and not t.user_attrs["result"].get("repeat")
        ]
        for entry in entries:
            result = entry["result"]
            found.setdefault(
                entry["hash"], Tried(entry["hash"], entry["overrides"], result, goals.judge(result, figures))
            )
        return found

    def done(self) -> int:
        """Distinct recipes that were run: what study.trials counts."""
        return sum(entry.result["ran"] for entry in self.tried().values())

    def running(self) -> list[Any]:
        """Trials that living workers, others than this one, are at."""
        return [t for t in self.trials() if t.state.name == "RUNNING" and self._is_alive(t)]

    def find_record(self, recipe_hash: str) -> dict[str, Any] | None:
        """A record of this study for a recipe: published by a worker that was killed before it told."""
        runs = record.runs_dir(self.settings.results_dir)
        for path in sorted(runs.glob(f"*-{recipe_hash[:8]}-*/record.json")):
            try:
                made = record.decode(path.read_bytes())
            except (OSError, ValueError):
                continue
            ours = made.get("config", {}).get("study") or {}
            if made.get("recipe_hash") == recipe_hash and ours.get("name") == self.settings.name:
                return made
        return None

    def known_at(self, params: Mapping[str, Any]) -> Tried | None:
        """What is known of a point of the space from a finished trial there, without composing its recipe again."""
        point, tried = self.settings.space.tidy(params), self.tried()
        hashes = [
            t.user_attrs["recipe"]["hash"]
            for t in self.trials()
            if "result" in t.user_attrs and self._point(t) == point
        ]
        return next((tried[name] for name in hashes if name in tried), None)

    # what a killed worker left

    def _is_alive(self, trial: Any) -> bool:
        mark = trial.user_attrs.get("owner")
        if mark is not None:
            return self.owner.is_alive(mark)
        remote = self.settings.place.journal is None
        return remote and (datetime.now() - trial.datetime_start).total_seconds() < YOUNG_S

    def recover(self) -> int:
        """Fail trials whose worker is gone and queue their recipes again; how many. To be called inside the gate.

        Queued first, failed second: killed between the two, the next recovery finds both and queues nothing twice.
        """
        import optuna

        running = {t.number for t in self.trials() if t.state.name == "RUNNING"}
        optuna.storages.fail_stale_trials(self.study)  # other machines'; nothing where the storage has no heartbeat
        failed, lost, sound = [], [], []
        for t in self.trials():
            if t.state.name == "RUNNING" and not self._is_alive(t):
                lost.append(t)
            elif t.state.name == "FAIL" and "result" not in t.user_attrs:
                failed.append(t)
            else:
                sound.append(t)
        covered = {self._point(t) for t in sound}
        for t in failed + lost:
            point = self._point(t)
            if point and point not in covered:
                covered.add(point)
                self.study.enqueue_trial(dict(t.system_attrs.get("fixed_params") or t.params))
        for t in lost:
            self.study.tell(t.number, state=optuna.trial.TrialState.FAIL)
        return len(lost) + sum(t.number in running for t in failed)

    def _point(self, trial: Any) -> frozenset[tuple[str, Any]]:
        """Where in the space a trial lies; empty while that is not decided."""
        params = trial.system_attrs.get("fixed_params") or (trial.params if "recipe" in trial.user_attrs else {})
        return self.settings.space.tidy(params)

    # what comes next

    def untried(self) -> dict[str, Any] | None:
        """A combination of a finite space that no trial has, in the sampler's order; None where there is none."""
        every = self.settings.space.combinations() or []
        if samplers.order(self.settings.sampler) != "written":
            every = random.Random(self.settings.sampler.get("seed")).sample(every, len(every))
        seen = {self._point(t) for t in self.trials() if t.state.name != "FAIL" or "result" in t.user_attrs}
        return next((point for point in every if self.settings.space.tidy(point) not in seen), None)

    def why_stop(self, barren: int) -> str | None:
        """Why no further trial starts, in the user's words; None while one should. Inside the gate."""
        done, running = self.done(), len(self.running())
        if done >= self.settings.trials:
            return "done"
        if done + running >= self.settings.trials:
            return "other workers are at the last trials"
        if any(t.state.name == "WAITING" for t in self.trials()):
            return None
        if self.settings.space.combinations() and self.untried() is None:
            return f"the space is exhausted: all of its {len(self.settings.space.combinations() or [])} combinations were tried"
        if barren >= MOST_BARREN:
            return f"{barren} suggestions in a row were recipes that cannot run or were tried before"
        return None

    def queue_next(self, barren: int) -> None:
        """Choose the next point where that is not left to the sampler. Inside the gate."""
        walks = samplers.order(self.settings.sampler) is not None
        if (walks or barren >= PATIENCE) and not any(t.state.name == "WAITING" for t in self.trials()):
            point = self.untried()
            if point is not None:
                self.study.enqueue_trial(point)

    @property
    def foreseen(self) -> bool:
        """Whether the plan's best were queued already."""
        return bool(self.study.user_attrs.get("foreseen"))

    def queue_foreseen(self, points: list[dict[str, Any]]) -> None:
        for point in points:
            self.queue(point)
        self.study.set_user_attr("foreseen", True)

    def queue(self, point: dict[str, Any]) -> None:
        if self.settings.space.tidy(point) not in {self._point(t) for t in self.trials()}:
            self.study.enqueue_trial(point)


def _differing(known: Any, now: Any) -> str:
    """The first thing that two specifications differ in, shortly."""
    if isinstance(known, dict) and isinstance(now, dict):
        key = next(k for k in [*now, *known] if known.get(k) != now.get(k))
        return f"{key} was {known.get(key)}, now {now.get(key)}"
    if isinstance(known, list) and isinstance(now, list):
        gone, new = [x for x in known if x not in now], [x for x in now if x not in known]
        return f"was {gone or known}, now {new or now}"
    return f"was {known}, now {now}"
