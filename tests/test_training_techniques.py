"""Training techniques: the same losses and gradients as the plain step, with less of what they promise to save."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from dyno.model.decoder import project_each
from dyno.recipe import make
from dyno.stages import train
from dyno.technique import Shape
from dyno.techniques.accumulation.gradients import GradientAccumulation
from dyno.techniques.checkpointing.blocks import Sqrt, Uniform
from dyno.techniques.compile import torch_compile
from dyno.techniques.compile.torch_compile import TorchCompile
from dyno.techniques.precision import formats

DEEP = {"layers": 5, "tied_embeddings": False}
WORKLOAD = {"batch": 8, "seq": 12, "lr": 1e-2}
STREAM = np.tile(np.arange(20), 20)


def prepared(tmp_path, *overrides, model=None):
    model = tiny.model(sharpness=3.0, **DEEP) if model is None else model
    model.train()
    return train.prepared_run(tiny.pipeline(tmp_path, *overrides), model)


def loss_and_gradients(run):
    """One forward and backward of the run's parts; also the bytes of activations that autograd kept."""
    weights = {p.data_ptr() for p in run.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    text = tiny.tokens(4, 13)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.part("loss")(run.part("forward"), text[:, :-1], text[:, 1:])
    loss.backward()
    return loss.item(), [p.grad.clone() for p in run.model.parameters()], sum(kept.values())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return loss_and_gradients(prepared(tmp_path_factory.mktemp("plain")))


# Checkpointing


@pytest.mark.parametrize(
    "option", [*(["checkpointing=uniform", f"checkpointing.every={n}"] for n in (1, 2, 3, 9)), ["checkpointing=sqrt"]]
)
def test_checkpointing_keeps_less_and_changes_nothing(option, plain, tmp_path):
    loss, gradients, kept = loss_and_gradients(prepared(tmp_path, *option))
    assert loss == pytest.approx(plain[0], abs=1e-6)
    for got, expected in zip(gradients, plain[1], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert kept < 0.5 * plain[2]
    assert max(g.abs().max() for g in gradients) > 1e-3


@pytest.mark.parametrize(("every", "layers", "forwards"), [(1, 5, 5), (2, 5, 5), (9, 5, 5), (0, 9, 9)])
def test_every_block_runs_once_forward_and_once_again(every, layers, forwards, tmp_path):
    option = ["checkpointing=uniform", f"checkpointing.every={every}"] if every else ["checkpointing=sqrt"]
    run = prepared(tmp_path, *option, model=tiny.model(layers=layers))
    order: list[int] = []
    for i, block in enumerate(run.model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: order.append(i))
    loss = run.part("forward")(tiny.tokens(2, 5)).sum()
    assert order == list(range(forwards))
    loss.backward()
    assert sorted(order) == sorted(2 * list(range(forwards)))
    length = {0: 3, 9: 5}.get(every, every)
    assert run.details["checkpointing_schedule"].split("] [")[0] == "[" + " ".join(map(str, range(length))) + "]" * (
        length == layers
    )


def test_checkpointing_leaves_evaluation_alone(tmp_path):
    run, text = prepared(tmp_path, "checkpointing=uniform", "checkpointing.every=2"), tiny.tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(
            run.part("forward")(text), tiny.model(sharpness=3.0, **DEEP)(text), atol=1e-6, rtol=0
        )


def shape(layers):
    return Shape(10**6, 10**6, layers, 64, 192, 4, 2, 16, 257, 8, 128)


def test_the_predicted_share_of_activations_is_below_one_and_smallest_in_the_middle():
    def share(technique):
        predicted = technique.footprint(shape(16), None)
        return predicted.activation_factor + predicted.recompute_blocks / 16

    shares = {n: share(Uniform(n)) for n in (1, 4, 16)}
    assert shares[4] < shares[16] and all(value > 0 for value in shares.values())
    assert share(Sqrt()) == shares[4]
    assert math.isfinite(Uniform(0).footprint(shape(16), None).activation_factor)  # refused, but predicted first
    assert math.isfinite(GradientAccumulation(0).footprint(shape(16), None).batch_factor)


# Accumulation


def steps(run, count, workload=WORKLOAD):
    """Train `count` steps; the losses and the gradients that the first step's optimizer saw."""
    trainer = train.Trainer(run, STREAM, workload, seed=0)
    seen: list[list[torch.Tensor]] = []
    step = trainer.optimizer.step

    def record(*args, **kwargs):
        seen.append([p.grad.clone() for p in trainer.parameters])
        return step(*args, **kwargs)

    trainer.optimizer.step = record
    losses = []
    for _ in range(count):
        trainer.step()
        losses.append(trainer.finite_loss())
    return losses, seen[0], trainer


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro, tmp_path):
    expected_losses, expected, _ = steps(prepared(tmp_path), 4)
    run = prepared(tmp_path, "accumulation=gradients", f"accumulation.micro_batches={micro}", "workload.batch=8")
    rows: list[int] = []
    forward = run.part("forward")
    run.parts["forward"] = lambda tokens: rows.append(len(tokens)) or forward(tokens)
    losses, gradients, _ = steps(run, 4)
    assert rows == [8 // micro] * micro * 4
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("batch", "micro", "ranks", "fits"), [(8, 3, 1, False), (8, 0, 1, False), (8, 4, 1, True),
                                                              (8, 8, 2, False), (8, 4, 2, True)])  # fmt: skip
def test_a_batch_that_cannot_be_split_is_told_before_any_work(batch, micro, ranks, fits, tmp_path):
    layout = ["parallelism=ddp", f"parallelism.dp={ranks}"] if ranks > 1 else []
    recipe = tiny.pipeline(tmp_path, f"workload.batch={batch}", *layout).recipe
    assert (GradientAccumulation(micro).unsupported(recipe, None) is None) == fits


# Precision


def test_bf16_computes_products_in_16_bits_and_keeps_fp32_weights(plain, tmp_path):
    run = prepared(tmp_path, "precision=bf16")
    with run.part("autocast")():
        logits = run.part("forward")(tiny.tokens(4, 12))
    assert logits.dtype == torch.bfloat16
    with run.part("autocast")():
        loss, gradients, _ = loss_and_gradients(run)
    assert loss == pytest.approx(plain[0], rel=0.02) and loss != plain[0]
    assert all(p.dtype == g.dtype == torch.float32 for p, g in zip(run.model.parameters(), gradients, strict=True))
    whole, wanted = torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in plain[1]])
    assert torch.nn.functional.cosine_similarity(whole, wanted, 0) > 0.99
    assert run.part("scaler") is None


