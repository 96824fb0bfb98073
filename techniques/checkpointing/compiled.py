"""Checkpointing by the graph compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape
from dyno.techniques.checkpointing.blocks import Recomputing, blocks_share

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Budget(Recomputing):
    """torch.compile's partitioner chooses what to keep: `budget` of what it would keep by itself, at the least FLOPs.

    Source: torch._functorch.config.activation_memory_budget; the choice is a knapsack over the joint graph, as in
    Jain et al. 2020, Checkmate, arXiv:1910.02653. 1 is the compiler's default, 0 recomputes everything from the inputs.
    """

    budget: float = 0.5

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if not 0 <= self.budget <= 1:
            return f"checkpointing.budget is {self.budget}; it takes 0 to 1"
        if recipe.option("compile") == "off" and recipe.config["workload"]["measures"] == "train":
            return "the budget is kept by the graph compiler; add compile=on, or take checkpointing=optimal"
        return super().unsupported(recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """In proportion, as a guess: the compiler decides, and `recomputed_flops` says what it took."""
        again = max(0.0, 1 - self.budget)
        return Footprint(
            activation_factor=max(self.budget, 0.0),
            blocks_again=again,
            flops_factor=1 + again * blocks_share(shape) / 3,
        )

    def apply(self, run: Run) -> None:
        from torch._functorch import config

        config.activation_memory_budget = self.budget
