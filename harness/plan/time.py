"""The time of a training step, term by term, from a machine's ceilings: arithmetic only.

A step takes as long as the slowest of the device, which works through products, attention and passes over memory and
waits for what no work hides on the wire, and idles for a pipeline's share; the host, which launches them; and the host's
link. An optimizer on the host steps when all of that is done. Letters are those of `dyno.plan.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dyno.plan.links import group_rate
from dyno.plan.machine import Machine
from dyno.plan.memory import (
    FP32,
    activation_width,
    casts_weights,
    gradient_width,
    keeps_scores,
    leaving_bytes,
    masked,
    parameter_width,
    state_width,
)
from dyno.technique import Footprint, Shape

RAMP_S = 6e-6
# Of the rate of short products, as the probe's, in step after step: a power limit takes the clock back. Right after steps of an
# MFU over 30% it is 1590 to 1845 MHz of 1980 in the middle half of 43 H200 records. Set by the random recipes' errors.
SUSTAINED = 0.9
BACKWARD_ATTENTION = 2.5 / 0.8  # the products of a backward pass over a forward's, at 0.8 of its rate
PASSES = {  # kernels a block: forward, backward
    False: (38.0, 85.0),
    True: (12.0, 20.0),
}
UNFUSED_KERNELS = 8.0
# A chunk of a loss: in place, or with logits that are made again (counted off `kernels/linear_cross_entropy.py`).
CHUNK_KERNELS = {False: 10.0, True: 34.0}
# Of host time a kernel: Python's. Compiled, guards and wrappers of a block's few kernels come to as much and more: 28 to 38
# us in steps of four small micro-batches, 40 in a decode pass of 8b (H100 records).
LAUNCH_S = {False: 20e-6, True: 30e-6}
# Of a block compiled by itself, forward and backward, its guards and wrappers: of 0 to 1.2 ms what leaves the least error over
# 41 records of H100s and H200s.
COMPILED_CALL_S = 1.2e-3
AUTOGRAD = 1.2  # of an eager kernel's host time where a graph is built and walked (H100 records)
# Of an optimizer's kernel: no module, no graph (set to Muon's steps of small models, H200 records).
STEP_LAUNCH_S = 10e-6
STEP_S = 2e-3  # drawing a batch, clipping, the launches of a fused optimizer
STRIDED = 1.5  # eager passes with several inputs and strides, against a plain copy of as many bytes (six H100 records)
# Bytes a number of the queries by a part of a ring's sequence, for its share of the output and of the gradients, in fp32:
# counted off the passes of `_ring.py` between two ranks, three quarters of the queries taking part in a hop.
MERGE_BYTES = (13.0, 16.0)
# Bytes a number of what products with a cast of their own are given: its largest magnitude, read and cast along both of its
# dimensions, which a compiler fuses in part. Eager set to 25 random recipes in fp8.
CAST_BYTES = {False: 12.0, True: 4.0}
# Bytes a logit in chunks, eager, counted off `kernels/linear_cross_entropy.py`: fp32 of them, their log-sum, their slope.
CHUNKED_LOSS = {False: 56.0, True: 74.0}
EDGE_KEYS = 1000.0  # as many more a query costs: tiles on the diagonal, a tile's start and end (1k to 128k, two H100s)
ATTENTION = 0.53  # of the products' rate, by a fused forward pass over many keys: FlashAttention-2 on an H100
LINK_REACHED = 0.66  # of a data sheet's link: NCCL moves 298 of 450 GB/s round a ring of two H100s
OVERLAP = 0.75  # of the gradients and weights on the wire, behind the device's work: 1b by DDP on two H100s

HOST_ADAM = 28 / 1e11  # s a parameter: 28 bytes of weight, moments, gradient by a server's memory (H100 hosts: 0.27 ns)
HOST_ADD = 12 / 1e11  # s a parameter: the gradients of one more micro-batch, read and added there
HOST_STEP_S = 0.04  # and whatever their number: norms, pieces, threads that wake up (models of 11 to 90 M, 10 runs)
TF32_SCORES = 0.5  # of the products' rate, by products as narrow as a head (four H100 and H200 records)

DEVICE = ("products", "head", "attention", "scores", "elementwise", "loss", "weights", "optimizer")


Products = list[tuple[float, float, float]]  # m, n, k of (m, k) by (k, n)


def product_bytes(m: float, n: float, k: float, width: float) -> float:
    """Both operands read once, the result written once."""
    return width * (m * k + k * n + m * n)


def product_s(m: float, n: float, k: float, flop_per_s: float, machine: Machine, width: float) -> float:
    """(m, k) by (k, n): at the ceiling or by its bytes, after the time that filling and draining a device takes."""
    return RAMP_S + max(2 * m * n * k / flop_per_s, product_bytes(m, n, k, width) / machine.memory)


def wire_bytes(print_: Footprint) -> float:
    """Bytes that a rank sends in a step."""
    activations = print_.wire_activations + print_.blocks_again * print_.wire_again
    weights = print_.wire_weights * parameter_width(print_)
    return print_.wire_bytes + weights + activations * activation_width(print_)


def waited_bytes(print_: Footprint) -> float:
    """Those of them that the device stands still for."""
    activations = print_.waited_activations + print_.blocks_again * print_.waited_again
    return print_.waited_bytes + activations * activation_width(print_)


def attention_share(print_: Footprint, keys: float) -> float:
    """A fused forward pass over so many keys: its rate over the matrix products', heads 128 wide."""
    return (print_.attention_rate or ATTENTION) * keys / (keys + EDGE_KEYS)


