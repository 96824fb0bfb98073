"""Read a GGUF file of the Llama, Mistral, SmolLM, Qwen2 or Qwen3 family into the decoder, dequantised.

Blocks (Q4_0, Q8_0, K-quants, ...) are expanded by the `gguf` package of the format's own authors; the header is read by
`load_gguf_header`. Two conventions differ from Hugging Face's: llama.cpp stores the rows of q and k of the llama
architecture with rotary pairs side by side (i, i + 1) where the decoder wants halves (i, i + D/2), and Llama 3's rotary
scaling is a tensor of divisors in place of the four numbers that made it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyno.errors import UserError
from dyno.model.load_directory import usable_context
from dyno.model.load_gguf_header import Header, read_header

if TYPE_CHECKING:
    import torch

    from dyno.model.config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM files say llama
_ROPE_FACTORS = "rope_freqs.weight"


def read_config(path: str | Path, max_seq: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig out of a GGUF header; needs no torch. Raises UserError as `load_gguf` does."""
    return config_of(read_header(path), max_seq)


def config_of(header: Header, max_seq: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig that a header says."""
    where, architecture = header.path, header.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {architecture!r} is not supported; there is {', '.join(ARCHITECTURES)}")
    if header.get(".expert_count", 0):
        raise UserError(f"{where}: mixtures of experts are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{where} lacks the tensor token_embd.weight")
    heads, hidden = _number(header, ".attention.head_count"), _number(header, ".embedding_length")
    head_dim = header.get(".attention.key_length", hidden // heads)
    rotated = header.get(".rope.dimension_count", head_dim)
    if header.get(".attention.value_length", head_dim) != head_dim or rotated != head_dim:
        raise UserError(f"{where}: keys, values and rotary embedding of different widths are not supported")
    kind = header.get(".rope.scaling.type", "none")
    if kind != "none":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; there is none and Llama 3's")
    context = _number(header, ".context_length")
    return {
        "vocab_size": embedding.shape[0],
        "layers": _number(header, ".block_count"),
        "hidden": hidden,
        "ffn_width": _number(header, ".feed_forward_length"),
        "heads": heads,
        "kv_heads": _number(header, ".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_seq": usable_context(context, header.get(".attention.sliding_window"), max_seq, where),
        "rope_theta": float(header.get(".rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(header, head_dim),
        "norm_eps": _shortest(header.get(".attention.layer_norm_rms_epsilon", 1e-5)),
        "tied_embeddings": "output.weight" not in header.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in header.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
    }


def load_gguf(
    path: str | Path, max_seq: int | None = None, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A GGUF file -> (configuration, state dict of the decoder) on the CPU.

    Args:
        path: one file, not a piece of a split.
        max_seq: use the model for at most so many tokens; None takes its whole context.
        dtype: of the tensors; None is fp32, which holds every GGUF type exactly.

    Raises:
        UserError: no GGUF file, an architecture or block type that is not supported, tensors missing or left over.
    """
    import torch

    from dyno.model.load_names import gather, model_config

    header = read_header(path)
    config = model_config(config_of(header, max_seq), path)
    data = header.bytes()
    unpermute = (
        {"attn_q": config.heads, "attn_k": config.kv_heads} if header.get("general.architecture") == "llama" else {}
    )

    def read(name: str) -> torch.Tensor:
        array = dequantise(header, name, data)
        heads = unpermute.get(name.split(".")[-2])
        if heads:
            array = halves(array, heads)
        tensor = torch.tensor(array)
        return tensor if dtype is None else tensor.to(dtype)

    available = {name: partial(read, name) for name in header.tensors}
    return config, gather(config, "gguf", available, str(path), ignored=(_ROPE_FACTORS,))


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * D, ...) with rotary pairs (2i, 2i + 1) within each head -> pairs (i, i + D/2)."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def dequantise(header: Header, name: str, data: np.ndarray) -> np.ndarray:
    """One tensor as fp32 in its shape. `data` is the whole file as bytes (N,)."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError("reading GGUF weights needs the package gguf: pip install 'llm-dyno[gguf]'") from error

    entry, where = header.tensors[name], f"{header.path}: {name}"
    if entry.kind not in GGML_QUANT_SIZES:
        raise UserError(f"{where} has the unknown GGML type {entry.kind}; a newer gguf package may know it")
    kind = GGMLQuantizationType(entry.kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    width = entry.shape[-1] if entry.shape else 0
    if not width or width % block:
        raise UserError(f"{where} of shape {entry.shape} does not divide into {kind.name} blocks of {block}")
    size = entry.elements // block * block_bytes
    if entry.start + size > len(data):
        raise UserError(f"{header.path} was cut short: {name} ends after the file")
    rows = data[entry.start : entry.start + size].reshape(-1, width // block * block_bytes)
    try:
        return dequantize(rows, kind).reshape(entry.shape).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise UserError(f"{where}: the gguf package cannot read {kind.name}") from error


def _rope_scaling(header: Header, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling from its divisors: all published models were made with (8192, 1, 4), which is verified."""
    if _ROPE_FACTORS not in header.tensors:
        return None
    divisors = dequantise(header, _ROPE_FACTORS, header.bytes()).astype(np.float64)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    theta = float(header.get(".rope.freq_base", 10000.0))
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{header.path}: {_ROPE_FACTORS} is not Llama 3's rope scaling, the only one supported")
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _number(header: Header, key: str, default: int | None = None) -> int:
    value = header.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:  # a value a layer, all the same
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{header.path}: {key[1:]} should be a positive whole number, it is {value!r}")
    return value


def _shortest(value: float) -> float:
    """The decimal that an fp32 value was written from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))
