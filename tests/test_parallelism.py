"""Every layout on gloo against one process: losses, gradients, weights, evaluation, bytes kept and bytes sent.

Run as a program, this file forks the ranks, trains every case and writes what each rank saw.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch

from dyno.plan import shape_from, time
from dyno.recipe import Recipe, compose
from dyno.stages import train
from dyno.stages.ranks import counted_step
from dyno.technique import combined
from dyno.techniques.parallelism import _cost, _layout  # noqa: F401  the ranks inherit what is imported here

STEPS, COUNTED = 5, 2
WORKLOAD = {"measures": "train", "batch": 8, "seq": 16, "lr": 1e-2}
STREAM = np.tile(np.arange(20), 20)
SIZES = {"vocab_size": 64, "layers": 2, "kv_heads": 4}
RICH = {"tied_embeddings": False, "qk_norm": True, "qkv_bias": True}  # of the models whose name says so
# Four stages need four layers.
DEEP = ("one_deep", "interleaved", "zero_bubble", "zbv", "pp_of_four", "interleaved_dp", "zero_bubble_tp")
TWICE = ["accumulation=gradients", "accumulation.micro_batches=2"]


def mesh(**knobs: object) -> list[str]:
    plain = {"dp": 1, "tp": 1, "pp": 1, "cp": 1, "zero": 0}
    return ["parallelism=mesh", *(f"parallelism.{k}={v}" for k, v in {**plain, **knobs}.items())]


def pipeline(schedule: str, **knobs: object) -> list[str]:
    knobs = {"schedule": schedule, **knobs}
    return ["parallelism=pipeline", *(f"parallelism.{k}={v}" for k, v in knobs.items())]


# name: (ranks, overrides)
CASES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one_deep": (1, []),
    "one_rich": (1, []),
    "one_bf16": (1, ["precision=bf16"]),
    "one_master_bf16": (1, ["precision=bf16_master"]),
    "one_stochastic_bf16": (1, ["precision=bf16_stochastic"]),
    "one_muon": (1, ["optimizer=muon"]),
    "one_adamw8bit": (1, ["optimizer=adamw8bit"]),
    "one_adamw8bit_bf16": (1, ["optimizer=adamw8bit", "precision=bf16_master"]),
    "one_documents": (1, ["packing=documents"]),
    "one_padded": (1, ["packing=padded"]),
    "ddp": (2, ["parallelism=ddp"]),
    "ddp_twice": (2, ["parallelism=ddp", *TWICE]),
    "zero1": (2, ["parallelism=zero1", *TWICE]),
    "zero2": (2, ["parallelism=zero2", *TWICE]),
    "zero3": (2, ["parallelism=zero3"]),
    "zero3_twice": (2, ["parallelism=zero3", *TWICE]),
    "tensor": (2, ["parallelism=tensor"]),
    "tensor_plain": (2, ["parallelism=tensor", "parallelism.sequence_parallel=false",
                         "parallelism.loss_parallel=false"]),
    "tensor_rich": (2, ["parallelism=tensor"]),
    "gpipe": (2, pipeline("gpipe")),
    "1f1b": (2, pipeline("1f1b")),
    "interleaved": (2, pipeline("interleaved")),
    "zero_bubble": (2, pipeline("zero_bubble")),
    "zbv": (2, pipeline("zbv")),
    "ring": (2, ["parallelism=context"]),
    "ulysses": (2, ["parallelism=context", "parallelism.context=ulysses", "attention=math"]),
    "zero1_bf16": (2, ["parallelism=zero1", "precision=bf16", *TWICE]),
    "zero3_optimal": (2, ["parallelism=zero3", "checkpointing=optimal", "checkpointing.budget=0.7"]),
    "tensor_optimal": (2, ["parallelism=tensor", "checkpointing=optimal", "checkpointing.budget=0.7"]),
    "zero3_bf16": (2, ["parallelism=zero3", "precision=bf16", "checkpointing=uniform", "checkpointing.every=2"]),
    "1f1b_bf16": (2, [*pipeline("1f1b"), "precision=bf16", "checkpointing=uniform"]),
    "tensor_bf16": (2, ["parallelism=tensor", "precision=bf16", "checkpointing=uniform"]),
    "tensor_selective": (2, ["parallelism=tensor", "checkpointing=selective"]),
    "tensor_plain_uniform": (2, ["parallelism=tensor", "parallelism.sequence_parallel=false", "checkpointing=uniform"]),
    "ring_uniform": (2, ["parallelism=context", "checkpointing=uniform"]),
    "ulysses_sqrt": (2, ["parallelism=context", "parallelism.context=ulysses", "attention=math", "checkpointing=sqrt"]),
    "cp_tp_uniform": (4, [*mesh(cp=2, tp=2), "checkpointing=uniform"]),
    "zero3_selective": (2, ["parallelism=zero3", "checkpointing=selective"]),
    "1f1b_selective": (2, [*pipeline("1f1b"), "checkpointing=selective"]),
    "zero3_master_bf16": (2, ["parallelism=zero3", "precision=bf16_master"]),
    "zero3_stochastic_bf16": (2, ["parallelism=zero3", "precision=bf16_stochastic"]),
    "ddp_stochastic_bf16": (2, ["parallelism=ddp", "precision=bf16_stochastic"]),
    "zero3_muon": (2, ["parallelism=zero3", "optimizer=muon"]),
    "zero3_adamw8bit": (2, ["parallelism=zero3", "optimizer=adamw8bit"]),
    "zero3_adamw8bit_bf16": (2, ["parallelism=zero3", "optimizer=adamw8bit", "precision=bf16_master"]),
    "zero3_chunked": (2, ["parallelism=zero3", "loss=chunked", "loss.rows=10"]),
    "ddp_chunked": (2, ["parallelism=ddp", "loss=chunked", "loss.rows=10"]),
    "ring_chunked": (2, ["parallelism=context", "loss=chunked", "loss.rows=10"]),
    "ddp_documents": (2, ["parallelism=ddp", "packing=documents", *TWICE]),
    "zero3_documents": (2, ["parallelism=zero3", "packing=documents"]),
    "tensor_documents": (2, ["parallelism=tensor", "packing=documents"]),
    "1f1b_padded": (2, [*pipeline("1f1b"), "packing=padded"]),
    "zero3_padded": (2, ["parallelism=zero3", "packing=padded", *TWICE]),
    "hybrid": (4, ["parallelism=hybrid", *TWICE]),
    "zero3_reshard": (4, ["parallelism=zero3", "parallelism.dp=4", "parallelism.reshard_to=2"]),
    "hybrid_bf16": (4, ["parallelism=hybrid", "precision=bf16", *TWICE]),
    "dp_tp_bf16": (4, [*mesh(dp=2, tp=2, zero=3), "precision=bf16"]),
    "pp_dp_bf16": (4, [*mesh(pp=2, dp=2, zero=1), "precision=bf16"]),
    "cp_dp_bf16": (4, [*mesh(cp=2, dp=2, zero=3), "precision=bf16"]),
    "ring_of_four": (4, mesh(cp=4, zero=1)),
    "dp_tp": (4, mesh(dp=2, tp=2, zero=3)),
    "dp_tp_replicated": (4, mesh(dp=2, tp=2)),
    "pp_tp": (4, mesh(pp=2, tp=2)),
    "pp_tp_rich": (4, mesh(pp=2, tp=2)),
    "pp_dp": (4, mesh(pp=2, dp=2, zero=1)),
    "pp_of_four": (4, mesh(pp=4)),
    "cp_dp": (4, mesh(cp=2, dp=2, zero=3)),
    "cp_tp": (4, mesh(cp=2, tp=2, context="ulysses")),
    "cp_dp_replicated": (4, mesh(cp=2, dp=2)),
    "cp_dp_reshard": (4, mesh(cp=2, dp=2, zero=3, reshard_to=2)),
    "pp_dp_replicated": (4, mesh(pp=2, dp=2)),
    "pp_cp": (4, mesh(pp=2, cp=2)),
    "pp_cp_ulysses": (4, mesh(pp=2, cp=2, zero=1, context="ulysses")),
    "zero1_tp": (4, [*mesh(dp=2, tp=2, zero=1), *TWICE]),
    "zero2_tp": (4, [*mesh(dp=2, tp=2, zero=2), *TWICE]),
    "gpipe_dp": (4, mesh(pp=2, dp=2, zero=1, schedule="gpipe")),
    "interleaved_dp": (4, mesh(pp=2, dp=2, zero=1, schedule="interleaved")),
    "zero_bubble_tp": (4, mesh(pp=2, tp=2, schedule="zero_bubble")),
    "dp_tp_pp": (8, mesh(dp=2, tp=2, pp=2, zero=1)),
    "cp_dp_tp": (8, mesh(cp=2, dp=2, tp=2, zero=3)),
    "pp_cp_tp": (8, mesh(pp=2, cp=2, tp=2)),
    "hybrid_tp": (8, mesh(dp=4, tp=2, zero=3, replicate=2)),
    "hybrid_pp": (8, mesh(dp=4, pp=2, zero=1, replicate=2, micro_batches=2)),
}  # fmt: skip
# Whose blocks are gathered in bf16.
GATHERED_NARROW = ("zero1_bf16", "zero3_bf16", "hybrid_bf16", "dp_tp_bf16", "pp_dp_bf16", "cp_dp_bf16")
PACKED = ("documents", "padded")  # of the stream's documents of 20 tokens: rows with unlike numbers of targets
EXACT = [
    case
    for case in CASES
    if not case.startswith("one") and not case.endswith(("bf16", "chunked", "muon", "8bit", *PACKED))
]


def sizes(case: str) -> dict[str, int]:
    return {**SIZES, "layers": 4 if case in DEEP else 2, **(RICH if case.endswith("rich") else {})}


def reference_of(case: str) -> str:
    """The one process that a case is held to."""
    return "one_deep" if case in DEEP else "one_rich" if case.endswith("rich") else "one"


def recipe_of(case: str) -> Recipe:
    return compose(["workload.batch=8", "workload.seq=16", *CASES[case][1]])


def trained(case: str, recipe: Recipe, directory: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """Train a case; what this rank saw. Gradients are those that the first optimizer step took, after clipping."""
    count, made = CASES[case][0], tiny.pipeline_of(recipe, directory)
    made.rank, made.ranks = rank, count
    torch.manual_seed(0)  # of the biases
    model = tiny.model(sharpness=3.0, **sizes(case)).train()
    run = train.prepared_run(made, model)
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0, end_token=19)
    out: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def first_gradients(*_):
        """The whole model's gradients, gathered by the part that gathers its weights."""
        if "losses" not in out:
            weights = [p.detach().clone() for p in trainer.parameters]
            for p in trainer.parameters:
                p.copy_(p.grad)
            out.update({f"gradient.{name}": t.clone() for name, t in run.part("state_dict")().items()})
            for p, weight in zip(trainer.parameters, weights, strict=True):
                p.copy_(weight)
            out["losses"] = torch.zeros(0)

    trainer.optimizer.register_step_pre_hook(first_gradients)
    losses = []
    for step in range(STEPS):
        if step == COUNTED and count > 1:
            out |= {name: torch.tensor(m.value) for name, m in counted_step(trainer).items()}
        else:
            trainer.step()
        losses.append(torch.tensor(trainer.mean_loss()))
    out["losses"] = torch.stack(losses)
    if case == "tensor":  # a compiled block takes no tensor whose collective is in flight
        assert type(model.embed(tiny.tokens(2, 16))) is torch.Tensor
    with torch.no_grad(), run.part("autocast")():
        out["logits"] = run.part("forward")(tiny.tokens(2, 16))
    return out | {f"state.{name}": tensor.clone() for name, tensor in run.part("state_dict")().items()}


