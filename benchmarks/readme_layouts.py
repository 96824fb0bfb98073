"""The README's tables of parallel layouts; `benchmarks/readme.py` puts them in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import layouts
import planner_layouts

from dyno.recipe import Recipe
from dyno.record import read_records
from dyno.show import si

# Groups of the layouts that are shown.
LAYOUTS = ("160m", "160m_8k", "160m_32k", "160m_128k", "1b", "1b_8k", "1b_32k", "1b_128k", "deep")
BEST = 3  # of a study


def cell(metric: dict | None) -> str:
    """A figure of a record with its unit; nothing where there is none."""
    if metric is None or metric["value"] is None:
        return ""
    return si(metric["value"], metric["unit"]).replace("token/s", "tok/s")


def marks(records: Iterable[dict], old: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """What stands behind runs whose step was another than today's, and the lines that say in what."""
    records = list(records)
    reasons = sorted({old[r["id"]] for r in records if r["id"] in old})
    signs = {reason: "\\*" * (i + 1) for i, reason in enumerate(reasons)}
    lines = [line for reason in reasons for line in ("", f"{signs[reason]} {reason}")]
    return {r["id"]: signs[old[r["id"]]] for r in records if r["id"] in old}, lines


def layouts_table(where: Path) -> list[str]:
    """Parallel layouts beside one GPU: what the step takes, what of it waits for messages, and the losses."""
    cells = layouts.read(where)
    shown = [(key, r) for key, r in cells.items() if r["status"] == "ok" and key.partition("/")[0] in LAYOUTS]
    shown.sort(key=lambda cell: LAYOUTS.index(cell[0].partition("/")[0]))
    rows = {key: layouts.row_of(key, r, layouts.reference(key, cells)) for key, r in shown}
    signs, notes = marks((record for _, record in shown), layouts.outdated(where))
    gpu, gpus = shown[0][1]["fingerprint"]["device"].split()[1], max(row["gpus"] for row in rows.values())
    bus = sorted(row["bus_byte_per_s"] for row in rows.values() if row["bus_byte_per_s"])
    lines = [
        "",
        f"Layouts of {gpus} {gpu} through NCCL, bf16, eager (all-reduce: {bus[len(bus) // 2] / 1e9:.0f} GB/s bus "
        "bandwidth). Exposed messages: what of a step the rank that waits least waits for them. Loss: the largest difference "
        "to one GPU's (where the model does not fit, to the first layout's), over ten steps or, of weights rounded at random, "
        "in the first.",
        "",
        "| model and tokens | layout | tokens/s | peak memory a GPU | exposed messages | loss |",
        "|---|---|---|---|---|---|",
    ]
    for key, record in shown:
        name, row, workload = key.rpartition("/")[2], rows[key], record["config"]["workload"]
        share, apart = row["communication_share"], row["loss_apart"]
        mark = signs.get(record["id"], "")
        apart = None if layouts.reference(key, cells) is record else apart
        lines.append(
            f"| {record['config']['model']['name']}, {workload['batch']} x {workload['seq']} | {name}{mark} | "
            f"{si(row['tokens_per_s_per_gpu'] * row['gpus'])} | {si(row['peak_memory_bytes'], 'B')} | "
            f"{'-' if share is None else f'{share:.0%}'} | {'-' if apart is None else f'{apart:.3%}'} |"
        )
    return [*lines, *notes]


def scaling_table(where: Path) -> list[str]:
    """Compiled steps on 1, 2, ... GPUs: of one batch (strong), and of one that grows with them (weak)."""
    cells = layouts.read(where)
    rows = {key: layouts.row_of(key, r, None) for key, r in cells.items() if r["status"] == "ok"}
    compiled = (record for key, record in cells.items() if key.partition("/")[0].endswith("_compiled"))
    signs, notes = marks(compiled, layouts.outdated(where))
    most = max(row["gpus"] for row in rows.values())
    counts = [count for count in (2, 4, 8) if count <= most]
    heads = [f"{count} GPUs" for count in counts]
    lines = [
        "",
        f"Scaling of compiled steps (`compile.per_block=true`) on {most} {next(iter(cells.values()))['fingerprint']['device']}: "
        "tokens/s, and their share of what as many single GPUs would make (strong: each by itself with the whole batch; weak: "
        "with its own rows).",
        "",
        f"| model and tokens | layout | | 1 GPU | {' | '.join(heads)} |",
        "|---|---|---|---|" + "---|" * len(counts),
    ]
    apart = False
    for model in ("160m", "1b"):
        group = f"{model}_compiled"
        for layout in ("ddp", "zero1", "zero3", "tensor", "1f1b"):
            replicas = layout not in ("tensor", "1f1b")  # which take more rows as there are more
            for kind, first in (("strong", f"{group}/one"), ("weak", f"{group}/weak1")):
                if first not in rows or (kind == "weak" and not replicas):
                    continue
                alone, found = rows[first]["tokens_per_s_per_gpu"], []
                for count in counts:
                    key = f"{group}/{layout}" if count == most else f"{group}/{kind}{count}_{layout}"
                    each = rows[key]["tokens_per_s_per_gpu"] if key in rows else None
                    mark = signs.get(cells[key]["id"], "") if each else ""
                    if each and cells[key]["fingerprint"]["machine"] != cells[first]["fingerprint"]["machine"]:
                        mark, apart = f"{mark}†", True
                    found.append(f"{si(each * count)} ({each / alone:.0%}){mark}" if each else "-")
                if set(found) == {"-"}:
                    continue
                workload = cells[first]["config"]["workload"]
                shape = f"{workload['batch']} x {workload['seq']}{' a GPU' if kind == 'weak' else ''}"
                lines.append(f"| {model}, {shape} | {layout} | {kind} | {si(alone)} | {' | '.join(found)} |")
    if apart:
        notes += ["", "† On another host than the single GPU."]
    return [*lines, *notes]


def layout_studies(*places: Path) -> list[str]:
    """The fastest that `dyno tune study=layout` measured."""
    lines = [
        "",
        f"`dyno tune study=layout`, broken off early (`results/reference/h200-x*/README.md`); the fastest {BEST} of each:",
        "",
        "| model, GPUs | runs | layout | tokens/s | peak memory a GPU |",
        "|---|---|---|---|---|",
    ]
    finished = [[r for r in read_records(where) if r["status"] == "ok"] for where in places]
    best = [sorted(some, key=lambda r: -r["metrics"]["tokens_per_s"]["value"])[:BEST] for some in finished]
    old = {run: reason for where in places for run, reason in layouts.outdated(where).items()}
    signs, notes = marks((record for rows in best for record in rows), old)
    for records, rows in zip(finished, best, strict=True):
        for record in rows:
            gpus, layout = planner_layouts.layout_of(Recipe(record["config"], record["choices"]))
            figures = [cell(record["metrics"][name]) for name in ("tokens_per_s", "peak_memory_bytes")]
            device = record["fingerprint"]["device"].split()[1]
            name = f"{layout}{signs.get(record['id'], '')}"
            row = [f"{record['choices']['model']}, {gpus} {device}", str(len(records)), name, *figures]
            lines.append(f"| {' | '.join(row)} |")
    return [*lines, *notes]