def forwards_again(print_: Footprint) -> float:
    """Forward passes of the blocks that run again with their products."""
    return 0.0 if print_.keeps_products else print_.blocks_again


def launches_s(shape: Shape, print_: Footprint) -> float:
    """Seconds in which the host launches a step's kernels on a GPU."""
    fused, again = print_.fused, forwards_again(print_)
    calls = shape.layers * print_.layer_factor * print_.micro_batches
    kernels = PASSES[fused][0] * (1 + again) + PASSES[fused][1]
    if keeps_scores(shape, print_) and not fused:
        kernels += UNFUSED_KERNELS * (3 + again)
    if casts_weights(print_) and not fused:
        kernels += 7 * (2 + again)
    host = LAUNCH_S[fused] * kernels * calls * print_.host_factor
    if print_.logits_rows and not print_.fused_loss:
        tokens = shape.batch * shape.seq * print_.batch_factor
        chunks = print_.micro_batches * math.ceil(tokens / print_.logits_rows) * print_.head_factor
        host += LAUNCH_S[False] * CHUNK_KERNELS[print_.loss_made_again] * chunks
    if fused:
        host += print_.host_compiled_s + print_.blocks_again * print_.host_compiled_again_s
        if not print_.fused_loss:  # block by block
            host += COMPILED_CALL_S * calls * (1 + again / 2)
    else:
        host = host * AUTOGRAD + print_.host_s + print_.blocks_again * print_.host_again_s
    launches = print_.step_launches + (0.0 if print_.steps_narrow else print_.cast_launches)
    return host + STEP_LAUNCH_S * launches * print_.layer_factor


def products(shape: Shape, print_: Footprint) -> tuple[Products, Products, Products]:
    """Those of a micro-batch on a rank: a block's forward and backward ones, and the head's."""
    tokens, tensor, h = micro_tokens(shape, print_), print_.width_factor, shape.hidden
    f, vocab = shape.ffn * tensor, shape.vocab * tensor
    width, keys = shape.heads * shape.head_dim * tensor, shape.kv_heads * shape.head_dim * tensor
    pairs = [(width, h), (keys, h), (keys, h), (h, width), (f, h), (f, h), (h, f)]
    backward = [product for n, k in pairs for product in ((tokens, k, n), (n, k, tokens))]
    head = [(tokens, vocab, h), (tokens, h, vocab), (vocab, h, tokens)]
    if print_.loss_made_again:
        head.append(head[0])
    return [(tokens, n, k) for n, k in pairs], backward, head


def micro_tokens(shape: Shape, print_: Footprint) -> float:
    """Tokens of one micro-batch on a rank."""
    return shape.batch * shape.seq * print_.batch_factor


