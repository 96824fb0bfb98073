"""Parameters, gradients and optimizer state on the host; blocks visit the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape
from dyno.techniques.offload.states import GRADIENT, STATE, HostOptimizer, arriving

if TYPE_CHECKING:
    from torch import nn

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe
    from dyno.techniques.offload._host import HostAdamW
    from dyno.techniques.offload._side import Side


@dataclass
class HostParameters(HostOptimizer):
    """Everything that grows with depth on the host: a block is copied in for its passes while the one before computes.

    Papers: Rajbhandari et al. 2021, ZeRO-Infinity, arXiv:2104.07857; Pudipeddi et al. 2020, L2L, arXiv:2002.05645. On
    the device stay two blocks, the embeddings and the head, and the activations (add checkpointing). Under autocast
    blocks travel in its 16 bits.
    """

    @property
    def weights_on_host(self) -> bool:
        return True

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.option("compile") != "off":
            return "blocks that come and go are moved by hooks, which a compiled graph does not run; take compile=off"
        return super().unsupported(recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Every block comes in twice a micro-batch, as its products take it: nothing of it is cast here.

        In segments of several recomputed blocks all but the last come a third time, which is not counted.
        """
        outside = shape.parameters - shape.block_parameters
        return replace(
            super().footprint(shape, device),
            parameter_factor=outside / shape.parameters,
            visiting_blocks=2.0,
            host_bytes=(STATE + arriving(shape)) * shape.parameters,
            host_weights=2.0 * shape.block_parameters,
            host_return_bytes=GRADIENT * outside,
        )

    def apply(self, run: Run) -> None:
        model = run.model
        assert model is not None
        for name, module in model.named_children():
            if name != "blocks":
                module.to(run.device)
        model.inverse_frequency = model.inverse_frequency.to(run.device)
        super().apply(run)

    def optimizer(self, run: Run, model: nn.Module, plain: Callable[..., Any], lr: float, side: Side) -> HostAdamW:
        from dyno.techniques.offload._host import adamw_settings
        from dyno.techniques.offload._stream import StreamingAdamW

        dtype = run.product_dtype()
        run.note("blocks_travel_as", str(dtype).removeprefix("torch."))
        return StreamingAdamW(model, adamw_settings(plain, lr), lambda n: self.state(run, n, side), side, dtype)
