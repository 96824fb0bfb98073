"""The optimizer of `muon`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dyno.stages.shards import adamw, like, local, whole
from dyno.techniques.optimizer.update_rules import BATCH

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that is steep at 0 and stays near 1: singular values to 0.7-1.2


def orthogonalise(x: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """U V' of x = U S V', matrices (..., R, C), by Newton-Schulz iterations in `dtype`; singular values about 1."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for `matrices`; AdamW for `rest`. Both share a learning rate.

    An orthogonal (R, C) matrix times 0.2 sqrt(max(R, C)) has elements as large as AdamW's usual updates (Liu et al.
    2025, arXiv:2502.16982). Sharded matrices are gathered, and orthogonalised on every rank.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], rest: Iterable[nn.Parameter], lr: float, momentum: float,
        iterations: int, betas: tuple[float, float], weight_decay: float,
    ):  # fmt: skip
        self.adamw = adamw(rest, lr, betas, weight_decay)
        group = {"params": list(matrices), "momentum": momentum, "iterations": iterations}
        super().__init__([group], {"lr": lr, "weight_decay": weight_decay})
        self.param_groups += self.adamw.param_groups  # one dictionary, two owners: a schedule reaches both
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.adamw.step()
        group = self.param_groups[0]
        for batch in batches([p for p in group["params"] if p.grad is not None]):
            updates = torch.stack([whole(self.nesterov(p, group["momentum"])) for p in batch])
            dtype = torch.bfloat16 if updates.is_cuda else torch.float32
            updates = orthogonalise(updates, group["iterations"], dtype)
            scale = group["lr"] * 0.2 * max(updates.shape[-2:]) ** 0.5
            for p, update in zip(batch, updates, strict=True):
                weight = local(p)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(local(like(update.contiguous(), p)).to(weight.dtype), alpha=-scale)

    def nesterov(self, p: nn.Parameter, momentum: float) -> Any:
        """The look-ahead of the momentum, which takes in the gradient."""
        grad, state = p.grad, self.state[p]
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        state["momentum"].lerp_(grad, 1 - momentum)
        return grad.lerp(state["momentum"], momentum)


def batches(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape together, BATCH elements at most or one parameter."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for p in parameters:
        shapes.setdefault(p.shape, []).append(p)
    for shape, alike in shapes.items():
        size = max(1, BATCH // shape.numel())
        for first in range(0, len(alike), size):
            yield alike[first : first + size]