def traffic(shape: Shape, print_: Footprint) -> dict[str, float]:
    """Bytes that a step reads from a rank's memory and writes to it, by term: what each kernel takes and leaves once."""
    w, fused = activation_width(print_), print_.fused
    mixed = w < FP32
    micro, tensor, tokens = print_.micro_batches, print_.width_factor, micro_tokens(shape, print_)
    h, f = shape.hidden, shape.ffn * tensor
    width, keys = shape.heads * shape.head_dim * tensor, shape.kv_heads * shape.head_dim * tensor
    again, products_again = print_.blocks_again, forwards_again(print_)
    calls = shape.layers * print_.layer_factor * micro

    forward, backward, head = (sum(product_bytes(*p, w) for p in some) for some in products(shape, print_))
    # Queries, keys, values and the output; in the backward pass these and their gradients.
    attention = 2 * w * tokens * (width + keys) * (3 + products_again)
    scores = 0.0
    if keeps_scores(shape, print_):
        pairs_seen = tokens * shape.seq * shape.heads * tensor
        scores = pairs_seen * (w + 8 if fused else 3 * w + 34) * (1 + again + 1.3)

    norm = 4 * w if fused else (34.0 if mixed else 28.0)
    rope = 4 * w if fused else 12 * w
    mlp = 3 * w if fused else 5 * w
    forward_bytes = 2 * norm * h + rope * (width + keys) + mlp * f + (0 if fused else 6 * w * h)
    backward_bytes = (
        2 * (6 * w if fused else 2.4 * norm) * h + 1.2 * rope * (width + keys) + (8 * w if fused else 9 * w) * f
    )
    merged = print_.merged_parts * width * (MERGE_BYTES[0] * (1 + again) + MERGE_BYTES[1])
    if print_.cast_bytes is not None:
        forward_bytes += CAST_BYTES[fused] * (2 * h + width + f)
        backward_bytes += CAST_BYTES[fused] * (2 * h + width + 2 * keys + 2 * f)
    logit = 4 * w if print_.fused_loss else (44.0 if mixed else 32.0)
    if print_.loss_made_again:
        logit = 8 * w if print_.fused_loss else CHUNKED_LOSS[mixed]
    logit = logit if print_.loss_passes is None else w * print_.loss_passes

    split = print_.layer_factor * tensor
    stored, gradient, state = parameter_width(print_), gradient_width(print_), state_width(print_)
    casts = casts_weights(print_)  # of the blocks; autocast casts the head all the same
    cast = shape.linear_parameters * split if casts else shape.vocab * h * tensor * print_.head_factor
    weights = micro * cast * (2 * (stored + w) if w < stored else 0.0)
    weights += micro * shape.linear_parameters * split * (3 * gradient if micro > 1 else 0.0)
    mine = shape.parameters * split * print_.optimizer_factor
    moved = 2 * (stored + state + print_.master_bytes) + 4 * gradient  # read and written; gradients also clipped
    moved += 0.0 if print_.steps_narrow else print_.step_traffic
    return {
        "products": calls * (forward * (1 + products_again) + backward),
        "head": micro * head * print_.head_factor, "attention": calls * attention, "scores": calls * scores,
        "elementwise": calls * tokens * (forward_bytes * (1 + again) + backward_bytes + merged),
        "loss": micro * tokens * shape.vocab * tensor * logit * print_.head_factor, "weights": weights,
        "optimizer": mine * moved + print_.gathered_traffic_bytes * print_.layer_factor,
    }  # fmt: skip


