"""`dyno tune`: read the settings, run the workers, say what won."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from dyno import runner
from dyno.study import show, workers
from dyno.study.loop import Loop, Say
from dyno.study.session import Session
from dyno.study.settings import Settings, read

MOST_RESTARTS = 3  # of workers that were lost with trials left to do


def tune(
    recipe_overrides: list[str],
    plugins: list[str],
    progress: Callable[[str], None],
    *,
    workers: int | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Search recipes until the study has its trials; the same words again go on where a killed one stopped.

    Args:
        recipe_overrides: Hydra overrides; sweeps among them are searched, plain ones fixed.
        plugins: directories of the user's own techniques.
        progress: gets what happens now, a line that the next one replaces. Its `end()`, if it has one, is called
            before a line that stays.
        workers: at most so many processes; default: the study's, one a GPU.
        say: gets the lines that stay, one a finished trial; default: stderr.

    Returns:
        The summary, as JSON data: name, storage, results_dir, trials_done, trials_asked, stopped, objectives,
        constraints, baseline, front [{id, overrides, metrics, command}], failures and refused {status: count}, resume_command.

    Raises:
        UserError: a mistake in the words, or a bench that cannot work (no space for records).
        KeyboardInterrupt: with the command that resumes as its text.
    """
    started = time.monotonic()

    def keep(text: str) -> None:
        getattr(progress, "end", lambda: None)()
        print(text, file=sys.stderr, flush=True)

    say = say or keep
    settings = read(recipe_overrides, plugins)
    deadline = None if settings.time_budget_s is None else started + settings.time_budget_s
    runner.clean_leftovers(settings.results_dir)
    session = Session(settings)
    try:
        if session.tried():
            say(f"study {settings.name} goes on: {session.done()} of {settings.trials} trials are done")
        stopped = _work(session, workers, progress, say, deadline)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{session.done()} of {settings.trials} trials are kept; resume with: {settings.tune_command()}"
        ) from None
    finally:
        session.close()
    summary = show.summary(session, stopped)
    say(show.text(session, summary))
    return summary


def _work(session: Session, asked: int | None, progress: Say, say: Say, deadline: float | None) -> str:
    """One device: here. Several: a process each, started again while one of them is lost."""
    settings: Settings = session.settings
    number = workers.count(settings, asked)
    if number == 1:
        return Loop(session, progress, say, deadline).run()
    for _ in range(1 + MOST_RESTARTS):
        stopped, lost = workers.run(settings, workers.gpu_masks(number), progress, say, deadline)
        if not lost or session.done() >= settings.trials:
            break
        say("a worker was lost: its trial is queued again")
    return "done" if session.done() >= settings.trials else stopped
