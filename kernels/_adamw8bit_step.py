"""The Triton version of `dyno.kernels._adamw8bit.reference_step`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._adamw8bit import BLOCK, Moment, Rates, table

ROWS = 4  # blocks a program


@triton.jit
def _codes(share, Bounds):
    """How many of 255 sorted bounds each share passes, by bisection."""
    code = tl.zeros(share.shape, tl.int32)
    for i in tl.static_range(8):
        tried = code + (128 >> i)
        code = tl.where(share > tl.load(Bounds + tried - 1), tried, code)
    return code


@triton.jit
def _step(
    Weight, Grad, First, FirstScales, Second, SecondScales, Signed, SignedBounds, Unsigned, UnsignedBounds,
    count, lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = i < count
    first_block = block * BLOCK < count
    g = tl.load(Grad + i, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(Signed + tl.load(First + i, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(FirstScales + block, mask=first_block, other=0.0)[:, None]
    v = tl.load(Unsigned + tl.load(Second + i, mask=inside, other=0).to(tl.int32))
    v = v * tl.load(SecondScales + block, mask=first_block, other=0.0)[:, None]
    m = tl.where(inside, m + (g - m) * (1 - beta1), 0.0)
    v = tl.where(inside, v + (g * g - v) * (1 - beta2), 0.0)
    update = m / correction1 / (tl.sqrt(v / correction2) + eps)
    w = tl.load(Weight + i, mask=inside, other=0.0).to(tl.float32)
    w = w * (1 - lr * weight_decay) - lr * update
    tl.store(Weight + i, w.to(Weight.dtype.element_ty), mask=inside)
    m_scale = tl.max(tl.abs(m), 1)
    v_scale = tl.max(v, 1)
    m_codes = _codes(m / tl.maximum(m_scale, 1.1754943508222875e-38)[:, None], SignedBounds)
    v_codes = _codes(v / tl.maximum(v_scale, 1.1754943508222875e-38)[:, None], UnsignedBounds)
    v_codes = tl.maximum(v_codes, tl.where(v > 0, 1, 0))
    tl.store(First + i, m_codes.to(tl.uint8), mask=inside)
    tl.store(Second + i, v_codes.to(tl.uint8), mask=inside)
    tl.store(FirstScales + block, m_scale, mask=first_block)
    tl.store(SecondScales + block, v_scale, mask=first_block)


def triton_step(weight: Tensor, grad: Tensor, first: Moment, second: Moment, rates: Rates) -> None:
    """`reference_step` in one pass over contiguous tensors."""
    tables = (*table(True, weight.device), *table(False, weight.device))
    _step[(triton.cdiv(weight.numel(), BLOCK * ROWS),)](
        weight, grad, *first, *second, *tables, weight.numel(), *rates, BLOCK=BLOCK, ROWS=ROWS, num_warps=4
    )
