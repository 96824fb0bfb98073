"""Context parallelism: each rank holds a part of every sequence; attention is the only place where the parts meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from dyno.errors import UserError
from dyno.technique import Run
from dyno.techniques.parallelism._grid import Grid
from dyno.techniques.parallelism._ring import ring_attention
from dyno.techniques.parallelism._rules import ring_backend


def places(mode: str, rank: int, ranks: int, seq: int, device: torch.device) -> Tensor:
    """Where the tokens of a rank lie in the sequence, (seq / ranks,) int64.

    Ulysses takes consecutive parts. The ring cuts the sequence into 2 x ranks chunks and gives rank r the chunks r and
    2 x ranks - 1 - r, so that every rank has the same share of the causal triangle.
    """
    parts = 2 * ranks if mode == "ring" else ranks
    if seq % parts:
        raise UserError(f"a sequence of {seq} tokens cannot be cut into the {parts} equal parts that {mode} takes")
    chunks = torch.arange(seq, device=device).chunk(parts)
    return torch.cat((chunks[rank], chunks[parts - 1 - rank])) if mode == "ring" else chunks[rank]


def split(grid: Grid, run: Run) -> None:
    """Tokens, positions and attention of a rank's part; evaluation gathers the logits of all parts."""
    layout, model = grid.layout, run.model
    assert model is not None
    ranks, group = layout.cp, grid.group("cp")

    def mine(seq: int, device: torch.device) -> Tensor:
        return places(layout.context, grid.cp_rank, ranks, seq, device)

    def positions(start: int, count: int, device: torch.device) -> Tensor:
        return start + mine(count * ranks, device).float()

    def local_batch(rows: Callable[..., Any]) -> Callable[..., Any]:
        def cut(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            tokens, targets = rows(tokens, targets)
            place = mine(tokens.shape[1], tokens.device)
            return tokens[:, place], targets[:, place]

        return cut

    def evaluated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def logits(tokens: Tensor, **more: Tensor) -> Tensor:
            if torch.is_grad_enabled():  # a training step: the tokens are this rank's part already
                return forward(tokens, **more)
            seq, device = tokens.shape[1], tokens.device
            part = forward(tokens[:, mine(seq, device)]).contiguous()
            parts = [torch.empty_like(part) for _ in range(ranks)]
            dist.all_gather(parts, part, group=group)
            order = torch.cat([places(layout.context, rank, ranks, seq, device) for rank in range(ranks)])
            return torch.cat(parts, 1)[:, order.argsort()]

        return logits

    model.positions = positions
    run.wrap("local_batch", local_batch, by=layout)
    run.wrap("forward", evaluated, by=layout)
    if layout.context == "ring":
        backend = ring_backend(run.recipe) or "auto"
        run.wrap("attention", lambda attend: ring_attention(group, backend), by=layout)
    else:
        run.wrap("attention", lambda attend: ulysses_attention(attend, group, ranks), by=layout)


def ulysses_attention(attend: Callable[..., Tensor], group: Any, ranks: int) -> Callable[..., Tensor]:
    """Whole sequences of some heads instead of some tokens of all heads, by all-to-all before and after attention.

    Paper: Jacobs et al. 2023, arXiv:2309.14509.
    """

    def heads_to_sequence(x: Tensor) -> Tensor:
        """(B, H, S / n, D) of this rank's tokens -> (B, H / n, S, D) of this rank's heads."""
        batch, heads, part, dim = x.shape
        by_rank = x.reshape(batch, ranks, heads // ranks, part, dim).permute(1, 0, 2, 3, 4).contiguous()
        return exchange(by_rank, group).permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * part, dim)

    def sequence_to_heads(x: Tensor) -> Tensor:
        """(B, H / n, S, D) -> (B, H, S / n, D)."""
        batch, heads, seq, dim = x.shape
        by_rank = x.reshape(batch, heads, ranks, seq // ranks, dim).permute(2, 0, 1, 3, 4).contiguous()
        return exchange(by_rank, group).permute(1, 0, 2, 3, 4).reshape(batch, heads * ranks, seq // ranks, dim)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
        q, k, v = (heads_to_sequence(x) for x in (q, k, v))
        return sequence_to_heads(attend(q, k, v, causal=causal, scale=scale))

    return attention


def exchange(x: Tensor, group: Any) -> Tensor:
    """Slice i of x (n, ...) goes to rank i; slice i of the result came from rank i. Differentiable."""
    return torch.ops._c10d_functional.wait_tensor(all_to_all_single_autograd(x, None, None, group)).view(x.shape)
