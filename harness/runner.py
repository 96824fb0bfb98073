"""Run one recipe: plan, a fresh worker process (or one a rank), a time limit, and a record whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno import processes, record
from dyno.errors import STATUSES
from dyno.recipe import Recipe

if TYPE_CHECKING:
    from dyno.measure.environment import Device

RESULT = "result.json"
REQUEST = "request.json"
LOG_TAIL_LINES = 15


def home() -> Path:
    """Where caches of this machine live: $DYNO_HOME or ~/.cache/dyno."""
    path = Path(os.environ.get("DYNO_HOME") or Path.home() / ".cache" / "dyno")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def exclusive(device: Device, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold a device for one measurement; a second one, of any process of this user, waits its turn."""
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", f"{device.kind}-{device.uuid or device.index}")
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            progress(f"waiting: another run measures on {device.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(recipe: Recipe, *, progress: Callable[[str], None] = lambda text: None, gate: bool = True) -> dict[str, Any]:
    """Run a recipe and return its record, already in its place under <results_dir>/runs.

    A recipe that the plan refuses costs no worker. Only KeyboardInterrupt leaves without a record.
    """
    from dyno.measure.environment import detect
    from dyno.plan import predict

    runs = record.runs_dir(recipe.config["results_dir"])
    run_id = record.new_id(recipe.hash)
    aside = runs / f".running-{run_id}"
    aside.mkdir()
    started, created = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        device = detect(recipe.config["hardware"])
        plan = predict(recipe, device)
        verdict = plan.verdict() if gate else None
        if verdict:
            result: dict[str, Any] = {"status": verdict[0], "reason": verdict[1]}
            (aside / "log.txt").write_text(f"refused before the run: {verdict[1]}\n")
        else:
            with exclusive(device, progress):
                result = work(recipe, device, run_id, aside, progress)
        for name in (REQUEST, RESULT):
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
    """Publish; on a full disk first give up the bulky samples and log, the record matters more."""
    try:
        return record.publish(aside, out, runs)
    except OSError:
        for bulky in ("samples.npz", "log.txt"):
            (aside / bulky).unlink(missing_ok=True)
        return record.publish(aside, out, runs)


def write_resolved(aside: Path, recipe: Recipe) -> None:
    from omegaconf import OmegaConf

    with contextlib.suppress(OSError):  # the record holds the configuration too
        (aside / "recipe.yaml").write_text(OmegaConf.to_yaml(recipe.config))


def world_size(recipe: Recipe) -> int:
    return max(t.world_size for chosen in recipe.techniques.values() for t in chosen)


def work(recipe: Recipe, device: Device, run_id: str, aside: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Start the worker process(es), wait, and turn whatever came of them into a result."""
    ranks = world_size(recipe)
    request = {
        "recipe": recipe.to_json(),
        "device": device.kind,
        "index": device.index,
        "ranks": ranks,
        "born": time.time(),
    }
    (aside / REQUEST).write_text(json.dumps(request))
    cores = max(1, len(os.sched_getaffinity(0)) // ranks)
    environments = [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"OMP_NUM_THREADS": str(cores)} if ranks > 1 and device.kind == "cpu" else {}),
        }
        for rank in range(ranks)
    ]
    commands = [[sys.executable, "-m", "dyno.worker", str(aside)]] * ranks
    limit = float(recipe.config["measure"]["time_limit_s"])
    outcome = processes.run_group(commands, environments, run_id, aside / "log.txt", limit, progress)
    return judge(aside, outcome, limit)


def judge(aside: Path, outcome: processes.Outcome, limit_s: float) -> dict[str, Any]:
    """The result that the worker wrote, or the typed failure that its end amounts to."""
    if outcome.timed_out:
        return {
            "status": "timeout",
            "reason": f"not finished after measure.time_limit_s={limit_s:g} s; the worker was killed",
        }
    results = [read_result(aside / RESULT)]
    results += [read_result(path) for path in sorted(aside.glob("result-rank*.json"))]
    failures = [r for r in results if r and r["status"] != "ok"]
    if failures:
        return failures[0]
    dead = {rank: code for rank, code in enumerate(outcome.codes) if code}
    signalled = [rank for rank, code in dead.items() if code and code != -signal.SIGKILL]
    if dead:
        # The others were killed because one rank ended: name the one that ended by itself.
        rank = signalled[0] if signalled else next(iter(dead))
        return {"status": "crashed", "reason": f"{describe(dead[rank], rank, len(outcome.codes))}{tail(aside)}"}
    if results[0] is None:
        return {"status": "crashed", "reason": f"the worker ended with code 0 and left no result{tail(aside)}"}
    return results[0]


def read_result(path: Path) -> dict[str, Any] | None:
    """A worker's result, or None where there is none or half of one."""
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
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
    """Remove run directories whose runner was killed; returns how many. A live run's directory is younger than an hour
    or still has processes."""
    removed = 0
    for aside in record.runs_dir(results_dir).glob(".running-*"):
        run_id = aside.name.removeprefix(".running-")
        if not processes.members(run_id) and time.time() - aside.stat().st_mtime > 3600:
            record.discard(aside)
            removed += 1
    return removed
