"""What the values of a recipe may be: of their kind, finite, and no smaller than what can be planned and run."""

from __future__ import annotations

import math
from typing import Any

from dyno.errors import UserError
from dyno.model.config import BYTE_VOCABULARY

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}

LEAST_GIB = 2.0  # of a memory limit: a context alone takes more than one
LINK = {"byte_per_s": 1.0, "latency_s": 0.0}
# The least that a number may be, where an option has it: 1 what must be there, 0 what can be left out.
LEAST: dict[str, Any] = {
    "seed": 0,
    "model": {
        "layers": 1, "hidden": 1, "ffn_width": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "vocab_size": 1, "max_seq": 1,
        "rope_theta": 1.0, "norm_eps": 0.0,
    },
    "tokenizer": {"vocab_size": BYTE_VOCABULARY, "min_frequency": 0},
    "workload": {
        "batch": 1, "seq": 1, "steps": 0, "lr": 0.0, "eval_tokens": 0, "checkpoint_every": 0, "requests": 0, "prompt": 0,
        "new_tokens": 0,
    },
    "measure": {
        "min_steps": 0, "max_steps": 1, "min_seconds": 0.0, "warmup_min_steps": 0, "warmup_max_steps": 1,
        "warmup_tolerance": 0.0, "bootstrap": 1, "time_limit_s": 1, "seed": 0,
        "memory_limit_gib": LEAST_GIB,
    },
    "hardware": {
        "memory_bytes": 1, "power_limit_w": 1.0,
        "peak_flop_per_s": {"bf16": 1.0, "fp16": 1.0, "tf32": 1.0, "fp32": 1.0, "fp8": 1.0, "int8": 1.0},
        "peak_byte_per_s": {"value": 1.0}, "host": LINK, "node": {"gpus": 1, **LINK}, "rack": {"gpus": 1, **LINK},
        "network": LINK, "storage": LINK, "price_usd_per_hour": {"value": 0.0}, "kwh_price_usd": {"value": 0.0},
        "pue": {"value": 1.0}, "grid_gco2_per_kwh": {"value": 0.0},
    },
}  # fmt: skip


def check_kind(name: str, value: Any, default: Any) -> None:
    """A value must be of its default's kind; a whole number is a number too. A default of null takes anything."""
    kind = type(default)
    if kind not in KINDS or type(value) is kind or (kind is float and type(value) is int):
        return
    raise UserError(f"{name} is {value!r}, it takes {KINDS[kind]}")


def check_finite(value: Any, name: str = "") -> None:
    """No NaN or infinity anywhere: a record, which is JSON, could not hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}, it takes a finite number")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        check_finite(item, f"{name}.{key}".lstrip("."))


def check_sizes(config: dict[str, Any]) -> None:
    """No number below its least, and none that another one rules out."""
    _check_least(config, LEAST, "")
    measure, workload = config["measure"], config["workload"]
    if measure["min_steps"] > (most := measure["max_steps"]):
        raise UserError(f"measure.min_steps={measure['min_steps']} is more than measure.max_steps={most}")
    if workload.get("new_tokens"):
        for knob in ("requests", "prompt"):
            if workload[knob] < 1:
                raise UserError(f"workload.{knob}={workload[knob]}: it is 1 or more where workload.new_tokens is")


def _check_least(value: Any, least: Any, name: str) -> None:
    if value is None:  # left to be detected, or not stated
        return
    check_kind(name, value, least)
    if isinstance(least, dict):
        for key, inner in least.items():
            _check_least(value.get(key), inner, f"{name}.{key}".lstrip("."))
    elif value < least:
        raise UserError(f"{name}={value}: it is {least:g} or more")
