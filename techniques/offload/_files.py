"""Optimizer state in a file: read ahead, written behind, past the page cache where that is possible."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from dyno.errors import RunFailure, UserError
from dyno.techniques.offload._side import Side

PAGE = 4096  # bytes: direct I/O takes offsets, lengths and addresses at multiples of it
BUFFERS = 3  # one is read, one steps, one is written
KINDS = 3  # master, first and second moment lie one after another in a piece


class FileState:
    """Masters and moments in one preallocated file that nobody else sees and that is gone with this process.

    Args:
        directory: where; its disk must have room for 12 bytes a number. chunk: numbers in a piece.

    Raises:
        UserError: there is no room, or the directory cannot be written.
    """

    def __init__(self, directory: Path, numbers: int, chunk: int, side: Side):
        self.numbers = numbers
        self.chunk = min(_up(chunk), _up(numbers))
        self.pieces = -(-numbers // self.chunk)
        self.bytes = self.pieces * self._size
        self.file, self.direct = _open(directory, self.bytes)
        self.buffers = [side.pinned(KINDS * self.chunk) for _ in range(BUFFERS)]
        self.threads = ThreadPoolExecutor(2)

    @property
    def _size(self) -> int:
        return KINDS * 4 * self.chunk

    def pin(self, part: slice) -> None:
        """The buffers are pinned."""

    def sweep(self, settle: Callable[[], None]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        reading = self.threads.submit(self._read, 0)
        writing: dict[int, Future[None]] = {}
        try:
            for piece in range(self.pieces):
                reading.result()
                following = piece + 1
                if following < self.pieces:
                    if following >= BUFFERS:
                        writing.pop(following - BUFFERS).result()
                        settle()
                    reading = self.threads.submit(self._read, following)
                start = piece * self.chunk
                used = min(self.chunk, self.numbers - start)
                master, first, second = self.buffers[piece % BUFFERS].view(KINDS, self.chunk)[:, :used]
                yield start, master, first, second
                writing[piece] = self.threads.submit(self._write, piece)
            for future in writing.values():
                future.result()
        except OSError as error:
            raise RunFailure(f"the file of the optimizer's state failed: {error.strerror}") from error

    def _read(self, piece: int) -> None:
        view = self._bytes(piece)
        done = 0
        while done < self._size:
            count = os.preadv(self.file, [view[done:]], piece * self._size + done)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than it was made")
            done += count
        self._forget(piece)

    def _write(self, piece: int) -> None:
        view = self._bytes(piece)
        done = 0
        while done < self._size:
            done += os.pwritev(self.file, [view[done:]], piece * self._size + done)
        if not self.direct:
            os.fdatasync(self.file)  # pages that are not on the disk yet cannot be dropped
        self._forget(piece)

    def _bytes(self, piece: int) -> memoryview:
        """A piece's buffer."""
        return memoryview(self.buffers[piece % BUFFERS].numpy().data).cast("B")

    def _forget(self, piece: int) -> None:
        """Leave nothing in the page cache, which would make the next read a copy from memory."""
        if not self.direct:
            os.posix_fadvise(self.file, piece * self._size, self._size, os.POSIX_FADV_DONTNEED)


def _up(numbers: int) -> int:
    """So many fp32 numbers, rounded up to whole pages."""
    return -(-numbers * 4 // PAGE) * PAGE // 4


def _open(directory: Path, size: int) -> tuple[int, bool]:
    """A file of so many zero bytes without a name, and whether it bypasses the page cache."""
    path = directory / f".optimizer-{secrets.token_hex(4)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        try:
            file, direct = os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # Linux makes the file before it finds that it cannot open it so
            file, direct = os.open(path, flags, 0o600), False
        path.unlink()
        try:
            os.posix_fallocate(file, 0, size)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        need = f"{size / 2**30:.2f} GiB of optimizer state"
        raise UserError(f"offload.path={directory} cannot hold {need}: {error.strerror}") from error
    return file, direct