def main(directory: Path) -> None:
    """Everything that is done once is done before a fork: imports, recipes, and one process's own training."""
    recipes = {case: recipe_of(case) for case in CASES}
    torch.set_num_threads(1)
    for count in sorted({count for count, _ in CASES.values()}):
        cases = [case for case in CASES if CASES[case][0] == count]

        def work(rank: int, cases: list[str] = cases) -> None:
            for case in cases:
                torch.save(trained(case, recipes[case], directory, rank), directory / f"{case}-{rank}.pt")

        if count == 1:
            work(0)
        else:
            ranks.fork(count, work, directory, limit_s=200)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[case] is what each rank saw; every process is dead when this returns, whatever happened."""
    directory = tmp_path_factory.mktemp("ranks")
    ranks.run_program(__file__, directory, limit_s=300)
    return {
        case: [torch.load(directory / f"{case}-{rank}.pt", weights_only=True) for rank in range(count)]
        for case, (count, _) in CASES.items()
    }


@pytest.mark.parametrize("case", EXACT)
def test_ranks_train_like_one_process(case, results):
    expected = results[reference_of(case)][0]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=1e-5, rtol=0)
    gradients = sorted(name for name in expected if name.startswith("gradient."))
    first = results[case][0]
    assert len(gradients) == (14 if case.endswith("rich") else 9) * sizes(case)["layers"] + 3
    assert sorted(name for name in first if name.startswith("gradient.")) == gradients
    for name in gradients:
        torch.testing.assert_close(first[name], expected[name], atol=1e-5, rtol=1e-4)
    assert max(expected[name].abs().max() for name in gradients) > 0.05


@pytest.mark.parametrize("case", EXACT)
def test_the_gathered_weights_and_every_ranks_evaluation_are_those_of_one_process(case, results):
    expected, first = results[reference_of(case)][0], results[case][0]
    states = sorted(name for name in expected if name.startswith("state."))
    assert sorted(name for name in first if name.startswith("state.")) == states
    for name in states:
        torch.testing.assert_close(first[name], expected[name], atol=2e-4, rtol=1e-3)  # Adam divides by tiny numbers
    for seen in results[case]:
        torch.testing.assert_close(seen["logits"], expected["logits"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", [*GATHERED_NARROW, "1f1b_bf16", "tensor_bf16"])
def test_layouts_with_bf16_and_checkpointing_train_like_bf16(case, results):
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], results["one_bf16"][0]["losses"], atol=0.03, rtol=0)
    assert results[case][0]["state.blocks.0.mlp.up_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("case", ["zero3_master_bf16", "zero3_stochastic_bf16", "ddp_stochastic_bf16"])
def test_ranks_with_bf16_weights_train_like_one_process(case, results):
    """Stochastic rounding draws for whole weights in one process and for parts under ZeRO-3: close, not equal."""
    expected = results["one_" + case.split("_", 1)[1]][0]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=0.03, rtol=0)
    assert results[case][0]["state.blocks.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(results[case][0]["logits"], results[case][1]["logits"])  # no rank drifts away


@pytest.mark.parametrize("case", ["zero3_muon", "zero3_adamw8bit", "zero3_adamw8bit_bf16"])
def test_other_optimizers_step_on_sharded_parameters(case, results):
    """Muon gathers its matrices and is equal; blocks of 8-bit moments are a rank's own, so those differ a little."""
    expected = results["one_" + case.split("_", 1)[1]][0]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=1e-4 if "muon" in case else 0.03, rtol=0)


