"""The head and the loss in one: the same loss and gradients as all logits at once, in the memory of a chunk."""

import pytest
import tiny
import torch
from test_training_techniques import STREAM, WORKLOAD, device, loss_and_gradients, prepared, steps

from dyno.errors import Unsupported
from dyno.kernels import linear_cross_entropy as op
from dyno.stages import train
from dyno.techniques.loss.head import Chunked, Fused

SHAPES = [(5, 24, 61), (64, 32, 257), (123, 40, 1031)]


def made(shape, dtype=torch.float32, place="cpu"):
    return op.inputs(op.LossShape(*shape), place, dtype, 0)


def trained(loss, arguments):
    """The loss and both gradients, with a factor in front as accumulation and loss scaling have."""
    hidden, weight = (arguments[name].clone().requires_grad_() for name in ("hidden", "weight"))
    value = loss(hidden, weight, arguments["targets"])
    (value * 8).backward()
    return value.detach(), hidden.grad, weight.grad


def agree(loss, shape, dtype=torch.float32, place="cpu", weights=None):
    """Against full logits in fp64, tolerances by the type of the products."""
    arguments = made(shape, dtype, place)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    if weights is not None:
        arguments["weight"] = arguments["weight"].to(weights)
    rtol = 1e-5 if dtype == torch.float32 else 0.02
    for got, expected in zip(trained(loss, arguments), trained(double_loss, wide), strict=True):
        assert float((got.double() - expected).norm() / expected.norm()) < rtol
    assert trained(loss, arguments)[2].dtype == arguments["weight"].dtype


def double_loss(hidden, weight, targets):
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)


@pytest.mark.parametrize("rows", [1, 7, 64, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_change_nothing(shape, rows):
    agree(lambda h, w, t: op.chunked_loss(h, w, t, rows), shape)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_chunks_in_bf16(weights):
    agree(lambda h, w, t: op.chunked_loss(h, w, t, 32), SHAPES[1], torch.bfloat16, weights=weights)


def test_the_specification_is_cross_entropy_and_no_target_at_all_is_zero():
    agree(op.full_loss, SHAPES[0])
    arguments = made(SHAPES[0])
    arguments["targets"].fill_(op.IGNORE)
    for loss in (op.full_loss, lambda h, w, t: op.chunked_loss(h, w, t, 2)):
        value, *gradients = trained(loss, arguments)
        assert value == 0 and not any(g.any() for g in gradients)


def test_large_logits_do_not_overflow():
    arguments = made(SHAPES[0])
    arguments["hidden"] *= 1e4
    for a, b in zip(trained(op.chunked_loss, arguments), trained(op.full_loss, arguments), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [5, 2048])
def test_a_model_trains_the_same(tied, rows, tmp_path):
    made_model = lambda: tiny.model(sharpness=3.0, tied_embeddings=tied)  # noqa: E731
    loss, gradients, _ = loss_and_gradients(prepared(tmp_path, model=made_model()))
    run = prepared(tmp_path, "loss=chunked", f"loss.rows={rows}", model=made_model())
    got_loss, got, _ = loss_and_gradients(run)
    assert got_loss == pytest.approx(loss, abs=1e-6)
    for a, b in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert run.part("forward")(tiny.tokens(1, 4)).shape == (1, 4, 61)  # evaluation has its logits


@pytest.mark.parametrize("others", [
    ["accumulation=gradients", "accumulation.micro_batches=4", "workload.batch=8"], ["precision=bf16"],
    ["precision=fp16", "precision.initial_scale=1024"], ["precision=bf16_master"], ["checkpointing=uniform"],
], ids=lambda o: o[0])  # fmt: skip
def test_with_other_techniques_the_losses_are_those_of_full_logits(others, tmp_path):
    expected, wanted, _ = steps(prepared(tmp_path, *others), 3)
    losses, gradients, _ = steps(prepared(tmp_path, "loss=chunked", "loss.rows=10", *others), 3)
    assert losses == pytest.approx(expected, rel=1e-5 if "16" not in others[0] else 0.01)
    whole, whole_wanted = torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in wanted])
    assert torch.nn.functional.cosine_similarity(whole.float(), whole_wanted.float(), 0) > 0.999


