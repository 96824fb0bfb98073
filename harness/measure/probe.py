"""The machine's own ceilings: the fastest matrix product and copy. Measured once, then cached."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dyno import turns
from dyno.home import home
from dyno.measure.clock import gpu_uuid, synchronize
from dyno.measure.environment import machine_id
from dyno.record import write_json

_SIZE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
"""A copy must not fit into any cache."""
_BUDGET_S = 0.4
"""Seconds for each figure; five figures on a CPU machine stay under three."""
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cache_dir() -> Path:
    """Where measured ceilings are kept."""
    return home() / "ceilings"


def ceilings(device: torch.device, refresh: bool = False) -> dict[str, Any]:
    """The ceilings of `device`, from the cache, or probed and put there.

    Returns:
        matrix_flop_per_s: {dtype: FLOP/s} of square products; copy_byte_per_s: bytes read plus bytes written a second;
        and under which conditions: machine, device, torch, threads, created, probe_s.

    One process probes at a time (a file lock), so that the ranks of a run do not measure each other. The key holds the
    number of threads, because a CPU's ceilings are those of the threads that torch may use.
    """
    name, uuid = (torch.cuda.get_device_name(device), gpu_uuid(device)) if device.type == "cuda" else ("cpu", None)
    facts = {
        "machine": machine_id(), "device": name, "uuid": uuid, "torch": torch.__version__,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    with turns.take(folder / f"{key}.lock"):
        if path.exists() and not refresh:
            return json.loads(path.read_bytes())
        start = time.perf_counter()
        found = facts | probe(device) | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        found["probe_s"] = round(time.perf_counter() - start, 3)
        write_json(path, found)
        return found


def probe(device: torch.device) -> dict[str, Any]:
    """Measure the ceilings now: the best of the repetitions, because a ceiling is what was reached."""
    dtypes = ("bf16", "fp16", "tf32", "fp32") if device.type == "cuda" else ("fp32", "bf16")
    matrix = {dtype: _matrix_flop_per_s(device, dtype) for dtype in dtypes}
    out = {"matrix_flop_per_s": matrix, "copy_byte_per_s": _copy_byte_per_s(device)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return out


def _matrix_flop_per_s(device: torch.device, dtype: str) -> float:
    size = _SIZE[device.type] if (device.type, dtype) != ("cpu", "bf16") else 512  # emulated, and slow, on many CPUs
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(_DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    # Not allow_tf32: reading that raises where a recipe has chosen tf32 by this newer name.
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        return 2 * size**3 / _best_s(lambda: torch.mm(a, b, out=out), device)
    finally:
        matmul.fp32_precision = before


def _copy_byte_per_s(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), device)


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of at least two and at most 30 repetitions, after one that is not counted, within the time."""
    with torch.inference_mode():
        work()
        synchronize(device)
        begin, best = time.perf_counter(), float("inf")
        for i in range(30):
            start = time.perf_counter()
            work()
            synchronize(device)
            end = time.perf_counter()
            best = min(best, end - start)
            if i > 0 and end - begin > _BUDGET_S:
                break
    return best
