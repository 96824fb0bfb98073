"""Optimizers: 8-bit moments that train like AdamW in a quarter of its state, and updates that are orthogonal."""

import math

import pytest
import torch
from test_training_techniques import prepared, steps

from dyno.kernels import _adamw as single
from dyno.kernels import _adamw8bit as eight
from dyno.kernels._adamw import Rates
from dyno.kernels._adamw8bit import BLOCK
from dyno.technique import Shape
from dyno.techniques.optimizer import _muon, update_rules
from dyno.techniques.optimizer._single_pass import AdamW8bit, SinglePassAdamW
from dyno.techniques.optimizer.update_rules import Muon

CPU = torch.device("cpu")
RATES = Rates(1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9, 1 - 0.95)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
def test_a_table_has_256_values_that_are_finest_where_they_are_small(signed):
    values, bounds = eight.table(signed, CPU)
    assert len(values.unique()) == 256 and len(bounds) == 255
    assert bool((values.diff() > 0).all()) and bool(((bounds > values[:-1]) & (bounds < values[1:])).all())
    assert values[-1] == 1 and (values == 0).sum() == 1 and (values.min() < -0.99) == signed
    positive = values[values > 0]
    assert positive.min() < 6e-7 and bool((positive[:-1].diff().diff() > -1e-6).all())
    assert not signed or torch.equal(-values[values < 0].flip(0), positive[:-1])


