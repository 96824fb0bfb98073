"""The infer stage: quality of the model as it is served, then prefill and decode, timed apart."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dyno import quality
from dyno.artifacts import acting
from dyno.errors import NonFinite, UserError
from dyno.kernels.attention import eager
from dyno.model.config import ModelConfig, parameter_counts
from dyno.model.decoder import Decoder, call_plainly, cast
from dyno.record import Metric
from dyno.stages import bench, compress
from dyno.stages.ranks import counted_pass, first_rank_first, same_on_every_rank
from dyno.technique import Run

if TYPE_CHECKING:
    from dyno.pipeline import Pipeline


class Session(Protocol):
    """A decode in progress over a batch of prompts."""

    tokens: Tensor  # (B, prompt + generated so far)

    def step(self) -> int:
        """One pass of the model; returns the number of tokens that the whole batch gained."""
        ...

    def rewind(self) -> None:
        """Back to the end of the prompt, caches included, so that rounds repeat in one measured region."""
        ...


def prepared_run(pipeline: Pipeline, model: Decoder) -> Run:
    """A run whose parts are plain inference, edited by the techniques that act here."""
    run = pipeline.run("infer")
    run.model = model
    run.parts.update(
        attention=eager,
        autocast=contextlib.nullcontext,
        scaler=None,
        weights_dtype=torch.float32,
        matmul_dtype="fp32",
        call_block=call_plainly,
        forward=model,
        cache=None,
        decode=None,
        groups={},
        split=lambda: None,  # leaves of the model what this rank holds
    )
    for chosen in acting(pipeline.recipe, "infer").values():
        for technique in chosen:
            technique.apply(run)
            model.attend = run.part("attention")
            model.call_block = run.part("call_block")
    cast(model, run.part("weights_dtype"))
    if run.draft is not None:
        run.draft.attend = run.part("attention")
        cast(run.draft, run.part("weights_dtype"))
    return run


def measure(pipeline: Pipeline) -> tuple[dict[str, Metric], str]:
    """Quality, sizes, prefill and decode metrics; and the weights' key."""
    meter, config = pipeline.meter, pipeline.recipe.config
    assert meter is not None
    workload = config["workload"]
    with first_rank_first(pipeline.rank, pipeline.ranks):
        model, original, weights_key = compress.compress(pipeline)
    data_path, _, _ = pipeline.data()
    held_out = np.load(data_path / "validation.npy", mmap_mode="r")
    run = prepared_run(pipeline, model)
    pipeline.progress("infer: quality")
    metrics: dict[str, Metric] = compress.size_metrics(model)
    run.part("split")()
    with torch.no_grad(), run.part("autocast")():
        metrics |= quality.against(run.part("forward"), original, held_out, workload, pipeline.device)
    if workload["new_tokens"] <= 0:
        return metrics, weights_key
    prompts = take_prompts(held_out, workload).to(pipeline.device)
    with torch.inference_mode(), run.part("autocast")():
        metrics |= generate(pipeline, run, prompts, workload)
    return metrics, weights_key


def take_prompts(held_out: np.ndarray, workload: dict[str, Any]) -> Tensor:
    """(requests, prompt) int64: equally spaced stretches of the validation text."""
    need = workload["prompt"] + 1
    if len(held_out) < need:
        raise UserError(
            f"workload.prompt={workload['prompt']} is longer than the validation text ({len(held_out)} tokens)"
        )
    starts = np.linspace(0, len(held_out) - need, workload["requests"]).astype(np.int64)
    return torch.from_numpy(np.stack([held_out[s : s + workload["prompt"]] for s in starts]).astype(np.int64))


