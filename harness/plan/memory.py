"""Memory of a step by phase, from what the code really keeps: bytes on one rank, arithmetic only.

The peak is the largest phase, never their sum. What is predicted is the allocator's peak of a training step in steady
state. Letters: h hidden, f FFN width, H query heads, G KV heads, d head width, s sequence, T tokens alive at once,
V vocabulary, w bytes of an activation. `harness/model/decoder.py` and `harness/stages/train.py` say what is kept; the
counts below were read off their traces under fake tensors (`benchmarks/plan_against_tracker.py` repeats that).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dyno.technique import Footprint, Shape

FP32 = 4.0
WORKSPACE_BYTES = 2 * 32 * 2**20  # cuBLAS's, 32 MiB a thread that multiplies: the forward's and the backward's
PROCESS_BYTES = 0.5e9  # a CPU's peak is the process's: the interpreter with torch in it

Phases = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Block:
    """Bytes a token that one transformer block leaves for its backward pass, and what moves inside it.

    `kept` without the score matrix, `scores` of it, in them `copy` in the products' width beside fp32, `product` of it as
    its product leaves it; `inputs` of linear layers that are kept in a narrow format of their own; `boundary` the block's
    input; `mlp` and `attention`: the bytes that the backward pass adds (or has already freed, when negative) at its two
    fullest moments; `forward` the same of the forward pass, inside attention.
    """

    kept: float
    scores: float
    copy: float
    product: float
    inputs: float
    boundary: float
    mlp: float
    attention: float
    forward: float
    norm: float


def block_of(shape: Shape, print_: Footprint, kind: str = "cuda") -> Block:
    """A block's bytes a token, eager or fused by a compiler, under an attention kernel's habits on a kind of device."""
    w = activation_width(print_)
    mixed = w < FP32
    h, f, width = shape.hidden, shape.ffn, shape.heads * shape.head_dim
    unfused = keeps_scores(shape, print_)
    own = unfused and not print_.score_copy  # PyTorch's own unfused kernel computes in fp32, all heads expanded
    keys = width if print_.expanded_heads else shape.kv_heads * shape.head_dim
    inputs = 3 * FP32 * width if own else w * (width + 2 * keys)
    attention = inputs + w * width + (0.0 if unfused else FP32 * shape.heads)
    # RMSNorm keeps its input in fp32, the rounded quotient and the product with the weight; fused, input and product.
    norm = 2 * w * h + FP32 if print_.fused else (FP32 + 2 * w) * h + FP32
    mlp = (3 if print_.fused else 4) * w * f
    matrix = shape.heads * shape.seq
    # Compiled by the block, the copy is made again from the fp32 scores (two H200 records); as a whole it is kept.
    copied = mixed and print_.score_copy and (print_.fused_loss or not print_.fused)
    copy = w * matrix if unfused and copied else 0.0
    scores = FP32 * matrix + copy if unfused else 0.0
    done = mlp + norm  # of this block, when the backward pass reaches attention; not yet kept in the forward pass
    if unfused:
        # Its gradient and that of the scores; CUDA's softmax multiplies its output and its gradient first. A compiler
        # makes the one from the other in the products' width.
        wide = w if print_.fused else FP32
        moment = (3 if kind == "cuda" and not print_.fused else 2) * wide * matrix - copy
        forward = wide * matrix
    else:
        moment = w * (2 * width + 2 * max(width, keys)) + FP32 * width
        forward = 0.0
    qk_norms = (norm / h) * (width + keys) if shape.qk_norm else 0.0
    linear = 0.0
    if print_.input_bytes is not None:
        # Norms' products and the MLP's are kept narrow, and so is attention's output, beside what a fused kernel keeps.
        linear = (print_.input_bytes - w) * (2 * h + f) + (print_.input_bytes - (w if unfused else 0.0)) * width
        # Queries, keys and values are one product, which stays whole for its values, unless those are copied.
        if not own and not (print_.expanded_heads and shape.kv_heads < shape.heads):
            linear += w * (width + shape.kv_heads * shape.head_dim)
    return Block(
        kept=2 * norm + attention + mlp + qk_norms + linear,
        inputs=(print_.input_bytes or 0.0) * (2 * h + width + f),
        scores=scores,
        copy=copy,
        product=(FP32 if own else w) * matrix if unfused else 0.0,
        boundary=w * h,
        mlp=2 * w * f + w * h,
        attention=moment - done + 2 * w * h,
        forward=forward - done,
        norm=norm,
    )


def kept_bytes(print_: Footprint, block: Block) -> float:
    """Bytes a token that a block's forward pass leaves; where products are kept, of the scores that is QK' unscaled.

    Compiled, the last product's output, which nothing reads in the backward pass, is let go.
    """
    if print_.keeps_products:
        outputs = activation_width(print_) * print_.product_numbers - (block.boundary if print_.fused else 0.0)
        return outputs + block.product + block.inputs
    return print_.activation_factor * (block.kept + block.scores)


def leaving_bytes(shape: Shape, print_: Footprint, kind: str) -> float:
    """Bytes that a micro-batch sends to the host: what blocks keep, with their weights as cast, and the inputs of those that
    run again. At most, where some blocks keep more than others."""
    if not print_.host_blocks:
        return 0.0
    block, tokens = block_of(shape, print_, kind), shape.batch * shape.seq * print_.batch_factor
    inputs = print_.boundaries / shape.layers * block.boundary * print_.boundary_factor * tokens
    weights = cast_width(print_) * shape.block_parameters / shape.layers
    weights *= whole_share(print_) if print_.boundaries else 1.0
    return print_.host_blocks * (inputs + (kept_bytes(print_, block) * tokens + weights) * print_.width_factor)


def whole_share(print_: Footprint) -> float:
    """The share of the blocks that keep all, and so their weights as cast."""
    if print_.boundaries:
        return print_.activation_factor
    return 0.0 if print_.recompute_blocks else 1.0


def casts_weights(print_: Footprint) -> bool:
    """Whether the blocks' weights are cast for their products."""
    return activation_width(print_) < parameter_width(print_) and not comes_narrow(print_)


