"""The head and the loss in one, so that the logits of a step never lie in memory together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


LOSS_PASSES = 6.0  # over a chunk's logits and their gradients, beside the products (two H100 and two H200 records)


@dataclass
class Chunked(Technique):
    """Logits of `rows` tokens at a time, thrown away after their loss and made again in the backward pass.

    Paper: Chen et al. 2016, arXiv:1604.06174 (recomputation). The head's product is computed four times, not three.
    """

    rows: int = 2048

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.rows < 1:
            return f"loss.rows is {self.rows}; it takes 1 or more tokens"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        head = 2.0 * shape.vocab * shape.hidden
        return Footprint(logits_rows=max(0.0, self.rows), flops_factor=1 + head / (6.0 * shape.linear_parameters))

    def apply(self, run: Run) -> None:
        from dyno.kernels.linear_cross_entropy import chunked_loss

        self.take_over(run, chunked_loss)

    def take_over(self, run: Run, loss: Any) -> None:
        """Loss from the model's own forward, where wrappers and layouts see one call and have the head's weight."""

        def head_loss(hidden: Any, head: Any, targets: Any) -> Any:
            return loss(hidden.flatten(0, 1), head.weight, targets.flatten(), self.rows)

        assert run.model is not None
        run.model.head_loss = head_loss
        run.replace("loss", lambda forward, tokens, targets: forward(tokens, targets=targets), by=self)


@dataclass
class Fused(Chunked):
    """Logits of `rows` tokens at a time, overwritten with their gradient, which both backward products use at once.

    Paper: Hsu et al. 2024, arXiv:2410.10989 (Liger Kernel); the kernel is Dyno's own, in Triton.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        from dyno.kernels import triton_missing

        return super().unsupported(recipe, device) or triton_missing(device.kind)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(logits_rows=max(0.0, self.rows), loss_in_place=True, loss_passes=LOSS_PASSES)

    def apply(self, run: Run) -> None:
        from dyno.kernels.linear_cross_entropy import fused_loss

        self.take_over(run, fused_loss)
