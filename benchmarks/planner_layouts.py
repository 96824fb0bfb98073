"""The planner against measured layouts: memory and step time by layout, and its best layout against the best measured.

    python benchmarks/planner_layouts.py results/layouts [more directories with runs/] [--now]

Reads every finished training record: those of benchmarks/layouts.py, of `dyno tune study=layout`, or any other. What was
predicted is the plan that the record holds, made before its run; with --now it is predicted again by this checkout, from
the ceilings that the record measured, and runs that a directory's outdated.json names are left out. Errors are predicted over
measured, less one. Rows of one model, sequence and number of GPUs compete: the layout that the plan ranks first is compared with
the best one measured. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import layouts
import numpy as np

from dyno.errors import UserError
from dyno.measure.environment import Device
from dyno.measure.hardware import resolve
from dyno.plan import predict, search, shape_of
from dyno.plan.cluster import cluster_of
from dyno.plan.machine import from_ceilings
from dyno.recipe import Recipe, compose
from dyno.record import read_records, runs_dir

WITHIN = {"memory": 0.05, "time": 0.15}
DEGREES = ("dp", "tp", "pp", "cp")


@dataclass(frozen=True)
class Measured:
    """A record's figures beside the plan's: seconds of a step, bytes of the fullest rank, tokens a second."""

    group: str
    layout: str
    seconds: float
    bytes: float
    tokens_per_s: float
    planned_s: float
    planned_bytes: float
    bus_byte_per_s: float | None
    config: dict[str, Any]

    def error(self, what: str) -> float:
        return self.planned_bytes / self.bytes - 1 if what == "memory" else self.planned_s / self.seconds - 1

    @property
    def planned_tokens_per_s(self) -> float:
        return self.tokens_per_s * self.seconds / self.planned_s


def layout_of(recipe: Recipe) -> tuple[int, str]:
    """(GPUs, words that tell a layout and what goes with it from the others)."""
    (layout,) = recipe.techniques["parallelism"]
    knobs, idle = layout.knobs(), layout.idle_knobs
    gpus = recipe.world_size
    words = [f"{name}{knobs[name]}" for name in DEGREES if knobs.get(name, 1) > 1] or ["one"]
    if gpus > 1:
        words += [f"zero{knobs['zero']}"] if "zero" not in idle else []
        words += [f"x{knobs['replicate']}"] if knobs["replicate"] > 1 else []
        words += [f"{knobs['schedule']}/{knobs['micro_batches']}"] if knobs["pp"] > 1 else []
        words += [knobs["context"]] if knobs["cp"] > 1 else []
        words += ["whole tokens"] if knobs["tp"] > 1 and not knobs["sequence_parallel"] else []
    choices = (recipe.option(axis) for axis in ("checkpointing", "loss", "accumulation", "optimizer"))
    words += [option for option in choices if option not in ("none", "full", "adamw")]
    words += ["compiled"] if recipe.option("compile") == "on" else []
    return gpus, " ".join([*words, f"b{recipe.config['workload']['batch']}"])


def again(record: dict[str, Any], recipe: Recipe, gpus: int) -> dict[str, Any]:
    """The plan of a record's recipe by this checkout, under the ceilings that were measured with it."""
    ceilings, hardware = record["environment"]["ceilings"], recipe.config["hardware"]
    device = Device(
        "cuda" if ceilings["uuid"] else "cpu", 0, record["fingerprint"]["device"], 10**15, (9, 0), None, gpus
    )
    machine = from_ceilings(ceilings, resolve(hardware, device.kind, device.name))
    with mock.patch("dyno.plan.machine_of", return_value=machine):
        return predict(recipe, device).to_json()


def read(folders: list[str], now: bool) -> Iterator[Measured]:
    for folder in folders:
        old = layouts.outdated(Path(folder)) if now else {}
        for record in read_records(runs_dir(folder)):
            trained = record["status"] == "ok" and record["config"]["workload"]["measures"] == "train"
            if not trained or record["id"] in old:
                continue
            recipe = Recipe(record["config"], record["choices"])
            gpus, words = layout_of(recipe)
            plan = again(record, recipe, gpus) if now else record["plan"]
            got = {name: metric["value"] for name, metric in record["metrics"].items()}
            figures = [got.get("step_time_s"), got.get("peak_memory_bytes"), got.get("tokens_per_s"),
                       plan["step_time_s"], plan["peak_memory_bytes"]]  # fmt: skip
            if all(figures):
                group = f"{recipe.config['model']['name']} {recipe.config['workload']['seq']} on {gpus}"
                yield Measured(group, words, *figures, got.get("bus_byte_per_s"), recipe.config)  # type: ignore[arg-type]


