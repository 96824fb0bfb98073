"""The time of a generate workload by roofline: a prefill of all prompts, then passes of one token a request.

Each product takes as long as its FLOPs or its bytes, attention of a decode pass as long as reading keys and values; and
no pass ends before the host has launched its kernels, as many and as slowly as `dyno.plan.time` takes them to be in a
forward pass of training. On small models that ceiling decides, and it differs by host and kernel: the band is wide. Where
a decode pass is recorded (`graphed_decode`), the host launches it as one; its prefill is launched as any.

Tensor ranks share heads, channels and vocabulary. A layer then ends twice in an all-reduce of its output, and a pass in an
all-gather of the logits; each takes a launch of the host and, on the device, a start and the link's time, and hides behind
nothing. Measured is 8b on two H200s (results/reference/h200-x4/decode-8b): unless passes are recorded, the host's part
decides there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dyno.plan.links import ring_half_s, ring_s, tree_s
from dyno.plan.machine import Machine
from dyno.plan.memory import FP32, block_of, keeps_scores
from dyno.plan.time import LAUNCH_S, PASSES, RAMP_S, UNFUSED_KERNELS, attention_share, product_bytes, product_s
from dyno.technique import Footprint, Shape

# Of the host for one between compiled kernels, in a prefill and in a decode pass: 8b's 64 on two H200s make the former 37 ms
# long where it was 14, the latter 20 to 24 ms where it was 12 to 15.
COLLECTIVE_S = {"prefill": 0.4e-3, "decode": 0.15e-3}
GRAPHED_LAUNCHES = 5  # of a recorded pass: tokens in, the graph, the choice, and the chosen tokens into the text
BAND = 0.6  # of the seven records in results/reference/h100/generate-160m the worst, quantized, is 59% off


@dataclass(frozen=True)
class ServingTime:
    """Seconds by term of the prefill and of one decode pass, the host's launches among them; an empty figure has its
    reason in `reasons`."""

    requests: int
    prefill: dict[str, float]
    decode: dict[str, float]
    band: float = BAND
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        """Time to first token: the prefill of all prompts together."""
        return slower(self.prefill)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token of each request."""
        return None if "tpot_s" in self.reasons else slower(self.decode)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens of all requests."""
        return self.requests / self.tpot_s if self.tpot_s else None

    def to_json(self) -> dict[str, Any]:
        return {
            "label": "predicted", "ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "tokens_per_s": self.tokens_per_s,
            "relative_error": self.band, "prefill_terms_s": self.prefill, "decode_terms_s": self.decode,
            "reasons": self.reasons,
        }  # fmt: skip


def slower(terms: dict[str, float]) -> float:
    """The device works through everything else while the host launches."""
    return max(terms["host"], sum(terms.values()) - terms["host"])


def held(shape: Shape, print_: Footprint) -> Shape:
    """The sizes of a tensor rank's share."""
    n = print_.tensor_ranks
    return replace(
        shape, heads=shape.heads // n, kv_heads=shape.kv_heads // n, ffn=shape.ffn // n, vocab=shape.vocab // n
    )


def value_width(print_: Footprint) -> float:
    """Bytes of a served activation, key or value."""
    return max(2.0, min(FP32, FP32 if print_.weight_bytes is None else print_.weight_bytes))


def wire_bytes(shape: Shape, print_: Footprint, tokens: float = 1.0) -> float:
    """Bytes that a tensor rank sends in a pass of shape.batch requests over `tokens` new tokens each; the logits are
    those of the last.

    An all-reduce of (B, tokens, h) after attention and after the MLP of every layer, as a ring sends it, and an
    all-gather of (B, V).
    """
    ranks = print_.tensor_ranks
    numbers = 4 * shape.layers * tokens * shape.hidden + shape.vocab
    return shape.batch * numbers * value_width(print_) * (ranks - 1) / ranks


def wire_s(shape: Shape, print_: Footprint, machine: Machine, tokens: float) -> float:
    """Seconds of the same collectives."""
    ranks, width, link = print_.tensor_ranks, value_width(print_), machine.link
    if ranks == 1:
        return 0.0
    states, logits = shape.batch * tokens * shape.hidden * width, shape.batch * shape.vocab * width
    reduce = RAMP_S + min(ring_s(ranks, states, link), tree_s(ranks, states, link))
    return 2 * shape.layers * reduce + RAMP_S + ring_half_s(ranks, logits, link)


def stored_width(print_: Footprint) -> float:
    """Bytes of a served weight of a linear layer."""
    return FP32 if print_.weight_bytes is None else print_.weight_bytes * print_.linear_factor


def head_width(print_: Footprint, width: float) -> float:
    """Bytes of a weight of the head, which stays at least as wide as 16 bits."""
    return max(stored_width(print_), min(width, 2.0))