def step_terms(shape: Shape, print_: Footprint, machine: Machine, kind: str) -> dict[str, float]:
    """Seconds of a step on one rank by term, each as if it were alone. A dtype without a ceiling takes fp32's."""
    w, fused = activation_width(print_), print_.fused
    dtype = print_.matmul_dtype or "fp32"
    rates = {name: (SUSTAINED if kind == "cuda" else 1.0) * rate for name, rate in machine.matmul.items()}
    flop_per_s = rates.get(print_.wide_dtype or dtype) or rates["fp32"]  # of head and attention
    block_rate = rates.get(dtype) or flop_per_s * (print_.matmul_gain or 1.0)
    micro, tokens = print_.micro_batches, micro_tokens(shape, print_)
    calls, products_again = shape.layers * print_.layer_factor * micro, forwards_again(print_)
    moved_s = {name: size / machine.memory for name, size in traffic(shape, print_).items()}

    def products_s(some: Products, rate: float) -> float:
        return sum(product_s(*product, rate, machine, w) for product in some)

    of_forward, of_backward, of_head = products(shape, print_)
    forward, backward = products_s(of_forward, block_rate), products_s(of_backward, block_rate)
    head = products_s(of_head, flop_per_s) * print_.head_factor
    pairs_seen = tokens * shape.seq * shape.heads * print_.width_factor  # query and key pairs, masked ones included
    if keeps_scores(shape, print_):
        wide = max(rates["fp32"], TF32_SCORES * flop_per_s if dtype == "tf32" else 0.0)
        whole = 4 * pairs_seen * shape.head_dim / (flop_per_s if print_.score_copy else wide)
        attention = whole * (3 + products_again)
    else:
        # Narrow heads feed the tensor cores badly; in fp32 there are none, and a kernel comes near the products' rate.
        narrow = flop_per_s * attention_share(print_, shape.seq) * 1.25 * shape.head_dim / (shape.head_dim + 32.0)
        rate = narrow if w < FP32 else 0.9 * rates["fp32"]
        # What a mask in memory hides is computed too: 2.3x causal attention's time by cuDNN on an H100, at 8 x 2048.
        seen = 4.0 if masked(print_) else 2.0 * (print_.document_share if print_.skips_documents else 1.0)
        attention = seen * pairs_seen * shape.head_dim / rate * (1 + products_again + BACKWARD_ATTENTION)
    step_rate = rates.get("bf16" if kind == "cuda" else "fp32") or flop_per_s
    optimizer = moved_s["optimizer"] + print_.step_flops * print_.layer_factor / step_rate

    host = launches_s(shape, print_) if kind == "cuda" else 0.0
    # Tensor ranks are each other's neighbours, then context ranks; whoever shares weights is so many GPUs apart.
    near = LINK_REACHED * group_rate(print_.tensor_ranks * print_.context_ranks, 1, machine.levels)
    far = LINK_REACHED * group_rate(print_.ranks // print_.tensor_ranks, print_.tensor_ranks, machine.levels)
    link = micro * (print_.host_traffic_bytes + w * print_.host_weights + 2 * leaving_bytes(shape, print_, kind))
    terms = {
        "products": calls * (forward * (1 + products_again) + backward), "head": micro * head,
        "attention": calls * attention, "scores": moved_s["scores"],
        "elementwise": moved_s["elementwise"] * (1.0 if fused else STRIDED), "loss": moved_s["loss"],
        "weights": moved_s["weights"], "optimizer": optimizer,
        "host": host, "fixed": STEP_S if kind == "cuda" else 0.0,
        "wire": (wire_bytes(print_) - waited_bytes(print_)) / far, "waited": waited_bytes(print_) / near,
        "offload": link / machine.host_bytes_per_s,
        "host update": max(HOST_ADAM * print_.host_updates, print_.host_return_bytes / machine.host_bytes_per_s)
        + HOST_ADD * print_.host_updates * (micro - 1)
        + HOST_STEP_S * (kind == "cuda" and print_.host_updates > 0),
    }  # fmt: skip
    if print_.waits_for_step:  # the host launches nothing while the optimizer runs
        late = host - terms["waited"] - sum(terms[name] for name in DEVICE if name != "optimizer")
        terms["fixed"] += min(optimizer, max(0.0, late))
    return terms


def slowest(shape: Shape, prints: Sequence[Footprint], machine: Machine, kind: str) -> dict[str, float]:
    """`step_terms` of the rank that all others wait for."""
    every = [(step_terms(shape, one, machine, kind), one.bubble) for one in prints]
    return max(every, key=lambda rank: step_s(*rank))[0]


def step_s(terms: dict[str, float], bubble: float = 0.0) -> float:
    """Seconds of a step from its terms: the slowest of device with its waits and idle share, host, and host's link."""
    device = sum(terms[name] for name in DEVICE)
    exposed = max(terms["wire"] - OVERLAP * device, (1 - OVERLAP) * terms["wire"])
    device = (device + terms["waited"] + exposed) / (1 - min(bubble, 0.99))
    # A late host gives the wire time, and a pipeline's hosts do not wait for each other: they launch ahead.
    return max(device, terms["host"], terms["offload"]) + terms["fixed"] + terms["host update"]
