"""PyTorch's scaled_dot_product_attention, its backend chosen by PyTorch or forced."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe

BACKENDS = ("auto", "flash", "cudnn", "efficient", "math")
# Forward rates over the matrix products', one H100, causal, heads 128 wide; math is no fused kernel and has none.
RATES = {"auto": 0.84, "flash": 0.53, "cudnn": 0.84, "efficient": 0.45}


@dataclass
class SDPA(Technique):
    """PyTorch's fused attention: flash (FlashAttention-2), cudnn, efficient (xFormers), math (unfused), or its choice.

    Papers: Dao 2023, arXiv:2307.08691; Rabe and Staats 2021, arXiv:2112.05682. On Hopper "auto" has meant flash in
    some versions and cudnn in others: force a backend to compare. `efficient` copies grouped key heads first. Rows of
    several documents take a mask, which flash on a GPU does not; the others compute what it hides.
    """

    backend: str = "auto"

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.backend not in BACKENDS:
            return f"attention.backend is {self.backend}; it takes {', '.join(BACKENDS)}"
        if device.kind != "cuda" and self.backend in ("cudnn", "efficient"):
            return f"the {self.backend} backend of SDPA is a CUDA kernel; on a CPU there are flash and math"
        if device.kind == "cuda" and self.backend == "flash" and recipe.option("packing") == "documents":
            return (
                "SDPA's flash takes no mask on a GPU, which packing=documents needs; use attention=sdpa or triton_flash"
            )
        if device.kind == "cuda" and self.backend in ("flash", "cudnn"):
            if device.capability and device.capability < (8, 0):
                return f"SDPA's {self.backend} needs compute capability 8.0, {device.name} has {device.capability}"
            if recipe.option("precision") in ("fp32", "tf32"):
                return f"SDPA's {self.backend} takes 16-bit inputs on a GPU; add precision=bf16"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(
            attention_matrix=self.backend == "math",
            expanded_heads=self.backend == "efficient",
            attention_rate=RATES.get(self.backend),
            wide_groups_unfused=self.backend == "auto" and device.kind == "cuda",
        )

    def apply(self, run: Run) -> None:
        from dyno.kernels.attention import sdpa

        run.replace("attention", partial(sdpa, backend=self.backend), by=self)
