"""The Triton products of `dyno.kernels.quantized_linear`: x (M, K) times a packed (N, K), accumulated in fp32.

Few rows (`_gemv`): a program owns a few outputs and reads their packed rows once; the threads of a program share K, so
the split over K costs no second kernel. CUDA cores do the products, a group's partial sum is scaled once.

More rows (`_gemm`): the problem is transposed, y' = W x', so that the weight is the tall operand of the tensor cores
and M pads to 16 only. K is split over programs where the outputs alone would not fill the GPU, and partial sums are
added in a fixed order: results do not change from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from dyno.errors import UserError
from dyno.kernels import triton_missing
from dyno.kernels.quantized_linear import NIBBLE_BLOCK, PackedWeight

GEMV_ROWS = 1
INTERPRETED = knobs.runtime.interpret  # decided when the kernels below are decorated


@triton.jit
def _gemv(
    X, Packed, Scales, Zeros, Out, outputs, inputs, row_bytes, groups,
    ROWS: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, SPANS_A_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Out (ROWS, N). A span is SPAN bytes of one row, all in one group; a tile is BLOCK_N x SPANS x SPAN bytes."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < outputs
    spans = tl.arange(0, SPANS)
    within = tl.arange(0, SPAN)
    half: tl.constexpr = 32  # inputs of one half of a 4-bit block, see the packed form
    for row in tl.static_range(ROWS):
        acc = tl.zeros([BLOCK_N, SPANS], dtype=tl.float32)
        for first in range(0, tl.cdiv(row_bytes, SPAN), SPANS):
            byte = (first + spans)[:, None] * SPAN + within[None, :]
            byte_mask = byte < row_bytes
            offsets = n.to(tl.int64)[:, None, None] * row_bytes + byte[None, :, :]
            code = tl.load(Packed + offsets, mask=n_mask[:, None, None] & byte_mask[None, :, :], other=0).to(tl.int32)
            group = (first + spans) // SPANS_A_GROUP
            meta = n.to(tl.int64)[:, None] * groups + group[None, :]
            meta_mask = n_mask[:, None] & (group < groups)[None, :]
            scale, zero = _grid_of(Scales, Zeros, meta, meta_mask, BITS, SYMMETRIC)
            # A code in the mantissa of 2^23 is a float without a conversion; the subtraction is exact.
            shift = (zero + 8388608.0)[:, :, None]
            if BITS == 4:
                k = (first + spans)[:, None] * (2 * SPAN) + (within // half * (2 * half) + within % half)[None, :]
                low = tl.load(X + row * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
                high = tl.load(X + row * inputs + k + half, mask=k + half < inputs, other=0.0).to(tl.float32)
                part = (((code & 15) | 0x4B000000).to(tl.float32, bitcast=True) - shift) * low[None, :, :]
                part += (((code >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - shift) * high[None, :, :]
            else:
                x = tl.load(X + row * inputs + byte, mask=byte < inputs, other=0.0).to(tl.float32)
                part = ((code | 0x4B000000).to(tl.float32, bitcast=True) - shift) * x[None, :, :]
            acc += tl.sum(part, axis=2) * scale
        tl.store(Out + row * outputs + n, tl.sum(acc, axis=1).to(Out.dtype.element_ty), mask=n_mask)


@triton.jit
def _centred(code, zero, TYPE: tl.constexpr, BITS: tl.constexpr, MAGIC: tl.constexpr):
    """code - zero in TYPE, exactly: the difference is an integer of at most 8 bits.

    MAGIC puts the code into the mantissa of 1024 (fp16) or 128 (bf16, 4 bits only) instead of converting it.
    """
    if MAGIC and tl.float16 == TYPE:
        return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    elif MAGIC and tl.bfloat16 == TYPE and BITS == 4:
        return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    else:
        return (code.to(tl.float32) - zero).to(TYPE)


@triton.jit
def _grid_of(Scales, Zeros, meta, mask, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and zero in fp32 at the offsets `meta`."""
    scale = tl.load(Scales + meta, mask=mask, other=0.0).to(tl.float32)
    if SYMMETRIC:
        return scale, tl.zeros_like(scale) + 2 ** (BITS - 1)
    else:
        return scale, tl.load(Zeros + meta, mask=mask, other=0).to(tl.float32)