def best(rows: list[Measured]) -> dict[str, Any]:
    """The row that the plan ranks first against the one that was the fastest."""
    chosen, fastest = max(rows, key=lambda r: r.planned_tokens_per_s), max(rows, key=lambda r: r.tokens_per_s)
    return {
        "layouts": len(rows), "planned": chosen.layout, "measured": fastest.layout,
        "share_of_best": round(chosen.tokens_per_s / fastest.tokens_per_s, 4),
    }  # fmt: skip


def searched(rows: list[Measured], gpus: int) -> dict[str, Any] | None:
    """What `dyno plan --search` puts first for the group's largest batch, and what was measured of its degrees."""
    largest = max(rows, key=lambda r: r.config["workload"]["batch"])
    try:
        recipe = compose(["hardware=h100"])
        recipe.config.update(model=largest.config["model"], workload=largest.config["workload"])
        shape = shape_of(recipe)
        assert shape is not None
        (first, *_), _, _ = search.best_layouts(shape, gpus, cluster_of(recipe.config["hardware"]))
    except UserError as error:
        return {"reason": str(error)}
    words = " ".join(f"{name}{n}" for name in DEGREES if (n := getattr(first.layout, name)) > 1)
    alike = [r for r in rows if [w for w in r.layout.split() if w[:2] in DEGREES and w[2:].isdigit()] == words.split()]
    fastest = max(r.tokens_per_s for r in rows)
    return {
        "search": f"{words} zero{first.layout.zero} recompute {first.layout.recompute}",
        "share_of_best": round(max(r.tokens_per_s for r in alike) / fastest, 4) if alike else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--now", action="store_true", help="predict again instead of reading the records' plans")
    given = parser.parse_args()
    rows = list(read(given.folders, given.now))
    if not rows:
        print("no finished training runs", file=sys.stderr)
        return 1
    groups: dict[str, list[Measured]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    out: dict[str, Any] = {"runs": len(rows), "groups": {}}
    for group, members in sorted(groups.items()):
        print(f"\n{group:<46} {'GiB':>7} {'planned':>8} {'error':>7} {'step ms':>9} {'planned':>9} {'error':>7}")
        for r in sorted(members, key=lambda r: -r.tokens_per_s):
            print(f"  {r.layout:<44} {r.bytes / 2**30:>7.2f} {r.planned_bytes / 2**30:>8.2f} {r.error('memory'):>+7.1%} "
                  f"{1e3 * r.seconds:>9.2f} {1e3 * r.planned_s:>9.2f} {r.error('time'):>+7.1%}")  # fmt: skip
        found = best(members)
        gpus = int(group.rpartition(" ")[2])
        if gpus > 1 and (named := searched(members, gpus)):
            found["by_search"] = named
        print(f"  of {found['layouts']}: the plan's first is {found['planned']}, the fastest {found['measured']}: "
              f"{found['share_of_best']:.1%} of its tokens/s")  # fmt: skip
        out["groups"][group] = found
    for what, limit in WITHIN.items():
        errors = np.abs([r.error(what) for r in rows if not r.group.endswith("on 1")] or [np.nan])
        out[what] = {
            "runs": int(np.isfinite(errors).sum()), "median": round(float(np.median(errors)), 4),
            "worst": round(float(errors.max()), 4), f"within_{limit:.0%}": round(float((errors <= limit).mean()), 4),
        }  # fmt: skip
    alone = [abs(r.error("time")) for r in rows if r.group.endswith("on 1")]
    out["alone"] = {"runs": len(alone), "median": round(float(np.median(alone)), 4)} if alone else None
    links = [r.bus_byte_per_s for r in rows if r.bus_byte_per_s]
    out["bus_byte_per_s"] = float(np.median(links)) if links else None
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
