"""Text in, tokens out: corpora, the held-out split, tokenizers and packing. Needs numpy, never torch."""

from dyno.data.document import Document, content_digest, content_sketch, fingerprint, normalise
from dyno.data.pack import count_tokens, pack
from dyno.data.readers import load_corpus
from dyno.data.split import held_out_overlap, split
from dyno.data.tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "Document",
    "Tokenizer",
    "build_tokenizer",
    "content_digest",
    "content_sketch",
    "count_tokens",
    "fingerprint",
    "held_out_overlap",
    "load_corpus",
    "normalise",
    "pack",
    "split",
]
