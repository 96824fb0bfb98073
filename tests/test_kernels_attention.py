"""The Triton attention in the interpreter against the reference, and what its compiled form contains."""

import math
from functools import partial

import pytest
import torch

from dyno.kernels import attention as op
from dyno.kernels import operation, operations


def problem(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32, seed=0):
    shape = op.AttentionShape(batch, heads, kv_heads, queries, keys, dim)
    made = op.inputs(shape, "cpu", dtype, seed)
    return made["q"], made["k"], made["v"]


def naive(q, k, v, causal):
    """One query at a time, in fp64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    shift = k.shape[2] - q.shape[2]
    for b, h, i in [(b, h, i) for b in range(q.shape[0]) for h in range(q.shape[1]) for i in range(q.shape[2])]:
        g = h // (q.shape[1] // k.shape[1])
        seen = i + shift + 1 if causal else k.shape[2]
        if seen > 0:
            scores = k[b, g, :seen].double() @ q[b, h, i].double() / math.sqrt(q.shape[3])
            out[b, h, i] = torch.softmax(scores, 0) @ v[b, g, :seen].double()
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries,keys", [(5, 5), (1, 7), (3, 7), (7, 3)])
def test_reference_is_attention(queries, keys, causal):
    q, k, v = problem(2, 6, 2, queries, keys, 16)
    torch.testing.assert_close(
        op.reference(q, k, v, causal=causal).double(), naive(q, k, v, causal), atol=1e-6, rtol=1e-5
    )


CASES = [
    (5, 3, 3, 123, 123, 64, True),
    (1, 9, 3, 123, 123, 64, True),
    (2, 2, 1, 40, 123, 80, True),
    (1, 2, 2, 123, 40, 64, True),  # the first 83 queries see nothing
    (2, 4, 2, 33, 70, 128, False),
    (2, 9, 3, 1, 123, 64, True),
    (1, 2, 2, 1, 1, 16, True),
    (1, 2, 1, 17, 17, 20, True),
]


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sdpa_matches_reference(case, backend):
    q, k, v = problem(*case[:-1])
    out = op.sdpa(q, k, v, causal=case[-1], backend=backend)
    torch.testing.assert_close(out, op.reference(q, k, v, causal=case[-1]), **op.tolerance(torch.float32))


DOCUMENTS = [[[40]], [[1] * 7], [[3, 1, 36], [38, 1, 1]], [[16, 16, 16], [17, 15, 16]], [[5, 70, 2, 16, 1], [94]]]


def starts_of(lengths):
    """(B, S) int32 of rows of documents so long: where each begins."""
    rows = [[sum(row[:i]) for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("name", ["eager", "auto", "flash", "math"])
@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_documents_attend_as_if_alone(lengths, name):
    q, k, v = problem(len(lengths), 4, 2, sum(lengths[0]), sum(lengths[0]), 16)
    documents = op.Documents(starts_of(lengths))
    attend = op.eager if name == "eager" else partial(op.sdpa, backend=name)
    out = attend(q, k, v, documents=documents)
    for row, inside in enumerate(lengths):
        at = 0
        for length in inside:
            alone = [x[row : row + 1, :, at : at + length] for x in (q, k, v)]
            got = out[row : row + 1, :, at : at + length]
            torch.testing.assert_close(got, op.reference(*alone), atol=2e-5, rtol=2e-5)
            at += length


def test_every_operation_has_the_same_surface():
    assert "attention" in operations()
    for name in operations():
        module = operation(name)
        for shape in module.cases("cpu"):
            arguments = module.inputs(shape, "cpu", torch.float32, 1)
            expected = module.reference(**arguments)
            assert module.flops(shape) > 0 and module.bytes(shape) > 0 and shape.name
            for run in module.implementations("cpu").values():
                torch.testing.assert_close(run(**arguments), expected, **module.tolerance(torch.float32))


def test_flops_count_visible_pairs():
    assert op.flops(op.AttentionShape(1, 1, 1, 4, 4, 1)) == 4 * 10
    assert op.flops(op.AttentionShape(1, 1, 1, 1, 9, 1)) == 4 * 9
    assert op.flops(op.AttentionShape(1, 1, 1, 2, 3, 1)) == 4 * 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, (1, 8, 2, 1000, 1000, 128, True), (2, 8, 2, 1, 5000, 128, True)], ids=str)
def test_on_gpu(case, dtype):
    q, k, v = (x.cuda() for x in problem(*case[:-1], dtype))
    out = op.triton_attention(q, k, v, causal=case[-1])
    torch.testing.assert_close(out, op.reference(q, k, v, causal=case[-1]), **op.tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["triton", "auto", "efficient", "math", "eager"])
@pytest.mark.parametrize("lengths", [*DOCUMENTS, [[300, 1, 700, 23], [1023, 1]]], ids=str)
def test_documents_on_gpu(lengths, name, dtype):
    tokens, grads, tolerance = sum(lengths[0]), [], op.tolerance(dtype)
    documents = op.Documents(starts_of(lengths).cuda())
    own = {"triton": op.triton_attention, "eager": op.eager}
    for fn in (op.reference, own.get(name) or partial(op.sdpa, backend=name)):
        tensors = [x.cuda().requires_grad_() for x in problem(len(lengths), 4, 2, tokens, tokens, 64, dtype)]
        out = fn(*tensors, documents=documents)
        (out * torch.linspace(-1, 1, 64, device="cuda")).sum().backward()
        grads.append([out.detach(), *(x.grad for x in tensors)])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=4 * tolerance["atol"], rtol=4 * tolerance["rtol"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn", "efficient", "math"])
@pytest.mark.parametrize("case", [(2, 9, 3, 123, 123, 64), (2, 9, 3, 1, 123, 64), (1, 4, 2, 40, 123, 128)], ids=str)
def test_sdpa_backends_on_gpu(case, backend, dtype):
    q, k, v = (x.cuda() for x in problem(*case, dtype))
    torch.testing.assert_close(op.sdpa(q, k, v, backend=backend), op.reference(q, k, v), **op.tolerance(dtype))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """A cache of 2.1e9 elements a tensor: the last sequence must be read where it lies."""
    k = torch.zeros(17, 1, 1_000_000, 128, dtype=torch.bfloat16, device="cuda")
    k[-1, 0, -1] = 1.0
    q = torch.full((17, 1, 1, 128), 4.0, dtype=torch.bfloat16, device="cuda")
    assert op.triton_attention(q, k, k)[-1].float().mean().item() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_in_parts_is_the_reference(causal, monkeypatch):
    given = op.inputs(op.AttentionShape(2, 10, 5, 7, 12, 16, causal), "cpu", torch.float32, 3)
    whole = op.reference(**given)
    monkeypatch.setattr(op, "REFERENCE_SCORES_BYTES", 1000)
    torch.testing.assert_close(op.reference(**given), whole, atol=1e-6, rtol=0)


def test_sdpa_is_one_graph_when_sizes_are_symbols():
    compiled = torch.compile(op.sdpa, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries, keys in ((7, 7), (9, 9), (1, 12)):
        given = problem(2, 4, 2, queries, keys, 16)
        torch.testing.assert_close(compiled(*given), op.sdpa(*given))
