"""What a layout costs the host in an eager step, beside the launches of its kernels: Python's work, by the call.

Counts are those of PyTorch's engines; seconds a call are least squares over the layouts measured on two H100s
(results/reference/h100-x2/layouts), whose steps scatter by a fifth; a gather's and a message's are assumed. No torch:
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
COLLECTIVE_S = 0.76e-3  # a change of placement by a collective, differentiable and awaited
UNIT_S = 2.4e-3  # FSDP2's hooks of a block, forward and backward: gather, copies in and out, reduce and scatter
GATHER_S = 0.5e-3  # and a gather again in the backward pass
MESSAGE_S = 0.4e-3  # a send or a receive of a pipeline's schedule
SPLIT_S = 2.4e-3  # a block's graph walked in Python, once a micro-batch, to part the two halves of its backward pass
HOP_S = 1.76e-3  # of a ring: what is sent and received, and the merge with what was attended to before
EXCHANGE_S = 1.10e-3  # an all-to-all of Ulysses with the copies that order its parts

TENSORS = 9  # weights of a block
PART_S = 40e-6  # of a sharded weight, to find this rank's part of it, its gradient and its moments
BLOCK_DISPATCHES = 171  # of a block by tensor parallel, a third of them in its forward pass


def seconds(layout: Mesh, shape: Shape, part: Part) -> tuple[float, float]:
    """(of a step, of its forward passes) on a rank."""
    micro = shape.micro_batches
    calls, again = 0.0, 0.0  # of one micro-batch, and what recomputing its blocks repeats
    sharded = layout.dp * layout.cp > 1 and not layout.in_buckets
    if sharded:
        calls += UNIT_S * (part.layers + 1) + GATHER_S * part.layers * (layout.zero == 3)
    if layout.tp > 1:
        gathers = 8 if layout.sequence_parallel else 4
        settled = 2 if layout.sequence_parallel else 0  # gradients of norms that saw a part of the tokens
        calls += part.layers * (BLOCK_DISPATCHES * DISPATCH_S + (gathers + settled) * COLLECTIVE_S)
        again += part.layers * (BLOCK_DISPATCHES / 3 * DISPATCH_S + gathers / 2 * COLLECTIVE_S)
    if layout.pp > 1:
        calls += 2 * part.boundaries * MESSAGE_S
        calls += part.layers * SPLIT_S * (layout.schedule in _stages.SPLIT_BACKWARD)
    if layout.cp > 1 and layout.context == "ring":
        calls += part.layers * (3 * layout.cp - 2) * HOP_S
        again += part.layers * (layout.cp - 1) * HOP_S
    elif layout.cp > 1:
        calls += part.layers * 8 * EXCHANGE_S
        again += part.layers * 4 * EXCHANGE_S
    once = (sharded or layout.tp > 1) * part.layers * TENSORS * PART_S
    return micro * calls + once, micro * again
