"""Corpus configs to documents: the embedded corpus, local files, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dyno.data.document import Document
from dyno.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
PIECE_BYTES = 8_192


def load_corpus(corpus: Mapping[str, Any]) -> list[Document]:
    """The documents that a `corpus` config asks for, in a fixed order, with unique ids and newlines as \\n.

    Kinds and their keys (the rest has defaults):
      embedded: size_bytes, seed, sources.
      path: `path` (a file or a directory), text_field, source_field, glob, piece_bytes, max_bytes.
      hf: `name` (a dataset on the hub), subset, split, revision, text_field, source_field, max_bytes.

    Reading stops before the document with which the texts would pass `max_bytes`; None reads all. Raises UserError for
    what the user can put right, a corpus without text included.
    """
    kind = corpus.get("kind")
    readers: dict[Any, Callable[[Mapping[str, Any]], Iterable[Document]]] = {
        "embedded": _embedded,
        "path": _path,
        "hf": _hf,
    }
    if kind not in readers:
        raise UserError(f"corpus.kind={kind!r} is unknown: choose {', '.join(readers)}")
    documents = list(_bounded(readers[kind](corpus), corpus.get("max_bytes")))
    if not documents:
        raise UserError(f"the corpus {corpus.get('path') or corpus.get('name') or kind} holds no text")
    return documents


def _bounded(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    left = float("inf") if max_bytes is None else max_bytes
    for document in documents:
        left -= len(document.text.encode())
        if left < 0:
            return
        yield document


def _embedded(corpus: Mapping[str, Any]) -> list[Document]:
    from dyno.data.embedded import build

    return build(int(corpus.get("size_bytes", 3_000_000)), int(corpus.get("seed", 0)), corpus.get("sources")).documents


def _path(corpus: Mapping[str, Any]) -> Iterator[Document]:
    if not corpus.get("path"):
        raise UserError("corpus.path is not set: add corpus.path=FILE_OR_DIRECTORY")
    root = Path(corpus["path"]).expanduser()
    if root.is_file():
        files = [(root, root.name, root.stem)]
    elif root.is_dir():
        files = _listing(root, corpus.get("glob"))
    else:
        raise UserError(f"corpus.path={root} does not exist: name a file ({', '.join(SUFFIXES)}) or a directory")
    fields = (corpus.get("text_field", "text"), corpus.get("source_field"))
    for path, name, source in files:
        try:
            if path.suffix == ".jsonl":
                yield from _records(_jsonl_rows(path), path, name, source, "line", *fields)
            elif path.suffix == ".parquet":
                yield from _records(_parquet_rows(path, fields), path, name, source, "row", *fields)
            else:
                yield from _text(path, name, source, int(corpus.get("piece_bytes", PIECE_BYTES)))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error


def _listing(root: Path, glob: str | None) -> list[tuple[Path, str, str]]:
    """(path, name, source) of the files to read, by name. The source is the folder below `root`, or the stem."""
    found = []
    for path in sorted(root.glob(glob or "**/*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and (glob is not None or path.suffix in SUFFIXES):
            found.append((path, "/".join(parts), parts[0] if len(parts) > 1 else path.stem))
    if not found:
        wanted = f"glob {glob!r}" if glob else f"a name ending in {', '.join(SUFFIXES)}"
        raise UserError(f"corpus.path={root} has no file with {wanted}: set corpus.glob or another directory")
    return found


def _text(path: Path, name: str, source: str, piece_bytes: int) -> Iterator[Document]:
    """A text file as documents of whole paragraphs, as many as fit in `piece_bytes`; longer paragraphs stay whole."""
    text = path.read_text(encoding="utf-8-sig")
    piece: list[str] = []
    size = number = 0
    for paragraph in text.split("\n\n"):
        needed = len(paragraph.encode()) + 2
        if piece and size + needed > piece_bytes:
            yield from _document(f"{name}#{number}", source, "\n\n".join(piece))
            piece, size, number = [], 0, number + 1
        piece.append(paragraph)
        size += needed
    yield from _document(f"{name}#{number}", source, "\n\n".join(piece))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} holds {type(row).__name__}, wanted one JSON object a line")
            yield number, row


def _parquet_rows(path: Path, fields: tuple[str, str | None]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    with table:
        # Only columns that are there are asked for; _records names the ones that are not, with what there is instead.
        names = table.schema_arrow.names
        wanted = [field for field in fields if field in names]
        if fields[0] not in names or len(wanted) < sum(field is not None for field in fields):
            wanted = names
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _records(
    rows: Iterable[tuple[int, dict[str, Any]]],
    where: object,
    name: str,
    source: str,
    unit: str,
    text_field: str,
    source_field: str | None,
) -> Iterator[Document]:
    """Documents of numbered rows. Empty texts are passed over; a missing or wrong field is the user's to know."""
    for number, row in rows:
        for key, field in (("text_field", text_field), ("source_field", source_field)):
            if field is not None and field not in row:
                raise UserError(
                    f"{where} {unit} {number} has no field {field!r}: set corpus.{key} to one of {sorted(row)}"
                )
        text = row[text_field]
        if not isinstance(text, str):
            raise UserError(f"{where} {unit} {number}: field {text_field!r} holds {type(text).__name__}, wanted text")
        group = source if source_field is None else str(row[source_field])
        yield from _document(f"{name}#{number}", group, text)


def _document(identity: str, source: str, text: str) -> Iterator[Document]:
    """One document, or none for blank text. Lone surrogates, which JSON can spell and UTF-8 cannot, become '?'."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode("utf-8")
    if text.strip():
        yield Document(identity, source, text)


def _hf(corpus: Mapping[str, Any]) -> Iterator[Document]:
    """Streams a dataset of the hub (or of the local cache), without running code of the dataset."""
    name = corpus.get("name")
    if not name:
        raise UserError("corpus.name is not set: add corpus.name=OWNER/DATASET")
    try:
        import datasets
    except ImportError as error:
        raise UserError("corpus=hf needs the package datasets: pip install 'llm-dyno[hf]'") from error
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *_network_errors())
    part = corpus.get("split", "train")
    options = {"split": part, "revision": corpus.get("revision"), "streaming": True}
    try:
        stream = datasets.load_dataset(name, corpus.get("subset"), **options)
        rows = ((number, dict(row)) for number, row in enumerate(stream, 1))
        fields = (corpus.get("text_field", "text"), corpus.get("source_field"))
        yield from _records(rows, f"dataset {name} ({part})", f"{name}/{part}", name, "row", *fields)
    except UserError:
        raise
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the dataset {name} (split {part}): {reason}. Check the name and the network, or export it to "
            "JSONL or Parquet on a machine that has one and use corpus=path"
        ) from error


def _network_errors() -> list[type[Exception]]:
    """The hub client's errors and their ancestors in its HTTP library, which are no OSError there."""
    try:
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return []
    return [kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception]
