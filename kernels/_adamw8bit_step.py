"""The Triton version of `dyno.kernels._adamw8bit.reference_step`, of many parameters in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._adamw import Operands, Rates
from dyno.kernels._adamw8bit import BLOCK, table
from dyno.kernels._adamw_step import descended
from dyno.kernels._tensor_lists import ELEMENTS, addresses, chunks, pointer

ROWS = 2  # blocks at a time
TURNS = 4  # times a program
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
    Addresses, Counts, Owners, Numbers, Signed, Unsigned, Scale,
    lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """A program steps one chunk of the parameter that owns it; without a master the weight stands in its place."""
    SIZE: tl.constexpr = ROWS * BLOCK
    WIDE: tl.constexpr = tl.float32 if HAS_MASTER else ELEMENT
    owner = tl.load(Owners + tl.program_id(0))
    start = tl.load(Numbers + tl.program_id(0)).to(tl.int64) * (SIZE * TURNS)
    left = tl.minimum(tl.load(Counts + owner) - start, SIZE * TURNS).to(tl.int32)
    weight = pointer(Addresses, owner * 7, ELEMENT, ALIGNMENT) + start
    master = pointer(Addresses, owner * 7 + 1, WIDE, ALIGNMENT) + start
    grad = pointer(Addresses, owner * 7 + 2, GRADIENT, ALIGNMENT) + start
    first = pointer(Addresses, owner * 7 + 3, tl.uint8, ALIGNMENT) + start
    second = pointer(Addresses, owner * 7 + 5, tl.uint8, ALIGNMENT) + start
    first_scales = pointer(Addresses, owner * 7 + 4, tl.float32, ALIGNMENT) + start // BLOCK
    second_scales = pointer(Addresses, owner * 7 + 6, tl.float32, ALIGNMENT) + start // BLOCK
    code = tl.arange(0, 256)
    signed, unsigned, scale = tl.load(Signed + code), tl.load(Unsigned + code), tl.load(Scale)
    decay, rate1, rate2 = 1 - lr * weight_decay, 1 - beta1, 1 - beta2
    raise1, raise2 = 1 / correction1, 1 / correction2
    if left == SIZE * TURNS:  # without a mask, so that a thread reads 16 bytes at a time
        for turn in range(TURNS):
            i, block = turn * SIZE + tl.arange(0, SIZE), turn * ROWS + tl.arange(0, ROWS)
            _step_rows(
                weight + i, master + i, grad + i, first + i, first_scales + block, second + i, second_scales + block,
                tl.full((SIZE,), True, tl.int1), tl.full((ROWS,), True, tl.int1), signed, unsigned, scale,
                lr, decay, rate1, rate2, eps, raise1, raise2, HAS_MASTER, BLOCK, ROWS,
            )  # fmt: skip
    else:
        for turn in range(tl.cdiv(left, SIZE)):
            i, block = turn * SIZE + tl.arange(0, SIZE), turn * ROWS + tl.arange(0, ROWS)
            _step_rows(
                weight + i, master + i, grad + i, first + i, first_scales + block, second + i, second_scales + block,
                i < left, block * BLOCK < left, signed, unsigned, scale,
                lr, decay, rate1, rate2, eps, raise1, raise2, HAS_MASTER, BLOCK, ROWS,
            )  # fmt: skip


@triton.jit
def _step_rows(
    weight, master, grad, first, first_scale, second, second_scale, inside, begun, signed, unsigned, scale,
    lr, decay, rate1, rate2, eps, raise1, raise2,
    HAS_MASTER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = ROWS * BLOCK
    # All that is read is asked for before anything is computed: what is read where it is used is waited for (docs/LOG.md).
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * scale
    w = tl.load(master, mask=inside, other=0.0).to(tl.float32)
    m_code = tl.load(first, mask=inside, other=127).to(tl.int32)
    v_code = tl.load(second, mask=inside, other=0).to(tl.int32)
    m_scale, v_scale = tl.load(first_scale, mask=begun, other=0.0), tl.load(second_scale, mask=begun, other=0.0)
    g, w = tl.reshape(g, (ROWS, BLOCK)), tl.reshape(w, (ROWS, BLOCK))
    m = tl.reshape(tl.gather(signed, m_code, 0), (ROWS, BLOCK)) * m_scale[:, None]
    v = tl.reshape(tl.gather(unsigned, v_code, 0), (ROWS, BLOCK)) * v_scale[:, None]
    m += (g - m) * rate1
    v += (g * g - v) * rate2
    w = tl.reshape(descended(w, m, v, lr, decay, eps, raise1, raise2), (SIZE,))
    if HAS_MASTER:
        tl.store(master, w, mask=inside)
    tl.store(weight, w.to(weight.dtype.element_ty), mask=inside)
    m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
    m_place = _place(tl.abs(m) * (1 / tl.maximum(m_scale, 1.1754943508222875e-38))[:, None], 0)
    v_place = _place(v * (1 / tl.maximum(v_scale, 1.1754943508222875e-38))[:, None], 1)
    number = _whole(m_place)
    m_code = tl.where(m < 0, 127 - tl.minimum(number, 127), 127 + number)  # -1 has no code
    v_code = _whole(tl.where(v > 0, tl.maximum(v_place, 2.5), 1.5)) - 1  # what is not zero stays so
    tl.store(first, tl.reshape(m_code.to(tl.uint8), (SIZE,)), mask=inside)
    tl.store(second, tl.reshape(v_code.to(tl.uint8), (SIZE,)), mask=inside)
    tl.store(first_scale, m_scale, mask=begun)
    tl.store(second_scale, v_scale, mask=begun)


def triton_step(items: Sequence[Operands], scale: Tensor, rates: Rates) -> None:
    """`reference_step` of parameters of the same types on one device, in one pass."""
    rows = [(o.weight, o.weight if o.master is None else o.master, o.grad, *o.first, *o.second) for o in items]
    weight, _, grad, *_ = rows[0]
    tables = (table(signed, weight.device)[0] for signed in (True, False))
    each = chunks(tuple(o.weight.numel() for o in items), BLOCK * ROWS * TURNS, weight.device)
    places, alignment = addresses(rows)
    _step[(len(each.owners),)](
        places, *each, *tables, scale, *rates, ELEMENT=ELEMENTS[weight.dtype], GRADIENT=ELEMENTS[grad.dtype],
        HAS_MASTER=items[0].master is not None, ALIGNMENT=alignment, BLOCK=BLOCK, ROWS=ROWS, TURNS=TURNS, num_warps=2,
    )  # fmt: skip
