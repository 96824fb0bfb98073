"""Every way of checkpointing: the plain step's losses and gradients, what it keeps, what it computes twice."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
import torch

from dyno.errors import Unsupported
from dyno.measure.environment import Device
from dyno.plan import predict
from dyno.recipe import compose
from dyno.stages import activations, train
from dyno.technique import Shape
from dyno.techniques.checkpointing import optimal
from dyno.techniques.checkpointing._chain import Chain, Optimum, peak, recomputed, segments
from dyno.techniques.checkpointing.blocks import Fibonacci, boundary_share
from dyno.techniques.checkpointing.optimal import Optimal

CARD = Device("cuda", 0, "a card", 80 * 2**30, (9, 0), None, 2)
SIZES = {"layers": 6, "tied_embeddings": False}
STREAM = np.tile(np.arange(20), 20)
WORKLOAD = {"batch": 4, "seq": 24, "lr": 1e-2}
RECIPE = ["workload.batch=4", "workload.seq=24", "attention=math"]
OPTIONS = {
    "uniform": ["checkpointing=uniform"],
    "sqrt": ["checkpointing=sqrt"],
    "fibonacci": ["checkpointing=fibonacci"],
    "optimal_60": ["checkpointing=optimal", "checkpointing.budget=0.6"],
    "optimal_25": ["checkpointing=optimal", "checkpointing.budget=0.25"],
    "optimal_21": ["checkpointing=optimal", "checkpointing.budget=0.21"],
    "selective": ["checkpointing=selective"],
}


def prepared(tmp_path, *overrides, **changes):
    model = tiny.model(sharpness=3.0, **{**SIZES, **changes}).train()
    return train.prepared_run(tiny.pipeline(tmp_path, *RECIPE, *overrides), model)


def trained(run, workload=WORKLOAD):
    """A step's loss, its gradients, and the costs measured beside it."""
    trainer = train.Trainer(run, STREAM, workload, seed=0)
    costs = train.step_costs(run, trainer, seed=0)
    assert all(p.grad is None for p in trainer.parameters)
    seen: list[torch.Tensor] = []
    trainer.optimizer.step = lambda: seen.extend(p.grad.clone() for p in trainer.parameters)
    trainer.step()
    return trainer.finite_loss(), seen, {name: metric.value for name, metric in costs.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return {
        case: trained(prepared(tmp_path_factory.mktemp("plain"), *overrides))
        for case, overrides in {
            "fp32": [],
            "bf16": ["precision=bf16"],
            "accumulated": ["accumulation=gradients", "accumulation.micro_batches=2"],
        }.items()
    }


def forward_flops(case, blocks_only=True):
    """Products of one forward pass over the step's tokens, attention's uncausal ones included."""
    config, tokens = tiny.config(**SIZES), WORKLOAD["batch"] * WORKLOAD["seq"]
    _, linear = train.parameter_counts(config)
    linear -= config.vocab_size * config.hidden
    return tokens * (2 * linear + 4 * config.layers * config.heads * config.head_dim * WORKLOAD["seq"])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", ["fp32", "bf16", "accumulated"])
def test_an_option_changes_memory_and_work_but_not_the_step(option, case, plain, tmp_path):
    overrides = {"fp32": [], "bf16": ["precision=bf16"],
                 "accumulated": ["accumulation=gradients", "accumulation.micro_batches=2"]}[case]  # fmt: skip
    loss, gradients, costs = trained(prepared(tmp_path, *overrides, *OPTIONS[option]))
    expected_loss, expected, base = plain[case]
    assert loss == expected_loss
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    assert max(g.abs().max() for g in gradients) > 1e-3
    assert base["recomputed_flops"] == 0
    assert costs["activation_bytes"] < 0.85 * base["activation_bytes"]
    if option == "selective":
        assert costs["recomputed_flops"] == 0
    elif option in ("uniform", "sqrt", "fibonacci"):
        # The backward pass of a block's last product needs its input, not its output: recomputation stops before it.
        assert 0.6 * forward_flops(case) < costs["recomputed_flops"] <= forward_flops(case)


def test_a_larger_budget_keeps_more_and_recomputes_less(plain, tmp_path):
    costs = [trained(prepared(tmp_path, *OPTIONS[f"optimal_{n}"]))[2] for n in (21, 25, 60)]
    assert costs[0]["recomputed_flops"] > costs[1]["recomputed_flops"] > costs[2]["recomputed_flops"] > 0
    assert costs[0]["activation_bytes"] <= costs[1]["activation_bytes"] < costs[2]["activation_bytes"]


# The peak of an executed schedule


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all storages made under it that live, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.references, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.references or self.references[key][0].expired():
                    weak = torch.multiprocessing.reductions.StorageWeakRef(storage)
                    self.references[key] = (weak, storage.nbytes())
        self.references = {k: v for k, v in self.references.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.references.values()))
        return out


