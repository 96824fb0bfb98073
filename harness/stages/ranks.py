"""What a step of several ranks keeps on each and sends between them, read in one step outside of the window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from dyno.measure.wire import Wire
from dyno.record import Metric

if TYPE_CHECKING:
    from dyno.stages.train import Trainer


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that this rank holds of tensors, of which some may be sharded."""
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in parts)


def counted_step(trainer: Trainer) -> dict[str, Metric]:
    """Take one step, which all ranks take together, and read it.

    `parameter_bytes`, `gradient_bytes` and `optimizer_bytes` are what this rank's optimizer sees and keeps;
    `wire_bytes` is what the busiest rank sent, its table by dimension and kind is noted in the record's details.
    """
    held: dict[str, int] = {}

    def read(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held["gradient_bytes"] = local_bytes(p.grad for p in trainer.parameters)

    hook = trainer.optimizer.register_step_pre_hook(read)
    with Wire() as wire:
        trainer.step()
    hook.remove()
    held["parameter_bytes"] = local_bytes(trainer.parameters)
    held["optimizer_bytes"] = local_bytes(v for state in trainer.optimizer.state.values() for v in state.values())
    rows = wire.rows(trainer.run.part("groups"))
    tables: list[Any] = [None] * trainer.run.ranks
    dist.all_gather_object(tables, rows)
    trainer.run.note("wire", tables)
    sent = [sum(row["sent_bytes"] for row in table) for table in tables]
    counted = "one step's collectives, each as a ring sends it"
    return {
        "wire_bytes": Metric(max(sent), "B", len(sent), min(sent), max(sent), source=f"{counted}; the busiest rank"),
        **{name: Metric(value, "B", source="count") for name, value in held.items()},
    }