def block_products(shape: Shape) -> list[tuple[int, int]]:
    """(n, k) of a block's products, of as many rows as there are tokens."""
    q, k, h, f = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden, shape.ffn
    return [(q, h), (k, h), (k, h), (h, q), (f, h), (f, h), (h, f)]


def pass_traffic(shape: Shape, print_: Footprint, tokens: float, context: float, width: float) -> dict[str, float]:
    """Bytes that such a pass as `pass_terms` has reads from memory and writes to it, by term; `shape` of a rank's share."""
    rows, layers, stored = shape.batch * tokens, shape.layers, stored_width(print_)
    cached = shape.batch * (context if tokens == 1 else tokens) * shape.kv_heads * shape.head_dim * width
    scores = (3 * width + 2 * FP32) * rows * context * shape.heads if keeps_scores(shape, print_) else 0.0
    return {
        "products": layers * sum(product_bytes(rows, n, m, stored) for n, m in block_products(shape)),
        "attention": layers * 2 * cached * print_.kv_cache_factor,
        "scores": layers * scores,
        "elementwise": layers * 2 * block_of(shape, print_).kept * rows,
        "head": product_bytes(rows, shape.vocab, shape.hidden, head_width(print_, width)),
    }


def pass_terms(
    shape: Shape, print_: Footprint, machine: Machine, kind: str, tokens: float, context: float, width: float
) -> dict[str, float]:
    """Seconds of one forward pass of each of shape.batch requests over `tokens` new tokens, seeing `context` on average.

    Args:
        width: bytes of an activation and of a key or value.
    """
    rate = machine.matmul.get(print_.matmul_dtype or "fp32") or machine.matmul["fp32"]
    stored = stored_width(print_)
    wire, shape = wire_s(shape, print_, machine, tokens), held(shape, print_)
    moved_s = {k: size / machine.memory for k, size in pass_traffic(shape, print_, tokens, context, width).items()}
    rows, layers = shape.batch * tokens, shape.layers
    scored = rows * context * shape.heads
    reached = rate * attention_share(print_, max(tokens, context))
    attention = layers * RAMP_S + max(layers * 4 * scored * shape.head_dim / reached, moved_s["attention"])
    unfused = keeps_scores(shape, print_) and not print_.fused
    kernels = PASSES[print_.fused][0] + (UNFUSED_KERNELS if unfused else 0.0)
    collectives = 2 * layers if print_.tensor_ranks > 1 else 0
    messages_s = COLLECTIVE_S["decode" if tokens == 1 else "prefill"] * collectives
    return {
        "products": layers * sum(product_s(rows, n, m, rate, machine, stored) for n, m in block_products(shape)),
        "attention": attention + moved_s["scores"],
        "elementwise": moved_s["elementwise"],
        "head": product_s(rows, shape.vocab, shape.hidden, rate, machine, head_width(print_, width)),
        "wire": wire,
        "host": LAUNCH_S[print_.fused] * kernels * layers + messages_s if kind == "cuda" else 0.0,
    }


def decode_pass(print_: Footprint, prompt: int, new: int) -> tuple[float, float]:
    """(tokens that a decode pass feeds of a request, the context that they see), averaged over its new tokens."""
    context, cached = prompt + new / 2, print_.kv_cache_factor > 0
    seen = prompt + new + 1 if print_.graphed_decode else context if cached else context / 2
    return 1 if cached else context, seen


def decode_traffic_bytes(shape: Shape, print_: Footprint, prompt: int, new: int) -> float:
    """Bytes that a decode pass of shape.batch requests reads from a rank's memory and writes to it."""
    mine, passes = held(shape, print_), decode_pass(print_, prompt, new)
    return sum(pass_traffic(mine, print_, *passes, value_width(print_)).values())


def serving_time(
    shape: Shape, print_: Footprint, machine: Machine, kind: str, prompt: int, new: int, positions: int = 1
) -> ServingTime:
    """Prefill and decode of a generate workload of shape.batch requests.

    Args:
        positions: tokens a decode pass checks a request; above 1 the number accepted is not known beforehand.
    """
    width = value_width(print_)
    prefill = pass_terms(shape, print_, machine, kind, prompt, prompt / 2, width)
    decode = pass_terms(shape, print_, machine, kind, *decode_pass(print_, prompt, new), width)
    if print_.graphed_decode:
        decode["host"] = min(decode["host"], GRAPHED_LAUNCHES * LAUNCH_S[False])
    why = "how many of the drafted tokens a pass accepts is not known before a run"
    return ServingTime(
        shape.batch, prefill, decode, reasons=dict.fromkeys(("tpot_s", "tokens_per_s"), why) if positions > 1 else {}
    )
