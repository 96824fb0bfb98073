"""What the decoders share: distributions, caches over a growing text, and the plain one-token session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyno.technique import Run
from dyno.techniques.decoding._graph import Recorded, one_pass


def distribution(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., V) -> the probabilities that are really sampled from, fp32. Temperature 0 is one-hot at the maximum.

    Top-k keeps the k largest; top-p the smallest set whose mass reaches p (Holtzman et al. 2019, arXiv:1904.09751).
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = torch.softmax(logits / temperature, -1)
    if 0 < top_k < logits.shape[-1]:
        kept = probabilities.topk(top_k, -1)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, kept.indices, kept.values)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = torch.where(before < top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One sample of each row: (..., V) -> (...) int64."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probabilities.shape[:-1])


class Reader:
    """A model that has read a prefix of a text (B, n) and keeps it in its cache, if the recipe has one."""

    def __init__(self, run: Run, model: Any, batch: int, length: int):
        self.model = model
        self.cache = run.part("cache")(model, batch, length)
        self.passes: Callable[[Tensor, int], Tensor] = partial(one_pass, model, self.cache)
        if self.cache.static and run.device.type == "cuda":
            self.passes = Recorded(self.passes, self.cache)

    def read(self, text: Tensor, last: int) -> Tensor:
        """Feed what the cache lacks of `text`; logits (B, last, V) of its last positions, good until the next reading."""
        return self.passes(text[:, self.cache.length :], last)


class PlainSession:
    """One token a pass for every sequence of the batch."""

    def __init__(self, run: Run, prompts: Tensor, length: int, choose: Any):
        assert run.model is not None
        self.batch, self.prompt = prompts.shape
        self.buffer = prompts.new_zeros(self.batch, length)
        self.buffer[:, : self.prompt] = prompts
        self.length, self.choose = self.prompt, choose
        self.reader = Reader(run, run.model, self.batch, length)
        self.first = self._next()

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, : self.length]

    def _next(self) -> Tensor:
        chosen = self.choose(self.reader.read(self.tokens, 1)[:, -1])
        self.buffer[:, self.length] = chosen
        self.length += 1
        return chosen

    def step(self) -> int:
        self._next()
        return self.batch

    def rewind(self) -> None:
        """To the prompt and its first token, which the prefill chose."""
        self.length = self.prompt + 1
        self.reader.cache.rewind(self.prompt)
        self.buffer[:, self.prompt] = self.first
