"""Weights in bf16: masters that keep small updates, stochastic rounding whose mean is exact, any optimizer inside."""

import contextlib
import math

import pytest
import tiny
import torch
from test_training_techniques import STREAM, WORKLOAD, prepared, steps

from dyno.plan.trace import Allocations
from dyno.stages import train
from dyno.techniques.precision import _wide_optimizer
from dyno.techniques.precision._wide_optimizer import StochasticRounding, WideOptimizer

BF16 = torch.bfloat16


def test_bf16_values_are_not_rounded():
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)  # every bit pattern
    finite = values[values.isfinite()]
    for seed in range(3):
        rounded = StochasticRounding(seed)(finite.float())
        assert torch.equal(rounded.view(torch.int16), finite.view(torch.int16))


def test_the_mean_of_many_draws_is_the_value():
    values = torch.tensor([1.0 + 2**-9, 1.0 + 2**-8 + 2**-11, -3.3, 1e-3, 7e-39, -1e30])
    draw, count = StochasticRounding(0), 20000
    rounded = draw(values.repeat(count, 1)).double()
    low, high = rounded.amin(0), rounded.amax(0)
    step = high - low
    assert bool((step > 0).all()) and bool((low <= values).all()) and bool((values <= high).all())
    assert all(len(column.unique()) == 2 for column in rounded.t())  # the two neighbours, nothing else
    share = (rounded == high).double().mean(0)
    expected = (values.double() - low) / step
    assert bool(((share - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all())


def test_draws_are_seeded_and_what_is_not_finite_stays():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    same = [StochasticRounding(seed)(x) for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    one = StochasticRounding(1)
    assert not torch.equal(one(x), one(x))
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    odd = torch.cat([odd, torch.tensor([-1], dtype=torch.int32).view(torch.float32)])  # a NaN of all ones
    torch.testing.assert_close(one(odd).float(), odd, equal_nan=True)


@contextlib.contextmanager
def allocations(held):
    """What is allocated beside tensors that are there already."""
    with Allocations() as seen:
        for tensor in held:
            seen.see(tensor, "held")
        yield seen


def test_values_are_rounded_in_pieces_and_take_little_beside_their_result(monkeypatch):
    monkeypatch.setattr(_wide_optimizer, "PIECE", 1000)
    x = torch.randn(300, 333)
    with allocations([x]) as seen:
        rounded = StochasticRounding(0)(x)
    assert seen.peak - 4 * x.numel() < 1.1 * 2 * x.numel() + 20 * 1000
    low, high = torch.nextafter(rounded, torch.tensor(-math.inf)), torch.nextafter(rounded, torch.tensor(math.inf))
    assert bool((low.float() < x).all()) and bool((x < high.float()).all())


@pytest.mark.parametrize(("rounding", "wide"), [(None, 4), (StochasticRounding(0), 8)])
def test_a_step_makes_the_wide_copies_that_are_planned(rounding, wide, monkeypatch):
    """Of one chunk at a time: its gradients in fp32, and where no masters stay its weights."""
    monkeypatch.setattr(_wide_optimizer, "CHUNK", 2**16)
    monkeypatch.setattr(_wide_optimizer, "PIECE", 2**10)
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 128), *(torch.nn.Linear(128, 128) for _ in range(10))).to(BF16)
    optimizer = WideOptimizer(model, 1e-3, lambda m, lr: torch.optim.AdamW(m.parameters(), lr, fused=True), rounding)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    for _, w in (pair for chunk in optimizer.chunks for pair in chunk):
        w.untyped_storage().resize_(4 * w.numel())  # where no masters stay the step resizes it, which nothing sees
        held.append(w)
    with allocations([*held, *(v for state in optimizer.state.values() for v in state.values())]) as seen:
        before = seen.now
        optimizer.step()
    together = max(p.numel() for p in model.parameters())
    unseen = 0 if rounding is None else 4
    assert together > 2**16 and (seen.peak - before) / together + unseen == pytest.approx(wide, rel=0.1)


def sgd(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr)


def one_weight(value, rounding):
    layer = torch.nn.Linear(1, 1, bias=False).to(BF16)
    layer.weight.data.fill_(value)
    return layer, WideOptimizer(layer, 1.0, sgd, rounding)


def test_updates_too_small_for_bf16_add_up():
    """A thousand steps of 1e-4 from 1.0, where bf16 has steps of 2^-7: 1.1 from masters, about 1.1 stochastically."""
    found = []
    for rounding in (None, StochasticRounding(0)):
        layer, optimizer = one_weight(1.0, rounding)
        for _ in range(1000):
            layer.weight.grad = torch.full_like(layer.weight, -1e-4)
            optimizer.step()
        found.append(layer.weight.item())
    assert found[0] == pytest.approx(1.1, abs=2**-8)
    assert found[1] == pytest.approx(1.1, abs=0.08) and found[1] > 1.0


def test_a_changed_rate_reaches_the_inner_optimizer():
    layer, optimizer = one_weight(1.0, None)
    optimizer.param_groups[0]["lr"] = 0.25
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert layer.weight.item() == 0.75


@pytest.mark.parametrize("chunk", [1, 3000, 2**26])
def test_masters_step_like_an_fp32_model(chunk, monkeypatch):
    """The same gradients into an fp32 model and through masters: the same fp32 weights, rounded, at any chunk."""
    monkeypatch.setattr(_wide_optimizer, "CHUNK", chunk)
    wide, narrow = tiny.model(), tiny.model()
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.to(BF16))
    train.cast(narrow, BF16)
    optimizers = [train.plain_optimizer(wide, 1e-2), WideOptimizer(narrow, 1e-2, train.plain_optimizer)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            grad = torch.randn(a.shape, generator=generator).to(BF16)
            a.grad, b.grad = grad.float(), grad
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert b.dtype == BF16 and b.grad is None
        torch.testing.assert_close(b, a.to(BF16), atol=0, rtol=2**-7)
    masters = [w for group in optimizers[1].inner.param_groups for w in group["params"]]
    for a, w in zip(wide.parameters(), masters, strict=True):
        torch.testing.assert_close(w, a, atol=1e-7, rtol=1e-6)
    assert narrow.lm_head.weight is narrow.embed.weight  # tied before, tied after


@pytest.mark.parametrize("option", ["bf16_master", "bf16_stochastic"])
@pytest.mark.parametrize("optimizer", ["adamw"])
def test_training_in_bf16_weights_follows_fp32(option, optimizer, tmp_path):
    run = prepared(tmp_path, f"precision={option}", f"optimizer={optimizer}")
    losses, gradients, trainer = steps(run, 8)
    expected, _, _ = steps(prepared(tmp_path, f"optimizer={optimizer}"), 8)
    assert {p.dtype for p in run.model.parameters()} == {g.dtype for g in gradients} == {BF16}
    assert run.model(tiny.tokens(1, 4)).dtype == BF16
    assert losses == pytest.approx(expected, rel=0.05) and losses[-1] < losses[0]
    assert trainer.parameters[0] is next(run.model.parameters())
    kept = [w for group in trainer.optimizer.inner.param_groups for w in group["params"]]
    stored = sum(w.untyped_storage().nbytes() for w in kept)
    assert stored == (4 * sum(p.numel() for p in run.model.parameters()) if option == "bf16_master" else 0)


def test_a_checkpoint_is_fp32(tmp_path):
    from safetensors.torch import load_file

    run = prepared(tmp_path, "precision=bf16_master")
    train.save(tmp_path, run.model, run.part("state_dict")())
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_gradients_are_clipped_in_bf16(tmp_path):
    run = prepared(tmp_path, "precision=bf16_master")
    norms = []
    run.parts["clip"] = lambda parameters, most: norms.append(torch.nn.utils.clip_grad_norm_(parameters, most))
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    trainer.step()
    assert float(norms[0]) > 0
