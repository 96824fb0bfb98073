"""The Triton forward of `dyno.kernels.attention`, and an autograd function round it.

One program owns a tile of queries and walks over the keys with an online softmax in base 2 (FlashAttention-2, Dao 2023,
arXiv:2307.08691; base 2 folds the scale into one multiply-add). Keys that every query of the tile sees are walked
without a mask; only the tiles on the diagonal and at the end of the keys compute one. The log-sum-exp is stored.

Few queries (decoding) would leave a GPU idle, so their keys are split over programs whose partial results are merged by
their log-sum-exp (Flash-Decoding), and the query heads of one key head share a tile, which reads the cache once.

Rows of several documents: a tile's walk begins at the first key of its first document, with a mask up to the first key of
its last one.

The backward recomputes the probabilities from the log-sum-exp in plain PyTorch, a chunk of queries at a time: right and
linear in memory, but not fused, so slow. Train with an `sdpa` backend where speed matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from dyno.errors import UserError
from dyno.kernels import triton_missing

LOG2_E = 1.4426950408889634
MAX_DIM = 128
BACKWARD_ROWS = 512
INTERPRETED = knobs.runtime.interpret  # decided when the kernels below are decorated


@dataclass(frozen=True)
class Tiles:
    """Launch shape: queries and keys a tile, warps a program, and pipeline stages of the key loop."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_tiles(dim: int, dtype: torch.dtype, queries: int) -> Tiles:
    """Tiles for Hopper by head width, type and number of queries; measured on an H100, not autotuned at run time."""
    if dtype == torch.float32:  # exact fp32 products run on CUDA cores: small tiles, or registers spill
        return Tiles(16, 16, 4, 1) if queries <= 16 else Tiles(32, 16, 4, 1)
    if queries <= 16:
        return Tiles(16, 64, 4, 3)
    if queries <= 64 or dim <= 64:
        return Tiles(64, 64, 4, 3)
    return Tiles(128, 64, 8, 3)


