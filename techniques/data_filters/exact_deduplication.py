"""Exact deduplication over normalised text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Technique

if TYPE_CHECKING:
    from dyno.data import Document
    from dyno.technique import Run


@dataclass
class ExactDeduplication(Technique):
    """Keeps one of all documents whose texts are equal after normalisation (Unicode NFC, whitespace folded).

    Why it pays: Lee et al. 2022, https://arxiv.org/abs/2107.06499.
    `ignore_case` makes texts that differ in case alone equal as well.
    """

    ignore_case: bool = False

    def apply(self, run: Run) -> None:
        kept, removed = deduplicate(run.documents, self.ignore_case)
        run.note(
            "exact_deduplication",
            {"documents": len(run.documents), "kept": len(kept), "removed": len(removed), "kept_for": removed},
        )
        run.documents = kept


def deduplicate(documents: list[Document], ignore_case: bool = False) -> tuple[list[Document], dict[str, str]]:
    """Returns (kept documents in their order, {id of a removed document: id of the one kept in its place}).

    Of equal texts the one with the smallest (id, source, text) stays, so that the kept set does not depend on the
    order of `documents` nor on how they were split over workers.
    """
    keys = _keys([document.text for document in documents], ignore_case)
    leaders: dict[int | bytes, int] = {}
    for position, (key, document) in enumerate(zip(keys, documents, strict=True)):
        leader = leaders.setdefault(key, position)
        if leader != position and _rank(document) < _rank(documents[leader]):
            leaders[key] = position
    kept, removed = [], {}
    for position, (key, document) in enumerate(zip(keys, documents, strict=True)):
        if leaders[key] == position:
            kept.append(document)
        else:
            removed[document.id] = documents[leaders[key]].id
    return kept, removed


def _keys(texts: list[str], ignore_case: bool) -> list[int | bytes]:
    """A key a text, the same for texts that count as equal: its digest, or a sketch that no other text has."""
    from dyno.data import content_digest, content_sketch

    sketches = [content_sketch(text, ignore_case) for text in texts]
    counts = Counter(sketches)
    return [
        sketch if counts[sketch] == 1 else content_digest(text, ignore_case)
        for sketch, text in zip(sketches, texts, strict=True)
    ]


def _rank(document: Document) -> tuple[str, str, str]:
    return document.id, document.source, document.text
