"""Local files and hub datasets: what is read, and what a mistake says."""

from __future__ import annotations

import json
import sys
import types

import pytest

from dyno.data import load_corpus
from dyno.errors import UserError


def read(path, **keys):
    return load_corpus({"kind": "path", "path": str(path), **keys})


def write_rows(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.fixture(params=["rows.jsonl", "rows.parquet"])
def rows(request, tmp_path):
    return write_rows(
        tmp_path / request.param, [{"text": "one", "kind": "a", "n": 1}, {"text": "two\r\nlines", "kind": "b", "n": 2}]
    )


def test_rows(rows):
    documents = read(rows)
    assert [(d.id, d.source, d.text) for d in documents] == [
        (f"{rows.name}#1", "rows", "one"),
        (f"{rows.name}#2", "rows", "two\nlines"),
    ]
    assert [d.source for d in read(rows, source_field="kind")] == ["a", "b"]
    assert [d.text for d in read(rows, text_field="kind")] == ["a", "b"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_field": "body"}, r"1 has no field 'body': set corpus.text_field to one of \['kind', 'n', 'text'\]"),
        ({"source_field": "site"}, "1 has no field 'site': set corpus.source_field"),
        ({"text_field": "n"}, "1: field 'n' holds int, wanted text"),
    ],
)
def test_wrong_fields(rows, keys, message):
    with pytest.raises(UserError, match=message):
        read(rows, **keys)


def test_bad_json_says_the_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl line 3 is not valid JSON"):
        read(path)
    path.write_text('["text"]\n')
    with pytest.raises(UserError, match="line 1 holds list, wanted one JSON object"):
        read(path)


def test_lone_surrogates_and_blank_texts(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "  \\n"}\n')
    assert [document.text for document in read(path)] == ["a?b"]


def test_text_is_cut_between_paragraphs(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"paragraph {i} " + "x" * 80 for i in range(20)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    documents = read(path, piece_bytes=300)
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)
    assert len(documents) > 5 and all(len(document.text) <= 300 for document in documents)
    assert len(read(path)) == 1
    assert len(read(path, piece_bytes=300, max_bytes=600)) == 2


def test_a_directory(tmp_path):
    (tmp_path / "web" / "deep").mkdir(parents=True)
    (tmp_path / "web" / "deep" / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "image.png").write_bytes(b"\x89")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "h.txt").write_text("hidden")
    write_rows(tmp_path / "rows.jsonl", [{"text": "row"}])
    assert [(d.id, d.source) for d in read(tmp_path)] == [
        ("a.md#0", "a"),
        ("rows.jsonl#1", "rows"),
        ("web/deep/b.txt#0", "web"),
    ]
    assert [d.text for d in read(tmp_path, glob="**/*.txt")] == ["bee"]
    with pytest.raises(UserError, match=r"no file with glob '\*\.rtf'"):
        read(tmp_path, glob="*.rtf")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "gone")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ol\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        read(tmp_path / "latin.txt")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match="not a Parquet file"):
        read(tmp_path / "bad.parquet")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "web"}, "choose embedded, path, hf"),
        ({"kind": "path", "path": None}, "corpus.path is not set"),
        ({"kind": "hf", "name": None}, "corpus.name is not set"),
    ],
)
def test_configs_that_lack_something(config, message):
    with pytest.raises(UserError, match=message):
        load_corpus(config)


def test_a_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'llm-dyno\[hf\]'"):
        load_corpus({"kind": "hf", "name": "owner/data"})


def test_a_dataset(monkeypatch):
    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        return iter([{"text": "one", "site": "x"}, {"text": "two", "site": "y"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    documents = load_corpus({"kind": "hf", "name": "owner/data", "subset": "en", "source_field": "site"})
    assert [(d.id, d.source, d.text) for d in documents] == [
        ("owner/data/train#1", "x", "one"),
        ("owner/data/train#2", "y", "two"),
    ]
    assert asked == [("owner/data", "en", {"split": "train", "revision": None, "streaming": True})]


@pytest.mark.parametrize("late", [False, True])
def test_a_dataset_without_network(monkeypatch, late):
    def fail():
        raise ConnectionError("could not reach the hub\nlong trace")
        yield

    def load_dataset(*_, **__):
        return fail() if late else next(fail())

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"cannot read the dataset owner/data .*could not reach the hub\. Check"):
        load_corpus({"kind": "hf", "name": "owner/data"})
