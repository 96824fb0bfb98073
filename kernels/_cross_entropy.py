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
MAX_BLOCK = 16384  # logits at a time: 16 a thread
SHORT_BLOCK = 4096  # in rows of SHORT_ROW bytes at most, of which four an SM are under way
SHORT_ROW = 2**17
TURNS = 2  # logits of a lane among them


@triton.jit
def _losses_and_slopes(Logits, Targets, Losses, stride, rows, vocab, TURNS: tl.constexpr, LANES: tl.constexpr):
    """A program takes row after row: an online softmax over its blocks, then softmax minus one-hot over them again.

    Each of LANES has a peak and a sum of its own until the row ends, so that nothing waits inside a row. Rows are read
    again, so that few are under way at a time: 16384 x 128256 in bf16 take an H200 3.08 ms with a program an SM and
    3.44 ms with four, 16384 x 50304 1.54 and 1.27 ms. With a peak of the whole block at a time the first took 3.71 ms.
    """
    lanes = tl.arange(0, TURNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target = tl.load(Targets + row)
        logits = Logits + tl.cast(row, tl.int64) * stride
        peaks = tl.full((LANES,), -1e30, tl.float32)  # finite: a lane may see nothing but what lies past the row
        totals = tl.zeros((LANES,), tl.float32)
        for start in range(0, vocab, TURNS * LANES):
            inside = lanes < vocab - start
            x = tl.load(logits + start + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            higher = tl.maximum(peaks, tl.max(x, 0))
            totals = totals * tl.exp(peaks - higher) + tl.sum(tl.exp(x - higher[None, :]), 0)
            peaks = higher
        peak = tl.max(peaks, 0)
        total = tl.sum(totals * tl.exp(peaks - peak), 0)
        has_target = target != IGNORE
        picked = tl.load(logits + tl.where(has_target, target, 0)).to(tl.float32)
        tl.store(Losses + row, tl.where(has_target, peak + tl.log(total) - picked, 0.0))
        weight = tl.where(has_target, 1.0, 0.0)
        share = weight / total
        tl.debug_barrier()  # the picked logit is read before a thread overwrites it
        for start in range(0, vocab, TURNS * LANES):
            inside = lanes < vocab - start
            x = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            slope = share * tl.exp(x - peak) - tl.where(lanes == target - start, weight, 0.0)
            slope = slope.to(Logits.dtype.element_ty)
            tl.store(logits + start + lanes, slope, mask=inside, eviction_policy="evict_first")


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
    short = vocab * logits.element_size() <= SHORT_ROW
    block = min(SHORT_BLOCK if short else MAX_BLOCK, triton.next_power_of_2(vocab))
    processors = torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 1
    _losses_and_slopes[(min(rows, processors * (4 if short else 1)),)](
        logits, targets, losses, logits.stride(0), rows, vocab, TURNS=TURNS, LANES=max(1, block // TURNS),
        num_warps=max(1, min(32, block // 512)),
    )  # fmt: skip
    return losses
