"""fp8 products: the arithmetic against exact products, the layer's gradients against their definition, the technique."""

import itertools
import math

import pytest
import tiny
import torch
from test_training_techniques import device, loss_and_gradients, prepared
from torch.utils._python_dispatch import TorchDispatchMode

from dyno.kernels import _fp8
from dyno.kernels._fp8 import E4M3, E5M2, Recipe
from dyno.model.decoder import Decoder
from dyno.techniques.checkpointing.blocks import Uniform
from dyno.techniques.checkpointing.selective import Selective
from dyno.techniques.precision.fp8 import FP8, projection

SHAPES = [(1, 16), (5, 48), (16, 32), (123, 128)]
BOTH = [(dtype, rowwise) for dtype in (E4M3, E5M2) for rowwise in (False, True)]


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def dequantised(x, dtype, rowwise):
    scale = _fp8.scale_of(x, dtype, rowwise)
    return _fp8.quantise(x, scale, dtype).float() * scale


@pytest.mark.parametrize(("dtype", "rowwise"), BOTH)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_keep_the_bits_of_their_format(shape, dtype, rowwise):
    x = normal(*shape) * torch.logspace(-2, 2, shape[0])[:, None]
    bits = 3 if dtype == E4M3 else 2
    scale = _fp8.scale_of(x, dtype, rowwise)
    assert scale.shape == ((shape[0], 1) if rowwise else ()) and scale.dtype == torch.float32
    small = scale * 2.0 ** (-6 if dtype == E4M3 else -14)  # under the smallest normal number the error is absolute
    allowed = torch.maximum(x.abs(), small) * 2.0 ** -(bits + 1) * 1.0001
    assert bool(((dequantised(x, dtype, rowwise) - x).abs() <= allowed).all())
    peak = (x / scale).abs().amax(-1 if rowwise else (0, 1))
    torch.testing.assert_close(peak, torch.full_like(peak, torch.finfo(dtype).max))


def test_zeros_stay_zeros_and_what_is_not_finite_does_not_hide():
    assert torch.equal(dequantised(torch.zeros(4, 16), E4M3, True), torch.zeros(4, 16))
    for bad in (math.nan, math.inf):
        x = normal(16, 16)
        x[3, 4] = bad
        assert not dequantised(x, E5M2, False).isfinite().all()


