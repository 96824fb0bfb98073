"""The optimizer's state away from the device: in host memory, or in files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import Unsupported
from dyno.technique import Baseline, Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe
    from dyno.techniques.offload._host import HostAdamW, State
    from dyno.techniques.offload._side import Side

STATE = 12.0  # bytes a parameter: fp32 master and two moments
GRADIENT = 4.0


def arriving(shape: Shape) -> float:
    """Bytes a parameter of gradients on the host: their sum, and those of a later micro-batch."""
    return GRADIENT * min(2, shape.micro_batches)


@dataclass
class Offload(Technique):
    """What every way of offloading shares: reasons. Source: the classes below."""

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.config["workload"]["measures"] in ("infer", "kernel"):
            return "offload moves what training keeps; this workload measures no training"
        others = [t for chosen in recipe.techniques.values() for t in chosen if t is not self]
        ranks = max(t.world_size for t in others)
        if ranks > 1:
            return (
                f"it moves what one process holds, not the parts that {ranks} ranks hold, gather and reduce; take "
                "parallelism=none, or offload=none and a layout that shards, such as parallelism=zero3"
            )
        return None


@dataclass
class HostOptimizer(Offload):
    """ZeRO-Offload: AdamW's fp32 masters and moments live in host memory and step there.

    Paper: Ren et al. 2021, arXiv:2101.06840. Gradients leave as the backward pass makes them, the norm for clipping is
    taken on the way, new parameters come back in pieces of `chunk_mib` while the next piece steps. Whole-model
    compilation hands out all gradients at its end, so they are on the device together; compile.per_block does not.
    """

    chunk_mib: int = 64

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.chunk_mib < 1:
            return f"offload.chunk_mib is {self.chunk_mib}; it takes 1 MiB or more"
        techniques = [t for chosen in recipe.techniques.values() for t in chosen]
        if any(not isinstance(t, Baseline) for t in recipe.techniques["optimizer"]):
            return f"offload steps AdamW on the host, not {recipe.option('optimizer')}; take optimizer=adamw"
        if any(t.without_masters for t in techniques):
            return (
                "offload steps AdamW with fp32 masters on the host; take a precision that has some, such as bf16_master"
            )
        if recipe.writes_state:
            return (
                "the state of an optimizer on the host is not written, nor read; leave out checkpoint_every and resume"
            )
        if any(getattr(t, "loss_scaling", False) for t in techniques):
            return "loss scaling looks for overflow in gradients on the device, which have left it; take precision=bf16"
        return super().unsupported(recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """On the device: weights, and one parameter's gradient at a time (the largest is the embedding's)."""
        return Footprint(
            optimizer_factor=0.0,
            gradient_factor=min(1.0, shape.vocab * shape.hidden / shape.parameters),
            earlier_gradients=0.0,
            host_bytes=(STATE + arriving(shape)) * shape.parameters,
            host_traffic_bytes=GRADIENT * shape.parameters,
            host_return_bytes=GRADIENT * shape.parameters,
            host_updates=float(shape.parameters),
        )

    def apply(self, run: Run) -> None:
        from dyno.techniques.offload._side import Side

        if run.part("scaler"):
            raise Unsupported("loss scaling looks for overflow in gradients on the device, which have left it")
        side, made, plain = Side(run.device), [], run.part("optimizer")

        def build(model: nn.Module, lr: float) -> HostAdamW:
            made.append(self.optimizer(run, model, plain, lr, side))
            return made[0]

        def state_dict() -> dict[str, Tensor]:
            assert run.model is not None
            values = dict(zip(made[0].parameters, made[0].masters(), strict=True))
            return {name: values[p] for name, p in run.model.named_parameters(remove_duplicate=False)}

        run.replace("optimizer", build, by=self)
        run.replace("clip", lambda parameters, max_norm: made[0].clip(parameters, max_norm), by=self)
        run.replace("state_dict", state_dict, by=self)

    def optimizer(self, run: Run, model: nn.Module, plain: Callable[..., Any], lr: float, side: Side) -> HostAdamW:
        from dyno.techniques.offload._host import HostAdamW, adamw_settings

        parameters = list(model.parameters())
        return HostAdamW(parameters, adamw_settings(plain, lr), lambda n: self.state(run, n, side), side)

    def state(self, run: Run, numbers: int, side: Side) -> State:
        from dyno.techniques.offload._host import HostState

        return HostState(numbers, self.chunk_mib * 2**18, side)


@dataclass
class FileOptimizer(HostOptimizer):
    """ZeRO-Infinity's third tier: AdamW's masters and moments live in a file, read and written round each step.

    Paper: Rajbhandari et al. 2021, arXiv:2104.07857. Pieces of `chunk_mib` are read ahead and written behind the one
    that steps, past the page cache where the file system allows it. The file lies in `path`, a directory on a fast disk
    (null: the run's own), and is gone with the process. Gradients stay in host memory.
    """

    path: str | None = None

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        from dyno.plan import shape_of

        reason = super().unsupported(recipe, device)
        if reason:
            return reason
        if self.path is not None and not os.access(self.path, os.W_OK):
            return f"offload.path={self.path} is no directory that can be written"
        shape, where = shape_of(recipe), Path(self.path or recipe.config["results_dir"]).resolve()
        while not where.exists():
            where = where.parent
        free = shutil.disk_usage(where).free
        if shape and STATE * shape.parameters > free:
            need = STATE * shape.parameters / 2**30
            return f"the optimizer's state takes {need:.1f} GiB, {where} has {free / 2**30:.1f} GiB free"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """As with host memory, but of the state only three pieces are there at a time."""
        from dataclasses import replace

        pieces = 3 * 3 * self.chunk_mib * 2.0**20
        return replace(super().footprint(shape, device), host_bytes=arriving(shape) * shape.parameters + pieces)

    def state(self, run: Run, numbers: int, side: Side) -> State:
        from dyno.techniques.offload._files import FileState

        state = FileState(Path(self.path or run.directory), numbers, self.chunk_mib * 2**18, side)
        run.note("page_cache", "bypassed" if state.direct else "dropped")
        run.note("disk_bytes_per_step", 2 * state.bytes)
        return state
