"""Keys and values whose fill position lies on the device, so that a decode pass can be recorded once and replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique
from dyno.techniques.kv_cache.contiguous import ContiguousCache

if TYPE_CHECKING:
    from torch import Tensor

    from dyno.measure.environment import Device
    from dyno.model.decoder import Attend, Decoder, LayerCache
    from dyno.recipe import Recipe


ALIGNED = 8  # tokens: rows of 16-bit scores then begin at multiples of 16 bytes, as tensor cores want them


@dataclass
class Static(Technique):
    """Decode passes are the same kernels on the same addresses; a GPU replays them as one CUDA graph, one launch.

    Paper: Pope et al. 2022, arXiv:2211.05102 (section 2), the cache; developer.nvidia.com, "Getting Started with CUDA
    Graphs", 2019, the replay; as gpt-fast and vLLM serve. The prompt is read as by `contiguous`, with the recipe's attention.
    A pass after it attends by plain products over the whole allocated length, masked at its position: what the host saves
    in launches the device pays in keys that are not there yet. On a CPU the same passes run without a graph.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        compilers = recipe.techniques["compile"]
        if device.kind == "cuda" and any(getattr(t, "records_graphs", False) for t in compilers):
            mode = recipe.config["compile"]["mode"]
            return (
                f"compile.mode={mode} records CUDA graphs of its own, and none can be recorded inside another; use "
                "compile.mode=default or max-autotune-no-cudagraphs, or kv_cache=contiguous"
            )
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(graphed_decode=True)

    def apply(self, run: Run) -> None:
        run.replace("cache", StaticCache, by=self)


@dataclass
class StaticLayer:
    """One layer's keys and values (B, G, length, D) in a pass over S tokens.

    `places` (S,) int64 is where those go, `bias` (H / G * S, length) what is added to their scores: 0 where a query sees a
    key, else -inf.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    bias: Tensor

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The query heads of a key head are rows of one product: no copy of keys and values; softmax in fp32 inside."""
        import torch

        self.keys.index_copy_(2, self.places, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.places, v.to(self.values.dtype))
        batch, heads, new, dim = q.shape
        rows = q.reshape(batch * k.shape[1], -1, dim)
        keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        scores = torch.baddbmm(self.bias, rows, keys.transpose(1, 2), alpha=dim**-0.5)
        out = torch.bmm(torch.softmax(scores, -1).to(values.dtype), values)
        return out.view(batch, heads, new, dim)


class StaticCache(ContiguousCache):
    """Keys and values (B, G, length, D) a layer. The device counts its tokens in `position` (), the host in `length`.

    The first pass, over the prompt, fills it as the host counts. Every later one depends on `position` and on the new tokens
    alone, both in memory.
    """

    static = True

    def __init__(self, model: Decoder, batch: int, length: int):
        import torch

        length = -(-length // ALIGNED) * ALIGNED
        super().__init__(model, batch, length)
        self.room, self.groups = length, model.config.heads // model.config.kv_heads
        self.position = torch.zeros((), dtype=torch.int64, device=self.k.device)
        self.numbers = torch.arange(length, device=self.k.device)

    def begin(self, tokens: int) -> Tensor:
        """What all layers of a pass share is made once."""
        import torch

        if self.length > 0:
            self.places = self.position + self.numbers[:tokens]
            hidden = self.numbers > self.places[:, None]
            bias = torch.zeros(hidden.shape, dtype=self.k.dtype, device=self.k.device).masked_fill_(hidden, -torch.inf)
            self.bias = bias.repeat(self.groups, 1)
        return self.position

    def layer(self, index: int) -> LayerCache:
        return StaticLayer(*self.views[index], self.places, self.bias) if self.length > 0 else super().layer(index)

    def advance(self, tokens: int) -> None:
        self.count(tokens)
        self.position += tokens

    def count(self, tokens: int) -> None:
        """The host's part of `advance`, which a replayed pass leaves to do."""
        assert self.length + tokens <= self.room, f"a cache of {self.room} tokens cannot take {self.length + tokens}"
        self.length += tokens

    def rewind(self, length: int) -> None:
        super().rewind(length)
        self.position.fill_(self.length)
