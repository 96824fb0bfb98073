"""Number formats of weights and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    import torch

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


CPU_FLAGS = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}


@dataclass
class TF32(Technique):
    """32-bit weights, matrix products with 10-bit mantissas on tensor cores.

    Source: NVIDIA A100 whitepaper (2020).
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if device.kind != "cuda":
            return "tf32 is a mode of NVIDIA tensor cores; this run is on a CPU"
        if device.capability and device.capability < (8, 0):
            return f"tf32 needs compute capability 8.0, {device.name} has {device.capability}"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(matmul_dtype="tf32")

    def apply(self, run: Run) -> None:
        import torch

        # Sets the older names too: who reads them after the new one alone was set, as Inductor's autotuner does, fails.
        torch.set_float32_matmul_precision("high")
        run.replace("matmul_dtype", "tf32", by=self)


@dataclass
class Autocast(Technique):
    """Mixed precision: fp32 master weights, matrix products in 16 bits; served with 16-bit weights.

    Paper: Micikevicius et al. 2018, arXiv:1710.03740. fp16 trains with dynamic loss scaling, bf16 needs none.
    """

    dtype: str = "bfloat16"
    loss_scaling: bool = False
    initial_scale: float = 65536.0

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.dtype not in ("bfloat16", "float16"):
            return f"precision.dtype is {self.dtype}; it takes bfloat16 or float16"
        if device.kind == "cuda" and self.dtype == "bfloat16" and device.capability and device.capability < (8, 0):
            return f"bf16 arithmetic needs compute capability 8.0, {device.name} has {device.capability}"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        name = "bf16" if self.dtype == "bfloat16" else "fp16"
        return Footprint(
            weight_bytes=2.0, activation_width=2.0, matmul_dtype=name, waits_for_step=self.loss_scaling
        )  # fmt: skip

    def apply(self, run: Run) -> None:
        import torch

        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float16
        kind = run.device.type
        run.replace("matmul_dtype", "bf16" if dtype == torch.bfloat16 else "fp16", by=self)
        if run.stage == "infer":
            run.replace("weights_dtype", dtype, by=self)
            return
        run.replace("autocast", lambda: torch.autocast(kind, dtype=dtype), by=self)
        if kind == "cpu" and not cpu_multiplies(self.dtype):
            assert run.model is not None
            round_products(run.model, dtype)
            run.note("arithmetic", f"{self.dtype} values multiplied in fp32: this CPU has no instruction for it")
        if self.loss_scaling:
            run.replace("scaler", torch.amp.GradScaler(kind, init_scale=self.initial_scale), by=self)


def cpu_multiplies(dtype: str) -> bool:
    """Whether this CPU has instructions for products of a 16-bit type (else PyTorch takes ten times fp32's time)."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in CPU_FLAGS[dtype])


def round_products(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give every linear layer 16-bit inputs and outputs with fp32 products and sums, which is what tensor cores do."""
    import torch

    def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            return torch.nn.functional.linear(x.to(dtype).float(), layer.weight.to(dtype).float(), bias).to(dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(forward, module)  # type: ignore[method-assign]
