"""The axes of a recipe, in the one order in which their techniques are applied.

An axis belongs to the stage where it acts. `shared` axes act in training and in inference: they act in the stage that
the workload measures, and stages that only prepare an artifact run without them, so that a sweep over an execution
option (attention kernel, precision, layout, compile) compares the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One place where a choice is made. `many` axes take an ordered list of options."""

    name: str
    stage: str
    baseline: str
    help: str
    shared: bool = False
    many: bool = False


STAGES = ("data", "train", "compress", "infer")

AXES: tuple[Axis, ...] = (
    Axis("data_filters", "data", "none", "which documents are kept, in list order", many=True),
    Axis("mixture", "data", "natural", "the share of tokens that each source gets"),
    Axis("curriculum", "data", "none", "the order in which documents are seen"),
    Axis("optimizer", "train", "adamw", "the update rule and its state"),
    Axis("loss", "train", "full", "how the loss is computed from the last hidden states"),
    Axis("precision", "train", "fp32", "number formats of weights and arithmetic", shared=True),
    Axis("attention", "train", "math", "how softmax(QK')V is computed", shared=True),
    Axis("parallelism", "train", "none", "how a step or a pass is split over ranks", shared=True),
    Axis("packing", "train", "stream", "how documents become the rows of a step"),
    Axis("checkpointing", "train", "none", "which activations are kept and which recomputed"),
    Axis("accumulation", "train", "none", "micro-batches a step"),
    Axis("offload", "train", "none", "what leaves the device's memory"),
    Axis("compile", "train", "off", "graph compilation", shared=True),
    Axis("distillation", "compress", "none", "a student learns from a teacher"),
    Axis("kv_heads", "compress", "none", "fewer key and value heads"),
    Axis("pruning", "compress", "none", "weights or channels removed"),
    Axis("quantization", "compress", "none", "fewer bits a weight"),
    Axis("kv_cache", "infer", "contiguous", "how keys and values of past tokens are kept"),
    Axis("decoding", "infer", "greedy", "how the next tokens are chosen"),
    Axis("batching", "infer", "static", "how requests share a pass"),
    Axis("placement", "infer", "none", "which device or node holds which layer"),
    Axis("power", "infer", "none", "clocks, power limits and schedules"),
)

BY_NAME = {axis.name: axis for axis in AXES}

# Config groups that are no axis: they describe the subject and the bench, not a choice of technique.
SUBJECTS = ("model", "workload", "corpus", "tokenizer", "hardware", "measure")


def acts_in(axis: Axis, stage: str, measured: str) -> bool:
    """Whether an axis acts in `stage` of a run whose workload measures the stage `measured`."""
    if not axis.shared:
        return axis.stage == stage
    return stage == measured and stage in ("train", "infer")
