"""Artifacts: what a stage hands on, content-addressed under <results_dir>/artifacts/<stage>/<key>.

A key digests the stage's own configuration, the key before it, and the source of the code involved; so a changed knob,
corpus or line of a technique misses the cache. Artifacts are written aside and renamed: half of one is never seen.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dyno.axes import AXES, acts_in
from dyno.recipe import Recipe, digest
from dyno.record import write_json
from dyno.technique import Baseline, Technique

MANIFEST = "manifest.json"


@lru_cache(maxsize=256)
def _source(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def code_of(modules: Iterable[str]) -> str:
    """Digest of the source files of loaded modules, and of the packages' own files where a package is named."""
    sources = []
    for name in sorted(set(modules)):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None:
            continue
        files = sorted(Path(file).parent.glob("*.py")) if Path(file).name == "__init__.py" else [Path(file)]
        sources.append([name, [_source(str(f)) for f in files]])
    return digest(sources)


def acting(recipe: Recipe, stage: str) -> dict[str, list[Technique]]:
    """The techniques that act in a stage of this recipe, by axis, in order."""
    measured = recipe.config["workload"]["measures"]
    return {axis.name: recipe.techniques[axis.name] for axis in AXES if acts_in(axis, stage, measured)}


def stage_key(recipe: Recipe, stage: str, before: str, subject: dict[str, Any], modules: Iterable[str]) -> str:
    """The content address of a stage's artifact."""
    techniques = acting(recipe, stage)
    knobs = {
        axis: [[type(t).__qualname__, t.knobs()] for t in chosen if not isinstance(t, Baseline)]
        for axis, chosen in techniques.items()
    }
    files = []
    for chosen in techniques.values():
        for technique in chosen:
            folder = Path(inspect.getfile(type(technique))).parent
            if not isinstance(technique, Baseline):
                files += [_source(str(f)) for f in sorted(folder.glob("*.py"))]
    return digest([stage, before, subject, knobs, files, code_of(modules)])[:24]


@dataclass(frozen=True)
class Store:
    """The artifacts under one results directory."""

    root: Path

    def get(self, stage: str, key: str) -> Path | None:
        """The artifact's directory when it is whole, else None."""
        path = self.root / stage / key
        if not (path / MANIFEST).is_file():
            return None
        try:
            os.utime(path)  # prune goes by last use
        except FileNotFoundError:
            return None  # pruned this moment
        except OSError:
            pass  # a directory that is only ours to read
        return path

    def put(self, stage: str, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
        """Call write(directory) and publish what it wrote with the manifest it returned. The first writer wins."""
        parent = self.root / stage
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=parent, prefix=".writing-"))
        try:
            manifest = write(aside)
            write_json(aside / MANIFEST, {"stage": stage, "key": key, "created_s": time.time(), **manifest})
            try:
                os.rename(aside, parent / key)
            except OSError:
                if (parent / key / MANIFEST).is_file():
                    shutil.rmtree(aside)  # another run wrote the same artifact first
                else:
                    self._remove(parent / key)  # half of one: a copy or a deletion that was broken off
                    os.rename(aside, parent / key)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return parent / key

    def _remove(self, path: Path) -> None:
        """Delete an artifact; renamed before, so that nobody takes what is left of it for whole."""
        aside = path.with_name(f".writing-{path.name.lstrip('.')}-{secrets.token_hex(3)}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)

    def manifest(self, path: Path) -> dict[str, Any]:
        return json.loads((path / MANIFEST).read_text())

    def entries(self) -> list[dict[str, Any]]:
        """Every artifact: stage, key, bytes, last use (seconds since the epoch); newest use first."""
        rows = []
        for path in self.root.glob("*/*"):
            if path.is_dir():
                try:
                    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                    used_s = path.stat().st_mtime
                except FileNotFoundError:
                    continue  # written or removed by another run meanwhile
                whole = (path / MANIFEST).is_file() and not path.name.startswith(".")
                rows.append(
                    {
                        "stage": path.parent.name,
                        "key": path.name,
                        "bytes": size,
                        "used_s": used_s,
                        "whole": whole,
                    }
                )
        return sorted(rows, key=lambda row: -row["used_s"])

    def prune(self, older_than_s: float = 0.0) -> list[dict[str, Any]]:
        """Delete artifacts unused for so long, and what a killed writer left an hour ago or more."""
        now, gone = time.time(), []
        for row in self.entries():
            limit = older_than_s if row["whole"] else max(older_than_s, 3600.0)
            if now - row["used_s"] >= limit:
                self._remove(self.root / row["stage"] / row["key"])
                gone.append(row)
        return gone
