"""The Triton version of `dyno.kernels._adamw.reference_step`, of many parameters in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._adamw import Operands, Rates
from dyno.kernels._tensor_lists import ELEMENTS, addresses, chunks, pointer

BLOCK = 1024  # numbers a program: more are slower (docs/LOG.md)


@triton.jit
def descended(w, m, v, lr, decay, eps, raise1, raise2):
    """A weight after a step by its moments, which are raised by what they lack for having begun at zero."""
    return w * decay - lr * (m * raise1 / (tl.sqrt(v * raise2) + eps))


@triton.jit
def _step(
    Addresses, Counts, Owners, Numbers, Scale,
    lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program steps one chunk of the parameter that owns it; without a master the weight stands in its place."""
    WIDE: tl.constexpr = tl.float32 if HAS_MASTER else ELEMENT
    owner = tl.load(Owners + tl.program_id(0))
    start = tl.load(Numbers + tl.program_id(0)).to(tl.int64) * BLOCK
    left = tl.minimum(tl.load(Counts + owner) - start, BLOCK).to(tl.int32)
    weight = pointer(Addresses, owner * 5, ELEMENT, ALIGNMENT) + start
    master = pointer(Addresses, owner * 5 + 1, WIDE, ALIGNMENT) + start
    grad = pointer(Addresses, owner * 5 + 2, GRADIENT, ALIGNMENT) + start
    first = pointer(Addresses, owner * 5 + 3, tl.float32, ALIGNMENT) + start
    second = pointer(Addresses, owner * 5 + 4, tl.float32, ALIGNMENT) + start
    scale = tl.load(Scale)
    decay, rate1, rate2 = 1 - lr * weight_decay, 1 - beta1, 1 - beta2
    raise1, raise2 = 1 / correction1, 1 / correction2
    i = tl.arange(0, BLOCK)
    if left == BLOCK:  # without a mask, so that a thread reads 16 bytes at a time
        _step_block(
            weight + i, master + i, grad + i, first + i, second + i, tl.full((BLOCK,), True, tl.int1), scale,
            lr, decay, rate1, rate2, eps, raise1, raise2, HAS_MASTER,
        )  # fmt: skip
    else:
        _step_block(
            weight + i, master + i, grad + i, first + i, second + i, i < left, scale,
            lr, decay, rate1, rate2, eps, raise1, raise2, HAS_MASTER,
        )  # fmt: skip


@triton.jit
def _step_block(
    weight, master, grad, first, second, inside, scale,
    lr, decay, rate1, rate2, eps, raise1, raise2, HAS_MASTER: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * scale
    m = tl.load(first, mask=inside, other=0.0)
    v = tl.load(second, mask=inside, other=0.0)
    w = tl.load(master, mask=inside, other=0.0).to(tl.float32)
    m += (g - m) * rate1
    v += (g * g - v) * rate2
    w = descended(w, m, v, lr, decay, eps, raise1, raise2)
    tl.store(first, m, mask=inside)
    tl.store(second, v, mask=inside)
    if HAS_MASTER:
        tl.store(master, w, mask=inside)
    tl.store(weight, w.to(weight.dtype.element_ty), mask=inside)


def triton_step(items: Sequence[Operands], scale: Tensor, rates: Rates) -> None:
    """`reference_step` of parameters of the same types on one device, in one pass."""
    rows = [(o.weight, o.weight if o.master is None else o.master, o.grad, o.first, o.second) for o in items]
    weight, _, grad, _, _ = rows[0]
    each = chunks(tuple(o.weight.numel() for o in items), BLOCK, weight.device)
    places, alignment = addresses(rows)
    _step[(len(each.owners),)](
        places, *each, scale, *rates, ELEMENT=ELEMENTS[weight.dtype], GRADIENT=ELEMENTS[grad.dtype],
        HAS_MASTER=items[0].master is not None, ALIGNMENT=alignment, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