def test_rounded_products_equal_autocast(monkeypatch, tmp_path):
    """Products of rounded values summed in fp32, as on a CPU without 16-bit instructions, against PyTorch's own."""
    monkeypatch.setattr(formats, "cpu_multiplies", lambda dtype: True)
    own = prepared(tmp_path, "precision=bf16")
    monkeypatch.setattr(formats, "cpu_multiplies", lambda dtype: False)
    rounded = prepared(tmp_path, "precision=bf16")
    assert "arithmetic" in rounded.details and "arithmetic" not in own.details
    layers = [run.model.blocks[0].mlp.up_proj for run in (own, rounded)]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (layer(x) for layer in layers)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, atol=1e-3, rtol=2**-7)  # one rounding of the result


@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_serving_casts_the_weights(option, dtype, tmp_path):
    from dyno.stages import infer

    model = tiny.model()
    run = infer.prepared_run(tiny.pipeline(tmp_path, f"precision={option}", "workload=generate"), model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.inverse_frequency.dtype == torch.float32
    cache = run.part("cache")(model, 1, 4)
    assert cache.k.dtype == dtype


def test_fp16_skips_steps_whose_gradients_overflow_and_lowers_the_scale(tmp_path):
    run = prepared(tmp_path, "precision=fp16", "precision.initial_scale=1e30")
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    before = [p.clone() for p in run.model.parameters()]
    trainer.step()
    assert trainer.skipped == 1 and run.part("scaler").get_scale() == pytest.approx(5e29)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_fp16_takes_the_steps_that_do_not_overflow(tmp_path):
    run = prepared(tmp_path, "precision=fp16", "precision.initial_scale=256")
    losses, gradients, trainer = steps(run, 4)
    _, expected, _ = steps(prepared(tmp_path), 1)
    assert trainer.skipped == 0 and losses[-1] < losses[0]
    whole, wanted = torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in expected])
    assert torch.nn.functional.cosine_similarity(whole, wanted, 0) > 0.99
    assert whole.norm() == pytest.approx(wanted.norm().item(), rel=0.02)  # unscaled before clipping


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_overflow_among_micro_batches_skips_the_step_once(bad, tmp_path):
    """The second of four backward passes overflows in the second of three steps: that step is lost, the others not."""
    run = prepared(tmp_path, "precision=fp16", "precision.initial_scale=256", "accumulation=gradients",
                   "accumulation.micro_batches=4", "workload.batch=8")  # fmt: skip
    passes = 0

    def overflow(grad):
        nonlocal passes
        passes += 1
        return torch.full_like(grad, bad) if passes == 4 + 2 else grad

    run.model.blocks[0].mlp.up_proj.weight.register_hook(overflow)
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    seen = []
    for _ in range(3):
        before = [p.detach().clone() for p in run.model.parameters()]
        trainer.step()
        kept = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        seen.append((trainer.skipped, kept, run.part("scaler").get_scale()))
    assert passes == 12
    assert seen == [(0, False, 256.0), (1, True, 128.0), (1, False, 128.0)]
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert trainer.finite_loss() > 0 and trainer.steps == 3


