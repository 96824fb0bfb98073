"""The compress stage: distillation, kv_heads, pruning, quantization, in that order, on a trained model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dyno.artifacts import acting, code_of
from dyno.model.decoder import Decoder
from dyno.recipe import digest
from dyno.record import Metric
from dyno.stages import data, train
from dyno.technique import Baseline, Technique

if TYPE_CHECKING:
    from dyno.pipeline import Pipeline


def compress(pipeline: Pipeline) -> tuple[Decoder, Callable[[], Decoder], str]:
    """(compressed model, what makes the unmodified model that entered, weights key).

    After each axis the model is kept as an artifact while it still is a plain decoder (a distilled student, a pruned
    model); packed weights are made anew from it, which costs milliseconds.
    """
    original, before = train.prepare(pipeline)
    run = pipeline.run("compress")
    run.model = original()
    data_path, _, _ = pipeline.data()
    stream = np.load(data_path / "train.npy", mmap_mode="r")
    run.stream = stream
    for axis, chosen in acting(pipeline.recipe, "compress").items():
        for technique in chosen:
            if isinstance(technique, Baseline):
                continue
            code = technique_code(technique)
            parts = [before, axis, type(technique).__qualname__, technique.knobs(), code]
            before = digest([*parts, *inner_key(pipeline, technique)])[:24]
            cached = pipeline.store.get("compress", before)
            if cached is not None:
                run.model = train.load(pipeline, cached).eval()
                pipeline.used("compress", before, True)
                run.details.update(pipeline.store.manifest(cached)["details"])
                continue
            pipeline.progress(f"compress: {technique.name}")
            technique.apply(run)
            assert run.model is not None
            run.model.eval()
            if is_plain(run.model):
                keep(pipeline, before, run.model, run.details)
    assert run.model is not None
    return run.model, original, before


def technique_code(technique: Technique) -> str:
    """Digest of the folder that a technique is written in, and of the kernels that it may call."""
    folder = Path(inspect.getfile(type(technique))).parent
    return digest([[path.read_text() for path in sorted(folder.glob("*.py"))], code_of(["dyno.kernels"])])


def inner_key(pipeline: Pipeline, technique: Technique) -> list[str]:
    """The weights key of the recipe inside a technique: a teacher that is another one makes another student."""
    if not technique.subrecipe:
        return []
    other = pipeline.inner(technique.subrecipe)
    return [train.key(other, data.key(other))]


def is_plain(model: Decoder) -> bool:
    """Whether a checkpoint of this model can be loaded as a decoder of its config."""
    with torch.device("meta"):
        expected = Decoder(model.config).state_dict()
    state = model.state_dict()
    return state.keys() == expected.keys() and all(state[k].shape == expected[k].shape for k in state)


def keep(pipeline: Pipeline, key: str, model: Decoder, details: dict[str, Any]) -> None:
    def write(directory: Path) -> dict[str, Any]:
        train.save(directory, model, model.state_dict())
        return {"details": details}

    pipeline.store.put("compress", key, write)
    pipeline.used("compress", key, False)


def size_metrics(model: Decoder) -> dict[str, Metric]:
    """Bytes of everything that is stored, bits a weight over the whole model, share of zeros in the matrices."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    weights = train.parameter_counts(model.config)[0]
    zeros = total = 0
    for module in model.blocks.modules():
        packed = getattr(module, "dequantized", None)  # what a packed layer stands for
        dense = packed() if callable(packed) else module.weight if isinstance(module, torch.nn.Linear) else None
        if dense is not None:
            zeros += int((dense == 0).sum())
            total += dense.numel()
    return {
        "model_bytes": Metric(stored, "B", source="tensor sizes"),
        "bits_per_weight": Metric(8 * stored / weights, "bit", source="tensor sizes"),
        "sparsity": Metric(zeros / max(1, total), "1", source="zeros in block matrices"),
        "parameters": Metric(weights, "parameters", source="count"),
    }
