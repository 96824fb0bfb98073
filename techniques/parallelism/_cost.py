"""What a layout keeps and sends on one rank, by the formulas of the papers. No torch: plans need it.

A ring of n ranks moves (n - 1) / n of what it gathers or scatters through every rank, and twice that of what it reduces
to all; PyTorch's collectives are counted the same way when a run measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Shape
from dyno.techniques.parallelism import _host, _orders, _stages

if TYPE_CHECKING:
    from dyno.techniques.parallelism.mesh import Mesh


@dataclass(frozen=True)
class Part:
    """What one rank of the pipeline has of the model, before tensor ranks and data ranks share it."""

    layers: int
    block: float  # weights of one block
    embedding: float
    head: float  # 0 where the head is the embedding
    has_head: bool
    boundaries: int  # that it sends over for one micro-batch
    held: _orders.Held  # in its fullest moment

    @property
    def weights(self) -> float:
        return self.layers * self.block + self.embedding + self.head


def ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def part_of(layout: Mesh, shape: Shape, pp_rank: int) -> Part:
    """The blocks of a pipeline rank; its embedding and head if it has them, each with a copy of tied weights."""
    table = float(shape.vocab * shape.hidden)
    block = (
        shape.parameters - table * (1 if tied(shape) else 2)
    ) / shape.layers  # the last norm is spread over the blocks
    if layout.pp == 1:
        return Part(shape.layers, block, table, 0.0 if tied(shape) else table, True, 0, _orders.Held(shape.layers))
    stages = layout.pp * _stages.stages_per_rank(layout)
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
    cuts = _stages.balance(shape, stages, tokens)
    mine = [s for s in range(stages) if _stages.rank_of(s, layout) == pp_rank]
    layers, last = sum(len(cuts[s]) for s in mine), stages - 1 in mine
    held = _orders.held(layout, shape, [cuts[s] for s in mine], pp_rank, layers * block)
    return Part(layers, block, table * (0 in mine), table * last, last, _stages.sends(layout, pp_rank), held)


def weight_numbers(layout: Mesh, shape: Shape, part: Part) -> tuple[float, float]:
    """Numbers that a rank sends in a step for its replicas' and shards' sake: of a weight's width, and of an activation's,
    which is what blocks are gathered in. With them what tensor ranks add up of an embedding's output, as wide as its weights:
    two messages of a step, taken as hidden."""
    here = part.weights / layout.tp
    blocks = part.layers * part.block / layout.tp
    micro = shape.micro_batches
    scattered, gathered = here * ring(layout.shards), blocks * ring(layout.shards)
    ends = scattered - gathered  # gathered in their own width
    wide, narrow = 2 * here / layout.shards * ring(layout.copies), 0.0
    if layout.zero:
        reductions, gathers = {1: (1, 1), 2: (micro, 1), 3: (micro, micro)}[layout.zero]
        wide += reductions * scattered + gathers * ends
        narrow += gathers * gathered
    if layout.zero == 3:
        narrow += micro * blocks * ring(layout.reshard_to or layout.shards)
    if layout.pp > 1 and tied(shape) and bool(part.embedding) != bool(part.head):
        wide += part.embedding / layout.tp / layout.shards + part.head / layout.tp / layout.shards
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
    wide += bool(part.embedding) * 2 * tokens * shape.hidden * ring(layout.tp)
    return wide, narrow


def tied(shape: Shape) -> bool:
    return shape.parameters - shape.linear_parameters < shape.vocab * shape.hidden


def waited_numbers(layout: Mesh, shape: Shape, part: Part) -> float:
    """Numbers of an activation's width that a rank sends in a step, nothing being recomputed, and that the next
    product needs at once.

    Tensor parallel: four reductions a layer of (tokens x hidden), whole or as scatter and gather; one more at the head.
    Ulysses: queries, keys, values and outputs, forward and backward.
    """
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
    reductions = 4 * part.layers + part.has_head
    numbers = reductions * 2 * tokens * shape.hidden * ring(layout.tp)
    if not layout.loss_parallel:
        numbers += part.has_head * tokens * shape.vocab * ring(layout.tp)
    if layout.cp > 1 and layout.context != "ring":
        each = tokens * 2 * (shape.heads + shape.kv_heads) * shape.head_dim / layout.tp
        numbers += part.layers * 2 * each * ring(layout.cp)
    return numbers


def hidden_numbers(layout: Mesh, shape: Shape, part: Part) -> float:
    """Those that travel while the rank has other work: a pipeline's states and their gradients between stages, a ring's
    keys and values, forward and backward."""
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
    numbers = part.boundaries * tokens * shape.hidden / layout.token_shards
    if layout.cp > 1 and layout.context == "ring":
        keys = tokens * 2 * shape.kv_heads * shape.head_dim / layout.tp
        numbers += part.layers * 2 * (layout.cp - 1) * keys
    return numbers


def wide_bytes(layout: Mesh, shape: Shape, part: Part) -> tuple[float, float]:
    """Bytes sent in fp32 whatever the activations are, and those of them that are waited for.

    A ring's gradients of keys and values, of which the last hop has no work beside it; a softmax's sums.
    """
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
    hop = 0.0
    if layout.cp > 1 and layout.context == "ring":
        hop = 4 * part.layers * tokens * 2 * shape.kv_heads * shape.head_dim / layout.tp
    sums = 0.0
    if layout.loss_parallel:  # its maximum, its sum, and the target's logit
        sums = 4 * part.has_head * 3 * 2 * tokens * ring(layout.tp)
    return (layout.cp - 1) * hop + sums, hop + sums


def again_numbers(layout: Mesh, shape: Shape, part: Part) -> tuple[float, float]:
    """(those waited for, those of a ring) that are sent again where every block's forward pass runs a second time.

    It stops before a block's last scatter or reduction: nothing in the backward pass needs what comes of it.
    """
    tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
    pieces = 3 if layout.token_shards > 1 else 2  # of the four into which two reductions fall apart
    waited = part.layers * pieces * tokens * shape.hidden * ring(layout.tp)
    if layout.cp == 1:
        return waited, 0.0
    if layout.context == "ring":
        return waited, part.layers * (layout.cp - 1) * tokens * 2 * shape.kv_heads * shape.head_dim / layout.tp
    each = tokens * 2 * (shape.heads + shape.kv_heads) * shape.head_dim / layout.tp
    return waited + part.layers * each * ring(layout.cp), 0.0


def sent(said: Footprint) -> float:
    """Bytes of a step, everything being in fp32."""
    return 4 * said.wire_weights + 4 * said.wire_activations + said.wire_bytes


def footprint(layout: Mesh, shape: Shape, pp_rank: int = 0) -> Footprint:
    """The share of a rank of the pipeline. Its layers are fewer than its share of the weights where it has an end."""
    part = part_of(layout, shape, pp_rank)
    whole, micro = part.weights / layout.tp, layout.micro_batches if layout.pp > 1 else 1
    layers = part.layers / shape.layers
    weights = part.weights / shape.parameters / layers
    standing, gathered, visiting, gradients = 0.0, 0.0, 0.0, 1.0
    sharded = layout.copies * layout.shards > 1
    if layout.copies > 1 and layout.in_buckets:  # the gradients live in DDP's buckets, which stay
        standing, gradients = whole, 0.0
    elif sharded:  # FSDP2 gathers into buffers beside the shards, even where one is all
        standing = (part.embedding + part.head) / layout.tp
        gathered = 0.0 if layout.zero == 3 else whole - standing
        visiting = 2.0 if layout.zero == 3 else 0.0  # two blocks are in flight
    scattered = layout.zero >= 2 or (layout.zero == 1 and shape.micro_batches == 1)
    if sharded and scattered:  # as they come: beside a rank's share there is one block's
        gradients = 1 / layout.shards + part.block / part.weights
    # A block's inside: 14 hidden + 4 ffn numbers a token, of which 6 hidden lie outside of the split matrices; where tokens
    # are split there, the matrices' two inputs are gathered and kept.
    outside = (2 if layout.token_shards > 1 else 6) * shape.hidden / (14 * shape.hidden + 4 * shape.ffn)
    unsplit = 1 + (layout.tp - 1) * outside
    waited, (wide, wide_waited) = waited_numbers(layout, shape, part), wide_bytes(layout, shape, part)
    wire_weights, wire_gathers = weight_numbers(layout, shape, part)
    waited_again, ring_again = again_numbers(layout, shape, part)
    host, host_again = _host.seconds(layout, shape, part)
    compiled, compiled_again = _host.seconds(layout, shape, part, compiled=True)
    return Footprint(
        parameter_factor=weights / layout.shards,
        gradient_factor=gradients * weights,
        optimizer_factor=weights / layout.shards,
        batch_factor=1 / (micro * layout.dp * layout.cp),
        micro_batches=micro,
        layer_factor=layers,
        width_factor=1 / layout.tp,
        activation_factor=unsplit,
        boundary_factor=1 / layout.token_shards,
        logits_factor=layout.tp / layout.vocabulary_shards,
        loss_copies=4.0 if layout.vocabulary_shards > 1 else None,  # its gradient is made out of place, step by step
        earlier_gradients=float(part.held.gradients),
        kept_losses=part.held.losses,
        kept_outputs=part.held.outputs,
        head_factor=float(part.has_head),
        in_flight=part.held.blocks / part.layers,
        standing_numbers=standing,
        gathered_numbers=gathered,
        visiting_blocks=visiting,
        wire_weights=wire_weights,
        wire_activations=waited + hidden_numbers(layout, shape, part) + wire_gathers,
        wire_bytes=wide,
        wire_again=waited_again + ring_again,
        waited_activations=waited,
        waited_again=waited_again,
        waited_bytes=wide_waited,
        host_s=host,
        host_again_s=host_again,
        host_compiled_s=compiled,
        host_compiled_again_s=compiled_again,
        merged_parts=float(layout.cp) if layout.cp > 1 and layout.context == "ring" else 0.0,
        bubble=_stages.bubble(layout) if layout.pp > 1 else 0.0,
        ranks=layout.world_size,
        context_ranks=layout.cp,
    )
