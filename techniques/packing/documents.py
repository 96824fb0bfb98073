"""How documents become the rows of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Padded(Technique):
    """One document a row, the rest padding; a longer document takes several rows. What packing is measured against.

    Source: folklore; the baseline in Krell et al. 2021, arXiv:2107.02027. The loss is the mean over the tokens that have
    one, over all micro-batches and ranks together. Padding comes last, where causal attention never looks: no mask.
    """

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if recipe.config["parallelism"].get("cp", 1) > 1:
            return (
                "context parallel ranks share a row, of which one may then have no loss at all; use packing=stream or "
                "parallelism.cp=1"
            )
        return None

    def apply(self, run: Run) -> None:
        from dyno.techniques.packing import _rows

        run.replace("batches", partial(_rows.batches, _rows.one_each, False), by=self)
        weigh(run, by=self)


@dataclass
class Documents(Padded):
    """Whole documents share rows, best fit first; a document sees nothing of another and counts its positions from 0.

    Paper: Ding et al. 2024, arXiv:2404.10830 (best-fit-decreasing); attention inside documents: Llama 3,
    arXiv:2407.21783. A document longer than workload.seq is cut, and only the pieces' contexts are lost. Validation
    reads its stream across documents as ever, and predicts first tokens, which this never trains.

    document_tokens: the mean length of a document weighted by its tokens, for the plan alone, of attention that skips
    other documents; 0 is not known, and the plan takes whole rows.
    """

    document_tokens: int = 0

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.document_tokens < 0:
            return f"packing.document_tokens is {self.document_tokens}; it takes 0 (not known) or more tokens"
        if recipe.config["parallelism"].get("pp", 1) > 1:
            return "a pipeline hands on states, not where documents begin; use packing=padded or stream, or parallelism.pp=1"
        return super().unsupported(recipe, device)

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        share = min(1.0, self.document_tokens / shape.seq) if self.document_tokens > 0 else 1.0
        return Footprint(document_mask=True, document_share=share)

    def apply(self, run: Run) -> None:
        from dyno.techniques.packing import _rows

        def apart(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def separated(forward: Any, tokens: Tensor, targets: Tensor) -> Tensor:
                return loss(partial(forward, starts=_rows.document_starts(targets)), tokens, targets)

            return separated

        run.replace("batches", partial(_rows.batches, _rows.best_fit, True), by=self)
        run.wrap("loss", apart, by=self)
        weigh(run, by=self)


def weigh(run: Run, *, by: Technique) -> None:
    """Micro-batches and ranks count by their targets: together they give the mean over all targets of the step."""
    from dyno.kernels.linear_cross_entropy import counted

    whole: dict[str, Tensor] = {}

    def counting(local_batch: Callable[..., Any]) -> Callable[..., Any]:
        def rows(tokens: Tensor, targets: Tensor) -> Any:
            whole["targets"] = counted(targets).to(run.device, non_blocking=True)
            return local_batch(tokens, targets)

        return rows

    def share(loss: Tensor, targets: Tensor) -> Tensor:
        return loss * (counted(targets) * run.part("data_ranks") / whole["targets"])

    run.wrap("local_batch", counting, by=by)
    run.replace("share", share, by=by)
