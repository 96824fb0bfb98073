"""The study loop: suggest a recipe, run it (or adopt the record it already has), tell Optuna, until the trials are done.

A trial is finished when its run's record is told. What a killed process left running is failed and asked for again; a
record that was published but never told is adopted, so no recipe is measured twice.
"""

from __future__ import annotations

import fcntl
import os
import random
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.recipe import Recipe, compose, parse
from dyno.study.score import Score, summarise
from dyno.study.space import Dimension, current, grid, space_of, suggest
from dyno.study.storage import make_sampler, open_storage

if TYPE_CHECKING:
    import optuna

WORKER = "DYNO_STUDY_WORKER"
PATIENCE = 25  # suggestions in a row that were all known before a space without a grid counts as exhausted

Progress = Callable[[str], None]


class FailedTrial(Exception):
    """A trial whose record is a typed failure or lacks an objective; the study goes on."""


class Exhausted(Exception):
    """Every recipe of the space has been tried."""


def tune(overrides: list[str], plugins: list[str], progress: Progress) -> dict[str, Any]:
    """Run or resume the study that the overrides describe; returns its summary as plain data."""
    sweeps = [o.input_line for o in parse(overrides) if o.is_sweep_override()]
    fixed = [o for o in overrides if o not in sweeps]
    first = compose(fixed, plugins)
    node = first.config["study"]
    if not node.get("objectives"):
        raise UserError("name a study, for example study=quickstart; `dyno list study` shows them")
    keys = {o.split("=")[0] for o in fixed}
    base_overrides = [o for o in node.get("overrides") or [] if o.split("=")[0] not in keys] + fixed
    base = compose(base_overrides, plugins)
    dimensions = space_of(node, sweeps, keys)
    if not dimensions:
        raise UserError("the study's space is empty: give it values, for example precision=fp32,bf16")
    compose(
        [*base_overrides, *[f"{d.key}={d.nearest(current(base, d.key))}" for d in dimensions if not d.when]], plugins
    )
    command = "dyno tune " + " ".join(shlex.quote(o) for o in overrides)
    return Study(base, base_overrides, dimensions, plugins, progress, command).run()


