"""Greedy decoding and plain sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.technique import Run, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Greedy(Technique):
    """The most likely token, one a pass."""

    positions_per_pass = 1

    def apply(self, run: Run) -> None:
        run.replace("decode", self, by=self)

    def start(self, run: Run, prompts: Tensor, length: int) -> Any:
        """Read the prompts (B, P) and choose the first token; a session with room for `length` tokens."""
        from dyno.techniques.decoding._sampling import PlainSession

        return PlainSession(run, prompts, length, lambda logits: logits.argmax(-1))


@dataclass
class Sampling(Greedy):
    """Tokens drawn with temperature, top-k and top-p, seeded.

    Paper: Holtzman et al. 2019, arXiv:1904.09751. top_k 0 and top_p 1 switch the cuts off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        return wrong_cuts(self.temperature, self.top_k, self.top_p)

    def start(self, run: Run, prompts: Tensor, length: int) -> Any:
        import torch

        from dyno.techniques.decoding._sampling import PlainSession, distribution, draw

        generator = torch.Generator(run.device).manual_seed(run.recipe.config["seed"])

        def choose(logits: Tensor) -> Tensor:
            return draw(distribution(logits, self.temperature, self.top_k, self.top_p), generator)

        return PlainSession(run, prompts, length, choose)


def wrong_cuts(temperature: float, top_k: int, top_p: float) -> str | None:
    """The reason why these knobs describe no distribution, or None."""
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        return "decoding takes temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
    return None
