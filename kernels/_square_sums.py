"""The Triton kernel of `dyno.kernels._adamw.norm`: squares of many tensors added up in one launch."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
TURNS = 8  # blocks a program
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _squares(Addresses, Counts, Owners, Chunks, Sums, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """A program adds up one chunk of the tensor that owns it."""
    owner = tl.load(Owners + tl.program_id(0))
    first = tl.load(Chunks + tl.program_id(0)).to(tl.int64) * (BLOCK * TURNS)
    left = tl.load(Counts + owner) - first
    x = tl.multiple_of(tl.load(Addresses + owner).to(tl.pointer_type(ELEMENT)), 16) + first
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


@lru_cache(maxsize=8)
def _chunks(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors' sizes, and of every chunk the tensor that owns it and its number there."""
    chunks = [-(-count // (BLOCK * TURNS)) for count in counts]
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
    numbers = torch.cat([torch.arange(n, dtype=torch.int32) for n in chunks])
    return torch.tensor(counts).to(device), owners.to(device), numbers.to(device)


def square_sum(tensors: list[Tensor]) -> Tensor:
    """fp32 () of contiguous tensors of one type on one device, each at an address that 16 divides."""
    device = tensors[0].device
    counts, owners, numbers = _chunks(tuple(t.numel() for t in tensors), device)
    addresses = torch.tensor([t.data_ptr() for t in tensors])
    if device.type == "cuda":
        addresses = addresses.pin_memory().to(device, non_blocking=True)
    sums = torch.empty(len(owners), device=device)
    _squares[(len(owners),)](
        addresses, counts, owners, numbers, sums, ELEMENTS[tensors[0].dtype], BLOCK, TURNS, num_warps=4
    )
    return sums.sum()


def adds_up(tensors: list[Tensor]) -> bool:
    """Whether `square_sum` takes them."""
    kinds = {(t.dtype, t.device) for t in tensors}
    plain = all(t.is_contiguous() and t.numel() and t.data_ptr() % 16 == 0 for t in tensors)
    return len(kinds) == 1 and plain and tensors[0].dtype in ELEMENTS
