"""Linear layers with packed 8- or 4-bit weights (W8A16, W4A16): quantise, unpack, multiply.

A weight (out N, in K) is cut into groups of `group_size` inputs of one row; the last group may be short. Each group has
a scale, and an asymmetric one a zero point: weight = (code - zero) * scale with codes 0 .. 2^bits - 1. A symmetric grid
has its zero in the middle of the codes and a signed scale, so that the value of largest magnitude is met exactly and no
code is wasted. Both grids contain zero: pruned weights stay pruned.

Scales are rounded to the type they are stored in BEFORE the codes are chosen. That type is fp16, or fp32 for a matrix
with a scale outside fp16's normal range; bf16 would lose bits for nothing, since products are computed in fp32.

Packed form: (N, bytes of a row) uint8. 8 bits: one code a byte. 4 bits: a block of 64 inputs takes 32 bytes, byte j
holds input j of the block in its low half and input j + 32 in its high half, so that a kernel reads both halves'
activations contiguously; K is padded to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import UserError
from dyno.kernels import HAS_TRITON, triton_missing

BITS = (4, 8)
NIBBLE_BLOCK = 64


@dataclass(frozen=True)
class PackedWeight:
    """A quantised matrix. `packed` (N, row bytes) uint8, `scales` (N, groups), `zeros` (N, groups) uint8 or None."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def bytes(self) -> int:
        """All that is stored: codes with their padding, scales and zeros."""
        return sum(x.numel() * x.element_size() for x in (self.packed, self.scales, self.zeros) if x is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.out_features * self.in_features)


