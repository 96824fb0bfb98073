"""The schedule of least recomputation under a budget of activation memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.errors import Unsupported
from dyno.technique import Footprint, Run, Shape
from dyno.techniques.checkpointing._chain import Chain, Optimum, Schedule, Segment, all_kept, kept, peak, recomputed
from dyno.techniques.checkpointing.blocks import HOST, Recomputing, blocks_share, boundary_share, follow

if TYPE_CHECKING:
    from torch import nn

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe

FINE = 1000  # units of memory in a predicted block
SHARE = 0.5
GIB = 2**30


@dataclass
class Optimal(Recomputing):
    """Least recomputation such that forward and backward hold at most a budget of the blocks' activations.

    Papers: Beaumont et al. 2019, arXiv:1911.13214; Griewank and Walther 2000, doi:10.1145/347837.347846. The budget is
    `budget`, a share of what `none` keeps (0.5 where nothing is said), or `budget_gib`, GiB on a rank. Bytes and work of
    each block are measured on a copy of it before training; segments nest where the budget asks for it. A graph compiler
    recomputes each operation once, so with whole-model compilation segments do not nest.
    """

    budget: float | None = None
    budget_gib: float | None = None

    @property
    def needs_kept_bytes(self) -> bool:
        return self.budget_gib is not None

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        from dyno.plan import shape_of, with_kept_bytes

        reason = super().unsupported(recipe, device)
        if reason:
            return reason
        if self.budget is not None and self.budget_gib is not None:
            return "checkpointing.budget (a share) and checkpointing.budget_gib exclude each other: give one"
        if self.budget is not None and not 0 < self.budget <= 1:
            return f"checkpointing.budget is {self.budget}; it takes a share of the activations, above 0 and up to 1"
        if self.budget_gib is not None:
            if self.budget_gib <= 0:
                return f"checkpointing.budget_gib is {self.budget_gib}; it takes GiB above 0"
            if any(t.world_size != t.data_ranks for chosen in recipe.techniques.values() for t in chosen):
                return (
                    "checkpointing.budget_gib counts whole blocks, and this layout splits the model over ranks: give "
                    "checkpointing.budget, a share"
                )
        shape = shape_of(recipe)
        assert shape is None or shape.layers > 0
        if shape is None:
            return None
        shape = with_kept_bytes(recipe, shape, device)
        return best(predicted_chain(shape), self.share(shape.kept_bytes), self.said(shape.kept_bytes), nests(recipe))[1]

    def share(self, everything_bytes: float) -> float:
        """The budget as a share of what the blocks keep with nothing recomputed."""
        if self.budget_gib is None:
            return SHARE if self.budget is None else min(max(self.budget, 0.0), 1.0)
        return min(1.0, max(self.budget_gib, 0.0) * GIB / everything_bytes)

    def said(self, everything_bytes: float) -> Callable[[float], str]:
        """How the user names a share: of the activations, or in GiB."""
        if self.budget_gib is None:
            return lambda share: f"checkpointing.budget={self.share(0.0)} is below {share:.3f}"
        gib = everything_bytes / GIB
        return lambda share: f"checkpointing.budget_gib={self.budget_gib} is below {share * gib:.3g} GiB of {gib:.3g}"

    def planned(self, shape: Shape) -> tuple[Chain, Schedule | None]:
        """The predicted chain and its schedule; none where the blocks' bytes are not known yet or the budget is missed."""
        chain = predicted_chain(shape)
        if self.needs_kept_bytes and not shape.kept_bytes:
            return chain, None
        return chain, best(chain, self.share(shape.kept_bytes), self.said(shape.kept_bytes), nested=True)[0]

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        chain, schedule = self.planned(shape)
        if schedule is None:
            return Footprint()
        inside = [peak(chain, i.inner, held=True) for i in schedule if isinstance(i, Segment)]
        return Footprint(
            activation_factor=1 - sum(i.end - i.start for i in schedule if isinstance(i, Segment)) / shape.layers,
            boundaries=len(inside),
            recompute_blocks=max(inside, default=0) / FINE,
            blocks_again=recomputed(chain, schedule) / shape.layers,
            flops_factor=1 + recomputed(chain, schedule) / shape.layers * blocks_share(shape) / 3,
            host_factor=HOST,
        )

    def decides(self, shape: Shape, device: Device) -> str | None:
        chain, schedule = self.planned(shape)
        if schedule is None:
            return None
        whole = sum(isinstance(item, int) for item in schedule)

        def amount(units: int) -> str:
            share = units / chain.everything
            return f"{share * shape.kept_bytes / GIB:.3g} GiB" if shape.kept_bytes else f"{share:.1%}"

        return (
            f"checkpointing: keeps {whole} of {shape.layers} blocks whole, {amount(kept(chain, schedule))} of "
            f"{amount(chain.everything)}, at most {amount(peak(chain, schedule))} while it recomputes "
            f"{recomputed(chain, schedule) / shape.layers:.2f} of a forward pass"
        )

    def apply(self, run: Run) -> None:
        chain, rows = measured_chain(run), rows_at_once(run)
        everything = float(chain.everything * rows)
        schedule, reason = best(chain, self.share(everything), self.said(everything), nests(run.recipe))
        if schedule is None:
            raise Unsupported(f"{reason} (measured)")
        follow(run, schedule, by=self)
        run.note("checkpointing_predicted_share", peak(chain, schedule) / chain.everything)
        run.note("checkpointing_predicted_bytes", peak(chain, schedule) * rows)
        run.note("checkpointing_recomputed_forwards", recomputed(chain, schedule) / sum(chain.cost))


