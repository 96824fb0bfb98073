"""Random training recipes, run within a time limit: what the planner is judged and calibrated on.

    python benchmarks/planner_recipes.py --seconds 900 --out results/planner          # every recipe the plan lets through
    python benchmarks/planner_recipes.py --seconds 500 --out results/planner --workers 5
    python benchmarks/planner_recipes.py --seconds 300 --out results/audit --audit 0.97 --workers 5   # just past the limit

Several workers start and compile side by side and measure in turn (measure.exclusive=window): memory is exact, and
while a step is timed the others stand still. They are let in while the predicted peaks of all fit into the device; a recipe
that runs out of memory beside others is run again alone, but under an audit.

Recipe number i is a function of the seed and i alone, so any prefix is a fair sample and a second call goes on where the
first stopped. Axes and options come from the config directory: what is not there is not drawn. Under an audit every
recipe may take a share of the memory that the plan says it needs, is therefore refused, and runs all the same: one that
ends well was refused falsely. Those that need less than a limit may be are left out. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dyno import runner
from dyno.errors import UserError
from dyno.measure.environment import detect
from dyno.plan import predict
from dyno.recipe import Recipe, compose, groups
from dyno.show import line
from dyno.values import LEAST_GIB

# Options by axis with their weights; one that this checkout does not have is left out.
AXES: dict[str, dict[str, float]] = {
    "precision": {"bf16": 6, "fp16": 1, "tf32": 2, "fp32": 1, "bf16_master": 2, "bf16_stochastic": 1, "fp8": 1},
    "attention": {"sdpa": 3, "sdpa_flash": 3, "sdpa_cudnn": 3, "sdpa_efficient": 1, "sdpa_math": 1, "math": 2},
    "checkpointing": {"none": 5, "uniform": 3, "sqrt": 2, "fibonacci": 1, "selective": 1},
    "compile": {"off": 5, "on": 2},
    "accumulation": {"none": 4, "gradients": 1},
    "optimizer": {"adamw": 6, "adamw8bit": 1, "muon": 1},
    "loss": {"full": 4, "chunked": 1, "fused": 1},
    "offload": {"none": 8, "optimizer": 1, "activations": 1},
}
GPU_SIZES: dict[str, list[int]] = {
    "layers": [2, 4, 6, 8, 12, 16, 20], "hidden": [512, 768, 1024, 1536, 2048, 2560], "head_dim": [64, 128],
    "vocab_size": [8192, 32000, 50304, 128256], "batch": [4, 8, 16, 32, 64, 128], "seq": [256, 512, 1024, 2048, 4096],
}  # fmt: skip
CPU_SIZES: dict[str, list[int]] = {
    "layers": [1, 2, 3, 4], "hidden": [64, 128, 192], "head_dim": [16, 32], "vocab_size": [512, 2048, 8192],
    "batch": [4, 8], "seq": [32, 64, 128],
}  # fmt: skip
MOST_FLOPS = {"cuda": 1e14, "cpu": 2e11}  # of a step, so that a run costs seconds; fp32 is eight times slower


def draw(seed: int, index: int, kind: str) -> list[str]:
    """The overrides of recipe `index`, small enough to take a second a step."""
    rng = random.Random(f"{seed}/{index}")
    sizes = GPU_SIZES if kind == "cuda" else CPU_SIZES
    there = groups()
    chosen = {}
    for axis, options in AXES.items():
        known = {name: weight for name, weight in options.items() if name in there.get(axis, [])}
        if known:
            chosen[axis] = rng.choices(list(known), list(known.values()))[0]
    if kind == "cpu":
        chosen |= {"compile": "off", "attention": rng.choice(["math", "sdpa"]), "precision": "fp32"}
    most = MOST_FLOPS[kind] / (8 if kind == "cuda" and chosen["precision"] == "fp32" else 1)
    while True:
        size = {name: rng.choice(values) for name, values in sizes.items()}
        heads = size["hidden"] // size["head_dim"]
        kv_heads = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
        ffn = 64 * round(size["hidden"] * rng.choice([2, 2.67, 3.5, 4]) / 64)
        weights = (
            size["layers"] * (4 * size["hidden"] ** 2 + 3 * size["hidden"] * ffn) + size["vocab_size"] * size["hidden"]
        )
        if 6 * weights * size["batch"] * size["seq"] < most:
            break
    tied = rng.choice(["true", "false"])
    per_block = ["compile.per_block=true"] if chosen.get("compile") == "on" and rng.random() < 0.5 else []
    return [
        "model=160m", f"model.layers={size['layers']}", f"model.hidden={size['hidden']}", f"model.ffn_width={ffn}",
        f"model.heads={heads}", f"model.kv_heads={kv_heads}", f"model.head_dim={size['head_dim']}", "model.max_seq=8192",
        f"model.vocab_size={size['vocab_size']}", f"model.tied_embeddings={tied}", f"workload.batch={size['batch']}",
        f"workload.seq={size['seq']}", "workload.steps=0", "workload.eval_tokens=0", "workload.lr=1e-4", "measure=probe",
        *(f"{axis}={option}" for axis, option in chosen.items()), *per_block,
    ]  # fmt: skip


def done(out: Path) -> set[str]:
    """Recipes that already ran: one line each in done.jsonl, whatever became of them."""
    path = out / "done.jsonl"
    return {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()


class Room:
    """The device's memory, shared out by what is predicted; a recipe that needs most of it gets it alone."""

    def __init__(self, total: int):
        self.total, self.taken, self.holders = total, 0, 0
        self.changed = threading.Condition()

    def enter(self, predicted: int) -> int:
        wanted = int(1.25 * predicted) + (1 << 30)  # the prediction is what is on trial; a context takes its part too
        with self.changed:
            self.changed.wait_for(lambda: not self.holders or self.taken + wanted <= 0.9 * self.total)
            self.taken, self.holders = self.taken + wanted, self.holders + 1
        return wanted

    def leave(self, wanted: int) -> None:
        with self.changed:
            self.taken, self.holders = self.taken - wanted, self.holders - 1
            self.changed.notify_all()


