"""What blocks save for their backward pass, in host memory meanwhile: once, in time, and as many bytes as the plan says."""

from __future__ import annotations

import pytest
import tiny
from test_offload import CPU, STREAM, WORKLOAD, prepared

from dyno.plan import memory, shape_of
from dyno.stages import train
from dyno.technique import of_ranks
from dyno.techniques.offload._activations import Stasher
from dyno.techniques.offload._side import Side


def test_what_blocks_save_goes_once_and_comes_back_a_block_ahead():
    side, model = Side(tiny.CPU), tiny.model(layers=5, sharpness=3.0).train()
    sent, fetched, order = [], [], []
    stasher = Stasher(side, 0, lambda: {p.untyped_storage()._cdata for p in model.parameters()})
    send, fetch = stasher._send, stasher._fetch
    groups = []

    def recorded_send(group, storage):
        if group not in groups:
            groups.append(group)
        sent.append(storage._cdata)
        order.append(storage)  # alive, so that no address is used twice
        return send(group, storage)

    def recorded_fetch(group):
        if group is not None and not group.fetched:
            fetched.append(groups.index(group))
        fetch(group)

    stasher._send, stasher._fetch = recorded_send, recorded_fetch
    model.call_block = lambda block, *args: _inside(stasher.block(first=block is model.blocks[0]), block, args)
    model(tiny.tokens(2, 7)).sum().backward()
    assert len(set(sent)) >= 0.8 * len(sent)  # a block's output is the next one's input
    assert fetched == [4, 3, 2, 1, 0]
    assert all(not group.stashes and not group.leaving for group in groups[:3])
    assert all(not group.stashes for group in groups)


@pytest.mark.parametrize(
    "overrides, within",
    [([], 0.02), (["attention=sdpa"], 0.02), (["precision=bf16"], 0.02), (["precision=bf16_master"], 0.02),
     (["accumulation=gradients"], 0.05), (["offload.keep_blocks=3"], 0.02), (["checkpointing=uniform"], 0.02),
     (["checkpointing=uniform", "offload.keep_blocks=3"], 0.02),
     (["checkpointing=optimal", "checkpointing.budget=0.7", "offload.keep_blocks=0", "precision=bf16"], 0.02)],
    ids=str,
)  # fmt: skip
def test_what_leaves_is_what_the_plan_says(overrides, within, tmp_path, monkeypatch):
    sizes = {"layers": 5, "hidden": 64, "ffn_width": 192, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab_size": 257,
             "tied_embeddings": False}  # fmt: skip
    words = [f"model.{name}={value}" for name, value in sizes.items()]
    run = prepared(tmp_path, "offload=activations", "offload.min_kib=1", "workload.seq=96", *words, *overrides, **sizes)
    sent, send = [], Stasher._send

    def recorded(self, group, storage):
        sent.append(storage.nbytes())
        return send(self, group, storage)

    monkeypatch.setattr(Stasher, "_send", recorded)
    train.Trainer(run, STREAM, {**WORKLOAD, "seq": 96}, seed=0).step()
    shape = shape_of(run.recipe)
    (share,) = of_ranks([t for chosen in run.recipe.techniques.values() for t in chosen], shape, CPU)
    assert sum(sent) == pytest.approx(share.micro_batches * memory.leaving_bytes(shape, share, "cpu"), rel=within)


def _inside(hooks, block, args):
    with hooks:
        return block(*args)
