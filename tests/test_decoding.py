"""Caches and decoders: caches against recomputation, sampling against its definition, speculation against the target."""

import itertools

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

from dyno.kernels.attention import eager
from dyno.stages import infer
from dyno.techniques.decoding import _speculation
from dyno.techniques.decoding._sampling import Reader, distribution
from dyno.techniques.decoding.sampling import Greedy, Sampling
from dyno.techniques.decoding.speculative import Speculative
from dyno.techniques.kv_cache.contiguous import ContiguousCache, NoCache

CACHES = {"contiguous": ContiguousCache, "none": NoCache}
PROMPTS = tiny.tokens(3, 6)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def recomputed(model, prompts, new):
    """Greedy continuation with a full pass a token: tokens (B, P + new), logits of each choice (B, new, V)."""
    text, logits = prompts, []
    for _ in range(new):
        logits.append(model(text)[:, -1])
        text = torch.cat((text, logits[-1].argmax(-1, keepdim=True)), 1)
    return text, torch.stack(logits, 1)


# Caches


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_greedy_equals_recomputation(cache, kv_heads):
    model = tiny.model(sharpness=8.0, tied_embeddings=False, kv_heads=kv_heads)
    expected, logits = recomputed(model, PROMPTS, 12)
    session = Greedy().start(tiny.infer_run(model, CACHES[cache]), PROMPTS, 18)
    assert [session.step() for _ in range(11)] == [3] * 11
    assert torch.equal(session.tokens, expected)
    assert len({tuple(row) for row in expected[:, 6:].tolist()}) == 3  # three different texts

    reader = Reader(tiny.infer_run(model, CACHES[cache]), model, 3, 18)
    for i in range(12):
        torch.testing.assert_close(reader.read(expected[:, : 6 + i], 1)[:, -1], logits[:, i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [(6, 1, 1, 1), (2, 5, 2), (1, 8)])
def test_a_cache_takes_text_in_pieces_of_any_length(pieces):
    model, text = tiny.model(sharpness=8.0, tied_embeddings=False), tiny.tokens(3, 9)
    cache, got, at = ContiguousCache(model, 3, 9), [], 0
    for piece in pieces:
        got.append(model(text[:, at : at + piece], cache))
        at += piece
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(got, 1), model(text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
def test_rewind_repeats_exactly(cache):
    session = Greedy().start(
        tiny.infer_run(tiny.model(sharpness=8.0, tied_embeddings=False), CACHES[cache]), PROMPTS, 16
    )
    rounds = []
    for _ in range(3):
        for _ in range(8):
            session.step()
        rounds.append(session.tokens.clone())
        session.rewind()
        assert session.tokens.shape[1] == 7  # the prompt and the token that its reading chose
    assert torch.equal(rounds[0], rounds[1]) and torch.equal(rounds[1], rounds[2])


def test_rewound_cache_forgets_and_overwrites():
    model, a, b = tiny.model(sharpness=8.0, tied_embeddings=False), tiny.tokens(2, 8, seed=1), tiny.tokens(2, 8, seed=2)
    b[:, :3] = a[:, :3]
    cache = ContiguousCache(model, 2, 8)
    model(a, cache)
    cache.rewind(3)
    torch.testing.assert_close(model(b[:, 3:], cache), model(b)[:, 3:], atol=1e-5, rtol=0)
    cache.rewind(99)
    assert cache.length == 8  # rewinding never invents tokens


# Distributions


def naive_distribution(logits, temperature, top_k, top_p):
    """One row, by the definition: rank, keep the k best, keep the smallest set whose share reaches p."""
    weights = dict(enumerate((logits.double() / temperature).softmax(0).tolist()))
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)
    if top_k:
        ranked = ranked[:top_k]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    norm = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / norm if i in kept else 0.0 for i in range(len(logits))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (5, 0.6), (1, 1.0), (99, 1.0)])
def test_distribution_equals_its_definition(temperature, top_k, top_p):
    logits = torch.randn(20, 13, generator=torch.Generator().manual_seed(0)) * 2
    expected = torch.stack([naive_distribution(row, temperature, top_k, top_p) for row in logits])
    torch.testing.assert_close(distribution(logits, temperature, top_k, top_p), expected, atol=1e-6, rtol=1e-5)


def test_top_k_keeps_k_where_logits_tie():
    kept = distribution(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]), 1.0, top_k=2)
    assert int((kept > 0).sum()) == 2 and float(kept.sum()) == pytest.approx(1.0)


def test_sampling_follows_the_distribution_and_its_cuts():
    model = tiny.model(sharpness=20.0, vocab_size=11)
    prompts = torch.tensor([[1, 2, 3]]).repeat(4000, 1)
    session = Sampling(temperature=0.8, top_k=4).start(tiny.infer_run(model), prompts, 4)
    expected = distribution(model(prompts[:1])[0, -1], 0.8, 4)
    counts = torch.bincount(session.tokens[:, 3], minlength=11)
    assert counts[expected == 0].sum() == 0 and int((expected > 0).sum()) == 4
    assert p_value(counts[expected > 0], expected[expected > 0] * 4000) > 1e-4


