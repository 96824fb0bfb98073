"""Passes over a static cache as CUDA graphs: the host launches each kernel once, and then all of them together.

A graph holds kernels with their addresses. Whatever changes from pass to pass must lie in memory: the new tokens in a
buffer that the graph reads, the cache's position in the cache, which the graph itself moves on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

if TYPE_CHECKING:
    from dyno.techniques.kv_cache.static import StaticCache

WARM_UP = 3  # passes before a recording: kernels are compiled, libraries and communicators set up, not to be recorded


def one_pass(model: Any, cache: Any, new: Tensor, last: int) -> Tensor:
    """Feed new tokens (B, S); logits (B, last, V) of the last of them."""
    return model.lm_head(model.hidden_states(new, cache)[:, -last:])


@dataclass
class Recording:
    """A recorded pass: it reads `tokens` (B, S) and leaves `logits` (B, last, V), which the next replay overwrites."""

    replay: Callable[[], None]
    tokens: Tensor
    logits: Tensor


class Recorded:
    """`one_pass` of a model and its cache, every width S of new tokens recorded when it is first met, then replayed.

    The prompt, read into an empty cache, is launched as ever: it comes once. So is a pass that a dispatch mode watches,
    such as a count of messages, because a replay dispatches nothing. It holds no `Reader`, and dies with it at once:
    NCCL waits for graphs that hold its kernels before it lets go of a communicator.
    """

    def __init__(self, call: Callable[[Tensor, int], Tensor], cache: StaticCache):
        self.call, self.cache = call, cache
        self.recordings: dict[tuple[int, int], Recording] = {}

    def __call__(self, new: Tensor, last: int) -> Tensor:
        width = new.shape[1]
        if self.cache.length == 0 or _get_current_dispatch_mode() is not None:
            return self.call(new, last)
        if (width, last) not in self.recordings:
            self.recordings[width, last] = self.record(new, last)
        recording = self.recordings[width, last]
        self.cache.count(width)
        recording.tokens.copy_(new)
        recording.replay()
        return recording.logits

    def record(self, new: Tensor, last: int) -> Recording:
        """The cache is left as it was, but for what the pass itself will write."""
        tokens, length = new.clone(), self.cache.length

        def pass_again() -> Tensor:
            logits = self.call(tokens, last)
            self.cache.length = length
            return logits

        def warm_up() -> None:
            for _ in range(WARM_UP):
                pass_again()
                self.cache.rewind(length)

        replay, logits = capture(pass_again, warm_up)
        return Recording(replay, tokens, logits)


def capture(call: Callable[[], Tensor], warm_up: Callable[[], None]) -> tuple[Callable[[], None], Tensor]:
    """Record the kernels that `call` launches, without running them, after a warm-up on a stream that is not the default.

    Other threads may use the device meanwhile, as NCCL's watchdog does.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph.replay, result
