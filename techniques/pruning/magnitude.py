"""Unstructured pruning by magnitude."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.technique import Run, Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Magnitude(Technique):
    """The weights of smallest magnitude become zero, exactly `sparsity` of them.

    Paper: Han et al. 2015, arXiv:1506.02626. `scope` "matrix" prunes each matrix alike, "global" ranks the weights of
    all matrices together. `skip` lists module names to leave alone. Matrices stay dense: this shows what sparsity
    costs in quality; without a sparse kernel it saves neither memory nor time. A gradient hook keeps pruned weights at
    zero in later training.
    """

    sparsity: float = 0.5
    scope: str = "matrix"
    skip: list[str] = field(default_factory=lambda: ["lm_head"])

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if not 0 <= self.sparsity < 1:
            return f"pruning.sparsity is {self.sparsity}; it takes a share from 0 to below 1"
        if self.scope not in ("matrix", "global"):
            return f"pruning.scope is {self.scope}; it takes matrix or global"
        return None

    def apply(self, run: Run) -> None:
        from dyno.techniques.quantization._linear import linears

        assert run.model is not None
        layers = linears(run.model, self.skip)
        if not layers:
            raise UserError("pruning.skip leaves no linear layer to prune")
        weights: list[Any] = [layer.weight for layer in layers.values()]
        for chosen in [weights] if self.scope == "global" else [[weight] for weight in weights]:
            prune(chosen, self.sparsity)
        zeros = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
        total = sum(weight.numel() for weight in weights)
        parameters = sum(p.numel() for p in run.model.parameters())
        run.note("sparsity", sum(zeros.values()) / total)
        run.note(
            "pruning",
            {
                "pruned_weights": sum(zeros.values()),
                "prunable_weights": total,
                "sparsity_of_all_parameters": sum(zeros.values()) / parameters,
                "sparsity_by_layer": {name: zeros[name] / layer.weight.numel() for name, layer in layers.items()},
            },
        )


def prune(weights: list[nn.Parameter], sparsity: float) -> None:
    """Zero the round(sparsity * count) smallest of these weights together, in place; ties never prune more."""
    import torch

    flat = torch.cat([weight.detach().abs().flatten() for weight in weights])
    mask = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[flat.topk(round(sparsity * flat.numel()), largest=False, sorted=False).indices] = False
    kept = mask.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, kept, strict=True):
        weight.data.mul_(part.view_as(weight))
        if weight.requires_grad:
            weight.register_hook(lambda grad, weight=weight: _only_kept(grad, weight))


def _only_kept(grad: Tensor, weight: Tensor) -> Tensor:
    """The mask is read off the weight, so that it costs no memory."""
    return grad * (weight != 0)
