"""How a decoder's tensors are called in each file format, and the one check that a file holds exactly those.

A checkpoint is taken only when every tensor of the decoder is there with its shape and nothing is left over: a
left-over tensor (a bias, a second norm) means that the file holds another model than the one that would run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError

if TYPE_CHECKING:
    import torch

    from dyno.model.config import ModelConfig

# (Decoder, Hugging Face, GGUF). `{i}` is the layer; projections have a bias beside the weight where qkv_bias says so.
_OUTER = (
    ("embed.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "lm_head.weight", "output.weight"),
)
_LAYER = (
    ("blocks.{i}.attention_norm.", "model.layers.{i}.input_layernorm.", "blk.{i}.attn_norm."),
    ("blocks.{i}.attention.q_proj.", "model.layers.{i}.self_attn.q_proj.", "blk.{i}.attn_q."),
    ("blocks.{i}.attention.k_proj.", "model.layers.{i}.self_attn.k_proj.", "blk.{i}.attn_k."),
    ("blocks.{i}.attention.v_proj.", "model.layers.{i}.self_attn.v_proj.", "blk.{i}.attn_v."),
    ("blocks.{i}.attention.o_proj.", "model.layers.{i}.self_attn.o_proj.", "blk.{i}.attn_output."),
    ("blocks.{i}.attention.q_norm.", "model.layers.{i}.self_attn.q_norm.", "blk.{i}.attn_q_norm."),
    ("blocks.{i}.attention.k_norm.", "model.layers.{i}.self_attn.k_norm.", "blk.{i}.attn_k_norm."),
    ("blocks.{i}.mlp_norm.", "model.layers.{i}.post_attention_layernorm.", "blk.{i}.ffn_norm."),
    ("blocks.{i}.mlp.gate_proj.", "model.layers.{i}.mlp.gate_proj.", "blk.{i}.ffn_gate."),
    ("blocks.{i}.mlp.up_proj.", "model.layers.{i}.mlp.up_proj.", "blk.{i}.ffn_up."),
    ("blocks.{i}.mlp.down_proj.", "model.layers.{i}.mlp.down_proj.", "blk.{i}.ffn_down."),
)
COLUMNS = {"hf": 1, "gguf": 2}


def names(layers: int, convention: str) -> dict[str, str]:
    """Decoder name -> name in the file, for every tensor that a decoder of so many layers could have."""
    column = COLUMNS[convention]
    table = {row[0]: row[column] for row in _OUTER}
    for i in range(layers):
        for row in _LAYER:
            for kind in ("weight", "bias"):
                table[row[0].format(i=i) + kind] = row[column].format(i=i) + kind
    return table


def model_config(fields: dict[str, Any], where: Any) -> ModelConfig:
    """ModelConfig of a file's fields; what the decoder refuses is the file's mistake."""
    from dyno.model.config import ModelConfig

    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def gather(
    config: ModelConfig,
    convention: str,
    available: Mapping[str, Callable[[], torch.Tensor]],
    where: str,
    ignored: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Read the decoder's tensors out of a file and check each.

    Args:
        config: the decoder that the tensors are for.
        convention: "hf" or "gguf".
        available: name in the file -> reads that tensor.
        where: the file or directory, for messages.
        ignored: endings of names that may be left over (values a decoder computes itself).

    Returns:
        Decoder name -> tensor. With tied embeddings `lm_head.weight` is the same tensor as `embed.weight`.

    Raises:
        UserError: a tensor is missing, left over, has the wrong shape, or is not a floating-point tensor.
    """
    import torch

    from dyno.model.decoder import Decoder

    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    in_file = names(config.layers, convention)
    tied = config.tied_embeddings
    needed = {name: in_file[name] for name in wanted if not (tied and name == "lm_head.weight")}
    missing = [file_name for file_name in needed.values() if file_name not in available]
    if missing:
        raise UserError(f"{where} lacks the tensor {_some(missing)}")
    # A tied model may still have its head written out; the embedding is what transformers uses.
    spare = {*needed.values(), in_file["lm_head.weight"]}
    left_over = [name for name in available if name not in spare and not name.endswith(ignored)]
    if left_over:
        raise UserError(f"{where} holds a tensor that its configuration does not explain: {_some(left_over)}")
    state: dict[str, Any] = {}
    for name, file_name in needed.items():
        tensor = available[file_name]()
        if tuple(tensor.shape) != wanted[name]:
            raise UserError(f"{where}: {file_name} has shape {tuple(tensor.shape)}, it should be {wanted[name]}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{where}: {file_name} is stored as {tensor.dtype}; only plain floating point can be read")
        state[name] = tensor
    if tied:
        state["lm_head.weight"] = state["embed.weight"]
    return state


def _some(found: list[str]) -> str:
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
