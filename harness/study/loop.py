"""One worker's loop: choose under the gate, run outside it, tell; until the study has what was asked."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from dyno import runner
from dyno.errors import UserError
from dyno.recipe import Recipe, digest
from dyno.study import foresight, show
from dyno.study.interrupts import Interrupts
from dyno.study.session import Session, summary_of

Say = Callable[[str], None]
# A recipe that cannot run, or not in its time, is a bad point: Optuna's PRUNED, from which a sampler learns. What went
# wrong otherwise says nothing about the recipe: FAIL, which samplers leave out.
BAD_POINT = ("unsupported", "out_of_memory", "timeout", "non_finite")


class Failed(Exception):
    """A trial that ended without values."""


class Taken(BaseException):
    """Another machine took this worker for dead and failed its trial. No Exception, which Optuna would want to tell."""


class Loop:
    """Trials one after another on one device.

    Args:
        session: the study.
        progress: what the worker is doing now, to be overwritten.
        say: lines to keep, one a finished trial.
        deadline: time.monotonic() after which no run starts.
        workers: how many loops share the study; for the time left.
    """

    def __init__(self, session: Session, progress: Say, say: Say, deadline: float | None = None, workers: int = 1):
        self.session, self.progress, self.say = session, progress, say
        self.deadline, self.workers = deadline, workers
        self.barren = 0
        self.interrupts = Interrupts()

    def run(self) -> str:
        """Work until there is nothing left to do; why it stopped, in the user's words."""
        session = self.session
        with _quiet(), self.interrupts.noted():
            self.baseline()
            self.foresee()
            while True:
                with self.gate():
                    self.interrupts.check()
                    recovered = session.recover()
                    if recovered:
                        self.say(f"{recovered} broken-off trial{'s' * (recovered > 1)} found: queued again")
                    why = session.why_stop(self.barren)
                    if why is None and self.deadline is not None and time.monotonic() >= self.deadline:
                        why = f"the time budget of {session.settings.time_budget_s:g} s is spent"
                    if why is not None:
                        return why
                    session.queue_next(self.barren)
                    try:
                        session.study.optimize(self.objective, n_trials=1, catch=(Failed,))
                    except Taken:
                        self.say("a trial was taken for broken off while it ran: its record is kept, the study goes on")

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        gate = self.session.gate
        if not gate.acquire(wait=False):
            self.progress("waiting for another worker of this study")
            with self.interrupts.allowed():
                gate.acquire()
        try:
            yield
        finally:
            gate.release()

    def baseline(self) -> None:
        """Try the baseline recipe first, inside the gate: no other trial can be judged without it."""
        session, settings = self.session, self.session.settings
        with self.gate():
            if session.baseline is not None:
                return
            recipe = settings.recipe(settings.baseline)
            point = settings.space.locate(recipe)
            if point is not None:
                session.queue(point)
            result = self.result(recipe)
            entry = {"hash": recipe.hash, "overrides": recipe.overrides, "result": result}
            session.study.set_user_attr("baseline", entry)
            self.tell(result, "baseline")
            for constraint in settings.goals.constraints:
                if constraint.bound(session.baseline_metrics) is None:
                    self.say(f"constraint '{constraint.text}' is not applied: the baseline has no {constraint.metric}")

    def foresee(self) -> None:
        """Queue what the plan finds best, inside the gate, once a study."""
        session = self.session
        if not session.settings.plan_first:
            return
        with self.gate():
            if session.foreseen:
                return
            with self.interrupts.allowed():
                points = foresight.best(session.settings, self.progress)
            session.queue_foreseen(points)
            if points:
                self.say(f"the plan's best {len(points)} of the recipes that it was asked about come first")

    def objective(self, trial: Any) -> list[float]:
        """One trial, for study.optimize. Enters with the gate held and opens it once the recipe is claimed."""
        from optuna.exceptions import UpdateFinishedTrialError

        session = self.session
        trial.set_user_attr("owner", session.owner.mark)
        words = session.settings.trial_overrides(session.settings.space.suggest(trial))
        known, recipe = session.known_at(trial.params), None
        name, overrides, why = "-" + digest(words)[:15], words, ""
        if known is None:
            try:
                recipe = session.settings.recipe(words)
                name, overrides, known = recipe.hash, recipe.overrides, session.tried().get(recipe.hash)
            except UserError as error:  # two options that do not go together
                why = str(error)
        if known is not None:
            name, overrides = known.hash, known.overrides
        in_hand = any(t.user_attrs.get("recipe", {}).get("hash") == name for t in session.running())
        trial.set_user_attr("recipe", {"hash": name, "overrides": overrides})
        session.gate.release()

        if known is not None:
            result = {**known.result, "repeat": True}
        elif in_hand:
            result = _unmeasured("repeat", "another worker is at this recipe") | {"repeat": True}
        else:
            result = self.result(recipe) if recipe is not None else _unmeasured("unsupported", why)
        try:
            trial.set_user_attr("result", result)
        except UpdateFinishedTrialError:
            raise Taken from None
        fresh = not result.get("repeat")
        self.barren = 0 if fresh and result["ran"] else self.barren + 1
        verdict = session.judge(result)
        for text, violation in verdict.violations.items():
            trial.set_constraint(text, violation)
        if fresh:
            self.tell(result, words, extra=1)
        else:
            self.progress("a recipe that the study knows already: not run again")
        if verdict.values is not None:
            return verdict.values
        if result["status"] in BAD_POINT:
            import optuna

            raise optuna.TrialPruned(verdict.reason)
        raise Failed(verdict.reason)

    def result(self, recipe: Recipe) -> dict[str, Any]:
        """Run a recipe, or take the record that a killed worker published and did not tell."""
        settings = self.session.settings
        metrics = settings.goals.metrics
        made = self.session.find_record(recipe.hash)
        if made is not None:
            return summary_of(made, metrics) | {"adopted": True}
        try:
            with self.interrupts.allowed():
                return summary_of(runner.run(recipe, progress=self.progress, gate=settings.plan_gate), metrics)
        except (OSError, UserError):
            raise  # the bench is at fault, not this recipe: every other trial would end so
        except Exception as error:  # noqa: BLE001  a plug-in's prediction runs in this process and may raise anything
            return _unmeasured("crashed", f"{type(error).__name__}: {error}")

    def tell(self, result: dict[str, Any], what: str | list[str], extra: int = 0) -> None:
        """The line of a finished trial. `extra`: it is not among the finished ones yet, 1, or it is, 0."""
        session = self.session
        done = session.done() + (extra if result["ran"] else 0)
        tried = list(session.tried().values())
        self.say(show.trial_line(session, result, what, done, tried, self.left(done)))

    def left(self, done: int) -> float | None:
        """Seconds until the last trial, from the mean of those that ran; None before there is one."""
        seconds = [e.result["seconds"] for e in self.session.tried().values() if e.result["ran"]]
        if not seconds:
            return None
        left = (self.session.settings.trials - done) * sum(seconds) / len(seconds) / self.workers
        return left if self.deadline is None else max(0.0, min(left, self.deadline - time.monotonic()))


def _unmeasured(status: str, reason: str) -> dict[str, Any]:
    return {
        "id": None,
        "status": status,
        "reason": reason,
        "ran": False,
        "seconds": 0.0,
        "metrics": {},
        "empty": {},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's notes on samplers that are called experimental and on points out of its ranges."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="optuna")
        yield
