"""Run one recipe: plan, a fresh worker process (or one a rank), a time limit, and a record whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno import processes, record, turns
from dyno.errors import STATUSES, UserError
from dyno.forkserver import ForkServer
from dyno.home import home
from dyno.recipe import Recipe

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.plan import Plan

WORKER = [sys.executable, "-m", "dyno.worker"]  # and the run's directory
RESULT = "result.json"
REQUEST = "request.json"
RENDEZVOUS = "rendezvous"  # of several ranks
LOG_TAIL_LINES = 15

# The first run of a command starts plainly: a server would have to import torch just the same. The compiler's
# front end is two seconds more, and only on a GPU do most recipes compile; its back end starts a thread when imported.
IMPORTS = ("torch", "dyno.pipeline", "dyno.measure.window", "dyno.stages.train", "dyno.stages.infer")
SERVERS = {"cpu": ForkServer(IMPORTS), "cuda": ForkServer((*IMPORTS, "torch._dynamo"))}
_earlier_runs = itertools.count()


@contextlib.contextmanager
def exclusive(device: Device, ranks: int, progress: Callable[[str], None]) -> Iterator[list[int]]:
    """Hold the devices of a run of `ranks` for one measurement; a second one, of any process of this user, waits.

    Yields descriptors of the locked files. Every run takes them in one order, so that no two wait for each other.
    """
    with contextlib.ExitStack() as stack:
        locks = []
        for path, name in lock_files(device, ranks).items():
            told = partial(progress, f"waiting: another run measures on {name}")
            locks.append(stack.enter_context(turns.take(path, waits=told)))
        yield [lock.fileno() for lock in locks]


def lock_files(device: Device, ranks: int) -> dict[Path, str]:
    """The files whose locks stand for the devices of a run of `ranks`, {path: device's name} in the order of taking."""
    from dyno.measure.environment import used

    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    names = {re.sub(r"\W+", "-", f"{device.kind}-{uuid}"): name for uuid, name in used(device, ranks).items()}
    return {folder / f"{name}.lock": names[name] for name in sorted(names)}


def run(recipe: Recipe, *, progress: Callable[[str], None] = lambda text: None, gate: bool = True) -> dict[str, Any]:
    """Run a recipe and return its record, already in its place under <results_dir>/runs.

    A recipe that the plan refuses costs no worker; without `gate` one that is predicted to run out of memory is tried
    all the same. Only KeyboardInterrupt leaves without a record.
    """
    from dyno.measure.environment import detect
    from dyno.plan import predict

    runs = record.runs_dir(recipe.config["results_dir"])
    device = detect(recipe.config["hardware"])
    plan = predict(recipe, device)
    verdict = plan.verdict()
    if verdict and verdict[0] == "out_of_memory" and not gate:
        verdict = None
    # The directory is made, and the clock started, once the device is ours: waiting for it is no part of the run.
    if verdict or takes_turns(recipe):
        return run_aside(recipe, device, plan, verdict, runs, progress)
    with exclusive(device, recipe.world_size, progress) as held:
        return run_aside(recipe, device, plan, verdict, runs, progress, held)


def run_aside(
    recipe: Recipe,
    device: Device,
    plan: Plan,
    verdict: tuple[str, str] | None,
    runs: Path,
    progress: Callable[[str], None],
    held: Sequence[int] = (),
) -> dict[str, Any]:
    """Work in a hidden directory beside the runs, then publish it; a run that is broken off leaves none."""
    run_id = record.new_id(recipe.hash)
    aside = runs / f".running-{run_id}"
    aside.mkdir()
    started, created = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        if verdict:
            result: dict[str, Any] = {"status": verdict[0], "reason": verdict[1]}
        else:
            try:
                result = work(recipe, device, aside, progress, held)
            except OSError as error:  # no memory for a process, no space for its request
                result = {"status": "crashed", "reason": f"the worker could not be started: {error}"}
        for name in (REQUEST, RESULT, RENDEZVOUS):
            (aside / name).unlink(missing_ok=True)
        out = {
            "schema": record.SCHEMA,
            "id": run_id,
            "status": result["status"],
            "reason": result.get("reason"),
            "created": created,
            "duration_s": round(time.monotonic() - started, 3),
            "recipe_hash": recipe.hash,
            "overrides": recipe.overrides,
            "choices": recipe.choices,
            "config": recipe.config,
            "metrics": result.get("metrics", {}),
            "details": result.get("details", {}),
            "windows": result.get("windows", {}),
            "fingerprint": result.get("fingerprint", {}),
            "environment": result.get("environment", {}),
            "validity": result.get("validity", {}),
            "artifacts": result.get("artifacts", []),
            "plan": plan.to_json(),
            "ranks": result.get("ranks", []),
        }
        write_resolved(aside, recipe)
        place = publish(aside, out, runs)
    except BaseException:
        record.discard(aside)
        raise
    return {**out, "_path": str(place)}


def publish(aside: Path, out: dict[str, Any], runs: Path) -> Path:
    """Publish; on a full disk first give up whatever else lies there, the record matters more."""
    try:
        return record.publish(aside, out, runs)
    except OSError:
        record.empty(aside)
    try:
        return record.publish(aside, out, runs)
    except OSError as error:
        raise UserError(f"no record can be written under {runs}: {error}") from error


def write_resolved(aside: Path, recipe: Recipe) -> None:
    from omegaconf import OmegaConf

    with contextlib.suppress(OSError):  # the record holds the configuration too
        (aside / "recipe.yaml").write_text(OmegaConf.to_yaml(recipe.config))


def takes_turns(recipe: Recipe) -> bool:
    """Whether the worker holds the device from its second step on only, and others may start meanwhile; alone it may."""
    return recipe.config["measure"]["exclusive"] == "window" and recipe.world_size == 1


def work(
    recipe: Recipe, device: Device, aside: Path, progress: Callable[[str], None], held: Sequence[int]
) -> dict[str, Any]:
    """Start the worker process(es), wait, and turn whatever came of them into a result."""
    ranks = recipe.world_size
    locks = [str(path) for path in lock_files(device, ranks)] if takes_turns(recipe) else None
    request = {
        "recipe": recipe.to_json(),
        "device": device.kind,
        "index": device.index,
        "ranks": ranks,
        "turns": locks,
        "born": time.time(),
    }
    (aside / REQUEST).write_text(json.dumps(request))
    cores = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"OMP_NUM_THREADS": str(cores)} if ranks > 1 and device.kind == "cpu" else {}),
    }
    limit = float(recipe.config["measure"]["time_limit_s"])
    outcome = processes.run_group(
        [*WORKER, str(aside)],
        ranks,
        environment,
        aside / "log.txt",
        limit,
        progress,
        server=SERVERS[device.kind] if next(_earlier_runs) else None,
        held=held,
        stands=turns.Watch([Path(path) for path in locks], aside.name).other if locks else None,
    )
    return with_stands(judge(aside, outcome, limit), outcome.stood_s)


