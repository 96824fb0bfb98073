"""Gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class GradientAccumulation(Technique):
    """Split a step's batch into micro-batches and add their gradients: the same step in less activation memory.

    Source: folklore; the mean over equal micro-batches equals the mean over the batch.
    """

    micro_batches: int = 4

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        batch = recipe.config["workload"]["batch"]
        ranks = max(1, *(t.data_ranks for chosen in recipe.techniques.values() for t in chosen))
        if self.micro_batches < 1 or batch % (ranks * self.micro_batches):
            over = f" on each of {ranks} ranks" if ranks > 1 else ""
            return f"workload.batch={batch} cannot be split into accumulation.micro_batches={self.micro_batches}{over}"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(batch_factor=1 / max(1, self.micro_batches), micro_batches=max(1, self.micro_batches))

    def apply(self, run: Run) -> None:
        run.replace("micro_batches", self.micro_batches, by=self)
