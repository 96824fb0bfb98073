"""The hardware configuration: what nobody can measure here (price, grid carbon, peaks), each with source and date.

Such a quantity is a mapping {value, source, date}. `hardware=auto` states none of its own: `resolve` fills them in from
the option whose `match` names the device that was found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from dyno.measure.nvml import NotMeasured


def quantity(hardware: Mapping[str, Any], key: str) -> tuple[float, str]:
    """The value and source of `hardware[key]`, for instance `price_usd_per_hour`.

    Raises:
        NotMeasured: the configuration states no value.
    """
    stated = hardware.get(key)
    if not isinstance(stated, Mapping) or stated.get("value") is None:
        raise NotMeasured(f"hardware.{key}.value is not stated")
    return float(stated["value"]), f"{stated.get('source') or 'unsourced'} ({stated.get('date') or 'undated'})"


def peak_flop_per_s(hardware: Mapping[str, Any], dtype: str) -> tuple[float, str]:
    """The vendor's dense peak for a dtype (fp32, tf32, bf16, fp16, fp8, int8), and its source; or NotMeasured."""
    stated = hardware.get("peak_flop_per_s")
    if not isinstance(stated, Mapping) or stated.get(dtype) is None:
        raise NotMeasured(f"hardware.peak_flop_per_s.{dtype} is not stated")
    return float(stated[dtype]), f"{stated.get('source') or 'unsourced'} ({stated.get('date') or 'undated'})"


def is_unstated(value: Any) -> bool:
    """Whether a configuration node leaves its quantity open: null, or a mapping of nulls."""
    return value is None or (isinstance(value, Mapping) and all(v is None for v in value.values()))


@cache
def options() -> dict[str, dict[str, Any]]:
    """Every option file of the hardware group that ships with Dyno, by name."""
    import yaml

    folder = files("dyno.conf").joinpath("hardware")
    return {
        file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text())
        for file in sorted(folder.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".yaml")
    }


def resolve(hardware: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """`hardware` with everything it leaves open taken from the option for a device of this kind (cuda, cpu) and name.

    Only `hardware=auto` (device: auto) leaves things to detection; a named option comes back as it is. What the user
    states on the command line stays. The key `resolved_from` names the option that filled the rest, or None.
    """
    out = dict(hardware)
    if hardware.get("device") != "auto":
        return out
    out["resolved_from"] = None
    for option_name, option in options().items():
        if option["device"] == kind and option["match"] and re.search(option["match"], name):
            out |= {key: value for key, value in option.items() if is_unstated(out.get(key))}
            out["resolved_from"] = option_name
            break
    return out
