"""A training state written by one layout is gone on from by others: the losses are those of a run never broken off."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch

from dyno.errors import UserError
from dyno.measure.environment import Device
from dyno.plan import reasons
from dyno.recipe import Recipe, compose
from dyno.stages import checkpoint, train
from dyno.techniques.parallelism import _layout  # noqa: F401  the ranks inherit what is imported here

BEFORE, AFTER = 3, 3
WORKLOAD = {"measures": "train", "batch": 8, "seq": 16, "lr": 1e-2}
STREAM = np.tile(np.arange(20), 20)
SIZES = {"vocab_size": 64, "layers": 2, "kv_heads": 4}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "mesh": (4, ["parallelism=mesh", "parallelism.zero=3"]),
    "staged": (4, ["parallelism=mesh", "parallelism.tp=1", "parallelism.pp=2"]),
    "zero3": (2, ["parallelism=zero3"]),
    "tensor": (2, ["parallelism=tensor"]),
    "pipeline": (2, ["parallelism=pipeline"]),
    "context": (2, ["parallelism=context"]),
    "ddp": (2, ["parallelism=ddp"]),
    "zero1": (2, ["parallelism=zero1"]),
    "hybrid": (4, ["parallelism=hybrid"]),
}
# Written and gone on from by themselves; `unbroken` is what they saw then without a break.
OPTIMIZERS: dict[str, tuple[int, list[str]]] = {
    "master": (1, ["precision=bf16_master"]),
    "master_single_pass": (1, ["precision=bf16_master", "optimizer=adamw_single_pass"]),
    "single_pass": (1, ["optimizer=adamw_single_pass"]),
    "adamw8bit_master": (1, ["optimizer=adamw8bit", "precision=bf16_master"]),
    "stochastic": (1, ["precision=bf16_stochastic"]),
    "muon": (1, ["optimizer=muon"]),
    "muon_master": (1, ["optimizer=muon", "precision=bf16_master"]),
    "adamw8bit": (1, ["optimizer=adamw8bit"]),
    "zero3_master": (2, ["parallelism=zero3", "precision=bf16_master"]),
    "zero3_muon": (2, ["parallelism=zero3", "optimizer=muon"]),
}
WRITERS, READERS = ("one", "mesh", "staged"), ("one", "zero3", "tensor", "pipeline", "mesh")
CHAIN = ("context", "ddp", "zero1", "hybrid")  # each goes on from the one before, the first from the mesh
PAIRS = [
    *((writer, reader) for reader in READERS for writer in WRITERS),
    *itertools.pairwise(("mesh", *CHAIN)),
    *((writer, "one") for writer in CHAIN),
]


def trainer_of(recipe: Recipe, count: int, directory: Path, rank: int = 0) -> train.Trainer:
    made = tiny.pipeline_of(recipe, directory)
    made.rank, made.ranks = rank, count
    run = train.prepared_run(made, tiny.model(sharpness=3.0, **SIZES).train())
    return train.Trainer(run, STREAM, WORKLOAD, seed=0)


def losses(trainer: train.Trainer, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        trainer.step()
        seen.append(trainer.mean_loss())
    return seen


def main(directory: Path) -> None:
    """Writers first, then every reader goes on from each of its own and writes down its losses."""
    every = {**LAYOUTS, **OPTIMIZERS}
    recipes = {n: compose(["workload.batch=8", "workload.seq=16", *o]) for n, (_, o) in every.items()}
    torch.set_num_threads(1)

    def each(names: tuple[str, ...], task) -> None:
        for name in names:
            count = every[name][0]

            def work(rank: int, name: str = name, count: int = count) -> None:
                task(name, count, rank)

            work(0) if count == 1 else ranks.fork(count, work, directory, limit_s=60)

    def write(name: str, count: int, rank: int) -> None:
        trainer = trainer_of(recipes[name], count, directory, rank)
        losses(trainer, BEFORE)
        checkpoint.save(trainer, directory / name)

    def read(name: str, count: int, rank: int) -> None:
        for writer in (writer for writer, reader in PAIRS if reader == name):
            trainer = trainer_of(recipes[name], count, directory, rank)
            checkpoint.load(trainer, directory / writer / f"step-{BEFORE:07d}")
            seen = losses(trainer, AFTER)
            (directory / f"{writer}-{name}-{rank}.json").write_text(json.dumps(seen))

    def write_and_read(name: str, count: int, rank: int) -> None:
        write(name, count, rank)
        read(name, count, rank)

    def write_and_go_on(name: str, count: int, rank: int) -> None:
        trainer = trainer_of(recipes[name], count, directory, rank)
        losses(trainer, BEFORE)
        checkpoint.save(trainer, directory / name)
        (directory / f"unbroken-{name}-{rank}.json").write_text(json.dumps(losses(trainer, AFTER)))

    def go_on(name: str, count: int, rank: int) -> None:
        trainer = trainer_of(recipes[name], count, directory, rank)
        checkpoint.load(trainer, directory / name / f"step-{BEFORE:07d}")
        (directory / f"resumed-{name}-{rank}.json").write_text(json.dumps(losses(trainer, AFTER)))

    each(WRITERS, write)
    each(CHAIN, write_and_read)
    each(READERS, read)
    each(tuple(OPTIMIZERS), write_and_go_on)
    each(tuple(OPTIMIZERS), go_on)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    where = tmp_path_factory.mktemp("checkpoints")
    ranks.run_program(__file__, where, limit_s=200)
    return where


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    recipe = compose(["workload.batch=8", "workload.seq=16"])
    return losses(trainer_of(recipe, 1, tmp_path_factory.mktemp("one")), BEFORE + AFTER)


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_training_goes_on_as_if_never_broken_off(writer, reader, directory, unbroken):
    for rank in range(LAYOUTS[reader][0]):
        seen = json.loads((directory / f"{writer}-{reader}-{rank}.json").read_text())
        assert seen == pytest.approx(unbroken[BEFORE:], abs=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_as_if_never_broken_off(name, directory):
    """But for weights that are rounded at random, whose draws begin anew."""
    for rank in range(OPTIMIZERS[name][0]):
        unbroken, resumed = (
            json.loads((directory / f"{k}-{name}-{rank}.json").read_text()) for k in ("unbroken", "resumed")
        )
        assert resumed == pytest.approx(unbroken, abs=0.02 if name == "stochastic" else 1e-5)


def test_masters_go_on_without_them_and_the_other_way_round(directory, tmp_path):
    def resumed(where: str, *overrides: str) -> list[float]:
        trainer = trainer_of(compose(["workload.batch=8", "workload.seq=16", *overrides]), 1, tmp_path)
        checkpoint.load(trainer, directory / where / f"step-{BEFORE:07d}")
        return losses(trainer, AFTER)

    assert resumed("master") == pytest.approx(resumed("master", "precision=bf16_master"), abs=0.02)
    assert resumed("one", "precision=bf16_master") == pytest.approx(resumed("one"), abs=0.02)


def test_a_state_goes_on_under_its_own_update_rule_alone(directory, tmp_path):
    def resumed(where: str, option: str) -> list[float]:
        trainer = trainer_of(compose(["workload.batch=8", "workload.seq=16", f"optimizer={option}"]), 1, tmp_path)
        checkpoint.load(trainer, directory / where / f"step-{BEFORE:07d}")
        return losses(trainer, AFTER)

    for written in ("one", "single_pass"):
        assert resumed(written, "adamw_single_pass") == pytest.approx(resumed(written, "adamw"), abs=1e-4)
    for where, option, written in (("one", "adamw8bit", "adamw"), ("one", "muon", "adamw"), ("muon", "adamw", "muon")):
        with pytest.raises(UserError, match=f"has the state of optimizer={written}, and this run steps by {option}"):
            resumed(where, option)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["offload=optimizer", "workload.checkpoint_every=2"], "the state of an optimizer on the host is not written"),
        (["offload=optimizer", "workload.resume=x"], "the state of an optimizer on the host is not written"),
        (["optimizer=adamw8bit", "parallelism=zero3", "workload.checkpoint_every=2"], "codes are of a rank's part"),
    ],
)
def test_state_that_cannot_be_gone_on_from_is_refused_beforehand(overrides, reason):
    recipe = compose(overrides)
    assert any(reason in why for why in reasons(recipe, Device("cpu", 0, "cpu", 2**34, None, None, 2)))
    plain = compose(overrides[:-1])
    assert not any(reason in why for why in reasons(plain, Device("cpu", 0, "cpu", 2**34, None, None, 2)))


def test_every_writer_leaves_the_same_tensors(directory):
    plain = checkpoint.Reader(directory / "one" / f"step-{BEFORE:07d}")
    for writer in (*WRITERS[1:], *CHAIN):
        other = checkpoint.Reader(directory / writer / f"step-{BEFORE:07d}")
        twin = {n for n in other.names() if "lm_head" in n}  # a pipeline's copy of the tied embedding
        assert set(other.names()) - twin == set(plain.names())
        for name in plain.names():
            torch.testing.assert_close(other.tensor(name), plain.tensor(name), atol=2e-4, rtol=1e-3)


def test_a_directory_that_is_no_checkpoint_of_this_model_is_told(directory, tmp_path):
    recipe = compose(["workload.batch=8", "workload.seq=16"])
    trainer = trainer_of(recipe, 1, tmp_path)
    with pytest.raises(UserError, match="is no checkpoint: it needs an index.json"):
        checkpoint.load(trainer, tmp_path)
    where = directory / "one" / f"step-{BEFORE:07d}"
    index = json.loads((where / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot be read from part-0.safetensors"):
        checkpoint.load(trainer, tmp_path)
    del index["tensors"]["weight.norm.weight"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "part-0.safetensors").write_bytes((where / "part-0.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"has no norm.weight: it is of another model"):
        checkpoint.load(trainer, tmp_path)
    wider = train.prepared_run(tiny.pipeline_of(recipe, tmp_path), tiny.model(**{**SIZES, "ffn_width": 64}))
    with pytest.raises(UserError, match=r"of shape .*: it is of another model"):
        checkpoint.load(train.Trainer(wider, STREAM, WORKLOAD, seed=0), where)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
