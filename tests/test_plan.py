"""The plan: what a recipe needs and why it cannot run, told before anything runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import tiny

from dyno import cli, plan
from dyno.errors import UserError
from dyno.measure.environment import Device
from dyno.plan import predict, reasons, shape_from, shape_of, time
from dyno.recipe import compose
from dyno.technique import Footprint, combined

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
    assert "can run" in shown.err and "batch 16 x 128 tokens   1 rank   FLOPs" in shown.err
    assert plan["ranks"] == 1 and plan["memory_traffic_bytes_per_step"] > 0
    assert "memory traffic" in shown.err and "communication" not in shown.err


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


@pytest.mark.parametrize("missing_bytes", [1, 10**5, 10**8])
def test_what_is_needed_and_what_there_is_are_told_apart(missing_bytes):
    recipe = compose(["model=160m"])
    card = replace(GPU, memory_bytes=int(predict(recipe, GPU).needed_bytes) - missing_bytes)
    _, reason = predict(recipe, card).verdict()
    need, has = (float(text) for text in re.findall(r"([\d.]+) GiB", reason))
    assert need > has


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


def test_serving_takes_a_workload_that_has_requests():
    with pytest.raises(UserError, match="workload=generate"):
        predict(compose(["workload.measures=infer"]), CPU)


def test_a_large_model_s_state_is_the_arithmetic_everybody_quotes():
    """175B weights in fp32 are 700 GB, gradients as much, Adam's state 1.4 TB; with activations over 3 TB."""
    terms = predict(compose(["model=175b", "workload.seq=2048", "attention=sdpa"]), GPU).terms["backward end"]
    assert terms["weights"] == pytest.approx(700e9, rel=0.01) and terms["optimizer"] == pytest.approx(1.4e12, rel=0.01)
    plan = predict(compose(["model=175b", "workload.seq=2048", "attention=sdpa"]), GPU)
    assert plan.peak_memory_bytes > 3e12 and plan.phase in ("loss", "backward start")


def test_the_step_takes_the_slower_of_device_and_host():
    hardware = "hardware=h100"
    small = predict(compose(["model=nano", "precision=bf16", hardware]), GPU)
    large = predict(compose(["model=1b", "precision=bf16", "workload.seq=2048", hardware]), GPU)
    assert small.time_terms["host"] > sum(small.time_terms[n] for n in time.DEVICE)
    assert small.step_s == pytest.approx(small.time_terms["host"] + small.time_terms["fixed"])
    assert "host" in small.advice[1] and "host" not in large.advice[1]
    assert large.step_s > sum(large.time_terms[n] for n in time.DEVICE)
    compiled = predict(compose(["model=1b", "precision=bf16", "workload.seq=2048", "compile=on", hardware]), GPU)
    assert compiled.time_terms["elementwise"] < 0.6 * large.time_terms["elementwise"]
    assert compiled.peak_memory_bytes < 0.8 * large.peak_memory_bytes


def test_time_is_empty_where_no_ceiling_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path))
    plan = predict(compose(["model=nano", "hardware=cpu"]), CPU)
    assert plan.step_s is None and plan.to_json()["step_time_s"] is None and plan.to_json()["ceilings"] is None
    folder = tmp_path / "ceilings"
    folder.mkdir()
    found = {"device": "cpu", "matrix_flop_per_s": {"fp32": 1e11}, "copy_byte_per_s": 1e10, "created": "2026-01-01"}
    (folder / "a.json").write_text(json.dumps(found))
    (folder / "b.json").write_text("{")
    plan = predict(compose(["model=nano", "hardware=cpu"]), CPU)
    assert plan.step_s is not None and plan.step_s > 0 and "measured" in plan.to_json()["ceilings"]


def step(*overrides: str) -> dict[str, float]:
    base = ["model=1b", "precision=bf16", "workload.batch=2", "workload.seq=512", "hardware=h100", *overrides]
    return predict(compose(base), GPU).time_terms


def test_memory_traffic_is_the_bytes_that_the_terms_price():
    words = ["model=1b", "workload.batch=8", "workload.seq=512", "attention=math", "hardware=h100"]
    recipe = compose([*words, "compile=on"])
    plan = predict(recipe, GPU)
    share = combined(t.footprint(plan.shape, GPU) for chosen in recipe.techniques.values() for t in chosen)
    moved = time.traffic(plan.shape, share)
    assert plan.memory_traffic_bytes_per_step == sum(moved.values())
    for name in ("scores", "elementwise", "loss", "optimizer"):
        assert moved[name] > 0
        assert plan.time_terms[name] == pytest.approx(moved[name] / plan.machine.memory)
    # AdamW in fp32: weight and two moments read and written, four passes over the gradient, which is also clipped.
    assert moved["optimizer"] == pytest.approx(40 * plan.shape.parameters)
    eager, wider = predict(compose(words), GPU), predict(compose([*words, "compile=on", "workload.batch=16"]), GPU)
    assert eager.memory_traffic_bytes_per_step > 1.5 * plan.memory_traffic_bytes_per_step
    assert 1.5 < wider.memory_traffic_bytes_per_step / plan.memory_traffic_bytes_per_step < 2


def test_a_budget_has_the_band_of_the_step(capsys):
    assert cli.main(["plan", "model=160m", "precision=bf16", "hardware=h100", "--tokens", "1e9"]) == 0
    shown = capsys.readouterr()
    out = json.loads(shown.out.strip().splitlines()[-1])
    assert out["budget"]["relative_error"] == out["relative_error"]["time"] > 0
    assert f"each at least +-{out['relative_error']['time']:.0%}, as the step" in shown.err
    assert "1 G tokens on 1 device:" in shown.err


