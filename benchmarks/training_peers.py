"""Training here against transformers with torch.compile and with liger-kernel: speed, memory and loss in one run.

    python benchmarks/training_peers.py --steps 200                                # model=1b, 8 x 2048
    python benchmarks/training_peers.py --model 160m --steps 200 --seeds 0 1 2 --parallel 3
    python benchmarks/training_peers.py --layers 4 --steps 20 --only "dyno bf16" "transformers compile"

Every variant starts from the same weights, takes the same batches of the embedded corpus, and steps with fused AdamW
after clipping the gradients' norm. Each runs in a process of its own; `--parallel` ones compile side by side, and step in
turn. Prints a JSON line a variant and seed, then one with the ratios: tokens/s with 95% intervals over blocks of steps,
and the loss over the last steps against the other variant's at the same seed. A variant and seed already in `--out` is not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dyno import turns

OURS = ["compile=on", "attention=sdpa_cudnn"]
MASTER = [*OURS, "precision=bf16_master"]
ONE_PASS, EIGHT_BIT = ["optimizer=adamw_single_pass"], ["optimizer=adamw8bit"]
FUSED = ["loss=fused", "loss.rows=16384"]  # all logits of a step of 8 x 2048 in one chunk
GRAPHS = ["compile.mode=reduce-overhead"]
JOINED = ["compile.join_projections=true"]
FP8 = ["precision=fp8", "precision.weights=bfloat16"]
VARIANTS: dict[str, list[str] | dict[str, bool]] = {
    "dyno bf16": [*OURS, "precision=bf16"],
    "dyno bf16 single_pass": [*OURS, "precision=bf16", *ONE_PASS],
    "dyno bf16_master": [*MASTER, *ONE_PASS],
    "dyno bf16_master fused": [*MASTER, *ONE_PASS, *FUSED],
    "dyno bf16_master fused graphs": [*MASTER, *ONE_PASS, *FUSED, *GRAPHS],
    "dyno bf16_master 8-bit fused graphs": [*MASTER, *EIGHT_BIT, *FUSED, *GRAPHS],
    "dyno bf16_master 8-bit fused joined graphs": [*MASTER, *EIGHT_BIT, *FUSED, *JOINED, *GRAPHS],
    "dyno fp8": [*OURS, *FP8, *ONE_PASS],
    "dyno fp8 fused graphs": [*OURS, *FP8, *ONE_PASS, *FUSED, *GRAPHS],
    "transformers compile": {"compile": True},
    "transformers compile pure": {"compile": True, "pure": True},
    "transformers liger": {"liger": True},
    "transformers liger compile": {"compile": True, "liger": True},
}
LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
PEAK = 989e12  # FLOP/s, dense bf16 of an H100 SXM
WARM = 8  # steps of a seed that are not timed
LAST = 20  # steps whose mean loss is compared


def recipe_of(given: argparse.Namespace, seed: int, overrides: list[str]) -> Any:
    from dyno.recipe import compose

    shape = [f"model={given.model}", *([f"model.layers={given.layers}"] if given.layers else [])]
    workload = [f"workload.batch={given.batch}", f"workload.seq={given.seq}", f"workload.lr={LR}", f"seed={seed}"]
    return compose([*shape, *workload, f"results_dir={given.results}", *overrides])


class Ours:
    """The project's own training step."""

    def __init__(self, given: argparse.Namespace, overrides: list[str]):
        self.given, self.overrides = given, overrides
        self.run: Any = None

    def begin(self, seed: int) -> Callable[[], Any]:
        """Fresh weights and optimizer in the same compiled step; returns a step that gives its loss."""
        from dyno.stages import train

        pipeline = made_pipeline(self.given, seed, self.overrides)
        path, manifest, _ = pipeline.data()
        fresh = train.fresh_model(pipeline, manifest)
        if self.run is None:
            self.run = train.prepared_run(pipeline, fresh)
        else:
            copy_weights(fresh.state_dict(), self.run.model.state_dict())
        del fresh
        stream = np.load(path / "train.npy", mmap_mode="r")
        trainer = train.Trainer(self.run, stream, pipeline.recipe.config["workload"], seed)
        self.step_flops = train.step_flops(self.run.model.config, trainer.tokens_per_step, self.given.seq)

        def step() -> Any:
            trainer.step()
            return trainer.loss

        return step