def offloaded_bytes(shape: Shape, print_: Footprint, kind: str) -> float:
    """Host memory of everything that is not on the device, before an allocator rounds it up: state, gradients, copies of
    the blocks' weights as they travel where that is not as masters, and activations."""
    w = activation_width(print_)
    copies = w * print_.host_weights / 2 if w < FP32 else 0.0  # every block comes twice
    return print_.host_bytes + copies + leaving_bytes(shape, print_, kind)


def cast_width(print_: Footprint) -> float:
    """Bytes of a number of a block's weights as its products keep it; 0 where they take it as it is.

    Weights that are put beside each other for one product are copied where nothing is cast, else cast to there.
    """
    if print_.cast_bytes is not None:
        return print_.cast_bytes
    return activation_width(print_) * (1.0 if casts_weights(print_) else print_.joined_share)


def activation_width(print_: Footprint) -> float:
    return FP32 if print_.activation_width is None else print_.activation_width


def parameter_width(print_: Footprint) -> float:
    return FP32 if print_.parameter_bytes is None else print_.parameter_bytes


def gradient_width(print_: Footprint) -> float:
    return parameter_width(print_) if print_.gradient_bytes is None else print_.gradient_bytes


def state_width(print_: Footprint) -> float:
    """Bytes of a parameter's state in the optimizer: AdamW's two moments unless a technique says else."""
    return 2 * FP32 if print_.optimizer_bytes is None else print_.optimizer_bytes


def comes_narrow(print_: Footprint) -> bool:
    """Whether a block's weights are gathered or copied in the width of its products, which then cast nothing."""
    return print_.visiting_blocks > 0 or print_.gathered_numbers > 0


def keeps_scores(shape: Shape, print_: Footprint) -> bool:
    """Whether the (s, s) matrix lies in memory: asked for, or fallen back to for grouped heads in fp32."""
    grouped = shape.kv_heads < shape.heads and activation_width(print_) >= FP32
    return print_.attention_matrix or (print_.wide_groups_unfused and grouped)


def masked(print_: Footprint) -> bool:
    """Whether a mask of documents lies in memory: (s, s) of every row, one for all layers."""
    return print_.document_mask and not print_.skips_documents


