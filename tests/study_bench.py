"""A stand-in for the runner: writes real records in milliseconds; and `dyno tune` round it, as a program for the tests."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dyno import record, runner
from dyno.recipe import Recipe, compose


def metric(value: float | None) -> dict[str, Any]:
    return {"value": value, "unit": "1", "count": 1} | ({} if value is not None else {"reason": "not finite"})


def outcome(recipe: Recipe, gate: bool) -> dict[str, Any]:
    """Status and metrics as a function of the recipe: a batch of 13 is too large, 17 gives NaN, 19 crashes, the plan
    refuses 23; and 5013 and 5027 as too large, where it may: 5013 is, 5027 is not."""
    workload = recipe.config["workload"]
    batch, lr = workload["batch"], workload["lr"]
    failures = {13: "out_of_memory", 17: "ok", 19: "crashed", 23: "unsupported", 5013: "out_of_memory"}
    refused = batch == 23 or batch in (5013, 5027) and gate
    status = "out_of_memory" if batch == 5027 and gate else failures.get(batch, "ok")
    loss = None if batch == 17 else 2 + abs(math.log(lr / 1e-3)) + 1 / batch
    metrics = {
        "tokens_per_s": metric(100.0 * batch),
        "validation_loss": metric(loss),
        "perplexity": metric(10.0 + batch),
    }
    foreseen = f"predicted: a batch of {batch}" if batch in (23, 5013, 5027) else None
    plan = {"feasible": foreseen is None, "reason": foreseen}
    reason = None if status == "ok" else foreseen if refused else f"a batch of {batch}"
    return {"status": status, "reason": reason, "metrics": metrics if status == "ok" else {}, "plan": plan}


def run(recipe: Recipe, *, progress: Any = None, gate: bool = True, seconds: float = 0.02) -> dict[str, Any]:
    """As runner.run. DIE_AT=before or after ends the process with -9 round the 3rd publication of this process."""
    runs = record.runs_dir(recipe.config["results_dir"])
    run_id = record.new_id(recipe.hash)
    aside = runs / f".running-{run_id}"
    aside.mkdir()
    time.sleep(seconds)
    run.count += 1  # type: ignore[attr-defined]
    dying = os.environ.get("DIE_AT") if run.count == 3 else None  # type: ignore[attr-defined]
    if dying == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    out = {
        "schema": record.SCHEMA, "id": run_id, "created": "2026-01-01T00:00:00+00:00", "duration_s": seconds,
        "recipe_hash": recipe.hash, "overrides": recipe.overrides, "choices": recipe.choices, "config": recipe.config,
        **outcome(recipe, gate),
    }  # fmt: skip
    out["plan"] |= {"gate": gate}
    record.publish(aside, out, runs)
    if dying == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return out


run.count = 0  # type: ignore[attr-defined]


def records(results: Path) -> list[dict[str, Any]]:
    return record.read_records(results)


def quick_compose(overrides: list[str], plugins: list[str] | None = None) -> Recipe:
    """compose, with what it made kept: knobs of the workload and the results directory are set by hand."""
    from dyno.composition import parse

    parsed = parse(overrides)
    simple = [o for o in parsed if o.get_key_element().startswith(("workload.", "results_dir"))]
    rest = tuple(o.input_line for o in parsed if o not in simple)
    if any(o.is_sweep_override() for o in parsed) or any("no_such" in o.input_line for o in parsed):
        return compose(overrides, plugins)
    if rest not in _made:
        _made[rest] = compose(list(rest), plugins).to_json()
    made = Recipe.from_json(json.loads(json.dumps(_made[rest])))
    for o in simple:
        *path, last = o.get_key_element().split(".")
        node = made.config[path[0]] if path else made.config
        node[last] = o.value()
    made.overrides = list(overrides)
    return made


_made: dict[tuple[str, ...], dict[str, Any]] = {}


def main() -> int:
    """`study_bench.py OVERRIDE...` tunes; `study_bench.py --worker` is a worker process of a study."""
    from dyno import study
    from dyno.study import locks, worker

    runner.run = run
    if "MACHINE" in os.environ:
        locks.machine_id = lambda: os.environ["MACHINE"]
    if sys.argv[1:] == ["--worker"]:
        return worker.main()
    try:
        print(json.dumps(study.tune(sys.argv[1:], [], lambda text: None)))
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
