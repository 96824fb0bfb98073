"""Attention: softmax(Q K' scale) V with grouped-query heads, and the implementations that a benchmark compares.

Shapes: B sequences, Hq query heads, Hkv key and value heads (Hq a multiple of Hkv), Sq queries, Sk keys, D head width.
`q` is (B, Hq, Sq, D), `k` and `v` are (B, Hkv, Sk, D), the result is (B, Hq, Sq, D) in the type of `q`. Query head h
reads key head h // (Hq // Hkv). A causal mask is aligned to the bottom right: query i sees key j when
j <= i + Sk - Sq, so that one new token sees its whole cache. A query that sees no key gives zeros. Where rows hold several
documents, a query sees no key before its own document's first (`Documents`).

`reference` is the specification. `triton_attention` (FlashAttention-2, Dao 2023, arXiv:2307.08691) and `sdpa` are held
against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import UserError
from dyno.kernels import triton_missing

REFERENCE_SCORES_BYTES = 2**30
SDPA_BACKENDS = ("auto", "flash", "cudnn", "efficient", "math")


def _check(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The number of query heads a key head serves; raises UserError when the shapes do not fit."""
    batch, kv_heads, _, dim = k.shape
    if k.shape != v.shape or q.shape[0] != batch or q.shape[3] != dim or q.shape[1] % kv_heads:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UserError(
            f"attention takes q (B, Hq, Sq, D) and k, v (B, Hkv, Sk, D), Hq a multiple of Hkv; got {shapes}"
        )
    return q.shape[1] // kv_heads


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Sq, Sk) booleans, True where a query sees a key; aligned to the bottom right."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Documents:
    """Rows of several documents: `starts` (B, Sq) int32 is the key where the document of each query begins.

    Every query must see a key. The mask is made once, for all layers of a forward pass.
    """

    def __init__(self, starts: Tensor):
        self.starts = starts
        self._made: tuple[Any, Tensor] | None = None

    def bias(self, keys: int, causal: bool, dtype: torch.dtype) -> Tensor:
        """(B, 1, Sq, Sk): 0 where a query sees a key, else -inf."""
        if self._made is None or self._made[0] != (keys, causal, dtype):
            queries, device = self.starts.shape[1], self.starts.device
            seen = torch.arange(keys, device=device) >= self.starts[:, None, :, None]
            if causal:
                seen = seen & causal_mask(queries, keys, device)
            bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)
            self._made = (keys, causal, dtype), bias
        return self._made[1]


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attention as it is written by hand: products in the type of the inputs, softmax in fp32 or wider."""
    _check(q, k, v)
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, -1, dim)  # the heads of one key head side by side: no copy of K and V
    scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, queries, keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (dim**-0.5 if scale is None else scale)
    if documents is not None:
        scores = scores + documents.bias(keys, causal, scores.dtype)
    elif causal and queries > 1:
        visible = causal_mask(queries, keys, q.device)
        # The smallest number and not -inf: softmax of a row without keys, and its gradient, stay finite.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if causal and queries > keys and documents is None:
        weights = weights.masked_fill(~visible, 0.0)
    out = weights.to(v.dtype).view(batch, kv_heads, -1, keys) @ v
    return out.view(batch, heads, queries, dim)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """The specification: `eager` in fp32 (fp64 for fp64 inputs) throughout, rounded once at the end.

    Scores over REFERENCE_SCORES_BYTES are computed for some of the heads, then the others.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[1]
    if kv_heads > 1 and 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > REFERENCE_SCORES_BYTES:
        groups = _check(q, k, v)
        few = (slice(0, kv_heads // 2), slice(kv_heads // 2, None))
        heads = q.unflatten(1, (kv_heads, groups))
        more: dict[str, Any] = {"causal": causal, "scale": scale, "documents": documents}
        return torch.cat([reference(heads[:, s].flatten(1, 2), k[:, s], v[:, s], **more) for s in few], 1)
    with torch.autocast(q.device.type, enabled=False):
        out = eager(q.to(wide), k.to(wide), v.to(wide), causal=causal, scale=scale, documents=documents)
        return out.to(q.dtype)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    documents: Documents | None = None,
    **launch: Any,
) -> Tensor:
    """FlashAttention in Triton; differentiable (see `dyno.kernels._flash` for what the backward does).

    Of rows of several documents it walks over the keys of a tile's own documents only.

    Args:
        launch: `tiles` (a `Tiles`) and `splits` override the heuristics; benchmarks and tests use them.

    Raises:
        UserError: shapes that do not fit, a head width over 128, mixed types, or a CPU without the interpreter.
    """
    from dyno.kernels._flash import flash_attention

    _check(q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    starts = None if documents is None else documents.starts
    return flash_attention(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, starts, **launch)


def decided(condition: Any) -> bool:
    """A plain bool, by a branch: a compiler that traces sizes as symbols makes symbols of comparisons, bool() of them too."""
    if condition:  # noqa: SIM103
        return True
    return False


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, its backend forced unless it is "auto".

    PyTorch aligns its own causal flag to the top left, so it is used for square problems only; one query needs no
    mask; other shapes get an explicit mask, or for the CUDA flash kernel, which takes none, PyTorch's bias object.
    Documents are a mask of the inputs' type.

    Raises:
        RuntimeError: from PyTorch, when the forced backend cannot take these inputs.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    groups = _check(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    square = queries == keys
    bottom_right = causal and queries > 1 and not square and documents is None
    native_bias = bottom_right and backend == "flash" and q.device.type == "cuda"
    if groups > 1 and (backend == "efficient" or native_bias):  # neither knows grouped heads
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    mask: Any = None
    if documents is not None:
        autocast = torch.is_autocast_enabled(q.device.type)
        mask = documents.bias(keys, causal, torch.get_autocast_dtype(q.device.type) if autocast else q.dtype)
    elif native_bias:
        if queries > keys:
            raise UserError(f"sdpa_flash has no causal attention for {queries} queries over {keys} keys")
        mask = causal_lower_right(queries, keys)
    elif bottom_right:
        mask = causal_mask(queries, keys, q.device)
    forced = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if backend not in SDPA_BACKENDS:
        raise UserError(f"attention.backend={backend!r} is none of {', '.join(SDPA_BACKENDS)}")
    with sdpa_kernel(forced[backend]) if backend != "auto" else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale,
            is_causal=decided(causal and square and queries > 1 and documents is None), enable_gqa=decided(groups > 1),
        )  # fmt: skip


@dataclass(frozen=True)
class AttentionShape:
    """One problem of the benchmark; sizes as in the module's text."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = True

    @property
    def name(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"b{self.batch}_h{self.heads}x{self.kv_heads}_q{self.queries}_k{self.keys}_d{self.dim}_{kind}"


def cases(device: torch.device | str) -> Iterator[AttentionShape]:
    """Shapes worth timing there: prefill and decode on a GPU, awkward small ones on a CPU."""
    if torch.device(device).type != "cuda":
        yield AttentionShape(2, 9, 3, 123, 123, 64)
        yield AttentionShape(1, 4, 4, 1, 257, 80)
        yield AttentionShape(1, 4, 2, 5, 70, 128)
        return
    for dim, heads in ((64, 32), (128, 16)):
        for length in (1024, 4096, 16384):
            yield AttentionShape(max(1, 16384 // length), heads, heads, length, length, dim)
    yield AttentionShape(4, 32, 8, 4096, 4096, 128)
    yield AttentionShape(4, 32, 8, 4096, 4096, 128, causal=False)
    for batch, length in ((1, 32768), (16, 8192), (64, 2048)):
        yield AttentionShape(batch, 32, 8, 1, length, 128)


def inputs(shape: AttentionShape, device: torch.device | str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Keyword arguments of an implementation: normal q, k, v, seeded, and the mask's kind."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {
        "q": (shape.batch, shape.heads, shape.queries, shape.dim),
        "k": (shape.batch, shape.kv_heads, shape.keys, shape.dim),
        "v": (shape.batch, shape.kv_heads, shape.keys, shape.dim),
    }
    tensors = {n: torch.randn(size, generator=generator, device=device).to(dtype) for n, size in sizes.items()}
    return {**tensors, "causal": shape.causal}


def implementations(device: torch.device | str) -> dict[str, Callable[..., Tensor]]:
    """What can run there, by name, each called with `**inputs(...)`.

    A peer may still refuse a shape or a type with a RuntimeError that says why; that is a result too.
    """

    def peer(backend: str) -> Callable[..., Tensor]:
        return lambda **arguments: sdpa(**arguments, backend=backend)

    found: dict[str, Callable[..., Tensor]] = {"reference": reference, "eager": eager}
    if triton_missing(device) is None:
        found["triton"] = triton_attention
    peers = SDPA_BACKENDS[1:] if torch.device(device).type == "cuda" else ("flash", "math")
    return found | {f"sdpa_{backend}": peer(backend) for backend in peers}


def flops(shape: AttentionShape) -> float:
    """Multiply-adds counted as two, masked pairs not counted (the convention of the FlashAttention papers)."""
    pairs = shape.queries * shape.keys
    if shape.causal:
        seen = min(shape.queries, shape.keys)
        pairs = seen * (shape.keys - seen) + seen * (seen + 1) // 2
    return 4.0 * shape.batch * shape.heads * shape.dim * pairs


def bytes(shape: AttentionShape, element_bytes: int = 2) -> float:
    """Least traffic: Q, K and V read once, the result written once."""
    query = shape.batch * shape.heads * shape.queries * shape.dim
    key = shape.batch * shape.kv_heads * shape.keys * shape.dim
    return float(element_bytes * (2 * query + 2 * key))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """`atol` and `rtol` of torch.testing.assert_close against the reference, for inputs of unit variance."""
    return {
        torch.float32: {"atol": 2e-5, "rtol": 2e-5},
        torch.float16: {"atol": 2e-3, "rtol": 2e-3},
        torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    }[dtype]