class Layer(torch.nn.Module):
    """Keeps 8 tensors of its input's size for its backward pass, the input among them."""

    def forward(self, x):
        for _ in range(8):
            x = torch.sin(x)
        return x


@pytest.mark.parametrize("budget", [1.0, 0.6, 0.35, 0.25, None])
def test_the_executed_peak_is_the_predicted_one(budget, tmp_path):
    """Twelve layers run by `follow`: peak of living storages, and layers run, against the schedule's own figures."""
    n, size = 12, 4096 * 4
    chain = Chain([size] * n, [7 * size] * n, [True] * n, [1.0] * n)
    optimum = Optimum(chain, chain.everything)
    schedule = optimum.schedule(optimum.least_budget if budget is None else int(budget * chain.everything))
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(Layer() for _ in range(n))
    runs = []
    for layer in model.blocks:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    run = tiny.infer_run(model)
    run.parts["call_block"] = train.call_plainly
    optimal.follow(run, schedule, by=Optimal())
    x = torch.rand(4096, requires_grad=True)
    with Live() as live:
        out = x * 1.0
        for layer in model.blocks:
            out = run.part("call_block")(layer, out)
        loss = out.sum()
        del out
        loss.backward()
    predicted = peak(chain, schedule)
    # Beside what is kept: the gradient of an activation, two at a product, and one activation in flight.
    assert predicted <= live.most <= predicted + 4 * size
    assert len(runs) == n + recomputed(chain, schedule)
    y = wanted = x.detach().clone().requires_grad_()
    for layer in model.blocks:
        y = layer(y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad, atol=0, rtol=0)


def test_blocks_are_measured_as_the_run_computes_them(tmp_path):
    """Predicted bytes of each block against those that six of them hold in a plain step."""
    run = prepared(tmp_path)
    chain = optimal.measured_chain(run)
    held = trained(run)[2]["activation_bytes"]
    one = trained(prepared(tmp_path, layers=5))[2]["activation_bytes"]
    assert held - one == pytest.approx(WORKLOAD["batch"] * chain.whole(0), rel=0.02)
    assert len(set(chain.inside)) == 1 and chain.boundary[0] == 24 * 32 * 4
    half = optimal.measured_chain(prepared(tmp_path, "precision=bf16"))
    assert half.boundary[0] == chain.boundary[0] / 2


def test_unequal_blocks_are_measured_one_by_one(tmp_path):
    run = prepared(tmp_path)
    block = run.model.blocks[2]
    for name, shape in (("gate_proj", (96, 32)), ("up_proj", (96, 32)), ("down_proj", (32, 96))):
        getattr(block.mlp, name).weight = torch.nn.Parameter(torch.randn(shape))
    chain = optimal.measured_chain(run)
    assert chain.inside[2] > chain.inside[1] == chain.inside[0]
    assert chain.cost[2] > chain.cost[1] == chain.cost[0]


# What each says of itself


@pytest.mark.parametrize(("layers", "lengths"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (7, [3, 2, 1, 1]),
                                                 (16, [4, 5, 3, 2, 1, 1])])  # fmt: skip
def test_fibonacci_segments_count_from_the_end(layers, lengths):
    assert Fibonacci().lengths(layers) == lengths


def shape(layers=16, vocab=256):
    return Shape(10**6, 10**6, layers, 64, 192, 4, 2, 16, vocab, 8, 128)


