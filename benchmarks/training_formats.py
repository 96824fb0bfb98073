"""Numeric formats, optimizers and losses of training on this GPU: first right, then how fast and in how much memory.

    python benchmarks/training_formats.py --seconds 120

Prints a JSON line a variant: `checks` against the references; `step` of the 1b shape with torch.compile and cuDNN
attention; `optimizer`, one update of its parameters; `loss`, head and cross-entropy forward and backward. A variant
that fails prints its error and the next one runs; what the time does not reach is printed as left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyno.kernels import _adamw, _adamw8bit, _fp8
from dyno.kernels import linear_cross_entropy as loss
from dyno.model.config import config_of
from dyno.model.decoder import Decoder
from dyno.pipeline import Pipeline
from dyno.recipe import compose
from dyno.stages import train

DEVICE = torch.device("cuda", 0)
VOCABULARY = 128256


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check_fp8(rowwise: bool) -> dict[str, Any]:
    """Operands bit by bit, the three products against fp32 ones of the same operands, a layer against exact products."""
    parts = [torch.randn(n, 2048, device=DEVICE) for n in (2048, 512, 528)]
    scales = _fp8._both_scales(parts, _fp8.E4M3, rowwise)
    got = _fp8.operands(parts, *scales, _fp8.E4M3)
    wanted = _fp8.operands([p.cpu() for p in parts], *(s.cpu() for s in scales), _fp8.E4M3)
    row = {
        "equal_codes": [float((a.cpu().float() == b.float()).float().mean()) for a, b in zip(got, wanted, strict=True)]
    }
    x = torch.randn(1000, 2048, device=DEVICE, dtype=torch.bfloat16)
    for name, dtype in (("e4m3", _fp8.E4M3), ("e5m2", _fp8.E5M2)):
        scale, _ = _fp8._both_scales([x], dtype, rowwise)
        codes = _fp8.quantise(x, scale, dtype)
        expected = _fp8.reference_multiply(codes, scale, got[0], scales[0], torch.float32)
        for fast in (False, True):
            product = _fp8.multiply(codes, scale, got[0], scales[0], torch.bfloat16, fast)
            row[f"{name}_product_error{'_fast' if fast else ''}"] = relative(product, expected)
    x.requires_grad_()
    leaves = [p.requires_grad_() for p in parts]
    y = torch.cat(_fp8.linear(x, leaves, _fp8.Recipe(rowwise)), -1)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    weight = torch.cat(parts).detach()
    assert x.grad is not None
    grads = torch.cat([p.grad for p in leaves if p.grad is not None])
    return row | {
        "forward_error": relative(y.detach(), x.detach().float() @ weight.t()),
        "input_gradient_error": relative(x.grad, gradient.float() @ weight),
        "weight_gradient_error": relative(grads, gradient.float().t() @ x.detach().float()),
    }


def check_loss() -> dict[str, Any]:
    """Losses and both gradients against full logits in fp32."""
    row: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        made = loss.inputs(loss.LossShape(1000, 512, 50304), DEVICE, dtype, 0)
        wide = {n: t.float() if t.is_floating_point() else t for n, t in made.items()}
        results = []
        for function, given in ((loss.full_loss, wide), (loss.fused_loss, made), (loss.chunked_loss, made)):
            leaves = [given[n].clone().requires_grad_() for n in ("hidden", "weight")]
            value = function(*leaves, given["targets"])
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for name, got in zip(("fused", "chunked"), results[1:], strict=True):
            row[f"{name}_{dtype}_errors"] = [relative(a, b) for a, b in zip(got, results[0], strict=True)]
    return row


def check_adamw8bit() -> dict[str, Any]:
    """Five steps of the kernel and of the reference."""
    from dyno.kernels._adamw8bit_step import triton_step

    def by_reference(items: list[_adamw.Operands], scale: torch.Tensor, rates: _adamw.Rates) -> None:
        _adamw8bit.reference_step(*items[0], scale, rates)

    kept, count = [], 300_001
    for step in (triton_step, by_reference):
        generator = torch.Generator(DEVICE).manual_seed(0)
        weight = torch.randn(count, device=DEVICE, generator=generator)
        moments = [_adamw8bit.empty_moment(count, signed, DEVICE) for signed in (True, False)]
        for i in range(5):
            rates = _adamw.Rates(1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9 ** (i + 1), 1 - 0.95 ** (i + 1))
            grad, scale = torch.randn(count, device=DEVICE, generator=generator), torch.ones((), device=DEVICE)
            step([_adamw.Operands(weight, None, grad, *moments)], scale, rates)
        kept.append((weight, moments[0].codes, moments[1].codes))
    return {
        "weight_difference": float((kept[0][0] - kept[1][0]).abs().max()),
        "equal_codes": [float((a == b).float().mean()) for a, b in zip(kept[0][1:], kept[1][1:], strict=True)],
    }


def timed(step: Callable[[], object], count: int, warm: int = 3) -> dict[str, Any]:
    """Median step by CUDA events, first step (compilation in it) by the wall clock, peak of the allocator."""
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
    return {
        "step_time_s": float(np.median(times)),
        "first_s": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "count": count,
    }


def pipeline(directory: Path, *overrides: str) -> Pipeline:
    recipe = compose([f"results_dir={directory}", *overrides])
    return Pipeline(recipe, DEVICE, directory)


def step_of_1b(directory: Path, layers: int, *overrides: str) -> dict[str, Any]:
    """Training steps of the 1b shape at 8 x 2048 tokens with cuDNN attention; compiled where the precision allows it."""
    kind = "off" if any(o == "precision=fp8" for o in overrides) else "on"
    made = pipeline(
        directory, "model=1b", f"model.layers={layers}", "workload.batch=8", "workload.seq=2048", "workload.lr=3e-4",
        f"compile={kind}", "attention=sdpa_cudnn", *overrides,
    )  # fmt: skip
    torch._dynamo.reset()
    model = train.fresh_model(made, {"vocab_size": VOCABULARY})
    run = train.prepared_run(made, model)
    stream = np.random.default_rng(0).integers(0, VOCABULARY, size=200_000)
    trainer = train.Trainer(run, stream, made.recipe.config["workload"], seed=0)
    row = timed(trainer.step, 10)
    row["tokens_per_s"] = trainer.tokens_per_step / row["step_time_s"]
    return row | {"loss": trainer.finite_loss(), "layers": layers}


def optimizer_of_1b(directory: Path, option: str) -> dict[str, Any]:
    """One update of the 1b shape's parameters, gradients given."""
    made = pipeline(directory, "model=1b", f"optimizer={option}", "precision=bf16")
    with torch.device(DEVICE):
        model = Decoder(config_of(made.recipe.config["model"], VOCABULARY))
    run = train.prepared_run(made, model)
    optimizer = run.part("optimizer")(model, 1e-4)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    row = timed(optimizer.step, 5, warm=1)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    return row | {"state_bytes_a_parameter": state / sum(p.numel() for p in model.parameters())}


