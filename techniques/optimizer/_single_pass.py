"""Optimizers that read and write everything once, and the clipping that they take part in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dyno.kernels import _adamw, _adamw8bit
from dyno.kernels._adamw import Operands, Rates
from dyno.kernels._adamw8bit import Moment, empty_moment
from dyno.stages.shards import local


class SinglePass(torch.optim.Optimizer, ABC):
    """An optimizer that steps all parameters of the same rates at once, which are all but for a late one.

    The gradient is scaled to the clipped norm while it is used, and a parameter in 16 bits is written beside its fp32
    master, which lies in the state. Sharded parameters step by this rank's parts; their norm is clipped before.
    """

    kernel: ModuleType  # whose `step` it is

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        device = self.param_groups[0]["params"][0].device
        self.scale = torch.ones((), device=device)  # what gradients are multiplied by: of the last clip

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of the gradients together; the next step takes them with at most `max_norm`."""
        norm, self.scale = _adamw.clip_scale([p.grad for p in parameters if p.grad is not None], max_norm)
        return norm

    def restore(self, parameter: nn.Parameter, values: dict[str, Any], master: Tensor) -> None:
        """A checkpoint's word on a parameter."""
        masters = {} if parameter.dtype == torch.float32 else {"master": local(master).float()}
        self.state[parameter] = {**values, **masters, "step": int(values["step"])}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        items: dict[Rates, list[Operands]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, state = local(p), self.state[p]
                if not state:
                    state["step"] = 0
                    state |= self.moments(weight)
                    if weight.dtype != torch.float32:
                        state["master"] = weight.float()
                state["step"] += 1
                item = Operands(weight, state.get("master"), local(p.grad).contiguous(), *self.both(state))
                items[Rates.of(group, state["step"])].append(item)
        for rates, together in items.items():
            self.kernel.step(together, self.scale, rates)

    @abstractmethod
    def moments(self, weight: Tensor) -> dict[str, Tensor]:
        """Those of a parameter before its first step, as its state names them."""

    @abstractmethod
    def both(self, state: dict[str, Any]) -> tuple[Any, Any]:
        """Both moments of a parameter's state, as the kernel takes them."""


class SinglePassAdamW(SinglePass):
    """The optimizer of `adamw_single_pass`."""

    kernel = _adamw
    state_of = "adamw"  # a checkpoint of either goes on under the other

    def moments(self, weight: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    def both(self, state: dict[str, Any]) -> tuple[Any, Any]:
        return state["exp_avg"], state["exp_avg_sq"]


class AdamW8bit(SinglePass):
    """The optimizer of `adamw8bit`: moments of 2.03 bytes a parameter, in blocks of a rank's part."""

    kernel = _adamw8bit

    def moments(self, weight: Tensor) -> dict[str, Tensor]:
        first, second = (empty_moment(weight.numel(), signed, weight.device) for signed in (True, False))
        return {"m_codes": first.codes, "m_scales": first.scales, "v_codes": second.codes, "v_scales": second.scales}

    def both(self, state: dict[str, Any]) -> tuple[Any, Any]:
        return Moment(state["m_codes"], state["m_scales"]), Moment(state["v_codes"], state["v_scales"])
