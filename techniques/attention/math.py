"""Attention as it is written by hand: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device


@dataclass
class Math(Technique):
    """Two matrix products with the (Sq, Sk) score matrix in memory, softmax in fp32.

    Paper: Vaswani et al. 2017, arXiv:1706.03762.
    """

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        return Footprint(attention_matrix=True, score_copy=True)

    def apply(self, run: Run) -> None:
        from dyno.kernels.attention import eager

        run.replace("attention", eager, by=self)
