"""Train and held-out documents, chosen by content so that no duplicate lands on both sides."""

from __future__ import annotations

from collections.abc import Sequence

from dyno.data.document import Document, content_digest
from dyno.errors import UserError


def split(
    documents: Sequence[Document], validation_fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Returns (train, validation), each in the order of `documents`.

    A document's side depends only on the hash of its normal form (NFC, whitespace and case folded) and the seed. So
    texts that are equal after normalisation share a side, held-out text never equals training text, and adding,
    removing or filtering other documents moves nobody. The held-out side keeps each distinct text once: a repeated text
    would weigh its loss twice. Near duplicates can still straddle; `held_out_overlap` says by how much.

    `validation_fraction` is the expected share of distinct texts, 0 < f < 1. Where a side would stay empty, one text
    crosses: the one nearest to the border. Raises UserError for a fraction outside (0, 1) or under two distinct texts.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise UserError(f"corpus.validation_fraction={validation_fraction} must lie between 0 and 1 (for example 0.05)")
    salt = f"split/{seed}/".encode()
    digests = [content_digest(document.text, fold_case=True, salt=salt) for document in documents]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise UserError(
            f"a train/validation split needs at least two different documents, the corpus has {len(distinct)}: "
            "add text, or lower corpus.piece_bytes so that a file is cut into more documents"
        )
    border = int(validation_fraction * 2**64).to_bytes(9, "big")[1:]
    held_out = {digest for digest in distinct if digest[:8] < border} or {distinct[0]}
    if len(held_out) == len(distinct):
        held_out.discard(distinct[-1])
    train: list[Document] = []
    first: dict[bytes, Document] = {}
    for document, digest in zip(documents, digests, strict=True):
        if digest in held_out:
            first.setdefault(digest, document)
        else:
            train.append(document)
    return train, list(first.values())


def held_out_overlap(train: Sequence[Document], validation: Sequence[Document], words: int = 13) -> dict[str, float]:
    """How much of the held-out text also occurs in training text.

    Counts distinct n-grams of `words` whitespace-separated words in `validation` and those of them found in `train`.
    Returns {"ngrams", "shared", "fraction"}; 13 words is the customary contamination check (arXiv:2005.14165, app. C).
    """

    def ngrams(document: Document) -> set[tuple[str, ...]]:
        tokens = document.text.split()
        return set(zip(*(tokens[start:] for start in range(words)), strict=False))

    wanted: set[tuple[str, ...]] = set().union(*map(ngrams, validation))
    shared: set[tuple[str, ...]] = set()
    for document in train:
        shared |= wanted & ngrams(document)
    return {"ngrams": len(wanted), "shared": len(shared), "fraction": len(shared) / max(1, len(wanted))}
