"""The train stage: from token streams to weights, with or without measuring the steps."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyno import host_memory, quality
from dyno.artifacts import acting, stage_key
from dyno.errors import NonFinite, UserError
from dyno.kernels.attention import eager
from dyno.measure.communication import communication
from dyno.model.config import ModelConfig, config_of, parameter_counts
from dyno.model.decoder import Decoder, call_plainly, cast, initial_std, rope_frequencies
from dyno.record import Metric
from dyno.stages import activations, bench, checkpoint, shards
from dyno.stages.batches import Tally, stream_batches
from dyno.stages.ranks import counted_step
from dyno.technique import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dyno.pipeline import Pipeline
    from dyno.stages.batches import Batch

LOG_EVERY_S = 2.0
MAX_GRADIENT_NORM = 1.0
FIRST_LOSSES = 10  # whose losses are noted: what rows that should train alike are held to
DRAWN_ON_DEVICE = 5e7  # parameters; smaller models start from the same weights on every device


def plain_loss(forward: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats; tokens and targets (B, S)."""
    logits = forward(tokens)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))


def plain_optimizer(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return shards.adamw(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)


def prepared_run(pipeline: Pipeline, model: Decoder, stage: str = "train") -> Run:
    """A run whose parts are the plain training step, edited by the techniques that act here."""
    run = pipeline.run(stage)
    run.model = model
    run.parts.update(
        attention=eager,
        autocast=contextlib.nullcontext,
        scaler=None,
        weights_dtype=torch.float32,
        matmul_dtype="fp32",
        call_block=call_plainly,
        forward=model,
        loss=plain_loss,
        optimizer=plain_optimizer,
        batches=stream_batches,
        share=partial(equal_share, run),
        micro_batches=1,
        data_ranks=run.ranks,
        groups={},
        whole_name=lambda name: name,
        writes=0 if run.rank == 0 else None,
        sync=lambda is_last: contextlib.nullcontext(),
        local_batch=partial(rows_of_rank, run),
        gradients=partial(accumulate, run),
        clip=shards.clip,
        global_loss=partial(mean_over_ranks, run),
        state_dict=lambda: model.state_dict(),
    )
    for chosen in acting(pipeline.recipe, stage).values():
        for technique in chosen:
            technique.apply(run)
            cast(model, run.part("weights_dtype"))  # now: a layout or an optimizer takes hold of the weights later
            model.attend = run.part("attention")
            model.call_block = run.part("call_block")
    return run


def rows_of_rank(run: Run, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a rank takes of the global batch (B, S): every ranks-th row."""
    rows = slice(run.rank, None, run.ranks)
    return tokens[rows], targets[rows]


def equal_share(run: Run, loss: Tensor, targets: Tensor) -> Tensor:
    """What a micro-batch's mean loss adds to that of its rank's rows, where all of them have as many targets."""
    return loss / run.part("micro_batches")


def accumulate(run: Run, tokens: Tensor, targets: Tensor) -> Tensor:
    """Gradients of this rank's rows, added up over the micro-batches; returns their mean loss, detached."""
    micro, scaler = run.part("micro_batches"), run.part("scaler")
    total = torch.zeros((), device=run.device)
    for i, (x, y) in enumerate(zip(tokens.chunk(micro), targets.chunk(micro), strict=True)):
        with run.part("sync")(i == micro - 1):
            with run.part("autocast")():
                loss = run.part("share")(run.part("loss")(run.part("forward"), x, y), y)
            (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    return total


def mean_over_ranks(run: Run, loss: Tensor) -> Tensor:
    """The mean of a scalar over all ranks, which call this together."""
    if run.ranks > 1:
        loss = loss.clone()
        torch.distributed.all_reduce(loss)
    return loss / run.ranks


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; through pinned memory, so that the host need not wait until the device gets there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Trainer:
    """One optimizer step after another over a stream, as the run's parts say."""

    def __init__(self, run: Run, stream: np.ndarray, workload: dict[str, Any], seed: int, end_token: int | None = None):
        self.run, self.workload, self.stream, self.end_token = run, workload, stream, end_token
        assert run.model is not None
        batch, micro, ranks = workload["batch"], run.part("micro_batches"), run.part("data_ranks")
        if batch % (micro * ranks):
            raise UserError(f"workload.batch={batch} is no multiple of {micro} micro-batches x {ranks} ranks")
        self.optimizer = run.part("optimizer")(run.model, workload["lr"])
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.batches = self.batches_of(seed)
        self.tally = Tally()
        self.loss = torch.zeros((), device=run.device)
        self.first: list[Tensor] = []
        self.steps = self.skipped = 0

    def batches_of(self, seed: int) -> Iterator[Batch]:
        """Endless batches in the order that a seed gives, from the start."""
        workload = self.workload
        return self.run.part("batches")(self.stream, self.end_token, workload["batch"], workload["seq"], seed)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step, those of all ranks together, padding and positions without a loss included."""
        return self.workload["batch"] * self.workload["seq"]

    def step(self) -> None:
        """One optimizer step over the global batch; each rank takes its rows."""
        run, scaler = self.run, self.run.part("scaler")
        *whole, tally = next(self.batches)
        tokens, targets = (on_device(t, run.device) for t in run.part("local_batch")(*whole))
        self.loss = run.part("gradients")(tokens, targets)
        if self.steps < FIRST_LOSSES:
            self.first.append(self.loss)
        if scaler:
            scaler.unscale_(self.optimizer)
        run.part("clip")(self.parameters, MAX_GRADIENT_NORM)
        if scaler:
            before = scaler.get_scale()
            scaler.step(self.optimizer)
            scaler.update()
            self.skipped += scaler.get_scale() < before
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tally += tally

    def train(self, steps: int, progress: Any) -> None:
        """So many steps, telling the loss now and then and stopping when it is not finite; checkpoints if asked for."""
        told = time.monotonic()
        every = self.workload.get("checkpoint_every", 0)
        for i in range(steps):
            self.step()
            if every and self.steps % every == 0:
                checkpoint.save(self, self.run.directory / "checkpoints")
            if time.monotonic() - told > LOG_EVERY_S or i == steps - 1:
                told = time.monotonic()
                progress(f"train: step {i + 1}/{steps} loss {self.finite_loss():.3f}")

    def finite_loss(self) -> float:
        loss = float(self.loss)
        if not math.isfinite(loss):
            raise NonFinite(
                f"the training loss is {loss} after {self.steps} steps; lower workload.lr or widen precision"
            )
        return loss

    def mean_loss(self) -> float:
        """The last step's loss over the rows of all ranks, which call this together."""
        self.finite_loss()
        return float(self.run.part("global_loss")(self.loss))

    def first_losses(self) -> list[float]:
        """The losses of the first steps over the rows of all ranks, which call this together."""
        return self.run.part("global_loss")(torch.stack(self.first)).tolist()


def key(pipeline: Pipeline, data_key: str) -> str:
    config = pipeline.recipe.config
    workload = {k: config["workload"][k] for k in ("batch", "seq", "steps", "lr")}
    subject = {"model": config["model"], "workload": workload, "seed": config["seed"]}
    parts = ("model.config", "model.decoder", "kernels", "stages.batches", "stages.shards")
    modules = [*(f"dyno.{part}" for part in parts), __name__]
    if config["model"]["source"] != "config":
        from dyno.model import loaders

        subject["weights"] = loaders.weights_fingerprint(loaders.locate(config["model"]))
        modules += ["dyno.model"]
    return stage_key(pipeline.recipe, "train", data_key, subject, modules)


def save(directory: Path, model: Decoder, state: dict[str, Tensor]) -> None:
    """model.safetensors in fp32 and config.json, tied weights once."""
    tied = {"lm_head.weight"} if model.config.tied_embeddings else set()
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in state.items() if k not in tied}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(asdict(model.config)))


def load(pipeline: Pipeline, path: Path) -> Decoder:
    """A checkpoint as a plain decoder on the pipeline's device."""
    config = ModelConfig(**json.loads((path / "config.json").read_text()))
    with torch.device("meta"):
        model = Decoder(config)
    state = load_file(path / "model.safetensors", device=str(pipeline.device))
    if config.tied_embeddings:
        state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)  # not copied: there is no second model while it loads
    return complete(model, pipeline.device)


