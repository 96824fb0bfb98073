"""Parallel layouts on the GPUs of this machine: named cells, each a run of the ordinary runner and so a Dyno record.

    python benchmarks/layouts.py --list                                      # the cells, with what the plan says of them
    python benchmarks/layouts.py --out results/layouts --seconds 600         # runs them in order, within the time
    python benchmarks/layouts.py --out results/layouts --only 160m/ deep/    # those whose names begin so
    python benchmarks/layouts.py --out results/layouts --seconds 0           # only shows what was measured

A cell is MODEL/LAYOUT; the most telling come first. A second call goes on where the first stopped: done.jsonl has a line a
cell, and cells whose runs outdated.json names are run again. All cells of a model start from the same weights and take the
same batches, so that their first losses must be those of its cell `one`, but for rounding: in bf16 within 0.4% over the first
ten steps. Where weights are rounded at random (`deep`) ranks draw for their own shards, and only the loss before any step is
compared. `strong` cells split one batch over fewer GPUs, `weak` ones keep the rows a GPU of the full machine. What the plan
refuses costs nothing and is a row that says why. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dyno import runner
from dyno.errors import UserError
from dyno.measure.environment import Device, detect, planned
from dyno.measure.hardware import options
from dyno.plan import predict
from dyno.recipe import Recipe, compose
from dyno.show import line

LOSS_TOLERANCE = 2**-8  # of the loss, over ten steps: what one rounding to bf16 may change
COMMON = [
    "workload=train",
    "measure=probe",
    "workload.steps=8",
    "workload.eval_tokens=0",
    "workload.lr=1e-4",
    "attention=sdpa",
]
SHORT = ["workload.steps=0", "measure.warmup_min_steps=2", "measure.warmup_max_steps=2", "measure.min_steps=3",
         "measure.min_seconds=0.0", "measure.time_limit_s=300"]  # fmt: skip
COMPILED = ["compile=on", "compile.per_block=true", "measure.time_limit_s=300"]
ENERGY = ["measure=energy", "measure.codecarbon=false", "workload.steps=8"]
LONG = ["checkpointing=uniform", "loss=chunked", "model.max_seq=131072", "workload.batch=1", *SHORT]


@dataclass(frozen=True)
class Cell:
    key: str
    overrides: list[str]

    def recipe(self, *more: str) -> Recipe:
        merged = {word.partition("=")[0]: word for word in (*self.overrides, *more)}
        return compose(list(merged.values()))


def models(gpus: int, kind: str) -> dict[str, tuple[list[str], int]]:
    """(overrides, sequences of a step) of each model; on a CPU a toy stands in for all of them."""
    if kind == "cpu":
        toy = ["hardware=cpu", "model=nano", "model.layers=8", "model.vocab_size=264", "workload.seq=64"]
        return dict.fromkeys(("160m", "1b", "deep"), (toy, 4 * gpus))
    bf16 = "precision=bf16"
    deep = ["precision=bf16_stochastic", "workload.seq=4096", "checkpointing=uniform", *SHORT]
    return {
        "160m": (["model=160m", "workload.seq=1024", bf16], max(32, 4 * gpus)),
        "1b": (["model=1b", "workload.seq=2048", "checkpointing=uniform", bf16], max(8, 2 * gpus)),
        "deep": (["model=8b", *deep], 2 * gpus),
    }


def mesh(**degrees: int | str) -> list[str]:
    """A product of degrees; what is not named is 1, or nothing sharded."""
    plain: dict[str, int | str] = {"dp": 1, "tp": 1, "pp": 1, "cp": 1, "zero": 0}
    return ["parallelism=mesh", *(f"parallelism.{name}={value}" for name, value in (plain | degrees).items())]


def layouts(gpus: int) -> dict[str, list[str]]:
    """Overrides of each layout that takes all of so many GPUs; `one` takes one."""
    half, micro = gpus // 2, 2 * gpus
    found = {
        "one": ["parallelism=none"],
        "ddp": mesh(dp=gpus),
        "zero3": mesh(dp=gpus, zero=3),
        "tensor": mesh(tp=gpus),
        "1f1b": mesh(pp=gpus, micro_batches=micro),
        "ring": mesh(cp=gpus),
        "zero1": mesh(dp=gpus, zero=1),
        "zero2": mesh(dp=gpus, zero=2),
        "ulysses": mesh(cp=gpus, context="ulysses"),
        "tensor_plain": mesh(tp=gpus, sequence_parallel="false"),
        "gpipe": mesh(pp=gpus, micro_batches=micro, schedule="gpipe"),
        "interleaved": mesh(pp=gpus, micro_batches=micro, schedule="interleaved"),
        "zero_bubble": mesh(pp=gpus, micro_batches=micro, schedule="zero_bubble"),
        "ring_zero3": mesh(cp=gpus, zero=3),
    }
    if gpus >= 4:
        found |= {
            "hybrid": mesh(dp=gpus, zero=3, replicate=half),
            "dp_tp": mesh(dp=half, tp=2, zero=1),
            "zero3_tp": mesh(dp=half, tp=2, zero=3),
            "dp_pp": mesh(dp=half, pp=2, zero=1, micro_batches=4),
            "tp_pp": mesh(tp=half, pp=2, micro_batches=4),
            "dp_cp": mesh(dp=half, cp=2, zero=3),
        }
    # Last, and not for long: torch 2.11 opens it by sending a number to itself, which a backend may refuse or wait for.
    found["zbv"] = [*mesh(pp=gpus, micro_batches=micro, schedule="zbv"), "measure.time_limit_s=60"]
    if gpus >= 8:
        found["dp_tp_pp"] = mesh(dp=gpus // 4, tp=2, pp=2, zero=1, micro_batches=4)
    return found


def scaling(gpus: int, batch: int) -> dict[str, list[str]]:
    """Cells on fewer GPUs; on all of them strong and weak are one, the layout's own cell."""
    found = {}
    for count in (1 << i for i in range((gpus - 1).bit_length())):
        for name, zero in (("ddp", 0), ("zero1", 1), ("zero3", 3)):
            split = ["parallelism=none"] if count == 1 else mesh(dp=count, zero=zero)
            own = "" if count == 1 else f"_{name}"
            found[f"weak{count}{own}"] = [*split, f"workload.batch={batch // gpus * count}"]
            if count > 1:  # on one GPU it is the cell `one`
                found[f"strong{count}{own}"] = [*split, f"workload.batch={batch}"]
    return found


