"""Update rules beside the plain AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    import torch

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe
    from dyno.techniques.optimizer._single_pass import SinglePass

BETAS = (0.9, 0.95)  # as the plain AdamW
WEIGHT_DECAY = 0.1
BATCH = 2**26  # elements of matrices of one shape that Muon orthogonalises together


@dataclass
class AdamW8bit(Technique):
    """AdamW with both moments in 8-bit codes, a scale for every 256: 2.03 bytes of state a parameter, not 8.

    Paper: Dettmers et al. 2021, arXiv:2110.02861. The arithmetic is in fp32; on a GPU one pass over memory, with clipping
    (but where ranks share the gradients' norm) and the masters of 16-bit weights in it.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.world_size > 1 and recipe.writes_state:
            return "its codes are of a rank's part, which no other layout could go on from; take optimizer=adamw"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(optimizer_bytes=2 + 2 * 4 / 256, one_pass_step=True, step_launches=shape.tensors)

    def apply(self, run: Run) -> None:
        from dyno.techniques.optimizer._single_pass import AdamW8bit as Optimizer

        step_in_one_pass(self, run, Optimizer)


@dataclass
class SinglePassAdamW(Technique):
    """AdamW in one pass over memory: clipping, moments, fp32 masters of 16-bit weights and their rounding together.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101. The same update as plain AdamW; what it saves is traffic: clipped
    gradients are not written back, and precision=bf16_master needs no wide copies of weights and gradients.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.world_size > 1:
            return "the norm for clipping is taken on one rank; take optimizer=adamw with a layout of several"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(one_pass_step=True, step_launches=shape.tensors)

    def apply(self, run: Run) -> None:
        from dyno.techniques.optimizer._single_pass import SinglePassAdamW as Optimizer

        step_in_one_pass(self, run, Optimizer)


def step_in_one_pass(technique: Technique, run: Run, kind: type[SinglePass]) -> None:
    """The run steps by this optimizer, which keeps masters of its own, and clips on the way if the norm is one rank's."""
    made: list[SinglePass] = []

    def make(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
        made[:] = [kind(model.parameters(), lr, BETAS, WEIGHT_DECAY)]
        return made[0]

    make.keeps_masters = True  # type: ignore[attr-defined]
    run.replace("optimizer", make, by=technique)
    if run.ranks == 1:
        run.replace("clip", lambda parameters, max_norm: made[0].clip(parameters, max_norm), by=technique)


@dataclass
class Muon(Technique):
    """Momentum whose matrices are made orthogonal before each step; embedding, head and norms by AdamW.

    Source: Jordan et al. 2024, Muon (kellerjordan.github.io/posts/muon); scaled to AdamW's learning rate as in Liu et
    al. 2025, arXiv:2502.16982. One moment for the hidden matrices; the orthogonalisation costs products every step.
    """

    momentum: float = 0.95
    iterations: int = 5

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if not 0 <= self.momentum < 1:
            return f"optimizer.momentum is {self.momentum}; it takes 0 or more, less than 1"
        if self.iterations < 1:
            return f"optimizer.iterations is {self.iterations}; it takes 1 or more"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """4 bytes a hidden parameter and 8 another. An iteration on (r, c), r <= c, is 4 r^2 c + 2 r^3 FLOPs.

        Matrices of a shape step together: in fp32, and twice in bf16 with four squares of their smaller side, or four
        times with one. Passes over memory, beside those of a fused step, and launches are counted off `_muon.py`; more launches
        where 16-bit weights step in chunks of several shapes.
        """
        hidden = shape.block_parameters
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        iterations = max(0, self.iterations)
        squares = flops = launches = largest = 0.0
        for n, count in ((width, 2), (kv, 2), (shape.ffn, 3)):
            r, c, matrices = min(shape.hidden, n), max(shape.hidden, n), shape.layers * count
            flops += matrices * iterations * (4.0 * r * r * c + 2.0 * r**3)
            squares += matrices * float(r * r)
            together = min(2 * shape.layers, max(1, BATCH // (r * c)))  # two of a layer, as gate and up are
            launches += 8.0 * matrices + (6.0 + 8.0 * iterations) * matrices / together
            largest = max(largest, together * max(8.0 * r * c + 8.0 * r * r, 12.0 * r * c + 2.0 * r * r))
        traffic = hidden * (50.0 + 10.0 * iterations) + squares * 14.0 * iterations
        step = 6.0 * shape.linear_parameters * shape.batch * shape.seq
        return Footprint(
            optimizer_bytes=8 - 4 * hidden / shape.parameters, flops_factor=1 + flops / step,
            gathered_step_bytes=largest, gathered_traffic_bytes=traffic, step_flops=flops, step_launches=launches,
        )  # fmt: skip

    def apply(self, run: Run) -> None:
        from dyno.techniques.optimizer._muon import Muon as Optimizer

        def make(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
            named = list(model.named_parameters())
            matrices = [p for name, p in named if p.dim() == 2 and name.startswith("blocks.")]
            rest = [p for name, p in named if p.dim() != 2 or not name.startswith("blocks.")]
            return Optimizer(matrices, rest, lr, self.momentum, self.iterations, BETAS, WEIGHT_DECAY)

        run.replace("optimizer", make, by=self)
