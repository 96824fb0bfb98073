"""The batches of training: rows of one stream of tokens, and what their positions are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyno.errors import UserError
from dyno.record import Metric


@dataclass(frozen=True)
class Tally:
    """What the positions of some steps are, those of all ranks together.

    `padding` positions hold no token of the corpus, `useful` ones carry a loss. `span` sums over the positions how many
    of its row one may attend to, later ones included: the whole row, or its document. `parts` are the documents that the
    rows hold a part of, a document in two rows twice; `cut` those that are not whole there.
    """

    positions: int = 0
    padding: int = 0
    useful: int = 0
    span: int = 0
    parts: int = 0
    cut: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self, tokens_per_s: Metric) -> dict[str, Metric]:
        """padding_share, documents_cut_share and useful_tokens_per_s of a window with this rate of positions."""
        share = self.useful / self.positions
        rate, low, high = (x and x * share for x in (tokens_per_s.value, tokens_per_s.low, tokens_per_s.high))
        useful = f"{tokens_per_s.source}; positions that carry a loss"
        return {
            "useful_tokens_per_s": replace(tokens_per_s, value=rate, low=low, high=high, source=useful),
            "padding_share": Metric(self.padding / self.positions, "1", self.positions, source="count of positions"),
            "documents_cut_share": Metric(
                self.cut / self.parts, "1", self.parts, source="count of documents in rows, those not whole"
            ),
        }


class Batch(NamedTuple):
    """tokens and targets (B, S) int64 of a step's global batch, and what its positions are."""

    tokens: Tensor
    targets: Tensor
    tally: Tally


def stream_batches(stream: np.ndarray, end_token: int | None, batch: int, seq: int, seed: int) -> Iterator[Batch]:
    """Endless batches cut out of the stream at random offsets, the same for every rank; `end_token` ends a document."""
    if len(stream) <= seq + 1:
        raise UserError(f"the corpus has {len(stream)} tokens after filtering, workload.seq={seq} needs more")
    generator = np.random.default_rng([seed, 7])
    while True:
        starts = generator.integers(0, len(stream) - seq - 1, size=batch)
        rows = np.stack([stream[s : s + seq + 1] for s in starts]).astype(np.int64)
        ends = rows[:, :seq] == (-1 if end_token is None else end_token)
        parts = 1 + ends[:, :-1].sum(1)
        head = (starts > 0) & (stream[starts - 1] != end_token)
        tail = ~ends[:, -1]
        cut = np.where(parts > 1, head.astype(int) + tail, head | tail)
        both, positions = torch.from_numpy(rows), batch * seq
        tally = Tally(positions, 0, positions, positions * seq, int(parts.sum()), int(cut.sum()))
        yield Batch(both[:, :-1], both[:, 1:], tally)
