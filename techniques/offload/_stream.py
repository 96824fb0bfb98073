"""Blocks whose parameters live on the host and visit the device for as long as they compute."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dyno import host_memory
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
        self.visiting = {id(p) for p in model.blocks.parameters()}
        super().__init__(list(model.parameters()), settings, state, side)
        assert isinstance(self.flat, HostState)
        index = {id(p): i for i, p in enumerate(self.parameters)}
        members = [[index[id(p)] for p in block.parameters()] for block in model.blocks]
        first, last = members[0][0], members[-1][-1]
        assert sum(members, []) == list(range(first, last + 1)), "the blocks' parameters lie side by side"
        begin, end = self.layout.starts[first], self.layout.slot(last).stop
        homes = self.flat.master[begin:end]
        if dtype == torch.float32:
            self.flat.pin(slice(None))
        else:  # of the masters only those outside the blocks travel
            homes = side.pin(host_memory.zeros(end - begin, dtype).copy_(homes))
            self.flat.pin(slice(begin))
            self.flat.pin(slice(end, None))
        self.homes: dict[int, Tensor] = {}
        visitors = []
        for block, inside in zip(model.blocks, members, strict=True):
            slots = [self.layout.slot(i) for i in inside]
            home = homes[slots[0].start - begin : slots[-1].stop - begin]
            starts = [slot.start - slots[0].start for slot in slots]
            for i, slot in zip(inside, slots, strict=True):
                self.homes[i] = homes[slot.start - begin : slot.stop - begin]
            visitors.append(Visitor(block, home, starts, side.device))
        self.stream = Stream(list(model.blocks), visitors, side)

    def fill(self) -> None:
        """The blocks' parameters move into the masters one by one, so that they are never there twice."""
        assert isinstance(self.flat, HostState)
        for index, parameter in enumerate(self.parameters):
            master = self.flat.master[self.layout.slot(index)]
            host_memory.fetch(master, parameter.detach().reshape(-1))
            if id(parameter) in self.visiting:
                parameter.data = master.view(parameter.shape)

    def deliver(self, index: int, part: slice, values: Tensor) -> None:
        if index not in self.homes:
            super().deliver(index, part, values)
        elif self.homes[index].dtype != values.dtype:
            self.homes[index][part].copy_(values)
