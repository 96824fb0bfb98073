"""A machine's ceilings for a prediction: measured here by the probe, else what its hardware option states. No torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno.home import home
from dyno.measure.hardware import peak_flop_per_s, quantity, resolve
from dyno.measure.nvml import NotMeasured
from dyno.plan.links import Level, Link, levels_of

if TYPE_CHECKING:
    from dyno.measure.environment import Device

# Of a data sheet's peaks, by large products and copies (one H100), and by activations on their way to the host and back (seven
# runs on an H200, bound by that).
REACHED = {"matmul": 0.75, "memory": 0.88, "host": 0.85}
UNSTATED = (Level("node", math.inf, Link(200e9, 5e-6)),)  # where the hardware states no link between its devices
UNSTATED_HOST = REACHED["host"] * 32e9  # byte/s: PCIe 4 x16
DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp8", "int8")


@dataclass(frozen=True)
class Machine:
    """Ceilings. `matmul` FLOP/s by dtype, `memory` bytes/s read plus written, `power_w` under load; and their source.
    `levels` are the links between its devices, from those of a node outwards."""

    matmul: dict[str, float]
    memory: float
    power_w: float | None
    source: str
    host_bytes_per_s: float = UNSTATED_HOST  # one way
    levels: tuple[Level, ...] = UNSTATED

    @property
    def link(self) -> Link:
        """Between the devices of a node."""
        return self.levels[0].link


def host_of(hardware: Mapping[str, Any]) -> float:
    host = hardware.get("host")
    return REACHED["host"] * float(host["byte_per_s"]) if host else UNSTATED_HOST


def from_ceilings(found: Mapping[str, Any], hardware: Mapping[str, Any]) -> Machine:
    """From the probe's figures, as a record's environment or the cache keeps them."""
    return Machine(
        dict(found["matrix_flop_per_s"]), float(found["copy_byte_per_s"]), hardware.get("power_limit_w"),
        f"measured by the probe, {found.get('created', 'undated')}",
        host_of(hardware), levels_of(hardware) or UNSTATED,
    )  # fmt: skip


def machine_of(device: Device, hardware: Mapping[str, Any]) -> Machine | None:
    """The ceilings of a device: the latest probe of its kind here, else stated ones, else None."""
    stated = resolve(hardware, device.kind, device.name)
    name = device.name if device.kind == "cuda" else "cpu"
    folder = home() / "ceilings"
    probes = []
    for path in folder.glob("*.json") if folder.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a file of another version, or half of one
            found = json.loads(path.read_bytes())
            if found["device"] == name:
                probes.append((str(found["created"]), from_ceilings(found, stated)))
    if probes:
        return max(probes, key=lambda probe: probe[0])[1]
    matmul = {}
    for dtype in DTYPES:
        with contextlib.suppress(NotMeasured):
            matmul[dtype] = REACHED["matmul"] * peak_flop_per_s(stated, dtype)[0]
    try:
        memory, source = quantity(stated, "peak_byte_per_s")
    except NotMeasured:
        return None
    if not matmul:
        return None
    power_w = stated.get("power_limit_w")
    return Machine(
        matmul, REACHED["memory"] * memory, power_w, f"stated: {source}", host_of(stated), levels_of(stated) or UNSTATED
    )  # fmt: skip
