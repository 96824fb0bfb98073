"""Write the figures of README.md from the records in results/reference: `make readme`.

Text between the markers `<!-- figures -->` and `<!-- /figures -->` is generated; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

from dyno.record import read_records
from dyno.show import si

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- figures -->", "<!-- /figures -->"
COLUMNS = ("tokens_per_s", "step_time_s", "peak_memory_bytes", "energy_j_per_token", "validation_loss")


def cell(metric: dict | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    return si(metric["value"], metric["unit"]).replace("token/s", "tok/s")


def study_table(where: Path) -> list[str]:
    """The measured rows of a study, fastest first."""
    records = [r for r in read_records(where) if r["status"] == "ok"]
    records.sort(key=lambda r: -r["metrics"]["tokens_per_s"]["value"])
    first = records[0]
    refused = len(read_records(where)) - len(records)
    lines = [
        f"`model={first['choices']['model']}`, training at a sequence of {first['config']['workload']['seq']}, on one "
        f"{first['fingerprint']['device']} (torch {first['fingerprint']['torch']}); {len(records)} measured runs of a study, "
        f"{refused} more were refused before a run. Median step, energy by NVML counter.",
        "",
        "| precision | attention | checkpointing | compile | batch | tokens/s | step | peak memory | energy a token | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        axes = [record["choices"][a] for a in ("precision", "attention", "checkpointing", "compile")]
        figures = [cell(record["metrics"].get(name)) for name in COLUMNS]
        lines.append("| " + " | ".join([*axes, str(record["config"]["workload"]["batch"]), *figures]) + " |")
    return lines


def peer_table(where: Path) -> list[str]:
    """Our 1B training step beside transformers with torch.compile, measured minutes apart on the same GPU."""
    (record,) = read_records(where)
    ours = record["metrics"]
    rate, memory = ours["tokens_per_s"]["value"], ours["peak_memory_bytes"]
    workload = record["config"]["workload"]
    lines = [
        "",
        f"Training `model=1b` at {workload['batch']} x {workload['seq']} tokens on the same GPU, minutes apart:",
        "",
        "| | tokens/s | peak memory |",
        "|---|---|---|",
        f"| Dyno, bf16 autocast, compile, cuDNN attention | {si(rate)} | {cell(memory)} |",
    ]
    for peer in json.loads((where / "peers.json").read_text()):
        memory_text = si(peer["peak_memory_bytes"], "B")
        lines.append(
            f"| transformers + torch.compile, {peer['variant']} | {si(peer['tokens_per_s'])} | {memory_text} |"
        )
    return lines


def main() -> None:
    reference = ROOT / "results" / "reference" / "h100"
    figures = [*study_table(reference / "quickstart-160m"), *peer_table(reference / "train-1b")]
    path = ROOT / "README.md"
    head, _, rest = path.read_text().partition(START)
    _, _, tail = rest.partition(END)
    path.write_text("\n".join([head + START, *figures, END]) + tail)


if __name__ == "__main__":
    main()
