"""Filters and mixtures against plain references, as techniques on a run."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyno.data import Document, Tokenizer, pack
from dyno.data.embedded import build
from dyno.errors import UserError
from dyno.technique import Run
from dyno.techniques.data_filters.exact_deduplication import ExactDeduplication, deduplicate
from dyno.techniques.data_filters.quality_rules import QualityRules, letters
from dyno.techniques.mixture.equal import Equal


def run_on(documents, *techniques):
    run = Run(recipe=SimpleNamespace(), stage="data", device=SimpleNamespace(), directory=Path("."))
    run.documents = list(documents)
    for technique in techniques:
        technique.apply(run)
    return run


@pytest.fixture(scope="module")
def corpus():
    return build(400_000)


# -- exact deduplication


def form(text, ignore_case):
    """The same relation by other means: compare words, composed last."""
    if ignore_case:
        text = unicodedata.normalize("NFD", text).casefold()
    return hashlib.md5("\0".join(unicodedata.normalize("NFC", text).split()).encode("utf-8", "replace")).hexdigest()


LETTERS = "abkKAé\u0301e\u212a \n\u00a0\x1c\ud800?"  # Kelvin's sign is K composed, a lone surrogate counts as '?'
documents = st.lists(st.tuples(st.text(LETTERS, max_size=4), st.sampled_from("st")), max_size=30).map(
    lambda rows: [Document(f"id{i * 7 % 31}", source, text) for i, (text, source) in enumerate(rows)]
)


@given(documents, st.booleans(), st.randoms())
def test_deduplication_against_the_reference(documents, ignore_case, random):
    kept, removed = deduplicate(documents, ignore_case)
    groups = {}
    for document in documents:
        groups.setdefault(form(document.text, ignore_case), []).append(document)
    leaders = {min(group, key=lambda d: (d.id, d.source, d.text)) for group in groups.values()}
    assert set(kept) == leaders and len(kept) == len(leaders)
    assert kept == [document for document in documents if document in leaders]
    by_id = {document.id: document for document in documents}
    for gone, stays in removed.items():
        assert by_id[stays] in leaders
        assert form(by_id[gone].text, ignore_case) == form(by_id[stays].text, ignore_case)
    assert len(kept) + len(removed) == len(documents)

    shuffled = random.sample(documents, len(documents))
    kept_again, removed_again = deduplicate(shuffled, ignore_case)
    assert set(kept_again) == set(kept) and removed_again == removed


def test_a_sketch_that_many_texts_share_costs_time_not_documents(corpus, monkeypatch):
    told = deduplicate(corpus.documents)
    monkeypatch.setattr("dyno.data.content_sketch", lambda text, fold_case: len(text) % 2)
    assert deduplicate(corpus.documents) == told


def test_deduplication_finds_what_was_planted(corpus):
    run = run_on(corpus.documents, ExactDeduplication())
    note = run.details["exact_deduplication"]
    planted = [pair for pair in corpus.planted if pair.kind != "near"]
    assert planted
    for pair in planted:
        assert note["kept_for"].get(pair.copy) == pair.original or note["kept_for"].get(pair.original) == pair.copy
    near = {pair.copy for pair in corpus.planted if pair.kind == "near"}
    assert not near & set(note["kept_for"])
    assert note["removed"] == len(corpus.documents) - len(run.documents) == note["documents"] - note["kept"]
    assert run_on(run.documents, ExactDeduplication()).details["exact_deduplication"]["removed"] == 0


# -- quality rules


def reference(text, rules):
    """The rules one character, line and word at a time."""
    if len(text) < rules.min_chars:
        return "min_chars"
    if rules.max_chars and len(text) > rules.max_chars:
        return "max_chars"
    if len({character for character in text}) < rules.min_unique_chars:  # noqa: C416
        return "min_unique_chars"
    if sum(1 for character in text if character.isalpha()) / max(1, len(text)) < rules.min_letter_ratio:
        return "min_letter_ratio"
    lengths = [len(line) for line in text.split("\n") if line.strip() != ""]
    if len(lengths) > rules.list_lines and sum(lengths) / len(lengths) < rules.min_line_chars:
        return "min_line_chars"
    words = text.split()
    if words and len(set(words)) / len(words) < rules.min_unique_word_ratio:
        return "min_unique_word_ratio"
    return None


SMALL = QualityRules(
    min_chars=3, max_chars=25, min_unique_chars=3, min_letter_ratio=0.5, min_line_chars=3, list_lines=2,
    min_unique_word_ratio=0.6,
)  # fmt: skip


@given(st.text("ab1 \né²ª中", max_size=30))
@settings(max_examples=400)
def test_rules_against_the_reference(text):
    assert SMALL.broken(text) == reference(text, SMALL)


def test_rules_against_the_reference_on_the_corpus(corpus):
    rules = QualityRules()
    found = {document.id: rules.broken(document.text) for document in corpus.documents}
    assert found == {document.id: reference(document.text, rules) for document in corpus.documents}
    assert len(set(found.values())) >= 4  # the corpus gives several rules something to do


@given(st.text())
def test_letters_are_counted_as_isalpha_does(text):
    assert letters(text) == sum(map(str.isalpha, text))


def test_each_rule_finds_its_kind():
    prose = "Plain words of a sentence that says something new at every step, without a list or a table. " * 2
    cases = {
        "min_chars": "short",
        "max_chars": prose * 1000,
        "min_unique_chars": "abc " * 50,
        "min_letter_ratio": "12, 34; 56: 78 (90) " * 10 + "abcdefghij",
        "min_line_chars": "\n".join(f"menu item {chr(97 + i)}" for i in range(20)),
        "min_unique_word_ratio": "buy these extremely cheap watches now " * 10,
    }
    assert {name: QualityRules().broken(text) for name, text in cases.items()} == {name: name for name in cases}
    assert QualityRules().broken(prose) is None
    off = QualityRules(0, None, 0, 0.0, 0, 10, 0.0)
    assert [off.broken(text) for text in (*cases.values(), "")] == [None] * 7


def test_rules_on_a_run(corpus):
    run = run_on(corpus.documents, QualityRules())
    note = run.details["quality_rules"]
    left = {document.id for document in run.documents}
    assert note["kept"] == len(left) and note["removed"] == sum(note["by_rule"].values()) == len(note["broken_rule"])
    assert {d.id for d in corpus.documents if d.source == "code"} <= left
    assert sum(d.source == "noise" for d in run.documents) < 0.5 * sum(d.source == "noise" for d in corpus.documents)
    assert all(d.id in left for d in corpus.documents if d.source == "stories")
    strict = run_on(corpus.documents, QualityRules(exempt_sources=[]))
    assert len(strict.documents) < len(run.documents)


def test_rules_decide_a_document_alone(corpus):
    forward = run_on(corpus.documents, QualityRules()).documents
    backward = run_on(reversed(corpus.documents), QualityRules()).documents
    assert forward == backward[::-1]


@pytest.mark.parametrize("bad", [{"min_letter_ratio": 1.5}, {"min_unique_word_ratio": -1}, {"max_chars": 5}])
def test_rule_mistakes(bad):
    with pytest.raises(UserError, match="data_filters.quality_rules"):
        QualityRules(**bad)


def test_filters_chain_in_order(corpus):
    run = run_on(corpus.documents, ExactDeduplication(), QualityRules())
    assert run.details["quality_rules"]["documents"] == run.details["exact_deduplication"]["kept"]


# -- mixture


def test_equal_weights_give_equal_shares():
    run = run_on([Document(f"{s}{i}", s, s * 19) for s, n in (("a", 100), ("b", 5)) for i in range(n)], Equal())
    assert run.part("mixture") == {"a": 0.5, "b": 0.5}
    stream = pack(run.documents, Tokenizer(), run.part("mixture"), 4000)
    assert (stream == ord("a")).mean() == pytest.approx((stream == ord("b")).mean(), abs=0.01)
