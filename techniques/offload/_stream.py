"""Blocks whose parameters live on the host and visit the device for as long as they compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dyno.techniques.offload._host import HostAdamW, HostState
from dyno.techniques.offload._side import Side


class Visitor:
    """One block: its parameters are views of one device buffer, whose memory is there only during a visit."""

    def __init__(self, block: nn.Module, home: Tensor, starts: list[int], device: torch.device):
        self.home, self.parameters = home, list(block.parameters())
        self.buffer = torch.empty(len(home), dtype=home.dtype, device=device)
        for parameter, start in zip(self.parameters, starts, strict=True):
            parameter.data = self.buffer[start : start + parameter.numel()].view(parameter.shape)
        self.waiting = len(self.parameters)  # gradients of this backward pass that have not come
        self.leave()

    @property
    def bytes(self) -> int:
        return len(self.home) * self.home.element_size()

    def leave(self) -> None:
        self.buffer.untyped_storage().resize_(0)


class Stream:
    """Brings each block before its forward and its backward pass, the next one meanwhile, and sends it away after.

    Hooks on the modules fire in forward passes and in recomputations alike; a hook on a block's output tells that its
    backward pass begins, the last of its gradients that it is over.
    """

    def __init__(self, blocks: list[nn.Module], visitors: list[Visitor], side: Side):
        self.visitors, self.side = visitors, side
        self.here: dict[int, Any] = {}  # block -> the mark behind its copy
        self.backward: int | None = None
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, i))
            block.register_forward_hook(partial(self._after_forward, i))
            for parameter in visitors[i].parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._gradient, i))

    def _fetch(self, i: int) -> None:
        """Memory comes from the stream that computes, so that it is free there in order; the copy is on the side."""
        if 0 <= i < len(self.visitors) and i not in self.here:
            visitor = self.visitors[i]
            visitor.buffer.untyped_storage().resize_(visitor.bytes)
            with self.side.after_compute():
                visitor.buffer.data.copy_(visitor.home, non_blocking=True)
            self.here[i] = self.side.event()

    def _use(self, i: int) -> None:
        self._fetch(i)
        self.side.compute_waits(self.here[i])

    def _drop(self, i: int) -> None:
        del self.here[i]
        self.visitors[i].leave()

    def _before_forward(self, i: int, *_: Any) -> None:
        self._use(i)
        if self.backward is None:
            self._fetch(i + 1)

    def _after_forward(self, i: int, block: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._before_backward, i))
        if i != self.backward:
            self._drop(i)

    def _before_backward(self, i: int, gradient: Tensor) -> None:
        self.backward = i
        self._use(i)
        self._fetch(i - 1)

    def _gradient(self, i: int, parameter: Tensor) -> None:
        visitor = self.visitors[i]
        visitor.waiting -= 1
        if visitor.waiting == 0:
            visitor.waiting = len(visitor.parameters)
            self.backward = None
            self._drop(i)


class StreamingAdamW(HostAdamW):
    """HostAdamW for a model whose blocks visit the device; their working copies on the host are in `dtype`.

    In fp32 the masters are the working copies. A narrower type is what autocast would make of the weights anyway, so
    the products are the same and half the bytes travel.
    """

    def __init__(self, model: Any, settings: dict[str, Any], state: Any, side: Side, dtype: torch.dtype):
        super().__init__(list(model.parameters()), settings, state, side)
        assert isinstance(self.flat, HostState)
        index = {id(p): i for i, p in enumerate(self.parameters)}
        self.homes: dict[int, Tensor] = {}
        visitors = []
        for block in model.blocks:
            members = [index[id(p)] for p in block.parameters()]
            first, last = members[0], members[-1]
            assert members == list(range(first, last + 1)), "a block's parameters lie side by side"
            begin, end = self.layout.starts[first], self.layout.slot(last).stop
            home = self.flat.master[begin:end]
            if dtype != torch.float32:
                narrow = side.host(end - begin, dtype)
                home = narrow.copy_(home)
            starts = [self.layout.starts[i] - begin for i in members]
            for i, start in zip(members, starts, strict=True):
                self.homes[i] = home[start : start + self.layout.sizes[i]]
            visitors.append(Visitor(block, home, starts, side.device))
        self.stream = Stream(list(model.blocks), visitors, side)

    def deliver(self, index: int, part: slice, values: Tensor) -> None:
        if index not in self.homes:
            super().deliver(index, part, values)
        elif self.homes[index].dtype != values.dtype:
            self.homes[index][part].copy_(values)
