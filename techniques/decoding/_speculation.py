"""One session of speculative decoding over a batch whose sequences stay equally long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyno.technique import Run
from dyno.techniques.decoding._sampling import Reader, distribution, draw

if TYPE_CHECKING:
    from dyno.techniques.decoding.speculative import Speculative


def verify(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator) -> tuple[int, Tensor]:
    """Accept drafted tokens (B, K) under target p (B, K+1, V) and draft q (B, K, V).

    Returns m and the tokens (B, m+1) that the batch gains: m is the shortest accepted run over the batch. A sequence
    whose own run is longer keeps its drafted token at position m, which is accepted; the rest is redrawn or the bonus.
    Stopping at m looks at nothing beyond position m, so every emitted token still follows p.
    """
    length = drafted.shape[1]
    chosen = drafted[..., None]
    ratio = p[:, :length].gather(-1, chosen) / q.gather(-1, chosen)
    accepted = torch.rand(drafted.shape, generator=generator, device=p.device) < ratio[..., 0]
    runs = accepted.long().cumprod(1).sum(1)
    m = int(runs.min())
    if m == length:
        return m, torch.cat((drafted, draw(p[:, m], generator)[:, None]), 1)
    residual = (p[:, m] - q[:, m]).clamp_min(0)
    mass = residual.sum(-1, keepdim=True)
    residual = torch.where(mass > 0, residual, p[:, m])  # p == q: a rejection there has probability zero
    redrawn = draw(residual / residual.sum(-1, keepdim=True), generator)
    last = torch.where(runs > m, drafted[:, m], redrawn)
    return m, torch.cat((drafted[:, :m], last[:, None]), 1)


class SpeculativeSession:
    def __init__(self, run: Run, prompts: Tensor, length: int, knobs: Speculative):
        assert run.model is not None and run.draft is not None
        self.knobs = knobs
        self.batch, self.prompt = prompts.shape
        room = length + knobs.draft_length + 1
        self.target = Reader(run, run.model, self.batch, room)
        self.draft = Reader(run, run.draft, self.batch, room)
        self.generator = torch.Generator(run.device).manual_seed(run.recipe.config["seed"])
        self.tokens = prompts
        first = draw(self._distribution(self.target.read(prompts, 1)[:, -1]), self.generator)
        self.start = self.tokens = torch.cat((prompts, first[:, None]), 1)
        self.draft.read(prompts, 1)

    def _distribution(self, logits: Tensor) -> Tensor:
        return distribution(logits, self.knobs.temperature, self.knobs.top_k, self.knobs.top_p)

    def step(self) -> int:
        """Draft, verify, and forget what was not accepted; returns the tokens that the whole batch gained."""
        text, guesses = self.tokens, []
        for _ in range(self.knobs.draft_length):
            q = self._distribution(self.draft.read(text, 1)[:, -1])
            guesses.append(q)
            text = torch.cat((text, draw(q, self.generator)[:, None]), 1)
        known = self.tokens.shape[1]
        p = self._distribution(self.target.read(text, self.knobs.draft_length + 1))
        accepted, gained = verify(p, torch.stack(guesses, 1), text[:, known:], self.generator)
        self.tokens = torch.cat((self.tokens, gained), 1)
        self.target.cache.rewind(known + accepted)
        # It has not read the last guess. One token further back, its next pass takes two whether or not that one was accepted:
        # a round's first steps then meet every shape that a later one has.
        self.draft.cache.rewind(known + accepted - 1)
        return gained.numel()

    def rewind(self) -> None:
        self.tokens = self.start
        self.target.cache.rewind(self.prompt)
        self.draft.cache.rewind(self.prompt)