def test_only_blocks_that_run_again_cost_their_passes_twice():
    """Neither an optimizer's products nor a loss's are a forward pass of the blocks; kept products are not made again."""
    plain, again, kept = step(), step("checkpointing=uniform"), step("checkpointing=selective")
    assert again["products"] == pytest.approx(4 / 3 * plain["products"], rel=0.02)
    assert kept["products"] == plain["products"] and kept["elementwise"] == again["elementwise"]
    for other in (step("optimizer=muon"), step("loss=chunked")):
        assert all(other[name] == plain[name] for name in ("products", "elementwise", "attention"))
    assert step("loss=chunked")["head"] == pytest.approx(4 / 3 * plain["head"], rel=0.02)


def test_an_optimizer_s_products_and_launches_are_its_step_s():
    plain, muon, rounded = step(), step("optimizer=muon"), step("precision=bf16_stochastic")
    assert muon["optimizer"] > 3 * plain["optimizer"] and muon["host"] > plain["host"] + 5e-3
    assert step("optimizer=muon", "optimizer.iterations=1")["optimizer"] < 0.6 * muon["optimizer"]
    tensors = shape_of(compose(["model=1b"])).tensors
    master, narrow = (
        step("precision=bf16_master", f"optimizer={name}")["host"] for name in ("adamw", "adamw_single_pass")
    )
    assert rounded["host"] == pytest.approx(master + 9 * tensors * time.STEP_LAUNCH_S)
    assert narrow == pytest.approx(master - tensors * time.STEP_LAUNCH_S)  # one a weight, and no casts


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_the_model_s_parameters(tied, qk_norm):
    from dyno.model.decoder import Decoder

    config = tiny.config(tied_embeddings=tied, qk_norm=qk_norm)
    shape = shape_from(config, compose(["workload=train"]).config["workload"])
    assert shape.tensors == len(list(Decoder(config).parameters()))


def test_a_host_that_waits_for_the_step_is_as_much_later():
    small = ["workload.batch=1", "workload.seq=64"]
    waiting, free = step("precision=fp16", *small), step(*small)
    assert waiting["host"] > sum(waiting[name] for name in time.DEVICE)
    assert waiting["fixed"] == pytest.approx(free["fixed"] + waiting["optimizer"]) and free["fixed"] == time.STEP_S
    assert step("precision=fp16", "workload.batch=64")["fixed"] == time.STEP_S


def test_gradients_of_more_micro_batches_are_added_on_the_host():
    words = ["offload=optimizer", "workload.batch=8", "accumulation=gradients"]
    one, four = (step(*words, f"accumulation.micro_batches={n}")["host update"] for n in (1, 4))
    parameters = shape_of(compose(["model=1b"])).parameters
    assert four - one == pytest.approx(3 * time.HOST_ADD * parameters)


def test_offload_that_the_host_has_no_memory_for_is_told(monkeypatch):
    recipe = compose(["model=8b", "offload=parameters", "workload.batch=1", "workload.seq=512", "precision=bf16"])
    here = replace(GPU, uuid="GPU-0")
    monkeypatch.setattr(plan, "memory_bytes", lambda: 64 * 2**30)
    status, reason = predict(recipe, here).verdict()
    assert status == "out_of_memory" and "of host memory, there are 64.0 GiB" in reason
    assert predict(recipe, GPU).verdict() is None  # of a device that is not here nobody knows the host
    monkeypatch.setattr(plan, "memory_bytes", lambda: 256 * 2**30)
    found = predict(recipe, here)
    assert found.verdict() is None and found.to_json()["host_bytes"] == found.host_bytes
    shape = found.shape
    assert found.host_bytes == pytest.approx(16 * shape.parameters + 2 * shape.block_parameters)  # which travel in bf16


def test_a_cpu_s_memory_is_the_host_s():
    words = ["model=8b", "offload=optimizer", "workload.batch=1", "workload.seq=128"]
    found = predict(compose(words), CPU)
    assert found.needed_bytes < CPU.memory_bytes < found.needed_bytes + found.host_bytes
    assert found.verdict()[0] == "out_of_memory" and "of host memory" in found.verdict()[1]
    assert predict(compose(words), replace(CPU, memory_bytes=2**40)).verdict() is None


def test_shares_combine_as_their_defaults_say():
    both = combined([
        Footprint(activation_width=2.0, batch_factor=0.5, extra_bytes=3.0, fused=True, matmul_dtype="bf16"),
        Footprint(batch_factor=0.5, extra_bytes=4.0, activation_width=1.0, ranks=2),
        Footprint(),
    ])  # fmt: skip
    assert both == Footprint(
        activation_width=1.0, batch_factor=0.25, extra_bytes=7.0, fused=True, matmul_dtype="bf16", ranks=2
    )


def test_a_memory_limit_is_what_the_plan_compares_with():
    words = ["model=160m", "workload.batch=16"]
    free, held = (predict(compose([*words, *more]), GPU) for more in ([], ["measure.memory_limit_gib=2"]))
    assert free.verdict() is None and free.peak_memory_bytes == held.peak_memory_bytes
    assert "has 2.0 GiB" in held.verdict()[1]
    assert predict(compose([*words, "measure.memory_limit_gib=1000"]), GPU).verdict() is None


@pytest.mark.parametrize("limit", ["1", "-3", "true", "plenty"])
def test_a_memory_limit_that_is_none_is_told(limit):
    with pytest.raises(UserError, match="memory_limit_gib"):
        compose([f"measure.memory_limit_gib={limit}"])
