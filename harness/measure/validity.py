"""Is the row to be trusted? The state of device and host at both ends of a window, and what it means.

A flag is {code, detail}. Most are facts to know about a row; those in DISQUALIFYING make it not ok, and `contaminated`
(another process computed on the device) is a failure of its own.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyno.measure.nvml import NotMeasured, NvmlDevice, throttle_names
from dyno.measure.power import EMPTY_LOG, PowerLog

DISQUALIFYING = {"contaminated", "hw_slowdown", "hw_thermal", "sw_thermal", "hw_power_brake", "power_limit_changed"}
HOST = {"host_busy", "page_faults"}
HARMLESS_THROTTLE = {"gpu_idle", "applications_clocks", "display_clocks", "sync_boost"}
BUSY_SHARE = 0.1
"""The share of a device, or of the host's cores, that somebody else may use before it is flagged."""


@dataclass(frozen=True)
class Snapshot:
    """One moment. GPU fields are None on a CPU and where the driver does not tell."""

    time_s: float
    unix_us: int
    load_average: float
    cpu_busy_s: float
    own_cpu_s: float
    major_faults: int
    page_cache_bytes: int
    throttle_bits: int | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_limit_w: float | None = None
    utilization: float | None = None
    processes: tuple[int, ...] | None = None


def snapshot(nvml: NvmlDevice | None) -> Snapshot:
    """Read the host, and the GPU if there is one. Takes about a millisecond: outside the timed region."""
    gpu: dict[str, Any] = {}
    if nvml is not None:
        readings = {
            "throttle_bits": nvml.throttle_bits, "clock_mhz": nvml.clock_mhz, "memory_clock_mhz": nvml.memory_clock_mhz,
            "temperature_c": nvml.temperature_c, "power_limit_w": nvml.limit_w, "utilization": nvml.utilization,
        }  # fmt: skip
        for name, reading in readings.items():
            gpu[name] = _or_none(reading)
        found = _or_none(nvml.processes)
        gpu["processes"] = None if found is None else tuple(p.pid for p in found)
    return Snapshot(
        time_s=time.monotonic(),
        unix_us=time.time_ns() // 1000,
        load_average=os.getloadavg()[0],
        cpu_busy_s=_host_busy_s(),
        own_cpu_s=_group_cpu_s(),
        major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        page_cache_bytes=_page_cache_bytes(),
        **gpu,
    )


def judge(
    before: Snapshot, after: Snapshot, log: PowerLog = EMPTY_LOG, busy: dict[int, float] | None = None
) -> dict[str, Any]:
    """The verdict on a window: {ok, flags: [{code, detail}], before, after}.

    Args:
        log: the sampler's readings within the window: what the two ends alone would miss.
        busy: the peak share of the multiprocessors of each process during the window, or None where unknown.
    """
    flags = _throttle_flags(before, after, log) + _process_flags(before, after, busy) + _host_flags(before, after)
    return {
        "ok": not any(flag["code"] in DISQUALIFYING for flag in flags),
        "flags": flags,
        "before": asdict(before),
        "after": asdict(after),
    }


def merge(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """One verdict for a whole run: every distinct flag once, ok only if all are."""
    flags = {(flag["code"], flag["detail"]): flag for verdict in verdicts for flag in verdict["flags"]}
    return {"ok": all(verdict["ok"] for verdict in verdicts), "flags": list(flags.values())}


def of_ranks(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict of a run from those of its ranks; a flag of another rank than 0 says which, the host's come once."""
    told = [dict(verdicts[0])]
    for rank, verdict in enumerate(verdicts[1:], 1):
        flags = [flag(f["code"], f"rank {rank}: {f['detail']}") for f in verdict["flags"] if f["code"] not in HOST]
        told.append({**verdict, "flags": flags})
    return merge(told)


def flag(code: str, detail: str) -> dict[str, str]:
    return {"code": code, "detail": detail}


def _throttle_flags(before: Snapshot, after: Snapshot, log: PowerLog) -> list[dict[str, str]]:
    flags = []
    logged = [int(x) for x in log.throttle_bits[np.isfinite(log.throttle_bits)]]
    readings = [bits for bits in (before.throttle_bits, after.throttle_bits, *logged) if bits is not None]
    for name in throttle_names(int(np.bitwise_or.reduce(readings)) if readings else 0):
        if name not in HARMLESS_THROTTLE:
            seen = sum(name in throttle_names(bits) for bits in readings)
            flags.append(flag(name, f"the GPU held its clocks back: {name}, in {seen} of {len(readings)} readings"))
    if before.power_limit_w != after.power_limit_w:
        flags.append(flag("power_limit_changed", f"from {before.power_limit_w} to {after.power_limit_w} W"))
    return flags


def _process_flags(before: Snapshot, after: Snapshot, busy: dict[int, float] | None) -> list[dict[str, str]]:
    """Others on the GPU. Process numbers are the host's in some containers; then only a second context is telling."""
    listed = set(before.processes or ()) | set(after.processes or ())
    if os.getpid() in listed:
        others = {pid for pid in listed if not _is_ours(pid)}
    elif len(listed) > 1:
        others = listed  # one of them is us, under another number
    else:
        return []
    if not others:
        return []
    shares = {pid: share for pid, share in (busy or {}).items() if pid in others and share > BUSY_SHARE}
    if os.getpid() not in listed and len(shares) < 2:
        shares = {}  # the only busy one is us
    if shares:
        return [flag("contaminated", f"{len(shares)} process(es) computed on this GPU as well, up to "
                                     f"{max(shares.values()):.0%} of it")]  # fmt: skip
    known = "idle" if busy is not None else "whether they compute is unknown"
    return [flag("other_process", f"{len(others)} process(es) hold a context on this GPU ({known})")]


def _host_flags(before: Snapshot, after: Snapshot) -> list[dict[str, str]]:
    seconds, cores = after.time_s - before.time_s, os.cpu_count() or 1
    others = (after.cpu_busy_s - before.cpu_busy_s - (after.own_cpu_s - before.own_cpu_s)) / max(seconds, 1e-9)
    flags = []
    if seconds > 0.1 and others > BUSY_SHARE * cores:  # the kernel counts in hundredths: too coarse for less
        flags.append(flag("host_busy", f"other processes used {others:.1f} of {cores} cores"))
    if after.major_faults > before.major_faults:
        flags.append(flag("page_faults", f"{after.major_faults - before.major_faults} pages were read from disk"))
    return flags


def _or_none(reading: Any) -> Any:
    try:
        return reading()
    except NotMeasured:
        return None


def _host_busy_s() -> float:
    """Processor seconds used by anybody since boot, stolen ones included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _group_cpu_s() -> float:
    """Processor seconds of this process group's living members: the ranks of a run and what they started."""
    group, ticks = os.getpgrp(), 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            fields = _stat_fields(entry.name)
            if fields and int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _is_ours(pid: int) -> bool:
    fields = _stat_fields(str(pid))
    return bool(fields) and int(fields[2]) == os.getpgrp()


def _stat_fields(pid: str) -> list[str]:
    """The fields of /proc/PID/stat after the name (state first); empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _page_cache_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) * 1024
    return 0
