"""Write the figures of README.md from the records in results/reference: `make readme`.

Text between the markers `<!-- NAME -->` and `<!-- /NAME -->` is generated; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import layouts
import readme_layouts
import readme_planner
from readme_layouts import cell

from dyno.measure.environment import Device
from dyno.plan import Plan, predict
from dyno.recipe import Recipe
from dyno.record import read_records
from dyno.show import si

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("tokens_per_s", "step_time_s", "peak_memory_bytes", "energy_j_per_token", "validation_loss")


def study_table(where: Path) -> list[str]:
    """The measured rows of a study, fastest first."""
    records = [r for r in read_records(where) if r["status"] == "ok"]
    records.sort(key=lambda r: -r["metrics"]["tokens_per_s"]["value"])
    first = records[0]
    machines = len({r["fingerprint"]["machine"] for r in records})
    lines = [
        f"`model={first['choices']['model']}`, training at a sequence of {first['config']['workload']['seq']}, on "
        f"{first['fingerprint']['device']} (torch {first['fingerprint']['torch']}); the {len(records)} runs of a study, "
        f"made on {machines} such GPUs. Median step, energy by NVML counter.",
        "",
        "| precision | attention | checkpointing | compile | batch | tokens/s | step | peak memory | energy a token | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        axes = [record["choices"][a] for a in ("precision", "attention", "checkpointing", "compile")]
        figures = [cell(record["metrics"].get(name)) for name in COLUMNS]
        lines.append("| " + " | ".join([*axes, str(record["config"]["workload"]["batch"]), *figures]) + " |")
    return lines


PEERS = {
    "dyno bf16_master fused graphs": "Dyno, bf16 with fp32 masters",
    "dyno bf16_master 8-bit fused graphs": "Dyno, bf16 with fp32 masters, AdamW's moments in 8 bits",
    "dyno bf16_master 8-bit fused joined graphs": "Dyno, bf16 with fp32 masters, moments in 8 bits, projections joined",
    "dyno fp8 fused graphs": "Dyno, fp8 products in the blocks, bf16 weights with fp32 masters",
    "transformers compile": "transformers + torch.compile, bf16 autocast",
    "transformers liger": "transformers + liger-kernel, bf16 autocast",
}
WHEN = {"": "", "_other_host": ", another host", "_earlier": ", earlier"}  # by the end of the file's name
LAST = 20  # steps whose mean loss is told


def peer_table(*paths: Path) -> list[str]:
    """Our training steps beside those of transformers: same weights, batches and GPU, one after the other."""
    rows = [{**json.loads(line), "path": path} for path in paths for line in path.read_text().splitlines()]
    first = rows[0]
    lines = [
        "",
        f"Training for {first['steps']} steps at {first['batch']} x {first['seq']} tokens from the same weights and on the same "
        f"batches, one after the other on one GPU. Loss: mean of the last {LAST} steps, and how far seeds are apart. Ours "
        "compile with CUDA graphs, cuDNN attention, the fused loss and AdamW in a single pass; its moments are in fp32, as the "
        "peers', where a row does not say 8 bits. Earlier: by an older, slower step. "
        "Hosts differ: what stands beside each other was measured on one.",
        "",
        "| model, GPU | | seeds | tokens/s | against compiled transformers | model FLOP/s | peak memory | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, model, gpu in dict.fromkeys((row["path"], row["model"], row["gpu"]) for row in rows):
        mine = [row for row in rows if (row["path"], row["model"], row["gpu"]) == (path, model, gpu)]
        when = WHEN[path.stem.removeprefix("training_peers")]
        of = {name: [row for row in mine if row["variant"] == name] for name in PEERS}
        rates = {name: fmean(row["tokens_per_s"] for row in some) for name, some in of.items() if some}
        for name, rate in rates.items():
            losses = [fmean(row["losses"][-LAST:]) for row in of[name]]
            loss = f"{fmean(losses):.3f}" + (f" ({min(losses):.3f} to {max(losses):.3f})" if losses[1:] else "")
            # Under CUDA graphs what left a pool counts twice.
            peak = max(min(row["peak_memory_bytes"], row["reserved_memory_bytes"]) for row in of[name])
            seeds = ", ".join(map(str, sorted(row["seed"] for row in of[name])))
            lines.append(
                f"| {model}, {gpu.split()[1]}{when} | {PEERS[name]} | {seeds} | "
                f"{si(rate)} | {rate / rates['transformers compile']:.3f}x | "
                f"{fmean(row['model_flop_per_s'] for row in of[name]) / 1e12:.0f} T | {si(peak, 'B')} | {loss} |"
            )
    return lines


def largest_table(*paths: Path) -> list[str]:
    """The largest model that trains in a GPU memory, by what goes to the host."""
    lines, least = [], 0.0
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in sorted((r for r in rows if "largest" in r), key=lambda r: r["parameters"]):
            least = least or row["parameters"]
            where = {"device memory": "the GPU", "--most": "not reached"}.get(row["limit"], row["limit"])
            lines.append(
                f"| {row['largest']} | {row['parameters'] / 1e9:.2f} B | {row['parameters'] / least:.1f}x | "
                f"{si(row['tokens_per_s'])} | {si(row['peak_memory_bytes'], 'B')} | {where} | {path.parent.name.upper()} |"
            )
    return [
        "",
        f"The largest model of the 1b shape's width that trains in {row['gib']:.0f} GiB of GPU memory, by layers, one sequence "
        "of 2048 tokens a step, every block recomputed (not reached: the search was told to end there):",
        "",
        "| offload | parameters | against none | tokens/s | peak memory | limit | GPU |",
        "|---|---|---|---|---|---|---|",
        *lines,
    ]


def checkpointing_table(where: Path) -> list[str]:
    """Ways of checkpointing on the 1b shape on one GPU, against keeping everything, eager and compiled apart."""
    records = [r for r in read_records(where) if r["status"] == "ok"]
    records.sort(key=lambda r: (r["choices"]["compile"], -r["metrics"]["activation_bytes"]["value"]))
    first = records[0]["config"]["workload"]
    lines = [
        "",
        f"Checkpointing on `model=1b` at {first['batch']} x {first['seq']} tokens in bf16 on one "
        f"{records[0]['fingerprint']['device']}, against none:",
        "",
        "| checkpointing | compile | activations | peak memory | recomputed | step |",
        "|---|---|---|---|---|---|",
    ]
    signs, notes = readme_layouts.marks(records, layouts.outdated(where))
    plain = {
        r["choices"]["compile"]: r["metrics"]
        for r in records
        if r["choices"]["checkpointing"] == r["choices"]["offload"] == "none"
    }
    for record in records:
        metrics, choices, window = record["metrics"], record["choices"], record["windows"]["train"]
        shown = {
            name: f"{cell(metrics[name])} ({metrics[name]['value'] / plain[choices['compile']][name]['value'] - 1:+.0%})"
            for name in ("activation_bytes", "peak_memory_bytes", "step_time_s")
        }
        knob = record["config"]["checkpointing"].get("budget")
        name = f"{choices['checkpointing']} {knob}" if knob else choices["checkpointing"]
        name = name if choices["offload"] == "none" else f"offload={choices['offload']}"
        lines.append(
            f"| {name}{signs.get(record['id'], '')} | {choices['compile']} | "
            f"{shown['activation_bytes']} | {shown['peak_memory_bytes']} | "
            f"{metrics['recomputed_flops']['value'] / (window['flops'] / window['steps']):+.0%} FLOPs | {shown['step_time_s']} |"
        )
    return [*lines, *notes]


def gate_table(gated: Path, ungated: Path) -> list[str]:
    """One study of as many trials, with the plan's gate and without it."""
    first = read_records(gated)[0]
    lines = [
        "",
        f"`dyno tune study=memory_limit`, the fastest step of `model={first['choices']['model']}` in "
        f"{first['config']['measure']['memory_limit_gib']} GiB of a GPU, with the plan's gate and without it, each to the end of "
        "its trials (`results/reference/h200/README.md`):",
        "",
        "| | did not fit, by the plan | ran | out of memory in a run | best |",
        "|---|---|---|---|---|",
    ]
    for label, where in (("the plan refuses", gated), ("everything runs", ungated)):
        records = read_records(where)
        refused = [r for r in records if (r["reason"] or "").startswith("predicted")]
        ran, full = ([r for r in records if r["status"] == status] for status in ("ok", "out_of_memory"))
        best = max(ran, key=lambda r: r["metrics"]["tokens_per_s"]["value"])
        lines.append(
            f"| {label} | {len(refused)} | {len(ran)} | {len(full) - len(refused)} | "
            f"{cell(best['metrics']['tokens_per_s'])} by {told(best)} |"
        )
    ran = [r for where in (gated, ungated) for r in read_records(where) if r["status"] == "ok"]
    over = {told(r): plan.needed_bytes for r in ran if (plan := planned(r)).verdict()}
    if over:
        refused = ", ".join(f"{recipe} ({si(needed, 'B')} with its reserve)" for recipe, needed in over.items())
        lines += ["", f"Of the {len(ran)} that ran today's plan would refuse {len(over)}: {refused}."]
    return lines


