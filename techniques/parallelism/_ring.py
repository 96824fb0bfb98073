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

from dyno.errors import Unsupported

aten = torch.ops.aten


def by_tensor_cores(q: Tensor) -> bool:
    """Whether cuDNN or flash attends; they take 16 bits on a GPU, and grouped heads as they are."""
    return q.device.type == "cuda" and q.dtype != torch.float32


def cudnn_takes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    cuda = torch.backends.cuda
    return by_tensor_cores(q) and cuda.can_use_cudnn_attention(
        cuda.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, by_cudnn: bool = False
) -> tuple[Tensor, Tensor]:
    """One part: out (B, H, S, D) and the log of the softmax's sum (B, H, S) fp32."""
    if by_tensor_cores(q):
        if by_cudnn:
            out, log_sum = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        else:
            out, log_sum = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
        return out, log_sum.reshape(*q.shape[:2], -1)[..., : q.shape[2]]
    k, v = (repeated(x, q.shape[1] // k.shape[1]) for x in (k, v))
    if q.device.type == "cpu":
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        out, log_sum, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, log_sum[..., : q.shape[2]].float()


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float,
    by_cudnn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of one part, given the output and the sum over ALL parts: they make its weights right."""
    queries, keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if q.device.type == "cuda":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    if by_tensor_cores(q):
        if by_cudnn:
            return aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, log_sum.unsqueeze(-1), state[0], state[1], None, None, None, queries, keys, 0.0,
                causal, scale=scale,
            )  # fmt: skip
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, log_sum.contiguous(), None, None, queries, keys, 0.0, causal, state, state, scale=scale
        )
    k, v = (repeated(x, groups) for x in (k, v))
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, causal, scale=scale
        )
    else:  # whose kernel reads whole tiles of the sums
        padded = torch.nn.functional.pad(log_sum, (0, -queries % 32)).contiguous()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, padded, state[0], state[1], 0.0, [True, True, True, False], causal, scale=scale
        )
    return dq, summed(dk, groups), summed(dv, groups)


class Hop:
    """One exchange with the neighbours in flight: a tensor goes to the next rank, that of the one before comes in."""

    def __init__(self, tensor: Tensor, group: Any):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after = dist.get_global_rank(group, (rank + 1) % ranks)
        before = dist.get_global_rank(group, (rank - 1) % ranks)
        self.sent, self.received = tensor, torch.empty_like(tensor)  # what is sent stays until it is
        send, receive = (
            dist.P2POp(dist.isend, tensor, after, group),
            dist.P2POp(dist.irecv, self.received, before, group),
        )
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
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


def merge(out: Tensor, log_sum: Tensor, new: Tensor, new_sum: Tensor) -> None:
    """Take one more part into the fp32 output and the sums of those before, in place."""
    share = torch.sigmoid(new_sum - log_sum)  # of the new part
    out.lerp_(new.float(), share[..., None])
    log_sum.copy_(torch.logaddexp(log_sum, new_sum))


class Ring(torch.autograd.Function):
    """Causal attention over a sequence whose parts lie on the ranks of a group.

    Keys and values travel as one tensor (2, B, G, S, D). The first part is a rank's own; the gradients of the others'
    travel behind them, while the next part is computed, and after the last hop are at home.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: Any, by_cudnn: bool) -> Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        held = torch.stack((k, v))
        for step in range(ranks):
            hop = Hop(held, group) if step < ranks - 1 else None
            rows, columns, causal = parts(rank, (rank - step) % ranks, q.shape[2])
            keys, values = held[..., columns, :]
            new, new_sum = attend(q[:, :, rows], keys, values, causal, scale, by_cudnn)
            if step == 0:
                out, log_sum = new.float(), new_sum
            else:
                merge(out[:, :, rows], log_sum[:, :, rows], new, new_sum)
            held = hop.wait() if hop else held
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, log_sum)
        ctx.scale, ctx.group, ctx.by_cudnn = scale, group, by_cudnn
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, log_sum = ctx.saved_tensors
        group = ctx.group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        held, behind = torch.stack((k, v)), None
        for step in range(ranks):
            hop = Hop(held, group) if step < ranks - 1 else None
            rows, columns, causal = parts(rank, (rank - step) % ranks, q.shape[2])
            mine = [x[:, :, rows].contiguous() for x in (grad, q, out, log_sum)]
            keys, values = (x.contiguous() for x in held[..., columns, :])
            new_dq, *new_dkv = attend_backward(
                mine[0], mine[1], keys, values, mine[2], mine[3], causal, ctx.scale, ctx.by_cudnn
            )
            if step == 0:
                dq, home = new_dq.float(), torch.stack([x.float() for x in new_dkv])
            else:
                dq[:, :, rows] += new_dq
                travelling = behind.wait() if behind else torch.zeros_like(home)
                for total, new in zip(travelling, new_dkv, strict=True):
                    total[:, :, columns] += new
                behind = Hop(travelling, group)
            held = hop.wait() if hop else held
        if behind:
            home += behind.wait()
        return dq.to(q.dtype), *home.to(k.dtype), None, None, None


def ring_attention(group: Any, backend: str = "auto") -> Callable[..., Tensor]:
    """The attention of a rank that holds its zig-zag part of the sequence; q (B, H, S, D), k and v (B, G, S, D).

    Parts in 16 bits on a GPU are attended to by cuDNN or flash; auto is cuDNN where it takes them. In fp32 there it is the
    efficient kernel, on a CPU flash.

    Raises:
        Unsupported: cudnn is asked for and does not take them.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
        assert causal
        if torch.is_autocast_enabled(q.device.type):  # the kernels are called below autocast's reach
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        by_cudnn = backend != "flash" and cudnn_takes(q, k, v, causal)
        if backend == "cudnn" and not by_cudnn:
            raise Unsupported(f"cuDNN's attention does not take queries of {tuple(q.shape)} here: use attention=sdpa")
        return Ring.apply(q, k, v, scale, group, by_cudnn)

    return attention
