"""Saved tensors of blocks in host memory between the forward pass and the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dyno.techniques.offload._side import Side, host_waits


@dataclass(eq=False)
class Stash:
    """One storage: its copy on the host, then its bytes on the device again, until all its uses are over."""

    copy: Tensor
    uses: int = 0
    back: Tensor | None = None


@dataclass(eq=False)
class Group:
    """What one block of one forward pass saved, and the marks behind its copies out and back."""

    before: Group | None
    stashes: list[Stash] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)  # device memory that must stay until it is copied
    left: Any = None
    back: Any = None
    fetched: bool = False


class Stasher:
    """Sends what a block saves to the host as it is saved, and brings it back one block before its backward pass.

    Storages go once, however many views of them are saved. A block's copies out must be done two blocks later, so that
    the forward pass never holds more than two blocks that are leaving; the backward pass holds two that have come.

    Args:
        min_bytes: smaller storages stay. stays: addresses of storages that stay, the parameters'.
    """

    def __init__(self, side: Side, min_bytes: int, stays: Callable[[], set[int]]):
        self.side, self.min_bytes, self.stays = side, min_bytes, stays
        self.last: Group | None = None
        self.current: Group | None = None
        self.ours: set[int] = set()

    def block(self, first: bool, shared: Iterable[Any] = ()) -> torch.autograd.graph.saved_tensors_hooks:
        """The hooks of the next block; `first`: a forward pass begins. Tensors that all blocks are given stay."""
        if first:
            given = {t.untyped_storage()._cdata for t in shared if isinstance(t, Tensor)}
            self.last, self.current, self.ours = None, None, self.stays() | given
        group = self.last = Group(self.last)
        if group.before is not None and group.before.before is not None:
            self._settle(group.before.before)
        known: dict[tuple[int, int], tuple[StorageWeakRef, Stash]] = {}

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage.nbytes() < self.min_bytes or storage._cdata in self.ours or tensor.device != self.side.device:
                return tensor
            key = (storage._cdata, tensor._version)
            if key not in known or known[key][0].expired():
                known[key] = (StorageWeakRef(storage), self._send(group, storage))
            stash = known[key][1]
            stash.uses += 1
            return group, stash, (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _send(self, group: Group, storage: torch.UntypedStorage) -> Stash:
        there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        copy = torch.empty(len(there), dtype=torch.uint8, pin_memory=self.side.stream is not None)
        with self.side.after_compute():
            copy.copy_(there, non_blocking=True)
        group.leaving.append(there)
        group.left = self.side.event()
        group.stashes.append(Stash(copy))
        return group.stashes[-1]

    def _settle(self, group: Group) -> None:
        """The group's copies out are done, and its device memory is free."""
        host_waits(group.left)
        group.leaving.clear()

    def _fetch(self, group: Group | None) -> None:
        """Memory comes from the stream that computes, so that it is free there in order; the copy is on the side."""
        if group is None or group.fetched:
            return
        self._settle(group)
        group.fetched = True
        fresh = [torch.empty(len(stash.copy), dtype=torch.uint8, device=self.side.device) for stash in group.stashes]
        with self.side.after_compute():
            for stash, tensor in zip(group.stashes, fresh, strict=True):
                stash.back = tensor.copy_(stash.copy, non_blocking=True)
        group.back = self.side.event()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        group, stash, (dtype, offset, shape, stride) = packed
        if group is not self.current:  # the backward pass has come to this block
            self.current = group
            self._fetch(group)
            self.side.compute_waits(group.back)
            self._fetch(group.before)
        assert stash.back is not None, "a graph goes backward once"
        storage = stash.back.untyped_storage()
        stash.uses -= 1
        if stash.uses == 0:
            stash.back = None
            group.stashes.remove(stash)
        return torch.empty(0, dtype=dtype, device=self.side.device).set_(storage, offset, shape, stride)
