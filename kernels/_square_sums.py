"""The Triton kernel of `dyno.kernels._adamw.norm`: squares of many tensors added up in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyno.kernels._tensor_lists import ELEMENTS, addresses, chunks, pointer

BLOCK = 2048
TURNS = 8  # blocks a program


@triton.jit
def _squares(
    Addresses, Counts, Owners, Numbers, Sums,
    ELEMENT: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """A program adds up one chunk of the tensor that owns it."""
    owner = tl.load(Owners + tl.program_id(0))
    first = tl.load(Numbers + tl.program_id(0)).to(tl.int64) * (BLOCK * TURNS)
    left = tl.load(Counts + owner) - first
    x = pointer(Addresses, owner, ELEMENT, ALIGNMENT) + first
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if left >= BLOCK * TURNS:  # without a mask, so that a thread reads 16 bytes at a time
        for turn in tl.static_range(TURNS):
            value = tl.load(x + turn * BLOCK + i).to(tl.float32)
            total += value * value
    else:
        for turn in range(TURNS):
            value = tl.load(x + turn * BLOCK + i, mask=turn * BLOCK + i < left, other=0.0).to(tl.float32)
            total += value * value
    tl.store(Sums + tl.program_id(0), tl.sum(total, 0))


def square_sum(tensors: list[Tensor]) -> Tensor:
    """fp32 () of contiguous tensors of one type on one device."""
    device, rows = tensors[0].device, [[t] for t in tensors]
    each = chunks(tuple(t.numel() for t in tensors), BLOCK * TURNS, device)
    sums = torch.empty(len(each.owners), device=device)
    places, alignment = addresses(rows)
    _squares[(len(each.owners),)](places, *each, sums, ELEMENTS[tensors[0].dtype], alignment, BLOCK, TURNS, num_warps=4)
    return sums.sum()


def adds_up(tensors: list[Tensor]) -> bool:
    """Whether `square_sum` takes them."""
    kinds = {(t.dtype, t.device) for t in tensors}
    return len(kinds) == 1 and all(t.is_contiguous() and t.numel() for t in tensors) and tensors[0].dtype in ELEMENTS
