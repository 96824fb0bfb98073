"""What a training step keeps and what it computes twice: measured once, outside the timed window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dyno.measure.environment import detect
from dyno.plan import predict
from dyno.record import Metric, unmeasured
from dyno.technique import Run

ATTENTION = "_scaled_dot_product"  # torch has no formula for some of them, and for grouped heads none
SEEN = 0.9  # of the forward pass's products, for a count to be believed


def attention_flops(q: Tensor, k: Tensor, products: int) -> int:
    """FLOPs of so many products between queries (B, H, Sq, D) and keys (B, G, Sk, D), masked pairs counted too."""
    batch, heads, queries, dim = q.shape
    return products * 2 * batch * heads * queries * k.shape[2] * dim


class Watch(TorchDispatchMode):
    """FLOPs of every operation by kind, and the storages that were seen; compiled code runs as it would without it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.made: dict[int, StorageWeakRef] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, FakeTensor) for kind in types):  # a layout works out shapes: nothing is computed
            return func(*args, **(kwargs or {}))
        if set(types) - {Tensor, torch.nn.Parameter}:  # a subclass: a sharded tensor first tells its own operations
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        name = packet.__name__
        if name.startswith(ATTENTION):
            backward = name.endswith("backward")  # whose first argument is the gradient
            kind = "attention backward" if backward else "attention"
            q, k = args[backward : backward + 2]
            self.flops[kind] += attention_flops(q, k, products=5 if backward else 2)
        elif packet in flop_registry:
            self.flops["products"] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.saw(tensor)
        return out

    def saw(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.made[storage._cdata] = StorageWeakRef(storage)

    def alive(self) -> dict[int, int]:
        """Storages seen here that are still held: address -> bytes now, which a layout may have let go."""
        found = {key: torch.UntypedStorage._new_with_weak_ptr(weak.cdata) for key, weak in self.made.items()}
        return {key: storage.nbytes() for key, storage in found.items() if storage is not None}


class FirstForward:
    """Stands in for the part `loss` of one step: watches its first call, and tells its operations from the rest."""

    def __init__(self, run: Run, loss: Callable[..., Tensor], watch: Watch):
        self.run, self.loss, self.watch = run, loss, watch
        self.bytes: int | None = None
        self.flops: Counter[str] = Counter()

    def __call__(self, forward: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        before = self.watch.flops.copy()
        loss = self._kept(forward, tokens, targets) if self.bytes is None else self.loss(forward, tokens, targets)
        self.flops += self.watch.flops - before
        return loss

    def _kept(self, forward: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        """On a GPU what the allocator holds more than before; else storages that autograd or anybody else holds."""
        if self.run.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.run.device)
            loss = self.loss(forward, tokens, targets)
            self.bytes = torch.cuda.memory_allocated(self.run.device) - before
            return loss
        assert self.run.model is not None
        ours = {p.untyped_storage()._cdata for p in self.run.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            self.watch.saw(tensor)  # what compiled code saves was made out of sight
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(forward, tokens, targets)
        self.bytes = sum(size for key, size in self.watch.alive().items() if key not in ours)
        return loss


def metrics(
    run: Run, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor, step_flops: float, forward_flops: float
) -> dict[str, Metric]:
    """activation_bytes of a micro-batch and recomputed_flops of a step, both of this rank.

    One more step's gradients are computed for it and thrown away.

    Args:
        tokens, targets: a global batch (B, S). step_flops: the model FLOPs of a step. forward_flops: those of the
            matrix products with weights in its forward pass. Both of all ranks together.
    """
    loss, watch = run.part("loss"), Watch()
    first = FirstForward(run, loss, watch)
    run.parts["loss"] = first
    try:
        x, y = run.part("local_batch")(tokens, targets)
        with watch:
            run.part("gradients")(x.to(run.device), y.to(run.device))
    finally:
        run.parts["loss"] = loss
        optimizer.zero_grad(set_to_none=True)
    if first.bytes is None:
        reason = "this layout runs its own forward passes"
        return {"activation_bytes": unmeasured("B", reason), "recomputed_flops": unmeasured("FLOP", reason)}
    source = "torch_allocator" if run.device.type == "cuda" else "storages held after a forward pass, each once"
    return {
        "activation_bytes": Metric(first.bytes, "B", source=source),
        "recomputed_flops": recomputed(run, watch.flops, first.flops, step_flops, forward_flops / run.ranks),
    }


def recomputed(run: Run, step: Counter[str], forward: Counter[str], step_flops: float, forward_flops: float) -> Metric:
    """What the backward pass computes beyond its own two products for each one, attention's forward pass included.

    Where the counter sees too few of the products (kernels of our own), the plan's arithmetic, labelled as predicted.
    """
    if forward["products"] < SEEN * forward_flops:
        planned = predict(run.recipe, detect(run.recipe.config["hardware"])).flops_per_step
        seen = f"predicted: the counter saw {forward['products'] / forward_flops:.0%} of the matrix products"
        return Metric((planned - step_flops) / run.ranks, "FLOP", source=seen)
    extra = step["products"] - 3 * forward["products"] + step["attention"] - forward["attention"]
    if extra < 0:
        return unmeasured("FLOP", "part of the backward pass runs in the forward pass and cannot be told from it")
    return Metric(extra, "FLOP", source="flop_counter: a step's products beyond three times its forward pass's")
