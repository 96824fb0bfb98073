"""The planner's memory arithmetic against the real training step on fake tensors: no GPU, any size.

    python benchmarks/plan_against_tracker.py --recipes 100

Random shapes, precisions, attention kernels, checkpointing and accumulation, eager; the trace counts every allocation
of the second step. Prints the worst recipes and an error table, JSON last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict

from dyno.measure.environment import Device
from dyno.plan import memory, predict
from dyno.plan.trace import expanded, flash, traced, unfused
from dyno.recipe import compose

GPU = Device("cuda", 0, "a card", 80 * 2**30, (9, 0), None, 1)
ATTENTION = {"math": None, "sdpa_flash": flash, "sdpa_efficient": expanded, "sdpa_math": unfused}


def draw(rng: random.Random) -> list[str]:
    kv_heads, precision = rng.choice([1, 2, 4, 8]), rng.choice(["fp32", "bf16"])
    attention = rng.choice(
        ["math", "sdpa_efficient", "sdpa_math", *(["sdpa_flash"] * 2 if precision == "bf16" else [])]
    )
    return [
        "model=160m", f"model.layers={rng.choice([1, 2, 3, 4, 6, 8])}",
        f"model.hidden={rng.choice([128, 256, 512, 768, 1024])}", f"model.ffn_width={rng.choice([256, 512, 1024, 3072])}",
        f"model.heads={kv_heads * rng.choice([1, 2, 4])}", f"model.kv_heads={kv_heads}",
        f"model.head_dim={rng.choice([32, 64, 128])}", f"model.vocab_size={rng.choice([257, 1000, 8000, 32000, 128256])}",
        f"model.tied_embeddings={rng.choice(['true', 'false'])}", f"workload.batch={rng.choice([4, 8, 16])}",
        f"workload.seq={rng.choice([64, 128, 256, 512, 1024])}", f"precision={precision}", f"attention={attention}",
        f"checkpointing={rng.choice(['none', 'none', 'uniform', 'sqrt'])}",
        f"accumulation={rng.choice(['none', 'none', 'gradients'])}",
    ]  # fmt: skip


def error(overrides: list[str]) -> tuple[float, str]:
    """(predicted / traced - 1, the binding phase) of one recipe; libraries' workspaces are no part of a trace."""
    recipe = compose(overrides)
    seen = traced(recipe, ATTENTION[recipe.option("attention")])
    plan = predict(recipe, GPU)
    return (plan.peak_memory_bytes - memory.WORKSPACE_BYTES) / seen.peak - 1, plan.phase


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1e9, help="no trace starts later than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=float, default=0.05, help="show recipes whose error is larger")
    arguments = parser.parse_args()
    rng, started = random.Random(arguments.seed), time.monotonic()
    groups: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.recipes):
        if time.monotonic() - started > arguments.seconds:
            break
        overrides = draw(rng)
        off, phase = error(overrides)
        if abs(off) > arguments.show:
            print(f"{off:+.1%} {phase}: {' '.join(overrides)}", flush=True)
        for name in ("all", phase, *overrides[-4:]):
            groups[name].append(abs(off))
    print(f"{'':<30} {'runs':>5} {'median':>8} {'p95':>8} {'worst':>8}")
    table = {}
    for name, values in groups.items():
        values.sort()
        p95 = values[min(len(values) - 1, int(0.95 * len(values)))]
        table[name] = {"runs": len(values), "median": statistics.median(values), "p95": p95, "worst": values[-1]}
        print(f"{name:<30} {len(values):>5} {table[name]['median']:>8.2%} {p95:>8.2%} {values[-1]:>8.2%}")
    print(json.dumps(table["all"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