@pytest.mark.parametrize("option", OPTIONS)
def test_predictions_save_memory_and_cost_at_most_a_forward_pass(option, tmp_path):
    recipe = tiny.pipeline(tmp_path, *OPTIONS[option]).recipe
    footprint = recipe.techniques["checkpointing"][0].footprint(shape(), None)
    assert 0 <= footprint.activation_factor < 0.85
    assert footprint.activation_factor + footprint.boundaries > 0
    nested = option == "optimal_21"
    assert 1 <= footprint.flops_factor < (2.5 if nested else 4 / 3)


def test_on_equal_blocks_optimal_is_never_behind_sqrt_and_fibonacci():
    """The claim that a spacing is optimal, as arithmetic: at their own peak, the optimum recomputes less."""
    chain = optimal.predicted_chain(shape())
    for lengths in ([4] * 4, Fibonacci().lengths(16), [2] * 8):
        spaced = segments(lengths)
        schedule = Optimum(chain, chain.everything).schedule(peak(chain, spaced))
        assert recomputed(chain, schedule) < recomputed(chain, spaced) == 16
    assert boundary_share(shape()) < 1 / 17


def test_a_budget_that_cannot_be_met_is_told_with_the_least_that_can(tmp_path):
    recipe = tiny.pipeline(tmp_path, "checkpointing=optimal", "checkpointing.budget=0.01").recipe
    reason = predict(recipe, optimal_device()).reasons[0]
    assert "checkpointing.budget=0.01 is below 0." in reason
    for budget in (0.0, 1.5, -1.0):
        assert "above 0 and up to 1" in Optimal(budget).unsupported(recipe, optimal_device())
    with pytest.raises(Unsupported, match="measured"):
        prepared(tmp_path, "checkpointing=optimal", "checkpointing.budget=0.01")


def test_a_block_that_a_layout_holds_is_measured_by_one_of_its_sizes(tmp_path, monkeypatch):
    run = prepared(tmp_path, "checkpointing=optimal", "checkpointing.budget=0.5")
    block = run.model.blocks[0]
    plain, state = optimal.block_bytes(run, block, 32), torch.get_rng_state()
    monkeypatch.setattr("dyno.stages.shards.is_dtensor", lambda tensor: True)  # as if all of its weights were sharded
    assert optimal.free_copy(run, block).mlp.up_proj.weight.sum() == 0 != block.mlp.up_proj.weight.sum()
    assert optimal.block_bytes(run, block, 32) == plain
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_a_block_leaves_nothing_behind(tmp_path):
    run = prepared(tmp_path)
    own = {p.untyped_storage()._cdata for p in run.model.parameters()}
    with activations.Watch() as watch:
        optimal.block_bytes(run, run.model.blocks[0], 32)
    assert len(watch.made) > 50 and watch.alive().keys() <= own


def test_a_budget_in_gib_is_kept_by_the_run_and_shown_by_the_plan(plain, tmp_path):
    """Half of what `none` keeps, in GiB: the run stays below it, and says what it was predicted to hold."""
    rows = optimal.rows_at_once(prepared(tmp_path, "checkpointing=optimal"))
    everything = optimal.measured_chain(prepared(tmp_path, "checkpointing=optimal")).everything * rows
    budget = f"checkpointing.budget_gib={0.5 * everything / 2**30}"
    run = prepared(tmp_path, "checkpointing=optimal", budget)
    costs = trained(run)[2]
    assert run.details["checkpointing_predicted_bytes"] <= 0.5 * everything
    share = prepared(tmp_path, "checkpointing=optimal", "checkpointing.budget=0.5")
    assert share.details["checkpointing_schedule"] == run.details["checkpointing_schedule"]
    assert costs["activation_bytes"] < 0.7 * plain["fp32"][2]["activation_bytes"]
    split = prepared(tmp_path, "checkpointing=optimal", "accumulation=gradients", "accumulation.micro_batches=2")
    assert optimal.rows_at_once(split) == rows / 2
    plan = predict(compose(["model=1b", "precision=bf16", "checkpointing=optimal", "checkpointing.budget_gib=2"]), CARD)
    assert len(plan.decisions) == 1 and "keeps 9 of 16 blocks whole" in plan.decisions[0]
    assert plan.to_json()["decisions"] == plan.decisions
    recipe = compose(["model=1b", "checkpointing=optimal", "parallelism=mesh", "parallelism.tp=2"])
    assert "splits the model" in Optimal(budget_gib=1.0).unsupported(recipe, CARD)
    assert "exclude each other" in Optimal(0.5, 1.0).unsupported(recipe, CARD)
    assert "above 0" in Optimal(budget_gib=0.0).unsupported(recipe, CARD)
    tight = compose(["model=1b", "checkpointing=optimal", "checkpointing.budget_gib=0.01"])
    assert "is below" in predict(tight, CARD).reasons[0] and "GiB" in predict(tight, CARD).reasons[0]