def nests(recipe: Recipe) -> bool:
    """Whether a segment inside a segment is run as such: not by a graph compiler that sees the whole model."""
    return recipe.option("compile") == "off" or bool(recipe.config["compile"].get("per_block"))


def rows_at_once(run: Run) -> int:
    """Rows of the batch that a rank runs forward before it goes backward."""
    techniques = [t for chosen in run.recipe.techniques.values() for t in chosen]
    parts = math.prod(t.data_ranks for t in techniques) * math.prod(t.splits for t in techniques)
    return max(1, run.recipe.config["workload"]["batch"] // parts)


def best(chain: Chain, budget: float, said: Callable[[float], str], nested: bool) -> tuple[Schedule | None, str | None]:
    """The schedule for a share of everything, or None and the reason."""
    if budget >= 1:  # sizes rounded up to slots would miss it
        return all_kept(0, len(chain)), None
    optimum = Optimum(chain, chain.everything, nested)
    schedule = optimum.schedule(int(budget * chain.everything))
    if schedule is not None:
        return schedule, None
    least = optimum.least_budget
    assert least is not None  # keeping everything is a schedule
    how = "" if nested else " without nesting"
    return None, f"{said(least / chain.everything)}, the least that recomputing{how} reaches"


def predicted_chain(shape: Shape) -> Chain:
    """Equal blocks by arithmetic: a block's inside is `FINE` units."""
    boundary = max(1, round(FINE * boundary_share(shape)))
    n = shape.layers
    return Chain([boundary] * n, [FINE] * n, [False] * n, [1.0] * n)


def measured_chain(run: Run) -> Chain:
    """Bytes of one row of the batch, and FLOPs a token, of each block as this run computes it."""
    assert run.model is not None
    seq = run.recipe.config["workload"]["seq"]
    known: dict[tuple[Any, ...], tuple[int, int, bool]] = {}
    width = run.model.config.heads * run.model.config.head_dim
    sizes, cost = [], []
    for block in run.model.blocks:
        shapes = tuple((tuple(p.shape), p.dtype) for p in block.parameters())
        if shapes not in known:
            known[shapes] = block_bytes(run, block, seq)
        sizes.append(known[shapes])
        matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
        cost.append(2.0 * (matrices + seq * width))
    boundary, inside, keeps = (list(column) for column in zip(*sizes, strict=True))
    return Chain(boundary, inside, keeps, cost)


def free_copy(run: Run, block: nn.Module) -> nn.Module:
    """A copy of a block or, where a layout has taken hold of its weights, whose values do not matter, one of its whole sizes:
    of tensor ranks each keeps a part of what that keeps."""
    import copy

    import torch

    from dyno.model.decoder import Block
    from dyno.stages.shards import is_dtensor

    assert run.model is not None
    if not any(map(is_dtensor, block.parameters())):
        return copy.deepcopy(block)
    with torch.device("meta"):
        free = Block(run.model.config)
    for name, parameter in block.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(free.get_submodule(owner), last, torch.nn.Parameter(torch.zeros(parameter.shape, device=run.device)))
    for part in ("attention", "mlp"):
        getattr(free, part).project = getattr(block, part).project
    return free


def block_bytes(run: Run, block: nn.Module, seq: int) -> tuple[int, int, bool]:
    """(input, everything else that is kept, whether the input is kept) in bytes of one row: two rows less one.

    What does not grow with the batch, such as weights cast to 16 bits, falls out.
    """
    import torch

    model = run.model
    assert model is not None
    block = free_copy(run, block).to(run.device, run.part("weights_dtype"))
    seen = []
    for rows in (1, 2):
        kept: dict[int, Any] = {}

        def pack(tensor: Any, kept: dict[int, Any] = kept) -> None:
            # An output that its own node packed as itself would never be freed: nothing goes backward here.
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

        with run.part("autocast")(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dtype = run.product_dtype()
            x = torch.ones(rows, seq, model.config.hidden, device=run.device, dtype=dtype, requires_grad=True)
            angles = torch.ones(seq, 1, model.config.head_dim, device=run.device, dtype=dtype)
            out = block(x, angles, angles, run.part("attention"), None)
        keeps = kept.pop(x.untyped_storage()._cdata, None) is not None
        seen.append((x.untyped_storage().nbytes(), sum(storage.nbytes() for storage in kept.values()), keeps))
        del out
    (boundary, one, keeps), (_, two, _) = seen
    return boundary, two - one, keeps
