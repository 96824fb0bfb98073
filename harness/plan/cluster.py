"""A training step over many GPUs: memory and time of one layout on a cluster, arithmetic only.

The model is the decoder of `harness/model`, or any published one that states its sizes. Constants that no data sheet
states are in `Efficiency`; they were fitted to one half of `benchmarks/published_runs.yaml` and judged on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyno.composition import written
from dyno.errors import UserError
from dyno.plan.links import (
    Level,
    Link,
    Spans,
    domain_of,
    half_s,
    hierarchical_s,
    levels_of,
    merged,
    ring_half_s,
    spans,
)  # fmt: skip
from dyno.plan.memory import block_of
from dyno.technique import Footprint, Shape

FUSED = Footprint(fused=True, fused_loss=True, activation_width=2.0)
RECOMPUTED = {"none": 0.0, "selective": 0.0, "alternate": 0.5, "full": 1.0}  # forward passes once more
RESERVE = 0.08  # of a device's memory, for the context, workspaces and fragmentation


@dataclass(frozen=True)
class Layout:
    """How a step is split. dp x tp x pp x cp GPUs; `micro` sequences a micro-batch; `virtual` stages a rank.

    `recompute` is none, selective (the score matrix, where attention is not fused), alternate (every other product or
    block) or full.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 1
    micro: int = 1
    virtual: int = 1
    recompute: str = "none"
    async_tp: bool = False

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    def words(self) -> str:
        return f"dp {self.dp} x tp {self.tp} x pp {self.pp} x cp {self.cp}"

    def overrides(self, batch: int, dtype: str = "bf16") -> list[str]:
        """What to write on the command line for it, by conf/layout.yaml, which knows the options."""
        known, count = written("", "layout", plugins=[]), batch // (self.dp * self.micro)
        cuts = {"virtual_stages": self.virtual > 1, "stages": self.pp > 1, "micro_batches": count > 1}
        split = next((name for name, there in cuts.items() if there), "")
        chosen = known["dtype"].get(dtype, []), known["recompute"].get(self.recompute, []), known.get(split, [])
        return [word.format(**vars(self), count=count) for words in (known["always"], *chosen) for word in words]


@dataclass(frozen=True)
class Cluster:
    """Alike GPUs; `levels` from the node outwards, the last without an end. Peaks are the vendor's dense ones."""

    flop_per_s: float
    bytes_per_s: float
    memory_bytes: float
    levels: tuple[Level, ...]
    generation: str = "h100"

    @property
    def node(self) -> int:
        return int(self.levels[0].gpus)

    @property
    def domain(self) -> int:
        """GPUs that reach each other as fast as those of one node do."""
        return domain_of(self.levels)


@dataclass(frozen=True)
class Efficiency:
    """What no data sheet states. `products`: the share of the peak that large products reach, by generation of GPU;
    `elementwise`: passes over memory, against those of a fused block; `overlap`: the share of gradient and weight
    traffic that hides behind compute; `unfused`: bytes a query-key pair where attention lies in memory; `wide`: hidden
    units a rank at which products are half as good as they get."""

    products: Mapping[str, float]
    elementwise: float = 6.0
    eager: float = 2.0
    overlap: float = 0.784
    unfused: float = 36.6
    wide: float = 138.0


# Of a100 and h100 fitted; the others taken over from the nearest generation, unmeasured.
DEFAULT = Efficiency({"v100": 0.706, "a100": 0.706, "h100": 0.621, "b200": 0.621})
TAKEN_OVER = {"v100": "a100", "b200": "h100"}
# Relative, of a step: the worst of the published runs on A100s and H100s that nothing was fitted to, `held_out` in
# results/reference/planner/published_runs.json, and how many there are.
PUBLISHED_ERROR, PUBLISHED_RUNS = 0.1102, 16
GENERATIONS = {7: "v100", 8: "a100", 9: "h100", 10: "b200"}  # by the first number of the compute capability


