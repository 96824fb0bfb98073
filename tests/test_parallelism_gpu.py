"""On GPUs: the ring's kernels against attention written by hand, and layouts of two GPUs against one."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import ranks_of

from dyno import runner
from dyno.kernels.attention import reference, tolerance
from dyno.measure.nvml import devices
from dyno.recipe import compose
from dyno.study.settings import merge

pytestmark = pytest.mark.gpu
pair = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("dtype", "by_cudnn"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(("queries", "keys", "causal"), [(123, 123, True), (96, 48, False), (5, 70, False)])
def test_a_part_and_its_gradients_are_attention(dtype, by_cudnn, key_heads, queries, keys, causal):
    from dyno.techniques.parallelism._ring import attend, attend_backward, cudnn_takes

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, 64) for heads, n in ((4, queries), (key_heads, keys), (key_heads, keys), (4, queries))]
    q, k, v, grad = (torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes)
    if by_cudnn and not cudnn_takes(q, k, v, causal):
        pytest.skip("a GPU whose cuDNN takes these")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference(*leaves, causal=causal)
    expected.backward(grad)
    out, log_sum = attend(q, k, v, causal, 64**-0.5, by_cudnn)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    scores = (q.float() @ k.float().repeat_interleave(4 // key_heads, 1).transpose(-1, -2)) * 64**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), atol=2e-2, rtol=1e-3)
    loose = {name: 5 * value for name, value in tolerance(dtype).items()}
    got = attend_backward(grad, q, k, v, out, log_sum, causal, 64**-0.5, by_cudnn)
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, **loose)


SMALL = ["model=micro", "model.vocab_size=258", "corpus=stories", "corpus.size_bytes=200000", "measure=quick",
         "workload.batch=16", "workload.seq=128", "workload.steps=20"]  # fmt: skip


@pytest.fixture
def composed(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    return lambda *overrides: compose(merge([*SMALL, f"results_dir={tmp_path / 'results'}", *overrides]))


@pair
@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero2", "zero3", "tensor", "pipeline", "context"])
def test_two_gpus_train_like_one(layout, composed):
    one, two = (runner.run(composed(f"parallelism={option}")) for option in ("none", layout))
    assert two["status"] == "ok", two["reason"]
    for name in ("train_loss", "validation_loss"):
        assert two["metrics"][name]["value"] == pytest.approx(one["metrics"][name]["value"], abs=0.02)


@pair
@pytest.mark.parametrize(
    "overrides",
    [["precision=fp32"], ["precision=bf16"], ["precision=bf16", "compile=on"], ["decoding=sampling", "kv_cache=none"],
     ["precision=bf16", "kv_cache=static"], ["precision=bf16", "kv_cache=static", "compile=on"],
     ["decoding=sampling", "kv_cache=static"]],
    ids=" ".join,
)  # fmt: skip
def test_two_gpus_decode_like_one(overrides, composed):
    served = ["workload=generate", "workload.eval_tokens=4096", "workload.requests=4", "workload.new_tokens=16",
              "parallelism=tensor", *overrides]  # fmt: skip
    one, two = (runner.run(composed(*served, f"parallelism.tp={tp}")) for tp in (1, 2))
    for out in (one, two):
        assert out["status"] == "ok", out["reason"]
    metrics = two["metrics"]
    assert metrics["perplexity"]["value"] == pytest.approx(one["metrics"]["perplexity"]["value"], rel=0.01)
    assert metrics["kl_divergence"]["value"] < 1e-3 and metrics["decode_tokens_per_s"]["value"] > 0
    if "kv_cache=none" not in overrides:
        assert metrics["wire_bytes"]["value"] == pytest.approx(two["plan"]["wire_bytes_per_step"])
    assert metrics["cost_usd"]["value"] is None or "2 GPUs" in metrics["cost_usd"]["source"]
    ranks = [out["ranks"] for out in (one, two)]
    assert ranks[0] == [] and len({rank["device"] for rank in ranks[1]}) == 2


@pair
def test_a_row_of_two_gpus_says_what_messages_cost_and_links_give(composed):
    out = runner.run(composed("parallelism=ddp", "model=160m", "workload.seq=512", "workload.steps=0"))
    assert out["status"] == "ok", out["reason"]
    share, bus = out["metrics"]["communication_share"], out["metrics"]["bus_byte_per_s"]
    assert 0 <= share["low"] <= share["value"] <= share["high"] < 1
    assert 1e9 < bus["value"] < 1e12
    for rank in out["details"]["train"]["communication"]:
        assert 0 < rank["messages_s"] < rank["seconds"] and rank["exposed_s"] <= rank["messages_s"]
    assert len(out["details"]["train"]["first_losses"]) > 3


@pair
def test_a_rank_killed_on_its_gpu_ends_the_run_and_frees_both(composed, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_earlier_runs", itertools.repeat(0))  # started, so that ranks_of finds them
    runs, gpus = tmp_path / "results" / "runs", devices()[:2]
    before = [gpu.memory_used_bytes() for gpu in gpus]
    killed: list[Path] = []
    held: list[int] = []

    def kill_the_second(line: str) -> None:
        if line.startswith("train: step") and not killed:
            killed.extend(runs.glob(".running-*"))
            held.extend(gpu.memory_used_bytes() for gpu in gpus)
            os.kill(ranks_of(killed[0])["1"], signal.SIGKILL)

    begun = time.monotonic()
    out = runner.run(composed("parallelism=ddp", "workload.steps=100000"), progress=kill_the_second)
    assert out["status"] == "crashed" and "rank 1 of 2 was ended by SIGKILL" in out["reason"]
    assert time.monotonic() - begun < 60
    assert not ranks_of(killed[0]) and not list(runs.glob(".running-*"))
    assert all(now > empty + 2e8 for now, empty in zip(held, before, strict=True))
    deadline = time.monotonic() + 5  # the driver takes a moment
    while time.monotonic() < deadline and any(
        gpu.memory_used_bytes() > empty + 1e8 for gpu, empty in zip(gpus, before, strict=True)
    ):
        time.sleep(0.1)
    assert all(gpu.memory_used_bytes() <= empty + 1e8 for gpu, empty in zip(gpus, before, strict=True))
    assert runner.run(composed("parallelism=ddp"))["status"] == "ok"  # the next run finds both GPUs free
