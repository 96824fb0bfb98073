"""Head and cross-entropy in one: the mean loss of hidden states, its gradients, without all logits in memory.

Shapes: N tokens, E hidden, V vocabulary. `hidden` is (N, E), `weight` (V, E) in the same or a wider type, `targets` (N,)
with IGNORE where a token has none. The loss is the mean over the tokens that have one, in nats, 0 when none has.
Products are in the type of `hidden`, softmax and sums in fp32, gradients in the types of their tensors.

`full_loss` is the specification. `chunked_loss` makes the logits of some rows at a time, again in the backward pass.
`fused_loss` makes each chunk once: a Triton kernel overwrites its logits with their gradient, and both products of the
backward follow at once (the order of work of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989). Gradients are kept
unscaled until the backward pass, so that loss scaling reaches them before 16 bits do.

The benchmark's functions return the gradient of `hidden`, which holds every step of the way but one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import Unsupported
from dyno.kernels import triton_missing

IGNORE = -100
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean loss, all logits at once."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return total / counted(targets)


def counted(targets: Tensor) -> Tensor:
    """How many tokens have a target, at least 1."""
    return (targets != IGNORE).sum().clamp(min=1)


class _Chunked(torch.autograd.Function):
    """Keeps the log-sum-exp of every row; the backward makes the logits anew."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        narrow, sums = weight.to(hidden.dtype), []
        total = torch.zeros((), device=hidden.device)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = F.linear(h, narrow).float()
            sums.append(logits.logsumexp(-1))
            picked = logits.gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + torch.where(t != IGNORE, sums[-1] - picked, 0.0).sum()
        ctx.save_for_backward(hidden, weight, targets, torch.cat(sums))
        ctx.rows = rows
        return total / counted(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, sums = ctx.saved_tensors
        narrow, parts = weight.to(hidden.dtype), []
        scale = grad / counted(targets)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for h, t, s in zip(*(x.split(ctx.rows) for x in (hidden, targets, sums)), strict=True):
            slope = (F.linear(h, narrow).float() - s.unsqueeze(-1)).exp()
            slope = slope.scatter_add(-1, t.clamp(min=0).unsqueeze(-1), -torch.ones_like(s).unsqueeze(-1))
            slope = torch.where((t != IGNORE).unsqueeze(-1), slope, 0.0).to(hidden.dtype)
            parts.append(((slope @ narrow) * scale).to(hidden.dtype))
            d_weight = d_weight + slope.t() @ h
        return torch.cat(parts), (d_weight * scale).to(weight.dtype), None, None


@torch.library.custom_op("dyno::linear_cross_entropy", mutates_args=())
def _fused(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients: of hidden in its type, of weight in `sums_dtype`."""
    from dyno.kernels._cross_entropy import losses_and_slopes

    narrow = weight.to(hidden.dtype)
    total = torch.zeros((), device=hidden.device)
    if sums_dtype(hidden, weight, rows) == torch.bfloat16:  # nothing to add up
        slopes = F.linear(hidden, narrow)
        total += losses_and_slopes(slopes, targets).sum()
        return total, slopes @ narrow, slopes.t() @ hidden
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for h, t, d in zip(hidden.split(rows), targets.split(rows), d_hidden.split(rows), strict=True):
        slopes = F.linear(h, narrow)
        total += losses_and_slopes(slopes, t).sum()
        torch.mm(slopes, narrow, out=d)
        if slopes.is_cuda and slopes.dtype != torch.float32:  # fp32 sums of 16-bit products, in place
            torch.addmm(d_weight, slopes.t(), h, out_dtype=torch.float32, out=d_weight)
        else:
            d_weight.addmm_(slopes.t().float(), h.float())
    return total, d_hidden, d_weight


@_fused.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.float32)
    return total, torch.empty_like(hidden), torch.empty_like(weight, dtype=sums_dtype(hidden, weight, rows))


def sums_dtype(hidden: Tensor, weight: Tensor, rows: int) -> torch.dtype:
    """What the unscaled gradient of the weight waits in: fp32, but for one chunk in bf16, which has fp32's range."""
    one = hidden.shape[0] <= rows and weight.dtype == hidden.dtype == torch.bfloat16
    return torch.bfloat16 if one else torch.float32


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        total, d_hidden, d_weight = _fused(hidden, weight, targets, rows)
        count = counted(targets)
        ctx.save_for_backward(d_hidden, d_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, count = ctx.saved_tensors
        scale = grad / count
        return (d_hidden * scale).to(d_hidden.dtype), (d_weight * scale).to(ctx.weight_dtype), None, None


def _whole(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    if hasattr(weight, "placements"):
        raise Unsupported("this loss takes the whole head; its weight is split over ranks (tensor parallel)")
    with torch.autocast(hidden.device.type, enabled=False):
        return function.apply(hidden.contiguous(), weight, targets, rows)


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 2048) -> Tensor:
    """Mean loss with the logits of `rows` tokens in memory at a time, made twice in plain PyTorch."""
    return _whole(_Chunked, hidden, weight, targets, rows)


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 2048) -> Tensor:
    """Mean loss with the logits of `rows` tokens in memory at a time, made once; the gradients come with the loss."""
    return _whole(_Fused, hidden, weight, targets, rows)


def hidden_gradient(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The gradient of `hidden` (N, E); the loss and the gradient of `weight` are computed too."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(loss(*leaves, targets), leaves)[0]


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The specification: the gradient of `full_loss` in fp32 throughout, rounded at the end."""
    return hidden_gradient(full_loss, hidden.float(), weight.float(), targets).to(hidden.dtype)


@dataclass(frozen=True)
class LossShape:
    """One problem of the benchmark; sizes as in the module's text."""

    tokens: int
    hidden: int
    vocab: int

    @property
    def name(self) -> str:
        return f"n{self.tokens}_e{self.hidden}_v{self.vocab}"


def cases(device: torch.device | str) -> Iterator[LossShape]:
    """Heads of models on a GPU, awkward small ones on a CPU."""
    gpu = [(8192, 768, 50304), (16384, 2048, 128256), (8192, 4096, 128256)]
    for sizes in gpu if torch.device(device).type == "cuda" else [(5, 24, 61), (123, 40, 1031)]:
        yield LossShape(*sizes)


def inputs(shape: LossShape, device: torch.device | str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Keyword arguments of an implementation: logits of unit variance, every 16th token without a target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator) * shape.hidden**-0.5
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator)
    targets[::16] = IGNORE
    return {"hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype), "targets": targets.to(device)}


def implementations(device: torch.device | str) -> dict[str, Callable[..., Tensor]]:
    """What can run there, by name, each called with `**inputs(...)`."""
    losses: dict[str, Loss] = {"full": full_loss, "chunked": chunked_loss}
    if triton_missing(device) is None:
        losses["triton"] = fused_loss
    found: dict[str, Callable[..., Tensor]] = {"reference": reference}
    return found | {name: partial(hidden_gradient, loss) for name, loss in losses.items()}


def flops(shape: LossShape) -> float:
    """Three products; what a version computes twice is not counted."""
    return 6.0 * shape.tokens * shape.hidden * shape.vocab


def bytes(shape: LossShape, element_bytes: int = 2) -> float:
    """Least traffic: hidden states and weight read once, their gradients written once."""
    return 2.0 * element_bytes * shape.hidden * (shape.tokens + shape.vocab)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """`atol` and `rtol` of torch.testing.assert_close against the reference."""
    return {
        torch.float32: {"atol": 1e-7, "rtol": 1e-4},
        torch.float16: {"atol": 1e-3, "rtol": 1e-2},
        torch.bfloat16: {"atol": 5e-3, "rtol": 3e-2},
    }[dtype]
