"""Predicted prefill and decode: rooflines, what moves them, and the errors on committed records."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dyno import cli
from dyno.measure.environment import Device
from dyno.plan import predict
from dyno.plan.machine import Machine
from dyno.plan.serving import BAND, decode_traffic_bytes, serving_time
from dyno.recipe import compose
from dyno.technique import Footprint, Shape

ROOT = Path(__file__).parent.parent
GPU = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), None, 1)
BF16 = Footprint(weight_bytes=2.0, activation_width=2.0, matmul_dtype="bf16")
FAST = Machine({"fp32": 5e13, "bf16": 7.5e14}, 3e12, 700, "stated")
LLAMA = Shape(8_030_000_000, 7_504_000_000, 32, 4096, 14336, 32, 8, 128, 128256, 1, 0)


def served(shape=LLAMA, print_=BF16, prompt=1024, new=128, kind="cuda", positions=1):
    return serving_time(shape, print_, FAST, kind, prompt, new, positions)


def batch(rows):
    return Shape(**{**vars(LLAMA), "batch": rows})


def test_a_large_model_s_decode_reads_its_weights_and_its_cache():
    device = served(kind="cpu")  # no launches: the device alone
    reading = 2 * LLAMA.linear_parameters / 3e12
    assert reading < device.tpot_s < 1.6 * reading
    wide = [served(batch(n), kind="cpu").decode for n in (64, 128)]
    context, key_bytes = 1024 + 64, 2 * 2 * 8 * 128 * 32
    assert wide[1]["attention"] - wide[0]["attention"] == pytest.approx(64 * context * key_bytes / 3e12, rel=0.01)
    assert wide[1]["products"] < 1.1 * wide[0]["products"]
    assert served(batch(64)).tokens_per_s > 20 * served(batch(1)).tokens_per_s


def test_a_decode_pass_moves_its_weights_and_its_cache():
    def moved(rows):
        return decode_traffic_bytes(batch(rows), BF16, 1024, 128)

    assert moved(1) == pytest.approx(2 * LLAMA.linear_parameters, rel=0.02)
    cache = 2 * 2 * 8 * 128 * 32 * (1024 + 64)
    assert 1 < (moved(128) - moved(64)) / (64 * cache) < 1.15  # and activations
    halved = decode_traffic_bytes(batch(64), replace(BF16, width_factor=0.5), 1024, 128)
    assert halved == pytest.approx(moved(64) / 2, rel=0.05)


def test_a_prefill_is_its_flops():
    prefill = served(batch(8)).prefill
    flops = 2 * (LLAMA.linear_parameters - LLAMA.vocab * LLAMA.hidden) * 8 * 1024
    assert prefill["products"] == pytest.approx(flops / 7.5e14, rel=0.05)
    assert served(batch(8)).ttft_s > prefill["products"] > served(batch(4)).prefill["products"]


def test_what_moves_a_pass():
    narrow = Footprint(weight_bytes=0.56, activation_width=2.0, matmul_dtype="bf16")
    assert served(print_=narrow, kind="cpu").tpot_s < 0.5 * served(kind="cpu").tpot_s
    bare = Footprint(weight_bytes=2.0, activation_width=2.0, matmul_dtype="bf16", kv_cache_factor=0.0)
    assert served(print_=bare, kind="cpu").tpot_s > 3 * served(kind="cpu").tpot_s
    small = Shape(**{**vars(LLAMA), "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 4, "head_dim": 64})
    found = served(small)
    assert found.tpot_s == found.decode["host"] == found.ttft_s  # the host's launches bind both
    guess = served(positions=5)
    assert guess.tpot_s is guess.tokens_per_s is None and "not known" in guess.reasons["tpot_s"] and guess.ttft_s > 0


def benchmark():
    spec = importlib.util.spec_from_file_location("serving_error", ROOT / "benchmarks" / "serving_error.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_on_committed_records_stay_inside_the_band_and_are_told(capsys):
    """Whatever they are: nothing in the predictor is fitted to these runs."""
    rows = benchmark().errors()
    assert len(rows) >= 7
    for row in rows:
        for name in ("ttft_s", "tpot_s"):
            error = row[f"{name}_error"]
            print(
                row["attention"],
                row["quantization"],
                row["decoding"],
                name,
                "not predicted" if error is None else f"{error:+.0%}",
            )
            assert (error is None) == (row["decoding"] == "speculative" and name == "tpot_s")
            assert error is None or abs(error) <= BAND
    committed = json.loads((ROOT / "results" / "reference" / "planner" / "serving.json").read_text())
    for row, old in zip(rows, committed["rows"], strict=True):
        assert row["ttft_s_error"] == pytest.approx(old["ttft_s_error"], abs=1e-6)


def test_decode_of_8b_on_one_and_two_gpus_takes_what_the_plan_says():
    reference = ROOT / "results" / "reference"
    rows = [row for name in ("h100-x2", "h200-x4") for row in benchmark().errors(reference / name / "decode-8b")]
    assert len(rows) == 11
    assert all(abs(row["tpot_s_error"]) <= 0.3 and abs(row["ttft_s_error"]) <= 0.45 for row in rows)


def test_a_recorded_decode_pass_has_no_host_but_in_its_prefill():
    device = replace(GPU, name="NVIDIA H200", memory_bytes=140 * 2**30, count=2)
    words = [
        "model=8b",
        "precision=bf16",
        "attention=sdpa",
        "workload=generate",
        "workload.prompt=1024",
        "hardware=h100",
    ]
    static, contiguous = (predict(compose([*words, f"kv_cache={o}"]), device) for o in ("static", "contiguous"))
    a, b = static.serving, contiguous.serving
    assert a.prefill == b.prefill and static.terms == contiguous.terms
    assert b.decode["host"] > 50 * a.decode["host"] > 0
    assert a.decode["attention"] > b.decode["attention"]  # all of the allocated keys
    assert a.tpot_s < b.tpot_s
    two = predict(compose([*words, "kv_cache=static", "parallelism=tensor", "parallelism.tp=2"]), device).serving
    assert two.tpot_s < a.tpot_s and two.decode["host"] == a.decode["host"]


def test_the_plan_of_a_generate_workload_says_so(capsys):
    words = ["model=1b", "hardware=h100", "precision=bf16", "workload=generate", "attention=sdpa_flash"]
    assert cli.main(["plan", *words]) == 0
    shown = capsys.readouterr()
    out = json.loads(shown.out.strip().splitlines()[-1])
    serving = out["serving"]
    assert serving["label"] == "predicted" and serving["relative_error"] == BAND
    assert out["tokens_per_s"] == serving["tokens_per_s"] == pytest.approx(4 / serving["tpot_s"])
    assert "ttft" in shown.err and "decode pass" in shown.err and "predicted, +-60%" in shown.err
    assert "requests 4 x 128 tokens   1 rank   FLOPs a decode pass" in shown.err
    assert "a decode pass; counted, never measured" in shown.err and out["memory_traffic_bytes_per_step"] > 2e9
    (memory,) = out["advice"]
    assert "is logits" in memory and "workload.eval_tokens=0" in memory and "micro-batches" not in memory
    assert predict(compose([*words[:3], "workload=eval"]), GPU).serving is None
    guess = predict(compose([*words, "decoding=speculative"]), GPU)
    assert guess.tokens_per_s is None and guess.serving.ttft_s > 0