def cluster_of(hardware: Mapping[str, Any], dtype: str = "bf16") -> Cluster:
    """The cluster that a hardware option states.

    Raises:
        UserError: it states no node, no network, a rack that holds no whole nodes, or no peak of this dtype.
    """
    for key in ("node", "network", "peak_flop_per_s", "peak_byte_per_s", "memory_bytes"):
        if not hardware.get(key):
            raise UserError(
                f"a plan for several nodes needs hardware.{key}: use hardware=h100, h100_racks, a100, h200, b200, gb200 "
                "or v100"
            )
    if hardware["peak_byte_per_s"]["value"] is None:
        raise UserError("hardware.peak_byte_per_s.value is not stated")
    peaks, node, rack = hardware["peak_flop_per_s"], hardware["node"], hardware.get("rack")
    if not peaks.get(dtype):
        raise UserError(f"hardware.peak_flop_per_s.{dtype} is not stated; there is {', '.join(k for k in peaks)}")
    if rack and int(rack["gpus"]) % int(node["gpus"]):
        raise UserError(f"hardware.rack.gpus={rack['gpus']} is no multiple of hardware.node.gpus={node['gpus']}")
    generation = GENERATIONS.get((hardware.get("capability") or [9])[0], "h100")
    return Cluster(
        float(peaks[dtype]), float(hardware["peak_byte_per_s"]["value"]), float(hardware["memory_bytes"]),
        levels_of(hardware), generation,
    )  # fmt: skip


def layer_matrices(shape: Shape) -> float:
    """Matrix weights of one block."""
    return shape.block_parameters / shape.layers


def model_flops(shape: Shape, causal: bool = True) -> float:
    """FLOPs of a step without recomputation: 6 a matrix weight and token, and attention's."""
    attention = (6 if causal else 12) * shape.layers * shape.heads * shape.head_dim * shape.seq
    return shape.batch * shape.seq * (6.0 * shape.linear_parameters + attention)


def in_flight(layout: Layout, count: int) -> float:
    """Micro-batches whose activations the first stage holds."""
    if layout.virtual > 1:
        return min(count, layout.pp) * (1 + (layout.pp - 1) / (layout.pp * layout.virtual))
    return min(count, layout.pp)


def data_group(layout: Layout, cluster: Cluster) -> Spans:
    """What the ranks that share gradients cross: dp x cp of them, tp GPUs apart."""
    return spans(layout.dp * layout.cp, layout.tp, cluster.levels)


def trained_on_a_rank(shape: Shape, layout: Layout) -> float:
    """Parameters whose gradients a rank sends: its layers' and one end's."""
    return layer_matrices(shape) * shape.layers / layout.pp / layout.tp + shape.vocab * shape.hidden / layout.tp


def slowest(found: Spans) -> Link:
    """The link that one ring through a group waits for; of a group of one, any."""
    return merged(found)[0].link if found else Link(math.inf, 0.0)


def memory_terms(shape: Shape, layout: Layout) -> dict[str, float]:
    """Bytes on the fullest rank: bf16 weights, fp32 gradients and masters, Adam; activations in flight; logits."""
    count = shape.batch // (layout.dp * layout.micro)
    share = layout.dp * layout.cp
    edge = shape.vocab * shape.hidden / layout.tp
    ends = 1 if layout.pp > 1 or shape.tied else 2
    mine = layer_matrices(shape) * math.ceil(shape.layers / layout.pp) / layout.tp + ends * edge
    tokens = layout.micro * shape.seq / layout.cp
    block = block_of(shape, FUSED)
    again = RECOMPUTED[layout.recompute]
    kept = again * block.boundary + (1 - again) * block.kept
    layers = shape.layers / layout.pp
    inside = block.kept * tokens / layout.tp if again else 0.0
    gathered = 2 * 2 * layer_matrices(shape) / layout.tp if layout.zero == 3 else 0.0
    return {
        "weights": 2.0 * mine / (share if layout.zero == 3 else 1) + gathered,
        "gradients": 4.0 * mine / (share if layout.zero >= 2 else 1),
        "optimizer": 12.0 * mine / (share if layout.zero >= 1 else 1),
        "activations": kept * tokens / layout.tp * layers * in_flight(layout, count) + inside,
        "logits": (4.0 + 2.0) * tokens * shape.vocab / layout.tp,
    }


