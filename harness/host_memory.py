"""Host memory by the gigabyte: pages that come late, all threads at once, and pinned to the byte.

The first write to a page is what large host buffers cost: on a virtual machine of two cores 0.4 to 1 GiB/s where a
second write goes at 16 to 24. So there is no byte more than asked for (torch's pinned allocator rounds up to a power of
two), a buffer of zeros is not written, and what fills one is written by all threads, not by the driver's one.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from dyno.errors import RunFailure

_wholes: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()  # by their first address
STAGE = 2**24  # numbers of the pinned buffer that carries device tensors into ordinary memory


def zeros(numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A flat tensor at a page's beginning; a page is there once it is written to.

    Raises:
        RunFailure: the host has not so much memory.
    """
    size = numbers * dtype.itemsize
    try:
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RunFailure(f"{size / 2**30:.1f} GiB of host memory: {error.strerror}") from error
    array = np.frombuffer(memory, np.uint8)
    _wholes[array.ctypes.data] = array
    return torch.from_numpy(array)[:size].view(dtype)


def pin(tensor: Tensor) -> Tensor:
    """Lock the pages under a part of a `zeros` for as long as the whole lives; returns the part.

    Pages that were never written to are made one by one here: write first.

    Raises:
        RunFailure: the driver refuses.
    """
    runtime = torch.cuda.cudart()
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    error = int(runtime.cudaHostRegister(begin, -(-(end - begin) // mmap.PAGESIZE) * mmap.PAGESIZE, 1))
    if error:
        raise RunFailure(f"{tensor.nbytes / 2**30:.1f} GiB of host memory cannot be pinned: CUDA error {error}")
    # An array's weak references end before its memory does. At exit the driver unlocks by itself.
    weakref.finalize(_wholes[tensor.untyped_storage().data_ptr()], _unlock, begin).atexit = False
    return tensor


def _unlock(begin: int) -> None:
    torch.cuda.synchronize()  # a copy may be on its way
    torch.cuda.cudart().cudaHostUnregister(begin)


def copied(source: Tensor) -> Tensor:
    """A tensor of any device in ordinary host memory."""
    copy = zeros(source.numel(), source.dtype)
    fetch(copy, source.reshape(-1))
    return copy.view(source.shape)


def fetch(to: Tensor, source: Tensor) -> None:
    """Copy a flat tensor of any device into ordinary host memory."""
    if source.device.type == "cpu":
        to.copy_(source)
        return
    stage = torch.empty(min(STAGE, len(source)), dtype=source.dtype, pin_memory=True)
    for part, there in zip(to.split(STAGE), source.split(STAGE), strict=True):
        part.copy_(stage[: len(there)].copy_(there))