def quantize(weight: Tensor, bits: int = 4, group_size: int = 128, symmetric: bool = False) -> PackedWeight:
    """Round a weight (N, K) to the nearest codes of its groups.

    Args:
        bits: 4 or 8.
        group_size: inputs that share a scale; 0 means the whole row.

    Raises:
        UserError: other bits, a negative group size, a weight that is no matrix or not finite.
    """
    if bits not in BITS:
        raise UserError(f"quantization.bits={bits} is none of {BITS}")
    if group_size < 0:
        raise UserError(f"quantization.group_size={group_size} is negative; 0 means one group a row")
    if weight.dim() != 2 or not torch.isfinite(weight).all():
        raise UserError(f"a weight to quantise is a finite matrix, got shape {tuple(weight.shape)}")
    rows, inputs = weight.shape
    size = min(group_size or inputs, inputs)
    groups = -(-inputs // size)
    # Padding with zeros is harmless: every grid contains zero.
    grouped = F.pad(weight.detach().float(), (0, groups * size - inputs)).view(rows, groups, size)
    scales, zeros = _grid(grouped, bits, symmetric)
    middle = float(2 ** (bits - 1)) if zeros is None else zeros.float().unsqueeze(-1)
    codes = (grouped / scales.float().unsqueeze(-1)).round().add(middle).clamp(0, 2**bits - 1)
    packed = pack(codes.view(rows, -1)[:, :inputs].to(torch.uint8), bits)
    return PackedWeight(packed, scales, zeros, bits, size, inputs)


def _grid(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales in their stored type and zero points, both (N, groups), for grouped weights (N, groups, size)."""
    if symmetric:
        extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return _stored(-extreme / 2 ** (bits - 1)), None
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = _stored((high - low) / (2**bits - 1))
    return scales, (-low / scales.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)


def _stored(scales: Tensor) -> Tensor:
    """Scales as they are kept; a group of zeros gets 1, which avoids a division by zero."""
    scales = torch.where(scales == 0, 1.0, scales)
    limits = torch.finfo(torch.float16)
    size = scales.abs()
    fits = bool((size >= limits.smallest_normal).all()) and bool((size <= limits.max).all())
    if fits:
        return scales.to(torch.float16)
    tiny = torch.finfo(torch.float32).smallest_normal
    return torch.where(size < tiny, torch.full_like(scales, tiny).copysign(scales), scales)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) uint8 -> packed bytes (N, row bytes)."""
    if bits == 8:
        return codes.contiguous()
    blocks = F.pad(codes, (0, -codes.shape[1] % NIBBLE_BLOCK)).view(codes.shape[0], -1, 2, NIBBLE_BLOCK // 2)
    return (blocks[:, :, 0] | (blocks[:, :, 1] << 4)).flatten(1)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Packed bytes (N, row bytes) -> codes (N, K) uint8."""
    if bits == 8:
        return packed
    halves = packed.view(packed.shape[0], -1, NIBBLE_BLOCK // 2)
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)[:, :in_features]


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (N, K) that the codes stand for, computed in fp32 and rounded to `dtype`."""
    codes = unpack(weight.packed, weight.bits, weight.in_features).float()
    groups = weight.scales.shape[1]
    grouped = F.pad(codes, (0, groups * weight.group_size - weight.in_features)).view(codes.shape[0], groups, -1)
    middle = float(2 ** (weight.bits - 1)) if weight.zeros is None else weight.zeros.float().unsqueeze(-1)
    values = (grouped - middle) * weight.scales.float().unsqueeze(-1)
    return values.view(codes.shape[0], -1)[:, : weight.in_features].to(dtype)


def dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize`, in one pass over memory where Triton runs on a GPU."""
    if weight.packed.device.type != "cuda" or not HAS_TRITON:
        return dequantize(weight, dtype)
    from dyno.kernels._quantized import dense as fused

    return fused(weight, dtype)


def reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, **_: Any) -> Tensor:
    """The specification: x (..., K) -> (..., N) with the dequantised weight in fp32, rounded once to x's type."""
    with torch.autocast(x.device.type, enabled=False):
        out = F.linear(x.float(), dequantize(weight), None if bias is None else bias.float())
    return out.to(x.dtype)


def dequantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, **_: Any) -> Tensor:
    """Dequantise to x's type, then multiply: best for many rows, and differentiable in x."""
    return F.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def triton_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, tiles: Any = None, **_: Any
) -> Tensor:
    """Dequantise in registers and accumulate in fp32: the packed weight is all that is read. No gradient.

    `tiles` (a `dyno.kernels._quantized.Tiles`) overrides the launch shape.

    Raises:
        UserError: on a CPU without the interpreter, or for a type other than fp32, fp16 and bf16.
    """
    from dyno.kernels._quantized import multiply

    out = multiply(x.reshape(-1, weight.in_features), weight, tiles).view(*x.shape[:-1], weight.out_features)
    return out if bias is None else out + bias.to(out.dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The fastest of the above for where x is, how many rows it has and whether it needs a gradient."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.numel() // weight.in_features
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if x.device.type != "cuda" or differentiated or rows > TRITON_ROWS or not HAS_TRITON:
        return dequantized_linear(x, weight, bias)
    return triton_linear(x, weight, bias)


TRITON_ROWS = 128  # above, one pass of dequantising costs less than what a library product gains


@dataclass(frozen=True)
class LinearShape:
    """One problem of the benchmark: x (rows, K) times a quantised (N, K)."""

    rows: int
    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        grid = "sym" if self.symmetric else "asym"
        return f"m{self.rows}_n{self.out_features}_k{self.in_features}_int{self.bits}_g{self.group_size}_{grid}"


def cases(device: torch.device | str) -> Iterator[LinearShape]:
    """Shapes worth timing there: layers of 8B models on a GPU, awkward small ones on a CPU."""
    if torch.device(device).type != "cuda":
        yield LinearShape(1, 40, 576, 4, 128, False)
        yield LinearShape(5, 33, 123, 4, 32, True)
        yield LinearShape(3, 48, 200, 8, 0, True)
        return
    for out_features, in_features in ((8192, 8192), (4096, 14336), (14336, 4096)):
        for rows in (1, 4, 16, 64):
            for bits in BITS:
                yield LinearShape(rows, out_features, in_features, bits, 128, False)


def inputs(shape: LinearShape, device: torch.device | str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """x, the packed weight, and `dense`: the same weight dequantised, for peers that take no packed one."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape.rows, shape.in_features, generator=generator, device=device).to(dtype)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator, device=device)
    packed = quantize(weight * shape.in_features**-0.5, shape.bits, shape.group_size, shape.symmetric)
    return {"x": x, "weight": packed, "dense": dequantize(packed, dtype)}


def implementations(device: torch.device | str) -> dict[str, Callable[..., Tensor]]:
    """What can run there, by name, each called with `**inputs(...)`; `torch_dense` is the unquantised product."""
    found: dict[str, Callable[..., Tensor]] = {"reference": reference, "dequantize": dequantized_linear}
    if triton_missing(device) is None:
        found["triton"] = triton_linear
    return found | {"torch_dense": lambda x, weight, dense: F.linear(x, dense)}


def flops(shape: LinearShape) -> float:
    """Multiply-adds counted as two; dequantising is not counted."""
    return 2.0 * shape.rows * shape.out_features * shape.in_features


def bytes(shape: LinearShape, element_bytes: int = 2) -> float:
    """Least traffic of the quantised product: codes, scales (fp16) and zeros, x and the result once."""
    groups = -(-shape.in_features // (shape.group_size or shape.in_features))
    weight = shape.out_features * (shape.in_features * shape.bits / 8 + groups * (2 if shape.symmetric else 3))
    return weight + element_bytes * shape.rows * (shape.in_features + shape.out_features)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """`atol` and `rtol` of torch.testing.assert_close against the reference, for inputs of unit variance."""
    return {
        torch.float32: {"atol": 2e-5, "rtol": 2e-5},
        torch.float16: {"atol": 5e-3, "rtol": 5e-3},
        torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
    }[dtype]
