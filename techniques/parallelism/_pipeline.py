"""Pipeline parallelism: the layers cut into stages of equal cost, micro-batches sent through by PyTorch's schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import pipelining
from torch.distributed.tensor import DTensor, Shard

from dyno.model.decoder import Decoder
from dyno.stages.shards import local, scale_to, squares, whole
from dyno.technique import Run
from dyno.techniques.parallelism._grid import Grid, settle
from dyno.techniques.parallelism._stages import SCHEDULES, rank_of


class Stage(nn.Module):
    """Consecutive blocks of a decoder; the first stage embeds, the last gives logits. The seams are the decoder's.

    tokens (B, S) int64 or states (B, S, E) -> states (B, S, E) or logits (B, S, V); with sequence-parallel residuals
    the states are (B, S / tp, E).
    """

    def __init__(self, run: Run, blocks: list[nn.Module], first: bool, last: bool, state_share: int):
        super().__init__()
        model = run.model
        assert model is not None
        self.blocks = nn.ModuleList(blocks)
        self.embed = model.embed if first else None
        self.norm = model.norm if last else None
        self.lm_head = model.lm_head if last else None
        self.state_share = state_share
        self.outside = (run, model)  # a tuple is no submodule: the decoder's weights are not this stage's

    def forward(self, x: Tensor) -> Tensor:
        run, model = self.outside
        with run.part("autocast")():
            seq = x.shape[1] if self.embed is not None else x.shape[1] * self.state_share
            x = model.embedded(x) if self.embed is not None else x
            cos, sin = model.rotary(0, seq, x)
            for block in self.blocks:
                x = model.call_block(block, x, cos, sin, model.attend, None)
            if self.lm_head is not None and self.norm is not None:
                x = self.lm_head(self.norm(x))
            return x.to_local() if isinstance(x, DTensor) else x


class Pipeline:
    """The stages of one rank, a training step through all of them, and evaluation."""

    def __init__(self, grid: Grid, run: Run, cuts: tuple[range, ...]):
        layout, model = grid.layout, run.model
        assert model is not None
        self.grid, self.run, self.layout, self.model = grid, run, layout, model
        self.group = grid.group("pp")
        self.places = {s: rank_of(s, layout) for s in range(len(cuts))}
        mine = [s for s in self.places if self.places[s] == grid.pp_rank]
        blocks = list(model.blocks)
        self.tie = untie(grid, model, self.places) if model.config.tied_embeddings else None
        self.stages = {
            s: Stage(run, [blocks[i] for i in cuts[s]], s == 0, s == len(cuts) - 1, layout.token_shards) for s in mine
        }
        self.last = len(cuts) - 1
        grid.owned = [i for s in mine for i in cuts[s]]
        model.blocks = nn.ModuleList(blocks[i] for i in grid.owned)
        held: Any = model  # parts of a decoder that other ranks have are None
        if 0 not in mine:
            held.embed = None
        if self.last not in mine:
            held.norm = held.lm_head = None
        self.schedule: Any = None

    def boundary(self, tokens: Tensor) -> Tensor:
        """A meta tensor like the states between stages for tokens (B, S)."""
        size = (tokens.shape[0], tokens.shape[1] // self.layout.token_shards, self.model.config.hidden)
        return torch.empty(size, dtype=self.run.product_dtype(), device="meta", requires_grad=True)

    def build(self, tokens: Tensor) -> Any:
        """The schedule for batches of the shape of tokens (B, S)."""
        count = self.layout.micro_batches
        micro = torch.empty_like(tokens.chunk(count)[0], device="meta")
        states = self.boundary(micro)
        vocabulary = self.model.config.vocab_size // self.layout.vocabulary_shards
        logits = torch.empty(*micro.shape, vocabulary, dtype=states.dtype, device="meta", requires_grad=True)
        wrapped = [
            pipelining.PipelineStage(
                stage,
                index,
                self.last + 1,
                self.grid.device,
                input_args=micro if index == 0 else states,
                output_args=logits if index == self.last else states,
                group=self.group,
            )
            for index, stage in self.stages.items()
        ]
        name, many = SCHEDULES[self.layout.schedule][:2]
        cls = getattr(pipelining, name)
        return cls(wrapped if many else wrapped[0], count, loss_fn=self.loss, scale_grads=False)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's share of the mean loss."""
        if self.layout.vocabulary_shards > 1:
            logits = DTensor.from_local(logits, self.grid.mesh["tp"], [Shard(-1)], run_check=False)
        with self.run.part("autocast")():
            return self.run.part("share")(self.run.part("loss")(lambda tokens: logits, targets, targets), targets)

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """A step's gradients; the mean loss of these rows on every rank of the pipeline."""
        tokens = tokens.contiguous()  # torch 2.11 holds a stage's inputs to the strides that it was built with
        self.schedule = self.schedule or self.build(tokens)
        losses: list[Tensor] = []
        arguments = (tokens,) if 0 in self.stages else ()
        self.schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        settle(self.model)
        if self.tie is not None:
            self.tie()
        total = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=tokens.device)
        dist.all_reduce(total, group=self.group)
        return total

    def logits(self, tokens: Tensor) -> Tensor:
        """Evaluation: one stage after another, then the last one's logits (B, S, V) on every rank of the pipeline."""
        assert not torch.is_grad_enabled(), "a pipeline's training step goes through `gradients`"
        states = self.boundary(tokens)
        x = tokens
        for index, place in self.places.items():
            if index in self.stages:
                x = self.stages[index](x)
            if index < self.last and self.places[index + 1] != place:
                x = self.hand_on(x, place, self.places[index + 1], states)
        if self.last in self.stages and self.layout.vocabulary_shards > 1:
            x = whole(DTensor.from_local(x, self.grid.mesh["tp"], [Shard(-1)], run_check=False))
        if self.last not in self.stages:
            x = torch.empty(*tokens.shape, self.model.config.vocab_size, dtype=states.dtype, device=tokens.device)
        x = x.to(states.dtype).contiguous()
        dist.broadcast(x, dist.get_global_rank(self.group, self.places[self.last]), group=self.group)
        return x

    def hand_on(self, x: Tensor, source: int, target: int, like: Tensor) -> Tensor:
        """States from one rank of the pipeline to another; the others have nothing to do."""
        if self.grid.pp_rank == source:
            dist.send(x.contiguous(), dist.get_global_rank(self.group, target), group=self.group)
        elif self.grid.pp_rank == target:
            x = torch.empty(like.shape, dtype=like.dtype, device=self.grid.device)
            dist.recv(x, dist.get_global_rank(self.group, source), group=self.group)
        return x


