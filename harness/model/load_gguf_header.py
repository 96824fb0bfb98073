"""The header of a GGUF file: metadata and the table of tensors, without reading a weight and without torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian). A reader of our own
because the `gguf` package's takes seconds for a vocabulary of 50,000 strings, and a plan needs only the sizes.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dyno.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """One tensor: shape with the slowest dimension first, GGML type number, first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; a leading dot stands for the architecture: `.block_count`."""
        full = f"{self.metadata.get('general.architecture')}{key}" if key.startswith(".") else key
        return self.metadata.get(full, default)

    def bytes(self) -> np.ndarray:
        """The whole file, mapped: (N,) uint8. A plain array, whose thousands of slices cost less than a memmap's."""
        return np.memmap(self.path, mode="r", dtype=np.uint8).view(np.ndarray)


class _Cursor:
    """Reads the file front to back; running past its end raises struct.error."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        end = self.at + length
        if end > len(self.data):
            raise struct.error(f"a text of {length} bytes at byte {self.at} ends after the file")
        raw, self.at = self.data[self.at : end], end
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        element, count = self.take("IQ")
        if count > len(self.data):
            raise struct.error(f"a list of {count} values is longer than the file")
        if element == _STRING:
            return [self.text() for _ in range(count)]
        return list(self.take(f"{count}{_SCALARS[element]}"))


def read_header(path: str | Path) -> Header:
    """Parse the header. Raises UserError for a file that is not GGUF, cut short, or in pieces."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no GGUF file {file}")
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(file, _Cursor(data))
    except UserError:
        raise
    except (struct.error, KeyError, ValueError) as error:
        raise UserError(f"{file} is no valid GGUF file, or was cut short: {error}") from error
    if header.get("split.count", 1) > 1:
        raise UserError(f"{file} is one piece of several; join them first with `llama-gguf-split --merge`")
    return header


def _parse(file: Path, cursor: _Cursor) -> Header:
    magic, version, tensor_count, value_count = cursor.take("4sIQQ")
    if magic != b"GGUF":
        raise UserError(f"{file} is no GGUF file: it begins with {magic!r}")
    if version not in (2, 3):
        raise UserError(f"{file} is GGUF version {version}; versions 2 and 3 (little endian) can be read")
    metadata = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.take("I")[0])
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        (dimensions,) = cursor.take("I")
        shape = cursor.take(f"{dimensions}Q")[::-1]
        table[name] = (shape, *cursor.take("IQ"))
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    return Header(file, metadata, {n: Entry(shape, kind, base + at) for n, (shape, kind, at) in table.items()})