@pytest.mark.parametrize("count", [1, 255, 256, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_a_stored_moment_is_the_middle_of_its_cell(count, signed):
    x = normal(count) ** 3
    x = x if signed else x.abs()
    moment = eight.empty_moment(count, signed, CPU)
    assert not eight.dequantise(moment, signed).any()
    eight.quantise_into(moment, x, signed)
    got, (_, bounds) = eight.dequantise(moment, signed), eight.table(signed, CPU)
    scales = moment.scales.repeat_interleave(BLOCK)[:count]
    assert torch.equal(moment.scales, torch.stack([part.abs().max() for part in x.split(BLOCK)]))
    largest = torch.tensor([1.0])
    edges = torch.cat([-largest if signed else 0 * largest, bounds, largest])
    widths = edges.diff()[moment.codes.long()] * scales
    assert bool((((got - x).abs() <= 0.501 * widths) | (x.abs() <= 1e-7 * scales)).all())
    assert bool((got == x)[x == scales].all())
    assert moment.codes.dtype == torch.uint8


def test_a_second_moment_that_is_not_zero_stays_so():
    x = torch.tensor([1.0, 1e-12, 0.0])
    moment = eight.empty_moment(3, False, CPU)
    eight.quantise_into(moment, x, False)
    got = eight.dequantise(moment, False)
    assert got[0] == 1 and 0 < got[1] < 1e-6 and got[2] == 0


def test_zeros_have_no_update_and_the_first_step_is_adamw_s():
    weight, grad = normal(600), normal(600, seed=1)
    grad[100:110] = 0
    plain = torch.nn.Parameter(weight.clone())
    plain.grad = grad.clone()
    torch.optim.AdamW([plain], lr=RATES.lr, betas=(0.9, 0.95), weight_decay=0.1).step()
    moments = eight.empty_moment(600, True, CPU), eight.empty_moment(600, False, CPU)
    eight.step([single.Operands(weight, None, grad, *moments)], torch.ones(()), RATES)
    torch.testing.assert_close(weight, plain.detach(), atol=1e-6, rtol=1e-5)  # moments are rounded after it


def test_eight_bits_train_like_adamw_in_two_bytes_a_parameter(tmp_path):
    expected, _, _ = steps(prepared(tmp_path), 30)
    losses, _, trainer = steps(prepared(tmp_path, "optimizer=adamw8bit"), 30)
    assert expected[-1] < 0.5 * expected[0]
    assert losses[-1] == pytest.approx(expected[-1], rel=0.1)
    large = [p for p in trainer.parameters if p.numel() % BLOCK == 0]
    stored = sum(t.nbytes for p in large for t in trainer.optimizer.state[p].values() if isinstance(t, torch.Tensor))
    assert len(large) > 10 and stored / sum(p.numel() for p in large) == 2.03125
    assert update_rules.AdamW8bit().footprint(shape(), None).optimizer_bytes == 2.03125


def shape():
    return Shape(10**6, 10**6, 16, 64, 192, 4, 2, 16, 257, 8, 128)


@pytest.mark.parametrize("size", [(16, 16), (8, 32), (48, 20), (3, 5, 64)], ids=str)
def test_an_update_is_orthogonal(size):
    """Against the singular value decomposition: its directions, and values near 1."""
    x = normal(*size)
    got = _muon.orthogonalise(x, 5, torch.float32)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ got @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    kept = s > 0.02 * s.amax(-1, keepdim=True)  # five iterations lift what is not lost in the norm
    assert got.shape == x.shape and bool(((values > 0.6) & (values < 1.3))[kept].all()) and kept.float().mean() > 0.8
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tmp_path):
    run = prepared(tmp_path, "optimizer=muon")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    expected, _, plain = steps(prepared(tmp_path), 1)
    losses, _, trainer = steps(run, 1)
    assert losses == expected and set(trainer.parameters) == set(run.model.parameters())
    others = dict(zip(before, plain.parameters, strict=True))
    for name, p in run.model.named_parameters():
        if name.startswith("blocks.") and p.dim() == 2:
            update = (before[name] * (1 - 1e-2 * 0.1) - p.detach()) / (1e-2 * 0.2 * max(p.shape) ** 0.5)
            values = torch.linalg.svdvals(update)
            assert values.max() < 1.3 and values.median() > 0.6, name
            assert set(trainer.optimizer.state[p]) == {"momentum"}
        else:
            torch.testing.assert_close(p, others[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16_master", "bf16_stochastic"])
@pytest.mark.parametrize("option", ["adamw8bit", "muon"])
def test_they_lower_the_loss_in_every_format_of_the_weights(option, precision, tmp_path):
    losses, _, _ = steps(prepared(tmp_path, f"optimizer={option}", f"precision={precision}"), 12)
    assert losses[-1] < 0.9 * losses[0]


def test_batches_hold_one_shape_and_a_parameter_without_gradient_is_left_alone(monkeypatch):
    monkeypatch.setattr(_muon, "BATCH", 2 * 4 * 6)
    parameters = [torch.nn.Parameter(normal(*s)) for s in [(4, 6), (6, 4), (4, 6), (4, 6), (50, 3)]]
    assert [[p.shape for p in b] for b in _muon.batches(parameters)] == [[(4, 6)] * 2, [(4, 6)], [(6, 4)], [(50, 3)]]
    optimizer = _muon.Muon(parameters[:4], parameters[4:], 0.1, 0.9, 5, (0.9, 0.95), 0.1)
    before = [p.detach().clone() for p in parameters]
    parameters[0].grad = torch.ones(4, 6)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, parameters, strict=True)] == [False, True, True, True, True]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]


def test_muon_predicts_its_state_and_its_products():
    footprint = Muon().footprint(shape(), None)
    assert 4 < footprint.optimizer_bytes < 8 and footprint.flops_factor > 1
    assert "momentum" in Muon(momentum=1.0).unsupported(None, None)
    assert "iterations" in Muon(iterations=0).unsupported(None, None)
    assert math.isfinite(Muon(iterations=0).footprint(shape(), None).flops_factor)


def test_a_single_pass_is_clipping_and_adamw(tmp_path):
    expected, _, plain = steps(prepared(tmp_path), 8)
    losses, _, trainer = steps(prepared(tmp_path, "optimizer=adamw_single_pass"), 8)
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]
    for p, q in zip(plain.parameters, trainer.parameters, strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [SinglePassAdamW, AdamW8bit])
