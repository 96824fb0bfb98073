"""Structured pruning of the feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class FFNChannels(Technique):
    """Removes the FFN channels with the smallest product of their gate, up and down norms.

    After Ma et al. 2023, arXiv:2305.11627, without gradients. `ratio` is the share of channels removed from every
    layer; what is kept is rounded up to a multiple of `multiple`, which matrix units like. The matrices really shrink.
    """

    ratio: float = 0.25
    multiple: int = 8

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if not 0 <= self.ratio < 1:
            return f"pruning.ratio is {self.ratio}; it takes a share from 0 to below 1"
        return None if self.multiple > 0 else f"pruning.multiple is {self.multiple}; it takes 1 or more"

    def kept(self, width: int) -> int:
        """Channels kept of `width`."""
        wanted = width - int(self.ratio * width)
        return min(width, max(1, -(-wanted // self.multiple)) * self.multiple)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        removed = 3 * shape.hidden * (shape.ffn - self.kept(shape.ffn)) * shape.layers
        return Footprint(linear_factor=1 - removed / shape.linear_parameters)

    def apply(self, run: Run) -> None:
        from torch import nn

        model = run.model
        assert model is not None
        before = sum(p.numel() for p in model.parameters())
        width = self.kept(model.config.ffn_width)
        for index, block in enumerate(model.blocks):
            mlp: Any = block.mlp
            found = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            if not all(isinstance(layer, nn.Linear) for layer in found):
                raise UserError(f"ffn_channels needs plain gate, up and down projections; block {index} has others")
            channels = strongest(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, width)
            mlp.gate_proj = take(mlp.gate_proj, channels, dim=0)
            mlp.up_proj = take(mlp.up_proj, channels, dim=0)
            mlp.down_proj = take(mlp.down_proj, channels, dim=1)
        run.note("pruning", {"ffn_width_before": model.config.ffn_width, "ffn_width": width})
        model.config = replace(model.config, ffn_width=width)
        after = sum(p.numel() for p in model.parameters())
        run.note("parameters", after)
        run.note("parameters_before_pruning", before)


def strongest(gate: Tensor, up: Tensor, down: Tensor, count: int) -> Tensor:
    """Ascending indices (count,) of the channels with the largest norm product; gate, up (F, E), down (E, F)."""
    score = gate.detach().float().norm(dim=1) * up.detach().float().norm(dim=1) * down.detach().float().norm(dim=0)
    return score.topk(count).indices.sort().values


def take(layer: nn.Linear, channels: Tensor, dim: int) -> nn.Linear:
    """A smaller layer with these outputs (dim 0) or inputs (dim 1) of `layer`."""
    import torch
    from torch import nn

    weight = layer.weight.detach().index_select(dim, channels)
    outputs, inputs = weight.shape
    smaller = nn.Linear(inputs, outputs, bias=layer.bias is not None, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        smaller.weight.copy_(weight)
        if layer.bias is not None:
            smaller.bias.copy_(layer.bias[channels] if dim == 0 else layer.bias)
    return smaller.requires_grad_(layer.weight.requires_grad)
