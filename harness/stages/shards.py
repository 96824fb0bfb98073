"""Parameters that a layout has split over ranks (DTensor), seen by a training step.

Python works out the placements of every operation on a DTensor anew, which costs the host more than a small model's update
costs the GPU. What needs no other rank's numbers is therefore done on a rank's own parts, which are plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim.adamw import adamw as functional


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor lies on a mesh of ranks, in parts or whole."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor; detached, in the same memory."""
    if not is_dtensor(tensor):
        return tensor.detach()
    if torch.is_grad_enabled():
        with torch.no_grad():  # its entry takes longer than all the rest, and a step asks hundreds of times
            return local(tensor)
    part = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # its last change of placement may be on its way


def whole(tensor: Any) -> Tensor:
    """All of a sharded tensor, gathered on every rank, which call this together; or the tensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def like(full: Tensor, sharded: Any) -> Any:
    """A tensor that every rank has whole, cut as `sharded` is."""
    if not is_dtensor(sharded):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=sharded.placements)


def squares(gradients: Iterable[Any]) -> Tensor:
    """The sum of the squares of whole gradients; the ranks that hold parts of one call this together.

    Those that lie on the same groups of ranks are summed before they travel, as one number.
    """
    together: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for gradient in gradients:
        together.setdefault(split_over(gradient), []).append(local(gradient))
    sums = []
    for groups, parts in together.items():
        square = torch.nn.utils.get_total_norm(parts).float() ** 2
        for group in groups:
            dist.all_reduce(square, group=group)
        sums.append(square)
    return torch.stack(sums).sum()


def split_over(tensor: Any) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which a tensor is split."""
    if not is_dtensor(tensor):
        return ()
    mesh = tensor.device_mesh
    places = [i for i, at in enumerate(tensor.placements) if not at.is_replicate() and mesh.size(i) > 1]
    return tuple(mesh.get_group(i) for i in places)


def scale_to(gradients: Sequence[Any], max_norm: float, norm: Tensor) -> None:
    """Scale gradients of this norm in place, so that it becomes `max_norm` at most."""
    torch._foreach_mul_([local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def clip(parameters: Sequence[Any], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, on a rank's own parts where gradients are split; returns their norm together."""
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_dtensor, gradients)):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = squares(gradients).sqrt()
    scale_to(gradients, max_norm, norm)
    return norm


def adamw(
    parameters: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """PyTorch's AdamW, fused on a GPU, of parameters that may be split."""
    parameters = list(parameters)
    kind = SplitAdamW if any(map(is_dtensor, parameters)) else torch.optim.AdamW
    return kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=parameters[0].device.type == "cuda")


class SplitAdamW(torch.optim.AdamW):
    """PyTorch's AdamW by the same kernels, on a rank's own parts of its parameters.

    Moments are split as their parameters are, and so are checkpoints. PyTorch's fused step of DTensors also leaks in
    its versions 2.10 and 2.11 (pytorch#181761).
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._step_supports_amp_scaling = False  # a loss scaler then leaves out a step by itself

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                    self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            states = [self.state[p] for p in parameters]
            functional(
                [local(p) for p in parameters], [local(p.grad) for p in parameters],
                [local(s["exp_avg"]) for s in states], [local(s["exp_avg_sq"]) for s in states], [],
                [s["step"] for s in states], fused=group["fused"], amsgrad=False, beta1=group["betas"][0],
                beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False,
            )  # fmt: skip
