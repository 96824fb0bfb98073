"""The memory of a training step, seen and not computed: the real code on fake tensors, every allocation counted.

A fake tensor has a shape and no data, so a step of any size is traced in seconds on any machine. It stands beside the
arithmetic of `dyno.plan.memory`, which must agree with it. What a kernel allocates inside itself is not seen, nor what
a compiler would fuse.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyno.model.config import BYTE_VOCABULARY, config_of
from dyno.model.decoder import Decoder
from dyno.pipeline import Pipeline
from dyno.recipe import Recipe
from dyno.stages import train

CPU = torch.device("cpu")  # autograd refuses fake CUDA tensors in a build without CUDA
GRAIN_BYTES = 512  # the CUDA allocator's


class Allocations(TorchDispatchMode):
    """Bytes alive and their peak; `alive` maps a storage to (bytes, operation, shape, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[int, str, tuple[int, ...], torch.dtype]] = {}
        self.now = self.peak = 0
        self.at_peak: list[tuple[int, str, tuple[int, ...], torch.dtype]] = []

    def see(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        if key in self.alive or not size:
            return
        self.alive[key] = (size, operation, tuple(tensor.shape), tensor.dtype)
        self.now += size
        weakref.finalize(storage, self.drop, key)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.alive.values())

    def drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled() and isinstance(args[1], Tensor):
            return args[0]  # the engine adds gradients in place, but for tensor subclasses such as fake ones
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax_backward_data.default:
            product = torch.empty_like(out)  # CUDA's kernel first multiplies its two inputs
            self.see(product, str(func))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, str(func))
        return out


class StateOnly(torch.optim.Optimizer):
    """AdamW's state without its arithmetic: the fused CUDA step allocates nothing else."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter not in self.state:
                self.state[parameter] = {"m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """CUDA's flash kernel as an operation on fake tensors; grouped heads as they are."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]


def expanded(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """A fused kernel that knows no grouped heads."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return flash(q, k, v, causal=causal, scale=scale)


def unfused(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """PyTorch's own unfused products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """16-bit products are products of the CPU too, whatever its instructions."""
    with mock.patch("dyno.techniques.precision.formats.cpu_multiplies", return_value=True):
        yield


def traced(recipe: Recipe, attention: Any = None) -> Allocations:
    """The second training step of a recipe, allocation by allocation.

    Args:
        attention: stands in for the recipe's kernel where that cannot take fake tensors.
    """
    workload = recipe.config["workload"]
    config = config_of(recipe.config["model"], recipe.config["tokenizer"].get("vocab_size") or BYTE_VOCABULARY)
    with torch.device("meta"):
        model = Decoder(config)
    with tempfile.TemporaryDirectory() as folder, as_on_a_gpu(), FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape))
        model.inverse_frequency = torch.empty(config.head_dim // 2)
        if config.tied_embeddings:
            model.lm_head.weight = model.embed.weight
        model.train()
        run = train.prepared_run(Pipeline(recipe, CPU, Path(folder)), model)
        if attention is not None:
            model.attend = attention
        with Allocations() as seen:
            for parameter in model.parameters():
                seen.see(parameter, "parameter")
            optimizer = StateOnly(list(model.parameters()))
            for _ in range(2):
                seen.peak = 0
                tokens = torch.empty(2, workload["batch"], workload["seq"], dtype=torch.int64)
                loss = run.part("gradients")(*run.part("local_batch")(tokens[0], tokens[1]))
                torch.nn.utils.clip_grad_norm_(list(model.parameters()), train.MAX_GRADIENT_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                del loss, tokens
    return seen
