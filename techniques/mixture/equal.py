"""Equal weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Technique

if TYPE_CHECKING:
    from dyno.technique import Run


@dataclass
class Equal(Technique):
    """Every source gives the same share of tokens: small ones are repeated, large ones are cut.

    The plainest answer to sources of unequal size; UniMax (https://arxiv.org/abs/2304.09151) adds a cap on epochs.
    """

    def apply(self, run: Run) -> None:
        sources = sorted({document.source for document in run.documents})
        run.replace("mixture", {source: 1 / len(sources) for source in sources}, by=self)
