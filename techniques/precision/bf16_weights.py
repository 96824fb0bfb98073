"""Training with weights in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique
from dyno.techniques.precision.formats import Autocast

if TYPE_CHECKING:
    import torch

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


CHUNK = 2**26  # parameters whose fp32 copies of weight and gradient exist at once during a step
PIECE = 2**23  # values that are rounded at random at once: their noise and its sum take 13 bytes each


def stepped_together(shape: Shape) -> float:
    """Parameters whose wide copies exist at once: a chunk's, or those of the largest tensor, which is not cut."""
    return min(float(shape.parameters), max(float(CHUNK), float(shape.vocab * shape.hidden)))


def masters(shape: Shape) -> Footprint:
    """Of fp32 masters of 16-bit weights, which are kept, and of gradients, which are widened for a chunk's step."""
    return Footprint(
        master_bytes=4.0, step_bytes=4.0 * stepped_together(shape), step_traffic=12.0, cast_launches=2.0 * shape.tensors
    )  # fmt: skip


@dataclass
class Bf16Master(Technique):
    """Weights, gradients and activations in bf16; the optimizer steps on fp32 master weights and rounds them.

    Paper: Micikevicius et al. 2018, arXiv:1710.03740. As many bytes of state as fp32 weights (2 + 2 + 4 + 8), but half
    the bytes of gradients, of weights gathered by a layout and of casts. Served in bf16.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        return Autocast("bfloat16").unsupported(recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return replace(
            masters(shape), weight_bytes=2.0, parameter_bytes=2.0, gradient_bytes=2.0, activation_width=2.0,
            matmul_dtype="bf16",
        )  # fmt: skip

    def apply(self, run: Run) -> None:
        import torch

        run.replace("weights_dtype", torch.bfloat16, by=self)
        run.replace("matmul_dtype", "bf16", by=self)
        if run.stage == "infer":
            return
        from dyno.techniques.precision._wide_optimizer import widened
        from dyno.techniques.precision.formats import cpu_multiplies, round_products

        rounding = self.rounding(run)
        run.wrap("optimizer", lambda make: widened(make, rounding), by=self)
        if run.device.type == "cpu" and not cpu_multiplies("bfloat16"):
            assert run.model is not None
            round_products(run.model, torch.bfloat16)
            run.note("arithmetic", "bfloat16 values multiplied in fp32: this CPU has no instruction for it")

    def rounding(self, run: Run) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What brings an updated weight to bf16 when no master is kept; None keeps masters."""
        return None


@dataclass
class Bf16Stochastic(Bf16Master):
    """Weights in bf16 and nowhere wider: the updated weight is rounded up or down at random, its mean exact.

    Paper: Gupta et al. 2015, arXiv:1502.02551. Rounding to the nearest would lose every update under 2^-9 of a weight.
    """

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        largest = float(shape.vocab * shape.hidden)
        # What the first tensor is rounded to comes beside its chunk's copies, but its own wide gradient is gone by then.
        rounding = max(0.0, 13 * min(float(PIECE), largest) - 2 * largest)
        return Footprint(
            weight_bytes=2.0, parameter_bytes=2.0, gradient_bytes=2.0, activation_width=2.0, matmul_dtype="bf16",
            step_bytes=8.0 * stepped_together(shape) + rounding, step_traffic=60.0,  # 48 of them by the rounding
            cast_launches=11.0 * shape.tensors,
        )  # fmt: skip

    @property
    def without_masters(self) -> bool:
        return True

    def rounding(self, run: Run) -> Callable[[torch.Tensor], torch.Tensor] | None:
        from dyno.techniques.precision._wide_optimizer import StochasticRounding

        return StochasticRounding(run.recipe.config["seed"])