def logits_of(shape: Shape, print_: Footprint) -> float:
    """Logits that are in memory at once."""
    tokens = shape.batch * shape.seq * print_.batch_factor
    rows = tokens if print_.logits_rows is None else min(tokens, print_.logits_rows)
    return rows * shape.vocab * print_.width_factor * print_.logits_factor * print_.head_factor


def logits_bytes(shape: Shape, print_: Footprint) -> float:
    """The largest tensor of theirs: in fp32, or of an activation's width where nothing else is made of them; or, where
    they come in chunks, the head's gradient."""
    narrow = print_.fused_loss or print_.loss_in_place
    head = (
        0.0
        if print_.logits_rows is None
        else FP32 * shape.vocab * shape.hidden * print_.width_factor * print_.head_factor
    )
    return max((activation_width(print_) if narrow else FP32) * logits_of(shape, print_), head)


def loss_moments(shape: Shape, print_: Footprint, stored: float) -> tuple[float, float]:
    """Bytes of head and loss at the fullest moments of their forward pass and of their backward.

    Counted off `kernels/linear_cross_entropy.py`: a chunk's tensors live until the next one's take their names.
    """
    w, logits = activation_width(print_), logits_of(shape, print_)
    mixed = w < FP32
    if print_.logits_rows is None:
        if print_.fused_loss:
            return w * logits, w * logits
        # The logits, in fp32, their log-softmax; then the log-softmax, its gradient and the loss's, all in fp32.
        copies = 3.0 if print_.loss_copies is None else print_.loss_copies
        return (2 * FP32 + (w if mixed else 0.0)) * logits, FP32 * copies * logits
    tokens = shape.batch * shape.seq * print_.batch_factor
    many = tokens > print_.logits_rows
    head = shape.vocab * shape.hidden * print_.width_factor * print_.head_factor
    narrow = w * head if w < stored else 0.0  # the head cast
    states = w * tokens * shape.hidden * print_.head_factor  # the gradient of the head's input
    if print_.loss_in_place:
        sums = stored if stored == w < FP32 and not many else FP32  # what the head's gradient is added up in
        waiting = sums * head + states
        scaled = (sums + (stored if stored < sums else 0.0)) * head  # and rounded
        return (1 + many) * w * logits + waiting + narrow, waiting + states + scaled
    if print_.fused_loss:  # the chunks' parts of the head's gradient wait for one sum of them all
        parts = math.ceil(tokens / print_.logits_rows) * w * head if many else 0.0
        return w * logits + narrow, w * logits + narrow + parts + FP32 * head + states
    chain = 2 * FP32 + (w if mixed or many else 0.0)  # the slopes: two of a chain in fp32, and what the last one left
    adding = w * logits + (2 * FP32 + w) * head  # the sum of the head's gradient, out of place
    rounding = (2 * FP32 + (stored if stored < FP32 else 0.0)) * head + states  # beside its input's, put together
    forward = (2 * FP32 + (w if mixed and many else 0.0)) * logits + narrow
    return forward, max(chain * logits + FP32 * head, adding, rounding) + narrow + states


