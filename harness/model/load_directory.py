"""Read a Hugging Face model directory: config.json and safetensors. No pickle, no code from the directory.

The field names and defaults are those of transformers' LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config; files
of version 5 (`rope_parameters`) and of earlier ones (`rope_theta`, `rope_scaling`) are both understood.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError

if TYPE_CHECKING:
    import torch

    from dyno.model.config import ModelConfig

# config.json's model_type -> does it have qk norms, biases on q, k and v; SmolLM and SmolLM2 call themselves llama.
FAMILIES = {"llama": (False, False), "mistral": (False, False), "qwen2": (False, True), "qwen3": (True, False)}
SUPPORTED = "Llama, Mistral, Qwen2, Qwen3, SmolLM and SmolLM2"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path: str | Path, max_seq: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig out of `path`/config.json; needs no torch.

    Args:
        path: the directory.
        max_seq: use the model for at most so many tokens; None takes its whole context.

    Raises:
        UserError: another family, or a feature of one that the decoder does not have.
    """
    where = Path(path) / "config.json"
    if not where.is_file():
        raise UserError(f"{path} is no Hugging Face model directory: it has no config.json")
    data = read_json(where)
    family = data.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; there is {SUPPORTED}")
    if "quantization_config" in data:
        raise UserError(f"{where}: the weights are already quantised; load the unquantised model instead")
    for key, plain in {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False}.items():
        if data.get(key, plain) != plain:
            raise UserError(f"{where}: {key} is {data[key]!r}; only {plain!r} is supported")
    heads, hidden = _number(data, "num_attention_heads", where), _number(data, "hidden_size", where)
    head_dim = data.get("head_dim") or (128 if family == "qwen3" else hidden // heads)
    theta, scaling = _rope(data, where)
    context = _number(data, "max_position_embeddings", where)
    uses_window = data.get("use_sliding_window", family == "mistral")
    qk_norm, qkv_bias = FAMILIES[family]
    return {
        "vocab_size": _number(data, "vocab_size", where),
        "layers": _number(data, "num_hidden_layers", where),
        "hidden": hidden,
        "ffn_width": _number(data, "intermediate_size", where),
        "heads": heads,
        "kv_heads": data.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_seq": usable_context(context, data.get("sliding_window") if uses_window else None, max_seq, where),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": float(data.get("rms_norm_eps", 1e-6)),
        "tied_embeddings": bool(data.get("tie_word_embeddings", False)),
        "qk_norm": qk_norm,
        "qkv_bias": qkv_bias,
    }


def usable_context(context: int, window: int | None, max_seq: int | None, where: str | Path) -> int:
    """The tokens that a run may use: the model's context or less; refuses where a sliding window would begin to act."""
    if max_seq is not None and not 0 < max_seq <= context:
        raise UserError(f"model.max_seq={max_seq} does not fit {where}: the model takes 1 to {context} tokens")
    tokens = max_seq or context
    if window is not None and window < tokens:
        raise UserError(f"{where}: attention slides over {window} tokens; set model.max_seq={window} or less")
    return tokens


def load_directory(
    path: str | Path, max_seq: int | None = None, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A Hugging Face directory -> (configuration, state dict of the decoder) on the CPU.

    Args:
        path: holds config.json and model.safetensors, or shards with model.safetensors.index.json.
        max_seq: see `read_config`.
        dtype: of the tensors; None keeps what is stored.

    Raises:
        UserError: not a supported model, or files that do not hold exactly its tensors.
    """
    from safetensors import SafetensorError, safe_open

    from dyno.model.load_names import gather, model_config

    config = model_config(read_config(path, max_seq), path)
    available = {}
    try:
        for file in weight_files(path):
            reader = safe_open(file, framework="pt", device="cpu")
            for name in reader.keys():  # noqa: SIM118  a safe_open is no mapping
                available[name] = partial(_read, reader, name, dtype)
    except SafetensorError as error:
        raise UserError(f"{file} is no valid safetensors file: {error}") from error
    return config, gather(config, "hf", available, str(path), ignored=("rotary_emb.inv_freq",))


def _read(reader: Any, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = reader.get_tensor(name)
    return tensor if dtype is None else tensor.to(dtype)


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a directory, sorted by name."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{index} has no weight_map")
        files = sorted({str(name) for name in shards.values()})
        strange = [name for name in files if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
        if strange:
            raise UserError(f"{index} names {strange[0]!r}; only safetensors files beside it are read")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks the shard {missing[0]}, which its index names")
        return [folder / name for name in files]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(f"{folder} holds pickled weights, which can run code when read; convert them to safetensors")
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object, it holds a {type(data).__name__}")
    return data


def _number(data: dict[str, Any], key: str, where: Path) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} should be a positive whole number, it is {value!r}")
    return value


def _rope(data: dict[str, Any], where: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, None or Llama 3's scaling in the Hugging Face words)."""
    parameters = data.get("rope_parameters") or {}
    scaling = data.get("rope_scaling") or parameters
    theta = float(parameters.get("rope_theta", data.get("rope_theta", 10000.0)))
    if parameters.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; there is none and 'llama3'")
    missing = [key for key in _LLAMA3 if not isinstance(scaling.get(key), int | float)]
    if missing:
        raise UserError(f"{where}: rope scaling 'llama3' needs a number for {missing[0]}")
    return theta, {"rope_type": "llama3", **{key: scaling[key] for key in _LLAMA3}}
