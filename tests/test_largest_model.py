"""The benchmark of the largest model that trains in a given memory."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def largest_model(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("largest_model")


def test_a_probe_says_how_long_its_phases_took_also_if_it_does_not_end(largest_model, monkeypatch, capsys):
    words = ["model=nano", "workload=train", "workload.batch=2", "workload.seq=16", "offload=parameters"]
    row = largest_model.probe(words, 2, 1.0, 1)
    phases = ["import_s", "build_s", "prepare_s", "first_step_s"]
    printed = capsys.readouterr().out
    assert row["fits"] and [len(json.loads(line)) for line in printed.splitlines()] == [3, 5, 6, 7]
    assert largest_model.last_row(printed) == {k: row[k] for k in ("layers", "gib", "parameters", *phases)}

    def late(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"], output=printed[:-40].encode())

    given = SimpleNamespace(gib=1.0, steps=1, overrides=words[:-1], timeout=9.0)
    monkeypatch.setattr(subprocess, "run", late)
    cut = largest_model.probed("parameters", 2, given)
    assert not cut["fits"] and cut["reason"] == "no end after 9 s"
    assert [p for p in phases if p in cut] == phases[:3]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="", stderr="killed\n"))
    assert largest_model.probed("parameters", 2, given)["reason"] == "died: killed"
