"""The sizes of a decoder, and what follows from them by arithmetic. No torch: plans are made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dyno.errors import UserError

BYTE_VOCABULARY = 257  # 256 bytes and the end token


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder. `rope_scaling` is the Hugging Face mapping (only llama3); norms are in fp32."""

    vocab_size: int
    layers: int
    hidden: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    max_seq: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads={self.heads} is no multiple of model.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd: rotary embeddings turn pairs")


def config_of(node: dict[str, Any], vocab_size: int) -> ModelConfig:
    """The decoder's sizes from conf/model; a null vocab_size is the tokenizer's."""
    known = {f.name for f in fields(ModelConfig)}
    sizes = {k: v for k, v in node.items() if k in known}
    sizes["vocab_size"] = sizes.get("vocab_size") or vocab_size
    if sizes["vocab_size"] < vocab_size:
        raise UserError(f"model.vocab_size={sizes['vocab_size']} is smaller than the tokenizer's {vocab_size}")
    return ModelConfig(**sizes)


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those in matrices that multiply activations, the head included), by arithmetic."""
    width, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linear = config.hidden * (2 * width + 2 * kv) + 3 * config.hidden * config.ffn_width
    matrices = config.layers * linear + config.vocab_size * config.hidden
    extra = config.layers * (2 * config.hidden + 2 * config.head_dim * config.qk_norm) + config.hidden
    extra += config.layers * (width + 2 * kv) * config.qkv_bias
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.hidden
    return matrices + extra + embedding, matrices
