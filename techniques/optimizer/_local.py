"""Parameters that a layout has split over ranks (DTensor), seen by an optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor; detached, in the same memory."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def whole(tensor: Any) -> Tensor:
    """All of a sharded tensor, gathered on every rank, or the tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(full: Tensor, sharded: Any) -> Tensor:
    """This rank's part of a tensor that every rank has, cut as `sharded` is."""
    if not hasattr(sharded, "placements"):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, sharded.placements).to_local()