def training(shape: Shape, print_: Footprint, kind: str) -> Phases:
    """Phases of a training step: each a table of terms, in bytes. `print_` is all techniques' combined share."""
    w = activation_width(print_)
    split = print_.layer_factor * print_.width_factor
    tokens = shape.batch * shape.seq * print_.batch_factor
    held = shape.parameters * split  # parameters that this rank is responsible for, sharded or not
    head = shape.vocab * shape.hidden * print_.width_factor * print_.head_factor
    stored, gradient, state = parameter_width(print_), gradient_width(print_), state_width(print_)
    base = {
        "weights": stored * held * print_.parameter_factor,
        "optimizer": state * held * print_.optimizer_factor,
        "master": print_.master_bytes * held * print_.optimizer_factor,
        "standing buffers": stored * print_.standing_numbers + w * print_.gathered_numbers,
        "extra": print_.extra_bytes + (WORKSPACE_BYTES if kind == "cuda" else PROCESS_BYTES),
    }
    gradients = gradient * held * print_.gradient_factor
    before = gradients * print_.earlier_gradients if print_.micro_batches > 1 else 0.0  # of those before this one
    # Every micro-batch in flight has cast the weights for itself, and its graph keeps those of blocks that do not run again,
    # unless they have gone to the host. Autocast keeps all until its forward pass is over; compiled blocks and products with
    # a cast of their own know nothing of it. A loss in chunks casts the head for itself.
    narrow = w if w < stored else 0.0
    block_cast = cast_width(print_)
    cast_head = narrow * head * (1 + print_.kept_losses) if print_.logits_rows is None else 0.0
    checkpointed = print_.recompute_blocks > 0
    cast_blocks = block_cast * shape.block_parameters * split
    whole = whole_share(print_)  # blocks that stay are the last ones, as are those that are kept whole
    staying = min(1.0, print_.stay_factor / whole) if whole else print_.stay_factor
    in_graph = cast_blocks * whole * staying
    elsewhere = print_.fused or (print_.cast_bytes is not None and not print_.keeps_products)
    cast_kept = print_.in_flight * in_graph
    cast = cast_head + cast_kept + (0.0 if elsewhere else cast_blocks - in_graph)

    block, layers = block_of(shape, print_, kind), shape.layers * print_.layer_factor
    per_block = tokens * print_.width_factor
    inside = (block.kept + block.scores) * per_block
    kept_inside = kept_bytes(print_, block) * per_block
    recomputed = print_.recompute_blocks * inside
    if print_.keeps_products:  # the rest of the scores is made again; compiled by the block, as part of the next moment
        again = 0.0 if print_.fused and not print_.fused_loss else block.scores
        recomputed = (print_.recompute_blocks * block.kept + again) * per_block
    boundary = block.boundary * print_.boundary_factor * tokens
    inputs = print_.boundaries * print_.layer_factor * boundary
    kept = layers * kept_inside * staying + inputs * print_.stay_factor
    if print_.fused_loss and not checkpointed:  # the last block's backward pass follows at once, in the same graph
        kept -= block.copy * per_block
    kept *= print_.in_flight
    # The final norm, the tokens and their targets, the rotations of one sequence.
    rotated = tokens if print_.document_mask else shape.seq  # or of every one, whose documents begin elsewhere
    ends = tokens * (block.norm + 16) + 2 * w * rotated * shape.head_dim
    width = FP32 if keeps_scores(shape, print_) else w
    mask = {"mask": width * tokens * shape.seq} if masked(print_) else {}
    one = shape.block_parameters * print_.width_factor / shape.layers  # of a block
    mlp_share = 3 * shape.hidden * shape.ffn * print_.width_factor
    segment = max(1.0, print_.recompute_blocks)

    logits = logits_of(shape, print_)
    loss_forward, loss_backward = loss_moments(shape, print_, stored)
    others = logits * (FP32 * print_.kept_losses + w * print_.kept_outputs)
    alive = {**base, "gradients": before, "activations": kept + ends, **mask}
    # While a block computes; none is there when the loss does.
    visiting = w * print_.visiting_blocks * one
    forward = {
        **alive,
        "cast weights": cast,
        "visiting weights": visiting,
        "temporaries": max(0.0, block.forward * per_block),
    }
    # In a graph of the whole model the head's gradient comes while the logits' is there, in their width; in fp32, by the one
    # record that tells, it does not.
    beside = w * head if print_.fused_loss and print_.logits_rows is None and w < FP32 else 0.0
    loss = max(
        alive | {"logits": loss_forward + others, "cast weights": cast},
        alive
        | {"logits": loss_backward + others, "cast weights": cast_head + cast_kept, "gradients": max(before, beside)},
        key=total,
    )
    exchange = gradient - block_cast  # a gradient comes, the cast weight goes
    moments = max(
        block.mlp * per_block + exchange * mlp_share / 3 * print_.gradient_factor,
        block.attention * per_block + exchange * mlp_share * print_.gradient_factor,
    )
    # Compiled, the last segment's output counts as its inside: it is recomputed while the logits' gradient waits.
    # In chunks, at most all of them; Inductor does not always (docs/LOG.md).
    waiting = 0.0
    if print_.fused_loss and checkpointed and not print_.keeps_products:
        waiting = loss_backward if print_.loss_made_again else w * logits
    start = {
        **base,
        "logits": waiting + others,
        "gradients": max(before, gradient * head * print_.gradient_factor),
        "activations": kept + ends,
        **mask,
        "recomputed inside": recomputed,
        "cast weights": cast_kept + (block_cast * segment * one if checkpointed else 0.0),
        "visiting weights": visiting,
        "temporaries": max(0.0, moments - block.norm * tokens),
    }
    if not print_.fused:  # the final norm's backward pass, before any block's
        chain = (4 if w < FP32 else 3) * FP32 * shape.hidden * tokens * min(1.0, print_.head_factor)
        start = max(start, start | {"recomputed inside": 0.0, "temporaries": chain}, key=total)
    embedding = gradient * shape.vocab * shape.hidden * print_.width_factor
    behind = held * print_.gradient_factor * gradient - segment * one * gradient * print_.gradient_factor
    first = {
        **base,
        "gradients": max(before, behind - (0.0 if shape.tied else embedding * print_.gradient_factor)),
        "activations": boundary if checkpointed else kept_inside,
        **mask,
        "recomputed inside": recomputed,
        "cast weights": block_cast * segment * one,
        "visiting weights": visiting,
        "temporaries": max(0.0, moments),
    }
    # A model compiled as a whole hands out all its gradients at its end: beside those of the micro-batches before.
    whole = print_.fused_loss and before > 0
    copies = float(shape.tied) + float(before > 0 and not whole)
    narrow_head = narrow * head if whole and shape.tied else 0.0
    last = {
        **base,
        "gradients": gradients + (before if whole else 0.0),
        "activations": tokens * (FP32 * shape.hidden + 16),
        "temporaries": copies * embedding + narrow_head,
    }
    largest = max(embedding, gradient * one) if kind != "cuda" else 0.0  # fused steps work in place
    wide = 0.0 if print_.steps_narrow else print_.step_bytes
    wide *= print_.width_factor * print_.optimizer_factor  # of the shards that this rank steps
    wide += print_.gathered_step_bytes
    return {
        "forward end": forward,
        "loss": loss,
        "backward start": start,
        "backward end": max(first, last, key=total),
        "optimizer step": {**base, "gradients": gradients, "temporaries": 2 * largest + wide},
    }


