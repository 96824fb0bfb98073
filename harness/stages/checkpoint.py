"""A training state on disk, whole whatever layout wrote it, so that any other may go on from it.

A directory: `part-N.safetensors`, each with whole tensors (`weight.NAME`, `state.NAME.KEY` of the optimizer; KEY master is
the fp32 weight where the model's own has 16 bits), and `index.json`, written last, that says which tensor lies where.
Neither is pickle: opening a stranger's runs no code.

An optimizer that keeps something elsewhere than in `state[parameter]` has `kept(parameter)`, and one that has masters
`restore(parameter, values, master)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyno.errors import UserError
from dyno.measure.together import gathered
from dyno.record import write_json
from dyno.stages.shards import like, whole

if TYPE_CHECKING:
    from dyno.stages.train import Trainer

FORMAT = "dyno-checkpoint-1"


def named(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """This rank's parameters under their names in the whole model."""
    model, whole_name = trainer.run.model, trainer.run.part("whole_name")
    assert model is not None
    return ((whole_name(name), parameter) for name, parameter in model.named_parameters())


def kept(optimizer: Any, parameter: Any) -> dict[str, Any]:
    """What an optimizer remembers of a parameter."""
    return optimizer.kept(parameter) if hasattr(optimizer, "kept") else optimizer.state.get(parameter, {})


def rule(trainer: Trainer) -> str:
    """The update rule whose state is kept, by the option that names it; an optimizer may keep that of another, as state_of."""
    return str(getattr(trainer.optimizer, "state_of", trainer.run.recipe.option("optimizer")))


def save(trainer: Trainer, directory: Path) -> Path:
    """Write the state after so many steps under `directory`; all ranks call this, those that have a part write it."""
    run, path = trainer.run, directory / f"step-{trainer.steps:07d}"
    path.mkdir(parents=True, exist_ok=True)
    writes, tensors = run.part("writes"), {}

    def keep(name: str, tensor: Tensor) -> None:
        full = whole(tensor)  # a gather: every rank takes part
        if writes is not None:
            tensors[name] = full.detach().cpu().contiguous()

    for name, parameter in named(trainer):
        keep(f"weight.{name}", parameter)
        for key, value in sorted(kept(trainer.optimizer, parameter).items()):
            keep(f"state.{name}.{key}", value if isinstance(value, Tensor) else torch.tensor(value))
    part = f"part-{writes}.safetensors"
    if writes is not None:
        save_file(tensors, path / part)
    mine = dict.fromkeys(tensors, part)
    lists = gathered(mine) if run.ranks > 1 else [mine]
    if run.rank == 0:
        scaler = run.part("scaler")
        places = {name: file for one in lists for name, file in one.items()}
        index = {"format": FORMAT, "steps": trainer.steps, "optimizer": rule(trainer), "tensors": places,
                 "scaler": scaler and scaler.state_dict()}  # fmt: skip
        write_json(path / "index.json", index)
    return path


class Reader:
    """The tensors of a checkpoint by name."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.index = json.loads((path / "index.json").read_text())
            assert self.index["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"workload.resume={path} is no checkpoint: it needs an index.json of {FORMAT}") from error
        self.files: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self.index["tensors"])

    def tensor(self, name: str) -> Tensor:
        file = Path(self.index["tensors"][name]).name  # never outside of the directory
        try:
            if file not in self.files:
                self.files[file] = safe_open(self.path / file, framework="pt")
            return self.files[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"workload.resume={self.path}: {name} cannot be read from {file}: {error}") from error


def placed(value: Tensor, parameter: Any, fused: bool) -> Any:
    """A piece of the optimizer's state where it belongs: a count on the host, but for fused steps, a moment by its weight."""
    if value.dim() == 0:
        return value.float().to(parameter.device if fused else "cpu")
    value = value.to(parameter.device)
    return like(value, parameter) if value.shape == parameter.shape else value


def load(trainer: Trainer, path: Path) -> None:
    """Put a checkpoint's weights, optimizer state, step and place in the data into a fresh trainer."""
    reader, optimizer = Reader(path), trainer.optimizer
    written, mine = reader.index.get("optimizer"), rule(trainer)  # older checkpoints do not say
    if written not in (None, mine):
        raise UserError(
            f"workload.resume={path} has the state of optimizer={written}, and this run steps by {mine}: add "
            f"optimizer={written}"
        )
    known = set(reader.names())
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in named(trainer):
        if f"weight.{name}" not in known and name == "lm_head.weight":
            name = "embed.weight"  # tied where it was written
        if f"weight.{name}" not in known:
            raise UserError(f"workload.resume={path} has no {name}: it is of another model")
        start = f"state.{name}."
        values = {key.removeprefix(start): reader.tensor(key) for key in known if key.startswith(start)}
        weight = values.pop("master", None)
        weight = reader.tensor(f"weight.{name}") if weight is None else weight
        if weight.shape != parameter.shape:
            shapes = f"{tuple(weight.shape)}, here it is {tuple(parameter.shape)}"
            raise UserError(f"workload.resume={path} has {name} of shape {shapes}: it is of another model")
        weight = like(weight.to(parameter.device), parameter)
        with torch.no_grad():
            parameter.copy_(weight)
        # Not load_state_dict(), which casts codes and moments to the weight's type and parts optimizers that share a state.
        state = {key: placed(value, parameter, fused) for key, value in values.items()}
        if hasattr(optimizer, "restore"):
            optimizer.restore(parameter, state, weight)
        else:
            optimizer.state[parameter] = state
    if trainer.run.part("scaler") and reader.index["scaler"]:
        trainer.run.part("scaler").load_state_dict(reader.index["scaler"])
    trainer.steps = int(reader.index["steps"])
    for _ in range(trainer.steps):
        next(trainer.batches)
