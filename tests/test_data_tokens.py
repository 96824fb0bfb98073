"""Tokenizers and packing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyno.data import Document, Tokenizer, build_tokenizer, count_tokens, load_corpus, pack
from dyno.errors import UserError

STORIES = {"kind": "embedded", "size_bytes": 60_000, "sources": ["stories"]}


@pytest.fixture(scope="module")
def stories():
    return load_corpus(STORIES)


@pytest.fixture(scope="module")
def bpe(stories):
    return build_tokenizer({"kind": "bpe", "vocab_size": 600}, stories)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else Tokenizer()


# -- tokenizers


@given(text=st.text() | st.sampled_from(["<eos>", "a<eos>b", " <eos> ", "\x00\u200b", "e\u0301", "\U0001f600"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_bytes_are_the_utf8_bytes():
    tokenizer = Tokenizer()
    assert tokenizer.encode("aé").tolist() == list("aé".encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([0xC3, 300, -1, 65]) == "\ufffdA"  # broken UTF-8 and foreign ids do not raise


def test_bpe_has_the_size_asked_for_and_compresses(bpe, stories):
    assert bpe.vocab_size == 600
    text = stories[0].text
    assert bpe.encode(text).size < len(text) / 2.5
    assert [ids.tolist() for ids in bpe.encode_many([text, "b"])] == [
        bpe.encode(text).tolist(),
        bpe.encode("b").tolist(),
    ]


def test_bpe_is_the_same_in_another_process(bpe):
    code = (
        "from dyno.data import *;"
        f"print(build_tokenizer({{'kind': 'bpe', 'vocab_size': 600}}, load_corpus({STORIES!r})).fingerprint)"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "11"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bpe.fingerprint


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    for name in ("kind", "vocab_size", "eos_id", "eos_token", "dtype", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode("a <eos> story").tolist() == tokenizer.encode("a <eos> story").tolist()


def test_load_refuses_what_was_not_saved(bpe, tmp_path):
    with pytest.raises(UserError, match="no saved tokenizer"):
        Tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    changed["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="fingerprints differ"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_file(bpe, tmp_path):
    bpe.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = build_tokenizer({"kind": "file", "path": str(path)}, [])
        assert (loaded.eos_id, loaded.vocab_size) == (bpe.eos_id, bpe.vocab_size)
    other = build_tokenizer({"kind": "file", "path": str(tmp_path), "eos_token": "a"}, [])
    assert other.eos_id == bpe.encode("a")[0] and other.fingerprint != bpe.fingerprint


def test_a_tokenizer_file_without_end_token_gets_one(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 4}, unk_token="?"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = build_tokenizer({"kind": "file", "path": str(tmp_path)}, [])
    assert (loaded.eos_id, loaded.vocab_size) == (5, 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "words"}, "choose bytes, bpe or file"),
        ({"kind": "bpe", "vocab_size": 100}, "at least 257"),
        ({"kind": "bpe", "vocab_size": 300}, "no training text"),
        ({"kind": "file", "path": None}, "tokenizer.path is not set"),
        ({"kind": "file", "path": "/nowhere/t.json"}, "/nowhere/t.json"),
    ],
)
def test_tokenizer_mistakes(config, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(config, [])


def test_a_broken_tokenizer_file(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        build_tokenizer({"kind": "file", "path": str(tmp_path)}, [])
    bpe.save(tmp_path)
    with pytest.raises(UserError, match="eos_token='<end>'"):
        build_tokenizer({"kind": "file", "path": str(tmp_path), "eos_token": "<end>"}, [])


# -- packing

SIZES = {"a": 4000, "b": 500, "c": 9000}


def sources(length=50):
    """Documents of one letter a source, so that a stream tells its sources."""
    return [Document(f"{s}{i}", s, s * (length - 1)) for s, size in SIZES.items() for i in range(size // length)]


def shares(stream):
    letters = {source: int((stream == ord(source)).sum()) for source in SIZES}
    return {source: count / sum(letters.values()) for source, count in letters.items()}


def test_natural_holds_every_document_once():
    documents = sources()
    stream = pack(documents, Tokenizer(), seed=3)
    assert stream.dtype == np.uint16 and stream.size == sum(SIZES.values()) == sum(
        count_tokens(documents, Tokenizer()).values()
    )
    pieces = "".join(chr(i) if i < 256 else "|" for i in stream).split("|")
    assert sorted(pieces[:-1]) == sorted(document.text for document in documents)
    assert stream.tolist() != pack(documents, Tokenizer(), seed=4).tolist()
    assert stream.tolist() == pack(documents, Tokenizer(), seed=3).tolist()


@given(
    weights=st.fixed_dictionaries({source: st.integers(0, 9) for source in SIZES}).filter(lambda w: any(w.values())),
    tokens=st.integers(3000, 20_000),
)
@settings(max_examples=25)
def test_shares_follow_the_weights(weights, tokens):
    stream = pack(sources(), Tokenizer(), weights, tokens, seed=1)
    assert stream.size == tokens
    found, total = shares(stream), sum(weights.values())
    for source, weight in weights.items():
        assert found[source] == pytest.approx(weight / total, abs=2 * 50 / tokens)


def test_every_stretch_has_the_mixture():
    stream = pack(sources(), Tokenizer(), {"a": 1, "b": 1, "c": 2}, 8000)
    for start in range(0, 8000, 2000):
        assert shares(stream[start : start + 2000])["c"] == pytest.approx(0.5, abs=0.06)


def test_a_short_source_is_repeated_evenly_in_new_orders():
    documents = [Document(str(i), "s", f"{i:04d}") for i in range(50)]
    stream = pack(documents, Tokenizer(), {"s": 1.0}, tokens=3 * 50 * 5)
    seen = Tokenizer().decode(stream)
    epochs = [[seen[i : i + 4] for i in range(start, start + 200, 4)] for start in (0, 200, 400)]
    assert all(sorted(epoch) == [f"{i:04d}" for i in range(50)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_default_length_is_what_the_weighted_documents_have():
    assert pack(sources(), Tokenizer(), {"a": 1, "b": 1}).size == SIZES["a"] + SIZES["b"]


def test_the_order_of_sources_and_weights_does_not_matter():
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    first = pack(sources(), Tokenizer(), weights, 3000)
    second = pack(sources(), Tokenizer(), dict(reversed(weights.items())), 3000)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"z": 1}, "lacks"), ({"a": -1, "b": 2}, "at least 0"), ({"a": 0}, "not all 0"), ({"a": float("nan")}, "finite")],
)
def test_mixture_mistakes(weights, message):
    with pytest.raises(UserError, match=message):
        pack(sources(), Tokenizer(), weights, 100)


def test_nothing_to_pack():
    with pytest.raises(UserError, match="no document to pack"):
        pack([], Tokenizer())
    with pytest.raises(UserError, match="at least one token"):
        pack(sources(), Tokenizer(), None, 0)
