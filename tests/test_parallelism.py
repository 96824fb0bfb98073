"""Two gloo ranks against one process: the same losses, gradients and weights; half the parameters a rank under ZeRO-3.

Run as a program, this file is one rank: it trains every layout and writes what it saw.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from dyno.plan import predict
from dyno.stages import train
from dyno.technique import Shape
from dyno.techniques.parallelism.data_parallel import DDP, ZeRO3

STEPS, RANKS = 5, 2
WORKLOAD = {"batch": 8, "seq": 12, "lr": 1e-2}
STREAM = np.tile(np.arange(20), 20)
SIZES = {"vocab_size": 64, "layers": 3}  # every matrix divides by two
CASES = {
    "one": [],
    "one_bf16": ["precision=bf16"],
    "one_muon": ["optimizer=muon"],
    "one_adamw8bit": ["optimizer=adamw8bit"],
    "one_master_bf16": ["precision=bf16_master"],
    "one_stochastic_bf16": ["precision=bf16_stochastic"],
    "ddp": ["parallelism=ddp"],
    "ddp_accumulated": ["parallelism=ddp", "accumulation=gradients", "accumulation.micro_batches=2"],
    "zero3": ["parallelism=zero3"],
    "zero3_accumulated": ["parallelism=zero3", "accumulation=gradients", "accumulation.micro_batches=2"],
    "zero3_bf16": ["parallelism=zero3", "precision=bf16", "checkpointing=uniform", "checkpointing.every=2"],
    "zero3_master_bf16": ["parallelism=zero3", "precision=bf16_master"],
    "zero3_stochastic_bf16": ["parallelism=zero3", "precision=bf16_stochastic"],
    "zero3_chunked": ["parallelism=zero3", "loss=chunked", "loss.rows=10"],
    "ddp_chunked": ["parallelism=ddp", "loss=chunked", "loss.rows=10"],
    "zero3_muon": ["parallelism=zero3", "optimizer=muon"],
    "zero3_adamw8bit": ["parallelism=zero3", "optimizer=adamw8bit"],
    "ddp_stochastic_bf16": ["parallelism=ddp", "precision=bf16_stochastic"],
}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(case: str, directory: Path, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Train a case; losses averaged over ranks, the first step's gradients, the final weights, and local sizes."""
    pipeline = tiny.pipeline(directory, "workload.batch=8", "attention=math", *CASES[case])
    pipeline.rank, pipeline.ranks = rank, ranks
    model = tiny.model(sharpness=3.0, **SIZES).train()
    run = train.prepared_run(pipeline, model)
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    out: dict[str, torch.Tensor] = {}
    step, names = trainer.optimizer.step, [name for name, _ in model.named_parameters()]

    def record():
        if "gradient." + names[0] not in out:
            for name, parameter in zip(names, trainer.parameters, strict=True):
                out[f"gradient.{name}"] = whole(parameter.grad).clone()
        step()

    trainer.optimizer.step = record
    losses = []
    for _ in range(STEPS):
        trainer.step()
        losses.append(torch.tensor(trainer.mean_loss()))
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    out["losses"] = torch.stack(losses)
    out["bytes"] = torch.tensor(sum(p.numel() * p.element_size() for p in local))
    moments = [s["exp_avg"] for s in trainer.optimizer.state.values() if "exp_avg" in s]
    out["moments"] = torch.tensor(sum((m.to_local() if hasattr(m, "to_local") else m).numel() * 4 for m in moments))
    with torch.no_grad():
        out["logits"] = run.part("forward")(tiny.tokens(2, 9))
    out |= {f"state.{name}": tensor.clone() for name, tensor in run.part("state_dict")().items()}
    return out


