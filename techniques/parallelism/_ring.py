"""Ring attention: keys and values travel round the ranks while each attends to the part that it holds.

Shapes: B sequences, H query heads, G key heads, S tokens of this rank in zig-zag order, D head width. Rank r of n holds
the chunks r and 2n - 1 - r of a sequence cut into 2n. Of the part of an earlier rank it needs the first chunk only, and
of a later rank's both but for its own second chunk only; so every hop is the same half of a square, without a mask.

Papers: Liu et al. 2023, arXiv:2310.01889; zig-zag order: Brandon et al. 2023, arXiv:2311.09431, in Llama 3's form,
arXiv:2407.21783.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One part by PyTorch's flash kernel: out (B, H, S, D) and the log of the softmax's sum (B, H, S) fp32."""
    if q.device.type == "cpu":
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        out, log_sum, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    else:
        out, log_sum = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return out, log_sum[..., : q.shape[2]].float()


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of one part, given the output and the sum over ALL parts: they make its weights right."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, causal, scale=scale
        )
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    if q.dtype == torch.float32:
        rows = -q.shape[2] % 32  # the kernel reads whole tiles of the sums
        padded = torch.nn.functional.pad(log_sum, (0, rows)).contiguous()
        wanted = [True, True, True, False]
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, padded, state[0], state[1], 0.0, wanted, causal, scale=scale
        )[:3]
    queries, keys = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, log_sum.contiguous(), None, None, queries, keys, 0.0, causal, state, state, scale=scale
    )


class Hop:
    """One exchange with the neighbours in flight: tensors go to the next rank, those of the one before come in."""

    def __init__(self, tensors: tuple[Tensor, ...], group: Any):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after = dist.get_global_rank(group, (rank + 1) % ranks)
        before = dist.get_global_rank(group, (rank - 1) % ranks)
        self.sent = tuple(x.contiguous() for x in tensors)
        self.received = tuple(torch.empty_like(x) for x in self.sent)
        sends = [dist.P2POp(dist.isend, x, after, group) for x in self.sent]
        receives = [dist.P2POp(dist.irecv, x, before, group) for x in self.received]
        self.works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> tuple[Tensor, ...]:
        for work in self.works:
            work.wait()
        return self.received


def parts(rank: int, source: int, tokens: int) -> tuple[slice, slice, bool]:
    """(queries, keys, causal) that meet when this rank of the ring holds the keys of rank `source`."""
    half, whole = tokens // 2, slice(0, tokens)
    if source == rank:
        return whole, whole, True
    return (whole, slice(0, half), False) if source < rank else (slice(half, tokens), whole, False)


def repeated(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def summed(x: Tensor, groups: int) -> Tensor:
    """The gradient of `repeated`: (B, G x groups, S, D) -> (B, G, S, D)."""
    return x.unflatten(1, (-1, groups)).sum(2) if groups > 1 else x


class Ring(torch.autograd.Function):
    """Causal attention over a sequence whose parts lie on the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: Any) -> Tensor:
        rank, ranks, groups = dist.get_rank(group), dist.get_world_size(group), q.shape[1] // k.shape[1]
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        log_sum = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        held: tuple[Tensor, ...] = (k, v)
        for step in range(ranks):
            hop = Hop(held, group) if step < ranks - 1 else None
            rows, columns, causal = parts(rank, (rank - step) % ranks, q.shape[2])
            keys, values = (repeated(x[:, :, columns], groups) for x in held)
            new, new_sum = attend(q[:, :, rows], keys, values, causal, scale)
            both = torch.logaddexp(log_sum[:, :, rows], new_sum)
            old_share, new_share = (log_sum[:, :, rows] - both).exp(), (new_sum - both).exp()
            out[:, :, rows] = out[:, :, rows] * old_share[..., None] + new * new_share[..., None]
            log_sum[:, :, rows] = both
            held = hop.wait() if hop else held
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, log_sum)
        ctx.scale, ctx.group = scale, group
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, log_sum = ctx.saved_tensors
        group, groups = ctx.group, q.shape[1] // k.shape[1]
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        held: tuple[Tensor, ...] = (k, v)
        # The gradients of a part's keys and values travel one hop behind it and end, after a whole round, at home.
        travelling = tuple(torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in held)
        for step in range(ranks):
            hop = Hop(held, group) if step < ranks - 1 else None
            rows, columns, causal = parts(rank, (rank - step) % ranks, q.shape[2])
            keys, values = (repeated(x[:, :, columns], groups) for x in held)
            mine = [x[:, :, rows].contiguous() for x in (grad, q, out, log_sum)]
            new_dq, *new_dkv = attend_backward(
                mine[0], mine[1], keys.contiguous(), values.contiguous(), mine[2], mine[3], causal, ctx.scale
            )
            dq[:, :, rows] += new_dq
            for total, new in zip(travelling, new_dkv, strict=True):
                total[:, :, columns] += summed(new, groups)
            held = hop.wait() if hop else held
            travelling = Hop(travelling, group).wait()
        dk, dv = travelling
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def ring_attention(group: Any) -> Callable[..., Tensor]:
    """The attention of a rank that holds its zig-zag part of the sequence; q (B, H, S, D), k and v (B, G, S, D)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
        assert causal
        if torch.is_autocast_enabled(q.device.type):  # the kernels are called below autocast's reach
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return Ring.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, group)

    return attention
