"""Operations with a reference in plain PyTorch and a fast version of the same signature.

Each public module `kernels/<operation>.py` exposes what the kernel benchmark needs:

    reference(...)                       the specification
    cases(device) -> iterable of shapes  each with a `name`
    inputs(shape, device, dtype, seed)   keyword arguments for every implementation
    implementations(device)              name -> callable, called with **inputs(...)
    flops(shape), bytes(shape, element_bytes=2), tolerance(dtype)

A new operation is a new file: nothing registers itself. Modules whose names begin with an underscore are not listed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from types import ModuleType
from typing import Any

from dyno.errors import UserError

HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up once: compilers cannot trace the look-up


def operations() -> list[str]:
    """The operations there are, by file name; imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def operation(name: str) -> ModuleType:
    """The module of one operation. Raises UserError for a name that has no file."""
    if name not in operations():
        raise UserError(f"there is no kernel operation '{name}'; there is {', '.join(operations())}")
    return importlib.import_module(f"{__name__}.{name}")


def triton_missing(device: Any) -> str | None:
    """Why Triton kernels cannot run on this device (a torch.device or its text), or None when they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    kind = str(device).split(":")[0]
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if kind == "cuda" or (kind == "cpu" and interpreted):
        return None
    return f"Triton needs an NVIDIA GPU, not {kind}; TRITON_INTERPRET=1 runs its kernels slowly on a CPU"