def main(rank: int, directory: Path) -> None:
    store = torch.distributed.FileStore(str(directory / "rendezvous"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    for case in CASES:
        if case.startswith("one"):
            continue
        torch.save(trained(case, directory, rank, RANKS), directory / f"{case}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[case] is what each rank saw; both processes are dead when this returns, whatever happened."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [(directory / f"log-{rank}").open("w+") for rank in range(RANKS)]
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(directory)], env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join((directory / f"log-{rank}").read_text()[-3000:] for rank in range(RANKS))
    seen = {
        case: [torch.load(directory / f"{case}-{rank}.pt", weights_only=True) for rank in range(RANKS)]
        for case in CASES
        if not case.startswith("one")
    }
    return seen | {case: [trained(case, directory)] for case in CASES if case.startswith("one")}


MANY = [case for case in CASES if not case.startswith("one") and not case.endswith(("bf16", "muon", "8bit"))]


@pytest.mark.parametrize("case", MANY)
def test_ranks_train_like_one_process(case, results):
    expected = results["one"][0]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=1e-5, rtol=0)
        gradients = [name for name in expected if name.startswith("gradient.")]
        assert len(gradients) == 3 * 9 + 2
        for name in gradients:
            torch.testing.assert_close(seen[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", MANY)
def test_the_gathered_weights_are_those_of_one_process(case, results):
    expected, seen = results["one"][0], results[case][0]
    states = sorted(name for name in expected if name.startswith("state."))
    assert sorted(name for name in seen if name.startswith("state.")) == states
    for name in states:
        torch.testing.assert_close(seen[name], expected[name], atol=2e-4, rtol=1e-3)  # Adam divides by tiny numbers
    torch.testing.assert_close(seen["logits"], expected["logits"], atol=1e-3, rtol=1e-3)


def test_zero3_with_bf16_and_checkpointing_trains_like_bf16(results):
    for seen in results["zero3_bf16"]:
        torch.testing.assert_close(seen["losses"], results["one_bf16"][0]["losses"], atol=0.02, rtol=0)
    assert results["zero3_bf16"][0]["state.blocks.0.mlp.up_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("case", ["zero3_master_bf16", "zero3_stochastic_bf16", "ddp_stochastic_bf16"])
def test_ranks_with_bf16_weights_train_like_one_process(case, results):
    """Stochastic rounding draws for whole weights in one process and for parts under ZeRO-3: close, not equal."""
    expected = results["one_" + case.split("_", 1)[1]][0]
    name = "state.blocks.0.mlp.up_proj.weight"
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=0.03, rtol=0)
    assert results[case][0][name].dtype == torch.bfloat16
    assert torch.equal(results[case][0]["logits"], results[case][1]["logits"])  # no rank drifts away


@pytest.mark.parametrize("case", ["zero3_muon", "zero3_adamw8bit"])
def test_other_optimizers_step_on_sharded_parameters(case, results):
    """Muon gathers its matrices and is equal; blocks of 8-bit moments are a rank's own, so those differ a little."""
    expected = results["one_" + case.split("_", 1)[1]][0]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=1e-4 if "muon" in case else 0.03, rtol=0)


@pytest.mark.parametrize("what", ["bytes", "moments"])
def test_zero3_keeps_half_of_the_state_a_rank_and_ddp_all(what, results):
    everything = float(results["one"][0][what])
    for case in MANY:
        share = 0.5 if case.startswith("zero3") else 1.0
        assert [float(seen[what]) / everything for seen in results[case]] == pytest.approx([share] * RANKS, rel=0.05)


def device(kind="cpu", count=1):
    return SimpleNamespace(kind=kind, count=count, name="a device", memory_bytes=10**12, capability=(9, 0))


def test_layouts_say_what_they_cannot_do(tmp_path):
    def reason(technique, *overrides, on=None):
        return technique.unsupported(tiny.pipeline(tmp_path, *overrides).recipe, on or device())

    assert reason(DDP(), "workload.batch=8") is None
    assert "cannot be split" in reason(ZeRO3(3), "workload.batch=8")
    assert "cannot be split" in reason(DDP(0), "workload.batch=8")
    assert "measure training" in reason(DDP(), "workload=generate")
    assert "needs as many GPUs" in reason(DDP(2), "workload.batch=8", on=device("cuda", 1))
    assert reason(DDP(2), "workload.batch=8", on=device("cuda", 2)) is None


@pytest.mark.parametrize("layout", [DDP, ZeRO3])
def test_a_layout_of_one_rank_is_the_plain_step(layout, tmp_path):
    pipeline = tiny.pipeline(tmp_path, "workload.batch=8", f"parallelism={layout.__name__.lower()}",
                             "parallelism.ranks=1")  # fmt: skip
    model = tiny.model(**SIZES).train()
    run = train.prepared_run(pipeline, model)
    assert layout(1).unsupported(pipeline.recipe, device()) is None
    assert run.part("forward") is model
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    trainer.step()
    assert trainer.finite_loss() > 0


def test_zero3_predicts_a_share_of_the_state_and_ddp_a_second_gradient(tmp_path):
    shape = Shape(10**6, 10**6, 10, 64, 192, 4, 2, 16, 257, 8, 128)
    assert ZeRO3(4).footprint(shape, device()).optimizer_factor == 0.25
    assert DDP(4).footprint(shape, device()).optimizer_factor == 1.0
    plans = {
        option: predict(
            tiny.pipeline(tmp_path, "model=1b", "workload.batch=8", f"parallelism={option}").recipe, device()
        )
        for option in ("none", "ddp", "zero3")
    }
    assert plans["zero3"].peak_memory_bytes < plans["none"].peak_memory_bytes < plans["ddp"].peak_memory_bytes


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
