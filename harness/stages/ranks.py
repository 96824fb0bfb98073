"""What several ranks keep on each and send between them, read outside of the window."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from dyno.errors import RunFailure
from dyno.measure.together import gathered
from dyno.measure.wire import Wire
from dyno.record import Metric
from dyno.stages.shards import local

if TYPE_CHECKING:
    from dyno.stages.train import Trainer
    from dyno.technique import Run


@contextlib.contextmanager
def first_rank_first(rank: int, ranks: int) -> Iterator[None]:
    """Rank 0 goes through alone, then the others: what it leaves in the cache is not made again."""
    if ranks > 1 and rank > 0:
        dist.barrier()
    yield
    if ranks > 1 and rank == 0:
        dist.barrier()


def same_on_every_rank(tokens: Tensor) -> None:
    """Raise when ranks that decode one text have not chosen the same tokens (B, T)."""
    texts = gathered(tokens.cpu())
    if any(not torch.equal(text, texts[0]) for text in texts):
        raise RunFailure("the ranks have decoded different tokens; they see the same logits and must choose alike")


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that this rank holds of tensors, of which some may be sharded."""
    parts = [local(t) for t in tensors if isinstance(t, Tensor)]
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
    sent = counted_wire(trainer.run, trainer.step, "step")
    hook.remove()
    held["parameter_bytes"] = local_bytes(trainer.parameters)
    held["optimizer_bytes"] = local_bytes(v for state in trainer.optimizer.state.values() for v in state.values())
    return {"wire_bytes": sent, **{name: Metric(value, "B", source="count") for name, value in held.items()}}


def counted_wire(run: Run, step: Callable[[], Any], what: str) -> Metric:
    """Bytes that the busiest rank sends in one `step`, which all ranks take together; every rank's table is noted."""
    with Wire() as wire:
        step()
    tables = gathered(wire.rows(run.part("groups")))
    run.note("wire", tables)
    sent = [sum(row["sent_bytes"] for row in table) for table in tables]
    source = f"one {what}'s collectives, each as a ring sends it; the busiest rank"
    return Metric(max(sent), "B", len(sent), min(sent), max(sent), source=source)


def counted_pass(run: Run, one_pass: Callable[[], int]) -> dict[str, Metric]:
    """The same of one decode pass, by itself and by token that it gains, and the weights that this rank holds."""
    assert run.model is not None
    gained: list[int] = []
    sent = counted_wire(run, lambda: gained.append(one_pass()), "decode pass")
    each = {name: getattr(sent, name) / gained[0] for name in ("value", "low", "high")}
    held = Metric(local_bytes(run.model.parameters()), "B", source="count")
    return {"wire_bytes": sent, "wire_bytes_per_token": replace(sent, unit="B/token", **each), "parameter_bytes": held}
