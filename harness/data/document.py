"""A document, its normal form, and the fingerprint of a list of documents."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_WHITESPACE = bytes(code for code in range(128) if chr(code).isspace())


@dataclass(frozen=True)
class Document:
    """One piece of text. `id` is unique within a corpus, `source` names the group that mixtures weigh."""

    id: str
    source: str
    text: str


def normalise(text: str, fold_case: bool = False) -> str:
    """The form under which two texts count as the same: Unicode NFC, each run of whitespace one space, ends trimmed.

    `fold_case` applies Unicode's canonical caseless form as well. Idempotent either way.
    """
    if not text.isascii():
        if fold_case:
            # Case folding can break composed characters apart, hence decomposed first and composed last.
            text = unicodedata.normalize("NFD", text).casefold()
        text = unicodedata.normalize("NFC", text)
    elif fold_case:
        text = text.lower()
    return " ".join(text.split())


def content_digest(text: str, fold_case: bool = False, salt: bytes = b"") -> bytes:
    """SHA-256 of `salt` and the normal form of a text (32 bytes). Lone surrogates count as a question mark."""
    digest = hashlib.sha256(salt)
    digest.update(normalise(text, fold_case).encode("utf-8", "replace"))
    return digest.digest()


def content_sketch(text: str, fold_case: bool = False) -> int:
    """A hash that texts of one normal form share: where it differs, they differ; where not, their digests decide.

    Whitespace is dropped instead of folded, which takes a fraction of the time. Differs from process to process.
    """
    plain = text.isascii()
    raw = (text if plain else normalise(text, fold_case)).encode("utf-8", "replace").translate(None, _WHITESPACE)
    return hash(raw.lower() if plain and fold_case else raw)


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over ids, sources, texts and their order; the same on every machine."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.source, document.text):
            raw = part.encode("utf-8", "replace")
            digest.update(len(raw).to_bytes(8, "little"))  # lengths, so that no two lists share one byte string
            digest.update(raw)
    return digest.hexdigest()
