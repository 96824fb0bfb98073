"""The Triton version of `dyno.kernels._fp8.operands`: one read of a matrix, its fp8 rows and its fp8 columns written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._fp8 import MULTIPLE

TILE = 64  # rows and columns a program: whole 32-byte sectors in either layout, and registers for several programs


@triton.jit
def _cast(
    X, RowScale, ColumnScale, Rows, Columns,
    stride_xr, stride_xc, stride_columns, rows, padded, width,
    ROW_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X (rows, width) of any strides; Rows (rows, width); Columns (width, >= padded), zeros from `rows` to `padded`."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    x = tl.load(X + r[:, None] * stride_xr + c[None, :] * stride_xc, mask=inside, other=0.0).to(tl.float32)
    row_scale = tl.load(RowScale + r * ROW_STRIDE, mask=r < rows, other=1.0)
    by_row = tl.minimum(tl.maximum(x * (1.0 / row_scale)[:, None], -LIMIT), LIMIT)
    tl.store(Rows + r[:, None] * width + c[None, :], by_row.to(Rows.dtype.element_ty), mask=inside)
    column_scale = tl.load(ColumnScale + c * COLUMN_STRIDE, mask=c < width, other=1.0)
    by_column = tl.minimum(tl.maximum(x * (1.0 / column_scale)[None, :], -LIMIT), LIMIT)
    target = Columns + c[:, None] * stride_columns + r[None, :]
    within = (c < width)[:, None] & (r < padded)[None, :]
    tl.store(target, tl.trans(by_column.to(Columns.dtype.element_ty)), mask=within)


def cast_both_ways(
    parts: Sequence[Tensor], row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `dyno.kernels._fp8.operands`; one launch a part."""
    total, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
    rows = parts[0].new_empty((total, width), dtype=dtype)
    columns = parts[0].new_empty((width, triton.cdiv(total, MULTIPLE) * MULTIPLE), dtype=dtype)
    first = 0
    for part in parts:
        count = part.shape[0]
        last = first + count == total
        padded = columns.shape[1] - first if last else count
        _cast[(triton.cdiv(padded, TILE), triton.cdiv(width, TILE))](
            part, row_scale[first:] if row_scale.dim() else row_scale, column_scale, rows[first:], columns[:, first:],
            part.stride(0), part.stride(1), columns.stride(0), count, padded, width,
            ROW_STRIDE=row_scale.dim() // 2, COLUMN_STRIDE=column_scale.dim() // 2,
            LIMIT=torch.finfo(dtype).max, BLOCK=TILE, num_warps=4,
        )  # fmt: skip
        first += count
    return rows, columns
