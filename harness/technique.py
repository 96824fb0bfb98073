"""The one interface of a technique, and the run that a technique edits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import Conflict
from dyno.footprint import Footprint as Footprint  # a technique's file imports all that it needs from here
from dyno.footprint import Shape as Shape
from dyno.footprint import combined as combined

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dyno.data import Document
    from dyno.measure.environment import Device
    from dyno.model.decoder import Decoder
    from dyno.recipe import Recipe


@dataclass
class Technique:
    """One option of an axis: a dataclass of knobs with at most three methods."""

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        """The reason why this technique cannot run in this recipe on this device, in the user's words; or None."""
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """What it changes of the predicted bytes and FLOPs."""
        return Footprint()

    def footprints(self, shape: Shape, device: Device) -> list[Footprint]:
        """Those of the ranks that differ, of which `footprint` is one: the plan takes the fullest and the slowest."""
        return [self.footprint(shape, device)]

    def apply(self, run: Run) -> None:
        """Edit the run: its documents, model, or parts."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def world_size(self) -> int:
        """Ranks that the run needs: the knob `ranks` where a technique has one."""
        return int(getattr(self, "ranks", 1))

    @property
    def data_ranks(self) -> int:
        """Ranks that share the rows of a batch: all of them unless the technique says else."""
        return self.world_size

    @property
    def splits(self) -> int:
        """Micro-batches that a rank's rows are cut into: the knob `micro_batches` where a technique has one."""
        return int(getattr(self, "micro_batches", 1))

    @property
    def needs_kept_bytes(self) -> bool:
        """Whether its footprint depends on what the other techniques make the blocks keep: `Shape.kept_bytes`."""
        return False

    def decides(self, shape: Shape, device: Device) -> str | None:
        """What it would choose by itself, in one line of a plan; None where everything was chosen for it."""
        return None

    @property
    def subrecipe(self) -> list[str] | None:
        """Overrides of another recipe that is built first: the knob `teacher` or `draft` where a technique has one."""
        return getattr(self, "teacher", None) or getattr(self, "draft", None)

    @property
    def idle_knobs(self) -> frozenset[str]:
        """Knobs that mean nothing as the others are set: the name of a run in a report leaves them out."""
        return frozenset()

    @property
    def weights_on_host(self) -> bool:
        """Whether training builds the model in host memory, from where the technique places it itself."""
        return False

    @property
    def without_masters(self) -> bool:
        """Whether training keeps no weight wider than 16 bits, and rounds updated ones by a rule of its own."""
        return False

    def knobs(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def of_ranks(techniques: Sequence[Technique], shape: Shape, device: Device) -> list[Footprint]:
    """All techniques' shares as one, for each rank that differs from the others."""
    return [combined(one) for one in itertools.product(*(t.footprints(shape, device) for t in techniques))]


@dataclass
class Baseline(Technique):
    """The plain option of an axis: changes nothing."""


@dataclass
class Run:
    """One stage of one run, as its techniques see it.

    Parts are named callables and values that a stage is made of. `replace` takes a part over, and a second owner is a
    typed conflict that names both; `wrap` adds a layer round whatever is there, in axis order. A run is a process, so
    nothing needs undoing.
    """

    recipe: Recipe
    stage: str
    device: torch.device
    directory: Path
    rank: int = 0
    ranks: int = 1
    documents: list[Document] = field(default_factory=list)
    model: Decoder | None = None
    teacher: Decoder | None = None
    draft: Decoder | None = None
    stream: np.ndarray | None = None
    build_model: Callable[[list[str]], Decoder] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)

    def part(self, name: str) -> Any:
        """The current value of a part; a KeyError is a programming mistake."""
        return self.parts[name]

    def replace(self, name: str, value: Any, *, by: Technique) -> None:
        """Take a part over. Raises Conflict when another technique owns it."""
        owner = self._owners.get(name)
        if owner is not None:
            raise Conflict(f"{by.name} and {owner} both replace '{name}': choose one of them")
        self._owners[name] = by.name
        self.parts[name] = value

    def wrap(self, name: str, wrapper: Callable[[Any], Any], *, by: Technique) -> None:
        """Put a layer round a part: part = wrapper(part)."""
        self.parts[name] = wrapper(self.parts[name])

    def product_dtype(self) -> torch.dtype:
        """The type that matrix products take weights in: autocast's, or else the weights' own."""
        import torch

        kind = self.device.type
        with self.part("autocast")():
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.part("weights_dtype")

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value for the record's details."""
        self.details[key] = value
