"""One AdamW step of parameters whose gradients are clipped on the way and whose masters may be wider than themselves.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyno.kernels import triton_missing


class Rates(NamedTuple):
    """The numbers of one step; the corrections are 1 - beta^t."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correction1: float
    correction2: float

    @classmethod
    def of(cls, group: Mapping[str, Any], step: int) -> Rates:
        """Those of an optimizer's parameter group at its step, counted from 1."""
        beta1, beta2 = group["betas"]
        return cls(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], 1 - beta1**step, 1 - beta2**step)


class Operands(NamedTuple):
    """What a step reads and writes of one parameter, all contiguous: n numbers, moments as their kind keeps them.

    The weight is fp32 or of 16 bits, on a CPU of any float type; with a master, which is fp32, it is its rounding.
    """

    weight: Tensor
    master: Tensor | None
    grad: Tensor
    first: Any
    second: Any


def reference_step(
    weight: Tensor, master: Tensor | None, grad: Tensor, first: Tensor, second: Tensor, scale: Tensor, rates: Rates
) -> None:
    """Update in place: weight (n,) of any float type; master, where there is one, and moments (n,) fp32.

    The gradient (n,) counts `scale` (a scalar on the device) times. With a master the weight is its rounding.
    """
    g = grad.float() * scale
    first.lerp_(g, 1 - rates.beta1)
    second.lerp_(g * g, 1 - rates.beta2)
    descend(weight, master, first, second, rates)


def descend(weight: Tensor, master: Tensor | None, first: Tensor, second: Tensor, rates: Rates) -> None:
    """Step by new moments: the master, where there is one, and the weight, then its rounding."""
    update = first / rates.correction1 / ((second / rates.correction2).sqrt() + rates.eps)
    wide = weight.float() if master is None else master
    wide = wide * (1 - rates.lr * rates.weight_decay) - rates.lr * update
    if master is not None:
        master.copy_(wide)
    weight.copy_(wide)


def step(items: Sequence[Operands], scale: Tensor, rates: Rates) -> None:
    """`reference_step` of each, on a GPU in one pass over memory and one launch for all of a kind."""
    step_kinds(items, scale, rates, _by_triton, reference_step)


def _by_triton(items: Sequence[Operands], scale: Tensor, rates: Rates) -> None:
    from dyno.kernels._adamw_step import triton_step

    triton_step(items, scale, rates)


def step_kinds(
    items: Sequence[Operands], scale: Tensor, rates: Rates, together: Callable[..., None], each: Callable[..., None]
) -> None:
    """Those of a kind together where Triton compiles for their device, each by itself elsewhere."""
    for kind in alike(items):
        if kind[0].weight.is_cuda and triton_missing(kind[0].weight.device) is None:
            together(kind, scale, rates)
        else:
            for item in kind:
                each(*item, scale, rates)


def alike(items: Sequence[Operands]) -> list[list[Operands]]:
    """Those of the same types on the same device together; those of nothing, as a rank may hold, left out."""
    kinds: dict[Any, list[Operands]] = {}
    for item in items:
        if item.weight.numel():
            kind = item.weight.device, item.weight.dtype, item.grad.dtype, item.master is None
            kinds.setdefault(kind, []).append(item)
    return list(kinds.values())


def clip_scale(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """(norm of all gradients together, what they are to be multiplied by to have at most `max_norm`), on the device."""
    total = norm(grads)
    return total, (max_norm / (total + 1e-6)).clamp(max=1.0)


def norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all numbers together, fp32 (); on a GPU in one pass and one launch over tensors of one kind."""
    if tensors[0].is_cuda and triton_missing(tensors[0].device) is None:
        from dyno.kernels._square_sums import adds_up, square_sum

        if adds_up(tensors):
            return square_sum(tensors).sqrt()
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)))