def device(kind, capability=None):
    return SimpleNamespace(kind=kind, capability=capability, name="a GPU", count=1)


def test_formats_say_where_they_do_not_run():
    tf32, bf16 = formats.TF32(), formats.Autocast()
    assert "CPU" in tf32.unsupported(None, device("cpu"))
    assert "8.0" in tf32.unsupported(None, device("cuda", (7, 5)))
    assert "8.0" in bf16.unsupported(None, device("cuda", (7, 5)))
    assert "bfloat16 or float16" in formats.Autocast(dtype="int8").unsupported(None, device("cpu"))
    assert bf16.unsupported(None, device("cpu")) is None and tf32.unsupported(None, device("cuda", (9, 0))) is None


# Compile


@pytest.mark.skipif(not __import__("shutil").which("g++"), reason="Inductor on a CPU needs g++")
def test_compiled_training_equals_eager(plain, tmp_path):
    """Counts too that a graph was really compiled, with no break in it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny.model(sharpness=3.0, layers=1)
    eager = loss_and_gradients(prepared(tmp_path, "attention=math", model=tiny.model(sharpness=3.0, layers=1)))
    run = prepared(tmp_path, "compile=on", "attention=math", model=model)
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        text = tiny.tokens(4, 13)
        loss = run.part("loss")(run.part("forward"), text[:, :-1], text[:, 1:])
        loss.backward()
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert loss.item() == pytest.approx(eager[0], abs=1e-5)
    for got, expected in zip(model.parameters(), eager[1], strict=True):
        torch.testing.assert_close(got.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "kv_heads": 1}, {"qk_norm": True}], ids=str)
def test_joined_projections_equal_separate_ones(changes):
    model, other = (tiny.model(sharpness=3.0, **changes) for _ in range(2))
    for block in other.blocks:
        block.attention.project = torch_compile.project_joined
    text = tiny.tokens(4, 13)
    for one in (model, other):
        F.cross_entropy(one(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
    for (name, got), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_projections_join_where_they_are_plain_and_asked_for(tmp_path):
    run = prepared(tmp_path, "compile=on", "compile.join_projections=true", "precision=bf16_master")
    projects = [(block.attention.project, block.mlp.project) for block in run.model.blocks]
    assert set(projects) == {(torch_compile.project_joined, project_each)}
    x, layers = torch.randn(3, 8), [torch.nn.Linear(8, n) for n in (8, 4, 4)]
    calls = []
    layers[1].forward = lambda x: calls.append(x) or x[:, :4]  # as a replaced layer computes by itself
    made = torch_compile.project_joined(x, *layers)
    assert [y.shape[-1] for y in made] == [8, 4, 4] and len(calls) == 1
    technique = TorchCompile(join_projections=True)
    assert "training" in technique.unsupported(tiny.pipeline(tmp_path, "workload=generate").recipe, device("cuda"))
    assert "fp8" in technique.unsupported(tiny.pipeline(tmp_path, "precision=fp8").recipe, device("cuda"))
    assert "tensor" in technique.unsupported(tiny.pipeline(tmp_path, "parallelism=tensor").recipe, device("cuda"))


def test_compile_says_what_it_cannot_do(tmp_path, monkeypatch):
    recipe = tiny.pipeline(tmp_path, "workload=generate", "kv_cache=none").recipe
    assert "recompile" in TorchCompile().unsupported(recipe, device("cuda"))
    plain = tiny.pipeline(tmp_path, "workload=generate").recipe
    assert TorchCompile().unsupported(plain, device("cuda")) is None
    assert "max-autotune" in TorchCompile(mode="fastest").unsupported(plain, device("cuda"))
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in TorchCompile().unsupported(plain, device("cpu"))


def test_a_knob_of_the_wrong_kind_is_refused():
    from dyno.errors import UserError

    with pytest.raises(UserError, match="micro_batches"):
        make({"_target_": "dyno.techniques.accumulation.gradients.GradientAccumulation", "micro_batches": "x"}, [])