class Study:
    """One process's part in a study; several processes may share the storage."""

    def __init__(
        self,
        base: Recipe,
        overrides: list[str],
        dimensions: list[Dimension],
        plugins: list[str],
        progress: Progress,
        command: str,
    ):
        self.base, self.overrides, self.dimensions = base, overrides, dimensions
        self.plugins, self.progress, self.command = plugins, progress, command
        self.node: dict[str, Any] = base.config["study"]
        self.results_dir = Path(base.config["results_dir"])
        self.score = Score(self.node)
        self.grid = grid(dimensions)
        self.started = time.monotonic()
        self.duplicates = 0
        self.interrupted = False

    def run(self) -> dict[str, Any]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        is_worker = WORKER in os.environ
        lock = None if is_worker else self._own()
        try:
            storage, self.where = open_storage(self.node, self.results_dir)
            self.study = optuna.create_study(
                storage=storage,
                sampler=make_sampler(self.base.config["sampler"], self.grid, self.base.config["seed"]),
                study_name=self.node["name"],
                directions=[o["direction"] for o in self.node["objectives"]],
                load_if_exists=True,
            )
            self.study.set_metric_names([o["metric"] for o in self.node["objectives"]])
            if not is_worker:
                self._recover()
            workers = self._workers()
            if workers > 1 and not is_worker:
                self._spawn(workers)
            else:
                self._loop()
        except KeyboardInterrupt:
            self.interrupted = True
            if is_worker:
                raise
            print(f"\ninterrupted; nothing is lost. Resume with:\n  {self.command}", file=sys.stderr)
        finally:
            if lock is not None:
                lock.close()
        return self._summary()

    def _own(self) -> Any:
        """One `dyno tune` a study at a time: recovering a trial that another process still runs would be wrong."""
        folder = self.results_dir / "studies"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{self.node['name']}.owner").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"study {self.node['name']} is being tuned by another process; wait, or set study.name"
            ) from error
        return lock

    def _recover(self) -> None:
        """Fail what a killed process left running, ask for it again; a new study starts with the baseline."""
        import optuna

        state = optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self.study._storage.set_trial_user_attr(trial._trial_id, "abandoned", True)
            self.study.tell(trial.number, state=state.FAIL, skip_if_finished=True)
            if trial.params:
                self.study.enqueue_trial(trial.params, user_attrs={"again": True}, skip_if_exists=False)
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(self._defaults(), user_attrs={"baseline": True})

    def _defaults(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for d in self.dimensions:
            values[d.key] = d.nearest(current(self.base, d.key))
        return values

    def _workers(self) -> int:
        if self.node["workers"] != "auto":
            return max(1, int(self.node["workers"]))
        from dyno.measure.environment import detect

        return detect(self.base.config["hardware"]).count

    def _spawn(self, workers: int) -> None:
        """One process a GPU, each seeing only its own; they share the storage and this terminal."""
        from dyno.measure.environment import detect

        device = detect(self.base.config["hardware"])
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(device.count))).split(",")
        processes = []
        for i in range(workers):
            environment = {**os.environ, WORKER: str(i)}
            if device.kind == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = visible[i % len(visible)]
            words = shlex.split(self.command)[2:]
            extra = [part for folder in self.plugins for part in ("--plugins", folder)]
            command = [sys.executable, "-m", "dyno.cli", "tune", *words, *extra]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        try:
            for process in processes:
                process.wait()
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def _loop(self) -> None:
        budget = self.node.get("time_budget_s")
        while (left := self.node["trials"] - len(self._measured())) > 0:
            if budget and time.monotonic() - self.started > budget:
                self._say(f"time budget of {budget:g} s is spent, {left} trials are left")
                return
            try:
                self.study.optimize(self._objective, n_trials=1, catch=(FailedTrial,))
            except Exhausted as reason:
                self._say(str(reason))
                return

    def _objective(self, trial: optuna.Trial) -> tuple[float, ...]:
        from dyno import runner

        values = suggest(self.dimensions, trial, self.base)
        recipe = compose([*self.overrides, *[f"{k}={v}" for k, v in values.items()]], self.plugins)
        known, told = self._known()
        record = known.get(recipe.hash)
        if record is not None and record["id"] in told:
            self._duplicate(trial, record)
        else:
            self.duplicates = 0
            if record is None:
                label = " ".join(f"{k}={v}" for k, v in values.items())
                self.progress(f"trial {len(self._measured()) + 1}/{self.node['trials']}: {label}")
                record = runner.run(recipe, progress=self.progress)
            trial.set_user_attr("run", record["id"])
            if not record["plan"].get("feasible", True):
                trial.set_user_attr("refused", True)  # cost no run, so it takes no trial either
        trial.set_user_attr("status", record["status"])
        outcome = self.score.judge(record, self._baseline(record, trial))
        for name, excess in outcome.constraints.items():
            trial.set_constraint(name, excess)
        if not trial.user_attrs.get("duplicate"):
            self._tell_person(record, outcome.reason)
        if outcome.values is None:
            raise FailedTrial(outcome.reason)
        return outcome.values

    def _duplicate(self, trial: optuna.Trial, record: dict[str, Any]) -> None:
        """A recipe that this study has already measured costs nothing; the next suggestion is one that it has not."""
        trial.set_user_attr("duplicate", record["id"])
        self.duplicates += 1
        if self.grid is None:
            if self.duplicates >= PATIENCE:
                raise Exhausted(f"{PATIENCE} suggestions in a row were known: the space is searched through")
            return
        seen = {tuple(sorted((k, str(v)) for k, v in t.params.items())) for t in self.study.get_trials(deepcopy=False)}
        fresh = [c for c in self.grid if tuple(sorted((k, str(v)) for k, v in self._asked(c).items())) not in seen]
        if not fresh:
            raise Exhausted("every recipe of the space has been tried")
        self.study.enqueue_trial(random.Random(trial.number).choice(fresh))

    def _asked(self, combination: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a combination that its conditions leave."""
        from dyno.study.space import applies, plain

        values: dict[str, Any] = {}
        for d in self.dimensions:
            if applies(d.when, {k: plain(v) for k, v in values.items()}, self.base):
                values[d.key] = combination[d.key]
        return values

    def _finished(self) -> list[Any]:
        """Trials whose own run is told: duplicates and abandoned ones do not count."""
        return [
            t
            for t in self.study.get_trials(deepcopy=False)
            if t.state.is_finished() and "run" in t.user_attrs and "abandoned" not in t.user_attrs
        ]

    def _measured(self) -> list[Any]:
        """Finished trials that took a run; recipes that the plan refused are told but cost nothing."""
        return [t for t in self._finished() if "refused" not in t.user_attrs]

    def _known(self) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """(recipe hash -> record of this study, ids of the records that trials have told)."""
        from dyno.record import read_records, runs_dir

        runs_dir(self.results_dir)
        mine = {
            r["recipe_hash"]: r
            for r in read_records(self.results_dir / "runs")
            if (r["config"].get("study") or {}).get("name") == self.node["name"]
        }
        return mine, {t.user_attrs["run"] for t in self._finished()}

    def _baseline(self, record: dict[str, Any], trial: optuna.Trial) -> dict[str, Any]:
        """The record that `baseline` in a constraint means: the first finished trial's; its own for the very first."""
        for t in self._finished():
            if t.number < trial.number and t.state.name == "COMPLETE":
                known, _ = self._known()
                return next((r for r in known.values() if r["id"] == t.user_attrs["run"]), record)
        return record

    def _tell_person(self, record: dict[str, Any], reason: str) -> None:
        """One line a trial: how far, what came of it, the best so far, the time left."""
        from dyno import show

        if not record["plan"].get("feasible", True):
            self._say(f"refused before a run: {record['reason']}")
            return
        done, asked = len(self._measured()) + 1, self.node["trials"]
        spent = time.monotonic() - self.started
        left = spent / max(1, done) * (asked - done)
        metrics = record["metrics"]
        parts = [
            f"trial {done}/{asked}",
            record["status"] if record["status"] != "ok" or not reason else "no objective",
        ]
        if record["status"] == "ok" and not reason:
            for objective in self.node["objectives"]:
                m = metrics[objective["metric"]]
                parts.append(f"{objective['metric']} {show.si(m['value'], m['unit'])}")
        else:
            parts.append(str(record["reason"] or reason)[:120])
        best = self.score.best([*self._complete_values()])
        parts += [f"best {best}"] if best else []
        self._say("  ".join([*parts, f"~{int(left) // 60}:{int(left) % 60:02d} left"]))

    def _complete_values(self) -> list[float]:
        return [t.values[0] for t in self._finished() if t.state.name == "COMPLETE" and t.values]

    def _say(self, text: str) -> None:
        end = getattr(self.progress, "end", None)
        if end:
            end()
        print(text, file=sys.stderr, flush=True)

    def _summary(self) -> dict[str, Any]:
        known, _ = self._known()
        by_id = {r["id"]: r for r in known.values()}
        return summarise(self, by_id)
