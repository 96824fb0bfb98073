"""Before a run: what a recipe needs, and why it cannot run. Arithmetic only, no torch, no device touched.

Every technique tells its own share (`Footprint`) and its own reasons (`unsupported`); this module adds them up and
knows none by name. Everything here is predicted, and labelled so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dyno.model.config import BYTE_VOCABULARY, ModelConfig, config_of, parameter_counts
from dyno.recipe import Recipe, compose
from dyno.technique import Footprint, Shape

if TYPE_CHECKING:
    from dyno.measure.environment import Device

CONTEXT_BYTES = 0.6e9  # a CUDA context with its libraries' workspaces, as NVML shows it for an idle worker
WEIGHT = 4.0  # bytes of a master weight, a gradient; Adam keeps two such numbers
SLACK = 1.08  # allocator rounding and fragmentation, as a share of the peak


@dataclass
class Plan:
    """A recipe's predicted needs. `reasons` say why it cannot run here; `terms` are bytes by phase."""

    shape: Shape | None
    device: Device
    terms: dict[str, dict[str, float]] = field(default_factory=dict)
    flops_per_step: float = 0.0
    bytes_per_step: float = 0.0
    wire_bytes_per_step: float = 0.0
    bubble: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """The phase whose sum is the largest: the one that binds."""
        return max(self.terms, key=lambda p: sum(self.terms[p].values()), default="")

    @property
    def peak_memory_bytes(self) -> float:
        return sum(self.terms[self.phase].values()) * SLACK if self.terms else 0.0

    def verdict(self) -> tuple[str, str] | None:
        """(status, reason) when the recipe cannot run on the device, else None."""
        if self.reasons:
            return "unsupported", "; ".join(self.reasons)
        need = self.peak_memory_bytes + (CONTEXT_BYTES if self.device.kind == "cuda" else 0.0)
        if need > self.device.memory_bytes:
            return "out_of_memory", (
                f"predicted: needs {need / 2**30:.1f} GiB at the {self.phase}, "
                f"{self.device.name} has {self.device.memory_bytes / 2**30:.1f} GiB"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        verdict = self.verdict()
        return {
            "label": "predicted",
            "feasible": verdict is None,
            "reason": verdict[1] if verdict else None,
            "peak_memory_bytes": self.peak_memory_bytes or None,
            "binding_phase": self.phase or None,
            "terms_bytes": self.terms,
            "flops_per_step": self.flops_per_step,
            "bytes_per_step": self.bytes_per_step,
            "wire_bytes_per_step": self.wire_bytes_per_step,
            "bubble": self.bubble,
            "device": self.device.name,
        }


def shape_of(recipe: Recipe) -> Shape | None:
    """The model's and workload's sizes; None where no model runs."""
    node, workload = recipe.config["model"], recipe.config["workload"]
    if workload["measures"] in ("data", "kernel"):
        return None
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
    )


def predict(recipe: Recipe, device: Device) -> Plan:
    """Needs and reasons of a recipe on a device, its teacher's and draft's reasons included."""
    shape = shape_of(recipe)
    plan = Plan(shape, device, reasons=reasons(recipe, device))
    if shape is None:
        return plan
    prints = [t.footprint(shape, device) for chosen in recipe.techniques.values() for t in chosen]
    if recipe.config["workload"]["measures"] == "train":
        training(plan, shape, prints)
    else:
        serving(plan, shape, prints)
    return plan


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


def product(prints: list[Footprint], name: str) -> float:
    value = 1.0
    for footprint in prints:
        value *= getattr(footprint, name)
    return value


def chosen(prints: list[Footprint], name: str, default: float) -> float:
    """The last technique's word on a width; later axes come later."""
    values = [getattr(f, name) for f in prints if getattr(f, name) is not None]
    return values[-1] if values else default


def training(plan: Plan, shape: Shape, prints: list[Footprint]) -> None:
    """Peak = the largest of the phases: end of forward, loss, optimizer step; never their sum."""
    split = product(prints, "layer_factor") * product(prints, "width_factor")
    held = shape.parameters * split  # parameters that this rank is responsible for, sharded or not
    tokens = shape.batch * shape.seq * product(prints, "batch_factor")
    width = chosen(prints, "activation_width", 4.0)
    stored = chosen(prints, "parameter_bytes", WEIGHT)
    master = sum(f.master_bytes for f in prints)
    weights = stored * held * product(prints, "parameter_factor")
    gradients = chosen(prints, "gradient_bytes", stored) * held * product(prints, "gradient_factor")
    kept = held * product(prints, "optimizer_factor")
    optimizer = (chosen(prints, "optimizer_bytes", 2 * WEIGHT) + master) * kept
    # What eager Llama-shaped blocks keep, in 16 bits: (28 h + 8 f) bytes a token, so 14 h + 4 f numbers.
    block = (14 * shape.hidden + 4 * shape.ffn) * width * tokens * product(prints, "width_factor")
    if any(f.attention_matrix for f in prints):
        block += 2 * WEIGHT * shape.heads * shape.seq * tokens * product(prints, "width_factor")
    layers = shape.layers * product(prints, "layer_factor")
    activations = layers * block * product(prints, "activation_factor")
    inside = block * max(1.0, sum(f.recompute_blocks for f in prints))
    cast = shape.linear_parameters * split * width if width < stored else 0.0  # autocast's 16-bit copy of the weights
    logits = tokens * shape.vocab * (width + 2 * WEIGHT) * product(prints, "logits_factor")
    extra = sum(f.extra_bytes for f in prints)
    base = {"weights": weights, "optimizer": optimizer, "extra": extra}
    plan.terms = {
        "loss": {**base, "activations": activations, "cast weights": cast, "logits": logits},
        "end of backward": {**base, "gradients": gradients, "cast weights": cast, "one block": inside},
        "optimizer step": {**base, "gradients": gradients, "temporaries": 0.5 * WEIGHT * kept},
    }
    attention = 6.0 * shape.layers * shape.heads * shape.head_dim * shape.seq
    all_tokens = shape.batch * shape.seq
    plan.flops_per_step = all_tokens * (6.0 * shape.linear_parameters + attention) * product(prints, "flops_factor")
    plan.bytes_per_step = 7 * WEIGHT * shape.parameters + 3 * activations
    sent = sum(f.wire_bytes + f.wire_weights * stored + f.wire_activations * width for f in prints)
    plan.wire_bytes_per_step, plan.bubble = sent, sum(f.bubble for f in prints)


def serving(plan: Plan, shape: Shape, prints: list[Footprint]) -> None:
    """Weights, the unmodified model beside them while quality is compared, KV cache, logits."""
    stored = chosen(prints, "weight_bytes", WEIGHT)
    blocks = shape.linear_parameters - shape.vocab * shape.hidden
    dense = shape.parameters - blocks
    weights = blocks * stored * product(prints, "linear_factor") + dense * max(stored, 2.0)
    width = max(2.0, min(WEIGHT, stored))
    cache = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * width * shape.batch * shape.seq
    cache *= product(prints, "kv_cache_factor")
    plan.terms = {
        "quality": {
            "weights": weights,
            "unmodified model": WEIGHT * shape.parameters,
            "logits": 16 * 512 * shape.vocab * 12.0,
        },
        "decode": {"weights": weights, "kv cache": cache, "logits": shape.batch * shape.vocab * 8.0},
    }
    plan.flops_per_step = 2.0 * shape.linear_parameters * shape.batch
    plan.bytes_per_step = weights + cache