@pytest.mark.parametrize("loss", [op.chunked_loss, op.fused_loss])
def test_one_graph(loss, tmp_path, monkeypatch):
    """Traced without a break; the fused operation is opaque to the compiler and runs only where Triton does."""
    run = prepared(tmp_path, model=tiny.model(layers=1))
    Chunked(rows=6).take_over(run, loss)
    text = tiny.tokens(2, 9)
    arguments = run.part("forward"), text[:, :-1], text[:, 1:]
    if loss is op.fused_loss:
        monkeypatch.setattr("dyno.kernels._cross_entropy.losses_and_slopes", plain_slopes)
    eager = run.part("loss")(*arguments)
    compiled = torch.compile(run.part("loss"), backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, eager)
    assert len(torch.autograd.grad(compiled, list(run.model.parameters()))) > 5


def plain_slopes(logits, targets):
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    slopes = logits.float().softmax(-1) - torch.nn.functional.one_hot(targets.clamp(min=0), logits.shape[-1])
    logits.copy_(torch.where((targets == op.IGNORE).unsqueeze(-1), 0.0, slopes))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [7, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_order_of_work(shape, rows, dtype, monkeypatch):
    """With the kernel's part in plain PyTorch: chunks, both products, and the scale that comes last."""
    monkeypatch.setattr("dyno.kernels._cross_entropy.losses_and_slopes", plain_slopes)
    agree(lambda h, w, t: op.fused_loss(h, w, t, rows), shape, dtype, weights=dtype)


def test_a_split_head_is_refused():
    class Split(torch.nn.Parameter):
        placements = ("Shard(0)",)

    with pytest.raises(Unsupported, match="split over ranks"):
        op.chunked_loss(torch.zeros(2, 4), Split(torch.zeros(8, 4)), torch.zeros(2, dtype=torch.long))


def test_the_technique_says_where_it_does_not_run_and_what_it_saves(tmp_path):
    from dyno.plan import memory
    from dyno.technique import Footprint, Shape, combined

    recipe = tiny.pipeline(tmp_path).recipe
    assert "1 or more" in Chunked(0).unsupported(recipe, device("cpu"))
    assert Chunked().unsupported(recipe, device("cpu")) is None
    assert "Triton" in Fused().unsupported(recipe, device("cpu"))
    assert Fused().unsupported(recipe, device("cuda", (9, 0))) is None
    shape = Shape(10**6, 10**6, 10, 64, 192, 4, 2, 16, 257, 8, 2048)

    def logits(*shares: Footprint) -> float:
        return memory.training(shape, combined(shares), "cuda")["loss"]["logits"]

    rows, head, states = 4.0 * 2048 * 257, 4.0 * 257 * 64, 4.0 * 8 * 2048 * 64  # bytes in fp32
    chunked, fused = Chunked(2048).footprint(shape, None), Fused(2048).footprint(shape, None)
    assert logits() == 3 * 8 * rows and logits(chunked) == 3 * rows + head + states
    # A chunk's logits lie there until the next one's are made; later both gradients beside what they are scaled to.
    assert logits(fused) == max(2 * rows + head + states, 2 * (head + states))
    # As many rows on every rank, however few of the tokens it has; one chunk finds nothing of one before.
    half, tokens = Footprint(batch_factor=0.5), Footprint(batch_factor=1 / 16)
    assert logits(chunked, half) == 3 * rows + head + states / 2
    assert logits(chunked, tokens) == rows + head + states / 16
    bf16 = Footprint(activation_width=2.0)
    assert logits(chunked, bf16) == 2.5 * rows + 1.5 * head + states / 2  # the slopes are narrow, and the head is cast
    assert logits(Chunked(0).footprint(shape, None)) == max(3 * head, 2 * head + states) + states


def test_losses_are_told_and_checked_as_ever(tmp_path):
    trainer = train.Trainer(prepared(tmp_path, "loss=chunked"), STREAM, WORKLOAD, seed=0)
    trainer.step()
    assert trainer.mean_loss() == pytest.approx(trainer.finite_loss())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weights"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                                (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [*SHAPES, (300, 64, 20011)], ids=str)
def test_on_gpu(shape, dtype, weights):
    for rows in (64, 2048):
        agree(lambda h, w, t, rows=rows: op.fused_loss(h, w, t, rows), shape, dtype, "cuda", weights)
