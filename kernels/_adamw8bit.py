"""AdamW whose two moments are a byte each: `reference_step` is the specification, on a GPU it is one Triton pass.

Moments are stored in blocks of 256 as codes of a table times the block's largest magnitude (Dettmers et al. 2021,
arXiv:2110.02861): 2 + 2 * 4 / 256 = 2.03 bytes a parameter. The tables are dynamic: between 1e-7 and 1, with 7 decades
that have twice as many equal cells each, so that small numbers keep their magnitude and large ones their digits. A number
becomes the middle of its cell, the largest of a block itself if it is positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dyno.kernels._adamw import Operands, Rates, descend, step_kinds

BLOCK = 256


class Moment(NamedTuple):
    """One moment of n parameters: uint8 codes (n,), fp32 scales (blocks,)."""

    codes: Tensor
    scales: Tensor


@lru_cache
def table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values in order, and the 255 bounds between them: a number gets the code of how many bounds it passes."""
    values, cells = [], []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1, dtype=torch.float64) * 10.0 ** (decade - 6)
        values.append((edges[:-1] + edges[1:]) / 2)
        cells.append(edges[:-1])
    positive, lower = torch.cat(values), torch.cat(cells)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    values, bounds = [zero, positive, one], [lower, one - 2**-24]
    if signed:
        values, bounds = [-positive.flip(0), *values], [-lower.flip(0), *bounds]
    return torch.cat(values).float().to(device), torch.cat(bounds).float().to(device)


def empty_moment(count: int, signed: bool, device: torch.device) -> Moment:
    """Zeros."""
    zero = int((table(signed, device)[0] == 0).nonzero())
    codes = torch.full((count,), zero, dtype=torch.uint8, device=device)
    return Moment(codes, torch.zeros(-(-count // BLOCK), device=device))


def dequantise(moment: Moment, signed: bool) -> Tensor:
    """fp32 (n,)."""
    values, _ = table(signed, moment.codes.device)
    return values[moment.codes.long()] * moment.scales.repeat_interleave(BLOCK)[: moment.codes.numel()]


def quantise_into(moment: Moment, x: Tensor, signed: bool) -> None:
    """Store fp32 x (n,). What is not zero never becomes zero in a second moment: a step would divide by it."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), 1, out=moment.scales)
    share = blocks / moment.scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = torch.bucketize(share, table(signed, x.device)[1])
    if not signed:
        codes = torch.maximum(codes, (blocks > 0).long())
    moment.codes.copy_(codes.view(-1)[: x.numel()])


def reference_step(
    weight: Tensor, master: Tensor | None, grad: Tensor, first: Moment, second: Moment, scale: Tensor, rates: Rates
) -> None:
    """One AdamW step of contiguous tensors of n numbers, in place: the specification.

    The gradient counts `scale` (a scalar on the device) times. With a master, fp32, a weight of 16 bits is its rounding.
    """
    weight, master, grad = weight.view(-1), None if master is None else master.view(-1), grad.view(-1)
    g = grad.float() * scale
    m = dequantise(first, True).lerp(g, 1 - rates.beta1)
    v = dequantise(second, False).lerp(g * g, 1 - rates.beta2)
    descend(weight, master, m, v, rates)
    quantise_into(first, m, True)
    quantise_into(second, v, False)


def step(items: Sequence[Operands], scale: Tensor, rates: Rates) -> None:
    """`reference_step` of each, whose moments are `Moment`s; by Triton on a GPU, in one launch for all of a kind."""
    step_kinds(items, scale, rates, _by_triton, reference_step)


def _by_triton(items: Sequence[Operands], scale: Tensor, rates: Rates) -> None:
    from dyno.kernels._adamw8bit_step import triton_step

    triton_step(items, scale, rates)
