"""The static cache: tokens of the contiguous one, and passes that a recording of kernels and addresses repeats.

On a CPU a tape of operators stands in for the CUDA graph: it repeats each on the same tensors with the same numbers, so
that a number of the host that changes from pass to pass gives wrong tokens. On a GPU the graph itself is tested.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyno import runner
from dyno.kernels.attention import eager, sdpa
from dyno.measure.environment import Device
from dyno.plan import reasons
from dyno.recipe import compose
from dyno.techniques.decoding import _graph
from dyno.techniques.decoding._sampling import Reader
from dyno.techniques.decoding.sampling import Greedy, Sampling
from dyno.techniques.decoding.speculative import Speculative
from dyno.techniques.kv_cache.contiguous import ContiguousCache
from dyno.techniques.kv_cache.static import StaticCache

PROMPT, NEW = 6, 14
GPU = Device("cuda", 0, "NVIDIA H200", 140 * 2**30, (9, 0), None, 2)
MODELS = {
    "grouped": {}, "one key head": {"kv_heads": 1}, "all key heads": {"kv_heads": 4}, "qk_norm": {"qk_norm": True},
    "biases": {"qkv_bias": True},
}  # fmt: skip
DECODINGS = {"greedy": Greedy(), "sampling": Sampling(temperature=0.7, top_p=0.9)}


class Tape(TorchDispatchMode):
    """The operators that run inside, repeated on the same tensors; what they make is copied to where it was made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(call, warm_up):
    """`_graph.capture` on a tape. What the recording has run is undone by the first replay, as it begins where it did."""
    warm_up()
    with Tape() as tape:
        logits = call()
    warm_up()  # a graph's recording runs nothing: the position is put back
    return tape.replay, logits


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count = getattr(self, "count", 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _inference():
    """On one thread: on a busy machine two of them wait longer for each other than such products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def recorded(monkeypatch):
    """Static caches on a CPU are recorded too, on tapes."""
    monkeypatch.setattr(_graph, "capture", taped)

    class OnTape(Reader):
        def __init__(self, run, model, batch, length):
            super().__init__(run, model, batch, length)
            if self.cache.static:
                self.passes = _graph.Recorded(self.passes, self.cache)

    for module in ("_sampling", "_speculation"):
        monkeypatch.setattr(f"dyno.techniques.decoding.{module}.Reader", OnTape)


def sharp(device=tiny.CPU, **sizes):
    return tiny.model(sharpness=8.0, tied_embeddings=False, **sizes).to(device)


def run_of(model, cache, draft=None):
    run = tiny.infer_run(model, cache, draft)
    run.device = model.norm.weight.device
    return run


def begun(cache, technique=DECODINGS["greedy"], batch=3, model=None, room=PROMPT + NEW + 1):
    model = model or sharp()
    prompts = tiny.tokens(batch, PROMPT).to(model.norm.weight.device)
    return technique.start(run_of(model, cache), prompts, room)


def rounds(session, count=2, new=NEW):
    """The texts of several rounds over the same prompts."""
    texts = []
    for _ in range(count):
        session.rewind()
        for _ in range(new):
            session.step()
        texts.append(session.tokens.clone())
    return torch.stack(texts)


def both(technique=DECODINGS["greedy"], batch=3, models=(None, None)):
    static, contiguous = (
        rounds(begun(cache, technique, batch, model))
        for cache, model in zip((StaticCache, ContiguousCache), models, strict=True)
    )
    assert static.shape == (2, batch, PROMPT + 1 + NEW) and len(static.unique()) > 5
    return static, contiguous


# The same tokens


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", MODELS)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_tokens_are_the_contiguous_cache_s(decoding, sizes, batch):
    model = sharp(**MODELS[sizes])
    static, contiguous = both(DECODINGS[decoding], batch, (model, model))
    assert torch.equal(static, contiguous)
    assert torch.equal(static[0], static[1]) == (decoding == "greedy")  # a generator goes on


@pytest.mark.parametrize("attend", [eager, sdpa])
@pytest.mark.parametrize("pieces", [(6, 1, 1, 1), (2, 5, 2), (1, 8), (4, 2, 3)])
def test_a_text_in_pieces_of_any_length_is_read_as_a_whole(pieces, attend):
    model, text = sharp(), tiny.tokens(3, 9)
    model.attend = attend
    cache, got, at = StaticCache(model, 3, 12), [], 0
    for piece in pieces:
        got.append(model(text[:, at : at + piece], cache))
        at += piece
    assert cache.length == int(cache.position) == 9
    torch.testing.assert_close(torch.cat(got, 1), model(text), atol=2e-5, rtol=1e-5)


def test_bf16_is_as_near_as_the_contiguous_cache():
    model, text = sharp().to(torch.bfloat16), tiny.tokens(3, 12)
    whole = sharp()(text).softmax(-1)

    def far(kind):
        cache = kind(model, 3, 12)
        got = [model(text[:, :5], cache), *(model(text[:, i : i + 1], cache) for i in range(5, 12))]
        return (torch.cat(got, 1).float().softmax(-1) - whole).abs().mean()

    assert far(StaticCache) < 1.3 * far(ContiguousCache)


def test_autocast_keeps_its_type():
    model = sharp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session = begun(StaticCache, model=model)
        assert session.reader.cache.k.dtype == torch.bfloat16
        assert rounds(session).shape == (2, 3, PROMPT + NEW + 1)


def test_a_rewound_cache_forgets_and_a_full_one_says_so():
    model, a, b = sharp(), tiny.tokens(2, 8, seed=1), tiny.tokens(2, 8, seed=2)
    b[:, :3] = a[:, :3]
    cache = StaticCache(model, 2, 8)
    model(a, cache)
    cache.rewind(3)
    torch.testing.assert_close(model(b[:, 3:], cache), model(b)[:, 3:], atol=2e-5, rtol=1e-5)
    cache.rewind(99)
    assert cache.room == cache.k.shape[3] == 8 and StaticCache(model, 2, 9).room == 16
    assert cache.length == int(cache.position) == 8  # rewinding never invents tokens
    with pytest.raises(AssertionError, match="a cache of 8 tokens cannot take 9"):
        cache.count(1)


# Recorded passes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", MODELS)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_recorded_pass_repeats_with_new_tokens_and_positions(decoding, sizes, batch, recorded):
    model = sharp(**MODELS[sizes])
    static, contiguous = both(DECODINGS[decoding], batch, (model, model))
    assert torch.equal(static, contiguous)


def test_one_width_is_recorded_once_and_the_prompt_never(recorded, monkeypatch):
    made = []
    monkeypatch.setattr(_graph, "capture", lambda call, warm_up: made.append(1) or taped(call, warm_up))
    session = begun(StaticCache)
    assert not made
    rounds(session, 3)
    assert made == [1] and list(session.reader.passes.recordings) == [(1, 1)]


def test_a_watched_pass_is_never_a_replay(recorded):
    session = begun(StaticCache)
    expected = rounds(session)[0]
    session.rewind()
    for recording in session.reader.passes.recordings.values():
        recording.replay = None
    for _ in range(NEW):
        with Watched() as watched:
            session.step()
        assert watched.count > 50
    assert torch.equal(session.tokens, expected)


def test_passes_alternate_between_watched_and_replayed(recorded):
    session = begun(StaticCache)
    expected = rounds(session)[0]
    session.rewind()
    for i in range(NEW):
        if i % 3 == 1:
            with Watched():
                session.step()
        else:
            session.step()
    assert torch.equal(session.tokens, expected)


def test_a_recording_dies_with_its_session(recorded):
    """Without the collector: NCCL waits for a graph that holds its kernels before a communicator can go."""
    session = begun(StaticCache)
    rounds(session)
    recording = weakref.ref(next(iter(session.reader.passes.recordings.values())))
    gc.collect()
    gc.disable()
    try:
        del session
        assert recording() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_records_each_of_its_widths(temperature, recorded):
    target, draft = sharp(), sharp(seed=1)
    texts = []
    for cache in (StaticCache, ContiguousCache):
        technique = Speculative(draft=[], draft_length=2, temperature=temperature)
        session = technique.start(run_of(target, cache, draft), tiny.tokens(3, PROMPT), 30)
        for _ in range(2):
            session.rewind()
            while session.tokens.shape[1] < 24:
                session.step()
        texts.append(session.tokens)
        if cache is StaticCache:
            assert set(session.target.passes.recordings) == {(3, 3)}
            assert set(session.draft.passes.recordings) == {(1, 1), (2, 1)}
    assert torch.equal(*texts)


def test_one_compiled_graph_serves_all_blocks():
    counter = CompileCounter()
    plain, compiled = (sharp(layers=10) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend=counter, dynamic=True)
    static, contiguous = both(models=(compiled, plain))
    assert torch.equal(static, contiguous)
    assert counter.frame_count == 2  # the prompt and one token


# What a recipe says

SERVED = ["model=8b", "precision=bf16", "attention=sdpa", "workload=generate", "workload.prompt=1024"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_compiler_that_records_graphs_itself_is_refused(mode):
    recipe = compose([*SERVED, "kv_cache=static", "compile=on", f"compile.mode={mode}"])
    (why,) = reasons(recipe, GPU)
    assert why.startswith(f"kv_cache=static: compile.mode={mode} records CUDA graphs of its own") and "\n" not in why
    assert not recipe.techniques["kv_cache"][0].unsupported(recipe, dataclasses.replace(GPU, kind="cpu"))


@pytest.mark.parametrize(
    "overrides", [[], ["compile=on"], ["compile=on", "compile.mode=max-autotune-no-cudagraphs"], ["quantization=int4"],
                  ["parallelism=tensor", "parallelism.tp=2"], ["decoding=speculative"], ["decoding=sampling"]]
)  # fmt: skip
def test_what_can_be_recorded_has_no_reason(overrides):
    assert not reasons(compose([*SERVED, "kv_cache=static", *overrides]), GPU)


# On a GPU


def on_gpu(**sizes):
    return sharp(torch.device("cuda"), **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", MODELS)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_graph_gives_the_contiguous_cache_s_tokens(decoding, sizes, batch):
    model = on_gpu(**MODELS[sizes])
    static, contiguous = both(DECODINGS[decoding], batch, (model, model))
    assert torch.equal(static, contiguous)


@pytest.mark.gpu
def test_a_graph_follows_rewinding_watching_and_other_sessions():
    model = on_gpu()
    session, other = begun(StaticCache, model=model), begun(StaticCache, batch=1, model=model)
    expected = rounds(begun(ContiguousCache, model=model))[0]
    assert isinstance(session.reader.passes, _graph.Recorded)
    session.rewind()
    for i in range(NEW):
        if i % 4 == 2:
            with Watched() as watched:
                session.step()
            assert watched.count > 50
        else:
            session.step()
        other.step()
    assert torch.equal(session.tokens, expected)
    assert torch.equal(rounds(session)[1], expected)
    assert set(session.reader.passes.recordings) == {(1, 1)}


@pytest.mark.gpu
def test_a_graph_in_bf16_repeats_its_passes_bit_by_bit():
    model = on_gpu().to(torch.bfloat16)
    session = begun(StaticCache, model=model)
    first, second = rounds(session)
    assert torch.equal(first, second)
    with Watched():
        assert torch.equal(rounds(session, 1)[0], first)  # the same kernels, launched one by one


@pytest.mark.gpu
def test_a_graph_of_compiled_blocks():
    plain, compiled = on_gpu(layers=10), on_gpu(layers=10)
    for block in compiled.blocks:
        block.compile(dynamic=True)
    static, contiguous = both(models=(compiled, plain))
    assert torch.equal(static, contiguous)


@pytest.mark.gpu
@pytest.mark.parametrize("draft_length", [1, 4])
def test_graphs_of_speculation_decode_greedily(draft_length):
    target, draft = on_gpu(), on_gpu(seed=1)
    technique = Speculative(draft=[], draft_length=draft_length, temperature=0.0)
    prompts = tiny.tokens(3, PROMPT).cuda()
    session = technique.start(run_of(target, StaticCache, draft), prompts, 30)
    for _ in range(2):
        session.rewind()
        while session.tokens.shape[1] < PROMPT + 1 + NEW:
            session.step()
    assert torch.equal(session.tokens[:, : PROMPT + 1 + NEW], rounds(begun(ContiguousCache, model=target))[0])
    assert (draft_length + 1, draft_length + 1) in session.target.passes.recordings


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides", [["precision=fp32"], ["precision=bf16", "compile=on"], ["precision=bf16", "quantization=int4"],
                  ["precision=bf16", "attention=sdpa", "decoding=sampling"]],
    ids=" ".join,
)  # fmt: skip
def test_a_run_decodes_with_a_static_cache(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    words = ["model=160m", "model.vocab_size=258", "corpus=stories", "corpus.size_bytes=200000", "measure=quick",
             "workload=generate", "workload.steps=0", "workload.eval_tokens=4096", "workload.requests=1",
             f"results_dir={tmp_path / 'results'}", *overrides]  # fmt: skip
    out = runner.run(compose([*words, "kv_cache=static"]))
    assert out["status"] == "ok", out["reason"]
    assert out["metrics"]["decode_tokens_per_s"]["value"] > 0
