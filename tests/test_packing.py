"""Packing: rows hold every document once, train like the documents alone, and say what their positions are."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from dyno.errors import UserError
from dyno.kernels.linear_cross_entropy import IGNORE
from dyno.measure.environment import Device
from dyno.plan import memory, predict, time
from dyno.plan.machine import Machine
from dyno.plan.trace import traced
from dyno.recipe import compose
from dyno.stages import checkpoint, train
from dyno.stages.batches import Tally, stream_batches
from dyno.technique import combined
from dyno.techniques.packing import _rows

END, SEQ = 60, 24
WORKLOAD = {"measures": "train", "batch": 4, "seq": SEQ, "lr": 1e-2}
DEEP = {"layers": 3, "tied_embeddings": False}


def documents(seed: int, lengths: list[int] | None = None) -> list[list[int]]:
    """Documents with their end tokens; among their lengths 1 (empty), 2, seq, seq + 1 and several seqs."""
    rng = np.random.default_rng(seed)
    lengths = lengths or [1, 2, SEQ - 1, SEQ, SEQ + 1, SEQ + 2, 3 * SEQ + 1, 3 * SEQ + 5, *rng.integers(1, SEQ, 25)]
    return [[*rng.integers(0, END, size=n - 1).tolist(), END] for n in rng.permutation(lengths)]


def stream_of(texts: list[list[int]]) -> np.ndarray:
    return np.array(list(itertools.chain(*texts)), dtype=np.uint16)


def epoch(option: str, stream: np.ndarray, batch: int = 1, seed: int = 0) -> list:
    """The batches of one epoch of rows of one."""
    place, apart = {"padded": (_rows.one_each, False), "documents": (_rows.best_fit, True)}[option]
    rows = len(place(_rows.pieces_of(stream, END, SEQ).lengths, SEQ))
    made = _rows.batches(place, apart, stream, END, batch, SEQ, seed)
    return list(itertools.islice(made, rows // batch))


# Bins


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_places_every_piece_once_and_fills_no_worse_than_first_fit(seed):
    rng = np.random.default_rng(seed)
    seq = int(rng.integers(1, 200))
    lengths = rng.integers(1, seq + 1, size=int(rng.integers(1, 400)))
    if seed % 2:
        lengths = np.minimum(seq, (rng.pareto(1.2, size=len(lengths)) * seq / 10).astype(int) + 1)
    bins = _rows.best_fit(lengths, seq)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= seq for row in bins)
    first_fit: list[int] = []
    for length in lengths:
        place = next((i for i, used in enumerate(first_fit) if used + length <= seq), None)
        if place is None:
            first_fit.append(length)
        else:
            first_fit[place] += length
    assert -(-lengths.sum() // seq) <= len(bins) <= len(first_fit)


def test_best_fit_takes_the_fullest_row_with_room():
    bins = _rows.best_fit([3, 6, 5, 4, 2], 10)  # 6 | 5 | 4 beside the 6 | 3 beside the 5 | 2 beside 5 and 3
    assert sorted(map(sorted, bins)) == [[0, 2, 4], [1, 3]]
    assert _rows.one_each([3, 6], 10) == [[0], [1]]


# Rows


@pytest.mark.parametrize("option", ["padded", "documents"])
@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_predicts_every_token_of_every_document_once_and_nothing_else(option, seed):
    texts = documents(seed)
    seen = []
    for tokens, targets, _ in epoch(option, stream_of(texts), seed=seed):
        assert tokens.shape == targets.shape == (1, SEQ)
        kept = targets != IGNORE
        seen += list(zip(tokens[kept].tolist(), targets[kept].tolist(), strict=True))
    assert sorted(seen) == sorted(pair for text in texts for pair in itertools.pairwise(text))


@pytest.mark.parametrize("seed", range(3))
def test_documents_lie_whole_in_rows_and_the_targets_tell_where_they_begin(seed):
    texts = documents(seed)
    short = [tuple(text) for text in texts if 1 < len(text) <= SEQ]
    found = []
    for tokens, targets, tally in epoch("documents", stream_of(texts), seed=seed):
        starts = _rows.document_starts(targets)[0]
        begins = [i for i in range(SEQ) if starts[i] == i]
        assert torch.equal(starts, starts.cummax(0).values) and begins[0] == 0
        parts = [tuple(tokens[0, a:b].tolist()) for a, b in itertools.pairwise([*begins, SEQ])]
        filled = parts[: len(parts) - tally.padding]  # padding stands alone, a position each
        assert all(len(part) == 1 for part in parts[len(filled) :])
        assert sum(map(len, filled)) == SEQ - tally.padding and len(filled) == tally.parts
        assert tally.span == sum(len(part) ** 2 for part in parts)
        found += filled
        assert all(END not in part[:-1] for part in parts)
    assert Counter(short) <= Counter(found)


@pytest.mark.parametrize("option", ["padded", "documents"])
def test_the_tally_counts_positions(option):
    texts = documents(5)
    for tokens, targets, tally in epoch(option, stream_of(texts), batch=3):
        assert tally.positions == tokens.numel() and tally.useful == int((targets != IGNORE).sum())
        assert tally.padding <= tally.positions - tally.useful
    whole = sum((tally for *_, tally in epoch(option, stream_of(texts))), Tally())
    # The end of a document of seq x n + 1 tokens is only predicted: its token has no position.
    positions = sum(len(text) - (len(text) % SEQ == 1) for text in texts)
    assert whole.positions - whole.padding == positions
    # 25 + 1, 3 x 24 + 1 and 3 x 24 + 5 tokens: in 2, 3 and 4 pieces; 24 + 1 fit a row but for the end, which is a target.
    assert whole.cut == 2 + 3 + 4
    assert whole.parts == whole.cut + sum(1 < len(text) <= SEQ + 1 for text in texts)


def test_the_stream_is_cut_as_ever_and_its_tally_is_that_of_its_rows():
    texts = documents(1)
    stream = stream_of(texts)
    generator = np.random.default_rng([3, 7])
    where = {i for text in [0, *np.cumsum([len(t) for t in texts])] for i in [text]}
    made = stream_batches(stream, END, 5, SEQ, 3)
    for tokens, targets, tally in itertools.islice(made, 4):
        starts = generator.integers(0, len(stream) - SEQ - 1, size=5)
        for row, start in enumerate(starts):
            assert tokens[row].tolist() == stream[start : start + SEQ].tolist()
            assert targets[row].tolist() == stream[start + 1 : start + SEQ + 1].tolist()
        parts = cut = 0
        for start in starts:
            edges = [start, *sorted(i for i in where if start < i < start + SEQ), start + SEQ]
            parts += len(edges) - 1
            cut += sum(not (a in where and b in where) for a, b in itertools.pairwise(edges))
        assert tally == Tally(5 * SEQ, 0, 5 * SEQ, 5 * SEQ * SEQ, parts, cut)


@pytest.mark.parametrize("option", ["padded", "documents"])
def test_rows_come_in_an_order_that_the_seed_decides_and_every_epoch_has_all(option):
    stream = stream_of(documents(2))
    first, again, other = (epoch(option, stream, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    assert sorted(a.tokens.tolist() for a in first) == sorted(a.tokens.tolist() for a in other)


def test_a_corpus_of_empty_documents_is_told():
    with pytest.raises(UserError, match="no token to predict"):
        epoch("documents", np.full(9, END))


def test_a_stream_without_ends_is_one_document_and_a_broken_last_one_counts():
    assert _rows.pieces_of(np.arange(50), None, 24).lengths.tolist() == [24, 24, 2]
    pieces = _rows.pieces_of(np.array([1, END, 2, 3, 4]), END, 24)
    assert pieces.lengths.tolist() == [2, 3] and pieces.last.all()


# Training


def prepared(directory, overrides):
    sizes = [f"workload.batch={WORKLOAD['batch']}", f"workload.seq={SEQ}"]
    return train.prepared_run(tiny.pipeline(directory, *sizes, *overrides), tiny.model(sharpness=3.0, **DEEP).train())


def packed_row_trains_like_its_documents(directory, overrides, option="documents", lengths=None, tolerance=1e-5):
    """Loss and gradients of a step's rows against those of their documents one at a time in a plain model."""
    run = prepared(directory, [f"packing={option}", *overrides])
    texts = documents(7, lengths)
    trainer = train.Trainer(run, stream_of(texts), WORKLOAD, seed=0, end_token=END)
    tokens, targets, tally = next(trainer.batches_of(0))
    loss = run.part("gradients")(*run.part("local_batch")(tokens, targets))
    alone, total = tiny.model(sharpness=3.0, **DEEP), torch.zeros(())
    by_length = defaultdict(list)
    for row in range(len(tokens)):
        edges = [i for i in range(SEQ) if i == 0 or targets[row, i - 1] == IGNORE]
        for a, b in itertools.pairwise([*edges, SEQ]):
            if (targets[row, a:b] != IGNORE).any():
                by_length[b - a].append((tokens[row, a:b], targets[row, a:b]))
    for pieces in by_length.values():
        inputs, wanted = (torch.stack(side) for side in zip(*pieces, strict=True))
        total = total + F.cross_entropy(alone(inputs).flatten(0, 1), wanted.flatten(), reduction="sum")
    (total / tally.useful).backward()
    assert loss.item() == pytest.approx(total.item() / tally.useful, abs=tolerance)
    for got, expected in zip(run.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=tolerance, rtol=1e-3)
    assert max(p.grad.abs().max() for p in alone.parameters()) > 1e-2