@pytest.mark.parametrize("case", ["zero3_chunked", "ddp_chunked", "ring_chunked"])
def test_ranks_with_the_head_in_chunks_train_like_one_process(case, results):
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], results["one"][0]["losses"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(PACKED) and not case.startswith("one")])
def test_rows_with_unlike_numbers_of_targets_train_like_one_process(case, results):
    expected = results["one_" + case.split("_")[1]][0]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    gradients = [name for name in expected if name.startswith("gradient.")]
    for seen in results[case]:
        torch.testing.assert_close(seen["losses"], expected["losses"], atol=1e-5, rtol=0)
    for name in gradients:
        torch.testing.assert_close(results[case][0][name], expected[name], atol=1e-5, rtol=1e-4)


def layout_of(case: str):
    made = recipe_of(case)
    (layout,) = made.techniques["parallelism"]
    shape = shape_from(tiny.config(**sizes(case)), WORKLOAD)
    splits = max(t.splits for chosen in made.techniques.values() for t in chosen)
    return layout, type(shape)(**{**vars(shape), "micro_batches": splits})


@pytest.mark.parametrize("case", [*EXACT, *GATHERED_NARROW])
def test_a_step_sends_what_the_formula_says(case, results):
    layout, shape = layout_of(case)
    said = combined(t.footprint(shape, None) for axis in ("parallelism", "checkpointing", "precision") for t in
                    recipe_of(case).techniques[axis])  # fmt: skip
    expected = time.wire_bytes(said)
    counted = float(results[case][0]["wire_bytes"])
    # Beside the formula: norms of gradients, the loss, sums of gradients of norm weights.
    assert counted == pytest.approx(expected, rel=0.02, abs=4 * 2 * shape.hidden * 9), (counted, expected)


def kept(layout, shape, rank):
    """(parameters, gradients, Adam's moments) in bytes that theory gives a rank between two steps."""
    pp_rank = rank // (layout.dp * layout.cp * layout.tp)
    here = 4 * _cost.part_of(layout, shape, pp_rank).weights / layout.tp / layout.shards
    return here, here, 2 * here


@pytest.mark.parametrize("case", EXACT)
def test_a_rank_keeps_its_share_of_the_state(case, results):
    layout, shape = layout_of(case)
    for rank, seen in enumerate(results[case]):
        measured = [float(seen[f"{name}_bytes"]) for name in ("parameter", "gradient", "optimizer")]
        assert measured == pytest.approx(kept(layout, shape, rank), rel=0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