def generate(pipeline: Pipeline, run: Run, prompts: Tensor, workload: dict[str, Any]) -> dict[str, Metric]:
    """Prefill and decode windows. A round is workload.new_tokens a request; rounds repeat from the prompt's end.

    Tokens are those of the whole run; FLOPs, bytes and memory those of a rank, whose model has the sizes that it holds.
    """
    meter, model, ranks = pipeline.meter, run.model, pipeline.ranks
    assert meter is not None and model is not None
    decode, new = run.part("decode"), workload["new_tokens"]
    length = prompts.shape[1] + new + 1
    requests, prompt = prompts.shape

    pipeline.progress("infer: prefill")
    warm_prefill = bench.warm_up(meter, lambda: decode.start(run, prompts, length))
    with meter.window("prefill") as window:
        for _ in window.steps(warm_prefill.steps_to_fill if ranks > 1 else None):
            session: Session = decode.start(run, prompts, length)
    passes = len(window.step_times_s)
    window.dtype = run.part("matmul_dtype")
    window.tokens = passes * requests * prompt
    window.flops = passes * requests * forward_flops(model.config, prompt, prompt / 2)
    window.bytes = passes * weight_bytes(model)
    prefill = window.metrics()
    metrics = {}
    metrics["ttft_s"] = prefill["step_time_s"]
    metrics["prefill_tokens_per_s"] = prefill["tokens_per_s"]
    if "mfu" in prefill:
        metrics["prefill_mfu"] = prefill["mfu"]

    pipeline.progress("infer: decode")
    round_tokens = 0

    def one_pass() -> int:
        nonlocal round_tokens
        if round_tokens >= requests * new:
            session.rewind()
            round_tokens = 0
        gained = session.step()
        round_tokens += gained
        return gained

    # Every length of a round once: warm-up has the shapes of the measured region, and each length is a shape.
    while round_tokens < requests * new:
        one_pass()
    warm = bench.warm_up(meter, one_pass)
    if ranks > 1:
        metrics |= counted_pass(run, one_pass)
    session.rewind()
    round_tokens = gained = 0
    with meter.window("decode") as window:
        for _ in window.steps(warm.steps_to_fill if ranks > 1 else None):
            gained += one_pass()
    if ranks > 1:
        same_on_every_rank(session.tokens)
    window.tokens = gained
    passes = len(window.step_times_s)
    window.dtype = run.part("matmul_dtype")
    positions = passes * requests * decode.positions_per_pass
    window.flops = positions * forward_flops(model.config, 1, prompt + new / 2)
    context = prompt + new / 2
    window.bytes = passes * (weight_bytes(model) + requests * context * kv_bytes(model))
    out = window.metrics()
    metrics |= out | warm.metrics
    metrics["compile_time_s"] = add(warm_prefill.metrics["compile_time_s"], warm.metrics["compile_time_s"])
    metrics["decode_tokens_per_s"] = out["tokens_per_s"]
    per_pass = gained / passes / requests
    metrics["accepted_tokens_per_pass"] = Metric(per_pass, "tokens", passes, source="count")
    step = out["step_time_s"]
    if step.value is not None:
        metrics["tpot_s"] = Metric(
            step.value / per_pass, "s", step.count, _over(step.low, per_pass), _over(step.high, per_pass), step.source
        )
        if metrics["ttft_s"].value is not None:
            total = metrics["ttft_s"].value + new * step.value / per_pass
            metrics["end_to_end_s"] = Metric(total, "s", step.count, source="ttft_s + new_tokens x tpot_s")
    # Of every token the states, but the logits of one: of all they would take more memory than the model.
    states = model.hidden_states(session.tokens[:, -prompt:])
    if not all(bool(torch.isfinite(x).all()) for x in (states, model.lm_head(states[:, -1:]))):
        raise NonFinite("the states or logits of the generated text are not finite")
    return metrics


def _over(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def add(a: Metric, b: Metric) -> Metric:
    """The sum of two measured times; unmeasured when either is."""
    if a.value is None or b.value is None:
        return a if a.value is None else b
    return Metric(a.value + b.value, a.unit, a.count + b.count, source=a.source)


def forward_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """FLOPs of a forward pass of so many tokens, each attending to `context` tokens on average."""
    _, linear = parameter_counts(config)
    return tokens * (2.0 * linear + 4.0 * config.layers * config.heads * config.head_dim * context)


def weight_bytes(model: Decoder) -> float:
    """Bytes read to use every weight once (an untied embedding is only looked up)."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    lookup = 0 if model.config.tied_embeddings else model.embed.weight.numel() * model.embed.weight.element_size()
    return float(total - lookup)


def kv_bytes(model: Decoder) -> float:
    """Bytes of keys and values a token, in the model's own width."""
    c = model.config
    return 2.0 * c.layers * c.kv_heads * c.head_dim * model.norm.weight.element_size()
