"""Tensor parallelism for inference: plain local weights, and an all-reduce after attention and after the MLP.

Every rank reads the same tokens, holds its share of the heads with their keys and values, of the channels and of the
vocabulary, and ends a pass with the whole logits: the same bits on all ranks, from which they choose the same token.
The embedding is looked up whole on each, which spares a pass one collective more. Plain tensors instead of DTensors: a
decode pass is bound by the host's launches, and a DTensor's dispatch would be paid some hundred times a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from dyno.errors import Unsupported
from dyno.technique import Run

if TYPE_CHECKING:
    from dyno.model.decoder import Decoder
    from dyno.techniques.parallelism.mesh import Mesh


class Summed(nn.Linear):
    """A matrix split by rows: x (..., K / n) of each rank -> the sum of all ranks' products (..., N)."""

    group: Any

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        dist.all_reduce(y, group=self.group)
        return y


class Gathered(nn.Linear):
    """A head split by the vocabulary: x (..., K) -> the logits (..., V) of all ranks side by side."""

    group: Any

    def forward(self, x: Tensor) -> Tensor:
        mine = F.linear(x, self.weight)
        parts = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts, -1)


def apply(layout: Mesh, run: Run) -> None:
    """The model is split when it has its last width: `run.part("split")()`."""
    model, group = run.model, dist.group.WORLD
    assert model is not None and group is not None
    run.replace("groups", {group.group_name: "tp"}, by=layout)
    run.replace("split", lambda: split(model, run.rank, layout.tp, group), by=layout)


def split(model: Decoder, rank: int, ranks: int, group: Any) -> None:
    """Leave of a model what one rank holds, in place; its config then states the sizes of that share.

    Raises:
        Unsupported: compression has left sizes that cannot be split, or layers that are no plain matrices.
    """
    sizes: dict[str, Any] = {n: getattr(model.config, n) for n in ("heads", "kv_heads", "ffn_width", "vocab_size")}
    for name, whole in sizes.items():
        if whole % ranks:
            raise Unsupported(f"the model's {name}={whole} cannot be split over parallelism.tp={ranks}")
    for block in model.blocks:
        attention: Any = block.attention
        mlp: Any = block.mlp
        for part, name in [*((attention, f"{x}_proj") for x in "qkv"), (mlp, "gate_proj"), (mlp, "up_proj")]:
            setattr(part, name, share(getattr(part, name), 0, rank, ranks, nn.Linear))
        attention.o_proj = share(attention.o_proj, 1, rank, ranks, Summed, group)
        mlp.down_proj = share(mlp.down_proj, 1, rank, ranks, Summed, group)
    model.lm_head = share(model.lm_head, 0, rank, ranks, Gathered, group)
    mine = {name: whole // ranks for name, whole in sizes.items()}
    model.config = replace(model.config, **mine, tied_embeddings=False)


def share(layer: nn.Module, dim: int, rank: int, ranks: int, kind: type[nn.Linear], group: Any = None) -> nn.Linear:
    """A rank's outputs (dim 0, bias included) or inputs (dim 1) of a linear layer, copied: the whole can be freed."""
    if type(layer) is not nn.Linear:
        raise Unsupported(f"parallelism.tp={ranks} splits plain matrices; this model has a {type(layer).__name__}")
    with torch.device("meta"):
        mine = kind(layer.in_features, layer.out_features, bias=layer.bias is not None)
    for name, whole in layer.named_parameters():
        part = whole.detach().chunk(ranks, dim)[rank].clone(memory_format=torch.contiguous_format)
        setattr(mine, name, nn.Parameter(part, requires_grad=False))
    mine.out_features, mine.in_features = mine.weight.shape
    if group is not None:
        mine.group = group
    return mine
