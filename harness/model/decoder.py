"""One readable decoder: RoPE, RMSNorm, SwiGLU, MHA/GQA/MQA by the number of KV heads, tied or untied embeddings.

Shapes: B sequences, S query tokens, T tokens in all (cached + new), H query heads, G KV heads, D head width, E hidden.
Seams are plain attributes that a run sets: `attend` (the attention kernel, given `documents` too where rows hold several),
`call_block` (checkpointing), `positions` (which a rank that holds part of a sequence counts otherwise), `project` of
attention and MLP (linear layers of one input), `head_loss` (the head and the loss in one), and the cache that `forward`
is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyno.kernels.attention import Documents, eager
from dyno.model.config import ModelConfig

Attend = Callable[..., Tensor]


class LayerCache(Protocol):
    """One layer's keys and values of the tokens already seen."""

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v (B, G, S, D); causal attention of q (B, H, S, D) over all keys and values, (B, H, S, D).

        `attend` is the recipe's kernel, for caches that do not read themselves.
        """
        ...


class Cache(Protocol):
    """Keys and values of the tokens already seen."""

    length: int

    def begin(self, tokens: int) -> int | Tensor:
        """A pass over so many new tokens begins; the position of the first of them, () where it lies on the device."""
        ...

    def layer(self, index: int) -> LayerCache:
        """What a block is given: it knows no number of its own, so that one compiled graph serves all blocks."""
        ...

    def advance(self, tokens: int) -> None:
        """All layers have been updated with so many tokens."""
        ...


class _Rows(torch.autograd.Function):
    """Rows of a table (V, E) by tokens. Its gradient is added up in as many rows as there are tokens, in fp32.

    A compiler's own makes a table of zeros in fp32, adds to it and narrows it: 10 bytes a number of a table in bf16 move.
    Of this one, all but the tokens' rows fuse with whatever takes the gradient, as a tied head's.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        tokens, rows = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2).float()
        numbers = torch.arange(len(tokens), device=tokens.device)
        place = torch.full((ctx.rows,), -1, device=tokens.device).index_put((tokens,), numbers)  # of equal ones, any
        sums = torch.zeros_like(rows).index_put((place[tokens],), rows, accumulate=True)
        table = torch.where((place >= 0).unsqueeze(-1), sums[place.clamp(min=0)], 0.0)
        return None, table.to(ctx.dtype)


class Embedding(nn.Embedding):
    """tokens (...) -> (..., E); compiled, with the gradient of `_Rows` where that is smaller and ranks do not split it."""

    def forward(self, tokens: Tensor) -> Tensor:
        few = tokens.numel() < self.weight.shape[0]
        if torch.compiler.is_compiling() and few and self.weight.requires_grad and type(self.weight) is nn.Parameter:
            return _Rows.apply(tokens, self.weight)
        return super().forward(tokens)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies (D/2,), with Llama 3's smooth scaling for long contexts where asked for."""
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return inverse
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


@torch.library.custom_op("dyno::rotary_table", mutates_args=())
def rotary_table(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., D) of positions (...) at inverse frequencies (D/2,).

    An operator: a compiler would compute them anew for every query and key of every layer, forward and backward.
    """
    angles = positions.unsqueeze(-1) * inverse.float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@rotary_table.register_fake
def _(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = (*positions.shape, 2 * inverse.shape[0])
    return inverse.new_empty(size, dtype=dtype), inverse.new_empty(size, dtype=dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, S, H, D), pairs (i, i + D/2) (Su et al. 2021, arXiv:2104.09864).

    Before heads come first: a compiler then writes its gradient as the projections' backward pass reads it, not in a copy.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear layer adds to its product, in the product's type."""
    return y if bias is None else y + bias.to(y.dtype)


def project_each(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of several linear layers of one input."""
    return tuple(layer(x) for layer in layers)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.project: Callable[..., tuple[Tensor, ...]] = project_each
        self.config = config
        hidden, width, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None) -> Tensor:
        batch, new, _ = x.shape
        dim = self.config.head_dim
        q, k, v = (y.view(batch, new, -1, dim) for y in self.project(x, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        out = attend(q, k, v, causal=True, scale=None) if cache is None else cache.attend(attend, q, k, v)
        return self.project(out.transpose(1, 2).reshape(batch, new, -1), self.o_proj)[0]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.project: Callable[..., tuple[Tensor, ...]] = project_each
        self.gate_proj = nn.Linear(config.hidden, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x, self.gate_proj, self.up_proj)
        return self.project(F.silu(gate) * up, self.down_proj)[0]


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend, cache)
        return x + self.mlp(self.mlp_norm(x))


def count_up(start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Positions (S,) fp32 of consecutive tokens."""
    return start + torch.arange(count, device=device, dtype=torch.float32)


def call_plainly(block: nn.Module, *args: Any) -> Tensor:
    return block(*args)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating parameters to one type; packed buffers and rotary frequencies keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def initial_std(name: str, config: ModelConfig) -> float:
    """The standard deviation that a matrix starts with: 0.02, less by depth where a block adds to the residual stream."""
    adds = name.endswith(("o_proj.weight", "down_proj.weight"))
    return 0.02 / math.sqrt(2 * config.layers) if adds else 0.02


class Decoder(nn.Module):
    """tokens (B, S) -> logits (B, S, vocab_size), or what `head_loss` makes of them where targets (B, S) are given.

    `starts` (B, S) int32, where the document of each token begins in its row, keeps documents apart.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed.weight
        self.attend: Attend = eager
        self.call_block: Callable[..., Tensor] = call_plainly
        self.positions: Callable[..., Tensor] = count_up
        self.head_loss: Callable[[Tensor, nn.Linear, Tensor], Tensor] | None = None
        self.inverse_frequency: Tensor
        self.register_buffer("inverse_frequency", rope_frequencies(config), persistent=False)

    def initialise(self, seed: int) -> Decoder:
        """Normal weights, see `initial_std`, biases of zero; the same for every device when the model is on the CPU."""
        generator = torch.Generator(self.norm.weight.device).manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=initial_std(name, self.config), generator=generator)
                elif name.endswith("bias"):
                    nn.init.zeros_(weight)
        return self

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens (B, S) -> (B, S, E), under autocast in its type: the residual stream as large runs keep it."""
        x = self.embed(tokens)
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def rotary(
        self, start: int | Tensor, count: int, like: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions from `start` on, (count, 1, D), in the type and on the device of `like`;
        of the positions in their documents, (B, count, 1, D), where `starts` (B, count) says where those begin."""
        positions = self.positions(start, count, like.device)
        if starts is not None:
            positions = positions - starts
        return rotary_table(positions.unsqueeze(-1), self.inverse_frequency, like.dtype)

    def hidden_states(self, tokens: Tensor, cache: Cache | None = None, starts: Tensor | None = None) -> Tensor:
        """tokens (B, S) -> final normed states (B, S, E); attention stays in documents where their starts are given."""
        x = self.embedded(tokens)
        first = cache.begin(tokens.shape[1]) if cache is not None else 0
        cos, sin = self.rotary(first, tokens.shape[1], x, starts)
        attend = self.attend if starts is None else partial(self.attend, documents=Documents(starts))
        for index, block in enumerate(self.blocks):
            x = self.call_block(block, x, cos, sin, attend, cache.layer(index) if cache is not None else None)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        targets: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        hidden = self.hidden_states(tokens, cache, starts)
        if targets is None:
            return self.lm_head(hidden)
        assert self.head_loss is not None, "targets are for a run whose loss takes over the head"
        return self.head_loss(hidden, self.lm_head, targets)
