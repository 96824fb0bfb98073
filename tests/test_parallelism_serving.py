"""Tensor ranks that serve, on gloo against one process: logits, tokens, quality, what a rank holds and what it sends.

Run as a program, this file forks the ranks, decodes every case and writes what each rank saw.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ranks
import tiny
import torch

from dyno import quality, runner
from dyno.errors import RunFailure, Unsupported
from dyno.measure.environment import Device
from dyno.plan import predict, shape_from
from dyno.plan.memory import total
from dyno.plan.serving import wire_bytes
from dyno.recipe import compose
from dyno.stages import compress, infer
from dyno.stages.ranks import counted_pass, same_on_every_rank
from dyno.technique import combined
from dyno.techniques.parallelism import _serving
from dyno.techniques.parallelism.mesh import Mesh

PROMPT, NEW, BATCH = 5, 7, 3
TEXT = tiny.tokens(1, 400, vocab=60)[0].numpy()
WORKLOAD = {"measures": "infer", "batch": 4, "seq": 16, "eval_tokens": 96, "requests": BATCH, "prompt": PROMPT,
            "new_tokens": NEW}  # fmt: skip
EVEN = {"vocab_size": 62, "ffn_width": 50}  # one key head and 25 channels on each of two ranks
RICH = {**EVEN, "tied_embeddings": False, "qk_norm": True, "qkv_bias": True}
THIRDS = {"vocab_size": 63, "ffn_width": 51, "heads": 6, "kv_heads": 3, "layers": 3}
# name: (ranks, sizes, overrides)
CASES: dict[str, tuple[int, dict, list[str]]] = {
    "plain": (2, EVEN, []),
    "rich": (2, RICH, ["attention=sdpa"]),
    "sampled": (2, EVEN, ["decoding=sampling", "decoding.temperature=0.7", "decoding.top_p=0.9"]),
    "uncached": (2, EVEN, ["kv_cache=none"]),
    "static": (2, RICH, ["kv_cache=static"]),
    "bf16": (2, RICH, ["precision=bf16"]),
    "thirds": (3, THIRDS, []),
}  # fmt: skip
EXACT = [case for case in CASES if case != "bf16"]


def served(case: str, directory: Path, rank: int, count: int) -> dict[str, torch.Tensor]:
    """Logits, quality, the texts of two rounds; and of several ranks their bytes and wire."""
    _, sizes, overrides = CASES[case]
    layout = ["parallelism=tensor", f"parallelism.tp={count}"]
    made = tiny.pipeline(directory, "workload=generate", *layout, *overrides)
    made.rank, made.ranks = rank, count
    torch.manual_seed(0)
    model = tiny.model(sharpness=4.0, **sizes)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    plain = tiny.model(sharpness=4.0, **sizes)
    plain.load_state_dict(model.state_dict())
    run = infer.prepared_run(made, model)
    run.part("split")()
    out: dict[str, torch.Tensor] = {}
    found = quality.against(run.part("forward"), lambda: plain, TEXT, WORKLOAD, tiny.CPU)
    out |= {name: torch.tensor(metric.value) for name, metric in found.items()}
    with torch.inference_mode():
        out["logits"] = run.part("forward")(tiny.tokens(2, 16))
        prompts = tiny.tokens(BATCH, PROMPT, seed=1)
        session = run.part("decode").start(run, prompts, PROMPT + NEW + 1)
        texts = []
        for _ in range(2):
            session.rewind()
            for _ in range(NEW):
                session.step()
            texts.append(session.tokens.clone())
        out["texts"] = torch.stack(texts)
        if count > 1:
            same_on_every_rank(session.tokens)
            session.rewind()
            out |= {name: torch.tensor(m.value) for name, m in counted_pass(run, session.step).items()}
    out["held"] = torch.tensor(
        [infer.weight_bytes(model), infer.kv_bytes(model), infer.forward_flops(model.config, 1, 9)]
    )
    return out


def refusals(rank: int) -> None:
    """What only a model tells when it is split, and ranks that have gone apart."""
    group = torch.distributed.group.WORLD
    with pytest.raises(Unsupported, match="ffn_width=49 cannot be split over parallelism.tp=2"):
        _serving.split(tiny.model(vocab_size=62, ffn_width=49), rank, 2, group)
    packed = tiny.model(**EVEN)
    packed.blocks[1].mlp.down_proj = torch.nn.Sequential()
    with pytest.raises(Unsupported, match="plain matrices; this model has a Sequential"):
        _serving.split(packed, rank, 2, group)
    with pytest.raises(RunFailure, match="decoded different tokens"):
        same_on_every_rank(torch.tensor([[1, rank]]))


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(served(case, directory, 0, 1), directory / f"one-{case}.pt")
    for count in (2, 3):

        def work(rank: int, count: int = count) -> None:
            for case in [case for case in CASES if CASES[case][0] == count]:
                torch.save(served(case, directory, rank, count), directory / f"{case}-{rank}.pt")
            if count == 2:
                refusals(rank)

        ranks.fork(count, work, directory, limit_s=60)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    ranks.run_program(__file__, directory, limit_s=120)
    load = lambda name: torch.load(directory / f"{name}.pt", weights_only=True)  # noqa: E731
    return {case: (load(f"one-{case}"), [load(f"{case}-{r}") for r in range(CASES[case][0])]) for case in CASES}


@pytest.mark.parametrize("case", EXACT)
def test_ranks_decode_like_one_process(case, results):
    one, several = results[case]
    assert len(one["texts"].flatten().unique()) > 5  # a text, not one token again and again
    for seen in several:
        torch.testing.assert_close(seen["logits"], one["logits"], atol=1e-5, rtol=1e-5)
        assert torch.equal(seen["texts"], one["texts"])
        assert torch.equal(seen["logits"], several[0]["logits"])  # the same bits: they choose alike
        for name in ("validation_loss", "perplexity", "top1_agreement"):
            torch.testing.assert_close(seen[name], one[name], atol=1e-4, rtol=1e-5)
        assert seen["kl_divergence"] < 1e-6 and seen["top1_agreement"] == 1
    assert (case == "sampled") == (not torch.equal(one["texts"][0], one["texts"][1]))  # its generator goes on


def test_ranks_in_bf16_stay_near_one_process(results):
    one, several = results["bf16"]
    assert several[0]["logits"].dtype == torch.bfloat16
    spread = one["logits"].float().std()
    for seen in several:
        assert torch.equal(seen["texts"], several[0]["texts"])
        assert (seen["logits"].float() - one["logits"].float()).abs().max() < 0.1 * spread
        torch.testing.assert_close(seen["perplexity"], one["perplexity"], atol=0, rtol=0.02)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share_and_sends_what_the_formula_says(case, results):
    count, sizes, overrides = CASES[case]
    one, several = results[case]
    recipe = compose(["workload=generate", "parallelism=tensor", f"parallelism.tp={count}", *overrides])
    shape = shape_from(tiny.config(**sizes), WORKLOAD)
    share = combined(
        t.footprint(shape, None) for t in recipe.techniques["precision"] + recipe.techniques["parallelism"]
    )
    width, table = share.weight_bytes or 4, shape.vocab * shape.hidden
    whole = shape.parameters - table * (1 if shape.tied else 2)  # the blocks and norms, in which nothing is shared
    for seen in several:
        tokens = PROMPT + 1 if case == "uncached" else 1
        assert float(seen["wire_bytes"]) == pytest.approx(wire_bytes(shape, share, tokens))
        assert float(seen["wire_bytes_per_token"]) == pytest.approx(wire_bytes(shape, share, tokens) / BATCH)
        norms = shape.hidden * (2 * shape.layers + 1) + 2 * shape.layers * shape.head_dim * shape.qk_norm
        expected = width * ((whole - norms) / count + norms + table + table / count)
        assert float(seen["parameter_bytes"]) == pytest.approx(expected)
        assert seen["held"][1] * count == one["held"][1] and seen["held"][2] * count == pytest.approx(
            float(one["held"][2])
        )
        assert float(seen["held"][0]) == pytest.approx(float(one["held"][0]) / count, rel=0.05)


ON = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), None, 2)


def reason(*overrides: str, layout: Mesh | None = None) -> str:
    recipe = compose(["workload=generate", "model=8b", *overrides])
    return (layout or recipe.techniques["parallelism"][0]).unsupported(recipe, ON) or ""


@pytest.mark.parametrize(
    ("layout", "overrides", "words"),
    [
        (Mesh(dp=2), [], "parallelism.dp=2: inference is split over tensor ranks only"),
        (Mesh(pp=2), [], "parallelism.pp=2: inference"),
        (Mesh(cp=2, tp=2), [], "parallelism.cp=2: inference"),
        (Mesh(tp=2, zero=1), [], "parallelism.zero=1 shards what training keeps"),
        (Mesh(tp=0), [], "parallelism.tp=0: it takes 1 or more"),
        (Mesh(tp=4), [], "this one has 2 GPUs"),
        (Mesh(tp=2), ["model.kv_heads=1"], "model.kv_heads=1 cannot be split over parallelism.tp=2"),
        (Mesh(tp=2), ["model.vocab_size=128257"], "128258 can"),
        (Mesh(tp=2), ["quantization=int4"], "use quantization=none"),
        (Mesh(tp=2), ["decoding=speculative"], "use decoding=greedy or sampling"),
        (Mesh(tp=2), ["workload=kernel"], "measure training or inference"),
    ],
)
def test_a_layout_that_cannot_serve_says_why(layout, overrides, words):
    assert words in reason(*overrides, layout=layout)


@pytest.mark.parametrize(
    "overrides", [[], ["parallelism.tp=1"], ["parallelism.tp=1", "quantization=int4"], ["workload=eval"],
                  ["workload.prompt=63", "pruning=magnitude", "kv_cache=none"]]
)  # fmt: skip
def test_a_layout_that_can_serve_has_no_reason(overrides):
    assert reason("parallelism=tensor", *overrides) == ""


def test_the_plan_of_two_ranks():
    words = ["model=8b", "precision=bf16", "attention=sdpa", "workload=generate", "hardware=h100", "parallelism=tensor"]

    def plan(tp, requests):
        recipe = compose([*words, f"parallelism.tp={tp}", f"workload.requests={requests}", "workload.prompt=1024"])
        return predict(recipe, ON)

    one, two = plan(1, 64), plan(2, 64)
    table = 2 * 128256 * 4096
    assert (one.ranks, two.ranks) == (1, 2)
    assert one.wire_bytes_per_step == 0 and two.wire_bytes_per_step == 64 * 2 * (4 * 32 * 4096 + 128256) / 2
    whole, half = one.terms["decode"], two.terms["decode"]
    assert half["kv cache"] == whole["kv cache"] / 2
    assert half["weights"] == pytest.approx((whole["weights"] - table) / 2 + table, rel=1e-3)
    assert total(two.terms["quality"]) < total(one.terms["quality"]) and two.verdict() is None
    assert "host" in two.serving.decode and one.serving.decode["wire"] == 0
    for name in ("products", "attention", "head"):
        assert 0.4 < two.serving.decode[name] / one.serving.decode[name] < 0.65
    narrow, wide = plan(2, 1).serving, two.serving
    assert 64 * 10e-6 < narrow.decode["wire"] < wide.decode["wire"] < 3e-3  # each of 65 collectives starts anew
    assert two.serving.prefill["wire"] > 100 * two.serving.decode["wire"]
    assert two.serving.ttft_s < one.serving.ttft_s


SMALL = [
    "hardware=cpu", "measure=quick", "measure.min_steps=3", "measure.min_seconds=0.0", "measure.warmup_min_steps=2",
    "measure.warmup_max_steps=2", "model=draft", "model.layers=2", "model.hidden=32", "model.ffn_width=48",
    "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.vocab_size=258", "corpus=stories",
    "corpus.size_bytes=40000", "workload=generate", "workload.batch=8", "workload.seq=16", "workload.eval_tokens=64",
    "workload.requests=3", "workload.prompt=8", "workload.new_tokens=6", "parallelism=tensor",
]  # fmt: skip


def test_weights_that_no_step_has_changed_are_drawn_alike_and_not_kept(tmp_path):
    pipeline = tiny.pipeline(tmp_path, *SMALL, "parallelism=none", "workload.steps=0")
    model, original, key = compress.compress(pipeline)
    fresh, state = original(), model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in fresh.state_dict().items())
    assert not list(tmp_path.glob("artifacts/train/*")) and len(key) == 24
    trained = tiny.pipeline(tmp_path, *SMALL, "parallelism=none", "workload.steps=1")
    model, original, _ = compress.compress(trained)
    assert all(torch.equal(tensor, original().state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.embed.weight and model.inverse_frequency.device == tiny.CPU
    assert len(list(tmp_path.glob("artifacts/train/*"))) == 1


def test_tensor_ranks_that_serve_are_one_record_like_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    small = [*SMALL, f"results_dir={tmp_path / 'results'}", "workload.steps=3"]
    two, one = (runner.run(compose([*small, f"parallelism.tp={tp}"])) for tp in (2, 1))
    for out in (one, two):
        assert out["status"] == "ok", out["reason"]
    a, b = one["metrics"], two["metrics"]
    assert one["fingerprint"]["weights"] == two["fingerprint"]["weights"]
    assert {row["stage"]: row["reused"] for row in one["artifacts"]} == {"data": True, "train": True}
    for name in ("perplexity", "validation_loss", "model_bytes", "bits_per_weight", "parameters", "top1_agreement"):
        assert b[name]["value"] == pytest.approx(a[name]["value"], rel=1e-5)
    assert b["wire_bytes"]["value"] == two["plan"]["wire_bytes_per_step"] and "wire_bytes" not in a
    assert b["wire_bytes_per_token"] == {**b["wire_bytes_per_token"], "unit": "B/token"}
    for name in ("decode_tokens_per_s", "ttft_s", "tpot_s", "prefill_tokens_per_s", "peak_memory_bytes"):
        assert a[name]["value"] > 0 and b[name]["value"] > 0
    assert [rank["rank"] for rank in two["ranks"]] == [0, 1] and not one["ranks"]
    assert all(rank["peak_memory_bytes"] > 0 and rank["parameter_bytes"] > 0 for rank in two["ranks"])
    kinds = [{(row["dimension"], row["kind"], row["calls"]) for row in t} for t in two["details"]["infer"]["wire"]]
    assert kinds == [{("tp", "all_reduce", 4), ("tp", "all_gather", 1)}] * 2
    for name in ("prefill", "decode"):
        assert one["windows"][name]["steps"] >= 3 and two["windows"][name]["ended_by"] == "count"
    ratio = [out["windows"]["decode"]["flops"] / out["windows"]["decode"]["steps"] for out in (one, two)]
    assert ratio[0] == pytest.approx(2 * ratio[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
