"""Carbon: energy at the device, times what the building adds (PUE), times the grid's grams per kWh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dyno.measure.hardware import quantity
from dyno.measure.nvml import NotMeasured
from dyno.record import Metric, unmeasured

JOULES_PER_KWH = 3.6e6


def carbon_g(energy_j: float, pue: float, grid_gco2_per_kwh: float) -> float:
    """Grams of CO2 for `energy_j` joules drawn by the device."""
    return energy_j / JOULES_PER_KWH * pue * grid_gco2_per_kwh


def carbon_metric(energy: Metric, hardware: Mapping[str, Any]) -> Metric:
    """The carbon of an energy metric under the hardware's PUE and grid; keeps the energy's source and its reason."""
    if energy.value is None:
        return unmeasured("g", f"no energy: {energy.reason}")
    try:
        pue, _ = quantity(hardware, "pue")
        grid, source = quantity(hardware, "grid_gco2_per_kwh")
    except NotMeasured as error:
        return unmeasured("g", str(error))
    return Metric(carbon_g(energy.value, pue, grid), "g", source=f"{energy.source}, grid: {source}")


class CodeCarbon:
    """codecarbon's offline tracker in a process of its own, one for the life of the worker, a task a window.

    Its monitor thread wakes every second and its start takes two: neither belongs into the process that is measured.
    The first window waits until it is ready. It models what it cannot read: `source` in the answer is rapl or estimate.

    Raises:
        NotMeasured: it is not installed, or died, with its last words.
    """

    def __init__(self, country: str, region: str | None = None) -> None:
        command = [sys.executable, "-m", "dyno.measure.codecarbon_child", str(os.getpid()), country, region or ""]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._ready = False

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"codecarbon's process ended ({self.process.wait()})"}
        if "error" in answer:
            raise NotMeasured(answer["error"])
        return answer

    def _ask(self, verb: str, name: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        if not self._ready:
            self._answer()
            self._ready = True
        try:
            self.process.stdin.write(f"{verb} {name}\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise NotMeasured("codecarbon's process ended") from error
        return self._answer()

    def start(self, name: str) -> None:
        self._ask("start", name)

    def finish(self, name: str) -> dict[str, Any]:
        """End the task: {cpu_energy_j, ram_energy_j, gpu_energy_j, emissions_g, duration_s, cpu_mode, source, ...}."""
        return self._ask("stop", name)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