@triton.jit
def _gemm(
    X, Packed, Scales, Zeros, Out, rows, outputs, inputs, row_bytes, groups, group_size, split_steps,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, UNIFORM: tl.constexpr,
    SYMMETRIC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out (splits, M, N); BLOCK_B bytes of each packed row a step; the grid is (N tiles, M tiles, splits)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask = n < outputs
    m_mask = m < rows
    half: tl.constexpr = 32
    within = tl.arange(0, BLOCK_B)
    x_rows = X + m.to(tl.int64)[None, :] * inputs
    w_rows = Packed + n.to(tl.int64)[:, None] * row_bytes
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    # Where byte j of a step finds its (first) input: written so that the compiler sees runs of 32 and loads them whole.
    inputs_of = within if BITS == 8 else within // half * (2 * half) + within % half
    begin = tl.program_id(2) * split_steps
    end = tl.minimum(tl.cdiv(row_bytes, BLOCK_B), begin + split_steps)
    type: tl.constexpr = tl.float32 if UPCAST else X.dtype.element_ty
    per_byte: tl.constexpr = 8 // BITS
    for step in range(begin, end):
        start = step * BLOCK_B
        byte = start + within
        code = tl.load(w_rows + byte[None, :], mask=n_mask[:, None] & (byte < row_bytes)[None, :], other=0)
        k = start * per_byte + inputs_of
        x = tl.load(x_rows + k[:, None], mask=m_mask[None, :] & (k < inputs)[:, None], other=0.0).to(type)
        low = code
        if BITS == 4:
            high_mask = m_mask[None, :] & (k + half < inputs)[:, None]
            x_high = tl.load(x_rows + (k + half)[:, None], mask=high_mask, other=0.0).to(type)
            low = code & 15
            high = code >> 4
        if UNIFORM:  # one group a step: its scale multiplies the small product and not the weights
            meta = n.to(tl.int64) * groups + start * per_byte // group_size
            scale, zero = _grid_of(Scales, Zeros, meta, n_mask, BITS, SYMMETRIC)
            part = tl.dot(_centred(low, zero[:, None], type, BITS, not UPCAST), x, input_precision="ieee")
            if BITS == 4:
                w = _centred(high, zero[:, None], type, BITS, not UPCAST)
                part = tl.dot(w, x_high, part, input_precision="ieee")
            acc += part * scale[:, None]
        else:
            rows_meta = n.to(tl.int64)[:, None] * groups
            meta = rows_meta + tl.minimum(k // group_size, groups - 1)[None, :]
            scale, zero = _grid_of(Scales, Zeros, meta, n_mask[:, None], BITS, SYMMETRIC)
            acc = tl.dot(((low.to(tl.float32) - zero) * scale).to(type), x, acc, input_precision="ieee")
            if BITS == 4:
                meta = rows_meta + tl.minimum((k + half) // group_size, groups - 1)[None, :]
                scale, zero = _grid_of(Scales, Zeros, meta, n_mask[:, None], BITS, SYMMETRIC)
                acc = tl.dot(((high.to(tl.float32) - zero) * scale).to(type), x_high, acc, input_precision="ieee")
    out = Out + (tl.program_id(2).to(tl.int64) * rows + m[None, :]) * outputs + n[:, None]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=n_mask[:, None] & m_mask[None, :])


@triton.jit
def _dense(
    Packed, Scales, Zeros, Out, inputs, row_bytes, groups, group_size,
    BITS: tl.constexpr, BLOCK_B: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Out (N, K): the dequantised weight; the grid is (N, byte tiles)."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK_B)
    first = tl.program_id(1) * BLOCK_B
    byte = first + within
    code = tl.load(Packed + row * row_bytes + byte, mask=byte < row_bytes, other=0)
    half: tl.constexpr = 32
    for part in tl.static_range(8 // BITS):
        k = byte
        value = code
        if BITS == 4:
            k = first * 2 + within // half * (2 * half) + within % half + part * half
            value = (code >> (4 * part)) & 15
        mask = k < inputs
        scale, zero = _grid_of(Scales, Zeros, row * groups + k // group_size, mask, BITS, SYMMETRIC)
        tl.store(Out + row * inputs + k, ((value.to(tl.float32) - zero) * scale).to(Out.dtype.element_ty), mask=mask)


def dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` in one pass on a GPU."""
    rows, row_bytes = weight.packed.shape
    out = torch.empty(rows, weight.in_features, dtype=dtype, device=weight.packed.device)
    block = min(1024, triton.next_power_of_2(row_bytes))
    _dense[(rows, triton.cdiv(row_bytes, block))](
        weight.packed, weight.scales, weight.zeros if weight.zeros is not None else weight.packed, out,
        weight.in_features, row_bytes, weight.scales.shape[1], weight.group_size,
        BITS=weight.bits, BLOCK_B=block, SYMMETRIC=weight.zeros is None,
    )  # fmt: skip
    return out


def _span(weight: PackedWeight) -> int:
    """Bytes of a packed row that surely share a group: a power of two, 0 when there is no useful one."""
    per_byte = 8 // weight.bits
    size = triton.next_power_of_2(weight.in_features) if weight.scales.shape[1] == 1 else weight.group_size
    if weight.bits == 4 and size % NIBBLE_BLOCK:
        return 0
    span = size // per_byte
    return min(64, span & -span) if span % 16 == 0 else 0


@dataclass(frozen=True)
class Tiles:
    """Launch shape: outputs a program, packed bytes of a row a step, warps, stages, and parts of K (`_gemm` only)."""

    outputs: int
    step_bytes: int
    warps: int
    stages: int = 3
    splits: int | None = None


def gemv_tiles() -> Tiles:
    """Measured on an H100."""
    return Tiles(4, 1024, 4)


def gemm_tiles(weight: PackedWeight, dtype: torch.dtype) -> Tiles:
    """Measured on an H100, with a step that keeps to one group where that is possible.

    Exact fp32 products run on CUDA cores and want small tiles.
    """
    step = 32 if dtype == torch.float32 else 64 if weight.bits == 4 else 128
    while step > 32 and weight.scales.shape[1] > 1 and weight.group_size * weight.bits // 8 % step:
        step //= 2
    return Tiles(32 if dtype == torch.float32 else 64, step, 4)


def multiply(x: Tensor, weight: PackedWeight, tiles: Tiles | None = None) -> Tensor:
    """x (M, K) times the transposed weight -> (M, N) in x's type."""
    missing = triton_missing(x.device)
    if missing:
        raise UserError(f"triton_linear: {missing}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"triton_linear takes fp32, fp16 or bf16 activations, got {x.dtype}")
    span = _span(weight)
    if x.shape[0] <= GEMV_ROWS and span:
        return _few_rows(x.contiguous(), weight, span, tiles or gemv_tiles())
    return _many_rows(x.contiguous(), weight, tiles or gemm_tiles(weight, x.dtype))


def _few_rows(x: Tensor, weight: PackedWeight, span: int, tiles: Tiles) -> Tensor:
    outputs, row_bytes = weight.packed.shape
    groups = weight.scales.shape[1]
    group_bytes = triton.next_power_of_2(row_bytes) if groups == 1 else weight.group_size * weight.bits // 8
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    _gemv[(triton.cdiv(outputs, tiles.outputs),)](
        x, weight.packed, weight.scales, weight.zeros if weight.zeros is not None else weight.packed, out,
        outputs, weight.in_features, row_bytes, groups,
        ROWS=x.shape[0], BITS=weight.bits, SPAN=span,
        SPANS=min(max(1, tiles.step_bytes // span), triton.next_power_of_2(triton.cdiv(row_bytes, span))),
        SPANS_A_GROUP=max(1, group_bytes // span), BLOCK_N=tiles.outputs, SYMMETRIC=weight.zeros is None,
        num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _many_rows(x: Tensor, weight: PackedWeight, tiles: Tiles) -> Tensor:
    rows, (outputs, row_bytes) = x.shape[0], weight.packed.shape
    groups = weight.scales.shape[1]
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    grid = triton.cdiv(outputs, tiles.outputs), triton.cdiv(rows, block_m)
    splits = tiles.splits or max(1, min(512 // (grid[0] * grid[1]), row_bytes // (8 * tiles.step_bytes)))
    split_bytes = triton.cdiv(triton.cdiv(row_bytes, splits), tiles.step_bytes) * tiles.step_bytes
    splits = triton.cdiv(row_bytes, split_bytes)
    out = torch.empty(splits, rows, outputs, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    _gemm[(*grid, splits)](
        x, weight.packed, weight.scales, weight.zeros if weight.zeros is not None else weight.packed, out,
        rows, outputs, weight.in_features, row_bytes, groups, weight.group_size, split_bytes // tiles.step_bytes,
        BITS=weight.bits, BLOCK_M=block_m, BLOCK_N=tiles.outputs, BLOCK_B=tiles.step_bytes,
        UNIFORM=groups == 1 or weight.group_size % (tiles.step_bytes * 8 // weight.bits) == 0,
        SYMMETRIC=weight.zeros is None, UPCAST=INTERPRETED and x.dtype != torch.float32,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)