def untie(grid: Grid, model: Decoder, places: dict[int, int]) -> Any:
    """Give the head a copy of the embedding; returns what keeps the two equal: the sum of their gradients.

    Both ends then make the same update from the same state, step after step.
    """
    model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    first, last = places[0], places[len(places) - 1]
    group = None
    if first != last:
        layout = grid.layout
        lines = torch.arange(dist.get_world_size()).view(layout.pp, -1).T.tolist()
        for line in lines:  # every rank takes part in making every group
            made = dist.new_group([line[first], line[last]])
            group = made if dist.get_rank() in (line[first], line[last]) else group

    def sum_gradients() -> None:
        ends = [end.weight for end in (model.embed, model.lm_head) if end is not None]
        if group is not None:
            for weight in ends:
                dist.all_reduce(local(weight.grad), group=group)
        elif len(ends) == 2:
            total = local(ends[0].grad) + local(ends[1].grad)
            for weight in ends:
                local(weight.grad).copy_(total)

    return sum_gradients


def clip(grid: Grid, run: Run) -> Any:
    """Clipping by the norm over all stages; a tied weight that two stages hold counts once."""

    def by_norm(parameters: list[Tensor], max_norm: float) -> Tensor:
        model = run.model
        assert model is not None
        twin = model.lm_head.weight if model.config.tied_embeddings and model.lm_head is not None else None
        gradients = [p.grad for p in parameters if p.grad is not None and p is not twin]
        square = squares(gradients)
        dist.all_reduce(square, group=grid.group("pp"))
        norm = square.sqrt()
        scale_to([p.grad for p in parameters if p.grad is not None], max_norm, norm)
        return norm

    return by_norm
