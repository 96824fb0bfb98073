"""Make a tokenizer.json out of the vocabulary and merges that a GGUF file carries (byte-level BPE).

`tokenizer.ggml.pre` names how text is split before merging. The same vocabulary with another split gives other tokens
and a worse loss with no error, so an unknown name is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dyno.errors import UserError
from dyno.model.load_gguf_header import Header, read_header

# The splits of the models' own tokenizer.json files. Llama 3 takes digits in threes, Qwen one by one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
_PLAIN = {"gpt-2", "smollm"}
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_json(header: Header) -> str:
    """The text of a tokenizer.json for a header's vocabulary; it adds no special tokens to a text by itself.

    Raises:
        UserError: the file has no byte-level BPE vocabulary, or one whose split of text is not known.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, split = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre")
    if kind != "gpt2" or (split not in _SPLITS and split not in _PLAIN):
        known = ", ".join(sorted({*_SPLITS, *_PLAIN}))
        raise UserError(
            f"{header.path}: the tokenizer {kind!r} with split {split!r} cannot be rebuilt, only 'gpt2' with {known}; "
            "name the model's own file with model.tokenizer_file=PATH/tokenizer.json"
        )
    tokens, merges = header.get("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise UserError(f"{header.path} carries no vocabulary; name one with model.tokenizer_file=PATH/tokenizer.json")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    for pair in pairs:
        # Such a pair makes the library panic, which is no Exception and cannot be turned into one line later.
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise UserError(f"{header.path}: the merge {' '.join(pair)!r} makes a token that its vocabulary lacks")
    # Llama 3 keeps a word whole when it is a token, whatever the merges would make of it.
    bpe = models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if split in _SPLITS:
        first = pre_tokenizers.Split(Regex(_SPLITS[split]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = header.get("tokenizer.ggml.token_type", [])
    for special, number in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, its in zip(tokens, kinds, strict=False)
            if its == number
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return tokenizer.to_str()


def write_tokenizer(path: str | Path, folder: str | Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json (bos, eos) of a GGUF file into `folder`; return the former."""
    header, out = read_header(path), Path(folder)
    text = tokenizer_json(header)
    tokens = header.get("tokenizer.ggml.tokens")
    special = {
        f"{name}_token": tokens[number]
        for name in ("bos", "eos")
        if (number := header.get(f"tokenizer.ggml.{name}_token_id")) is not None and number < len(tokens)
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(out / "tokenizer_config.json", json.dumps(special, ensure_ascii=False, indent=1))
    return _write_whole(out / "tokenizer.json", text)


def _write_whole(path: Path, text: str) -> Path:
    """Written aside and renamed, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
    return path
