"""Packing, grids and the Triton products of quantised linear layers, against the reference."""

import pytest
import torch

from dyno.errors import UserError
from dyno.kernels import quantized_linear as op

GRIDS = [(bits, group, symmetric) for bits in (4, 8) for group in (0, 32, 128, 24) for symmetric in (True, False)]


@pytest.mark.parametrize("bits", op.BITS)
@pytest.mark.parametrize("inputs", [1, 63, 64, 123, 576])
def test_pack_round_trip(bits, inputs):
    codes = torch.randint(0, 2**bits, (5, inputs), dtype=torch.uint8)
    packed = op.pack(codes, bits)
    assert packed.shape[1] == (inputs if bits == 8 else 32 * -(-inputs // 64))
    assert torch.equal(op.unpack(packed, bits, inputs), codes)


@pytest.mark.parametrize("bits,group,symmetric", GRIDS)
def test_error_is_at_most_half_a_step(bits, group, symmetric):
    weight = torch.randn(7, 576, generator=torch.Generator().manual_seed(1))
    packed = op.quantize(weight, bits, group, symmetric)
    size = group or 576
    assert packed.scales.shape == (7, -(-576 // size))
    step = packed.scales.float().abs().repeat_interleave(size, 1)[:, :576]
    error = (op.dequantize(packed) - weight).abs()
    # Asymmetric: a rounded zero point may shift the ends by half a step. Symmetric: the end opposite to the extreme
    # value is one step short.
    assert (error <= step * 1.01).all()
    assert (error <= step * 0.51).float().mean() > 0.95


@pytest.mark.parametrize("bits,group,symmetric", GRIDS)
def test_zeros_stay_zero(bits, group, symmetric):
    weight = torch.randn(6, 200) + 0.5
    weight[torch.rand(weight.shape) < 0.5] = 0
    weight[2] = 0
    kept = op.dequantize(op.quantize(weight, bits, group, symmetric))
    assert (kept[weight == 0] == 0).all()


def test_symmetric_grid_meets_the_extreme_value():
    weight = torch.tensor([[0.5, -2.0, 1.75, 0.0]])
    assert torch.equal(op.dequantize(op.quantize(weight, 4, 0, True)), weight)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e7])
def test_scales_outside_fp16_are_kept_in_fp32(size):
    weight = torch.randn(4, 64) * size
    packed = op.quantize(weight, 8, 32, False)
    assert packed.scales.dtype == torch.float32
    assert (op.dequantize(packed) - weight).abs().max() < 0.03 * size


def test_bits_per_weight_count_scales_and_zeros():
    weight = torch.randn(16, 1024)
    assert op.quantize(weight, 4, 128, True).bits_per_weight == pytest.approx(4 + 16 / 128)
    assert op.quantize(weight, 4, 128, False).bits_per_weight == pytest.approx(4 + 24 / 128)
    assert op.quantize(weight, 8, 0, True).bits_per_weight == pytest.approx(8 + 16 / 1024)


def test_user_mistakes_are_one_line():
    for arguments, words in (((torch.randn(2, 2), 3), "bits=3"), ((torch.randn(2, 2), 4, -1), "negative")):
        with pytest.raises(UserError, match=words):
            op.quantize(*arguments)
    with pytest.raises(UserError, match="finite"):
        op.quantize(torch.tensor([[float("nan")]]))


MATRICES = [
    (rows, outputs, inputs, bits, group, symmetric)
    for rows in (1, 3, 5, 20)
    for outputs, inputs, group in ((33, 123, 32), (40, 576, 128), (7, 200, 0), (16, 96, 24))
    for bits, symmetric in ((4, False), (8, True), (4, True), (8, False))
]


def test_gradient_reaches_the_activations():
    made = op.inputs(op.LinearShape(3, 12, 64, 8, 0, True), "cpu", torch.float32, 0)
    x = made["x"].requires_grad_()
    op.linear(x, made["weight"]).sum().backward()
    torch.testing.assert_close(x.grad, made["dense"].sum(0).expand(3, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*MATRICES, (1, 8192, 8192, 4, 128, False), (64, 4096, 14336, 4, 128, False)], ids=str)
def test_on_gpu(case, dtype):
    made = op.inputs(op.LinearShape(*case), "cuda", dtype, 0)
    for run in (op.triton_linear, op.dequantized_linear):
        torch.testing.assert_close(run(**made), op.reference(**made), **op.tolerance(dtype))
