"""What the plan expects to win, tried first: a sampler starts from nothing, arithmetic does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from dyno.plan import Plan, predict
from dyno.study.settings import Settings
from dyno.study.space import Value

if TYPE_CHECKING:
    from dyno.study.goals import Objective

LOOKED_AT = 128  # points at most: each is a recipe composed and planned
SAMPLE = 48  # of them at random, the others are neighbours of the best so far
FIGURES: dict[str, Callable[[Plan], float | None]] = {
    "tokens_per_s": lambda plan: plan.tokens_per_s,
    "step_time_s": lambda plan: plan.step_s,
    "peak_memory_bytes": lambda plan: plan.peak_memory_bytes or None,
}

Point = dict[str, Value]


def best(settings: Settings, progress: Callable[[str], None]) -> list[Point]:
    """The settings.plan_first points that the plan finds best by the first objective that it predicts, the best first.

    A random sample is looked at, then what differs in one parameter from the best so far, from the next best, and so on.
    Empty where the space is not finite, no objective is predicted, or nothing fits.
    """
    every = settings.space.combinations()
    objective = next((o for o in settings.goals.objectives if o.metric in FIGURES), None)
    if not (settings.plan_first and settings.plan_gate and every and objective):
        return []
    rng = random.Random(settings.sampler.get("seed"))
    waiting = rng.sample(every, min(SAMPLE, len(every)))
    tidy = settings.space.tidy
    seen: set[frozenset[tuple[str, Value]]] = set()  # by what tells points apart
    grown: set[frozenset[tuple[str, Value]]] = set()
    scored: list[tuple[float, Point]] = []
    while len(seen) < LOOKED_AT:
        for point in waiting[: LOOKED_AT - len(seen)]:
            progress(f"asking the plan about recipe {len(seen) + 1}, {LOOKED_AT} at most")
            seen.add(tidy(point))
            score = _score(settings, objective, point)
            if score is not None:
                scored.append((score, point))
        scored.sort(key=lambda pair: -pair[0])  # of equals, the one that was met first
        origin = next((point for _, point in scored if tidy(point) not in grown), None)
        if origin is None:
            break
        grown.add(tidy(origin))
        waiting = [p for p in every if _neighbours(p, origin) and tidy(p) not in seen]
        rng.shuffle(waiting)
    return [point for _, point in scored[: settings.plan_first]]


def _score(settings: Settings, objective: Objective, point: Point) -> float | None:
    """The predicted figure, larger is better; None for a recipe that cannot run or has no prediction."""
    try:
        plan = predict(settings.recipe(settings.trial_overrides(point)), settings.device)
    except Exception:  # noqa: BLE001  options that do not go together, or a plug-in's own: the trial that meets it tells
        return None
    figure = None if plan.verdict() else FIGURES[objective.metric](plan)
    return figure if figure is None or objective.direction == "maximize" else -figure


def _neighbours(a: Point, b: Point) -> bool:
    """Whether two points differ in one parameter, those apart that only one of them has."""
    return sum(a[key] != b[key] for key in a.keys() & b.keys()) <= 1
