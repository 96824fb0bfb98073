"""An optimizer that steps in fp32 for a model whose weights are in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyno.stages.shards import local
from dyno.techniques.precision.bf16_weights import CHUNK, PIECE


class WideOptimizer(torch.optim.Optimizer):
    """The optimizer that `make(model, lr)` builds, made for fp32 stand-ins of the model's 16-bit parameters.

    With `rounding` None the stand-ins stay: they are the master weights, and the model's are rounded from them. With a
    rounding they exist only while their chunk of parameters steps: fp32 values come from the 16-bit weights, and go
    back through rounding(values). A chunk is one step() of the inner optimizer with all other gradients None, which
    every optimizer skips. Sharded parameters (DTensor) have sharded stand-ins.

    Source: Micikevicius et al. 2018, arXiv:1710.03740 (masters).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        make: Callable[[nn.Module, float], torch.optim.Optimizer],
        rounding: Callable[[Tensor], Tensor] | None = None,
    ):
        self.rounding = rounding
        wide = {p: nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in model.parameters()}
        with standing_in(model, wide):
            self.inner = make(model, lr)
        narrow = {w: p for p, w in wide.items()}
        groups = [{**g, "params": [narrow[w] for w in g["params"]]} for g in self.inner.param_groups]
        super().__init__(groups, {})
        self.state, self.wide = self.inner.state, wide
        self.chunks = chunked([(narrow[w], w) for g in self.inner.param_groups for w in g["params"]])
        if rounding is not None:
            for w in wide.values():
                local(w).untyped_storage().resize_(0)

    def kept(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What a checkpoint has of a parameter: the inner optimizer's state, and the master if there is one."""
        wide = self.wide[parameter]
        masters = {"master": wide} if self.rounding is None else {}
        return {**self.inner.state.get(wide, {}), **masters}

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter, values: dict[str, Any], master: Tensor) -> None:
        wide = self.wide[parameter]
        self.inner.state[wide] = values
        if self.rounding is None:
            local(wide).copy_(local(master))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({k: v for k, v in mine.items() if k != "params"})  # a schedule may have moved the rate
        for chunk in self.chunks:
            for p, w in chunk:
                if self.rounding is not None:
                    local(w).untyped_storage().resize_(4 * local(w).numel())
                    local(w).copy_(local(p))
                w.grad = None if p.grad is None else p.grad.float()
            self.inner.step()
            for p, w in chunk:
                w.grad = None
                if self.rounding is None:
                    local(p).copy_(local(w))
                else:
                    local(p).copy_(self.rounding(local(w)))
                    local(w).untyped_storage().resize_(0)


Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def widened(make: Make, rounding: Callable[[Tensor], Tensor] | None = None) -> Make:
    """`make` for 16-bit parameters; as it is where its optimizers keep masters of their own (`make.keeps_masters`)."""
    if rounding is None and getattr(make, "keeps_masters", False):
        return make
    return lambda model, lr: WideOptimizer(model, lr, make, rounding)


@contextmanager
def standing_in(model: nn.Module, others: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Other parameters in the places of the model's own."""
    places = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None
    ]
    for module, name, p in places:
        module._parameters[name] = others[p]
    try:
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p


def chunked(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> list[list[tuple[nn.Parameter, nn.Parameter]]]:
    """The pairs in order, cut so that a chunk has CHUNK elements at most, or one parameter."""
    chunks: list[list[tuple[nn.Parameter, nn.Parameter]]] = []
    size = CHUNK
    for pair in pairs:
        count = local(pair[0]).numel()
        if size + count > CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(pair)
        size += count
    return chunks


class StochasticRounding:
    """fp32 -> bf16 up or down with probabilities that make the mean exact; seeded, the same draws on every rank.

    bf16 is the upper half of fp32, so integer noise in [0, 2^16) is added to the bits and the lower half cut off: a
    carry happens with the probability that the lower half says. Values of bf16 stay as they are.
    Source: Gupta et al. 2015, arXiv:1502.02551.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        generator = self.generators[x.device]
        out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        for values, to in zip(x.reshape(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
            bits = torch.randint(2**16, values.shape, generator=generator, dtype=torch.int32, device=x.device)
            bits.add_(values.view(torch.int32)).bitwise_and_(~0xFFFF)
            to.copy_(torch.where(values.isfinite(), bits.view(torch.float32), values))
        return out
