"""Tokenizers behind one class: plain bytes, byte-level BPE trained here, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyno.data.document import Document
from dyno.errors import UserError

if TYPE_CHECKING:
    import tokenizers

EOS = "<eos>"
# The names under which published tokenizers keep the token that ends a document, most specific first.
KNOWN_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos_token>")
BYTES = 256


class Tokenizer:
    """Text to token ids and back.

    `vocab_size` counts every id, `eos_id` ends a document and never comes out of `encode`, also where the text spells
    the end token's name. Arrays are uint16 where all ids fit, else uint32. `backend` None means one token a UTF-8 byte.
    """

    def __init__(self, backend: tokenizers.Tokenizer | None = None, eos_token: str | None = None) -> None:
        """Raises UserError when `eos_token` is not in the backend's vocabulary.

        With no `eos_token`, the backend's end token is looked up by its usual names; a backend without one gets an
        id of its own after the last.
        """
        self._backend = backend
        self.eos_token = eos_token
        if backend is None:
            self.kind, self.eos_id, self.vocab_size = "bytes", BYTES, BYTES + 1
        else:
            # Text is data: what spells a special token is encoded like any other text.
            backend.encode_special_tokens = True
            self.kind = "tokenizer.json"
            self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
            self.eos_id = self._find_eos(backend, eos_token)
            self.vocab_size = max(self.vocab_size, self.eos_id + 1)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def _find_eos(self, backend: tokenizers.Tokenizer, eos_token: str | None) -> int:
        for name in KNOWN_EOS if eos_token is None else (eos_token,):
            found = backend.token_to_id(name)
            if found is not None:
                self.eos_token = name
                return int(found)
        if eos_token is not None:
            raise UserError(
                f"tokenizer.eos_token={eos_token!r} is not in the vocabulary: name one that is, or drop the key"
            )
        return self.vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) of one text, with no end token."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text; several times faster than one by one for BPE. Lone surrogates become '?'."""
        raw = [text.encode("utf-8", "replace") for text in texts]
        if self._backend is None:
            return [np.frombuffer(data, dtype=np.uint8).astype(self.dtype) for data in raw]
        encodings = self._backend.encode_batch_fast([data.decode("utf-8") for data in raw], add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; end tokens and ids beyond the vocabulary (padding of a model's table) are left out."""
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        values = values[(values >= 0) & (values < self.vocab_size) & (values != self.eos_id)]
        if self._backend is None:
            return values.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return self._backend.decode(values.tolist(), skip_special_tokens=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the ids."""
        body = "" if self._backend is None else json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(f"{self.kind}\n{self.eos_id}\n{body}".encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write dyno_tokenizer.json, and tokenizer.json (Hugging Face's format) where there is a backend."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._backend is not None:
            (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        facts = {"schema": 1, "kind": self.kind, "vocab_size": self.vocab_size, "eos_id": self.eos_id}
        facts |= {"eos_token": self.eos_token, "fingerprint": self.fingerprint}
        (directory / "dyno_tokenizer.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises UserError when it is missing, or not what was saved."""
        path = Path(directory) / "dyno_tokenizer.json"
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"no saved tokenizer at {path}: {error}") from error
        loaded = (
            cls()
            if facts["kind"] == "bytes"
            else cls(_read_backend(path.with_name("tokenizer.json")), facts["eos_token"])
        )
        if loaded.fingerprint != facts["fingerprint"]:
            raise UserError(
                f"{path.parent} holds another tokenizer than was saved there (fingerprints differ): build it again"
            )
        return loaded


def build_tokenizer(tokenizer: dict[str, Any], train: Sequence[Document]) -> Tokenizer:
    """The tokenizer that a `tokenizer` config asks for.

    Kinds: `bytes`; `bpe` (trained on `train`, knobs `vocab_size`, `min_frequency`); `file` (knobs `path` to a
    tokenizer.json or a directory that has one, `eos_token`). Raises UserError for anything else.
    """
    kind = tokenizer.get("kind")
    if kind == "bytes":
        return Tokenizer()
    if kind == "bpe":
        return train_bpe(
            [document.text for document in train], int(tokenizer["vocab_size"]), int(tokenizer.get("min_frequency", 2))
        )
    if kind == "file":
        if not tokenizer.get("path"):
            raise UserError("tokenizer.path is not set: add tokenizer.path=FILE, a tokenizer.json or its directory")
        path = Path(tokenizer["path"]).expanduser()
        return Tokenizer(_read_backend(path / "tokenizer.json" if path.is_dir() else path), tokenizer.get("eos_token"))
    raise UserError(f"tokenizer.kind={kind!r} is unknown: choose bytes, bpe or file")


def train_bpe(texts: Sequence[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Byte-level BPE (GPT-2's word pattern) over `texts`, no normalisation: every text comes back exactly.

    The same texts give the same tokenizer, on any number of threads. The vocabulary holds 256 bytes, the end token
    and merges, and can stay smaller than `vocab_size` on short text.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < BYTES + 1:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: at least {BYTES + 1} (256 bytes and the end token)"
        )
    if not texts:
        raise UserError("the BPE tokenizer has no training text: the training split is empty")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    clean = (text.encode("utf-8", "replace").decode("utf-8") for text in texts)
    backend.train_from_iterator(clean, trainer)
    return Tokenizer(backend, EOS)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        body = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer file {path}: {error}") from error
    try:
        return tokenizers.Tokenizer.from_str(body)
    except Exception as error:  # what the library raises for a malformed file
        raise UserError(f"{path} is no tokenizer.json of the Hugging Face format: {error}") from error
