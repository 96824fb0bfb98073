"""The optimizer of `adamw_single_pass`, and the clipping that it takes part in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyno.kernels._adamw import clip_scale, step
from dyno.kernels._adamw8bit import Rates


class SinglePassAdamW(torch.optim.Optimizer):
    """AdamW that reads and writes everything once: the gradient is scaled to the clipped norm while it is used, and a
    parameter in 16 bits is written beside its fp32 master, which lies in the state."""

    state_of = "adamw"  # a checkpoint of either goes on under the other

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        self.scale: Tensor | None = None  # what gradients are multiplied by: of the last clip

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of the gradients together; the next step takes them with at most `max_norm`."""
        norm, self.scale = clip_scale([p.grad for p in parameters if p.grad is not None], max_norm)
        return norm

    def restore(self, parameter: nn.Parameter, values: dict[str, Any], master: Tensor) -> None:
        """A checkpoint's word on a parameter."""
        masters = {} if parameter.dtype == torch.float32 else {"master": master.float()}
        self.state[parameter] = {**values, **masters}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in "mv")
                    if p.dtype != torch.float32:
                        state["master"] = p.float()
                state["step"] += 1
                if self.scale is None:  # nothing was clipped yet
                    self.scale = torch.ones((), device=p.device)
                moments = state["exp_avg"], state["exp_avg_sq"]
                rates = Rates.of(group, state["step"])
                step(p, state.get("master"), p.grad.contiguous(), *moments, self.scale, rates)
