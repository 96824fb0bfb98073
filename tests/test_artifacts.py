"""Artifacts: content-addressed, whole or absent, and keyed by everything upstream."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dyno import artifacts
from dyno.artifacts import Store, stage_key
from dyno.recipe import Recipe, compose


def writing(text: str):
    def write(directory: Path) -> dict:
        (directory / "data.txt").write_text(text)
        return {"text": text}

    return write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def hidden(store: Store) -> list[Path]:
    return list(store.root.glob("*/.*"))


def test_put_and_get(store):
    assert store.get("train", "k") is None
    path = store.put("train", "k", writing("x"))
    assert store.get("train", "k") == path and store.manifest(path)["text"] == "x"
    assert store.get("data", "k") is None  # a key belongs to its stage
    assert hidden(store) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_writer_leaves_nothing(store, error):
    def write(directory: Path) -> dict:
        (directory / "data.txt").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.put("train", "k", write)
    assert store.get("train", "k") is None and hidden(store) == []


def test_a_killed_writer_is_never_used_and_pruned_later(store):
    code = (
        "import os, signal, sys; from pathlib import Path; from dyno.artifacts import Store\n"
        "def write(d):\n    (d / 'data.txt').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(Path(sys.argv[1])).put('train', 'k', write)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(store.root)]).returncode == -9
    assert store.get("train", "k") is None
    (left,) = hidden(store)
    assert [row["whole"] for row in store.entries()] == [False]
    assert store.prune() == [] and left.exists()  # it may be at work
    os.utime(left, (0, 0))
    assert len(store.prune()) == 1 and not left.exists()


def test_the_first_writer_wins(store):
    def slower(directory: Path) -> dict:
        store.put("train", "k", writing("first"))
        return writing("second")(directory)

    path = store.put("train", "k", slower)
    assert (path / "data.txt").read_text() == store.manifest(path)["text"] == "first"
    assert hidden(store) == []


def test_half_a_copy_is_replaced(store):
    """A copy from another machine, broken off before its manifest came."""
    half = store.root / "train" / "k"
    half.mkdir(parents=True)
    (half / "model.bin").write_text("half")
    assert store.get("train", "k") is None
    path = store.put("train", "k", writing("x"))
    assert sorted(p.name for p in path.iterdir()) == ["data.txt", "manifest.json"] and hidden(store) == []


def test_prune_by_last_use(store):
    for key, age in (("old", 100), ("used", 100), ("new", 0)):
        path = store.put("train", key, writing(key))
        os.utime(path, (time.time() - age,) * 2)
    store.get("train", "used")
    assert [row["key"] for row in store.prune(50)] == ["old"]
    assert {row["key"] for row in store.entries()} == {"used", "new"}
    assert all(row["bytes"] > 3 for row in store.entries())
    assert len(store.prune()) == 2 and store.entries() == []


def test_a_prune_broken_off_leaves_no_half_artifact(store, monkeypatch):
    store.put("train", "k", writing("x"))
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)  # as if killed before the first file went
    store.prune()
    assert store.get("train", "k") is None


# keys


@pytest.fixture
def plugin(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A user's directory with a technique for the data stage, one for the compress stage."""
    name = f"artifact_plugin_{abs(hash(request.node.name))}"
    for axis, cls in (("curriculum", "Order"), ("pruning", "Cut")):
        folder = tmp_path / "plugins" / "conf" / axis
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(f"# mine\n_target_: {name}.{axis}.code.{cls}\namount: 1\n")
        code = tmp_path / "plugins" / name / axis / "code.py"
        code.parent.mkdir(parents=True)
        code.write_text(
            "from dataclasses import dataclass\nfrom dyno.technique import Technique\n"
            f"@dataclass\nclass {cls}(Technique):\n    amount: int = 1\n"
        )
    return tmp_path / "plugins"


def keys(recipe: Recipe) -> dict[str, str]:
    """Keys chained as the stages chain them."""
    artifacts._source.cache_clear()
    out: dict[str, str] = {}
    before = ""
    for stage in ("data", "train", "compress"):
        before = out[stage] = stage_key(recipe, stage, before, {"seed": recipe.config["seed"]}, ["dyno.axes"])
    return out


def changed(one: Recipe, other: Recipe) -> list[str]:
    a, b = keys(one), keys(other)
    return [stage for stage in a if a[stage] != b[stage]]


def test_a_knob_changes_its_stage_and_what_follows():
    def infer(*overrides: str) -> Recipe:
        return compose(["workload=generate", "data_filters=quality_rules", "quantization=int8", *overrides])

    base = infer()
    assert changed(base, infer()) == []
    assert changed(base, infer("data_filters.quality_rules.min_chars=7")) == ["data", "train", "compress"]
    assert changed(base, infer("accumulation=gradients")) == ["train", "compress"]
    assert changed(base, infer("quantization.bits=4")) == ["compress"]
    for downstream in ("decoding=sampling", "kv_cache=none", "workload.new_tokens=8", "attention=math", "compile=on"):
        assert changed(base, infer(downstream)) == [], downstream


def test_the_order_of_filters_counts():
    one = compose(["data_filters=[quality_rules,exact_deduplication]"])
    other = compose(["data_filters=[exact_deduplication,quality_rules]"])
    assert changed(one, other) == ["data", "train", "compress"] and one.hash != other.hash


@pytest.mark.parametrize("axis", ["curriculum", "pruning"])
def test_a_line_of_a_technique_changes_its_stage_and_what_follows(plugin, axis):
    def recipe() -> Recipe:
        return compose(["workload=generate", "curriculum=mine", "pruning=mine"], [str(plugin)])

    before = keys(recipe())
    (source,) = plugin.glob(f"*/{axis}/code.py")
    source.write_text(source.read_text() + "# another line\n")
    after = keys(recipe())
    same = [stage for stage in before if before[stage] == after[stage]]
    assert same == ([] if axis == "curriculum" else ["data", "train"])


def test_code_of_a_package_covers_its_files(tmp_path, monkeypatch):
    package = tmp_path / "coded_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("coded_package")
    digests = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        artifacts._source.cache_clear()
        (package / "a.py").write_text(text)
        digests.append(artifacts.code_of(["coded_package"]))
    assert digests[0] == digests[2] != digests[1]
