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
