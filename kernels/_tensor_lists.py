"""Many tensors in one launch: a table of addresses, and of every program the tensor and the chunk that it works on.

A model has hundreds of parameters, many of them short; after each launch the GPU idles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE = 16  # bytes that a thread reads at a time
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Chunks(NamedTuple):
    """Tensors' sizes, int64 (tensors,); of every chunk the tensor that owns it and its number there, int32 (chunks,)."""

    counts: Tensor
    owners: Tensor
    numbers: Tensor


@lru_cache(maxsize=8)
def chunks(counts: tuple[int, ...], size: int, device: torch.device) -> Chunks:
    """Those of `size` numbers, of tensors that have so many; kept for the next step, 8 bytes a chunk."""
    each = [-(-count // size) for count in counts]
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(each))
    numbers = torch.cat([torch.arange(n, dtype=torch.int32) for n in each])
    return Chunks(*(t.to(device) for t in (torch.tensor(counts), owners, numbers)))


def addresses(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, int]:
    """Of contiguous tensors: int64 (rows, tensors a row) on their device; WHOLE where it divides all addresses, else 1.

    A part of a bucket may begin anywhere. One that does makes the whole launch read number by number.
    """
    assert all(t.is_contiguous() for row in rows for t in row)
    found = [[t.data_ptr() for t in row] for row in rows]
    alignment = 1 if any(address % WHOLE for row in found for address in row) else WHOLE
    table, device = torch.tensor(found), rows[0][0].device
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table, alignment


@triton.jit
def pointer(Addresses, at, ELEMENT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The tensor at a place of the table."""
    return tl.multiple_of(tl.load(Addresses + at).to(tl.pointer_type(ELEMENT)), ALIGNMENT)