class Transformers:
    """The same model by transformers, in the loop that its users write."""

    def __init__(self, given: argparse.Namespace, compile: bool = False, pure: bool = False, liger: bool = False):
        self.given, self.compile, self.pure, self.liger = given, compile, pure, liger
        self.model: Any = None

    def begin(self, seed: int) -> Callable[[], Any]:
        import torch

        from dyno.model.load_names import names
        from dyno.stages import train
        from dyno.stages.batches import stream_batches

        pipeline = made_pipeline(self.given, seed, [])
        path, manifest, _ = pipeline.data()
        fresh = train.fresh_model(pipeline, manifest)
        if self.model is None:
            self.model = self.built(fresh.config)
            self.call = torch.compile(self.model) if self.compile else self.model
        table = names(fresh.config.layers, "hf")
        copy_weights({table[name]: t for name, t in fresh.state_dict().items()}, self.model.state_dict())
        self.step_flops = train.step_flops(fresh.config, self.given.batch * self.given.seq, self.given.seq)
        del fresh
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
        stream = np.load(path / "train.npy", mmap_mode="r")
        drawn = stream_batches(stream, None, self.given.batch, self.given.seq, seed)

        def step() -> Any:
            batch = next(drawn)
            tokens, targets = (t.contiguous().pin_memory().to("cuda", non_blocking=True) for t in batch[:2])
            with contextlib.nullcontext() if self.pure else torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.call(input_ids=tokens, labels=targets, shift_labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def built(self, config: Any) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        if self.liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()  # its defaults: rope, norms, SwiGLU, linear and cross-entropy in one
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16 if self.pure else torch.float32)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size, hidden_size=config.hidden, intermediate_size=config.ffn_width,
                    num_hidden_layers=config.layers, num_attention_heads=config.heads, head_dim=config.head_dim,
                    num_key_value_heads=config.kv_heads, max_position_embeddings=8192, rms_norm_eps=config.norm_eps,
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                    tie_word_embeddings=config.tied_embeddings, attn_implementation="sdpa", use_cache=False,
                )
            )  # fmt: skip
            torch.set_default_dtype(torch.float32)
        return model.train()


def made_pipeline(given: argparse.Namespace, seed: int, overrides: list[str]) -> Any:
    import torch

    from dyno.pipeline import Pipeline

    return Pipeline(recipe_of(given, seed, overrides), torch.device("cuda", 0), Path(given.results))


def copy_weights(source: dict[str, Any], target: dict[str, Any]) -> None:
    import torch

    assert source.keys() == target.keys(), source.keys() ^ target.keys()
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def measure(name: str, given: argparse.Namespace) -> None:
    """One variant in this process: prints a JSON line a seed."""
    import torch

    from dyno.measure.memory import peak_bytes

    kind = VARIANTS[name]
    made = Ours(given, kind) if isinstance(kind, list) else Transformers(given, **kind)
    began = time.perf_counter()
    made.begin(0)()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - began
    with turns.take(Path(given.results) / "turn.lock"):  # the GPU is one variant's at a time
        for seed in given.seeds:
            step, losses = made.begin(seed), []
            torch.cuda.reset_peak_memory_stats()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(given.steps + 1)]
            marks[0].record()
            for mark in marks[1:]:
                losses.append(step())
                mark.record()
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
            median = float(np.median(times[WARM:]))
            row = {
                "variant": name, "model": given.model, "layers": given.layers, "batch": given.batch, "seq": given.seq,
                "seed": seed, "steps": given.steps, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                "first_step_s": round(first_s, 1), "step_time_s": median,
                "tokens_per_s": given.batch * given.seq / median,
                "model_flop_per_s": made.step_flops / median, "mfu": made.step_flops / median / PEAK,
                "peak_memory_bytes": peak_bytes(torch.device("cuda", 0))[0],
                "reserved_memory_bytes": torch.cuda.max_memory_reserved(),
                "losses": [round(float(loss), 5) for loss in losses], "step_times_s": [round(t, 6) for t in times],
            }  # fmt: skip
            print(json.dumps(row), flush=True)
        if given.profile:
            profile(step, given.profile)


