"""data -> train -> compress: artifacts in, techniques applied, artifacts out, from the cache where it has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.artifacts import Store
from dyno.recipe import Recipe, compose
from dyno.technique import Run

if TYPE_CHECKING:
    import torch

    from dyno.measure.window import Meter
    from dyno.model.decoder import Decoder


class Pipeline:
    """The stages of one recipe in a worker: keys, artifacts, and what was reused."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        directory: Path,
        *,
        meter: Meter | None = None,
        rank: int = 0,
        ranks: int = 1,
        progress: Callable[[str], None] = lambda text: None,
    ):
        self.recipe, self.device, self.directory = recipe, device, directory
        self.meter, self.rank, self.ranks, self.progress = meter, rank, ranks, progress
        self.store = Store(Path(recipe.config["results_dir"]).resolve() / "artifacts")
        self.artifacts: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}
        self._data: tuple[Path, dict[str, Any], str] | None = None

    @property
    def measured(self) -> str:
        return self.recipe.config["workload"]["measures"]

    def run(self, stage: str) -> Run:
        """A fresh run of a stage, its details kept in the pipeline's. Only the measured stage is one of several ranks."""
        details = self.details.setdefault(stage, {})
        rank, ranks = (self.rank, self.ranks) if stage == self.measured else (0, 1)
        run = Run(self.recipe, stage, self.device, self.directory, rank, ranks, details=details)
        run.build_model = self.build_model
        return run

    def used(self, stage: str, key: str, reused: bool) -> None:
        self.artifacts.append({"stage": stage, "key": key, "reused": reused})

    def data(self) -> tuple[Path, dict[str, Any], str]:
        """The data artifact: directory, manifest, key."""
        from dyno.stages import data

        if self._data is not None:
            return self._data
        key = data.key(self)
        path = None if self.measured == "data" else self.store.get("data", key)
        self.used("data", key, path is not None)
        if path is None:
            self.progress("data: building the corpus")
            run = self.run("data")
            fresh: dict[str, Any] = {}

            def write(directory: Path) -> dict[str, Any]:
                fresh.update(data.build(self, directory, run))
                return fresh

            path = self.store.put("data", key, write)
        else:
            fresh = {}
        self._data = path, {**self.store.manifest(path), **fresh}, key
        return self._data

    def inner(self, overrides: list[str]) -> Pipeline:
        """Another recipe's pipeline (a teacher's, a draft's): same corpus, tokenizer and seed unless overridden."""
        same = [o for o in self.recipe.overrides if o.split("=")[0].split(".")[0] in SHARED_BY_SUBRECIPES]
        where = f"results_dir={self.recipe.config['results_dir']}"
        recipe = compose([*same, *overrides, "workload.measures=infer", where], self.recipe.plugins)
        return Pipeline(recipe, self.device, self.directory, rank=self.rank, ranks=1, progress=self.progress)

    def build_model(self, overrides: list[str]) -> Decoder:
        """The model of an inner recipe, from the cache or trained now."""
        from dyno.stages import train

        other = self.inner(overrides)
        model = train.prepare(other)[0]()
        self.artifacts += other.artifacts
        return model


# What a teacher or draft model shares with the recipe that holds it.
SHARED_BY_SUBRECIPES = ("corpus", "tokenizer", "seed", "data_filters", "mixture")
