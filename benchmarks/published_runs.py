"""The cluster model against published training runs: predicted step time over the published one.

    python benchmarks/published_runs.py          # with the constants in harness/plan/cluster.py
    python benchmarks/published_runs.py --fit    # fit them to every other run first, judge on the rest

Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dyno.measure.hardware import options
from dyno.plan.cluster import DEFAULT, Cluster, Efficiency, Layout, cluster_of, model_flops, time_terms
from dyno.technique import Shape

DATA = Path(__file__).with_suffix(".yaml")
POWER = 0.5  # a GPU held to a share of its power runs at about the square root of that share


def shape_of(run: dict[str, Any], models: dict[str, list[int]]) -> Shape:
    layers, hidden, ffn, heads, kv_heads, vocab = models[run["model"]]
    dim = hidden // heads
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv_heads * dim + 3 * hidden * ffn) + vocab * hidden
    tied = run["model"].startswith("gpt")
    return Shape(
        parameters=linear + (0 if tied else vocab * hidden), linear_parameters=linear, layers=layers, hidden=hidden,
        ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=dim, vocab=vocab, batch=run["batch"], seq=run["seq"], tied=tied,
    )  # fmt: skip


HARDWARE = options()


def cluster(stated: dict[str, Any]) -> Cluster:
    hardware = HARDWARE[stated["option"]]
    made = cluster_of(hardware)
    share = (stated.get("power_w", hardware["power_limit_w"]) / hardware["power_limit_w"]) ** POWER
    return replace(
        made, flop_per_s=made.flop_per_s * share, bytes_per_s=stated.get("memory_byte_per_s", made.bytes_per_s)
    )


def published_s(run: dict[str, Any], shape: Shape, gpus: int) -> float:
    """Seconds of the published step, from whichever figure the source gives."""
    if "step_s" in run:
        return float(run["step_s"])
    tokens = shape.batch * shape.seq
    if "tokens_per_s" in run:
        return tokens / (run["tokens_per_s"] * gpus)
    if run["flops"] == "hardware":  # the source's own formula, recomputation included
        l, h = shape.layers, shape.hidden
        flops = 96.0 * tokens * l * h * h * (1 + shape.seq / (6 * h) + shape.vocab / (16 * l * h))
    else:
        flops = model_flops(shape)
    return flops / (run["tflops"] * 1e12 * gpus)


def predicted(run: dict[str, Any], data: dict[str, Any], efficiency: Efficiency) -> tuple[dict[str, float], float, int]:
    """(terms, published seconds, GPUs)."""
    shape = shape_of(run, data["models"])
    layout = Layout(
        run["dp"], run["tp"], run["pp"], run.get("cp", 1), run.get("zero", 0), run["micro"], run.get("virtual", 1),
        run.get("recompute", "none"), run.get("async_tp", False),
    )  # fmt: skip
    terms = time_terms(
        shape, layout, cluster(data["hardware"][run["source"]]), efficiency,
        eager=run.get("eager", False), unfused_attention=run.get("unfused", False),
    )  # fmt: skip
    return terms, published_s(run, shape, layout.gpus), layout.gpus


def loss(runs: list[dict[str, Any]], data: dict[str, Any], efficiency: Efficiency) -> float:
    total = 0.0
    for run in runs:
        terms, seconds, _ = predicted(run, data, efficiency)
        total += abs(math.log(sum(terms.values()) / seconds)) ** 1.5
    return total


def fitted(runs: list[dict[str, Any]], data: dict[str, Any]) -> Efficiency:
    """The constants by coordinate search: a grid round each, finer every round, inside what is plausible."""
    best = DEFAULT
    bounds = {"a100": (0.6, 0.95), "h100": (0.5, 0.9), "elementwise": (0.5, 6.0), "eager": (1.0, 4.0),
              "overlap": (0.3, 0.95), "unfused": (5.0, 60.0), "wide": (10.0, 600.0)}  # fmt: skip
    step = 1.4
    for _ in range(40):
        moved = False
        for name, (low, high) in bounds.items():
            for factor in (step, 1 / step):
                if name in best.products:
                    number = min(high, max(low, best.products[name] * factor))
                    trial = replace(best, products={**best.products, name: number})
                else:
                    number = min(high, max(low, getattr(best, name) * factor))
                    trial = replace(best, **{name: number})
                if loss(runs, data, trial) < loss(runs, data, best) - 1e-9:
                    best, moved = trial, True
        if not moved:
            step = 1 + (step - 1) / 2
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    data = yaml.safe_load(DATA.read_text())
    runs = data["runs"]
    efficiency = fitted(runs[::2], data) if arguments.fit else DEFAULT
    errors: dict[str, list[float]] = {"fitted": [], "held_out": []}
    print(
        f"{'source':<16} {'model':<10} {'GPUs':>6} {'dp x tp x pp x cp':>18} {'published':>10} {'predicted':>10}  error"
    )
    for i, run in enumerate(runs):
        terms, seconds, gpus = predicted(run, data, efficiency)
        predicted_s = sum(terms.values())
        error = seconds / predicted_s - 1  # of throughput
        errors["held_out" if i % 2 else "fitted"].append(abs(error))
        layout = f"{run['dp']} x {run['tp']} x {run['pp']} x {run.get('cp', 1)}"
        largest = ", ".join(f"{n} {x / predicted_s:.0%}" for n, x in sorted(terms.items(), key=lambda t: -t[1])[:4])
        print(
            f"{run['source']:<16} {run['model']:<10} {gpus:>6} {layout:>18} {seconds:>9.2f}s {predicted_s:>9.2f}s "
            f"{error:>+6.1%} {'' if i % 2 else '*'}  {largest}"
        )
    out = {
        name: {"runs": len(v), "median": round(statistics.median(v), 4), "worst": round(max(v), 4)}
        for name, v in {**errors, "all": errors["fitted"] + errors["held_out"]}.items()
    }
    print("* fitted")
    if arguments.fit:
        for source in data["sources"]:  # harder than every other run: nothing of the source was seen
            others = fitted([r for r in runs if r["source"] != source], data)
            off = [abs(s / sum(t.values()) - 1) for r in runs if r["source"] == source
                   for t, s, _ in [predicted(r, data, others)]]  # fmt: skip
            print(f"without {source:<16} median {statistics.median(off):6.1%}  worst {max(off):6.1%}")
    constants = {k: v if isinstance(v, dict) else round(v, 3) for k, v in vars(efficiency).items()}
    print(json.dumps({**out, "constants": constants}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
