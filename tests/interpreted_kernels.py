"""Tests that run the Triton kernels in Triton's interpreter, on a CPU.

Not collected by itself: the interpreter must be chosen before Triton is first imported, so that
`test_kernels_interpreted.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
import triton
import triton.language as tl
from test_attention_techniques import build, device, recipe, run
from test_kernels_attention import CASES, DOCUMENTS, problem, starts_of
from test_kernels_quantized import GRIDS, MATRICES
from test_loss import SHAPES, agree
from test_optimizers import SEVERAL, compare_kinds, compare_single_passes, compare_steps
from test_packing import packed_row_trains_like_its_documents

from dyno.errors import UserError
from dyno.kernels import (
    _adamw,
    _adamw8bit,
    _adamw8bit_step,
    _adamw_step,
    _flash,
    _fp8,
    _fp8_cast,
    _quantized,
    _square_sums,
    attention,
    operation,
    operations,
)
from dyno.kernels import linear_cross_entropy as loss
from dyno.kernels import quantized_linear as linear
from dyno.kernels._flash import Tiles


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_matches_reference(case):
    q, k, v = problem(*case[:-1])
    out = attention.triton_attention(q, k, v, causal=case[-1], tiles=Tiles(32, 32, 4, 1))
    torch.testing.assert_close(out, attention.reference(q, k, v, causal=case[-1]), **attention.tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_default_tiles(dtype):
    q, k, v = problem(1, 4, 2, 150, 150, 64, dtype)
    torch.testing.assert_close(
        attention.triton_attention(q, k, v), attention.reference(q, k, v), **attention.tolerance(dtype)
    )


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("splits", [2, 5])
def test_split_keys_are_merged(queries, splits):
    q, k, v = problem(2, 4, 2, queries, 150, 64)
    out = attention.triton_attention(q, k, v, splits=splits, tiles=Tiles(16, 16, 4, 1))
    torch.testing.assert_close(out, attention.reference(q, k, v), **attention.tolerance(torch.float32))


def test_strided_inputs_as_a_model_makes_them():
    q = torch.randn(2, 20, 4, 64).transpose(1, 2)
    k, v = (torch.randn(2, 20, 2, 64).transpose(1, 2) for _ in range(2))
    torch.testing.assert_close(
        attention.triton_attention(q, k, v), attention.reference(q, k, v), **attention.tolerance(torch.float32)
    )


def test_large_scores_do_not_overflow():
    q, k, v = problem(1, 2, 2, 20, 20, 64)
    out = attention.triton_attention(q * 100, k * 100, v)
    torch.testing.assert_close(out, attention.reference(q * 100, k * 100, v), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries,keys,causal", [(40, 40, True), (7, 40, True), (40, 7, True), (9, 30, False)])
def test_gradients(queries, keys, causal, monkeypatch):
    monkeypatch.setattr(_flash, "BACKWARD_ROWS", 16)
    grads = []
    for fn in (attention.reference, attention.triton_attention):
        tensors = [x.requires_grad_() for x in problem(2, 4, 2, queries, keys, 32)]
        (fn(*tensors, causal=causal) * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append([x.grad for x in tensors])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_documents_and_their_gradients(lengths, monkeypatch):
    """Small tiles: of one document, of parts of several, and of a document longer than several tiles."""
    monkeypatch.setattr(_flash, "BACKWARD_ROWS", 16)
    tokens, grads = sum(lengths[0]), []
    for fn, launch in ((attention.reference, {}), (attention.triton_attention, {"tiles": Tiles(16, 16, 4, 1)})):
        tensors = [x.requires_grad_() for x in problem(len(lengths), 4, 2, tokens, tokens, 32)]
        out = fn(*tensors, documents=attention.Documents(starts_of(lengths)), **launch)
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append([out.detach(), *(x.grad for x in tensors)])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_documents_in_half_precision(dtype):
    starts = attention.Documents(starts_of([[100, 30, 20]]))
    q, k, v = problem(1, 4, 2, 150, 150, 64, dtype)
    expected = attention.reference(q, k, v, documents=starts)
    torch.testing.assert_close(
        attention.triton_attention(q, k, v, documents=starts), expected, **attention.tolerance(dtype)
    )


def test_a_packed_row_trains_like_its_documents(tmp_path):
    packed_row_trains_like_its_documents(tmp_path, ["attention=triton_flash"])


def test_user_mistakes_are_one_line():
    q, k, v = problem(1, 4, 2, 3, 3, 64)
    with pytest.raises(UserError, match="multiple of Hkv"):
        attention.triton_attention(q[:, :3], k, v)
    with pytest.raises(UserError, match="up to 128"):
        attention.triton_attention(*problem(1, 1, 1, 2, 2, 130))
    with pytest.raises(UserError, match="one type"):
        attention.triton_attention(q.half(), k, v)


@pytest.mark.parametrize("case", MATRICES[::2] + MATRICES[1::6], ids=str)
def test_linear_matches_reference(case):
    made = linear.inputs(linear.LinearShape(*case), "cpu", torch.float32, 0)
    torch.testing.assert_close(
        linear.triton_linear(**made), linear.reference(**made), **linear.tolerance(torch.float32)
    )


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_half_precision(rows, dtype):
    made = linear.inputs(linear.LinearShape(rows, 40, 576, 4, 128, False), "cpu", dtype, 0)
    for version in (linear.triton_linear, linear.dequantized_linear):
        torch.testing.assert_close(version(**made), linear.reference(**made), **linear.tolerance(dtype))


@pytest.mark.parametrize("bits,group,symmetric", GRIDS)
def test_one_pass_dequantize(bits, group, symmetric):
    packed = linear.quantize(torch.randn(5, 203), bits, group, symmetric)
    assert torch.equal(_quantized.dense(packed, torch.float32), linear.dequantize(packed))


def test_bias_and_leading_dimensions():
    made = linear.inputs(linear.LinearShape(6, 12, 128, 4, 64, False), "cpu", torch.float32, 0)
    x, bias = made["x"].view(2, 3, 128), torch.randn(12)
    expected = linear.reference(x, made["weight"], bias)
    assert expected.shape == (2, 3, 12)
    for version in (linear.triton_linear, linear.linear, linear.dequantized_linear):
        torch.testing.assert_close(version(x, made["weight"], bias), expected, **linear.tolerance(torch.float32))


def test_the_technique_runs():
    technique = build("triton_flash")
    assert technique.unsupported(recipe("fp32"), device("cpu")) is None
    made = run()
    technique.apply(made)
    q, k, v = problem(2, 9, 3, 9, 9, 64)
    torch.testing.assert_close(made.part("attention")(q, k, v, causal=True, scale=None), attention.reference(q, k, v))


def test_every_triton_version_is_offered_and_agrees():
    for name in operations():
        module = operation(name)
        for shape in module.cases("cpu"):
            arguments = module.inputs(shape, "cpu", torch.float32, 1)
            found = module.implementations("cpu")["triton"](**arguments)
            torch.testing.assert_close(found, module.reference(**arguments), **module.tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [_fp8.E4M3, _fp8.E5M2])
@pytest.mark.parametrize("heights", [(5,), (70, 16), (3, 65, 1)], ids=str)
@pytest.mark.parametrize("rowwise", [False, True])
def test_fp8_operands(heights, dtype, rowwise):
    """On values that the format holds, for the interpreter rounds others wrongly (a carry into the exponent is lost)."""
    rows, width, generator = sum(heights), 72, torch.Generator().manual_seed(0)
    values = torch.randint(-8, 9, (rows, width), generator=generator).float()
    powers = 2.0 ** torch.randint(-3, 4, (rows + width, 1), generator=generator)
    scales = (powers[:rows], powers[rows:]) if rowwise else (torch.tensor(0.5),) * 2
    parts = [part.t().contiguous().t() if i % 2 else part for i, part in enumerate(values.split(list(heights)))]
    got = _fp8_cast.cast_both_ways(parts, *scales, dtype)
    for a, b in zip(got, _fp8.operands(parts, *scales, dtype), strict=True):
        assert a.shape == b.shape and torch.equal(a.float(), b.float())


@pytest.mark.parametrize("block", [16, 8192])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_loss(shape, block, monkeypatch):
    monkeypatch.setattr("dyno.kernels._cross_entropy.SHORT_ROW", 0 if block == 16 else 2**17)
    for name in ("MAX_BLOCK", "SHORT_BLOCK"):
        monkeypatch.setattr(f"dyno.kernels._cross_entropy.{name}", block if shape[2] < 100 else 256)
    agree(lambda h, w, t: loss.fused_loss(h, w, t, 50), shape)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_fused_loss_in_bf16(weights):
    agree(lambda h, w, t: loss.fused_loss(h, w, t, 50), SHAPES[1], torch.bfloat16, weights=weights)


def test_fused_loss_of_large_logits_and_of_no_target():
    made = loss.inputs(loss.LossShape(*SHAPES[0]), "cpu", torch.float32, 0)
    made["hidden"] *= 1e4
    assert torch.allclose(loss.hidden_gradient(loss.fused_loss, **made), loss.reference(**made), atol=1e-5)
    made["targets"].fill_(loss.IGNORE)
    assert not loss.hidden_gradient(loss.fused_loss, **made).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", SEVERAL, ids=str)
def test_eight_bit_adamw(counts, dtype):
    compare_steps(_adamw8bit_step.triton_step, counts, dtype, "cpu", shift=len(counts) % 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", SEVERAL, ids=str)
def test_a_single_pass(counts, dtype):
    compare_single_passes(_adamw_step.triton_step, counts, dtype, "cpu", shift=len(counts) % 2)


@pytest.mark.parametrize("kernel", [_adamw, _adamw8bit])
def test_parameters_of_every_kind(kernel):
    """A gradient wider than its weight, and a narrow weight without a master, among them."""
    version = _adamw_step if kernel is _adamw else _adamw8bit_step
    compare_kinds(kernel, version.triton_step, "cpu")


@triton.jit
def _cells(Share, Found, FINER: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(
        Found + i,
        _adamw8bit_step._whole(tl.maximum(_adamw8bit_step._place(tl.load(Share + i), FINER), FINER + 0.5)) - FINER,
    )


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bit_codes_are_those_of_the_table(signed):
    values, bounds = _adamw8bit.table(signed, torch.device("cpu"))
    zero, size = (127 if signed else 0), 2**15
    share = torch.cat([torch.logspace(-9, 0, size // 2), torch.linspace(0, 1, size // 2), values[values > 0]])
    share = torch.nn.functional.pad(share, (0, 2 * size - len(share)))
    found = torch.empty(len(share), dtype=torch.int32)
    _cells[(1,)](share, found, 0 if signed else 1, len(share))
    low, high = (torch.bucketize(share * (1 + slack), bounds) - zero for slack in (-2e-6, 2e-6))
    assert bool(((found >= low) & (found <= high)).all()) and found.min() == 0 and found.max() == 255 - zero
    assert (low == high).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_many_tensors(dtype):
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 16384, 40_000, 7)]
    assert _square_sums.adds_up(tensors)
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(_square_sums.square_sum(tensors)) == pytest.approx(expected, rel=1e-5)
    assert not _square_sums.adds_up([*tensors, tensors[0].double()])
    shifted = [*tensors, tensors[2][1:]]
    assert _square_sums.adds_up(shifted)
    expected += float(tensors[2][1:].double().square().sum())
    assert float(_square_sums.square_sum(shifted)) == pytest.approx(expected, rel=1e-5)
    assert not _square_sums.adds_up([tensors[2].view(200, 200).t()])
