"""Why a layout cannot be: the first reason that holds, in the user's words. No torch: plans need it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dyno.plan import shape_of
from dyno.technique import Shape
from dyno.techniques.parallelism import _stages

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe
    from dyno.techniques.parallelism.mesh import Mesh

CONTEXTS = ("ring", "ulysses")
RING_BACKENDS = ("auto", "flash", "cudnn")


def ring_backend(recipe: Recipe) -> str | None:
    """Which of PyTorch's kernels attends to the parts of a ring, by the recipe's attention; None: none that merges."""
    (technique,) = recipe.techniques["attention"]
    backend = getattr(technique, "backend", None)
    return backend if backend in RING_BACKENDS else None


def reason(layout: Mesh, recipe: Recipe, device: Device) -> str | None:
    measures = recipe.config["workload"]["measures"]
    if measures not in ("train", "infer"):
        return "a parallel layout is for workloads that measure training or inference"
    wrong = next(knobs(layout), None)
    if wrong:
        return wrong
    shape = shape_of(recipe)
    assert shape is not None
    here = machine(layout, device), widths(layout, shape)
    for rules in (
        (serving(layout), *here, served_neighbours(layout, recipe)) if measures == "infer"
        else (*here, data(layout, shape), tokens(layout, shape), pipeline(layout, shape, recipe),
              context(layout, shape, recipe), neighbours(layout, shape, recipe, device))
    ):  # fmt: skip
        wrong = next(rules, None)
        if wrong:
            return wrong
    return None


def knobs(layout: Mesh) -> Iterator[str]:
    """Values that no model and no machine can make right."""
    if layout.dp == 0:
        degrees = f"{layout.tp} x {layout.pp} x {layout.cp}"
        yield f"parallelism.dp=0: it takes 1 or more; the {degrees} ranks of tp, pp and cp may not divide the GPUs here"
    for name in ("dp", "tp", "pp", "cp", "ep", "replicate", "micro_batches", "virtual_stages"):
        if getattr(layout, name) < 1:
            yield f"parallelism.{name}={getattr(layout, name)}: it takes 1 or more"
    if layout.ep > 1:
        yield f"parallelism.ep={layout.ep}: this decoder has no experts to put on different ranks"
    if layout.zero not in (0, 1, 2, 3):
        yield f"parallelism.zero={layout.zero}: it takes 0 (nothing sharded), 1, 2 or 3"
    if layout.schedule not in _stages.SCHEDULES:
        yield f"parallelism.schedule={layout.schedule}: it takes {', '.join(_stages.SCHEDULES)}"
    if layout.context not in CONTEXTS:
        yield f"parallelism.context={layout.context}: it takes {', '.join(CONTEXTS)}"
    if layout.zero > 1 and layout.dp * layout.cp == 1:
        yield f"parallelism.zero={layout.zero}: there is one data rank, which shares nothing; use zero=0 or 1, or a larger dp"
    if layout.replicate > 1 and layout.zero == 0:
        yield f"parallelism.replicate={layout.replicate} copies of what is sharded: set parallelism.zero to 1, 2 or 3"
    if layout.dp % layout.replicate:
        yield f"parallelism.dp={layout.dp} ranks cannot make parallelism.replicate={layout.replicate} equal groups"
    split = layout.reshard_to
    if split and (layout.zero != 3 or split < 2 or split >= layout.shards or layout.shards % split):
        yield (
            f"parallelism.reshard_to={split}: it takes a divisor of the {layout.shards} sharding ranks between 1 and "
            "that, with parallelism.zero=3; 0 is all of them"
        )
    if split and layout.tp > 1:
        yield (
            f"parallelism.reshard_to={split}: FSDP2 cannot leave weights that parallelism.tp={layout.tp} ranks split on fewer "
            "shards between the passes; take parallelism.reshard_to=0, or parallelism.tp=1"
        )


def machine(layout: Mesh, device: Device) -> Iterator[str]:
    inside = device.node or device.count
    if device.kind == "cuda" and layout.tp > inside:
        yield (
            f"parallelism.tp={layout.tp} must lie inside one machine, whose links carry four reductions a layer; "
            f"this one has {inside} GPUs"
        )
    if device.kind == "cuda" and layout.world_size > device.count:
        yield f"{layout.world_size} ranks need as many GPUs, this machine has {device.count}"


def data(layout: Mesh, shape: Shape) -> Iterator[str]:
    micro = layout.splits
    if shape.batch % (layout.dp * micro):
        over = f" x {micro} micro-batches" if micro > 1 else ""
        yield f"workload.batch={shape.batch} cannot be split over parallelism.dp={layout.dp}{over}"


def serving(layout: Mesh) -> Iterator[str]:
    """Degrees that inference does not take."""
    for name in ("dp", "pp", "cp"):
        if getattr(layout, name) > 1:
            yield (
                f"parallelism.{name}={getattr(layout, name)}: inference is split over tensor ranks only; use "
                "parallelism=tensor, or a workload that measures training"
            )
    if layout.zero:
        yield f"parallelism.zero={layout.zero} shards what training keeps; inference takes parallelism=tensor (zero=0)"


def served_neighbours(layout: Mesh, recipe: Recipe) -> Iterator[str]:
    """What other axes make of a model that tensor ranks cannot serve."""
    if layout.tp == 1:
        return
    if recipe.config["quantization"].get("bits"):
        yield f"packed weights and their scales cannot be cut over parallelism.tp={layout.tp}; use quantization=none"
    if recipe.config["decoding"].get("draft"):
        yield (
            "a draft model runs whole on every rank, and ranks whose drafts differed in a bit would wait for each other "
            "for ever; use decoding=greedy or sampling"
        )


def widths(layout: Mesh, shape: Shape) -> Iterator[str]:
    for name, size in (("heads", shape.heads), ("kv_heads", shape.kv_heads), ("ffn_width", shape.ffn),
                       ("vocab_size", shape.vocab)):  # fmt: skip
        if size % layout.tp:
            hint = f"; {-(-size // layout.tp) * layout.tp} can" if name == "vocab_size" else ""
            yield f"model.{name}={size} cannot be split over parallelism.tp={layout.tp}{hint}"


def tokens(layout: Mesh, shape: Shape) -> Iterator[str]:
    part = shape.seq // layout.cp
    if part % layout.token_shards:
        yield (
            f"workload.seq={shape.seq} cannot be split over parallelism.tp={layout.tp} between the blocks; "
            "choose another or parallelism.sequence_parallel=false"
        )


def pipeline(layout: Mesh, shape: Shape, recipe: Recipe) -> Iterator[str]:
    if layout.pp == 1:
        return
    p, m, v = layout.pp, layout.micro_batches, _stages.stages_per_rank(layout)
    if shape.layers < p * v:
        each = f" x {v} stages" if v > 1 else ""
        yield f"model.layers={shape.layers} are fewer than parallelism.pp={p}{each}"
    if layout.schedule in ("interleaved", "zero_bubble") and m % max(1, m // p):
        yield f"parallelism.micro_batches={m} cannot go round parallelism.pp={p} ranks in equal rounds; take a multiple"
    if layout.schedule == "zbv" and m < 2 * p - 1:
        yield f"parallelism.schedule=zbv needs 2 x pp - 1 = {2 * p - 1} micro-batches, there are {m}"
    if layout.zero > 1:
        yield (
            f"parallelism.zero={layout.zero}: a pipeline keeps a stage's weights and gradients whole until its last "
            "micro-batch, which is zero=1"
        )
    recomputed = [t.footprint(shape, None).recompute_blocks for t in recipe.techniques["checkpointing"]]  # type: ignore[arg-type]
    if max(recomputed) > 1:
        yield "a segment of several blocks may lie across two stages; recompute block by block (one block a segment)"
    if max(recomputed) and layout.schedule in _stages.SPLIT_BACKWARD:
        yield f"parallelism.schedule={layout.schedule} runs a backward pass in two halves; what is recomputed has one"


def context(layout: Mesh, shape: Shape, recipe: Recipe) -> Iterator[str]:
    if layout.cp == 1:
        return
    parts = 2 * layout.cp if layout.context == "ring" else layout.cp
    if shape.seq % parts:
        twice = "twice " if layout.context == "ring" else ""
        yield f"workload.seq={shape.seq} cannot be split into {parts} parts, {twice}parallelism.cp={layout.cp}"
    attention = recipe.option("attention")
    if layout.context == "ring" and ring_backend(recipe) is None:
        yield (
            f"attention={attention}: the ring merges the parts of cuDNN's or PyTorch's flash kernel; use attention=sdpa with "
            "attention.backend=auto, flash or cudnn, or parallelism.context=ulysses, which takes any"
        )
    if layout.context == "ulysses":
        for name, size in (("heads", shape.heads), ("kv_heads", shape.kv_heads)):
            if size % (layout.cp * layout.tp):
                over = f" x parallelism.tp={layout.tp}" if layout.tp > 1 else ""
                yield f"model.{name}={size} cannot be split over parallelism.cp={layout.cp}{over}, which ulysses needs"


def neighbours(layout: Mesh, shape: Shape, recipe: Recipe, device: Device) -> Iterator[str]:
    """What other axes ask for and a split step cannot give."""
    compiled = recipe.config["compile"]
    if layout.pp > 1 and compiled.get("per_block") is False:
        yield "a pipeline's forward pass is no single graph; add compile.per_block=true"
    if layout.pp > 1 and layout.schedule in _stages.SPLIT_BACKWARD and "per_block" in compiled:
        yield f"parallelism.schedule={layout.schedule} runs a backward pass in two halves; a compiled one has one"
    if layout.pp > 1 and recipe.config["accumulation"].get("micro_batches"):
        yield "a pipeline has micro-batches of its own: use parallelism.micro_batches and accumulation=none"
    in_chunks = any(t.footprint(shape, device).logits_rows is not None for t in recipe.techniques["loss"])
    if in_chunks and (layout.tp > 1 or layout.pp > 1):
        holder = "one stage has the head and the logits" if layout.pp > 1 else "the head is split over ranks"
        yield f"loss={recipe.option('loss')} makes the logits itself, from the whole head; {holder}: use loss=full"
    if layout.tp > 1 and any(t.footprint(shape, device).cast_bytes is not None for t in recipe.techniques["precision"]):
        yield f"precision={recipe.option('precision')} multiplies by whole weights, which tensor ranks split; use precision=bf16"
    alone = layout.zero == 0 and layout.tp == layout.pp == layout.cp == 1
    if recipe.config["precision"].get("loss_scaling") and layout.world_size > 1 and not alone:
        yield "loss scaling looks for overflows in whole gradients, which no rank has here; use precision=bf16"
