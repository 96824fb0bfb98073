"""NVML through a stand-in for the `pynvml` module: units, fallbacks, and errors as reasons. No GPU."""

import sys
from types import SimpleNamespace as Thing

import pytest

from dyno.measure import nvml
from dyno.measure.nvml import GpuProcess, NotMeasured, NvmlDevice


class FakeError(Exception):
    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


class FakeNvml:
    """As much of pynvml as NvmlDevice asks for; `failing` names functions and their error codes."""

    NVMLError = FakeError
    NVML_SUCCESS, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND = 0, 3, 6
    NVML_FI_DEV_POWER_INSTANT, NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 186, 0, 1, 2

    def __init__(self):
        self.failing = {}
        self.instant = Thing(nvmlReturn=0, value=Thing(uiVal=512_000))
        self.answers = {
            "nvmlInit": None, "nvmlDeviceGetCount": 2, "nvmlSystemGetDriverVersion": "580.1",
            "nvmlSystemGetCudaDriverVersion": 13010, "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetHandleByIndex": "handle", "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetUUID": "GPU-1", "nvmlDeviceGetCudaComputeCapability": [9, 0],
            "nvmlDeviceGetMemoryInfo": Thing(total=85 << 30, used=3 << 30),
            "nvmlDeviceGetTotalEnergyConsumption": 2_829_212, "nvmlDeviceGetPowerUsage": 400_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000, "nvmlDeviceGetTemperature": 42,
            "nvmlDeviceGetClockInfo": 1980, "nvmlDeviceGetCurrentClocksEventReasons": 4,
            "nvmlDeviceGetUtilizationRates": Thing(gpu=37),
            "nvmlDeviceGetComputeRunningProcesses": [Thing(pid=5, usedGpuMemory=None), Thing(pid=6, usedGpuMemory=9)],
            "nvmlDeviceGetProcessUtilization": [Thing(pid=5, smUtil=20), Thing(pid=5, smUtil=90)],
        }  # fmt: skip

    def nvmlDeviceGetFieldValues(self, handle, fields):
        return [self.instant]

    def __getattr__(self, name):
        def call(*arguments):
            if name in self.failing:
                raise FakeError(self.failing[name])
            return self.answers[name]

        return call


@pytest.fixture
def fake(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_plain_units(fake):
    gpu = NvmlDevice("GPU-1")
    assert gpu.energy_j() == pytest.approx(2829.212)
    assert gpu.power_w() == 512.0
    assert gpu.limit_w() == 700.0
    assert gpu.temperature_c() == 42.0
    assert gpu.utilization() == pytest.approx(0.37)
    assert gpu.capability() == (9, 0)
    assert gpu.memory_total_bytes() == 85 << 30
    assert gpu.throttle_bits() == 4
    assert gpu.processes() == [GpuProcess(5, None), GpuProcess(6, 9)]
    assert gpu.busy_since(0) == {5: 0.9}
    assert nvml.versions() == {"driver": "580.1", "cuda_driver": "13.1"}
    assert len(nvml.devices()) == 2


def test_averaged_power_where_there_is_no_instant_one(fake):
    fake.instant = Thing(nvmlReturn=3, value=Thing(uiVal=0))
    assert NvmlDevice("GPU-1").power_w() == 400.0


def test_errors_are_reasons(fake):
    fake.failing = {"nvmlDeviceGetTotalEnergyConsumption": 3, "nvmlDeviceGetProcessUtilization": 6}
    gpu = NvmlDevice("GPU-1")
    with pytest.raises(NotMeasured, match="TotalEnergyConsumption: error 3"):
        gpu.energy_j()
    assert gpu.busy_since(0) == {}
    fake.failing = {"nvmlDeviceGetProcessUtilization": 3, "nvmlDeviceGetHandleByUUID": 6}
    with pytest.raises(NotMeasured):
        gpu.busy_since(0)
    with pytest.raises(NotMeasured, match="HandleByUUID"):
        NvmlDevice("GPU-9")


def test_no_driver(fake):
    fake.failing = {"nvmlInit": 9}
    assert nvml.devices() == []
    assert nvml.versions() == {}
    with pytest.raises(NotMeasured, match="no NVIDIA driver"):
        NvmlDevice(index=0)
