"""Exact deduplication over normalised text."""

from __future__ import annotations

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
    from dyno.data import content_digest

    digests = [content_digest(document.text, ignore_case) for document in documents]
    leaders: dict[bytes, int] = {}
    for position, (digest, document) in enumerate(zip(digests, documents, strict=True)):
        leader = leaders.setdefault(digest, position)
        if leader != position and _rank(document) < _rank(documents[leader]):
            leaders[digest] = position
    kept, removed = [], {}
    for position, (digest, document) in enumerate(zip(digests, documents, strict=True)):
        if leaders[digest] == position:
            kept.append(document)
        else:
            removed[document.id] = documents[leaders[digest]].id
    return kept, removed


def _rank(document: Document) -> tuple[str, str, str]:
    return document.id, document.source, document.text
