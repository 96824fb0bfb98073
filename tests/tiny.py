"""Small models, runs and pipelines that the tests of techniques share: milliseconds each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dyno.kernels.attention import eager
from dyno.model.config import ModelConfig
from dyno.model.decoder import Decoder
from dyno.pipeline import Pipeline
from dyno.recipe import Recipe, compose
from dyno.technique import Run
from dyno.techniques.kv_cache.contiguous import ContiguousCache

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 61, "layers": 2, "hidden": 32, "ffn_width": 48, "heads": 4, "kv_heads": 2, "head_dim": 8,
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **changes})


def model(seed: int = 0, sharpness: float = 1.0, **changes: Any) -> Decoder:
    """A decoder with seeded weights; `sharpness` widens them, so that its distributions are far from flat."""
    made = Decoder(config(**changes)).initialise(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(sharpness)
    return made.eval()


def tokens(batch: int, length: int, vocab: int = SIZES["vocab_size"], seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def infer_run(target: Decoder, cache: Any = ContiguousCache, draft: Decoder | None = None, seed: int = 0) -> Run:
    """A run of the infer stage with what decoding needs of it."""
    recipe: Any = SimpleNamespace(config={"seed": seed})
    run = Run(recipe, "infer", CPU, Path("."), model=target, draft=draft)
    run.parts.update(cache=cache, attention=eager)
    return run


def pipeline(directory: Path, *overrides: str) -> Pipeline:
    """A pipeline of a composed recipe whose artifacts lie under `directory`."""
    return pipeline_of(compose([f"results_dir={directory}", *overrides]), directory)


def pipeline_of(recipe: Recipe, directory: Path) -> Pipeline:
    return Pipeline(recipe, CPU, directory)
