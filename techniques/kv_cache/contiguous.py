"""Keys and values of past tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from dyno.measure.environment import Device
    from dyno.model.decoder import Attend, Decoder, LayerCache


@dataclass
class Contiguous(Technique):
    """One preallocated tensor of keys and one of values a layer, filled from the left; rewinding is a number.

    Source: Pope et al. 2022, arXiv:2211.05102 (section 2). Tensors (B, G, length, D) in the model's type.
    """

    def apply(self, run: Run) -> None:
        run.replace("cache", ContiguousCache, by=self)


@dataclass
class Recompute(Technique):
    """No cache: every pass recomputes the whole context, which is what a cache is compared with.

    Source: Vaswani et al. 2017, arXiv:1706.03762, decoding as first described.
    """

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(kv_cache_factor=0.0)

    def apply(self, run: Run) -> None:
        run.replace("cache", NoCache, by=self)


@dataclass
class ContiguousLayer:
    """One layer's keys and values (B, G, length, D), of which `filled` tokens are there."""

    keys: Tensor
    values: Tensor
    filled: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, G, S, D); return all keys and values (B, G, T, D)."""
        end = self.filled + k.shape[2]
        self.keys[:, :, self.filled : end] = k
        self.values[:, :, self.filled : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, *self.update(k, v), causal=True, scale=None)


class ContiguousCache:
    """Keys and values (B, G, length, D) a layer. `length` counts the tokens whose layers are all filled."""

    static = False  # whether all passes after the prompt are the same kernels on the same addresses

    def __init__(self, model: Decoder, batch: int, length: int):
        import torch

        c, like = model.config, model.norm.weight
        shape = (c.layers, batch, c.kv_heads, length, c.head_dim)
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        self.k = torch.zeros(shape, dtype=dtype, device=like.device)
        self.v = torch.zeros_like(self.k)
        self.views = list(zip(self.k, self.v, strict=True))
        self.length = 0

    def begin(self, tokens: int) -> int | Tensor:
        return self.length

    def layer(self, index: int) -> LayerCache:
        return ContiguousLayer(*self.views[index], self.length)

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.length = min(self.length, length)


class NoCache:
    """Stands in where nothing is kept: its length stays 0, so callers feed the whole context."""

    length = 0
    static = False

    def __init__(self, model: Decoder, batch: int, length: int):
        pass

    def begin(self, tokens: int) -> int:
        return 0

    def layer(self, index: int) -> NoCache:
        return self

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=True, scale=None)

    def advance(self, tokens: int) -> None:
        pass

    def rewind(self, length: int) -> None:
        pass
