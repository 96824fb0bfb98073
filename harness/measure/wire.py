"""Bytes on the wire: every collective that PyTorch dispatches, by its kind and by the process group that it uses.

    with Wire() as wire:
        step()
    rows = wire.rows(names)      # names: group name -> dimension of the mesh

Payloads are read from the tensors; what a rank sends of one is what a ring algorithm sends, n ranks, m bytes: all-reduce
2 m (n - 1) / n, all-gather, reduce-scatter, all-to-all and broadcast m (n - 1) / n with m the whole, a send m. What a
library really does may differ (trees, multicast), so `payload_bytes` stands beside `sent_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kind:
    """A collective operation: its name, which argument is the group, which holds the payload, and the ring's factor."""

    name: str
    group: int
    payload: int
    rounds: float = 1.0  # of m (n - 1) / n
    gathers: bool = False  # the argument is one rank's part of the payload


KINDS = {
    "c10d::allreduce_": Kind("all_reduce", 1, 0, 2.0),
    "c10d::allreduce_coalesced_": Kind("all_reduce", 1, 0, 2.0),
    "c10d::_allgather_base_": Kind("all_gather", 2, 0),
    "c10d::allgather_": Kind("all_gather", 2, 0),
    "c10d::allgather_into_tensor_coalesced_": Kind("all_gather", 2, 0),
    "c10d::_reduce_scatter_base_": Kind("reduce_scatter", 2, 1),
    "c10d::reduce_scatter_": Kind("reduce_scatter", 2, 1),
    "c10d::reduce_scatter_tensor_coalesced_": Kind("reduce_scatter", 2, 1),
    "c10d::alltoall_base_": Kind("all_to_all", 2, 1),
    "c10d::alltoall_": Kind("all_to_all", 2, 1),
    "c10d::broadcast_": Kind("broadcast", 1, 0),
    "c10d::send": Kind("send", 1, 0),
    "_c10d_functional::all_reduce": Kind("all_reduce", 2, 0, 2.0),
    "_c10d_functional::all_reduce_": Kind("all_reduce", 2, 0, 2.0),
    "_c10d_functional::all_reduce_coalesced": Kind("all_reduce", 2, 0, 2.0),
    "_c10d_functional::all_reduce_coalesced_": Kind("all_reduce", 2, 0, 2.0),
    "_c10d_functional::all_gather_into_tensor": Kind("all_gather", 2, 0, gathers=True),
    "_c10d_functional::all_gather_into_tensor_out": Kind("all_gather", 2, 0, gathers=True),
    "_c10d_functional::all_gather_into_tensor_coalesced": Kind("all_gather", 2, 0, gathers=True),
    "_c10d_functional::reduce_scatter_tensor": Kind("reduce_scatter", 3, 0),
    "_c10d_functional::reduce_scatter_tensor_out": Kind("reduce_scatter", 3, 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": Kind("reduce_scatter", 3, 0),
    "_c10d_functional::all_to_all_single": Kind("all_to_all", 3, 0),
    "_c10d_functional::broadcast": Kind("broadcast", 2, 0),
    "_c10d_functional::broadcast_": Kind("broadcast", 2, 0),
    "_dtensor::shard_dim_alltoall": Kind("all_to_all", 3, 0),
}


class Wire(TorchDispatchMode):
    """Counts the collectives of everything that runs inside, the backward pass and compiled code included."""

    supports_higher_order_operators = True  # which a compiler's capture of recomputation is made of

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], list[float]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Else the compiler would give up what is called inside, and leave it eager for good."""
        return True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it turns into collectives on plain tensors, which come here again
        kind = KINDS.get(func._schema.name) if isinstance(func, torch._ops.OpOverload) else None
        if kind is not None and not any(issubclass(t, FakeTensor) for t in types):  # a compiler works out shapes
            self._count(kind, args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: Kind, args: tuple[Any, ...]) -> None:
        named: Any = args[kind.group]
        resolve = dist.distributed_c10d._resolve_process_group if isinstance(named, str) else dist.ProcessGroup.unbox
        group = resolve(named)
        ranks = group.size()
        payload = sum(t.numel() * t.element_size() for t in tree_leaves(args[kind.payload]) if isinstance(t, Tensor))
        payload *= ranks if kind.gathers else 1
        sent = payload if kind.name == "send" else payload * kind.rounds * (ranks - 1) / ranks
        if ranks > 1:
            row = self.counts.setdefault((group.group_name, kind.name), [0, 0, 0.0])
            row[0] += 1
            row[1] += payload
            row[2] += sent

    def rows(self, names: dict[str, str]) -> list[dict[str, Any]]:
        """The counts by dimension and kind; a group without a name is the world's or a technique's own."""
        found: dict[tuple[str, str], list[float]] = {}
        for (group, kind), row in self.counts.items():
            total = found.setdefault((names.get(group, "other"), kind), [0, 0, 0.0])
            for i, value in enumerate(row):
                total[i] += value
        return [
            {"dimension": d, "kind": kind, "calls": int(c), "payload_bytes": int(p), "sent_bytes": s}
            for (d, kind), (c, p, s) in sorted(found.items())
        ]