def planned(record: dict) -> Plan:
    """What today's plan says of a run on one GPU, whose memory the run's own limit bounds."""
    name = record["fingerprint"]["device"]
    return predict(Recipe(record["config"], record["choices"]), Device("cuda", 0, name, 2**40, (9, 0), None, 1))


def told(record: dict) -> str:
    """The options and the batch of a run."""
    options = [f"{a}={record['choices'][a]}" for a in ("precision", "checkpointing", "compile", "offload")]
    return f"`{' '.join(options)} workload.batch={record['config']['workload']['batch']}`"


ATTENTION_SHAPES = ("b1_h16x16_q16384_k16384_d128_causal", "b1_h32x32_q16384_k16384_d64_causal")
DECODE_SHAPES = ("b1_h32x8_q1_k32768_d128_causal", "b16_h32x8_q1_k8192_d128_causal")
LINEAR_SHAPES = ("m1_n8192_k8192_int4_g128_asym", "m1_n8192_k8192_int8_g128_asym", "m16_n8192_k8192_int4_g128_asym")


def kernel_table(where: Path) -> list[str]:
    """Our kernels beside their peers in the same run: products in TFLOP/s, what is bound by memory in TB/s."""
    by_op = {r["config"]["workload"]["op"]: r for r in read_records(where)}
    lines = ["", "Kernels of `kernels/` against their peers, in turns in one run, bf16:", ""]
    lines += ["| shape | Dyno (Triton) | PyTorch |", "|---|---|---|"]

    def row(op: str, shape: str, peers: dict[str, str], figure: str, unit: str) -> None:
        metrics = by_op[op]["metrics"]

        def rate(variant: str) -> str:
            return f"{metrics[f'{shape}.{variant}.{figure}']['value'] / 1e12:.3g}"

        others = ", ".join(f"{name} {rate(variant)}" for variant, name in peers.items())
        lines.append(f"| {op} {shape} | {rate('triton')} {unit} | {others} {unit} |")

    for shape in ATTENTION_SHAPES:
        row("attention", shape, {"sdpa_flash": "flash", "sdpa_cudnn": "cuDNN"}, "flop_per_s", "TFLOP/s")
    for shape in DECODE_SHAPES:
        row("attention", shape, {"sdpa_flash": "flash", "sdpa_cudnn": "cuDNN"}, "byte_per_s", "TB/s")
    metrics = by_op["quantized_linear"]["metrics"]
    for shape in LINEAR_SHAPES:
        ours, dense = (metrics[f"{shape}.{v}.time_s"]["value"] * 1e6 for v in ("triton", "torch_dense"))
        lines.append(f"| quantized_linear {shape} | {ours:.3g} us | cuBLAS bf16 {dense:.3g} us |")
    return lines


