"""The device mesh of a layout: where a rank stands, and which ranks it talks to in each dimension."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dyno.measure.together import gathered
from dyno.stages.shards import whole

if TYPE_CHECKING:
    from dyno.techniques.parallelism.mesh import Mesh

BLOCK = re.compile(r"^blocks\.(\d+)\.")


class Grid:
    """Ranks in the order (pp, dp, cp, tp), tensor ranks side by side: the dimension that talks most is the innermost.

    `mesh` has the dimensions pp, copies, shards and tp. A rank's data (dp) and context (cp) places are one to the
    weights: `shards` ranks split a model's state and `copies` groups of them hold the same.
    """

    def __init__(self, layout: Mesh, device: torch.device, rank: int):
        self.layout, self.device = layout, device
        sizes = (layout.pp, layout.copies, layout.shards, layout.tp)
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "copies", "shards", "tp"))
        self.tp_rank = rank % layout.tp
        self.cp_rank = rank // layout.tp % layout.cp
        self.dp_rank = rank // (layout.tp * layout.cp) % layout.dp
        self.pp_rank = rank // (layout.tp * layout.cp * layout.dp)
        self.context: DeviceMesh | None = None
        if layout.cp > 1:
            outer = (layout.pp * layout.dp, layout.cp, layout.tp)
            self.context = init_device_mesh(device.type, outer, mesh_dim_names=("rest", "cp", "tp"))["cp"]
        self.owned: list[int] | None = None  # the blocks of a pipeline rank, by their place in the whole model

    def group(self, dimension: str) -> Any:
        """The process group of this rank in a dimension of the mesh, or in "cp"."""
        if dimension == "cp":
            assert self.context is not None
            return self.context.get_group()
        return self.mesh.get_group(dimension)

    def groups(self) -> dict[str, str]:
        """The dimension that each process group serves, by the group's name; PyTorch lets equal groups be one."""
        dimensions = ["pp", "copies", "shards", "tp", *(["cp"] if self.context else [])]
        named: dict[str, str] = {}
        for dimension in dimensions:
            group = self.group(dimension)
            if group.size() > 1:
                known = named.get(group.group_name)
                named[group.group_name] = f"{known}+{dimension}" if known else dimension
        return named

    def whole_name(self, name: str) -> str:
        """A parameter's name in the whole model."""
        if self.owned is None:
            return name
        owned = self.owned
        return BLOCK.sub(lambda match: f"blocks.{owned[int(match.group(1))]}.", name)


def settle(model: nn.Module) -> None:
    """Bring every gradient to where its weight lies: sums that each rank has a part of are added up, others split.

    A weight that all ranks hold but that each saw with its own tokens or heads has such a gradient; so has an embedding.
    FSDP2 does the same for the weights that it shards.
    """
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        if not (isinstance(gradient, DTensor) and isinstance(parameter, DTensor)):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def state_dict(model: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """The whole model's tensors on the CPU of rank 0, under the names of one process; every rank calls this."""
    for module in model.modules():  # an evaluation leaves blocks gathered, in the type of their products
        if isinstance(module, FSDPModule):
            module.reshard()
    mine = {
        grid.whole_name(name): whole(p.detach()).cpu() for name, p in model.named_parameters(remove_duplicate=False)
    }
    if grid.layout.pp == 1:
        return mine
    parts = gathered(mine if grid.dp_rank == grid.cp_rank == grid.tp_rank == 0 else {})
    return {name: tensor for part in parts for name, tensor in part.items()}