def fullest(shape: Shape, prints: Sequence[Footprint], kind: str) -> Phases:
    """`training` of the rank whose peak is the highest."""
    return max(
        (training(shape, one, kind) for one in prints),
        key=lambda phases: max(total(terms) for terms in phases.values()),
    )


def total(terms: dict[str, float]) -> float:
    return sum(terms.values())


def serving(shape: Shape, print_: Footprint, kind: str) -> Phases:
    """Weights, the unmodified model beside them while quality is compared, KV cache, logits.

    Tensor ranks share the blocks, the head and the cache; the embedding, the norms, the unmodified model and the logits
    are whole on each, and so is a head's copy of a tied embedding in part.
    """
    stored = FP32 if print_.weight_bytes is None else print_.weight_bytes
    head, blocks = shape.vocab * shape.hidden, shape.block_parameters
    whole = shape.parameters - blocks - (0 if shape.tied else head)
    copied = print_.width_factor if print_.width_factor < 1 or not shape.tied else 0.0
    weights = blocks * stored * print_.linear_factor * print_.width_factor
    weights += (whole + head * copied) * max(stored, 2.0)
    width = max(2.0, min(FP32, stored))
    cache = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * width * shape.batch * shape.seq
    cache *= print_.width_factor
    base = {"weights": weights, "extra": print_.extra_bytes + (WORKSPACE_BYTES if kind == "cuda" else PROCESS_BYTES)}
    return {
        "quality": {**base, "unmodified model": FP32 * shape.parameters, "logits": 16 * 512 * shape.vocab * 12.0},
        "decode": {**base, "kv cache": cache * print_.kv_cache_factor, "logits": shape.batch * shape.vocab * 8.0},
    }
