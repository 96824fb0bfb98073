"""AdamW on the host: fp32 masters and moments outside the device, gradients streamed out, parameters streamed back.

Papers: Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840; Rajbhandari et al. 2021, ZeRO-Infinity, arXiv:2104.07857.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dyno import host_memory
from dyno.errors import Unsupported
from dyno.techniques.offload._side import Side, host_waits

ALIGN = 64  # numbers at whose multiples a parameter begins in the flat buffers


class State(Protocol):
    """Masters and moments of all parameters, flat in fp32, in pieces of bounded size."""

    def sweep(self, settle: Callable[[], None]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(start, master, first moment, second moment) piece by piece; what the caller writes into them is kept.

        settle: waits until the caller's copies out of earlier pieces are done, so that their memory may be used again.
        """
        ...

    def pin(self, part: slice) -> None:
        """These masters, now filled, are what `deliver` copies to the device."""
        ...


class HostState:
    """State in host memory. Most of it never leaves, so that only what is asked for is pinned."""

    def __init__(self, numbers: int, chunk: int, side: Side):
        self.side, self.chunk = side, chunk
        self.master, self.first, self.second = (host_memory.zeros(numbers) for _ in range(3))

    def pin(self, part: slice) -> None:
        self.side.pin(self.master[part])

    def sweep(self, settle: Callable[[], None]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for start in range(0, len(self.master), self.chunk):
            end = start + self.chunk
            yield start, self.master[start:end], self.first[start:end], self.second[start:end]


class Layout:
    """Where each parameter lies in the flat buffers."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.starts, self.numbers = [], 0
        for parameter in parameters:
            self.starts.append(self.numbers)
            self.numbers += -(-parameter.numel() // ALIGN) * ALIGN
        self.sizes = [parameter.numel() for parameter in parameters]

    def slot(self, index: int) -> slice:
        return slice(self.starts[index], self.starts[index] + self.sizes[index])

    def within(self, start: int, end: int) -> Iterator[tuple[int, slice, slice]]:
        """The parameters in a piece: (index, their part, its place in the piece)."""
        for index in range(max(0, bisect_right(self.starts, start) - 1), bisect_left(self.starts, end)):
            first = self.starts[index]
            low, high = max(first, start), min(first + self.sizes[index], end)
            if low < high:
                yield index, slice(low - first, high - first), slice(low - start, high - start)


def adamw_settings(make: Callable[[nn.Module, float], torch.optim.Optimizer], lr: float) -> dict[str, Any]:
    """The settings of the rule that would have stepped on the device.

    An optimizer that keeps masters for narrow weights names what it wraps `inner`; masters are kept here anyway.

    Raises:
        Unsupported: the rule is not AdamW, or the weights have no masters.
    """
    rule = make(nn.Linear(1, 1), lr)
    inner = getattr(rule, "inner", rule)
    if type(inner) is not torch.optim.AdamW or getattr(rule, "rounding", None) is not None:
        raise Unsupported(
            f"offload steps AdamW with fp32 masters on the host, not {type(rule).__name__} of {type(inner).__name__}"
        )
    return {name: inner.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}


class HostAdamW(torch.optim.Optimizer):
    """AdamW over flat host buffers for parameters that stay where they are.

    As the backward pass finishes a parameter's gradient, a hook copies it out on the side stream and frees it. `clip`
    comes before `step`: it takes the norm, and the step scales. A step goes over the state piece by piece; the copy of
    one piece's parameters to the device overlaps the arithmetic of the next.

    Args:
        state: made for the layout's count of numbers, zero. settings: lr, betas, eps, weight_decay.
    """

    def __init__(
        self, parameters: list[nn.Parameter], settings: dict[str, Any], state: Callable[[int], State], side: Side
    ):
        super().__init__(parameters, settings)
        self.parameters, self.side, self.layout = parameters, side, Layout(parameters)
        self.flat = state(self.layout.numbers)
        self.gradients = side.pinned(self.layout.numbers)
        self.more: Tensor | None = None  # the gradients of later micro-batches, on their way
        self.adding: dict[int, Future[None]] = {}
        self.adder = ThreadPoolExecutor(1)
        self.squares: list[Tensor | None] = [None] * len(parameters)  # of a gradient's norm; None: none has come
        self.steps, self.scale = 0, torch.ones(())
        self.fill()
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._take, index))

    def fill(self) -> None:
        """The masters begin as the parameters."""
        for start, master, _, _ in self.flat.sweep(lambda: None):
            for index, part, place in self.layout.within(start, start + len(master)):
                host_memory.fetch(master[place], self.parameters[index].detach().reshape(-1)[part])
        self.flat.pin(slice(None))

    def _take(self, index: int, parameter: Tensor) -> None:
        """A gradient is ready: send it to the host, add it to what is there, and free it."""
        assert parameter.grad is not None
        gradient = parameter.grad.detach().reshape(-1).float()
        parameter.grad = None
        slot = self.gradients[self.layout.slot(index)]
        if self.squares[index] is None:
            self.squares[index] = torch.linalg.vector_norm(gradient).square()
            with self.side.after_compute():
                slot.copy_(gradient, non_blocking=True)
        else:
            if self.more is None:
                self.more = self.side.pinned(self.layout.numbers)
            if index in self.adding:
                self.adding.pop(index).result()
            arriving = self.more[self.layout.slot(index)]
            with self.side.after_compute():
                arriving.copy_(gradient, non_blocking=True)
            self.adding[index] = self.adder.submit(_add, slot, arriving, self.side.event())
        self.side.holds(gradient)

    def settle(self) -> None:
        """Everything on its way has arrived."""
        for future in self.adding.values():
            future.result()
        host_waits(self.side.event())

    @torch.no_grad()
    def clip(self, parameters: Any, max_norm: float) -> Tensor:
        """The norm of all gradients; the next step scales them so that it is at most `max_norm`."""
        self.settle()
        for index in self.adding:
            self.squares[index] = torch.linalg.vector_norm(self.gradients[self.layout.slot(index)]).square()
        squares = [square.to(self.side.device) for square in self.squares if square is not None]
        norm = torch.stack(squares).sum().sqrt().cpu()
        self.scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert all(square is not None for square in self.squares), "every parameter takes part in the loss"
        self.settle()
        self.steps += 1
        group, count = self.param_groups[0], torch.tensor(float(self.steps))
        for start, master, first, second in self.flat.sweep(self.settle):
            gradients = self.gradients[start : start + len(master)]
            torch._fused_adamw_(
                [master], [gradients], [first], [second], [], [count], lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=False, grad_scale=1 / self.scale,
            )  # fmt: skip
            with self.side.after_compute():
                for index, part, place in self.layout.within(start, start + len(master)):
                    self.deliver(index, part, master[place])
        self.side.compute_waits(self.side.event())
        self.scale = torch.ones(())

    def deliver(self, index: int, part: slice, values: Tensor) -> None:
        """Put a parameter's new values (fp32, host) where the model reads them."""
        target = self.parameters[index].data.view(-1)[part]
        # A narrower weight is rounded on the device: a copy that changes the type would wait for the host.
        target.copy_(values.to(target.device, non_blocking=True), non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The next gradients are the first of a step."""
        self.settle()
        self.adding.clear()
        self.squares = [None] * len(self.parameters)

    @torch.no_grad()
    def masters(self) -> list[Tensor]:
        """A copy of every parameter's fp32 values, in its shape."""
        found = [torch.empty(parameter.shape) for parameter in self.parameters]
        for start, master, _, _ in self.flat.sweep(lambda: None):
            for index, part, place in self.layout.within(start, start + len(master)):
                found[index].view(-1)[part] = master[place]
        return found


def _add(to: Tensor, arriving: Tensor, event: torch.cuda.Event | None) -> None:
    host_waits(event)
    to.add_(arriving)
