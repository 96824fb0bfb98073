"""The Triton version of `dyno.kernels._adamw8bit.reference_step`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._adamw import Rates
from dyno.kernels._adamw8bit import BLOCK, Moment, table

ROWS = 2  # blocks a program
CUTS = tl.constexpr(2**23 - 0.5)  # beside such a number fp32 has no fraction

# Codes are computed, not searched for among the table's bounds, which took the time of the memory's traffic again.


@triton.jit
def _raised(share, cells, least: tl.constexpr, power: tl.constexpr, halves: tl.constexpr):
    """A share below `least` times `power`, and its decade's cells, which are so many times fewer."""
    below = share < least
    return tl.where(below, share * power, share), tl.where(below, cells * halves, cells)


@triton.jit
def _place(share, FINER: tl.constexpr):
    """The number of a share's cell plus FINER, and the fraction of the cell; shares are from 0 to 1, cells count from 1.

    The decade (10^(d-7), 10^(d-6)] has 2^(d + FINER) equal cells, and that is the place of its first. What is below all
    cells has a place below 1 + FINER. 1 itself, but for rounding, is past the last cell.
    """
    cells = tl.full(share.shape, 64 << FINER, tl.float32)
    share, cells = _raised(share, cells, 1e-4, 1e4, 1 / 16)
    share, cells = _raised(share, cells, 1e-2, 1e2, 1 / 4)
    share, cells = _raised(share, cells, 1e-1, 1e1, 1 / 2)
    return cells * (share * ((1 + 4e-7) / 0.9) + 8 / 9)


@triton.jit
def _whole(place):
    """The whole part of places below 2^22, by the addition's rounding: a conversion takes four times as long."""
    return (place + CUTS).to(tl.int32, bitcast=True) & 0xFFFF


@triton.jit
def _step(
    Weight, Master, Grad, First, FirstScales, Second, SecondScales, Signed, Unsigned, Scale,
    count, lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    HAS_MASTER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = ROWS * BLOCK
    start = tl.program_id(0).to(tl.int64) * SIZE
    here = tl.arange(0, SIZE)
    inside = here < tl.minimum(count - start, SIZE).to(tl.int32)
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_block = block * BLOCK < count
    code = tl.arange(0, 256)
    first, second = First + start, Second + start
    g = tl.load(Grad + start + here, mask=inside, other=0.0).to(tl.float32) * tl.load(Scale)
    m = tl.gather(tl.load(Signed + code), tl.load(first + here, mask=inside, other=127).to(tl.int32), 0)
    v = tl.gather(tl.load(Unsigned + code), tl.load(second + here, mask=inside, other=0).to(tl.int32), 0)
    m = tl.reshape(m, (ROWS, BLOCK)) * tl.load(FirstScales + block, mask=first_block, other=0.0)[:, None]
    v = tl.reshape(v, (ROWS, BLOCK)) * tl.load(SecondScales + block, mask=first_block, other=0.0)[:, None]
    g = tl.reshape(g, (ROWS, BLOCK))
    m += (g - m) * (1 - beta1)
    v += (g * g - v) * (1 - beta2)
    update = tl.reshape(m * (1 / correction1) / (tl.sqrt(v * (1 / correction2)) + eps), (SIZE,))
    w = tl.load(Master + start + here, mask=inside, other=0.0).to(tl.float32)  # the weight where there is no master
    w = w * (1 - lr * weight_decay) - lr * update
    if HAS_MASTER:
        tl.store(Master + start + here, w, mask=inside)
    tl.store(Weight + start + here, w.to(Weight.dtype.element_ty), mask=inside)
    m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
    m_place = _place(tl.abs(m) * (1 / tl.maximum(m_scale, 1.1754943508222875e-38))[:, None], 0)
    v_place = _place(v * (1 / tl.maximum(v_scale, 1.1754943508222875e-38))[:, None], 1)
    number = _whole(m_place)
    m_code = tl.where(m < 0, 127 - tl.minimum(number, 127), 127 + number)  # -1 has no code
    v_code = _whole(tl.where(v > 0, tl.maximum(v_place, 2.5), 1.5)) - 1  # what is not zero stays so
    tl.store(first + here, tl.reshape(m_code.to(tl.uint8), (SIZE,)), mask=inside)
    tl.store(second + here, tl.reshape(v_code.to(tl.uint8), (SIZE,)), mask=inside)
    tl.store(FirstScales + block, m_scale, mask=first_block)
    tl.store(SecondScales + block, v_scale, mask=first_block)


def triton_step(
    weight: Tensor, master: Tensor | None, grad: Tensor, first: Moment, second: Moment, scale: Tensor, rates: Rates
) -> None:
    """`reference_step` in one pass over contiguous tensors."""
    tables = (table(signed, weight.device)[0] for signed in (True, False))
    _step[(triton.cdiv(weight.numel(), BLOCK * ROWS),)](
        weight, weight if master is None else master, grad, *first, *second, *tables, scale, weight.numel(), *rates,
        HAS_MASTER=master is not None, BLOCK=BLOCK, ROWS=ROWS, num_warps=2,
    )  # fmt: skip
