"""Data parallelism: replicas (DDP), and the three levels of ZeRO by FSDP2, whole or hybrid."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dyno.technique import Run
from dyno.techniques.parallelism._grid import Grid


def replicate(grid: Grid, run: Run) -> None:
    """DDP: gradients averaged in buckets, only after the last micro-batch."""
    holder: dict[str, Any] = {}

    def wrap(forward: Any) -> Any:
        holder["ddp"] = DistributedDataParallel(
            forward,
            device_ids=[run.device.index] if run.device.type == "cuda" else None,
            process_group=grid.group("copies"),
            gradient_as_bucket_view=True,
        )
        return holder["ddp"]

    run.wrap("forward", wrap, by=grid.layout)
    run.replace(
        "sync", lambda is_last: contextlib.nullcontext() if is_last else holder["ddp"].no_sync(), by=grid.layout
    )


def shard(grid: Grid, run: Run, roots: list[nn.Module]) -> None:
    """FSDP2 over every block and then each root (the model, or a pipeline's stages), at the layout's ZeRO level.

    Level 1 gathers weights and reduces gradients once a step, level 2 reduces after every micro-batch, level 3 gathers
    too. Level 0 inside a larger mesh is the hybrid layout whose shards have one rank. Blocks are gathered in the type of
    their products, so that autocast finds nothing to cast; gradients are reduced in the weights' own.
    """
    layout = grid.layout
    mesh = grid.mesh["copies", "shards"] if layout.copies > 1 else grid.mesh["shards"]
    reshard: bool | int = layout.zero == 3 and (layout.reshard_to or True)
    policy = MixedPrecisionPolicy(
        param_dtype=run.product_dtype(), reduce_dtype=run.part("weights_dtype"), cast_forward_inputs=False
    )
    for block in run.model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    wrapped: list[FSDPModule] = []
    for root in roots:  # its own weights are the first that the backward pass needs: they stay
        wrapped.append(fully_shard(root, mesh=mesh, reshard_after_forward=False))

    def sync(is_last: bool) -> Any:
        for root in wrapped:
            root.set_is_last_backward(is_last)
            if layout.zero < 3:
                root.set_reshard_after_backward(is_last)
            if layout.zero < 2:
                root.set_requires_gradient_sync(is_last)
            else:
                root.set_requires_all_reduce(is_last)
        return contextlib.nullcontext()

    run.replace("sync", sync, by=layout)