@pytest.mark.parametrize(("dtype", "rowwise"), BOTH)
@pytest.mark.parametrize("heights", [(1,), (5,), (16, 32), (7, 8, 24)], ids=str)
def test_operands_are_the_stacked_matrices_both_ways(heights, dtype, rowwise):
    parts = [normal(h, 48, seed=h) * h for h in heights]
    stacked, rows = torch.cat(parts), sum(heights)
    row_scale, column_scale = _fp8._both_scales(parts, dtype, rowwise)
    by_row, by_column = _fp8.operands(parts, row_scale, column_scale, dtype)
    assert by_row.shape == (rows, 48) and by_column.shape == (48, math.ceil(rows / 16) * 16)
    assert by_row.is_contiguous() and by_column.is_contiguous() and by_row.dtype == by_column.dtype == dtype
    assert not by_column[:, rows:].float().any()
    torch.testing.assert_close(by_row.float() * row_scale, dequantised(stacked, dtype, rowwise))
    expected = dequantised(stacked.t(), dtype, rowwise)
    torch.testing.assert_close(by_column[:, :rows].float() * column_scale, expected)


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_a_product_is_that_of_the_dequantised_operands(rows, rowwise):
    a, b = normal(rows, 64), normal(48, 64, seed=1)
    scales = [_fp8.scale_of(t, E4M3, rowwise) for t in (a, b)]
    quantised = [_fp8.quantise(t, s, E4M3) for t, s in zip((a, b), scales, strict=True)]
    got = _fp8.multiply(quantised[0], scales[0], quantised[1], scales[1], torch.float32, False)
    exact = dequantised(a, E4M3, rowwise).double() @ dequantised(b, E4M3, rowwise).double().t()
    torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-5)
    assert float((got - a @ b.t()).norm() / (a @ b.t()).norm()) < 0.05
    torch.testing.assert_close(got, _fp8.reference_linear(a, b, Recipe(rowwise)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("lead", [(1,), (37,), (3, 7)], ids=str)
def test_gradients_of_several_layers_of_one_input(lead, rowwise):
    x, weights = normal(*lead, 32).requires_grad_(), [normal(m, 32, seed=m).requires_grad_() for m in (8, 24, 16)]
    outputs = _fp8.linear(x, weights, Recipe(rowwise))
    assert [y.shape for y in outputs] == [(*lead, m) for m in (8, 24, 16)]
    grads = [normal(*y.shape, seed=9) for y in outputs]
    torch.autograd.backward(outputs, grads)
    g, w, flat = torch.cat(grads, -1).flatten(0, -2), torch.cat([*weights]).detach(), x.detach().flatten(0, -2)
    y = torch.cat(outputs, -1).flatten(0, -2)
    torch.testing.assert_close(
        y, dequantised(flat, E4M3, rowwise) @ dequantised(w, E4M3, rowwise).t(), atol=1e-4, rtol=0
    )
    dx = dequantised(g, E5M2, rowwise) @ dequantised(w.t(), E4M3, rowwise).t()
    torch.testing.assert_close(x.grad.flatten(0, -2), dx, atol=1e-4, rtol=1e-4)
    dw = dequantised(g.t(), E5M2, rowwise) @ dequantised(flat.t(), E4M3, rowwise).t()
    torch.testing.assert_close(torch.cat([weight.grad for weight in weights]), dw, atol=1e-4, rtol=1e-4)


def test_bf16_inputs_give_bf16_and_fp32_weights_give_fp32_gradients():
    x, weight = normal(4, 16).bfloat16().requires_grad_(), normal(16, 16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whose promotion rules know no fp8
        (y,) = _fp8.linear(x, [weight], Recipe())
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


# The technique, on a CPU by its reference arithmetic


def applied(tmp_path, technique, **sizes):
    run = prepared(tmp_path, model=tiny.model(sharpness=3.0, **sizes))
    technique.apply(run)
    return run


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_model_with_fp8_products_has_nearly_the_plain_gradients(scaling, tmp_path):
    sizes = {"layers": 2, "tied_embeddings": False, "qkv_bias": True}
    torch.manual_seed(0)  # of the biases
    loss, expected, _ = loss_and_gradients(prepared(tmp_path, model=tiny.model(sharpness=3.0, **sizes)))
    torch.manual_seed(0)
    run = applied(tmp_path, FP8(scaling), **sizes)
    seen = []
    _fp8_linear = _fp8.linear
    with pytest.MonkeyPatch.context() as patch, run.part("autocast")():
        patch.setattr(_fp8, "linear", lambda x, w, r: seen.append(len(w)) or _fp8_linear(x, w, r))
        got_loss, gradients, _ = loss_and_gradients(run)
    assert seen == [3, 1, 2, 1] * 2
    assert got_loss == pytest.approx(loss, rel=0.03) and got_loss != loss
    whole, wanted = torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in expected])
    assert torch.nn.functional.cosine_similarity(whole, wanted, 0) > 0.98
    assert run.details["wide_layers"] == ["embed", "norms", "lm_head"]


def test_layers_whose_sizes_do_not_fit_stay_wide_and_are_named(tmp_path):
    run = applied(tmp_path, FP8(), layers=1, ffn_width=40, kv_heads=1)
    wide = [f"blocks.0.{name}" for name in ("attention.k_proj", "attention.v_proj", "mlp.gate_proj", "mlp.up_proj",
                                            "mlp.down_proj")]  # fmt: skip
    assert run.details["wide_layers"] == ["embed", "norms", *wide, "lm_head"]
    with run.part("autocast")():
        assert math.isfinite(loss_and_gradients(run)[0])


def test_a_step_is_one_graph(tmp_path):
    run = applied(tmp_path, FP8(), layers=1)
    text = tiny.tokens(2, 9)
    eager = run.part("loss")(run.part("forward"), text[:, :-1], text[:, 1:])
    eager.backward()
    expected = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    compiled = torch.compile(run.part("loss"), backend="aot_eager", fullgraph=True)
    loss = compiled(run.part("forward"), text[:, :-1], text[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(eager.item(), abs=1e-5)
    for p, wanted in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, atol=1e-4, rtol=1e-3)


def test_inputs_are_kept_in_a_byte():
    kept = []
    x, weight = normal(64, 32).bfloat16().requires_grad_(), normal(16, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        _fp8.linear(x, [weight], Recipe())
    assert sum(kept) == 64 * 32 + 16 * 32 + 2 * 4  # input, weight, two scales


@pytest.mark.parametrize(("technique", "products"), [(Uniform(), 8), (Selective(), 4)], ids=["uniform", "selective"])
def test_what_selective_checkpointing_keeps_holds_its_products(technique, products, tmp_path):
    run = applied(tmp_path, FP8(), layers=1)
    technique.apply(run)
    run.model.call_block = run.part("call_block")
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append(str(operation))
            return operation(*args, **(kwargs or {}))

    with Watch():
        loss_and_gradients(run)
    assert seen.count("dyno.fp8_products.default") == products


def test_it_says_where_it_does_not_run(tmp_path):
    train = tiny.pipeline(tmp_path).recipe
    assert "CPU" in FP8().unsupported(train, device("cpu"))
    assert "8.9" in FP8().unsupported(train, device("cuda", (8, 6)))
    assert FP8().unsupported(train, device("cuda", (9, 0))) is None
    assert "tensorwise or rowwise" in FP8("blockwise").unsupported(train, device("cuda", (9, 0)))
    assert "bfloat16" in FP8(weights="int8").unsupported(train, device("cuda", (9, 0)))
    serving = tiny.pipeline(tmp_path, "workload=generate").recipe
    assert "training" in FP8().unsupported(serving, device("cuda", (9, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "rowwise"), BOTH)
@pytest.mark.parametrize("heights", [(37,), (16, 48), (2048, 512, 512)], ids=str)
def test_operands_on_gpu(heights, dtype, rowwise):
    parts = [normal(h, 144, seed=h).cuda() * h for h in heights]
    scales = _fp8._both_scales(parts, dtype, rowwise)
    got = _fp8.operands(parts, *scales, dtype)
    expected = _fp8.operands([p.cpu() for p in parts], *(s.cpu() for s in scales), dtype)
    for a, b in zip(got, expected, strict=True):
        assert (a.cpu().float() == b.float()).float().mean() > 0.999  # a reciprocal may differ in its last bit


@pytest.mark.gpu
@pytest.mark.parametrize(("rowwise", "out"), itertools.product([False, True], [torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)], ids=str)
def test_scaled_products_on_gpu(formats, rowwise, out):
    a, b = normal(48, 256).cuda(), normal(80, 256, seed=1).cuda()
    scales = [_fp8.scale_of(t, f, rowwise) for t, f in zip((a, b), formats, strict=True)]
    quantised = [_fp8.quantise(t, s, f) for t, s, f in zip((a, b), scales, formats, strict=True)]
    arguments = quantised[0], scales[0], quantised[1], scales[1], out
    expected = _fp8.reference_multiply(*arguments)
    for fast in (False, True):
        got = _fp8.multiply(*arguments, fast)
        assert got.dtype == out
        assert float((got.float() - expected.float()).norm() / expected.float().norm()) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rowwise", [False, True])
def test_a_layer_on_gpu(rowwise):
    grads = []
    for place in ("cpu", "cuda"):
        x = normal(37, 64).bfloat16().to(place).requires_grad_()
        weights = [normal(m, 64, seed=m).to(place).requires_grad_() for m in (16, 32)]
        y = torch.cat(_fp8.linear(x, weights, Recipe(rowwise)), -1)
        (y.float() * torch.linspace(-1, 1, 48, device=place)).sum().backward()
        grads.append([t.detach().float().cpu() for t in (y, x.grad, *(w.grad for w in weights))])
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-2


@pytest.mark.gpu
def test_compiled_gradients_are_the_eager_ones_on_gpu():
    grads = []
    for compiled in (False, True):
        with torch.device("cuda"):
            model = Decoder(tiny.config(hidden=512, ffn_width=1024, heads=8, head_dim=64)).initialise(0)
        for block in model.blocks:
            block.attention.project = block.mlp.project = projection(Recipe())
        tokens = tiny.tokens(4, 129).cuda()

        def loss(x, y, model=model):
            return torch.nn.functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten())

        with torch.autocast("cuda", dtype=torch.bfloat16):
            (torch.compile(loss) if compiled else loss)(tokens[:, :-1], tokens[:, 1:]).backward()
        grads.append({name: p.grad.float() for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        assert float((grads[1][name] - expected).norm() / expected.norm()) < 0.15, name