def with_stands(result: dict[str, Any], stood_s: float) -> dict[str, Any]:
    """The result of a run that stood still so long before its own turn: what its start took is not known."""
    metrics = result.get("metrics", {})
    if stood_s:
        result["details"] = result.get("details", {}) | {"stood_still_s": round(stood_s, 3)}
        unknown = record.unmeasured("s", f"stood still for {stood_s:.1f} s while other runs measured")
        metrics |= record.to_json({name: unknown for name in ("startup_s", "compile_time_s") if name in metrics})
    return result


def judge(aside: Path, outcome: processes.Outcome, limit_s: float) -> dict[str, Any]:
    """The result that the worker wrote, or the typed failure that its end amounts to."""
    results = [read_result(aside / RESULT)]
    results += [read_result(path) for path in sorted(aside.glob("result-rank*.json"))]
    failures = [r for r in results if r and r["status"] != "ok"]
    # A rank that knows why it failed outranks the others, whose collectives broke or hung because of it.
    typed = [r for r in failures if r["status"] != "crashed"]
    if typed:
        return typed[0]
    if outcome.timed_out:
        return {
            "status": "timeout",
            "reason": f"not finished after measure.time_limit_s={limit_s:g} s; the worker was killed",
        }
    first = outcome.first
    killed = first is not None and (outcome.codes[first] or 0) < 0
    if failures and not killed:
        return failures[0]
    if first is not None:
        who = describe(outcome.codes[first], first, len(outcome.codes))
        return {"status": "crashed", "reason": f"{who}{tail(aside)}"}
    if results[0] is None:
        return {"status": "crashed", "reason": f"the worker ended with code 0 and left no result{tail(aside)}"}
    return results[0]


def read_result(path: Path) -> dict[str, Any] | None:
    """A worker's result, or None where there is none or half of one."""
    try:
        result = record.decode(path.read_bytes())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("status") in STATUSES else None


def describe(code: int | None, rank: int, ranks: int) -> str:
    who = f"rank {rank} of {ranks}" if ranks > 1 else "the worker"
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; perhaps by the kernel for lack of memory" if name == "SIGKILL" else ""
        return f"{who} was ended by {name}{hint}"
    return f"{who} ended with code {code}"


def tail(aside: Path) -> str:
    """The last line of the log that says something, as ': ...'."""
    try:
        lines = (aside / "log.txt").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines[-LOG_TAIL_LINES:] if line.strip()]
    return f": {said[-1][:300]}" if said else ""


def clean_leftovers(results_dir: str | Path) -> int:
    """Remove run directories whose runner was killed; returns how many. A live run holds its log or is starting."""
    removed = 0
    for aside in record.runs_dir(results_dir).glob(".running-*"):
        if not processes.is_held(aside / "log.txt") and time.time() - aside.stat().st_mtime > 3600:
            record.discard(aside)
            removed += 1
    return removed
