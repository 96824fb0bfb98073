"""The largest model that trains in a given GPU memory, by the number of layers at a fixed width.

    python benchmarks/largest_model.py --gib 16
    python benchmarks/largest_model.py --gib 4 --only none optimizer --probes 4

A probe is a fresh process that may take so much of the GPU and trains a few steps. The plan makes the first guess,
bisection the rest. Prints one JSON line a probe and one a variant: parameters, tokens/s, peak; and what limited it. A
probe's line says how long each phase took (import_s, build_s, prepare_s, first_step_s), those before its end if it died.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

VARIANTS = {
    "none": ["offload=none"],
    "activations": ["offload=activations"],
    "optimizer": ["offload=optimizer"],
    "nvme": ["offload=nvme"],
    "parameters": ["offload=parameters"],
}
HOST_SHARE = 0.6  # of the host's memory that offload may take
# Pinned memory is registered page by page: several threads, or a probe waits half a minute for it.
PINNED = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


def recipe_of(overrides: list[str], layers: int) -> Any:
    from dyno.recipe import compose

    return compose([*overrides, f"model.layers={layers}"])


def guess(overrides: list[str], gib: float, most: int) -> tuple[int, int]:
    """(layers that the plan fits into the GPU, layers whose offloaded state fits into the host), at most `most`."""
    from dyno.measure.environment import detect, memory_bytes
    from dyno.plan import predict
    from dyno.recipe import Recipe

    base = recipe_of(overrides, 1)
    device = replace(detect(base.config["hardware"]), memory_bytes=int(gib * 2**30))
    host = HOST_SHARE * memory_bytes()

    def fits(layers: int, where: str) -> bool:
        recipe = Recipe({**base.config, "model": {**base.config["model"], "layers": layers}}, base.choices)
        plan = predict(recipe, device)
        if where == "device":
            return not plan.reasons and plan.needed_bytes <= device.memory_bytes
        return plan.host_bytes <= host

    found = []
    for where in ("device", "host"):
        low, high = 1, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, where) else (low, middle)
        found.append(low)
    return found[0], found[1]


def probe(overrides: list[str], layers: int, gib: float, steps: int) -> dict[str, Any]:
    """Train in this process; what it took, or why it did not fit. Each phase prints the row as it is by then."""
    row: dict[str, Any] = {"layers": layers, "gib": gib}
    since = time.perf_counter()

    def ends(phase: str) -> None:
        nonlocal since
        now = time.perf_counter()
        row[phase], since = round(now - since, 2), now
        print(json.dumps(row), flush=True)

    import numpy as np
    import torch

    from dyno.errors import RunFailure
    from dyno.pipeline import Pipeline
    from dyno.stages import train

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
    recipe = recipe_of(overrides, layers)
    workload = recipe.config["workload"]
    ends("import_s")
    with tempfile.TemporaryDirectory() as directory:
        pipeline = Pipeline(recipe, device, Path(directory))
        try:
            model = train.fresh_model(pipeline, {"vocab_size": 257})
            row["parameters"] = sum(p.numel() for p in model.parameters())
            ends("build_s")
            run = train.prepared_run(pipeline, model)
            stream = np.random.default_rng(0).integers(0, 257, 50 * workload["seq"])
            trainer = train.Trainer(run, stream, workload, seed=0)
            ends("prepare_s")
            trainer.step()
            trainer.finite_loss()
            ends("first_step_s")
            start = time.perf_counter()
            for _ in range(steps):
                trainer.step()
            trainer.finite_loss()  # waits for the device
            row["step_time_s"] = (time.perf_counter() - start) / steps
            row["tokens_per_s"] = trainer.tokens_per_step / row["step_time_s"]
        except (torch.OutOfMemoryError, RunFailure) as error:
            return {**row, "fits": False, "reason": str(error).splitlines()[0][:200]}
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return {**row, "fits": True}


def last_row(printed: str) -> dict[str, Any]:
    """How far a probe has come: its last whole line of JSON, or nothing."""
    for line in reversed(printed.splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return {}


def probed(variant: str, layers: int, given: argparse.Namespace) -> dict[str, Any]:
    """A probe in a fresh process; one that dies or hangs did not fit."""
    command = [sys.executable, __file__, "--probe", variant, "--layers", str(layers), "--gib", str(given.gib),
               "--steps", str(given.steps), "--overrides", *given.overrides]  # fmt: skip
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": PINNED}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.timeout, env=environment)
        row, reason = last_row(done.stdout), f"died: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        row, reason = last_row((error.stdout or b"").decode()), f"no end after {given.timeout:.0f} s"
    if "fits" not in row:
        row = {"layers": layers, **row, "fits": False, "reason": reason}
    row = {"variant": variant, **row, "wall_s": round(time.perf_counter() - start, 1)}
    print(json.dumps(row), flush=True)
    return row


def search(variant: str, given: argparse.Namespace) -> None:
    """From the plan's guess up or down by a quarter until the answer is enclosed, then bisect; prints the largest."""
    planned, cap = guess([*given.overrides, *VARIANTS[variant]], given.gib, given.most)
    low, high, layers, best = 0, cap + 1, min(planned, cap), None
    for _ in range(given.probes):
        row = probed(variant, layers, given)
        if row["fits"]:
            low, best = layers, row
        else:
            high = layers
        if high - low <= 1:
            break
        if low == 0:
            layers = max(1, int(0.75 * layers))
        elif high == cap + 1:
            layers = min(cap, max(layers + 1, int(1.25 * layers)))
        else:
            layers = (low + high) // 2
    limits = {cap: "host memory", given.most: "--most"}  # where both are one, the search was cut short
    limit = limits.get(low) or (
        "device memory" if high - low <= 1 else f"--probes: {low + 1} to {high - 1} layers untried"
    )
    answer = {k: v for k, v in (best or {}).items() if k not in ("variant", "fits", "wall_s", "gib")}
    print(
        json.dumps({"largest": variant, "gib": given.gib, "planned_layers": planned, "limit": limit, **answer}),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16.0, help="GPU memory that a probe may take")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=["none", "optimizer", "parameters"])
    parser.add_argument("--probes", type=int, default=5, help="at most, for a variant")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a probe, after one")
    parser.add_argument("--timeout", type=float, default=60.0, help="s, for a probe")
    parser.add_argument("--most", type=int, default=400, help="layers")
    parser.add_argument("--overrides", nargs="*", help="the recipe, offload and model.layers apart", default=[
        "model=1b", "precision=bf16", "checkpointing=uniform", "workload=train", "workload.batch=1", "workload.seq=2048",
        "workload.lr=1e-5",
    ])  # fmt: skip
    parser.add_argument("--probe", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        print(json.dumps(probe([*given.overrides, *VARIANTS[given.probe]], given.layers, given.gib, given.steps)))
        return
    for variant in given.only:
        search(variant, given)


if __name__ == "__main__":
    main()