def cells(gpus: int, kind: str = "cuda") -> list[Cell]:
    """Every cell for a number of GPUs that is a power of two, the most telling first."""
    known, every = models(gpus, kind), layouts(gpus)
    found: list[Cell] = []

    def add(group: str, model: str, names: list[str], more: list[str], found_in: dict[str, list[str]] = every) -> None:
        words, batch = known[model]
        for name in names:
            if name in found_in:
                found.append(
                    Cell(f"{group}/{name}", [*COMMON, *words, f"workload.batch={batch}", *found_in[name], *more])
                )

    products = [
        name for name in every if name in ("hybrid", "dp_tp", "zero3_tp", "dp_pp", "tp_pp", "dp_cp", "dp_tp_pp")
    ]
    compiled = COMPILED if kind == "cuda" else []
    add("160m", "160m", list(every), [])
    for model in ("160m", "1b"):
        if model == "1b":
            add(
                "1b",
                "1b",
                ["one", "ddp", "zero3", "tensor", "1f1b", "zero1", "zero2", "ring", "ulysses", *products],
                [],
            )
            add("deep", "deep", ["one", "zero3", "tensor", "1f1b", "ring_zero3", *products], [])
        for seq in (8192, 32768, 131072):
            words = [*LONG, f"workload.seq={seq}"] if kind == "cuda" else [*SHORT, f"workload.seq={seq // 64}"]
            add(
                f"{model}_{seq >> 10}k",
                model,
                ["one", "ring", "ulysses", *(["ring_zero3"] if model == "1b" else [])],
                words,
            )
    for model in ("160m", "1b"):
        smaller = scaling(gpus, known[model][1])
        add(f"{model}_compiled", model, ["one", "ddp", "zero3", "zero1", "tensor", "1f1b"], compiled)
        add(f"{model}_compiled", model, list(smaller), compiled, smaller)
    add("160m_energy", "160m", ["one", "ddp", "zero3", "tensor", "1f1b", "ring"], ENERGY if kind == "cuda" else [])
    return found


def read(out: Path) -> dict[str, dict[str, Any]]:
    """The last record of each cell that was run."""
    path, found = out / "done.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(text)
        found[row["key"]] = json.loads((out / "runs" / row["id"] / "record.json").read_bytes())
    return found