def complete(model: Decoder, home: torch.device) -> Decoder:
    """A decoder made on no device whose weights are all there: ties the head and makes what no checkpoint holds."""
    if model.config.tied_embeddings:
        model.lm_head.weight = model.embed.weight
    model.inverse_frequency = rope_frequencies(model.config).to(home)
    return model


def fresh_model(pipeline: Pipeline, manifest: dict[str, Any]) -> Decoder:
    """The model to train: from a checkpoint when model.source names one, else initialised from the seed."""
    node, seed = pipeline.recipe.config["model"], pipeline.recipe.config["seed"]
    on_host = any(t.weights_on_host for chosen in pipeline.recipe.techniques.values() for t in chosen)
    home = torch.device("cpu") if on_host else pipeline.device
    if node["source"] != "config":
        from dyno.model.loaders import load as load_pretrained

        config, state, _, _ = load_pretrained(node)
        model = Decoder(config)
        model.load_state_dict(state)
        return model.to(home)
    config = config_of(node, manifest["vocab_size"])
    if parameter_counts(config)[0] > DRAWN_ON_DEVICE and pipeline.device.type == "cuda":
        return drawn_on_device(config, seed, pipeline.device, home)
    return Decoder(config).initialise(seed).to(home)


def drawn_on_device(config: ModelConfig, seed: int, device: torch.device, home: torch.device) -> Decoder:
    """Billions of weights in seconds instead of minutes: drawn by the device, a module at a time where home is another."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(config)
    head = () if config.tied_embeddings else (model.lm_head,)
    for module in (model.embed, *model.blocks, model.norm, *head):
        module.to_empty(device=device)
        for name, weight in module.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=initial_std(name, config), generator=generator)
            else:  # of a norm, or a bias
                torch.nn.init.constant_(weight, float(name.endswith("weight")))
        if home != device:
            for weight in module.parameters():
                weight.data = host_memory.copied(weight.data)
    return complete(model, home)


def prepare(pipeline: Pipeline) -> tuple[Callable[[], Decoder], str]:
    """(what makes the model, the weights' key) for a recipe that does not measure training.

    From the cache, or trained now. Weights that no step has changed are no artifact: they are drawn each time anew,
    which takes less time than reading them and, for billions of them, no tens of gigabytes of disk.
    """
    data_path, manifest, data_key = pipeline.data()
    train_key = key(pipeline, data_key)
    workload = pipeline.recipe.config["workload"]
    if pipeline.recipe.config["model"]["source"] == "config" and workload["steps"] == 0:
        pipeline.used("train", train_key, False)
        return lambda: fresh_model(pipeline, manifest).to(pipeline.device).eval(), train_key
    found = pipeline.store.get("train", train_key)
    pipeline.used("train", train_key, found is not None)
    if found is None:
        model = fresh_model(pipeline, manifest)
        run = prepared_run(pipeline, model)
        stream = np.load(data_path / "train.npy", mmap_mode="r")
        trainer = Trainer(run, stream, workload, pipeline.recipe.config["seed"], manifest["end_token"])
        trainer.train(
            workload["steps"] if pipeline.recipe.config["model"]["source"] == "config" else 0, pipeline.progress
        )

        def write(directory: Path) -> dict[str, Any]:
            save(directory, model, run.part("state_dict")())
            return {"steps": trainer.steps, "loss": float(trainer.loss)}

        found = pipeline.store.put("train", train_key, write)
    path = found
    return lambda: load(pipeline, path).eval(), train_key


def step_flops(config: ModelConfig, tokens: int, seq: float) -> float:
    """Model FLOPs of training on so many positions: 6 a matrix weight, plus causal attention (6 L H D s) over s each."""
    _, linear = parameter_counts(config)
    return tokens * (6.0 * linear + 6.0 * config.layers * config.heads * config.head_dim * seq)


def step_costs(run: Run, trainer: Trainer, seed: int) -> dict[str, Metric]:
    """activation_bytes and recomputed_flops, on a batch of their own: the batches of training stay as they are."""
    assert run.model is not None
    tokens, seq = trainer.tokens_per_step, trainer.workload["seq"]
    batch = next(trainer.batches_of(seed + 1))
    forward = 2.0 * parameter_counts(run.model.config)[1] * tokens
    flops = step_flops(run.model.config, tokens, seq)
    return activations.metrics(run, trainer.optimizer, batch.tokens, batch.targets, flops, forward)


def measure(pipeline: Pipeline) -> tuple[dict[str, Metric], str]:
    """Train for workload.steps, evaluate, then measure further steps; returns metrics and the weights' key."""
    data_path, manifest, data_key = pipeline.data()
    config, meter = pipeline.recipe.config, pipeline.meter
    workload = config["workload"]
    assert meter is not None
    bench.mark("data")
    model = fresh_model(pipeline, manifest)
    run = prepared_run(pipeline, model)
    stream = np.load(data_path / "train.npy", mmap_mode="r")
    trainer = Trainer(run, stream, workload, config["seed"], manifest["end_token"])
    if workload.get("resume"):
        checkpoint.load(trainer, Path(workload["resume"]))
    bench.mark("model")
    warm = bench.warm_up(meter, trainer.step)
    metrics = warm.metrics
    bench.mark("warmup")
    metrics |= step_costs(run, trainer, config["seed"])
    bench.mark("costs")
    trainer.train(max(0, workload["steps"] - trainer.steps), pipeline.progress)
    metrics["train_loss"] = Metric(trainer.mean_loss(), "nats", source=f"step {trainer.steps}")
    if trainer.steps == workload["steps"] or workload["steps"] == 0:
        held_out = np.load(data_path / "validation.npy", mmap_mode="r")
        with run.part("autocast")():
            metrics |= quality.loss_metrics(run.part("forward"), held_out, workload, pipeline.device, run.note)
    else:
        reason = f"{trainer.steps} steps were taken with warm-up, more than workload.steps={workload['steps']}"
        metrics["validation_loss"] = Metric(None, "nats", 0, reason=reason)
        metrics["perplexity"] = Metric(None, "1", 0, reason=reason)
    bench.mark("train")
    if pipeline.ranks > 1:
        metrics |= counted_step(trainer)
        bench.mark("messages")
    pipeline.progress("train: measuring")
    before = trainer.tally
    with meter.window("train") as window:
        for _ in window.steps(warm.steps_to_fill if pipeline.ranks > 1 else None):
            trainer.step()
    bench.mark("window")
    steps = len(window.step_times_s)
    window.dtype = run.part("matmul_dtype")
    window.tokens = steps * trainer.tokens_per_step
    seen = trainer.tally - before
    window.flops = step_flops(model.config, seen.positions, seen.span / seen.positions) / pipeline.ranks
    trainer.finite_loss()
    run.note("first_losses", trainer.first_losses())
    metrics |= window.metrics()
    metrics |= seen.metrics(metrics["tokens_per_s"])
    if pipeline.ranks > 1:  # last: a profiler may leave something behind
        metrics |= communication(trainer.step, pipeline.device, run.note)
        bench.mark("profile")
    total, _ = parameter_counts(model.config)
    metrics["parameters"] = Metric(total, "parameters", source="count")
    if run.part("scaler"):
        metrics["skipped_steps"] = Metric(trainer.skipped, "steps", count=trainer.steps, source="grad scaler")
    return metrics, key(pipeline, data_key)
