"""Speculative decoding with a draft model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique
from dyno.techniques.decoding.sampling import wrong_cuts

if TYPE_CHECKING:
    from torch import Tensor

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Speculative(Technique):
    """A small model drafts `draft_length` tokens, one pass of the target checks them all; exact in distribution.

    Paper: Leviathan et al. 2023, arXiv:2211.17192. A drafted token x is accepted with min(1, p(x)/q(x)); at the first
    rejection the token is redrawn from norm(max(0, p - q)); when all are accepted a bonus token comes from p.
    `draft` holds the overrides of the draft model's own recipe. Temperature 0 is greedy.
    """

    draft: list[str] = field(default_factory=lambda: ["model=draft"])
    draft_length: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def positions_per_pass(self) -> int:
        return self.draft_length + 1

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.draft_length < 1:
            return f"decoding.draft_length is {self.draft_length}; it takes 1 or more tokens"
        return wrong_cuts(self.temperature, self.top_k, self.top_p)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """The draft's own cache: a quarter of the target's is assumed, its sizes are in another recipe."""
        return Footprint(kv_cache_factor=1.25)

    def apply(self, run: Run) -> None:
        assert run.build_model is not None and run.model is not None
        run.draft = run.build_model(self.draft).eval()
        if run.draft.config.vocab_size != run.model.config.vocab_size:
            from dyno.errors import Unsupported

            raise Unsupported(
                f"the draft model has {run.draft.config.vocab_size} tokens, the target {run.model.config.vocab_size}"
            )
        run.replace("decode", self, by=self)

    def start(self, run: Run, prompts: Tensor, length: int) -> Any:
        from dyno.techniques.decoding._speculation import SpeculativeSession

        return SpeculativeSession(run, prompts, length, self)
