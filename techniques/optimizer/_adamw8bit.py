"""The optimizer of `adamw8bit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dyno.kernels._adamw8bit import Moment, Rates, empty_moment, step
from dyno.stages.shards import local


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of 2.03 bytes a parameter; blocks are of this rank's part where parameters are sharded."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, grad, state = local(p).view(-1), local(p.grad).reshape(-1), self.state[p]
                if not state:
                    state["step"] = 0
                    state["m_codes"], state["m_scales"] = empty_moment(weight.numel(), True, weight.device)
                    state["v_codes"], state["v_scales"] = empty_moment(weight.numel(), False, weight.device)
                state["step"] += 1
                rates = Rates.of(group, state["step"])
                if weight.numel():  # a rank may hold nothing of a small parameter
                    first = Moment(state["m_codes"], state["m_scales"])
                    step(weight, grad, first, Moment(state["v_codes"], state["v_scales"]), rates)