def optimal_device():
    return Device("cpu", 0, "a CPU", 2**36, None, None, 1)


def test_whole_model_compilation_takes_flat_schedules_and_the_budget_takes_compilation(tmp_path):
    def reason(*overrides):
        return predict(tiny.pipeline(tmp_path, *overrides).recipe, optimal_device()).reasons

    tight = ["model.layers=12", "checkpointing=optimal", "checkpointing.budget=0.11"]
    assert not reason(*tight)
    assert "without nesting" in reason(*tight, "compile=on")[0]
    assert not reason(*tight, "compile=on", "compile.per_block=true")
    assert "compile=on" in reason("checkpointing=budget")[0]
    assert not reason("checkpointing=budget", "compile=on")
    assert "takes 0 to 1" in reason("checkpointing=budget", "compile=on", "checkpointing.budget=2")[0]


# What the counter sees


def test_costs_leave_training_as_it_was(tmp_path):
    losses = []
    for measured in (False, True):
        run = prepared(tmp_path)
        trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
        for _ in range(3):
            if measured:
                train.step_costs(run, trainer, seed=0)
            trainer.step()
        losses.append(trainer.finite_loss())
    assert losses[0] == losses[1]


def test_a_layout_with_its_own_step_and_kernels_that_are_not_counted_say_so(tmp_path):
    run = prepared(tmp_path, "checkpointing=uniform")
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    run.parts["gradients"] = lambda tokens, targets: torch.zeros(())
    costs = train.step_costs(run, trainer, seed=0)
    assert all(metric.value is None and "own forward" in metric.reason for metric in costs.values())
    run = prepared(tmp_path, "checkpointing=uniform")
    blind = activations.recomputed(run, activations.Counter(), activations.Counter(products=10), 300.0, 100.0)
    assert "predicted" in blind.source and "10%" in blind.source and blind.value is not None


COMPILED = {
    "selective": ["checkpointing=selective"],
    "selective_blocks": ["checkpointing=selective", "compile.per_block=true"],
    "selective_blocks_offloaded": ["checkpointing=selective", "compile.per_block=true", "offload=activations",
                                   "offload.min_kib=0"],
    "budget": ["checkpointing=budget", "checkpointing.budget=0.0"],
}  # fmt: skip


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor on a CPU needs g++")
@pytest.mark.parametrize("option", COMPILED)
def test_compiled_steps_equal_the_plain_one(option, tmp_path):
    torch._dynamo.reset()
    sizes = {"layers": {"selective": 1, "budget": 2}.get(option, 10), "ffn_width": 64}
    expected_loss, expected, base = trained(prepared(tmp_path, **sizes))
    torch._dynamo.utils.counters.clear()
    try:
        loss, gradients, costs = trained(prepared(tmp_path, "compile=on", *COMPILED[option], **sizes))
    finally:
        torch._functorch.config.activation_memory_budget = 1.0
        torch._dynamo.reset()
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    if "blocks" in option:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one for all blocks, and nothing falls back
    if "offloaded" not in option:  # here the host is the device
        assert costs["activation_bytes"] < base["activation_bytes"]
    if "selective" not in option:
        assert costs["recomputed_flops"] > 0
    elif "blocks" in option:
        assert costs["recomputed_flops"] == 0


def test_attention_with_grouped_heads_is_counted_by_its_query_heads():
    q, k = torch.empty(2, 6, 5, 8, device="meta"), torch.empty(2, 3, 7, 8, device="meta")
    assert activations.attention_flops(q, k, 2) == 2 * 2 * (2 * 6) * 5 * 7 * 8
