"""The best layouts of a model on so many GPUs: every split that divides, those that fit, the quickest first."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dyno.errors import UserError
from dyno.measure.environment import Device
from dyno.plan import Plan, predict
from dyno.plan.cluster import RESERVE, Cluster, Layout, fits, memory_terms, model_flops, time_terms
from dyno.recipe import Recipe, compose
from dyno.technique import Shape
from dyno.units import apart

MOST_STAGES = 64
BEST = 5
MOST_PLANNED = 60  # layouts that are planned as recipes
WIRES = ("tensor wire", "context wire", "stage wire", "data wire", "bubble")


@dataclass(frozen=True)
class Candidate:
    """A layout with its predicted step, memory and share of the peak (model FLOPs, causal attention counted once); what to
    write for it, and what the plan says of it as a recipe."""

    layout: Layout
    seconds: dict[str, float]
    bytes: dict[str, float]
    mfu: float
    tokens_per_s: float
    overrides: list[str] = field(default_factory=list)
    plan: Plan | None = None

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> float:
        return sum(self.bytes.values())

    def why(self) -> str:
        """What costs it most beside the products, and what fills its memory."""
        lost = max(WIRES, key=lambda name: self.seconds[name])
        full = max(self.bytes, key=lambda name: self.bytes[name])
        return f"{lost} {self.seconds[lost] / self.step_s:.0%} of the step; {full} {self.bytes[full] / 2**30:.0f} GiB"

    @property
    def longest_s(self) -> float:
        """The longer of the two steps: that of an engine tuned to the cluster, and the recipe's."""
        return max(self.step_s, (self.plan and self.plan.step_s) or 0.0)

    def to_json(self) -> dict[str, Any]:
        recipe = {"step_time_s": self.plan.step_s, "needed_bytes": self.plan.needed_bytes} if self.plan else None
        return {
            "layout": vars(self.layout), "step_time_s": self.step_s, "time_terms_s": self.seconds,
            "memory_bytes": self.memory_bytes, "terms_bytes": self.bytes, "mfu": self.mfu,
            "tokens_per_s": self.tokens_per_s, "overrides": self.overrides, "as_recipe": recipe,
        }  # fmt: skip


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def layouts(shape: Shape, gpus: int, node: int, domain: int | None = None) -> Iterator[Layout]:
    """Every layout of exactly `gpus` GPUs whose parts divide: heads by tp, layers by stages.

    tp stays inside a node of so many GPUs, or takes whole nodes of a `domain` whose links are as fast.
    """
    tensors = [
        t for t in range(1, min(gpus, domain or node) + 1)
        if (node % t == 0 or t % node == 0) and shape.heads % t == 0 and shape.kv_heads % t == 0
    ]  # fmt: skip
    stages = [p for p in range(1, min(shape.layers, MOST_STAGES, gpus) + 1) if gpus % p == 0]
    contexts = [c for c in (1, 2, 4, 8, 16) if shape.seq % (2 * c) == 0 and shape.seq // c >= 2048 or c == 1]
    for tp, pp, cp in itertools.product(tensors, stages, contexts):
        if gpus % (tp * pp * cp) or (pp > 1 and shape.layers % pp and shape.layers // pp < 4):
            continue
        dp = gpus // (tp * pp * cp)
        for micro, recompute in itertools.product((1, 2, 4, 8), ("none", "full")):
            if shape.batch % (dp * micro):
                continue
            count = shape.batch // (dp * micro)
            if count < pp:
                continue
            virtuals = (
                [1]
                if pp == 1
                else [v for v in (1, 2, 4, 8) if v == 1 or (shape.layers % (pp * v) == 0 and count % pp == 0)]
            )
            zeros = (1, 2, 3) if pp == 1 and dp * cp > 1 else (1,)  # a pipeline keeps a stage's gradients whole: zero=1
            for virtual, zero in itertools.product(virtuals, zeros):
                yield Layout(dp, tp, pp, cp, zero, micro, virtual, recompute)


def search(shape: Shape, gpus: int, cluster: Cluster, best: int = BEST) -> tuple[list[Candidate], int, int]:
    """(the best candidates, layouts looked at, those that fit). Alike layouts are told apart by dp, tp, pp and cp."""
    found: dict[tuple[int, ...], Candidate] = {}
    looked = fitting = 0
    flops = model_flops(shape)
    for layout in layouts(shape, gpus, cluster.node, cluster.domain):
        looked += 1
        if not fits(shape, layout, cluster):
            continue
        fitting += 1
        seconds = time_terms(shape, layout, cluster)
        step = sum(seconds.values())
        key = (layout.dp, layout.tp, layout.pp, layout.cp)
        if key in found and found[key].step_s <= step:
            continue
        found[key] = Candidate(
            layout, seconds, memory_terms(shape, layout), flops / (step * gpus * cluster.flop_per_s),
            shape.batch * shape.seq / step,
        )  # fmt: skip
    return sorted(found.values(), key=lambda c: c.step_s)[:best], looked, fitting


def parse(text: str) -> int:
    """'gpus=1024' -> 1024."""
    match = re.fullmatch(r"(?:gpus=)?(\d+)", text.strip())
    if not match or int(match.group(1)) < 1:
        raise UserError(f"--search {text}: write --search gpus=1024")
    return int(match.group(1))


def best_layouts(shape: Shape, gpus: int, cluster: Cluster) -> tuple[list[Candidate], int, int]:
    """Search, or say why nothing is found.

    Raises:
        UserError: the batch cannot be split so, or nothing fits.
    """
    candidates, looked, fitting = search(shape, gpus, cluster, MOST_PLANNED)
    if not looked:
        raise UserError(
            f"no layout splits workload.batch={shape.batch} sequences over {gpus} GPUs: a batch with more divisors, such "
            f"as workload.batch={gpus * max(1, 2**22 // (gpus * shape.seq))}"
        )
    if not fitting:
        raise UserError(why_none_fits(shape, gpus, cluster, looked))
    return candidates, looked, fitting


def ineffective(recipe: Recipe) -> list[str]:
    """Overrides of axes that the search chooses itself, or has no arithmetic for."""
    return [word for word in recipe.overrides if re.split(r"[.=]", word.lstrip("+~"))[0] in recipe.techniques]


def as_recipes(
    recipe: Recipe, found: list[Candidate], batch: int, dtype: str, device: Device
) -> tuple[list[Candidate], str | None]:
    """The best of the candidates, quickest first, that the plan lets run as recipes, by the longer of both steps.

    Where it lets none run, the quickest as they are, and why the first cannot.
    """
    kept: list[Candidate] = []
    refused = None
    found = [replace(c, overrides=c.layout.overrides(batch, dtype)) for c in found]
    for candidate in found:
        if len(kept) >= BEST and kept[BEST - 1].longest_s <= candidate.step_s:
            break
        plan = predict(compose([*recipe.overrides, *candidate.overrides], recipe.plugins), device)
        if (verdict := plan.verdict()) is not None:
            refused = refused or f"{candidate.layout.words()}: {verdict[1]}"
            continue
        kept = sorted([*kept, replace(candidate, plan=plan)], key=lambda c: c.longest_s)
    return (kept[:BEST], None) if kept else (found[:BEST], refused)


def why_none_fits(shape: Shape, gpus: int, cluster: Cluster, looked: int) -> str:
    """The layout that needs least, what fills it, and how many GPUs its state alone would take."""
    least = min(layouts(shape, gpus, cluster.node, cluster.domain), key=lambda x: sum(memory_terms(shape, x).values()))
    terms = memory_terms(shape, least)
    room = cluster.memory_bytes * (1 - RESERVE)
    need, usable = apart(sum(terms.values()) / 2**30, room / 2**30, decimals=0)
    full = max(terms, key=lambda name: terms[name])
    return (
        f"none of {looked} layouts fits {gpus} GPUs of {cluster.memory_bytes / 2**30:.0f} GiB: the smallest, {least.words()}, "
        f"needs {need} GiB of the {usable} that can be used, {full} {terms[full] / 2**30:.0f}; weights, "
        f"gradients and Adam of {shape.parameters / 1e9:.3g}B parameters fill {math.ceil(18 * shape.parameters / room)} GPUs"
    )
