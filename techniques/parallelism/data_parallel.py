"""A step split over ranks: replicated (DDP) or sharded (ZeRO-3)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class DDP(Technique):
    """Every rank holds the model and takes its rows of the batch; gradients are averaged in overlapped buckets.

    Paper: Li et al. 2020, arXiv:2006.15704. One rank a GPU with NCCL, or processes with gloo on a CPU. ranks=1 is the
    plain step, the foot of a scaling curve.
    """

    ranks: int = 2

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        batch = recipe.config["workload"]["batch"]
        if recipe.config["workload"]["measures"] != "train":
            return "a parallel layout is for workloads that measure training"
        if self.ranks < 1 or batch % self.ranks:
            return f"workload.batch={batch} cannot be split over parallelism.ranks={self.ranks}"
        if device.kind == "cuda" and self.ranks > device.count:
            return f"parallelism.ranks={self.ranks} needs as many GPUs, this machine has {device.count}"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Gradient buckets are a second copy of the gradients."""
        return Footprint(
            batch_factor=1 / max(1, self.ranks), gradient_factor=2.0 if self.ranks > 1 else 1.0, ranks=self.ranks
        )

    def apply(self, run: Run) -> None:
        if self.ranks == 1:
            return
        from torch.nn.parallel import DistributedDataParallel

        holder: dict[str, Any] = {}

        def wrap(forward: Any) -> Any:
            ids = [run.device.index] if run.device.type == "cuda" else None
            holder["ddp"] = DistributedDataParallel(forward, device_ids=ids)
            return holder["ddp"]

        run.wrap("forward", wrap, by=self)
        run.replace("sync", lambda is_last: contextlib.nullcontext() if is_last else holder["ddp"].no_sync(), by=self)


@dataclass
class ZeRO3(DDP):
    """Parameters, gradients and optimizer state sharded over the ranks, gathered block by block (FSDP2).

    Paper: Rajbhandari et al. 2019, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.
    """

    reshard_after_forward: bool = True

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        gathered = 2 * 4.0 * shape.linear_parameters / max(1, shape.layers)
        return Footprint(
            batch_factor=1 / max(1, self.ranks),
            parameter_factor=1 / max(1, self.ranks),
            gradient_factor=1 / max(1, self.ranks),
            optimizer_factor=1 / max(1, self.ranks),
            extra_bytes=gathered,
            ranks=self.ranks,
        )

    def apply(self, run: Run) -> None:
        if self.ranks == 1:
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = run.model
        assert model is not None
        mesh = init_device_mesh(run.device.type, (self.ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        root: Any = fully_shard(model, mesh=mesh, reshard_after_forward=self.reshard_after_forward)

        def sync(is_last: bool) -> Any:
            root.set_requires_gradient_sync(is_last)
            return contextlib.nullcontext()

        run.replace("sync", sync, by=self)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        run.replace("state_dict", lambda: get_model_state_dict(model, options=options), by=self)
