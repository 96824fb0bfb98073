"""Any product of data, tensor, pipeline and context parallelism, on one device mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique
from dyno.techniques.parallelism import _cost, _rules, _stages

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Mesh(Technique):
    """A step split over dp x tp x pp x cp ranks, by PyTorch's own engines; every layout is this with other degrees.

    Inference takes tensor ranks alone, on plain tensors; only `tp` means something there.

    Papers: DDP, Li et al. 2020, arXiv:2006.15704; ZeRO, Rajbhandari et al. 2019, arXiv:1910.02054; FSDP, Zhao et al.
    2023, arXiv:2304.11277; tensor parallel, Shoeybi et al. 2019, arXiv:1909.08053, its sequence-parallel norms,
    Korthikanti et al. 2022, arXiv:2205.05198; pipelines, Narayanan et al. 2021, arXiv:2104.04473; zero bubble, Qi et
    al. 2023, arXiv:2401.10241; ring attention, Liu et al. 2023, arXiv:2310.01889; Ulysses, Jacobs et al. 2023,
    arXiv:2309.14509.

    dp: ranks that share the rows of a batch. tp: ranks that share every matrix. pp: ranks that share the layers. cp:
    ranks that share every sequence. ep: ranks that share experts.
    zero: what the data ranks shard: 0 nothing (DDP), 1 optimizer state, 2 gradients too, 3 parameters too. replicate:
    groups of data ranks that each hold everything (hybrid sharding). reshard_to: ranks over which ZeRO-3 leaves a
    block's weights split between its forward and backward pass; 0 is all of them, which tp needs.
    sequence_parallel: tensor ranks also split the tokens between the blocks. loss_parallel: they keep the logits split.
    schedule: gpipe, 1f1b, interleaved, zero_bubble or zbv, over micro_batches, with virtual_stages a rank where the
    schedule takes several. context: ring or ulysses.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0
    replicate: int = 1
    reshard_to: int = 0
    sequence_parallel: bool = True
    loss_parallel: bool = True
    schedule: str = "1f1b"
    micro_batches: int = 4
    virtual_stages: int = 2
    context: str = "ring"

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def data_ranks(self) -> int:
        return self.dp

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the model's state is split."""
        return self.dp * self.cp // self.replicate if self.zero else 1

    @property
    def copies(self) -> int:
        """Groups of ranks that hold the same state."""
        return self.replicate if self.zero else self.dp * self.cp

    @property
    def splits(self) -> int:
        return self.micro_batches if self.pp > 1 else 1

    @property
    def token_shards(self) -> int:
        """Ranks that share the tokens of the residual stream."""
        return self.tp if self.sequence_parallel else 1

    @property
    def vocabulary_shards(self) -> int:
        """Ranks that share the logits."""
        return self.tp if self.loss_parallel else 1

    @property
    def in_buckets(self) -> bool:
        """Whether DDP replicates: whole models only; inside a larger mesh FSDP2 does, with shards of one rank."""
        return self.zero == 0 and self.tp == self.pp == 1

    @property
    def idle_knobs(self) -> frozenset[str]:
        """Degrees of one, and what goes with them."""
        goes_with = {
            "tp": ("sequence_parallel", "loss_parallel"),
            "pp": ("schedule", "micro_batches", "virtual_stages"),
            "cp": ("context",),
        }
        ones = [degree for degree in ("dp", "tp", "pp", "cp", "ep") if getattr(self, degree) == 1]
        sharding = ("zero", "replicate", "reshard_to") if self.dp * self.cp == 1 else ()
        staging = () if _stages.SCHEDULES.get(self.schedule, ("", True))[1] else ("virtual_stages",)
        return frozenset([*ones, *sharding, *staging, *(knob for degree in ones for knob in goes_with.get(degree, ()))])

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        return _rules.reason(self, recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return max(self.footprints(shape, device), key=_cost.sent)

    def footprints(self, shape: Shape, device: Device) -> list[Footprint]:
        cannot_be = next(_rules.knobs(self), None)  # and so has no cost
        return [Footprint()] if cannot_be else [_cost.footprint(self, shape, rank) for rank in range(self.pp)]

    def apply(self, run: Run) -> None:
        if self.world_size == 1:
            return
        if run.stage == "infer":
            from dyno.techniques.parallelism import _serving

            _serving.apply(self, run)
        else:
            from dyno.techniques.parallelism import _layout

            _layout.apply(self, run)
