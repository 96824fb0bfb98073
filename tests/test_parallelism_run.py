"""A layout through the runner: one record with every rank's figures; a rank that dies ends it, and nothing is left."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
from ranks import ranks_of

from dyno import runner
from dyno.recipe import Recipe, compose

SMALL = [
    "hardware=cpu", "measure=quick", "measure.codecarbon=false", "measure.min_steps=3", "measure.min_seconds=0.0",
    "measure.warmup_min_steps=2", "measure.warmup_max_steps=2", "model=draft", "model.layers=2", "model.hidden=32",
    "model.ffn_width=48", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "corpus=stories",
    "corpus.size_bytes=40000", "workload.batch=8", "workload.seq=16", "workload.eval_tokens=64",
]  # fmt: skip


@pytest.fixture
def composed(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def make(*overrides: str) -> Recipe:
        return compose([*SMALL, f"results_dir={tmp_path / 'results'}", *overrides])

    return make


def test_a_pipeline_is_one_record(composed):
    out = runner.run(composed("parallelism=pipeline", "workload.steps=4", "workload.checkpoint_every=3"))
    assert out["status"] == "ok", out["reason"]
    assert [rank["rank"] for rank in out["ranks"]] == [0, 1]
    for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "tokens_per_s"):
        assert all(rank[name] > 0 for rank in out["ranks"])
    kinds = [{(row["dimension"], row["kind"]) for row in table} for table in out["details"]["train"]["wire"]]
    assert len(kinds) == 2 and all(("pp", "send") in seen for seen in kinds)
    predicted, counted = out["plan"]["wire_bytes_per_step"], out["metrics"]["wire_bytes"]
    assert counted["unit"] == "B" and counted["value"] == pytest.approx(predicted, rel=0.05)
    assert out["metrics"]["validation_loss"]["value"] < 10
    assert (Path(out["_path"]) / "checkpoints" / "step-0000003" / "index.json").is_file()


def test_tensor_ranks_are_one_record(composed):
    out = runner.run(composed("parallelism=tensor", "model.vocab_size=258", "workload.steps=3"))
    assert out["status"] == "ok", out["reason"]
    assert not (Path(out["_path"]) / runner.RENDEZVOUS).exists()
    phases = out["details"]["phases"]
    assert {"imports_s", "data_s", "warmup_s", "costs_s", "window_s", "profile_s"} < set(phases)
    assert sum(phases.values()) < out["duration_s"]
    metrics = out["metrics"]
    assert metrics["activation_bytes"]["value"] > 0 and metrics["recomputed_flops"]["value"] == 0


DYING = {
    "pipeline": ("parallelism=pipeline",),
    "ddp": ("parallelism=ddp",),
    "zero3": ("parallelism=zero3",),
    "context": ("parallelism=context",),
    "mesh": ("parallelism=mesh", "model.vocab_size=258"),  # two by two, with tensor ranks
}


@pytest.mark.parametrize("layout", DYING)
def test_a_rank_that_dies_ends_the_run_and_leaves_no_process(layout, composed, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_earlier_runs", itertools.repeat(0))
    recipe = composed(*DYING[layout], "workload.steps=100000")
    runs = tmp_path / "results" / "runs"
    killed: list[Path] = []

    def kill_the_second(line: str) -> None:
        if line.startswith("train: step") and not killed:
            killed.extend(runs.glob(".running-*"))
            os.kill(ranks_of(killed[0])["1"], signal.SIGKILL)

    out = runner.run(recipe, progress=kill_the_second)
    count = 4 if layout == "mesh" else 2
    assert out["status"] == "crashed" and f"rank 1 of {count} was ended by SIGKILL" in out["reason"]
    assert not ranks_of(killed[0]) and not list(runs.glob(".running-*"))