@triton.jit
def _walk(
    acc, total, peak, q, k_base, v_base, stride_ks, stride_vs, begin, end, keys, first_seen, last_seen, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys begin..end into (acc, total, peak). Only MASKED tiles look at `keys`, `first_seen` and `last_seen`."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    k_tile = k_base + begin.to(tl.int64) * stride_ks + columns[:, None] * stride_ks + dims[None, :]
    v_tile = v_base + begin.to(tl.int64) * stride_vs + columns[:, None] * stride_vs + dims[None, :]
    for start in tl.range(begin, end, BLOCK_N):
        if MASKED:
            inside = ((start + columns) < keys)[:, None] & (dims < DIM)[None, :]
            k = tl.load(k_tile, mask=inside, other=0.0)
            v = tl.load(v_tile, mask=inside, other=0.0)
        elif DIM < BLOCK_D:
            k = tl.load(k_tile, mask=(dims < DIM)[None, :], other=0.0)
            v = tl.load(v_tile, mask=(dims < DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = ((start + columns) < keys)[None, :]
            if CAUSAL:
                visible = visible & ((start + columns)[None, :] <= last_seen[:, None])
            if DOCUMENTS:
                visible = visible & ((start + columns)[None, :] >= first_seen[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        anchor = new_peak
        if MASKED:  # a row that has seen nothing yet: -inf minus -inf would be NaN
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale_log2 - anchor[:, None])
        shrink = tl.exp2(peak - anchor)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
        k_tile += BLOCK_N * stride_ks
        v_tile += BLOCK_N * stride_vs
    return acc, total, peak


@triton.jit
def _forward(
    Q, K, V, Starts, Out, Lse,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    heads, groups, queries, keys, split_keys, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out (splits, B, H, Sq, D), Lse (splits, B, H, Sq) and Starts (B, Sq), of which only DOCUMENTS are read, are
    contiguous; the grid is (row tiles * B * H, splits)."""
    row_tiles = tl.cdiv(queries, BLOCK_M)
    # The longest rows of a causal problem start first, and neighbours share a head's keys in the L2 cache.
    row_tile = row_tiles - 1 - tl.program_id(0) % row_tiles
    batch_head = tl.program_id(0) // row_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = batch_head % heads
    kv_head = (head // groups).to(tl.int64)
    first_row = row_tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    row_mask = (rows < queries)[:, None] & (dims < DIM)[None, :]

    q_base = Q + batch * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(q_base + rows.to(tl.int64)[:, None] * stride_qs + dims[None, :], mask=row_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = K + batch * stride_kb + kv_head * stride_kh
    v_base = V + batch * stride_vb + kv_head * stride_vh

    begin = tl.program_id(1) * split_keys
    end = tl.minimum(keys, begin + split_keys)
    shift = keys - queries
    first_seen = rows  # of no account without documents
    if DOCUMENTS:
        first_seen = tl.load(Starts + batch * queries + rows, mask=rows < queries, other=0)
        lowest = tl.min(tl.where(rows < queries, first_seen, keys), 0)
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)
    clear = end  # where keys that all rows of the tile see end
    if CAUSAL:
        clear = tl.minimum(end, first_row + shift + 1)
        end = tl.minimum(end, first_row + BLOCK_M + shift)
    clear = begin + tl.maximum(clear - begin, 0) // BLOCK_N * BLOCK_N
    opened = begin  # where keys that all rows of the tile see begin
    if DOCUMENTS:
        opened = tl.minimum(clear, tl.maximum(begin, tl.cdiv(tl.max(first_seen, 0), BLOCK_N) * BLOCK_N))

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if DOCUMENTS:
        acc, total, peak = _walk(
            acc, total, peak, q, k_base, v_base, stride_ks, stride_vs, begin, opened, keys, first_seen, rows + shift,
            scale_log2, DIM, BLOCK_D, BLOCK_N, CAUSAL, DOCUMENTS, True, UPCAST, PRECISION,
        )  # fmt: skip
    acc, total, peak = _walk(
        acc, total, peak, q, k_base, v_base, stride_ks, stride_vs, opened, clear, keys, first_seen, rows + shift,
        scale_log2, DIM, BLOCK_D, BLOCK_N, CAUSAL, DOCUMENTS, False, UPCAST, PRECISION,
    )  # fmt: skip
    acc, total, peak = _walk(
        acc, total, peak, q, k_base, v_base, stride_ks, stride_vs, clear, end, keys, first_seen, rows + shift,
        scale_log2, DIM, BLOCK_D, BLOCK_N, CAUSAL, DOCUMENTS, True, UPCAST, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    out_rows = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // row_tiles) + batch_head) * queries + rows
    tl.store(Out + out_rows[:, None] * DIM + dims[None, :], acc.to(Out.dtype.element_ty), mask=row_mask)
    tl.store(Lse + out_rows, lse, mask=rows < queries)


@triton.jit
def _merge(Parts, PartLse, Out, Lse, rows, splits, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Parts (splits, rows, D) and PartLse (splits, rows) -> Out (rows, D) and Lse (rows,); a program a row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(PartLse + split * rows + row, mask=split < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    weights = tl.exp(lse - tl.where(peak == float("-inf"), 0.0, peak))  # all empty: zeros, not NaN
    total = tl.sum(weights, 0)
    mask = (split < splits)[:, None] & (dims < DIM)[None, :]
    parts = tl.load(Parts + (split[:, None] * rows + row) * DIM + dims[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(Out + row * DIM + dims, out.to(Out.dtype.element_ty), mask=dims < DIM)
    tl.store(Lse + row, tl.where(total == 0.0, float("-inf"), peak + tl.log(tl.where(total == 0.0, 1.0, total))))


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs: int, queries: int, keys: int, processors: int) -> int:
    """Into how many parts the keys are cut: enough to fill the processors twice, at least 256 keys each.

    A merge costs a launch, so a grid that nearly fills the processors is left whole.
    """
    if queries > 16 or 4 * programs > 3 * processors:
        return 1
    return max(1, min(2 * processors // programs, keys // 256))


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    tiles: Tiles | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, Sq, D) and log-sum-exp (B, H, Sq) in fp32."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if queries == 1 and heads > kv_heads:
        # One query a head: the heads of one key head become the rows of one tile. No mask: it sees every key.
        packed = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        shared = None if starts is None else starts.expand(-1, heads // kv_heads)
        out, lse = _launch(packed, k, v, False, scale, shared, tiles, splits)
        return out.view(batch, heads, 1, dim), lse.view(batch, heads, 1)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    tiles = tiles or choose_tiles(dim, q.dtype, queries)
    programs = triton.cdiv(queries, tiles.queries) * batch * heads
    splits = splits or choose_splits(programs, queries, keys, _processors(q.device))
    split_keys = triton.cdiv(triton.cdiv(keys, splits), tiles.keys) * tiles.keys
    splits = triton.cdiv(keys, split_keys)
    out_type = q.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, batch, heads, queries, dim), dtype=out_type, device=q.device)
    lse = torch.empty((splits, batch, heads, queries), dtype=torch.float32, device=q.device)
    _forward[(programs, splits)](
        q, k, v, q if starts is None else starts.contiguous(), out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, heads // kv_heads, queries, keys, split_keys, scale * LOG2_E,
        DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        CAUSAL=causal and queries > 1, DOCUMENTS=starts is not None,
        # The interpreter computes bf16 products wrongly without a word; fp32 products are TF32 unless asked otherwise.
        UPCAST=INTERPRETED and q.dtype != torch.float32, PRECISION="ieee",
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    merged = torch.empty(out.shape[1:], dtype=q.dtype, device=q.device)
    merged_lse = torch.empty(lse.shape[1:], dtype=torch.float32, device=q.device)
    _merge[(merged_lse.numel(),)](
        out, lse, merged, merged_lse, merged_lse.numel(), splits,
        DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_S=triton.next_power_of_2(splits),
    )  # fmt: skip
    return merged, merged_lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; products in the inputs' type, sums over chunks of queries in fp32.

    With documents the host waits for the first key of every chunk: the keys before it are left out.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = (batch, kv_heads, heads // kv_heads, queries)
    q, out, grad = (x.reshape(*grouped, dim) for x in (q, out, grad))
    lse = lse.reshape(grouped)
    delta = (grad.float() * out.float()).sum(-1)
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    columns = torch.arange(keys, device=q.device)
    firsts = None if starts is None else starts.amin(0).tolist()
    for begin in range(0, queries, BACKWARD_ROWS):
        rows = slice(begin, min(queries, begin + BACKWARD_ROWS))
        seen = min(keys, rows.stop + keys - queries) if causal else keys
        if seen <= 0:
            continue
        part = slice(min(firsts[rows]) if firsts else 0, seen)
        k_part, v_part = k[:, :, part], v[:, :, part]
        q_rows, grad_rows = q[:, :, :, rows].flatten(2, 3), grad[:, :, :, rows].flatten(2, 3)
        scores = (q_rows @ k_part.transpose(-1, -2)).float() * scale - lse[:, :, :, rows].flatten(2, 3).unsqueeze(-1)
        weights = scores.exp().unflatten(2, (grouped[2], -1))
        if causal:
            last_seen = torch.arange(rows.start, rows.stop, device=q.device) + keys - queries
            weights = weights.masked_fill(columns[part] > last_seen[:, None], 0.0)
        if starts is not None:
            weights = weights.masked_fill(columns[part] < starts[:, None, None, rows, None], 0.0)
        weights = weights.flatten(2, 3)
        dv[:, :, part] += weights.to(q.dtype).transpose(-1, -2) @ grad_rows
        slope = (grad_rows @ v_part.transpose(-1, -2)).float() - delta[:, :, :, rows].flatten(2, 3).unsqueeze(-1)
        slope = (weights * slope * scale).to(q.dtype)
        dk[:, :, part] += slope.transpose(-1, -2) @ q_rows
        dq[:, :, :, rows] = (slope @ k_part).unflatten(2, (grouped[2], -1))
    return dq.reshape(batch, heads, queries, dim), dk.to(k.dtype), dv.to(v.dtype)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        starts: Tensor | None,
        launch: dict[str, Any],
    ) -> Tensor:
        out, lse = _launch(q, k, v, causal, scale, starts, **launch)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts = ctx.saved_tensors
        return (*_backward(q, k, v, out, lse, grad, ctx.causal, ctx.scale, starts), None, None, None, None)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, starts: Tensor | None = None, **launch: Any
) -> Tensor:
    """See `dyno.kernels.attention.triton_attention`; the shapes are already checked. `starts` (B, Sq) int32."""
    missing = triton_missing(q.device)
    if missing:
        raise UserError(f"triton_attention: {missing}")
    if q.shape[-1] > MAX_DIM:
        raise UserError(f"triton_attention takes heads up to {MAX_DIM} wide, got {q.shape[-1]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"triton_attention takes one type of fp32, fp16, bf16; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not scale > 0:
        raise UserError(f"triton_attention takes a positive scale, got {scale}")
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return _launch(q, k, v, causal, scale, starts, **launch)[0]
    return _Flash.apply(q, k, v, causal, scale, starts, launch)
