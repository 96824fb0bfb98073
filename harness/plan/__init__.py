"""Before a run: what a recipe needs, and why it cannot run. Arithmetic only, no torch, no device touched.

Every technique tells its own share (`Footprint`) and its own reasons (`unsupported`); this module adds them up and
knows none by name. Everything here is predicted, and labelled so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.measure.environment import machine_id, memory_bytes
from dyno.model.config import BYTE_VOCABULARY, ModelConfig, config_of, parameter_counts
from dyno.plan import memory, time
from dyno.plan.advice import memory_advice, time_advice
from dyno.plan.corrections import corrected_memory, corrected_time, fit_of, load
from dyno.plan.machine import Machine, machine_of
from dyno.plan.serving import ServingTime, decode_traffic_bytes, serving_time, wire_bytes
from dyno.recipe import Recipe, compose
from dyno.technique import Shape, combined, of_ranks
from dyno.units import apart

if TYPE_CHECKING:
    from dyno.measure.environment import Device

CONTEXT_BYTES = 1.3e9  # what NVML shows beside the allocator's: a CUDA context, its libraries, the driver
SLACK = 0.03  # of the peak that an allocator has reserved and cannot give out
UNCALIBRATED = {"memory": {False: 0.1, True: 0.3}, "time": {False: 0.5, True: 0.4}}  # relative; eager, compiled


@dataclass
class Plan:
    """A recipe's predicted needs on one rank. `reasons` say why it cannot run here.

    `terms` are bytes by phase; `time_terms` seconds of a step, each as if alone, empty where no ceiling is known. Bands
    are relative errors that 19 of 20 predictions stay within, from calibration or, `uncalibrated`, a wide guess.
    `largest_block_bytes` is that of the largest tensor that comes and goes; `host_bytes` what is offloaded. A step is a
    decode pass where the model serves; FLOPs are those of all ranks, bytes those of the rank that has most.
    """

    shape: Shape | None
    device: Device
    terms: dict[str, dict[str, float]] = field(default_factory=dict)
    time_terms: dict[str, float] = field(default_factory=dict)
    flops_per_step: float = 0.0
    tokens_per_step: float = 0.0
    memory_traffic_bytes_per_step: float = 0.0
    wire_bytes_per_step: float = 0.0
    bubble: float = 0.0
    ranks: int = 1
    machine: Machine | None = None
    largest_block_bytes: float = 0.0
    host_bytes: float = 0.0
    memory_band: float = 0.0
    time_band: float = 0.0
    calibrated: bool = False
    reasons: list[str] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    serving: ServingTime | None = None

    @property
    def phase(self) -> str:
        """The phase whose sum is the largest: the one that binds."""
        return max(self.terms, key=lambda p: memory.total(self.terms[p]), default="")

    @property
    def peak_memory_bytes(self) -> float:
        """The allocator's peak: what a record calls peak_memory_bytes."""
        return memory.total(self.terms[self.phase]) if self.terms else 0.0

    @property
    def needed_bytes(self) -> float:
        """What the device must have: the peak, the context, and what the allocator has and cannot give out.

        Of that may be the largest block: once a small tensor has a part of it, it is of no use for its like.
        """
        beside = self.largest_block_bytes + CONTEXT_BYTES if self.device.kind == "cuda" else 0.0
        return self.peak_memory_bytes * (1 + SLACK) + beside

    @property
    def host_room(self) -> float:
        """Host memory for what is offloaded: what a CPU's own needs leave, or all of the host of a GPU that is here."""
        if self.device.kind == "cpu":
            return self.device.memory_bytes - self.needed_bytes
        return float(memory_bytes()) if self.device.uuid else math.inf

    @property
    def step_s(self) -> float | None:
        return time.step_s(self.time_terms, self.bubble) if self.time_terms else None

    @property
    def exposed_communication_s(self) -> float | None:
        """How much longer a step is for what its ranks send: what nothing hides."""
        if not self.time_terms:
            return None
        return time.step_s(self.time_terms) - time.step_s(self.time_terms | {"wire": 0.0, "waited": 0.0})

    @property
    def bubble_s(self) -> float | None:
        """How much longer a step is for a pipeline's idle share: nothing where the host is later still."""
        return time.step_s(self.time_terms, self.bubble) - time.step_s(self.time_terms) if self.time_terms else None

    @property
    def tokens_per_s(self) -> float | None:
        """Trained tokens, or decoded ones."""
        if self.serving:
            return self.serving.tokens_per_s
        return self.tokens_per_step / self.step_s if self.step_s else None

    @property
    def advice(self) -> list[str]:
        """What binds memory and time, and what would change it."""
        out = [f"memory: {memory_advice(self.phase, self.terms[self.phase])}"] if self.terms else []
        if self.step_s and self.bubble_s is not None:
            out.append(f"time: {time_advice(self.time_terms, time.DEVICE, self.bubble_s, self.step_s)}")
        return out

    def verdict(self) -> tuple[str, str] | None:
        """(status, reason) when the recipe cannot run on the device, else None."""
        if self.reasons:
            return "unsupported", "; ".join(self.reasons)
        if self.terms and self.needed_bytes > self.device.memory_bytes:
            need, has = apart(self.needed_bytes / 2**30, self.device.memory_bytes / 2**30)
            return "out_of_memory", f"predicted: needs {need} GiB at the {self.phase}, {self.device.name} has {has} GiB"
        if self.host_bytes and self.host_bytes > self.host_room:
            need, has = apart(self.host_bytes / 2**30, self.host_room / 2**30)
            return "out_of_memory", (
                f"predicted: what is offloaded takes {need} GiB of host memory, there are {has} GiB"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        verdict, seconds = self.verdict(), self.step_s
        return {
            "label": "predicted",
            "feasible": verdict is None,
            "reason": verdict[1] if verdict else None,
            "peak_memory_bytes": self.peak_memory_bytes or None,
            "needed_bytes": self.needed_bytes if self.terms else None,
            "host_bytes": self.host_bytes or None,
            "binding_phase": self.phase or None,
            "terms_bytes": self.terms,
            "step_time_s": seconds,
            "time_terms_s": self.time_terms,
            "tokens_per_s": self.tokens_per_s,
            "serving": self.serving.to_json() if self.serving else None,
            "ranks": self.ranks,
            "flops_per_step": self.flops_per_step,
            "memory_traffic_bytes_per_step": self.memory_traffic_bytes_per_step or None,
            "wire_bytes_per_step": self.wire_bytes_per_step,
            "exposed_communication_s": self.exposed_communication_s,
            "bubble": self.bubble,
            "bubble_s": self.bubble_s,
            "relative_error": {"memory": self.memory_band, "time": self.time_band, "calibrated": self.calibrated},
            "advice": self.advice,
            "decisions": self.decisions,
            "ceilings": self.machine.source if self.machine else None,
            "device": self.device.name,
        }


def shape_of(recipe: Recipe) -> Shape | None:
    """The model's and workload's sizes; None where no model runs."""
    node, workload = recipe.config["model"], recipe.config["workload"]
    if workload["measures"] in ("data", "kernel"):
        return None
    if workload["measures"] == "infer" and "new_tokens" not in workload:
        raise UserError("workload.measures=infer needs requests and prompts: use workload=generate or workload=eval")
    if node["source"] != "config":
        from dyno.model.loaders import describe  # headers only, no weights

        node = {**node, **describe(node)}
    config = config_of(node, recipe.config["tokenizer"].get("vocab_size") or BYTE_VOCABULARY)
    splits = max(t.splits for chosen in recipe.techniques.values() for t in chosen)
    return replace(shape_from(config, workload), micro_batches=max(1, splits))


def shape_from(config: ModelConfig, workload: dict[str, Any]) -> Shape:
    """The sizes of a model and a workload."""
    total, linear = parameter_counts(config)
    serving = workload["measures"] == "infer"
    return Shape(
        parameters=total,
        linear_parameters=linear,
        layers=config.layers,
        hidden=config.hidden,
        ffn=config.ffn_width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        batch=workload["requests"] if serving else workload["batch"],
        seq=workload["prompt"] + workload["new_tokens"] if serving else workload["seq"],
        tied=config.tied_embeddings,
        qk_norm=config.qk_norm,
    )


def predict(recipe: Recipe, device: Device) -> Plan:
    """Needs and reasons of a recipe on a device, its teacher's and draft's reasons included.

    Under measure.memory_limit_gib a GPU has no more than that.
    """
    if (limit := recipe.config["measure"]["memory_limit_gib"]) is not None and device.kind == "cuda":
        device = replace(device, memory_bytes=min(device.memory_bytes, int(limit * 2**30)))
    shape = shape_of(recipe)
    plan = Plan(shape, device, reasons=reasons(recipe, device))
    if shape is None:
        return plan
    shape = plan.shape = with_kept_bytes(recipe, shape, device)
    techniques = [t for chosen in recipe.techniques.values() for t in chosen]
    prints = of_ranks(techniques, shape, device)
    share = max(prints, key=time.wire_bytes)
    if not plan.reasons:
        plan.decisions = [line for t in techniques if (line := t.decides(shape, device))]
    plan.machine, plan.ranks = machine_of(device, recipe.config["hardware"]), share.ranks
    if recipe.config["workload"]["measures"] != "train":
        plan.terms, plan.memory_band = memory.serving(shape, share, device.kind), UNCALIBRATED["memory"][True]
        plan.flops_per_step = 2.0 * shape.linear_parameters * shape.batch
        workload = recipe.config["workload"]
        fed = 1.0 if share.kv_cache_factor > 0 else workload["prompt"] + workload["new_tokens"] / 2
        plan.wire_bytes_per_step = wire_bytes(shape, share, fed)
        if workload["measures"] == "infer" and (new := workload["new_tokens"]) > 0:
            prompt, positions = workload["prompt"], max(getattr(t, "positions_per_pass", 1) for t in techniques)
            plan.memory_traffic_bytes_per_step = decode_traffic_bytes(shape, share, prompt, new)
            if plan.machine:
                plan.serving = serving_time(shape, share, plan.machine, device.kind, prompt, new, positions)
        return plan
    plan.wire_bytes_per_step = time.wire_bytes(share)
    plan.memory_traffic_bytes_per_step = max(sum(time.traffic(shape, print_).values()) for print_ in prints)
    plan.bubble, plan.tokens_per_step = share.bubble, shape.batch * shape.seq
    looked_at = share.document_share if share.skips_documents else 1.0
    attention = 6.0 * shape.layers * shape.heads * shape.head_dim * shape.seq * looked_at
    plan.flops_per_step = plan.tokens_per_step * (6.0 * shape.linear_parameters + attention) * share.flops_factor
    found = load(device.name, machine_id()), load(device.name)
    fits = {what: fit_of(found, what, "compiled" if share.fused else "eager") for what in ("memory", "time")}
    plan.terms = corrected_memory(memory.fullest(shape, prints, device.kind), fits["memory"])
    plan.host_bytes = max(memory.offloaded_bytes(shape, p, device.kind) for p in prints)
    plan.largest_block_bytes = max(memory.logits_bytes(shape, print_) for print_ in prints)
    if plan.machine:
        terms = time.slowest(shape, prints, plan.machine, device.kind)
        plan.time_terms = corrected_time(terms, fits["time"])
    plan.calibrated = any(fits.values())
    plan.memory_band, plan.time_band = (
        fit.p95_error if (fit := fits[what]) and fit.p95_error is not None else UNCALIBRATED[what][share.fused]
        for what in ("memory", "time")
    )
    return plan


def with_kept_bytes(recipe: Recipe, shape: Shape, device: Device) -> Shape:
    """The shape with what the blocks keep on a rank, where a technique asks for it and under all others' footprints."""
    techniques = [t for chosen in recipe.techniques.values() for t in chosen]
    if not any(t.needs_kept_bytes for t in techniques):
        return shape
    share = combined(t.footprint(shape, device) for t in techniques if not t.needs_kept_bytes)
    block = memory.block_of(shape, share)
    tokens = shape.batch * shape.seq * share.batch_factor * share.width_factor
    layers = shape.layers * share.layer_factor * share.activation_factor * share.in_flight
    return replace(shape, kept_bytes=layers * (block.kept + block.scores) * tokens)


def reasons(recipe: Recipe, device: Device) -> list[str]:
    """Every technique's reason why it cannot run here, in axis order."""
    found = []
    for axis, chosen in recipe.techniques.items():
        for technique in chosen:
            why = technique.unsupported(recipe, device)
            if why:
                found.append(f"{axis}={recipe.option(axis)}: {why}")
            if technique.subrecipe:
                inner = compose([*technique.subrecipe, "workload.measures=infer"], recipe.plugins)
                found += [f"{axis}: its own recipe: {r}" for r in reasons(inner, device)]
    return found