def outdated(out: Path) -> dict[str, str]:
    """Runs by their names, and in what their step was another than this checkout's; written by hand, as outdated.json."""
    path = out / "outdated.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def reference(key: str, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The run that a cell's losses are held to: that of one GPU or, where the model does not fit into one, its group's
    first. `weak` cells on several GPUs have none."""
    group = key.rpartition("/")[0]
    ran = [other for other, record in known.items() if other.startswith(f"{group}/") and record["status"] == "ok"]
    first = f"{group}/one" if f"{group}/one" in ran else next((other for other in ran if "weak" not in other), None)
    return known[first] if first else None


def apart(losses: list[float], expected: list[float]) -> float | None:
    """The largest relative difference between the first losses of two runs, over the steps that both have."""
    return max((abs(a / b - 1) for a, b in zip(losses, expected, strict=False)), default=None)


def row_of(key: str, record: dict[str, Any], one: dict[str, Any] | None) -> dict[str, Any]:
    """What a record says of a layout, a GPU; None where it was not measured."""

    def value(name: str, part: str = "value") -> float | None:
        return record["metrics"].get(name, {}).get(part)

    def first(of: dict[str, Any]) -> list[float]:
        losses = of.get("details", {}).get("train", {}).get("first_losses", [])
        techniques = Recipe(of["config"], of["choices"]).techniques.values()
        return losses[:1] if any(t.without_masters for chosen in techniques for t in chosen) else losses

    ranks = max(1, len(record["ranks"]))
    rate = value("tokens_per_s")
    return {
        "cell": key,
        "status": record["status"],
        "gpus": ranks,
        "tokens_per_s_per_gpu": rate and rate / ranks,
        "step_time_s": value("step_time_s"),
        "mfu": value("mfu"),
        "peak_memory_bytes": value("peak_memory_bytes"),
        "communication_share": value("communication_share", "low"),  # earlier records' value is the ranks' mean
        "wire_bytes": value("wire_bytes"),
        "bus_byte_per_s": value("bus_byte_per_s"),
        "energy_j_per_token": value("energy_j_per_token"),
        "loss_apart": apart(first(record), first(one)) if one and "weak" not in key else None,
        "reason": record["reason"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    def told(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    print(f"{'cell':<26} {'GPUs':>4} {'ktok/s/GPU':>10} {'step ms':>9} {'MFU':>6} {'peak GiB':>8} {'exposed':>8} "
          f"{'sent MiB':>9} {'bus GB/s':>8} {'J/tok':>8} {'loss':>8}")  # fmt: skip
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['cell']:<26} {row['status']}: {row['reason']}"[:160])
            continue
        print(
            f"{row['cell']:<26} {row['gpus']:>4} {told(row['tokens_per_s_per_gpu'], '10.2f', 1e-3):>10} "
            f"{told(row['step_time_s'], '9.2f', 1e3):>9} {told(row['mfu'], '6.1%'):>6} "
            f"{told(row['peak_memory_bytes'], '8.2f', 2**-30):>8} {told(row['communication_share'], '8.1%'):>8} "
            f"{told(row['wire_bytes'], '9.1f', 2**-20):>9} {told(row['bus_byte_per_s'], '8.1f', 1e-9):>8} "
            f"{told(row['energy_j_per_token'], '8.5f'):>8} {told(row['loss_apart'], '8.2%'):>8}"
        )


def listed(chosen: list[Cell], device: Device) -> None:
    """The cells with the plan's figures for this device, or those of an H100 where there is no GPU."""
    for cell in chosen:
        plan = predict(cell.recipe(), device)
        verdict = plan.verdict()
        seconds, peak = plan.step_s or 0.0, plan.peak_memory_bytes / 2**30
        print(
            f"{cell.key:<26} {f'{verdict[0]}: {verdict[1]}' if verdict else f'{1e3 * seconds:8.1f} ms {peak:6.1f} GiB'}"
        )


def run(chosen: list[Cell], given: argparse.Namespace, out: Path) -> None:
    """Run what has no record yet, or one that is outdated or, under --again, ended by a failure, until the time is over."""
    started, known, old = time.monotonic(), read(out), outdated(out)
    again = ("crashed", "timeout", "contaminated") if given.again else ()
    for cell in chosen:
        before = known.get(cell.key)
        if before and before["id"] not in old and before["status"] not in again:
            continue
        if time.monotonic() - started > given.seconds:
            return
        try:
            recipe = cell.recipe(f"results_dir={out}", *given.overrides)
        except UserError as error:
            print(f"{cell.key}  not composed: {error}", file=sys.stderr)
            continue
        record = runner.run(recipe, gate=not given.try_all)
        with (out / "done.jsonl").open("a") as file:
            file.write(json.dumps({"key": cell.key, "id": record["id"], "status": record["status"]}) + "\n")
        print(f"{time.monotonic() - started:6.0f} s  {cell.key}  {line(record)[:180]}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="added to every cell, such as seed=1")
    parser.add_argument("--gpus", type=int, help="as many as there are unless given")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose names begin so")
    parser.add_argument("--seconds", type=float, default=600, help="no run starts later than this; 0 runs nothing")
    parser.add_argument("--out", default="results/layouts", help="results directory")
    parser.add_argument("--again", action="store_true", help="also those that crashed or timed out")
    parser.add_argument("--try-all", action="store_true", help="also those that are predicted to run out of memory")
    parser.add_argument("--cpu", action="store_true", help="a toy model on so many processes of a CPU")
    parser.add_argument("--list", action="store_true", help="show the cells and their plans instead of running them")
    given = parser.parse_args()
    here = detect({"device": "cpu" if given.cpu else "auto"})
    gpus, kind = given.gpus or here.count, "cpu" if given.cpu else "cuda"
    if gpus < 2 or gpus & (gpus - 1):
        parser.error(
            f"layouts need 2, 4, 8, ... GPUs, there are {gpus if here.kind == kind else 0}: name them by --gpus"
        )
    chosen = [cell for cell in cells(gpus, kind) if cell.key.startswith(tuple(given.only))]
    if given.list:
        listed(chosen, replace(here if here.kind == kind else planned(options()["h100"]) or here, count=gpus))
        return 0
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    if given.seconds:
        run(chosen, given, out)
    known = read(out)
    rows = [row_of(c.key, known[c.key], reference(c.key, known)) for c in chosen if c.key in known]
    show(rows)
    wrong = [row["cell"] for row in rows if (row["loss_apart"] or 0.0) > LOSS_TOLERANCE]
    print(json.dumps({"rows": rows, "left": len(chosen) - len(rows), "losses_apart": wrong}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
