"""The plan: what a recipe needs and why it cannot run, told before anything runs."""

from __future__ import annotations

import json

import pytest

from dyno import cli
from dyno.measure.environment import Device
from dyno.plan import predict, reasons, shape_of
from dyno.recipe import compose

CPU = Device("cpu", 0, "a processor", 64 * 2**30, None, None, 1)
GPU = Device("cuda", 0, "a card", 80 * 2**30, (9, 0), None, 1)


def peak(*overrides: str, device: Device = GPU) -> float:
    return predict(compose(list(overrides)), device).peak_memory_bytes


def test_plan_ends_with_json(capsys):
    assert cli.main(["plan", "model=nano", "hardware=cpu"]) == 0
    shown = capsys.readouterr()
    plan = json.loads(shown.out.strip().splitlines()[-1])
    assert plan["label"] == "predicted" and plan["feasible"] and plan["reason"] is None
    assert plan["peak_memory_bytes"] > 0 and plan["flops_per_step"] > 0
    assert sum(plan["terms_bytes"][plan["binding_phase"]].values()) == pytest.approx(plan["peak_memory_bytes"], rel=0.1)
    assert "can run" in shown.err


def test_plan_refuses_with_the_reason(capsys):
    """The option h100 describes its memory, so that the answer is the same on every machine."""
    assert cli.main(["plan", "model=8b", "hardware=h100", "workload.batch=64", "workload.seq=2048"]) == 1
    shown = capsys.readouterr()
    plan = json.loads(shown.out.strip().splitlines()[-1])
    assert not plan["feasible"] and "GiB" in plan["reason"] and plan["binding_phase"] in plan["reason"]
    assert "cannot run" in shown.err


def test_out_of_memory_is_the_device_s():
    recipe = compose(["model=160m"])
    assert predict(recipe, GPU).verdict() is None
    small = Device("cuda", 0, "a small card", 2**30, (9, 0), None, 1)
    status, reason = predict(recipe, small).verdict() or ("", "")
    assert status == "out_of_memory" and "a small card has 1.0 GiB" in reason


def test_the_peak_is_the_largest_phase_not_the_sum():
    plan = predict(compose(["model=160m"]), GPU)
    sums = {phase: sum(terms.values()) for phase, terms in plan.terms.items()}
    assert max(sums.values()) <= plan.peak_memory_bytes < sum(sums.values())
    assert sums[plan.phase] == max(sums.values())


def test_needs_move_the_way_the_knobs_do():
    base = ("model=160m", "workload.batch=8", "workload.seq=512")
    plain = peak(*base)
    assert peak(*base, "workload.batch=16") > plain
    assert peak(*base, "workload.seq=1024") > plain
    assert peak(*base, "attention=math") > plain
    assert peak(*base, "precision=bf16", "workload.batch=32") < peak(*base, "precision=fp32", "workload.batch=32")
    assert peak(*base, "checkpointing=uniform") < plain
    assert peak(*base, "accumulation=gradients") < plain
    serving = ("model=160m", "workload=generate")
    kv = predict(compose([*serving]), GPU).terms["decode"]["kv cache"]
    assert predict(compose([*serving, "workload.requests=8"]), GPU).terms["decode"]["kv cache"] == 2 * kv
    weights = [
        predict(compose([*serving, f"quantization={q}"]), GPU).terms["decode"]["weights"]
        for q in ("none", "int8", "int4")
    ]
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 3


def test_parameters_are_those_of_the_model():
    torch = pytest.importorskip("torch")
    from dyno.model.config import config_of
    from dyno.model.decoder import Decoder

    for overrides in (
        ["model=nano"],
        ["model=160m", "model.tied_embeddings=false"],
        ["model=nano", "model.kv_heads=4"],
    ):
        recipe = compose(overrides)
        shape = shape_of(recipe)
        assert shape is not None
        with torch.device("meta"):
            model = Decoder(config_of(recipe.config["model"], shape.vocab))
        assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_reasons_name_axis_and_option():
    recipe = compose(["attention=sdpa_cudnn"])
    (reason,) = reasons(recipe, CPU)
    assert reason.startswith("attention=sdpa_cudnn: ")
    status, text = predict(recipe, CPU).verdict() or ("", "")
    assert status == "unsupported" and reason in text


def test_a_workload_without_a_model_needs_no_shape():
    plan = predict(compose(["workload=data"]), CPU)
    assert plan.shape is None and plan.verdict() is None and plan.to_json()["peak_memory_bytes"] is None
