"""Dyno's own FlashAttention-2 in Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class TritonFlash(Technique):
    """Online softmax over key tiles, grouped heads, split keys for decoding; the backward is plain PyTorch.

    Paper: Dao 2023, arXiv:2307.08691. Made for inference: its backward is not fused, train with SDPA. Of rows of several
    documents it works through each one's own keys, without a mask in memory.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        from dyno.kernels import triton_missing

        if device.kind == "cuda" and device.capability and device.capability < (8, 0):
            return f"triton_flash needs compute capability 8.0, {device.name} has {device.capability}"
        return triton_missing(device.kind)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(skips_documents=True)

    def apply(self, run: Run) -> None:
        from dyno.kernels.attention import triton_attention

        run.replace("attention", triton_attention, by=self)
