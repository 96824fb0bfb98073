"""`dyno doctor`: what this machine has, what it reaches, and what is missing, with what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from dyno.show import si

OPTIONAL = {
    "transformers": "loading from the hub: pip install 'llm-dyno[hf]'",
    "gguf": "GGUF files: pip install 'llm-dyno[gguf]'",
    "triton": "attention=triton_flash: comes with torch on Linux with CUDA",
}


def main(refresh: bool = False) -> int:
    """Print the findings; 0 when runs can be measured here."""
    from dyno import __version__
    from dyno.measure.environment import cores, cpu_name, detect, machine_id, memory_bytes

    device = detect({"device": "auto"})
    print(f"dyno {__version__}, Python {platform.python_version()}, machine {machine_id()}")
    print(f"CPU     {cpu_name()}, {cores()} cores, {si(memory_bytes(), 'B')}")
    if device.kind == "cuda":
        print(f"GPU     {device.count} x {device.name}, {si(device.memory_bytes, 'B')}, capability {device.capability}")
    else:
        print("GPU     none visible: energy by counter and CUDA kernels are not measured here")
    for path in ("results", str(Path.home())):
        where = path if os.path.exists(path) else "."
        print(f"disk    {si(shutil.disk_usage(where).free, 'B')} free at {path}")
    rapl = Path("/sys/class/powercap/intel-rapl").exists()
    print(f"RAPL    {'readable' if rapl else 'absent: CPU energy is modelled by codecarbon and tagged estimate'}")
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    print(f"C++     {compiler or 'no compiler: compile=on cannot run on a CPU (install g++)'}")
    for name, purpose in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"missing {name}: {purpose}")
    import torch

    from dyno.measure.probe import ceilings

    found = ceilings(torch.device(device.kind), refresh)
    for dtype, rate in found["matrix_flop_per_s"].items():
        print(f"ceiling {dtype} matrix product {si(rate, 'FLOP/s')}")
    print(f"ceiling copy {si(found['copy_byte_per_s'] / 1e9)} GB/s (read + written); measured {found['created']}")
    return 0
