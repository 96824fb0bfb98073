"""Every way of checkpointing on one model shape: what it keeps, what it computes twice, what a step takes.

    python benchmarks/checkpointing.py --seconds 100
    python benchmarks/checkpointing.py --model nano --batch 4 --seq 128 --only none uniform
    python benchmarks/checkpointing.py --workers 2          # both compile, one is timed at a time; both must fit

Each variant is an ordinary run in a process of its own with a short window. Prints one JSON line a variant, as it ends;
what the time does not reach is told.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dyno import runner
from dyno.recipe import Recipe, compose

VARIANTS: dict[str, list[str]] = {
    "none": ["checkpointing=none"],
    "uniform": ["checkpointing=uniform"],
    "selective": ["checkpointing=selective"],
    "optimal 0.5": ["checkpointing=optimal", "checkpointing.budget=0.5"],
    "sqrt": ["checkpointing=sqrt"],
    "fibonacci": ["checkpointing=fibonacci"],
    "none, compiled": ["checkpointing=none", "compile=on"],
    "budget 0.5, compiled": ["checkpointing=budget", "checkpointing.budget=0.5", "compile=on"],
    "optimal 0.25": ["checkpointing=optimal", "checkpointing.budget=0.25"],
    "optimal 0.1": ["checkpointing=optimal", "checkpointing.budget=0.1"],
    "selective, compiled": ["checkpointing=selective", "compile=on"],
    "uniform, compiled": ["checkpointing=uniform", "compile=on"],
    "activations on the host": ["offload=activations"],
}
SHORT = [
    "measure=quick", "measure.min_steps=8", "measure.max_steps=8", "measure.min_seconds=0", "measure.warmup_min_steps=2",
    "measure.warmup_max_steps=4", "workload=train", "workload.steps=0", "workload.eval_tokens=0", "workload.lr=1e-5",
]  # fmt: skip
SHOWN = ("step_time_s", "tokens_per_s", "peak_memory_bytes", "activation_bytes", "recomputed_flops", "compile_time_s")


def measure(name: str, recipe: Recipe) -> dict[str, Any]:
    record = runner.run(recipe)
    metrics = record["metrics"]
    row = {n: metrics[n]["value"] if n in metrics else None for n in SHOWN}
    ends = {"status": record["status"], "reason": record["reason"], "wall_s": record["duration_s"]}
    return {"variant": name, **row, **ends, "id": record["id"], "device": record["fingerprint"].get("device")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seconds", type=float, default=100.0, help="start no variant after so long")
    parser.add_argument("--workers", type=int, default=1, help="variants that start side by side and measure in turn")
    parser.add_argument("--out", default="results/checkpointing", help="results directory")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    given = parser.parse_args()
    shape = [f"model={given.model}", f"workload.batch={given.batch}", f"workload.seq={given.seq}",
             f"precision={given.precision}"]  # fmt: skip
    turns = ["measure.exclusive=window"] if given.workers > 1 else []
    common = [*SHORT, *shape, *turns, f"results_dir={given.out}"]
    recipes = {name: compose([*common, *VARIANTS[name]]) for name in given.only}
    start = time.perf_counter()

    def one(name: str) -> None:
        over = time.perf_counter() - start > given.seconds
        row = {"variant": name, "skipped": f"{given.seconds:.0f} s are over"} if over else measure(name, recipes[name])
        print(json.dumps(row), flush=True)

    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(one, given.only))


if __name__ == "__main__":
    main()
