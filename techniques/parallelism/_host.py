"""What a layout costs the host in a step, beside the launches of its kernels: Python's work, by the call.

Counts are those of PyTorch's engines; seconds a call are set by hand to the layouts measured on two H100s and on two
and four H200s (results/reference/*/layouts), whose steps scatter by a fifth, and to a profile of one rank. No torch:
plans need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dyno.technique import Shape
from dyno.techniques.parallelism import _stages

if TYPE_CHECKING:
    from dyno.techniques.parallelism._cost import Part
    from dyno.techniques.parallelism.mesh import Mesh

DISPATCH_S = 60e-6  # an operation on DTensors: its placements, then the operation on the local parts
# Eager, and in or round compiled code: a change of placement, differentiable and awaited; FSDP2's hooks of a block, which
# gather, copy, reduce and scatter.
COLLECTIVE_S = {False: 0.76e-3, True: 0.5e-3}
UNIT_S = {False: 2.4e-3, True: 3.5e-3}
HOOKS_S = 1.2e-3  # of that, what comes in every micro-batch, whether or not anything is sent
GATHER_S = {False: 0.5e-3, True: 0.9e-3}  # and a gather again in the backward pass
MESSAGE_S = 0.4e-3  # a send or a receive of a pipeline's schedule
STAGE_S = 3.5e-3  # a stage's passes over a micro-batch: two calls of the engine, graphs cut and joined
SPLIT_S = 1.9e-3  # a block's graph walked in Python, once a micro-batch, to part the two halves of its backward pass
HOP_S = 1.42e-3  # of a ring: what is sent and received, and the merge with what was attended to before
EXCHANGE_S = 1.10e-3  # an all-to-all of Ulysses with the copies that order its parts

PART_S = 40e-6  # of a sharded weight, to find this rank's part of it, its gradient and its moments
AGAIN = 0.5  # of a forward pass's dispatches and collectives, where blocks run again (nine layouts of H200s)
BLOCK_DISPATCHES = 171  # of a block by tensor parallel, a third of them in its forward pass


def seconds(layout: Mesh, shape: Shape, part: Part, compiled: bool = False) -> tuple[float, float]:
    """(of a step, of its forward passes) on a rank; blocks that are compiled dispatch nothing inside."""
    micro = shape.micro_batches
    calls, again, once = 0.0, 0.0, 0.0  # of one micro-batch, what recomputing its blocks repeats, and of the step
    sharded = layout.dp * layout.cp > 1 and not layout.in_buckets
    if sharded:
        units, sent = part.layers + 1, UNIT_S[compiled] - HOOKS_S
        often = {3: sent, 2: sent / 2}.get(layout.zero, 0.0)  # level 2 scatters in every micro-batch, 3 gathers too
        calls += units * (HOOKS_S + often) + GATHER_S[compiled] * part.layers * (layout.zero == 3)
        once += units * (sent - often)
    if layout.tp > 1:
        gathers = 8 if layout.sequence_parallel else 4
        settled = 2 if layout.sequence_parallel else 0  # gradients of norms that saw a part of the tokens
        dispatches = 0.0 if compiled else BLOCK_DISPATCHES * DISPATCH_S
        calls += part.layers * (dispatches + (gathers + settled) * COLLECTIVE_S[compiled])
        again += AGAIN * part.layers * (dispatches / 3 + gathers / 2 * COLLECTIVE_S[compiled])
    if layout.pp > 1:
        calls += 2 * part.boundaries * MESSAGE_S + _stages.stages_per_rank(layout) * STAGE_S
        calls += part.layers * SPLIT_S * (layout.schedule in _stages.SPLIT_BACKWARD)
    if layout.cp > 1 and layout.context == "ring":
        calls += part.layers * 3 * (layout.cp - 1) * HOP_S
        again += part.layers * (layout.cp - 1) * HOP_S
    elif layout.cp > 1:
        calls += part.layers * 8 * EXCHANGE_S
        again += part.layers * 4 * EXCHANGE_S
    once += (sharded or layout.tp > 1) * part.layers * shape.block_tensors * PART_S
    return micro * calls + once, micro * again
