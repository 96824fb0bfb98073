"""Memory in three views: torch's allocator, the process, the device. Peaks are those of a window."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from dyno.measure.nvml import NotMeasured, NvmlDevice
from dyno.record import Metric, unmeasured

_PROC = Path("/proc/self")


def proc_kib(path: Path, field: str) -> int:
    """Bytes of a "Field:  123 kB" line of a /proc file. Raises NotMeasured when there is no such file or line."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        raise NotMeasured(f"{path}: {error.strerror}") from error
    raise NotMeasured(f"{path} has no {field}")


def peak_bytes(device: torch.device) -> tuple[int, bool]:
    """The most that tensors took of a GPU, and whether CUDA graphs had a part in it.

    A replay allocates nothing: what graphs work in is in their pools, which the allocator calls free. What leaves a pool
    and dies before this is read (gradients) would count twice, so what was reserved in all is a limit.
    """
    peak, idle = torch.cuda.max_memory_allocated(device), graph_bytes(device)
    return (min(peak + idle, torch.cuda.max_memory_reserved(device)), True) if idle else (peak, False)


def graph_bytes(device: torch.device) -> int:
    """Bytes of the pools of CUDA graphs that hold no tensor now."""
    segments = torch.cuda.memory_snapshot()
    return sum(
        s["total_size"] - s["allocated_size"]
        for s in segments
        if s["device"] == device.index and tuple(s["segment_pool_id"]) != (0, 0)
    )


class MemoryMeter:
    """Peaks since `reset`, on one device. `nvml` is None on a CPU and where there is no NVML."""

    def __init__(self, device: torch.device, nvml: NvmlDevice | None) -> None:
        self.device, self.nvml = device, nvml
        self._peak_is_ours = False

    def reset(self) -> None:
        """Begin a new peak: torch's counters on a GPU, the kernel's high-water mark of the process on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            (_PROC / "clear_refs").write_text("5")
            self._peak_is_ours = True
        except OSError:  # a locked-down container: the peak is then that of the whole process, and is said to be
            self._peak_is_ours = False

    def read(self) -> dict[str, Metric]:
        """peak_memory_bytes, process_memory_bytes and device_memory_bytes."""
        if self.device.type == "cuda":
            peak, graphs = peak_bytes(self.device)
            source = "torch_allocator" + (" and the pools of CUDA graphs" if graphs else "")
            return {
                "peak_memory_bytes": Metric(peak, "B", source=source),
                "reserved_memory_bytes": Metric(
                    torch.cuda.max_memory_reserved(self.device), "B", source="torch_allocator"
                ),
                "process_memory_bytes": _metric(self._gpu_process_bytes, "nvml_process"),
                "device_memory_bytes": _metric(self._gpu_used_bytes, "nvml_device"),
            }
        source = "rss_peak" if self._peak_is_ours else "rss_peak_of_process"
        return {
            "peak_memory_bytes": _metric(lambda: proc_kib(_PROC / "status", "VmHWM"), source),
            "process_memory_bytes": _metric(lambda: proc_kib(_PROC / "status", "VmRSS"), "rss"),
            "device_memory_bytes": _metric(_host_used_bytes, "host_memory"),
        }

    def _gpu_used_bytes(self) -> int:
        if self.nvml is None:
            raise NotMeasured("no NVML")
        return self.nvml.memory_used_bytes()

    def _gpu_process_bytes(self) -> int:
        if self.nvml is None:
            raise NotMeasured("no NVML")
        found = self.nvml.processes()
        mine = [p.memory_bytes for p in found if p.pid == os.getpid()]
        if not mine:
            raise NotMeasured("NVML does not list this process (a container with its own process numbers)")
        if mine[0] is None:
            raise NotMeasured("the driver does not tell the memory of a process")
        return mine[0]


def _host_used_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    return proc_kib(meminfo, "MemTotal") - proc_kib(meminfo, "MemAvailable")


def _metric(read: Callable[[], int], source: str) -> Metric:
    try:
        return Metric(read(), "B", source=source)
    except NotMeasured as error:
        return unmeasured("B", str(error))
