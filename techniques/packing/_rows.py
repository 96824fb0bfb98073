"""Rows of whole documents: where the pieces of a stream lie, which of them share a row, and the batches they make.

A document's piece takes one position a token, its end token's included: there nothing is predicted, and its target is
IGNORE. So the targets alone tell where documents begin (`document_starts`): a piece that ends otherwise fills its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import UserError
from dyno.kernels.linear_cross_entropy import IGNORE
from dyno.stages.batches import Batch, Tally

Bins = list[list[int]]


@dataclass(frozen=True)
class Pieces:
    """Documents cut to at most `seq` tokens, (n,) each: where a piece lies in the stream, whether its document ends
    with it, and whether the document lies in other pieces too."""

    begins: np.ndarray
    lengths: np.ndarray
    last: np.ndarray
    cut: np.ndarray


def pieces_of(stream: np.ndarray, end_token: int | None, seq: int) -> Pieces:
    """The pieces of a stream in order; those that are a lone last token are left out, for they predict nothing."""
    ends = np.flatnonzero(np.asarray(stream) == (-1 if end_token is None else end_token)) + 1
    if not len(ends) or ends[-1] < len(stream):
        ends = np.append(ends, len(stream))
    starts = np.concatenate(([0], ends[:-1]))
    sizes = ends - starts
    counts = np.maximum(1, -(-(sizes - 1) // seq))  # a last token that would be alone makes no piece
    document = np.repeat(np.arange(len(sizes)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[document] + nth * seq
    lengths = np.minimum(seq, ends[document] - begins)
    pieces = Pieces(begins, lengths, begins + lengths == ends[document], counts[document] > 1)
    kept = ~(pieces.last & (lengths == 1))
    if not kept.any():
        raise UserError("the documents left after filtering have no token to predict: each is empty")
    return Pieces(*(field[kept] for field in (pieces.begins, pieces.lengths, pieces.last, pieces.cut)))


def one_each(lengths: Sequence[int] | np.ndarray, seq: int) -> Bins:
    """Every piece in a row of its own."""
    return [[i] for i in range(len(lengths))]


def best_fit(lengths: Sequence[int] | np.ndarray, seq: int) -> Bins:
    """Pieces (n,) of 1 to `seq` tokens in rows of `seq`: the longest first, each in the fullest row that has room.

    The smallest room that is enough is the lowest bit from the length on of an integer whose bit r says that a row has
    room r: seq / 64 words a piece, where the paper (arXiv:2404.10830) walks a segment tree.
    """
    lengths = np.asarray(lengths)
    bins: Bins = []
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq, len(bins)
            bins.append([])
        bins[row].append(i)
        room -= length
        if room:
            by_room.setdefault(room, []).append(row)
            rooms |= 1 << room
    return bins


def batches(
    place: Callable[[np.ndarray, int], Bins],
    apart: bool,
    stream: np.ndarray,
    end_token: int | None,
    batch: int,
    seq: int,
    seed: int,
) -> Iterator[Batch]:
    """Endless batches of the rows that `place` makes of a stream's pieces, in a new seeded order every epoch.

    `apart`: attention stays inside documents, which is what the tally's span counts.
    """
    pieces = pieces_of(stream, end_token, seq)
    bins = place(pieces.lengths, seq)
    generator = np.random.default_rng([seed, 11])
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            queue += generator.permutation(len(bins)).tolist()
        rows, queue = [bins[i] for i in queue[:batch]], queue[batch:]
        tokens = np.zeros((batch, seq), dtype=np.int64)
        targets = np.full((batch, seq), IGNORE, dtype=np.int64)
        for row, inside in enumerate(rows):
            at = 0
            for i in inside:
                begin, length = int(pieces.begins[i]), int(pieces.lengths[i])
                predicted = length - int(pieces.last[i])
                tokens[row, at : at + length] = stream[begin : begin + length]
                targets[row, at : at + predicted] = stream[begin + 1 : begin + 1 + predicted]
                at += length
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(targets), tally_of(pieces, rows, seq, apart))


def tally_of(pieces: Pieces, rows: Bins, seq: int, apart: bool) -> Tally:
    """What the positions of so many rows are. A padding position attends to itself alone where documents are apart."""
    inside = np.concatenate([np.asarray(row) for row in rows])
    lengths, positions = pieces.lengths[inside], len(rows) * seq
    padding = positions - int(lengths.sum())
    return Tally(
        positions,
        padding,
        useful=int((lengths - pieces.last[inside]).sum()),
        span=int((lengths**2).sum()) + padding if apart else positions * seq,
        parts=len(inside),
        cut=int(pieces.cut[inside].sum()),
    )


def document_starts(targets: Tensor) -> Tensor:
    """targets (B, S) -> (B, S) int32: where in its row the document of each position begins; padding is alone."""
    begins = F.pad(targets[:, :-1] == IGNORE, (1, 0), value=True)
    places = torch.arange(targets.shape[1], device=targets.device, dtype=torch.int32)
    return torch.where(begins, places, 0).cummax(1).values
