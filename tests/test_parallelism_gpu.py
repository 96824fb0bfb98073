"""On GPUs: the ring's kernels against attention written by hand, and layouts of two GPUs against one."""

from __future__ import annotations

import pytest
import torch

from dyno import runner
from dyno.kernels.attention import reference, tolerance
from dyno.recipe import compose

pytestmark = pytest.mark.gpu
pair = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(123, 123, True), (96, 48, False), (5, 70, False)])
def test_a_part_and_its_gradients_are_attention(dtype, queries, keys, causal):
    from dyno.techniques.parallelism._ring import attend, attend_backward

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n, 64) for n in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference(*leaves, causal=causal)
    expected.backward(grad)
    out, log_sum = attend(q, k, v, causal, 64**-0.5)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    scores = (q.float() @ k.float().transpose(-1, -2)) * 64**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), atol=2e-2, rtol=1e-3)
    loose = {name: 5 * value for name, value in tolerance(dtype).items()}
    got = attend_backward(grad, q, k, v, out, log_sum, causal, 64**-0.5)
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, **loose)


@pair
@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero2", "zero3", "tensor", "pipeline", "context"])
def test_two_gpus_train_like_one(layout, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    small = ["model=micro", "model.vocab_size=258", "corpus=stories", "corpus.size_bytes=200000", "measure=quick",
             "workload.batch=16", "workload.seq=128", "workload.steps=20", f"results_dir={tmp_path / 'results'}"]  # fmt: skip
    one, two = (runner.run(compose([*small, f"parallelism={option}"])) for option in ("none", layout))
    assert two["status"] == "ok", two["reason"]
    for name in ("train_loss", "validation_loss"):
        assert two["metrics"][name]["value"] == pytest.approx(one["metrics"][name]["value"], abs=0.02)


@pair
@pytest.mark.parametrize(
    "overrides",
    [["precision=fp32"], ["precision=bf16"], ["precision=bf16", "compile=on"], ["decoding=sampling", "kv_cache=none"]],
    ids=" ".join,
)
def test_two_gpus_decode_like_one(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    small = ["model=micro", "model.vocab_size=258", "corpus=stories", "corpus.size_bytes=200000", "measure=quick",
             "workload=generate", "workload.steps=20", "workload.eval_tokens=4096", "workload.requests=4",
             "workload.new_tokens=16", "parallelism=tensor", f"results_dir={tmp_path / 'results'}"]  # fmt: skip
    one, two = (runner.run(compose([*small, *overrides, f"parallelism.tp={tp}"])) for tp in (1, 2))
    for out in (one, two):
        assert out["status"] == "ok", out["reason"]
    metrics = two["metrics"]
    assert metrics["perplexity"]["value"] == pytest.approx(one["metrics"]["perplexity"]["value"], rel=0.01)
    assert metrics["kl_divergence"]["value"] < 1e-3 and metrics["decode_tokens_per_s"]["value"] > 0
    if "kv_cache=none" not in overrides:
        assert metrics["wire_bytes"]["value"] == pytest.approx(two["plan"]["wire_bytes_per_step"])
    assert metrics["cost_usd"]["value"] is None or "2 devices" in metrics["cost_usd"]["source"]
    ranks = [out["ranks"] for out in (one, two)]
    assert ranks[0] == [] and len({rank["device"] for rank in ranks[1]}) == 2
