"""From documents to one stream of tokens, with the share of each source decided by a mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dyno.data.document import Document
from dyno.data.tokenizer import Tokenizer
from dyno.errors import UserError


def pack(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    mixture_weights: Mapping[str, float] | None = None,
    tokens: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """One stream of token ids (n,), each document followed by the end token; dtype as the tokenizer's.

    Without weights: all documents in one seeded shuffled order, again in a new order for each further epoch that
    `tokens` asks for. With weights (source -> share, normalised here, a source left out gets 0): each source gets its
    share of the tokens, repeats where it is short and stops early where it is long; sources alternate document by
    document so that every stretch of the stream has the mixture, to within a document's length.

    `tokens` is the exact length of the stream; None means as many as the weighted documents have. Raises UserError for
    weights that are negative, not finite, all zero or for a source that no document has.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.source if mixture_weights is not None else "", []).append(document)
    shares = {"": 1.0} if mixture_weights is None else _shares(mixture_weights, groups)
    encoded = {source: _with_eos(groups[source], tokenizer) for source in shares if groups.get(source)}
    if not encoded:
        raise UserError("there is no document to pack: the corpus or what the filters left of it is empty")
    total = sum(part.size for parts in encoded.values() for part in parts) if tokens is None else tokens
    if total < 1:
        raise UserError(f"tokens={total}: a token stream needs at least one token")

    order = {source: _Epochs(parts, f"{seed}/{source}") for source, parts in encoded.items()}
    emitted = dict.fromkeys(encoded, 0)
    stream = np.empty(total, dtype=tokenizer.dtype)
    filled = 0
    while filled < total:
        # The source that is furthest behind its share goes next; the name breaks ties.
        source = min(shares, key=lambda name: ((emitted[name] + 1) / shares[name], name))
        part = order[source].next()[: total - filled]
        stream[filled : filled + part.size] = part
        filled += part.size
        emitted[source] += part.size
    return stream


def count_tokens(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens a source, end tokens included: what a mixture needs to say how often a source is repeated."""
    counts: dict[str, int] = {}
    for document, ids in zip(documents, tokenizer.encode_many([d.text for d in documents]), strict=True):
        counts[document.source] = counts.get(document.source, 0) + ids.size + 1
    return counts


class _Epochs:
    """The documents of one source in a seeded order, shuffled anew every epoch."""

    def __init__(self, parts: list[np.ndarray], seed: str) -> None:
        self._parts = parts
        self._rng = np.random.Generator(np.random.PCG64(list(seed.encode())))
        self._queue: list[int] = []

    def next(self) -> np.ndarray:
        if not self._queue:
            # Sorting raw draws instead of Generator.permutation, whose stream numpy does not promise to keep.
            keys = self._rng.bit_generator.random_raw(len(self._parts))
            self._queue = np.argsort(np.atleast_1d(keys), kind="stable").tolist()
        return self._parts[self._queue.pop()]


def _with_eos(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    end = np.array([tokenizer.eos_id], dtype=tokenizer.dtype)
    return [np.concatenate([ids, end]) for ids in tokenizer.encode_many([d.text for d in documents])]


def _shares(weights: Mapping[str, float], groups: Mapping[str, object]) -> dict[str, float]:
    """The positive weights, normalised to a sum of one."""
    unknown = sorted(set(weights) - set(groups))
    if unknown:
        raise UserError(f"the mixture weighs sources that the corpus lacks: {unknown}; it has {sorted(groups)}")
    bad = {source: weight for source, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if bad or not any(weights.values()):
        raise UserError(f"mixture weights must be finite, at least 0 and not all 0, got {bad or dict(weights)}")
    total = math.fsum(weights.values())
    return {source: weight / total for source, weight in sorted(weights.items()) if weight > 0}
