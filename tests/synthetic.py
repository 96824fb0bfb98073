"""Made-up records in the real schema: grids of recipes with believable figures, every failure, CPU and GPU machines."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from dyno.axes import AXES

FAILURES = {
    "out_of_memory": "predicted 91.2 GB of 80.0 GB: activations 61.0 GB at batch 64",
    "unsupported": "attention=flash needs fp16 or bf16, not fp32",
    "timeout": "no record after 600 s; the worker was in the stage train",
    "non_finite": "loss became NaN at step 41",
    "crashed": "exit code -11 (SIGSEGV)",
    "contaminated": "another process held 3.1 GB of the device",
}
PRECISION = {"fp32": (1.0, 1.0, 1.0), "bf16": (1.9, 0.62, 1.001), "fp16": (1.85, 0.62, 1.002)}
QUANTIZATION = {"none": (1.0, 1.0, 1.0), "int8": (1.25, 0.6, 1.004), "int4": (1.5, 0.45, 1.06)}
ATTENTION = {"math": (1.0, 1.0, 1.0), "sdpa": (1.3, 0.8, 1.0)}
COMPILE = {"off": (1.0, 1.0, 1.0), "on": (1.35, 1.05, 1.0)}
HOUSE = {"precision": PRECISION, "quantization": QUANTIZATION, "attention": ATTENTION, "compile": COMPILE}


def metric(
    value: float | None, unit: str, spread: float = 0.0, count: int = 30, source: str = "", reason: str = ""
) -> dict[str, Any]:
    if value is None:
        return {"value": None, "unit": unit, "count": 0, "reason": reason}
    out: dict[str, Any] = {"value": value, "unit": unit, "count": count, "source": source}
    if spread:
        out |= {"low": value * (1 - spread), "high": value * (1 + spread)}
    return out


def recipe_hash(choices: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()


def record(
    index: int = 0,
    *,
    gpu: bool = False,
    status: str = "ok",
    reason: str | None = None,
    machine: str | None = None,
    noise: float = 0.0,
    knobs: dict[str, Any] | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """One record. Figures follow from the choices by fixed factors, times exp(`noise`)."""
    chosen: dict[str, Any] = {axis.name: [] if axis.many else axis.baseline for axis in AXES}
    chosen |= {
        "model": "160m" if gpu else "nano",
        "workload": "train",
        "hardware": "auto",
        "measure": "default",
    } | choices
    speed = memory = loss = 1.0
    for axis, options in HOUSE.items():
        factors = options.get(chosen[axis], (1.0, 1.0, 1.0))
        speed, memory, loss = speed * factors[0], memory * factors[1], loss * factors[2]
    speed *= float(np.exp(noise))
    rate = (52_000.0 if gpu else 3_400.0) * speed
    digest = recipe_hash(chosen | {"knobs": knobs})
    host = machine or ("gpu-box" if gpu else "laptop")
    config: dict[str, Any] = {axis: {"_target_": f"dyno.techniques.{axis}.X"} for axis in chosen}
    config |= {"model": {"name": chosen["model"], "layers": 4}, "workload": {"measures": "train", "batch": 16}}
    for knob, value in (knobs or {}).items():
        config.setdefault(knob.partition(".")[0], {})[knob.partition(".")[2]] = value
    metrics = {
        "tokens_per_s": metric(rate, "tokens/s", 0.012),
        "step_time_s": metric(16_384 / rate, "s", 0.012, source="device_events" if gpu else "perf_counter"),
        "validation_loss": metric(3.21 * loss, "nats", 0.004, count=65_536),
        "perplexity": metric(float(np.exp(3.21 * loss)), "", 0.004, count=65_536),
        "peak_memory_bytes": metric(6.1e10 * memory if gpu else 1.4e9 * memory, "B", source="torch_allocator"),
        "process_memory_bytes": metric(3.3e9 if gpu else 1.9e9 * memory, "B", source="rss"),
        "compile_time_s": metric(
            31.0 if chosen["compile"] == "on" else None, "s", count=1, reason="nothing was compiled"
        ),
        "model_bytes": metric(6.4e8 * memory, "B", count=1),
        "parameters": metric(1.6e8, "parameters", count=1),
    }
    if gpu:
        metrics |= {
            "energy_j_per_token": metric(520.0 / rate, "J/token", 0.02, source="nvml_counter"),
            "power_w": metric(520.0, "W", 0.02, source="nvml_counter"),
            "mfu": metric(min(0.11 * speed, 0.62), "", 0.012),
        }
    else:
        metrics |= {
            "energy_j_per_token": metric(
                None, "J/token", reason="no energy counter: no NVIDIA GPU and no readable RAPL"
            ),
            "mfu": metric(min(0.09 * speed, 0.8), "", 0.012),
        }
    if status != "ok":
        metrics = {}
    flags = [{"code": "short_run", "detail": "12 s of measured steps"}] if index % 7 == 3 else []
    return {
        "schema": 1,
        "id": f"20260901T12{index // 60 % 60:02d}{index % 60:02d}-{digest[:8]}-{index:06x}",
        "status": status,
        "reason": reason or FAILURES.get(status),
        "created": f"2026-09-01T12:{index // 60 % 60:02d}:{index % 60:02d}Z",
        "duration_s": 40.0 + index,
        "recipe_hash": digest,
        "overrides": [f"model={chosen['model']}", *(f"{k}={v}" for k, v in choices.items())]
        + [f"{k}={v}" for k, v in (knobs or {}).items()],
        "choices": chosen,
        "config": config,
        "metrics": metrics,
        "details": {},
        "windows": {"train": {"steps": 30}},
        "fingerprint": {
            "machine": host,
            "device": "NVIDIA H100 80GB HBM3" if gpu else "AMD EPYC 2 cores",
            "data": "d41d8cd9",
            "weights": "9e107d9d",
            "workload": "train-8x2048",
            "software": {"torch": "2.13.0", "python": "3.11.7"},
            "code": "3f2a9c1",
        },
        "environment": {
            "host": host,
            "cpu": "AMD EPYC 9554",
            "gpu": ["NVIDIA H100 80GB HBM3"] if gpu else [],
            "driver": "570.86" if gpu else None,
            "torch": "2.13.0",
            "git": {"commit": "3f2a9c1", "dirty": False},
        },
        "validity": {"ok": not flags, "flags": flags},
        "artifacts": [],
        "plan": {},
        "ranks": [],
    }


def study(n: int = 36, *, gpu: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """`n` records over four axes, the baseline first, one failure of each kind among them."""
    rng = np.random.default_rng(seed)
    grid = list(itertools.product(PRECISION, QUANTIZATION, ATTENTION, COMPILE))
    out = []
    for index in range(n):
        precision, quantization, attention, compiled = grid[index % len(grid)]
        knobs = {"quantization.group_size": (32, 64, 128)[index % 3]} if quantization == "int4" else None
        failed = list(FAILURES)[(index - 5) // 6 % len(FAILURES)] if index % 6 == 5 else "ok"
        out.append(
            record(
                index,
                gpu=gpu,
                status=failed,
                noise=float(rng.normal(0, 0.02)) if index else 0.0,
                knobs=knobs,
                precision=precision,
                quantization=quantization,
                attention=attention,
                compile=compiled,
            )
        )
    return out


def write(where: Path, records: list[dict[str, Any]], samples: dict[str, dict[str, np.ndarray]] | None = None) -> Path:
    """Put records on disk as a results directory; `samples` maps a record's id to its raw arrays."""
    for item in records:
        folder = where / "runs" / item["id"]
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(item))
        if samples and item["id"] in samples:
            np.savez(folder / "samples.npz", **samples[item["id"]])
    return where