@pytest.mark.parametrize("attention", ["math", "sdpa", "sdpa_flash", "sdpa_math"])
@pytest.mark.parametrize("lengths", [None, [1, 2] * 60, [SEQ] * 6, [SEQ + 1] * 6, [2, 3, 1, 9, 17, 5, 30, 4] * 3],
                         ids=["random", "tiny", "seq", "seq + 1", "mixed"])  # fmt: skip
def test_a_packed_row_trains_like_its_documents(attention, lengths, tmp_path):
    packed_row_trains_like_its_documents(tmp_path, [f"attention={attention}"], lengths=lengths)


@pytest.mark.parametrize("beside", [
    ["checkpointing=uniform"], ["checkpointing=sqrt", "attention=math"], ["checkpointing=selective"],
    ["loss=chunked", "loss.rows=7"], ["accumulation=gradients", "accumulation.micro_batches=4"],
    ["accumulation=gradients", "accumulation.micro_batches=2", "loss=chunked", "loss.rows=5"],
    ["offload=activations"],
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("option", ["padded", "documents"])
def test_packed_rows_beside_other_techniques(option, beside, tmp_path):
    packed_row_trains_like_its_documents(tmp_path, beside, option)


def test_packed_rows_are_one_graph(tmp_path):
    """As compile=on captures them; Inductor itself takes a minute here."""
    run, plain = (prepared(tmp_path, ["packing=documents"]) for _ in range(2))
    trainer = train.Trainer(run, stream_of(documents(7)), WORKLOAD, seed=0, end_token=END)
    compiled = torch.compile(run.part("loss"), backend="aot_eager", fullgraph=True)
    for tokens, targets, _ in itertools.islice(trainer.batches, 2):
        given = tokens, targets
        losses = compiled(run.part("forward"), *given), plain.part("loss")(plain.part("forward"), *given)
        torch.testing.assert_close(*losses)


def test_bf16_rows_stay_apart(tmp_path):
    packed_row_trains_like_its_documents(tmp_path, ["precision=bf16"], tolerance=0.05)


def test_evaluation_reads_across_documents_as_ever(tmp_path):
    text = tiny.tokens(2, SEQ)
    run = prepared(tmp_path, ["packing=documents"])
    with torch.no_grad():
        torch.testing.assert_close(run.part("forward")(text), tiny.model(sharpness=3.0, **DEEP)(text))


@pytest.mark.parametrize("option", ["padded", "documents"])
def test_a_checkpoint_goes_on_with_the_same_rows(option, tmp_path):
    def trainer():
        run = prepared(tmp_path, [f"packing={option}"])
        return train.Trainer(run, stream_of(documents(3)), WORKLOAD, seed=0, end_token=END)

    def losses(made, steps):
        out = []
        for _ in range(steps):
            made.step()
            out.append(made.mean_loss())
        return out

    whole = losses(trainer(), 6)
    broken = trainer()
    assert losses(broken, 3) == whole[:3]
    path = checkpoint.save(broken, tmp_path)
    going_on = trainer()
    checkpoint.load(going_on, path)
    assert losses(going_on, 3) == pytest.approx(whole[3:], abs=1e-6)
    assert going_on.tally.positions == 3 * 4 * SEQ


# Reasons and plans


def device(kind="cpu", capability=None):
    return Device(kind, 0, "a GPU", 2**36, capability, None, 8)


@pytest.mark.parametrize(("overrides", "words"), [
    (["packing=documents", "parallelism=pipeline"], "packing=documents: a pipeline hands on states"),
    (["packing=documents", "parallelism=context"], "packing=documents: context parallel ranks share a row"),
    (["packing=padded", "parallelism=context"], "packing=padded: context parallel ranks share a row"),
    (["packing=documents", "attention=sdpa_flash", "precision=bf16"], "attention=sdpa_flash: SDPA's flash takes no mask"),
    (["packing=documents", "packing.document_tokens=-1"], "it takes 0 (not known) or more"),
    (["packing=padded", "attention=sdpa_flash", "precision=bf16"], None),
    (["packing=documents", "attention=sdpa_efficient"], None),
    (["packing=documents", "attention=sdpa_cudnn", "precision=bf16"], None),
])  # fmt: skip
def test_reasons(overrides, words):
    recipe = compose(["model.vocab_size=264", *overrides])
    told = predict(recipe, device("cuda", (9, 0))).reasons
    assert (words is None and not told) or any(words in reason for reason in told)


@pytest.mark.parametrize(("overrides", "heads"), [(["precision=fp32"], 4), (["precision=bf16"], 12)])
def test_the_predicted_mask_is_in_the_peak_of_the_step(overrides, heads):
    small = ["model=160m", "model.layers=3", "workload.batch=4", "workload.seq=1024", "model.vocab_size=300"]
    recipe = compose([*small, f"model.kv_heads={heads}", "attention=math", "packing=documents", *overrides])
    plan = predict(recipe, device("cuda", (9, 0)))
    assert plan.terms["forward end"]["mask"] == 4 * 4 * 1024**2
    assert plan.peak_memory_bytes - memory.WORKSPACE_BYTES == pytest.approx(traced(recipe).peak, rel=0.03)


def test_only_a_kernel_that_skips_documents_is_predicted_to_do_less():
    on, machine = (
        device("cuda", (9, 0)),
        Machine(matmul={"fp32": 6e13, "bf16": 7e14}, memory=3e12, power_w=None, source="test"),
    )

    def plan_of(attention, *overrides):
        shared = ["model=160m", "workload.batch=8", "workload.seq=2048", "precision=bf16", f"attention={attention}"]
        recipe = compose([*shared, *overrides])
        plan = predict(recipe, on)
        share = [t.footprint(plan.shape, on) for chosen in recipe.techniques.values() for t in chosen]
        seconds = time.step_terms(plan.shape, combined(share), machine, "cuda")["attention"]
        return plan, seconds

    documents, known = ["packing=documents"], ["packing=documents", "packing.document_tokens=256"]
    stream, masked = plan_of("triton_flash"), plan_of("triton_flash", *documents)
    skipping = plan_of("triton_flash", *known)
    assert masked[0].flops_per_step == stream[0].flops_per_step > skipping[0].flops_per_step
    assert skipping[1] == pytest.approx(stream[1] / 8) and masked[1] == stream[1]
    assert "mask" not in skipping[0].terms["forward end"]
    plain, all_pairs = plan_of("sdpa_efficient"), plan_of("sdpa_efficient", *known)
    assert all_pairs[0].flops_per_step == plain[0].flops_per_step and all_pairs[1] == pytest.approx(2 * plain[1])
    assert all_pairs[0].terms["loss"]["mask"] == 2 * 8 * 2048**2