def head_and_loss(function: Callable[..., torch.Tensor], compiled: bool) -> dict[str, Any]:
    """Forward and backward of the 1b shape's head over 16384 tokens, bf16 states, fp32 weight."""
    made = loss.inputs(loss.LossShape(16384, 2048, VOCABULARY), DEVICE, torch.bfloat16, 0)
    leaves = [made["hidden"].requires_grad_(), made["weight"].float().requires_grad_()]
    call = torch.compile(function) if compiled else function

    def step() -> None:
        torch.autograd.grad(call(*leaves, made["targets"]), leaves)

    held = torch.cuda.memory_allocated()
    row = timed(step, 5, warm=1)
    return row | {"peak_over_inputs_bytes": row["peak_memory_bytes"] - held}


def variants(directory: Path, layers: int) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    for rowwise in (False, True):
        yield "checks", f"fp8 {'rowwise' if rowwise else 'tensorwise'}", partial(check_fp8, rowwise)
    yield "checks", "loss", check_loss
    yield "checks", "adamw8bit", check_adamw8bit
    step = partial(step_of_1b, directory, layers)
    yield "step", "bf16", partial(step, "precision=bf16")
    yield "step", "fp8 tensorwise", partial(step, "precision=fp8")
    yield "step", "fp8 tensorwise, loss fused", partial(step, "precision=fp8", "loss=fused")
    for name, function in (("full", loss.full_loss), ("chunked", loss.chunked_loss), ("fused", loss.fused_loss)):
        yield "loss", name, partial(head_and_loss, function, False)
    yield "loss", "full, compiled", partial(head_and_loss, loss.full_loss, True)
    for option in ("adamw", "adamw8bit", "muon"):
        yield "optimizer", option, partial(optimizer_of_1b, directory, option)
    yield "step", "fp8 rowwise", partial(step, "precision=fp8", "precision.scaling=rowwise")
    yield "step", "bf16, loss fused", partial(step, "precision=bf16", "loss=fused")
    yield "step", "fp8, fast backward", partial(step, "precision=fp8", "precision.fast_backward=true")
    yield "step", "fp8, bf16 weights", partial(step, "precision=fp8", "precision.weights=bfloat16")
    yield "step", "bf16_master", partial(step, "precision=bf16_master")
    yield "step", "bf16_stochastic", partial(step, "precision=bf16_stochastic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="start no variant after so many seconds")
    parser.add_argument("--layers", type=int, default=16, help="fewer compile sooner; 16 is the 1b shape")
    parser.add_argument("--only", default="", help="run only variants whose kind and name hold this text")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for kind, name, measure in variants(Path(directory), given.layers):
            if given.only not in f"{kind} {name}":
                continue
            row: dict[str, Any] = {"kind": kind, "variant": name, "gpu": torch.cuda.get_device_name()}
            if time.monotonic() - started > given.seconds:
                row["left_out"] = f"{given.seconds:.0f} s were over"
            else:
                try:
                    row |= measure()
                except Exception as error:  # noqa: BLE001 one failure must not cost the others
                    row["error"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
            row["at_s"] = round(time.monotonic() - started, 1)
            print(json.dumps(row))
            sys.stdout.flush()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
