"""The Triton version of `dyno.kernels._adamw.reference_step`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._adamw import Rates

BLOCK = 1024  # numbers a program


@triton.jit
def _step(
    Weight, Master, Grad, First, Second, Scale,
    count, lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    HAS_MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(Grad + i, mask=inside, other=0.0).to(tl.float32) * tl.load(Scale)
    m = tl.load(First + i, mask=inside, other=0.0)
    v = tl.load(Second + i, mask=inside, other=0.0)
    m += (g - m) * (1 - beta1)
    v += (g * g - v) * (1 - beta2)
    w = tl.load(Master + i, mask=inside, other=0.0).to(tl.float32)  # the weight itself where there is no master
    w = w * (1 - lr * weight_decay) - lr * (m / correction1 / (tl.sqrt(v / correction2) + eps))
    tl.store(First + i, m, mask=inside)
    tl.store(Second + i, v, mask=inside)
    if HAS_MASTER:
        tl.store(Master + i, w, mask=inside)
    tl.store(Weight + i, w.to(Weight.dtype.element_ty), mask=inside)


def triton_step(
    weight: Tensor, master: Tensor | None, grad: Tensor, first: Tensor, second: Tensor, scale: Tensor, rates: Rates
) -> None:
    """`reference_step` in one pass over contiguous tensors."""
    _step[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, weight if master is None else master, grad, first, second, scale, weight.numel(), *rates,
        HAS_MASTER=master is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