def test_sampling_is_seeded_and_temperature_zero_is_greedy():
    model = tiny.model(sharpness=8.0, tied_embeddings=False)

    def text(technique, seed):
        session = technique.start(tiny.infer_run(model, seed=seed), PROMPTS, 16)
        for _ in range(9):
            session.step()
        return session.tokens

    assert torch.equal(text(Sampling(), 1), text(Sampling(), 1))
    assert not torch.equal(text(Sampling(), 1), text(Sampling(), 2))
    assert torch.equal(text(Sampling(temperature=0.0), 1), recomputed(model, PROMPTS, 10)[0])


# Speculation

VOCAB, SESSIONS = 11, 600
PAIR = {
    "vocab_size": VOCAB, "layers": 1, "hidden": 16, "ffn_width": 16, "heads": 2, "kv_heads": 1,
    "tied_embeddings": False,
}  # fmt: skip
SHORT = torch.tensor([[1, 2, 3], [7, 0, 7], [4, 4, 9]])


def pair():
    """A target with sharp distributions and a disturbed copy of it: many drafted tokens are accepted, many are not."""
    target, draft = tiny.model(0, sharpness=30.0, **PAIR), tiny.model(0, sharpness=30.0, **PAIR)
    noise = torch.Generator().manual_seed(1)
    for weight in draft.parameters():
        weight.add_(0.1 * weight.std(correction=0) * torch.randn(weight.shape, generator=noise))
    return target, draft


def exact_joint(model, prompt, temperature=1.0, top_k=0, top_p=1.0):
    """P(first three tokens | prompt) (V, V, V), by enumeration."""
    prefixes = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    text = torch.cat((prompt.expand(len(prefixes), -1), prefixes), 1)
    p = distribution(model(text)[:, -3:], temperature, top_k, top_p).double().view(VOCAB, VOCAB, 3, VOCAB)
    return p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]


