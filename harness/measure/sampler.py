"""The power sampler: a process of its own that logs one device's readings until its parent is gone.

    python -m dyno.measure.sampler --parent PID --log FILE (--uuid GPU-... | --replay LOG --limit-w W)

It first probes how often the energy counter moves, writes that as the log's first line, and then reads at half of it.
The kernel kills it when the thread that started it dies (PR_SET_PDEATHSIG), and it leaves by itself when its parent
changed, so that nothing is left behind by a worker that was killed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from dyno.measure.energy import TICK_S
from dyno.measure.nvml import NotMeasured
from dyno.measure.power import (
    EMPTY_LOG,
    PowerLog,
    PowerSource,
    ReplayPower,
    log_line,
    open_power,
    probe_tick_s,
    read_log,
)
from dyno.processes import die_with_parent


def sample(source: PowerSource, log: Path, parent: int) -> None:
    """Append a reading to `log` every half tick, at fixed times, while `parent` is the parent."""
    try:
        tick = probe_tick_s(source)
    except NotMeasured:
        tick = None
    period = (tick or TICK_S) / 2
    with log.open("w", buffering=1) as file:  # by line: the reader sees whole readings
        file.write(f"# tick_s={tick or ''}\n")
        due = time.monotonic()
        while os.getppid() == parent:
            file.write(log_line(time.monotonic(), source))
            due = max(due + period, time.monotonic())  # late readings are skipped, never bunched up
            time.sleep(max(0.0, due - time.monotonic()))


class Sampler:
    """The parent's handle on the sampler's process."""

    def __init__(self, log: Path, arguments: list[str]) -> None:
        """Start it. `arguments` name the source: ["--uuid", "GPU-..."] or ["--replay", path, "--limit-w", "700"].

        Call from the thread that lives as long as the measurement: the process dies with that thread.
        """
        self.log = log
        command = [sys.executable, "-m", "dyno.measure.sampler", "--parent", str(os.getpid()), "--log", str(log)]
        self.process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait_for(self, moment_s: float, patience_s: float = 2.0) -> bool:
        """Sleep until the log holds a reading at or after `moment_s` (CLOCK_MONOTONIC); False if it never came."""
        deadline = time.monotonic() + patience_s
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.last_s() >= moment_s:
                return True
            time.sleep(0.01)
        return self.last_s() >= moment_s

    def last_s(self) -> float:
        """The time of the newest whole reading, or minus infinity."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 512))
                whole = file.read().decode().rpartition("\n")[0].splitlines()
        except FileNotFoundError:
            return float("-inf")
        return float(whole[-1].split("\t")[0]) if whole and not whole[-1].startswith("#") else float("-inf")

    def read(self) -> PowerLog:
        return read_log(self.log) if self.log.exists() else EMPTY_LOG

    def tick_s(self) -> float | None:
        """The counter's probed tick, or None while unknown."""
        if not self.log.exists():
            return None
        with self.log.open() as file:
            stated = file.readline().strip().removeprefix("# tick_s=")
        return float(stated) if stated else None

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dyno.measure.sampler", description="log one device's power; see the module")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--uuid")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--limit-w", type=float, default=700.0)
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    if options.replay:
        source: PowerSource = ReplayPower(read_log(options.replay), options.limit_w)
    else:
        source = open_power(options.uuid)
    sample(source, options.log, options.parent)


if __name__ == "__main__":
    main()
