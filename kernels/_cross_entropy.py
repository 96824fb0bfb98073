"""The Triton kernel of `dyno.kernels.linear_cross_entropy`: logits become losses and, in place, their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyno.errors import UserError
from dyno.kernels import triton_missing
from dyno.kernels.linear_cross_entropy import IGNORE as IGNORE_INDEX

IGNORE = tl.constexpr(IGNORE_INDEX)
MAX_BLOCK = 8192  # logits at a time: 16 a thread


@triton.jit
def _losses_and_slopes(Logits, Targets, Losses, stride, vocab, BLOCK: tl.constexpr):
    """A program a row: an online softmax over its blocks, then softmax minus one-hot over them again, from the cache."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Targets + row)
    logits = Logits + row * stride
    columns = tl.arange(0, BLOCK)
    peak = float("-inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), 0)
        peak = new_peak
    has_target = target != IGNORE
    picked = tl.load(logits + tl.where(has_target, target, 0)).to(tl.float32)
    tl.store(Losses + row, tl.where(has_target, peak + tl.log(total) - picked, 0.0))
    weight = tl.where(has_target, 1.0, 0.0)
    tl.debug_barrier()  # the picked logit is read before a thread overwrites it
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        slope = weight * (tl.exp(x - peak) / total - tl.where(start + columns == target, 1.0, 0.0))
        tl.store(logits + start + columns, slope.to(Logits.dtype.element_ty), mask=inside)


def losses_and_slopes(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 losses (N,) of logits (N, V), which are overwritten with softmax minus one-hot; zeros without a target.

    Raises:
        UserError: a device without Triton.
    """
    missing = triton_missing(logits.device)
    if missing:
        raise UserError(f"fused cross-entropy: {missing}")
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    _losses_and_slopes[(rows,)](
        logits, targets, losses, logits.stride(0), vocab, BLOCK=block, num_warps=max(1, min(16, block // 512))
    )
    return losses