def p_value(counts, expected):
    """Of a chi-square test; cells that are expected fewer than 5 times count as one."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    rare = expected < 5
    if bool(rare.any()):
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < 1e-9:
        assert counts[-1] == 0, "a token that the target never emits"
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def speculative_p_value(sessions, **knobs):
    """The smallest of the p-values (times their number), and mean tokens a pass.

    For each row of the batch: the joint law of the first three tokens, of the first two and of the last two of them.
    """
    target, draft = pair()
    technique = Speculative(draft=[], draft_length=2, **knobs)
    counts = torch.zeros(len(SHORT), VOCAB, VOCAB, VOCAB, dtype=torch.long)
    gained = passes = 0
    for seed in range(sessions):
        session = technique.start(tiny.infer_run(target, draft=draft, seed=seed), SHORT, 8)
        while session.tokens.shape[1] < 6:
            gained, passes = gained + session.step(), passes + 1
        for row, (a, b, c) in enumerate(session.tokens[:, 3:6].tolist()):
            counts[row, a, b, c] += 1
    cuts = {k: v for k, v in knobs.items() if k in ("temperature", "top_k", "top_p")}
    joint = [exact_joint(target, prompt[None], **cuts) for prompt in SHORT]
    p = [
        p_value(seen, exact * sessions)
        for three, law in zip(counts, joint, strict=True)
        for seen, exact in ((three, law), (three.sum(2), law.sum(2)), (three.sum(0), law.sum(0)))
    ]
    return min(p) * len(p), gained / passes / len(SHORT)


def test_speculation_is_exact_in_distribution():
    p, per_pass = speculative_p_value(SESSIONS)
    assert p > 1e-4
    assert 1.2 < per_pass < 2.5  # both acceptances and rejections happened


def test_speculation_is_exact_under_cuts_and_temperature():
    p, per_pass = speculative_p_value(400, temperature=0.7, top_k=4)
    assert p > 1e-4
    assert 1.2 < per_pass < 2.5


def mutants():
    def redrawn_from_target(p, q, drafted, generator):
        return broken(p, q, drafted, generator, residual=lambda p, q: p)

    def accepts_too_much(p, q, drafted, generator):
        return broken(p, q, drafted, generator, ratio=lambda p, q: 2 * p / q)

    def redraws_the_accepted(p, q, drafted, generator):
        return broken(p, q, drafted, generator, keep_longer=False)

    return {f.__name__: f for f in (redrawn_from_target, accepts_too_much, redraws_the_accepted)}


def broken(p, q, drafted, generator, ratio=None, residual=None, keep_longer=True):
    """`verify` written a second time, with a mistake for each argument; right without."""
    ratio = ratio or (lambda p, q: p / q)
    residual = residual or (lambda p, q: (p - q).clamp_min(0))
    length, rows = drafted.shape[1], torch.arange(len(drafted))
    runs = torch.full((len(drafted),), length)
    for i in reversed(range(length)):
        u = torch.rand(len(drafted), generator=generator)
        token = drafted[:, i]
        runs = torch.where(u < ratio(p[rows, i, token], q[rows, i, token]), runs, i)
    m = int(runs.min())
    rest = p[:, m] if m == length else residual(p[:, m], q[:, m]) + 1e-30
    last = torch.multinomial(rest, 1, generator=generator)[:, 0]
    if m < length and keep_longer:
        last = torch.where(runs > m, drafted[:, m], last)
    return m, torch.cat((drafted[:, :m], last[:, None]), 1)


@pytest.mark.parametrize("name", mutants())
def test_the_exactness_test_finds_a_mutated_verify(name, monkeypatch):
    monkeypatch.setattr(_speculation, "verify", mutants()[name])
    assert speculative_p_value(SESSIONS)[0] < 1e-4


def test_the_second_writing_of_verify_is_right_without_a_mutation(monkeypatch):
    monkeypatch.setattr(_speculation, "verify", broken)
    assert speculative_p_value(300)[0] > 1e-4


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("draft_length", [1, 4])
def test_speculation_at_temperature_zero_is_greedy(cache, draft_length):
    target, draft = (
        tiny.model(0, sharpness=8.0, tied_embeddings=False),
        tiny.model(1, sharpness=8.0, tied_embeddings=False),
    )
    technique = Speculative(draft=[], draft_length=draft_length, temperature=0.0)
    session = technique.start(tiny.infer_run(target, CACHES[cache], draft), PROMPTS, 30)
    while session.tokens.shape[1] < 24:
        session.step()
    assert torch.equal(session.tokens[:, :24], recomputed(target, PROMPTS, 18)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_the_target_is_always_accepted(temperature):
    target = tiny.model(0, sharpness=8.0, tied_embeddings=False)
    technique = Speculative(draft=[], draft_length=3, temperature=temperature)
    session = technique.start(
        tiny.infer_run(target, draft=tiny.model(0, sharpness=8.0, tied_embeddings=False)), PROMPTS, 30
    )
    assert [session.step() for _ in range(5)] == [3 * 4] * 5


def test_caches_after_rollback_hold_exactly_the_text():
    """After each step both caches equal a fresh reading of the accepted text, all but its last token."""
    target, draft = pair()
    session = Speculative(draft=[], draft_length=3).start(tiny.infer_run(target, draft=draft, seed=5), SHORT, 40)
    gains = set()
    for _ in range(12):
        gains.add(session.step() // 3)
        known = session.tokens.shape[1]
        assert session.target.cache.length == known - 1
        assert known - 2 <= session.draft.cache.length <= known - 1  # a bonus leaves two tokens to read
        for reader in (session.target, session.draft):
            held = reader.cache.length
            fresh = ContiguousCache(reader.model, 3, held)
            reader.model(session.tokens[:, :held], fresh)
            torch.testing.assert_close(reader.cache.k[:, :, :, :held], fresh.k, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(reader.cache.v[:, :, :, :held], fresh.v, atol=1e-5, rtol=1e-5)
    assert len(gains) > 1 and 1 in gains  # steps with and without a rejection at the first token


def test_speculation_rewinds_to_its_first_token():
    target, draft = (
        tiny.model(0, sharpness=8.0, tied_embeddings=False),
        tiny.model(1, sharpness=8.0, tied_embeddings=False),
    )
    session = Speculative(draft=[], temperature=0.0).start(tiny.infer_run(target, draft=draft), PROMPTS, 30)
    rounds = []
    for _ in range(2):
        while session.tokens.shape[1] < 16:
            session.step()
        rounds.append(session.tokens[:, :16])
        session.rewind()
        assert session.tokens.shape[1] == 7 and session.target.cache.length == session.draft.cache.length == 6
    assert torch.equal(*rounds)


@pytest.mark.parametrize("knobs", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
@pytest.mark.parametrize("technique", [Sampling, Speculative])
def test_impossible_knobs_are_told_before_any_work(technique, knobs):
    assert "temperature >= 0, top_k >= 0 and 0 < top_p <= 1" in technique(**knobs).unsupported(None, None)
    assert technique().unsupported(None, None) is None


def test_a_draft_is_served_like_its_target(tmp_path):
    """Same attention kernel and number format, or the draft would be timed at another's speed."""
    pipeline = tiny.pipeline(
        tmp_path, "workload=generate", "decoding=speculative", "attention=sdpa_math", "precision=bf16"
    )
    pipeline.build_model = lambda overrides: tiny.model(1)
    target = tiny.model()
    run = infer.prepared_run(pipeline, target)
    assert run.draft.attend is target.attend is run.part("attention") is not eager
    assert {p.dtype for p in run.draft.parameters()} == {p.dtype for p in target.parameters()} == {torch.bfloat16}


def test_one_compiled_graph_serves_all_blocks_at_every_length():
    """More blocks than the compiler takes variants of a function (8): one of them would run eagerly, and slowly."""
    counter = CompileCounter()
    plain, compiled = (tiny.model(0, sharpness=4.0, layers=10) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend=counter, dynamic=True)
    with torch.inference_mode():
        texts = []
        for target in (plain, compiled):
            session = Greedy().start(tiny.infer_run(target), PROMPTS, 30)
            for _ in range(12):
                session.step()
            texts.append(session.tokens)
    assert torch.equal(*texts)
    assert counter.frame_count == 2  # the prompt and one token