@pytest.mark.parametrize("largest", [1e-3, 1e3], ids=["clipped", "not clipped"])
def test_the_norm_is_that_of_all_gradients(largest, kind):
    parameters = [torch.nn.Parameter(normal(*s)) for s in [(4, 6), (7,), (1,)]]
    for i, p in enumerate(parameters[:2]):
        p.grad = normal(*p.shape, seed=i)
    optimizer = kind(parameters, 1e-2, (0.9, 0.95), 0.1)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for c, p in zip(copies, parameters, strict=True):
        c.grad = None if p.grad is None else p.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(copies, largest)
    torch.testing.assert_close(optimizer.clip(parameters, largest), norm)
    torch.optim.AdamW(copies, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()
    optimizer.step()
    torch.testing.assert_close(parameters, copies)


@pytest.mark.parametrize("option", ["adamw_single_pass", "adamw8bit"])
@pytest.mark.parametrize("rounded", ["bf16_master", "bf16_stochastic"])
def test_a_single_pass_keeps_masters_or_steps_on_wide_copies(rounded, option, tmp_path):
    expected, _, plain = steps(prepared(tmp_path, f"precision={rounded}"), 8)
    losses, _, trainer = steps(prepared(tmp_path, f"precision={rounded}", f"optimizer={option}"), 8)
    assert losses == pytest.approx(expected, rel=5e-3 if option == "adamw_single_pass" else 3e-2)
    masters = [s["master"] for s in trainer.optimizer.state.values() if "master" in s]
    assert len(masters) == (len(trainer.parameters) if rounded == "bf16_master" else 0)
    assert all(p.dtype == torch.bfloat16 for p in trainer.parameters)
    for p, master in zip(trainer.parameters, masters, strict=False):
        assert torch.equal(p, master.to(torch.bfloat16))


SEVERAL = [(1,), (1000, 1, 256), (4096, 5000, 8191, 7)]  # numbers of parameters that step together
ON_GPU = [*SEVERAL, (300_001, 3, 1_000_000)]


def moved(x, shift):
    """x where `shift` numbers lie before it: at an address that no 16 bytes begin at, as a shard may."""
    room = torch.empty(x.numel() + shift, dtype=x.dtype, device=x.device)
    return room[shift:].copy_(x)


def operands_of(counts, dtype, device, shift, moments):
    """Parameters with their masters, where the weights are narrow, and what `moments` of a size makes."""
    made = []
    for count in counts:
        master = moved(normal(count, seed=count).to(device), shift)
        weight, grad = moved(master.to(dtype), shift), moved(torch.zeros_like(master, dtype=dtype), shift)
        made.append(single.Operands(weight, None if dtype == torch.float32 else master, grad, *moments(count)))
    return made


def after(step, items, times):
    """The items after steps of gradients that are the same for every version."""
    scale = torch.tensor(0.3, device=items[0].weight.device)
    for i in range(times):
        for item in items:
            item.grad.copy_(normal(item.grad.numel(), seed=i))
        step(items, scale, RATES._replace(correction1=1 - 0.9 ** (i + 1), correction2=1 - 0.95 ** (i + 1)))
    return items


def one_by_one(reference):
    def step(items, scale, rates):
        for item in items:
            reference(*item, scale, rates)

    return step


def compare_single_passes(step, counts, dtype, place, shift=0):
    """Three steps of a version and of the reference, with a master where the weight is narrow."""

    def moments(count):
        return [moved(torch.zeros(count, device=place), shift) for _ in range(2)]

    found, expected = (
        after(version, operands_of(counts, dtype, place, shift, moments), 3)
        for version in (step, one_by_one(single.reference_step))
    )
    for one, other in zip(found, expected, strict=True):
        got, want = ([t for t in item if t is not None] for item in (one, other))
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def compare_steps(step, counts, dtype, place, shift=0):
    """Five steps of a version and of the reference: nearly all codes equal, the weights close."""
    device = torch.device(place)

    def moments(count):
        made = (eight.empty_moment(count, signed, device) for signed in (True, False))
        return [eight.Moment(moved(m.codes, shift), m.scales) for m in made]

    found, expected = (
        after(version, operands_of(counts, dtype, device, shift, moments), 5)
        for version in (step, one_by_one(eight.reference_step))
    )
    for one, other in zip(found, expected, strict=True):
        wide, expected_wide = (s.weight if s.master is None else s.master for s in (one, other))
        torch.testing.assert_close(wide, expected_wide, atol=2e-3, rtol=0)
        # The interpreter cuts off, not rounds.
        torch.testing.assert_close(one.weight, wide.to(dtype), atol=0, rtol=2**-7)
        for got, want in zip((one.first, one.second), (other.first, other.second), strict=True):
            assert (got.codes == want.codes).float().mean() > 0.98
            torch.testing.assert_close(got.scales, want.scales, rtol=0.02, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("counts", ON_GPU, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_pass_on_gpu(counts, dtype, shift):
    from dyno.kernels._adamw_step import triton_step

    compare_single_passes(triton_step, counts, dtype, "cuda", shift)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("counts", ON_GPU, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_steps_on_gpu(counts, dtype, shift):
    from dyno.kernels._adamw8bit_step import triton_step

    compare_steps(triton_step, counts, dtype, "cuda", shift)


def compare_kinds(kernel, step, place):
    """fp32 and bf16 weights, with and without a master, a gradient wider than its weight: each as alone, by `step`."""
    device = torch.device(place)

    def moments(count):
        if kernel is single:
            return [torch.zeros(count, device=device) for _ in range(2)]
        return [eight.empty_moment(count, signed, device) for signed in (True, False)]

    def items():
        narrow = operands_of((300, 7), torch.bfloat16, device, 0, moments)
        alone = operands_of((700,), torch.bfloat16, device, 0, moments)[0]._replace(master=None)
        wider = operands_of((513,), torch.bfloat16, device, 0, moments)[0]._replace(
            grad=torch.zeros(513, device=device)
        )
        nothing = single.Operands(*(torch.zeros(0, device=device) for _ in range(3)), *moments(0))
        return [*operands_of((300, 7), torch.float32, device, 0, moments), alone, wider, nothing, *narrow]

    kinds = single.alike(items())
    assert sorted(len(kind) for kind in kinds) == [1, 1, 2, 2]

    def by_kind(items, scale, rates):
        for kind in single.alike(items):
            step(kind, scale, rates)

    found, expected = after(by_kind, items(), 2), after(one_by_one(kernel.reference_step), items(), 2)
    for one, other in zip(found, expected, strict=True):
        if not one.weight.numel():
            continue
        for got, want in ((one.weight, other.weight), (one.master, other.master)):
            # The interpreter cuts off, not rounds: twice, where there is no master.
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2**-6)
        for got, want in zip(one[3:], other[3:], strict=True):
            if kernel is eight:
                assert (got.codes == want.codes).float().mean() > 0.98
                got, want = got.scales, want.scales
            torch.testing.assert_close(got, want, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("kernel", [single, eight])
def test_parameters_of_every_kind_step_together(kernel):
    compare_kinds(kernel, kernel.step, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [single, eight])
def test_parameters_of_every_kind_step_together_on_gpu(kernel):
    compare_kinds(kernel, kernel.step, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_on_gpu(dtype):
    tensors = [normal(n, seed=n).to("cuda", dtype) for n in (1, 16384, 7, 3_000_001)]
    expected = torch.cat([t.double() for t in tensors]).norm()
    torch.testing.assert_close(single.norm(tensors).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        single.norm([*tensors, tensors[1][1:]]).double(), expected.hypot(tensors[1][1:].double().norm())
    )