def serving_table(where: Path) -> list[str]:
    """Decode rows of a sweep, as they came."""
    records = [r for r in read_records(where) if r["status"] == "ok"]
    workload = records[0]["config"]["workload"]
    lines = [
        "",
        f"Serving `model={records[0]['choices']['model']}` in bf16, {workload['requests']} sequences, prompt "
        f"{workload['prompt']}, {workload['new_tokens']} new tokens, without CUDA graphs:",
        "",
        "| attention | quantization | decoding | decode tokens/s | time to first token | model | KL to the original |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        axes = [record["choices"][a] for a in ("attention", "quantization", "decoding")]
        names = ("decode_tokens_per_s", "ttft_s", "model_bytes", "kl_divergence")
        lines.append("| " + " | ".join([*axes, *(cell(record["metrics"].get(name)) for name in names)]) + " |")
    return lines


def split_decode_table(where: Path) -> list[str]:
    """Decode of a model split over tensor ranks beside the whole model, with the host's launches and without."""

    def axes(record: dict) -> tuple[int, str, str, int]:
        choices = record["choices"]
        return (
            record["config"]["workload"]["requests"], choices["kv_cache"], choices["compile"], max(1, len(record["ranks"])),
        )  # fmt: skip

    records = sorted((r for r in read_records(where) if r["status"] == "ok"), key=axes)
    workload, device = records[0]["config"]["workload"], records[0]["fingerprint"]["device"]
    lines = [
        "",
        f"Decode of `model={records[0]['choices']['model']}` in bf16 on {device}, split over tensor ranks, prompt "
        f"{workload['prompt']}, {workload['new_tokens']} new tokens; `kv_cache=static` replays a pass as one CUDA graph.",
        "",
        "| sequences | kv_cache | compile | GPUs | decode tokens/s | time per token | time to first token | peak memory a GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        names = ("decode_tokens_per_s", "tpot_s", "ttft_s", "peak_memory_bytes")
        lines.append(f"| {' | '.join([*map(str, axes(record)), *(cell(record['metrics'].get(n)) for n in names)])} |")
    return lines


def meter_lines(path: Path) -> list[str]:
    found = json.loads(path.read_text())
    low, median, high = (100 * found[name] for name in ("overhead_low", "overhead", "overhead_high"))
    return [
        "",
        f"All meters on cost a decode loop of {1e3 * found['plain_step_s']:.0f} ms a pass {median:+.2f}% of its time "
        f"(95% interval {low:+.2f}% to {high:+.2f}%; {found['rounds']} alternating rounds).",
    ]


def main() -> None:
    reference, planner = (ROOT / "results" / "reference" / name for name in ("h100", "planner"))
    peers = [reference.parent / gpu / f"training_peers{end}.jsonl" for gpu in ("h100", "h200") for end in WHEN]
    blocks = {
        "figures": [
            *study_table(reference / "quickstart-160m"),
            *peer_table(*[path for path in peers if path.exists()]),
            *checkpointing_table(reference.parent / "h200" / "checkpointing"),
            *largest_table(*(reference.parent / gpu / "largest_model.jsonl" for gpu in ("h100", "h200"))),
            *gate_table(*(reference.parent / "h200" / name for name in ("memory_limit", "memory_limit_ungated"))),
            *kernel_table(reference / "kernels"),
            *serving_table(reference / "generate-160m"),
            *readme_layouts.layouts_table(reference.parent / "h200-x2" / "layouts"),
            *readme_layouts.layouts_table(reference.parent / "h200-x4" / "layouts"),
            *readme_layouts.scaling_table(reference.parent / "h200-x2" / "layouts"),
            *readme_layouts.scaling_table(reference.parent / "h200-x4" / "layouts"),
            *readme_layouts.layout_studies(
                *(reference.parent / f"h200-x{n}" / f"layout-{m}" for m in ("1b", "8b") for n in (2, 4))
            ),
            *split_decode_table(reference.parent / "h200-x4" / "decode-8b"),
            *meter_lines(reference / "meter_overhead.json"),
        ],
        "planner": readme_planner.table(
            reference / "quickstart-160m",
            [planner / f"random_recipes_{gpu}.json" for gpu in ("h100", "h200")],
            *(planner / name for name in ("published_runs.json", "serving.json")),
            [planner / f"layouts_{gpu}.json" for gpu in ("h100", "h200")],
            reference.parent / "h200-x4" / "decode-8b",
        ),
    }
    path = ROOT / "README.md"
    text = path.read_text()
    for name, lines in blocks.items():
        head, _, rest = text.partition(f"<!-- {name} -->")
        _, _, tail = rest.partition(f"<!-- /{name} -->")
        text = "\n".join([f"{head}<!-- {name} -->", *lines, f"<!-- /{name} -->"]) + tail
    path.write_text(text)


if __name__ == "__main__":
    main()
