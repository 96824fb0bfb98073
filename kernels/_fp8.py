"""Matrix products in 8-bit floats with dynamic scales, for linear layers in training.

An operand is two tensors: fp8 data and the fp32 scale that it was divided by, one for the tensor or one a row. Hopper
multiplies rows by rows (`multiply(a, b)` is a b'), so the three products of a linear layer (y = x W', dx = g W,
dW = g' x) need x, W and g along both of their dimensions. `operands` makes both from one read: its Triton version on a
GPU, plain PyTorch elsewhere, which is the specification. The largest magnitudes are left to PyTorch: as a reduction of
rows they fuse into the norm or the activation that makes the tensor when the step is compiled.

Formats: Micikevicius et al. 2022, arXiv:2209.05433: e4m3 for values, e5m2 for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import Unsupported

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of the sizes that a product of fp8 matrices takes
SMALLEST = 1e-12  # stands for the largest magnitude of zeros


@dataclass(frozen=True)
class Recipe:
    """How the products are made: `rowwise` scales or one a tensor; `fast_backward` sums of fewer bits in gradients."""

    rowwise: bool = False
    fast_backward: bool = False


def scale_of(x: Tensor, dtype: torch.dtype, rowwise: bool) -> Tensor:
    """fp32 scales of x (R, C): (R, 1), or () for the whole tensor, so that x / scale fills the format's range."""
    peaks = x.abs().amax(-1, keepdim=True).float()  # rows first, for the tensor too: that is what a compiler fuses
    return (peaks if rowwise else peaks.amax()).clamp(min=SMALLEST) / torch.finfo(dtype).max


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in an 8-bit type, as x lies in memory, values past the range cut to it."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale.reciprocal()).clamp(-limit, limit).to(dtype)


@torch.library.custom_op("dyno::fp8_operands", mutates_args=())
def operands(
    parts: Sequence[Tensor], row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Matrices (R_i, C), one below the other, as fp8 rows (R, C) and fp8 columns (C, R padded with zeros to 16).

    Args:
        row_scale: (R, 1) or (), the scales of the rows.
        column_scale: (C, 1) or (), the scales of the columns.
    """
    x = torch.cat([part.float() for part in parts])
    columns = quantise(F.pad(x.t(), (0, -x.shape[0] % MULTIPLE)), column_scale, dtype)
    return quantise(x, row_scale, dtype).contiguous(), columns.contiguous()


@operands.register_fake
def _(
    parts: Sequence[Tensor], row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
    padded = (rows + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    return parts[0].new_empty((rows, width), dtype=dtype), parts[0].new_empty((width, padded), dtype=dtype)


@operands.register_kernel("cuda")
def _(
    parts: Sequence[Tensor], row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dyno.kernels._fp8_cast import cast_both_ways

    return cast_both_ways(parts, row_scale, column_scale, dtype)


def reference_multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a a_scale) (b b_scale)' of fp8 operands (M, K) and (N, K) in fp32, rounded to `dtype`: the specification."""
    return ((a.float() * a_scale) @ (b.float() * b_scale).t()).to(dtype)


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:  # fmt: skip
    """The product of `reference_multiply`, on tensor cores where there are some; `fast` sums in fewer bits there."""
    if not a.is_cuda:
        return reference_multiply(a, a_scale, b, b_scale, dtype)
    rowwise = a_scale.numel() > 1 or b_scale.numel() > 1
    made = torch.bfloat16 if rowwise else dtype  # what the rowwise kernel writes
    out = torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=made, use_fast_accum=fast)
    return out.to(dtype)


@torch.library.custom_op("dyno::fp8_products", mutates_args=())
def products(
    x: Tensor, x_scale: Tensor, x_column_scale: Tensor,
    weights: Sequence[Tensor], w_scale: Tensor, w_column_scale: Tensor, fast_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (N, K), weights (M_i, K) -> (N, M), the products with all weights side by side; and both in columns of bytes.

    An operator, not an autograd function in the step's graph: those with several weights lose their gradients when
    torch 2.11 compiles them.
    """
    x_rows, x_columns = operands([x], x_scale, x_column_scale, E4M3)
    w_rows, w_columns = operands(weights, w_scale, w_column_scale, E4M3)
    return multiply(x_rows, x_scale, w_rows, w_scale, x.dtype, True), x_columns, w_columns


@products.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_column_scale: Tensor,
    weights: Sequence[Tensor], w_scale: Tensor, w_column_scale: Tensor, fast_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    columns = [operands(parts, scale, scale, E4M3)[1] for parts, scale in (([x], x_scale), (weights, w_scale))]
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights)), *columns


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, x_scale, x_column_scale, weights, _, w_column_scale, ctx.fast = inputs
    _, x_columns, w_columns = output
    ctx.mark_non_differentiable(x_columns, w_columns)
    ctx.save_for_backward(x_columns, x_column_scale, w_columns, w_column_scale)  # bytes: half of what bf16 keeps
    ctx.rowwise, ctx.dtypes = x_scale.dim() > 0, (x.dtype, weights[0].dtype)
    ctx.sizes = [weight.shape[0] for weight in weights]


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x_columns, x_scale, w_columns, w_scale = ctx.saved_tensors
    x_dtype, w_dtype = ctx.dtypes
    scale, column_scale = _both_scales([grad], E5M2, ctx.rowwise)
    rows, columns = operands([grad], scale, column_scale, E5M2)
    dx = multiply(rows, scale, w_columns, w_scale, x_dtype, ctx.fast)
    dw = multiply(columns, column_scale, x_columns, x_scale, w_dtype, ctx.fast)
    return dx, None, None, list(dw.split(ctx.sizes)), None, None, None


products.register_autograd(_gradients, setup_context=_keep)


def _both_scales(parts: Sequence[Tensor], dtype: torch.dtype, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Scales of the rows and of the columns of matrices (R_i, C) one below the other; the same one twice a tensor."""
    rows = [scale_of(part, dtype, rowwise) for part in parts]
    if not rowwise:
        whole = torch.stack(rows).amax()
        return whole, whole
    return torch.cat(rows), torch.stack([scale_of(part.t(), dtype, True) for part in parts]).amax(0)


def linear(x: Tensor, weights: Sequence[Tensor], recipe: Recipe) -> tuple[Tensor, ...]:
    """x (..., K) and weights (M_i, K) -> (..., M_i) each, in one product forward and two backward, all in fp8.

    Every M and K must be a multiple of 16 (the sum of the M_i is enough). The result has the type of x.

    Raises:
        Unsupported: weights that are split over ranks.
    """
    if any(hasattr(weight, "placements") for weight in weights):
        raise Unsupported("fp8 products take whole weights; these are split over ranks (tensor parallel)")
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(0, -2)
        x_scales = _both_scales([flat.detach()], E4M3, recipe.rowwise)  # a scale has no gradient
        w_scales = _both_scales([weight.detach() for weight in weights], E4M3, recipe.rowwise)
        y, _, _ = products(flat, *x_scales, weights, *w_scales, recipe.fast_backward)
    return y.unflatten(0, x.shape[:-1]).split([weight.shape[0] for weight in weights], dim=-1)


def reference_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x (N, K), weight (M, K) -> (N, M): what `linear` computes forward, written as quantise, dequantise, multiply."""
    a, b = (t.float() for t in (x, weight))
    a_scale, b_scale = scale_of(a, E4M3, recipe.rowwise), scale_of(b, E4M3, recipe.rowwise)
    return reference_multiply(quantise(a, a_scale, E4M3), a_scale, quantise(b, b_scale, E4M3), b_scale, x.dtype)