def time_terms(
    shape: Shape, layout: Layout, cluster: Cluster, efficiency: Efficiency = DEFAULT, *,
    eager: bool = False, unfused_attention: bool = False, causal: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step by term; their sum is the step."""
    count = shape.batch // (layout.dp * layout.micro)
    tokens = layout.micro * shape.seq / layout.cp
    rate = cluster.flop_per_s * efficiency.products[cluster.generation]
    width = shape.hidden / layout.tp
    rate *= width / (width + efficiency.wide)
    layers = shape.layers / layout.pp
    again = RECOMPUTED[layout.recompute]
    forwards = 3.0 + again
    pairs = tokens * shape.seq * shape.heads / layout.tp
    whole = 4 * pairs * shape.head_dim * (0.5 if causal and not unfused_attention else 1.0)
    # A fused backward pass multiplies two and a half times as much as its forward; both at about 0.6 of large products.
    attention = whole * (forwards if unfused_attention else forwards + 0.5)
    products = 2 * layer_matrices(shape) / layout.tp * tokens * forwards
    attention_s = attention / rate / (1.0 if unfused_attention else 0.6)
    if unfused_attention:
        matrices = 4.0 if layout.recompute == "selective" else forwards
        attention_s += efficiency.unfused * pairs * matrices / 3 / cluster.bytes_per_s
    block = block_of(shape, FUSED)
    passes = efficiency.elementwise * (efficiency.eager if eager else 1.0)
    elementwise = passes * block.kept * tokens / layout.tp * forwards / 3 / cluster.bytes_per_s
    head = 6 * shape.vocab * shape.hidden / layout.tp * tokens / rate / layout.pp
    per_micro = layers * (products / rate + attention_s + elementwise) + head

    message = 2 * tokens * shape.hidden
    calls = 4.0 + 2.0 * again
    tensor = layers * calls * 2 * half_s(spans(layout.tp, 1, cluster.levels), message)
    tensor *= 0.5 if layout.async_tp else 1.0
    keys = 2 * 2 * tokens * shape.kv_heads * shape.head_dim / layout.tp
    around = slowest(spans(layout.cp, layout.tp, cluster.levels))
    ring = layers * 3 * ring_half_s(layout.cp, keys * layout.cp, around)
    context = max(0.0, ring - layers * attention_s * efficiency.overlap)

    hops = 2 * layout.virtual * (layout.pp > 1)
    onward = slowest(spans(layout.pp, layout.gpus // layout.pp, cluster.levels))
    stages = hops * (onward.latency_s + message / layout.tp / onward.bytes_per_s)
    busy = count * (per_micro + tensor + context)
    bubble = (layout.pp - 1) / layout.virtual * (per_micro + tensor + context + stages)

    mine, group = trained_on_a_rank(shape, layout), layout.dp * layout.cp
    crossed = data_group(layout, cluster)
    each_time = half_s(crossed, 2 * mine)  # 16-bit weights; gradients are twice as wide
    if layout.zero == 3:  # gathered in both passes of every micro-batch, which hides all but the edges
        wire, window, last = count * 3 * each_time, busy, 3 * each_time
    elif layout.zero == 2:
        last = 3 * each_time
        wire, window = count * 2 * each_time + each_time, busy
    elif layout.zero == 1:
        wire = last = 3 * each_time
        window = (per_micro + tensor) * 2 / 3 * min(count, layout.pp)
    else:
        wire = last = hierarchical_s(crossed, 4 * mine)
        window = (per_micro + tensor) * 2 / 3
    hidden = efficiency.overlap
    data = max(wire - hidden * window, (1 - hidden) * last) if group > 1 else 0.0
    optimizer = 34 * mine / (group if layout.zero >= 1 else 1) / cluster.bytes_per_s
    return {
        "products": count * (layers * products / rate + head), "attention": count * layers * attention_s,
        "elementwise": count * layers * elementwise, "tensor wire": count * tensor, "context wire": count * context,
        "stage wire": count * stages, "bubble": bubble, "data wire": data, "optimizer": optimizer,
    }  # fmt: skip


def fits(shape: Shape, layout: Layout, cluster: Cluster) -> bool:
    return sum(memory_terms(shape, layout).values()) <= cluster.memory_bytes * (1 - RESERVE)
