"""The data stage: corpus -> filters -> mixture -> token streams for training and validation."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyno import data
from dyno.artifacts import acting, stage_key
from dyno.data import packages
from dyno.errors import UserError
from dyno.record import Metric
from dyno.technique import Run

if TYPE_CHECKING:
    from dyno.pipeline import Pipeline


def inputs(*nodes: dict[str, Any]) -> list[Any]:
    """What lies outside the configuration: versions of the embedded corpus's packages, and named files as they are."""
    found: list[Any] = []
    for node in nodes:
        if node["kind"] == "embedded":
            found += [[name, installed(name)] for name in (*packages.PACKAGES, *packages.LICENSED)]
        elif node.get("path"):
            root = Path(node["path"]).expanduser()
            files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
            found += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.exists()]
    return found


def installed(name: str) -> str | None:
    """The version of one distribution: reading the metadata of all of them takes seconds on some machines."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def key(pipeline: Pipeline) -> str:
    config = pipeline.recipe.config
    subject = {
        "corpus": config["corpus"],
        "tokenizer": tokenizer_node(config),
        "seed": config["seed"],
        "inputs": inputs(config["corpus"], tokenizer_node(config)),
    }
    return stage_key(pipeline.recipe, "data", "", subject, ["dyno.data", __name__])


def tokenizer_node(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer to use: the recipe's, or the one that belongs to a model from outside."""
    if config["model"]["source"] == "config":
        return config["tokenizer"]
    from dyno.model.loaders import tokenizer_of

    path = tokenizer_of(config["model"])
    return {"kind": "file", "path": str(path), "eos_token": None} if path else config["tokenizer"]


def build(pipeline: Pipeline, directory: Path, run: Run) -> dict[str, Any]:
    """Write train.npy, validation.npy and the tokenizer; return the manifest."""
    config = pipeline.recipe.config
    started = time.perf_counter()
    documents = data.load_corpus(config["corpus"])
    fingerprint = data.fingerprint(documents)
    train, validation = data.split(documents, config["corpus"]["validation_fraction"], config["corpus"]["split_seed"])
    loaded_s = time.perf_counter() - started
    run.documents = train
    sizes = {"documents_in": len(train), "bytes_in": sum(len(d.text.encode()) for d in train)}
    started = time.perf_counter()
    run.parts["mixture"] = None
    for chosen in acting(pipeline.recipe, "data").values():
        for technique in chosen:
            technique.apply(run)
    filter_s = time.perf_counter() - started
    if not run.documents:
        raise UserError("the data filters removed every document; loosen one of them")
    started = time.perf_counter()
    # From the text before the filters: recipes that filter differently share one vocabulary, so losses compare.
    tokenizer = data.build_tokenizer(tokenizer_node(config), train)
    stream = data.pack(run.documents, tokenizer, run.part("mixture"), None, config["seed"])
    held_out = data.pack(validation, tokenizer, None, None, config["seed"])
    token_s = time.perf_counter() - started
    np.save(directory / "train.npy", stream)
    np.save(directory / "validation.npy", held_out)
    tokenizer.save(directory)
    return sizes | {
        "fingerprint": fingerprint,
        "documents": len(run.documents),
        "bytes": sum(len(d.text.encode()) for d in run.documents),
        "tokens": len(stream),
        "validation_tokens": len(held_out),
        "vocab_size": tokenizer.vocab_size,
        "end_token": tokenizer.eos_id,
        "load_s": loaded_s,
        "filter_s": filter_s,
        "tokenize_s": token_s,
        "held_out_overlap": data.held_out_overlap(run.documents, validation),
        "details": run.details,
    }


def metrics(manifest: dict[str, Any]) -> dict[str, Metric]:
    """The row of a measured data stage (one pass over the corpus, wall clock)."""
    clock = "perf_counter, one pass"
    out = {
        "documents": Metric(manifest["documents"], "documents", source="count"),
        "documents_kept": Metric(manifest["documents"] / max(1, manifest["documents_in"]), "1", source="count"),
        "corpus_bytes": Metric(manifest["bytes"], "B", source="count"),
        "tokens": Metric(manifest["tokens"], "tokens", source="count"),
        "filter_time_s": Metric(manifest["filter_s"], "s", source=clock),
        "tokens_per_s": Metric(manifest["tokens"] / max(1e-9, manifest["tokenize_s"]), "tokens/s", source=clock),
    }
    if manifest["filter_s"] > 1e-4:
        rate = manifest["bytes_in"] / manifest["filter_s"]
        out["filter_bytes_per_s"] = Metric(rate, "B/s", source=clock)
    return out