def profile(step: Callable[[], Any], path: str) -> None:
    """The GPU time of three steps by kernel, the longest first."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = sorted(((e.self_device_time_total / 3e3, e.count // 3, e.key) for e in seen.key_averages()), reverse=True)
    text = "".join(f"{ms:9.3f} ms  {count:5d}  {key[:160]}\n" for ms, count, key in rows[:60])
    Path(path).write_text(f"{sum(row[0] for row in rows):.1f} ms a step\n{text}")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours against each peer: tokens/s with an interval, and the paired difference of the last steps' loss."""
    from dyno.measure.statistics import ratio_interval

    found = []
    by = {(row["variant"], row["seed"]): row for row in rows}
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for ours in (n for n in names if n.startswith("dyno")):
        for other in (n for n in names if n != ours and (not n.startswith("dyno") or n == "dyno bf16")):
            seeds = [s for v, s in by if v == ours and (other, s) in by]
            if not seeds:
                continue
            times = [np.concatenate([by[n, s]["step_times_s"][WARM:] for s in seeds]) for n in (ours, other)]
            speedup, low, high = ratio_interval(times[1], times[0])
            ends = [[np.mean(by[n, s]["losses"][-LAST:]) for s in seeds] for n in (ours, other)]
            found.append({
                "ours": ours, "against": other, "seeds": len(seeds),
                "speedup": speedup, "speedup_interval": [low, high],
                "loss": [float(x) for x in ends[0]], "loss_against": [float(x) for x in ends[1]],
                "loss_difference": float(np.mean(np.subtract(*ends))),
            })  # fmt: skip
    return found


def child(name: str, given: argparse.Namespace, seeds: list[int]) -> list[str]:
    """A variant in a fresh process; its lines, or one that says how it failed."""
    flags = ["--model", given.model, "--layers", str(given.layers), "--batch", str(given.batch), "--seq", str(given.seq),
             "--steps", str(given.steps), "--results", given.results, "--seeds", *map(str, seeds)]  # fmt: skip
    if given.profile:
        flags += ["--profile", str(Path(given.profile) / f"{name.replace(' ', '-')}.txt")]
    done = subprocess.run([sys.executable, __file__, "--variant", name, *flags], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-3:]
        lines.append(json.dumps({"variant": name, "error": f"ended with {done.returncode}: {' | '.join(tail)[-600:]}"}))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's own; fewer compile sooner")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=1e9, help="start no variant after so long")
    parser.add_argument("--parallel", type=int, default=1, help="variants that compile side by side")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", default="training_peers.jsonl")
    parser.add_argument("--results", default="/tmp/training_peers", help="where the corpus is kept")
    parser.add_argument("--profile", default="", help="a directory for GPU times by kernel")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    Path(given.results).mkdir(parents=True, exist_ok=True)
    if given.variant:
        measure(given.variant, given)
        return 0
    if given.profile:
        Path(given.profile).mkdir(parents=True, exist_ok=True)
    out, started = Path(given.out), time.monotonic()
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    made_data = recipe_of(given, 0, [])
    model = made_data.config["model"]["name"]
    there = {(row["variant"], row.get("seed")) for row in rows if row.get("model") == model}

    def one(name: str) -> None:
        seeds = [seed for seed in given.seeds if (name, seed) not in there]
        if not seeds or time.monotonic() - started > given.seconds:
            return
        for text in child(name, given, seeds):
            with out.open("a") as file:
                file.write(text + "\n")
            rows.append(json.loads(text))
            shown = {k: v for k, v in rows[-1].items() if k not in ("losses", "step_times_s")}
            print(f"{time.monotonic() - started:5.0f} s  {json.dumps(shown)}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(given.parallel) as pool:
        list(pool.map(one, given.only))
    kept = [row for row in rows if "step_times_s" in row and row["model"] == given.model]
    print(json.dumps({"model": given.model, "ratios": ratios(kept)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
