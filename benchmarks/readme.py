"""Write the figures of README.md from the records in results/reference: `make readme`.

Text between the markers `<!-- NAME -->` and `<!-- /NAME -->` is generated; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import layouts

from dyno.record import read_records
from dyno.show import si

ROOT = Path(__file__).resolve().parent.parent
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


LAYOUTS = ("160m", "160m_128k", "1b")  # groups of the layouts that are shown
PEERS = {
    "dyno bf16_master fused graphs": "Dyno, bf16 with fp32 masters",
    "dyno fp8 fused graphs": "Dyno, fp8 products in the blocks, bf16 weights with fp32 masters",
    "transformers compile": "transformers + torch.compile, bf16 autocast",
}
LAST = 20  # steps whose mean loss is told


def peer_table(path: Path) -> list[str]:
    """Our 1B training steps beside transformers with torch.compile: same weights, batches and GPU, one after the other."""
    rows = {row["variant"]: row for row in map(json.loads, path.read_text().splitlines())}
    ours, narrow, peer = (rows[name] for name in PEERS)
    lines = [
        "",
        f"Training `model=1b` for {ours['steps']} steps at {ours['batch']} x {ours['seq']} tokens, the same weights and "
        f"batches on the same GPU (one seed; loss: mean of the last {LAST} steps): "
        f"{peer['step_time_s'] / ours['step_time_s']:.2f}x, with fp8 {peer['step_time_s'] / narrow['step_time_s']:.2f}x. "
        "Ours compile with CUDA graphs, cuDNN attention, the fused loss and single-pass AdamW.",
        "",
        "| | tokens/s | model FLOP/s | peak memory | loss |",
        "|---|---|---|---|---|",
    ]
    for name, label in PEERS.items():
        row = rows[name]
        loss = sum(row["losses"][-LAST:]) / LAST
        peak = min(row["peak_memory_bytes"], row["reserved_memory_bytes"])  # graphs: what left a pool counts twice
        lines.append(
            f"| {label} | {si(row['tokens_per_s'])} | {row['model_flop_per_s'] / 1e12:.0f} T | "
            f"{si(peak, 'B')} | {loss:.3f} |"
        )
    return lines


def layouts_table(where: Path) -> list[str]:
    """Parallel layouts of two GPUs beside one: what the step takes, what of it waits for messages, and the losses."""
    cells = layouts.read(where)
    shown = [(key, r) for key, r in cells.items() if r["status"] == "ok" and key.partition("/")[0] in LAYOUTS]
    rows = {key: layouts.row_of(key, r, cells.get(layouts.reference(key))) for key, r in shown}
    bus = sorted(row["bus_byte_per_s"] for row in rows.values() if row["bus_byte_per_s"])
    lines = [
        "",
        "Layouts of two H100 through NCCL, bf16, eager (all-reduce: "
        f"{bus[len(bus) // 2] / 1e9:.0f} GB/s bus bandwidth). Loss: the largest difference "
        "to one GPU's over ten steps.",
        "",
        "| model and tokens | layout | tokens/s | peak memory a GPU | exposed messages | loss |",
        "|---|---|---|---|---|---|",
    ]
    for key, record in shown:
        name, row, workload = key.rpartition("/")[2], rows[key], record["config"]["workload"]
        share = row["communication_share"]
        lines.append(
            f"| {record['config']['model']['name']}, {workload['batch']} x {workload['seq']} | {name} | "
            f"{si(row['tokens_per_s_per_gpu'] * row['gpus'])} | {si(row['peak_memory_bytes'], 'B')} | "
            f"{'-' if share is None else f'{share:.0%}'} | {'-' if name == 'one' else format(row['loss_apart'], '.4f')} |"
        )
    return lines


def checkpointing_table(where: Path) -> list[str]:
    """Ways of checkpointing on the 1b shape, against keeping everything, eager and compiled apart."""
    records = [r for r in read_records(where) if r["status"] == "ok"]
    records.sort(key=lambda r: r["created"])
    first = records[0]["config"]["workload"]
    lines = [
        "",
        f"Checkpointing on `model=1b` at {first['batch']} x {first['seq']} tokens in bf16 on one H100, against none:",
        "",
        "| checkpointing | compile | activations | peak memory | recomputed | step |",
        "|---|---|---|---|---|---|",
    ]
    plain = {r["choices"]["compile"]: r["metrics"] for r in records if r["choices"]["checkpointing"] == "none"}
    for record in records:
        metrics, kind = record["metrics"], record["choices"]["compile"]
        values = {n: metrics[n]["value"] for n in ("activation_bytes", "recomputed_flops", "step_time_s")}
        base = {n: plain[kind][n]["value"] for n in values}
        window = record["windows"]["train"]
        lines.append(
            f"| {record['choices']['checkpointing']} | {kind} | {cell(metrics['activation_bytes'])} "
            f"({values['activation_bytes'] / base['activation_bytes'] - 1:+.0%}) | {cell(metrics['peak_memory_bytes'])} | "
            f"{values['recomputed_flops'] / (window['flops'] / window['steps']):+.0%} FLOPs | {cell(metrics['step_time_s'])} "
            f"({values['step_time_s'] / base['step_time_s'] - 1:+.0%}) |"
        )
    return lines


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
    """Decode of a model split over tensor ranks beside the whole model."""
    records = sorted(read_records(where), key=lambda r: (r["config"]["workload"]["requests"], len(r["ranks"])))
    workload = records[0]["config"]["workload"]
    lines = [
        "",
        f"Decode of `model={records[0]['choices']['model']}` in bf16, split over tensor ranks, prompt {workload['prompt']}, "
        f"{workload['new_tokens']} new tokens, compiled, without CUDA graphs. A pass of one token is bound by the host, "
        "which with two ranks has a collective more to launch after attention and MLP of every block.",
        "",
        "| sequences | GPUs | decode tokens/s | time per token | time to first token | peak memory a GPU |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        names = ("decode_tokens_per_s", "tpot_s", "ttft_s", "peak_memory_bytes")
        cells = [cell(record["metrics"].get(name)) for name in names]
        size = [str(record["config"]["workload"]["requests"]), str(max(1, len(record["ranks"])))]
        lines.append("| " + " | ".join([*size, *cells]) + " |")
    return lines


def meter_lines(path: Path) -> list[str]:
    found = json.loads(path.read_text())
    low, median, high = (100 * found[name] for name in ("overhead_low", "overhead", "overhead_high"))
    return [
        "",
        f"All meters on cost a decode loop of {1e3 * found['plain_step_s']:.0f} ms a pass {median:+.2f}% of its time "
        f"(95% interval {low:+.2f}% to {high:+.2f}%; {found['rounds']} alternating rounds).",
    ]


def planner_table(study: Path, drawn: Path, published: Path, served: Path, split: Path) -> list[str]:
    """What was predicted before each run of the study, by nothing but arithmetic, against what was measured."""
    records = [r for r in read_records(study) if r["status"] == "ok"]
    lines = ["| predicted against | runs | median error | worst |", "|---|---|---|---|"]

    def row(what: str, errors: list[float]) -> None:
        errors = sorted(abs(e) for e in errors)
        median = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
        lines.append(f"| {what} | {len(errors)} | {median:.1%} | {errors[-1]:.1%} |")

    for kind, label in (("off", "eager"), ("on", "compiled")):
        chosen = [r for r in records if r["choices"]["compile"] == kind]
        for metric, name in (("peak_memory_bytes", "peak memory"), ("step_time_s", "step time")):
            row(
                f"{name} of the study above, {label}",
                [r["plan"][metric] / r["metrics"][metric]["value"] - 1 for r in chosen],
            )
    random = json.loads(drawn.read_text())
    for metric, which, name in (("memory", "as_derived", "peak memory"), ("time", "calibrated", "step time")):
        found = random[metric][which]
        lines.append(
            f"| {name} of random recipes, {which.replace('_', ' ')}, held out of {random['runs']} | {found['runs']} | "
            f"{found['median']:.1%} | {found['p95']:.1%} (95% of them) |"
        )
    layouts = json.loads(split.read_text())
    for name, label in (("memory", "peak memory a GPU"), ("time", "step time")):
        found = layouts[name]
        lines.append(
            f"| {label} of layouts on two GPUs, host costs fitted to these | {found['runs']} | {found['median']:.1%} | "
            f"{found['worst']:.1%} |"
        )
    found = json.loads(published.read_text())["held_out"]
    lines.append(
        f"| throughput of published runs on 8 to 16384 GPUs, those not fitted | {found['runs']} | "
        f"{found['median']:.1%} | {found['worst']:.1%} |"
    )
    serving = json.loads(served.read_text())
    for name, label in (("ttft_s", "time to first token"), ("tpot_s", "time per token")):
        found = serving[name]
        lines.append(
            f"| {label} of the served runs above | {found['runs']} | {found['median']:.1%} | {found['worst']:.1%} |"
        )
    return lines


def main() -> None:
    reference, planner = (ROOT / "results" / "reference" / name for name in ("h100", "planner"))
    blocks = {
        "figures": [
            *study_table(reference / "quickstart-160m"),
            *peer_table(reference / "training_peers.jsonl"),
            *checkpointing_table(reference / "checkpointing"),
            *kernel_table(reference / "kernels"),
            *serving_table(reference / "generate-160m"),
            *layouts_table(reference.parent / "h100-x2" / "layouts"),
            *split_decode_table(reference.parent / "h100-x2" / "decode-8b"),
            *meter_lines(reference / "meter_overhead.json"),
        ],
        "planner": planner_table(
            reference / "quickstart-160m",
            planner / "random_recipes.json",
            *(planner / name for name in ("published_runs.json", "serving.json", "layouts.json")),
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