class Campaign:
    """What is drawn, run and written down within the time."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.out, self.started = given, Path(given.out), time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        self.known = done(self.out)
        self.device = detect({"device": given.hardware if given.hardware == "cpu" else "auto"})
        self.room = Room(self.device.memory_bytes)
        self.counts = dict.fromkeys(("ok", "out_of_memory", "other", "unsupported", "refused", "too_small"), 0)
        self.writing = threading.Lock()
        self.again: list[tuple[str, Recipe]] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def drawn(self) -> Iterator[tuple[str, Recipe, int]]:
        """(key, recipe, predicted peak) of every recipe to run, until the time is over."""
        given = self.given
        for index in range(given.most):
            key = f"{given.seed}/{index}" + (f"/audit {given.audit:g}" if given.audit else "")
            if key in self.known:
                continue
            overrides = draw(given.seed, index, self.device.kind)
            overrides += [f"results_dir={self.out}", f"hardware={given.hardware}"]
            try:
                recipe = compose([*overrides, *(["measure.exclusive=window"] if given.workers > 1 else [])])
            except UserError as error:
                print(f"{key}  not composed: {error}", file=sys.stderr)
                continue
            plan = predict(recipe, self.device)
            verdict = plan.verdict()
            if verdict is not None:
                self.counts["refused" if verdict[0] == "out_of_memory" else "unsupported"] += 1
                continue
            if given.audit:
                limit = given.audit * plan.needed_bytes / 2**30
                if limit < LEAST_GIB:
                    self.counts["too_small"] += 1
                    continue
                recipe = compose([*recipe.overrides, f"measure.memory_limit_gib={limit:.3f}"])
            yield key, recipe, int(plan.peak_memory_bytes or 0)

    def run(self, key: str, recipe: Recipe, predicted: int) -> None:
        if self.seconds > self.given.seconds:
            return
        wanted = self.room.enter(predicted)
        try:
            if self.seconds <= self.given.seconds:
                self.note(key, recipe, runner.run(recipe, gate=not self.given.audit))
        finally:
            self.room.leave(wanted)

    def note(self, key: str, recipe: Recipe, record: dict[str, Any]) -> None:
        with self.writing:
            beside_others = recipe.config["measure"]["exclusive"] == "window" and not self.given.audit
            if record["status"] == "out_of_memory" and beside_others:
                self.again.append((key, recipe))
                return
            self.counts[record["status"] if record["status"] in self.counts else "other"] += 1
            row = {"key": key, "id": record["id"], "status": record["status"]}
            row |= {"refused": bool(self.given.audit), "share": self.given.audit}
            with (self.out / "done.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{self.seconds:6.0f} s  {key}  {line(record)[:150]}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="no run starts later than this")
    parser.add_argument("--out", default="results/planner", help="results directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=2000, help="how many recipe numbers are looked at")
    parser.add_argument("--runs", type=int, default=10**6, help="how many recipes are run")
    parser.add_argument("--workers", type=int, default=1, help="runs that start side by side and measure in turn")
    parser.add_argument(
        "--audit", type=float, metavar="SHARE", help="run each in so much of what the plan says it needs"
    )
    parser.add_argument("--hardware", default="auto")
    given = parser.parse_args()
    if given.audit is not None and not 0 < given.audit < 1:
        parser.error(f"--audit {given.audit:g}: a share of what is needed lies between 0 and 1, such as 0.97")
    campaign = Campaign(given)
    if given.workers > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // given.workers)))
    with ThreadPoolExecutor(given.workers) as pool:
        # Composed here, one at a time and few ahead: Hydra keeps one global state.
        waiting = threading.Semaphore(2 * given.workers)
        for key, recipe, predicted in itertools.islice(campaign.drawn(), given.runs):
            waiting.acquire()
            if campaign.seconds > given.seconds:
                break
            pool.submit(campaign.run, key, recipe, predicted).add_done_callback(lambda _: waiting.release())
    for key, recipe in campaign.again:
        recipe.config["measure"]["exclusive"] = "run"
        campaign.run(key, recipe, campaign.device.memory_bytes)
    print(json.dumps({"seconds": round(campaign.seconds, 1), **campaign.counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
