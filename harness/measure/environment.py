"""Which device is here, and what else a row depends on. No torch: the parent asks, and touches no device."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dyno.errors import UserError
from dyno.measure.nvml import NvmlDevice, devices, versions


@dataclass(frozen=True)
class Device:
    """What a recipe runs on. `index` counts among the visible GPUs, as torch does; `count` is how many are visible, or can
    be had; `node` of how many the links are as fast as those of one machine, if not of all."""

    kind: str
    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int] | None
    uuid: str | None
    count: int
    node: int | None = None


def detect(hardware: Mapping[str, Any]) -> Device:
    """The device that `hardware` asks for and this machine has.

    Args:
        hardware: the configuration; `device` is auto, cpu or cuda, and `match` a pattern that the GPU's name must hold.

    Raises:
        UserError: a GPU is asked for and none is visible, or it is another one than the configuration prices.
    """
    wanted = hardware.get("device", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"hardware.device={wanted}: it is one of auto, cpu, cuda")
    gpus = [] if wanted == "cpu" else visible(devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpus:
        gpu, pattern = gpus[0], hardware.get("match")
        if wanted == "cuda" and pattern and not re.search(pattern, gpu.name()):
            raise UserError(f"the hardware option is for '{pattern}', this GPU is a {gpu.name()}: use hardware=auto")
        return Device("cuda", 0, gpu.name(), gpu.memory_total_bytes(), gpu.capability(), gpu.uuid(), len(gpus))
    if wanted == "cuda":
        raise UserError("this hardware option needs an NVIDIA GPU and none is visible: use hardware=cpu or =auto")
    return Device("cpu", 0, cpu_name(), memory_bytes(), None, None, 1)


def used(device: Device, ranks: int) -> dict[str, str]:
    """What a run of so many ranks on `device` measures on, {uuid, or an index: name}: one GPU a rank, or the CPU."""
    if device.kind != "cuda" or ranks == 1:
        return {device.uuid or str(device.index): device.name}
    gpus = visible(devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return {gpu.uuid(): gpu.name() for gpu in gpus[:ranks]}


def planned(hardware: Mapping[str, Any]) -> Device | None:
    """The device that a configuration describes, present or not, for predictions; None if it describes none.

    Of GPUs with a network there are as many as one likes, of others those of a node.
    """
    from dyno.plan.links import domain_of, levels_of

    if not hardware.get("memory_bytes"):
        return None
    capability, levels = hardware.get("capability"), levels_of(hardware)
    node = domain_of(levels) if hardware.get("node") else 1
    return Device(
        kind=str(hardware["device"]), index=0, name=str(hardware["name"]), memory_bytes=int(hardware["memory_bytes"]),
        capability=(int(capability[0]), int(capability[1])) if capability else None, uuid=None,
        count=sys.maxsize if node > 1 and hardware.get("network") else node, node=node,
    )  # fmt: skip


def visible(gpus: list[NvmlDevice], mask: str | None) -> list[NvmlDevice]:
    """The GPUs that CUDA_VISIBLE_DEVICES (`mask`) leaves, in its order: indices or UUID prefixes, up to a wrong one.

    Indices count in the order of the PCI bus, which is CUDA's own only under CUDA_DEVICE_ORDER=PCI_BUS_ID or when the
    GPUs are alike.
    """
    if mask is None:
        return gpus
    chosen = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry.isdigit():
            matching = gpus[int(entry) : int(entry) + 1]
        else:
            matching = [gpu for gpu in gpus if entry and gpu.uuid().startswith(entry)]
        if len(matching) != 1:
            break
        chosen += matching
    return chosen


def cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_bytes() -> int:
    """The memory that this process may use: the machine's, or its control group's limit if that is lower."""
    total = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    limits = [_lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    return min([total, *(int(text[0]) for text in limits if text and text[0].isdigit())])


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def machine_id() -> str:
    """The same 16 digits whenever this machine is asked: processor, cores, memory, GPUs and the system's machine id."""
    gpus = [gpu.uuid() for gpu in devices()]
    system = "".join(_lines("/etc/machine-id"))
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return _digest(system, cpu_name(), str(os.cpu_count()), str(round(int(memory) / 2**20)), *sorted(gpus))


def environment() -> dict[str, Any]:
    """Everything about machine and software that a row may depend on, as JSON. For the worker: it imports torch."""
    import torch

    gpus = [{"name": gpu.name(), "uuid": gpu.uuid()} for gpu in devices()]
    packages = installed_packages()
    return {
        **versions(),
        "machine": machine_id(),
        "hostname_hash": _digest(platform.node()),
        "gpus": gpus,
        "cpu": cpu_name(),
        "cores": cores(),
        "machine_cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": packages.get("triton"),
        "threads": torch.get_num_threads(),
        "dyno": source_state(),
        "packages": dict(sorted(packages.items())),
    }


def installed_packages() -> dict[str, str]:
    """Names and versions of what Python would import, read off directory names: opening every file takes seconds."""
    found: dict[str, str] = {}
    for folder in sys.path:
        for entry in sorted(Path(folder).glob("*.dist-info")):
            name, _, version = entry.name.removesuffix(".dist-info").partition("-")
            found.setdefault(name.lower().replace("_", "-"), version)
    return found


def source_state() -> dict[str, Any]:
    """The git commit of Dyno's source and whether it was changed since; Nones when nobody can tell.

    Where the source is no checkout of ours, in a container's image for instance, DYNO_COMMIT names what it was made from.
    """
    if told := os.environ.get("DYNO_COMMIT"):
        return {"commit": told, "dirty": None}
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    # an installed copy may lie inside some other project's checkout: only a tracked file tells of ours
    if commit is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--", ":/"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
