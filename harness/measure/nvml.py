"""NVIDIA's management library through `pynvml`, as numbers in plain units. No torch.

Every reading raises NotMeasured with NVML's own words when this device or this container does not give it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

THROTTLE_BITS = {
    0x01: "gpu_idle", 0x02: "applications_clocks", 0x04: "sw_power_cap", 0x08: "hw_slowdown", 0x10: "sync_boost",
    0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "hw_power_brake", 0x100: "display_clocks",
}  # fmt: skip
"""NVML's clocks-event-reason bits, by name."""


class NotMeasured(Exception):
    """A quantity that cannot be measured here; the message is the reason that the record shows."""


def throttle_names(bits: int) -> list[str]:
    """The names of the set bits, in order."""
    return [name for bit, name in THROTTLE_BITS.items() if bits & bit]


@dataclass(frozen=True)
class GpuProcess:
    """One process with a context on the GPU; `memory_bytes` is None where the driver does not tell."""

    pid: int
    memory_bytes: int | None


class NvmlDevice:
    """One GPU, opened by UUID ("GPU-...") or by NVML index. Raises NotMeasured when there is no NVML or no such GPU."""

    source = "nvml_counter"

    def __init__(self, uuid: str | None = None, index: int | None = None) -> None:
        self._nvml = load()
        if uuid is not None:
            self._handle = self._read("nvmlDeviceGetHandleByUUID", uuid, device=False)
        else:
            self._handle = self._read("nvmlDeviceGetHandleByIndex", index or 0, device=False)

    def _read(self, function: str, *arguments: Any, device: bool = True) -> Any:
        if device:
            arguments = (self._handle, *arguments)
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as error:
            raise NotMeasured(f"NVML: {function}: {error}") from error

    def name(self) -> str:
        return str(self._read("nvmlDeviceGetName"))

    def uuid(self) -> str:
        return str(self._read("nvmlDeviceGetUUID"))

    def capability(self) -> tuple[int, int]:
        major, minor = self._read("nvmlDeviceGetCudaComputeCapability")
        return int(major), int(minor)

    def memory_total_bytes(self) -> int:
        return int(self._read("nvmlDeviceGetMemoryInfo").total)

    def memory_used_bytes(self) -> int:
        return int(self._read("nvmlDeviceGetMemoryInfo").used)

    def energy_j(self) -> float:
        """Joules since the driver was loaded (Volta and newer). On an H100 it moves every 0.1 s."""
        return self._read("nvmlDeviceGetTotalEnergyConsumption") / 1e3

    def power_w(self) -> float:
        """Watts now. The plain call averages over a second on Ampere and newer, so the instant field comes first."""
        field = self._read("nvmlDeviceGetFieldValues", [self._nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn == self._nvml.NVML_SUCCESS:
            return field.value.uiVal / 1e3
        return self._read("nvmlDeviceGetPowerUsage") / 1e3

    def limit_w(self) -> float:
        return self._read("nvmlDeviceGetEnforcedPowerLimit") / 1e3

    def temperature_c(self) -> float:
        return float(self._read("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU))

    def clock_mhz(self) -> float:
        """The clock of the streaming multiprocessors."""
        return float(self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM))

    def memory_clock_mhz(self) -> float:
        return float(self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM))

    def throttle_bits(self) -> int:
        return int(self._read("nvmlDeviceGetCurrentClocksEventReasons"))

    def utilization(self) -> float:
        """The share of the driver's last sampling period in which a kernel ran, 0 to 1."""
        return self._read("nvmlDeviceGetUtilizationRates").gpu / 100

    def processes(self) -> list[GpuProcess]:
        """Processes with a compute context. In a container these may be the host's process numbers, or none at all."""
        found = self._read("nvmlDeviceGetComputeRunningProcesses")
        return [GpuProcess(int(p.pid), None if p.usedGpuMemory is None else int(p.usedGpuMemory)) for p in found]

    def busy_since(self, microseconds: int) -> dict[int, float]:
        """The peak share of the multiprocessors (0 to 1) of each process since that Unix time in microseconds."""
        try:
            samples = self._read("nvmlDeviceGetProcessUtilization", microseconds)
        except NotMeasured as error:
            nothing = (self._nvml.NVML_SUCCESS, self._nvml.NVML_ERROR_NOT_FOUND)
            if getattr(error.__cause__, "value", None) in nothing:  # no sample since then: nobody computed
                return {}
            raise
        peak: dict[int, float] = {}
        for sample in samples:
            peak[int(sample.pid)] = max(peak.get(int(sample.pid), 0.0), sample.smUtil / 100)
        return peak


def load() -> Any:
    """The initialised `pynvml` module. Raises NotMeasured where there is no NVIDIA driver."""
    try:
        import pynvml
    except ImportError as error:
        raise NotMeasured("nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NotMeasured(f"no NVIDIA driver: {error}") from error
    return pynvml


def devices() -> list[NvmlDevice]:
    """Every GPU of the machine in NVML's order, which is that of the PCI bus. Empty with no driver."""
    try:
        nvml = load()
    except NotMeasured:
        return []
    return [NvmlDevice(index=i) for i in range(nvml.nvmlDeviceGetCount())]


def versions() -> dict[str, str]:
    """The driver's version and the newest CUDA that it runs; empty with no driver."""
    try:
        nvml = load()
    except NotMeasured:
        return {}
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    return {"driver": str(nvml.nvmlSystemGetDriverVersion()), "cuda_driver": f"{cuda // 1000}.{cuda % 1000 // 10}"}
