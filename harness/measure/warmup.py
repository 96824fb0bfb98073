"""Warm-up: the same step with the same shapes until its time stops drifting. The first step is told apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dyno.measure.clock import synchronize
from dyno.measure.statistics import is_steady


def ranks() -> int:
    """How many processes run this together; 1 without torch.distributed."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def largest_over_ranks(value: float, device: torch.device) -> float:
    """The largest of all ranks' values, so that ranks decide alike; `value` itself in a run of one."""
    if ranks() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return float(tensor.item())


def warm_up(
    step: Callable[[], object],
    device: torch.device,
    measure: Mapping[str, Any],
    after_first: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run `step` until it is steady, at least warmup_min_steps and at most warmup_max_steps times.

    Every rank of a run does as many steps as the one that settles last.

    Args:
        step: one step, exactly as it will be measured.
        measure: warmup_min_steps, warmup_max_steps and warmup_tolerance (the drift over the last steps that passes).
        after_first: called when the first step is over, in no step's time.

    Returns:
        steps; seconds in all; first_step_s, which holds compilation, capture and allocation; compile_time_s, the first
        step less the median of the later ones; steady; times, every step's seconds.
    """
    low, high = int(measure["warmup_min_steps"]), int(measure["warmup_max_steps"])
    window = max(5, low - 1)
    times: list[float] = []
    steady = False
    synchronize(device)
    while len(times) < high:
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            after_first()
        settled = is_steady(np.array(times[1:]), window, float(measure["warmup_tolerance"]))
        steady = largest_over_ranks(float(not settled), device) == 0.0
        if steady and len(times) >= low:
            break
    later = float(np.median(times[1:])) if len(times) > 1 else math.nan
    return {
        "steps": len(times),
        "seconds": sum(times),
        "first_step_s": times[0] if times else None,
        "compile_time_s": max(0.0, times[0] - later) if len(times) > 1 else None,
        "steady": steady,
        "times": times,
    }


def steps_to_fill(step_s: float, device: torch.device, measure: Mapping[str, Any]) -> int:
    """How many steps of `step_s` seconds fill min_steps and min_seconds, at most max_steps; the same on every rank.

    A run of several ranks needs this: were each to watch its own clock, one would stop while the others wait for it.
    """
    wanted = max(int(measure["min_steps"]), math.ceil(float(measure["min_seconds"]) / max(step_s, 1e-9)))
    return int(largest_over_ranks(min(wanted, int(measure["max_steps"])), device))
