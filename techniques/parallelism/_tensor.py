"""Tensor parallelism: every matrix split over ranks by columns or rows, norms and residuals by tokens if asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from dyno.model.decoder import Decoder
from dyno.stages.shards import whole
from dyno.technique import Run
from dyno.techniques.parallelism._grid import Grid, settle


class Replicated(ParallelStyle):
    """A module that every rank runs alike on plain tensors: its weights join the mesh, its arithmetic does not change."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        def enter(module: nn.Module, inputs: Any, mesh: Any) -> Any:
            return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

        return distribute_module(module, device_mesh, None, enter, lambda module, out, mesh: out.to_local())


def split(grid: Grid, run: Run) -> None:
    """Put the model's weights on the tensor dimension; what remains of each module's seams are plain local tensors.

    Between blocks a rank holds the whole (B, S, E), or with sequence_parallel its (B, S / tp, E) of the tokens.
    """
    layout, mesh, model = grid.layout, grid.mesh["tp"], run.model
    assert model is not None
    tied = model.embed is not None and model.lm_head is not None and model.lm_head.weight is model.embed.weight
    between = Shard(1) if layout.sequence_parallel else Replicate()
    norm = SequenceParallel() if layout.sequence_parallel else Replicated()
    for block in model.blocks:
        plan: dict[str, ParallelStyle] = {
            "attention_norm": norm,
            "mlp_norm": norm,
            # One gather for the three (two) products below it, and one reduction of their gradients.
            "attention": PrepareModuleInput(
                input_layouts=(between, None, None, None, None),
                desired_input_layouts=(Replicate(), None, None, None, None),
            ),
            "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
            **{f"attention.{name}_proj": ColwiseParallel() for name in "qkv"},
            "attention.o_proj": RowwiseParallel(output_layouts=between),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=between),
        }
        attention: Any = block.attention
        if attention.q_norm is not None:  # (B, S, heads, D): this rank has its share of the heads
            plan |= {f"attention.{n}_norm": SequenceParallel(sequence_dim=2, use_local_output=True) for n in "qk"}
        parallelize_module(block, mesh, plan)
    if model.embed is not None:
        parallelize_module(model.embed, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=between))
        # A compiled block takes no tensor whose collective is still in flight; a copy has waited for it.
        model.embed.register_forward_hook(lambda module, inputs, out: out.clone())
    if model.lm_head is not None:
        parallelize_module(model.norm, mesh, norm)
        head = ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if layout.loss_parallel else Replicate(),
            use_local_output=not layout.loss_parallel,
        )
        parallelize_module(model.lm_head, mesh, head)
    if tied:
        model.lm_head.weight = model.embed.weight
    if layout.loss_parallel:
        run.wrap("loss", with_plain_result, by=layout)
        run.wrap("gradients", in_vocabulary_shards, by=layout)
    if layout.pp == 1:  # a pipeline does both itself
        run.wrap("gradients", lambda gradients: settled(gradients, model), by=layout)
        run.wrap("forward", whole_logits, by=layout)


def with_plain_result(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss over logits (B, S, V) that are split along V; its value is the same number on every rank."""
    return lambda forward, tokens, targets: whole(loss(forward, tokens, targets))


def in_vocabulary_shards(gradients: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The softmax's maximum and sum travel, not the logits: forward and backward run in PyTorch's loss_parallel."""

    def sharded(tokens: Tensor, targets: Tensor) -> Tensor:
        with loss_parallel():
            return gradients(tokens, targets)

    return sharded


def whole_logits(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Evaluation's forward pass: the logits of the whole vocabulary on every rank; training's are left in shards."""
    return lambda tokens, **more: forward(tokens, **more) if torch.is_grad_enabled() else whole(forward(tokens, **more))


def settled(gradients: Callable[..., Tensor], model: Decoder) -> Callable[..., Tensor]:
    """A step's gradients, each where its weight lies."""

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = gradients(tokens, targets)
        settle(model)
        return loss

    return step
