"""Several workers sharing a study, as a rule one a GPU; never two measurements on one device at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from dyno import processes
from dyno.errors import UserError
from dyno.study.settings import Settings

Say = Callable[[str], None]
COMMAND = [sys.executable, "-m", "dyno.study.worker"]
INTERRUPTED = 130
PATIENCE_S = 20.0  # for a worker to queue its trial again after Ctrl-C


def count(settings: Settings, asked: int | None) -> int:
    """How many workers a study gets: one a device, and one where a single run may take several devices.

    Asked for more, it gets as many as the device has room for, where runs that measure in turn
    (measure.exclusive=window) may each take so much memory and no more (measure.memory_limit_gib).
    """
    device, measure = settings.device, settings.space.base.config["measure"]
    layouts = any(p.key.split(".")[0] == "parallelism" for p in settings.space.parameters)
    wide = layouts or settings.space.base.world_size > 1
    if device.kind != "cuda" or wide:
        return 1
    limit, beside = measure["memory_limit_gib"], 1
    if measure["exclusive"] == "window" and limit is not None:
        beside = max(1, int(device.memory_bytes // (limit * 2**30)))
    return max(1, min(asked or settings.workers or device.count, device.count * beside))


def gpu_masks(number: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker, by UUID: indices depend on the order that CUDA is told to use."""
    from dyno.measure.environment import visible
    from dyno.measure.nvml import devices

    gpus = visible(devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [gpu.uuid() for gpu, _ in zip(itertools.cycle(gpus), range(number), strict=False)]


def run(
    settings: Settings,
    masks: list[str],
    progress: Say,
    say: Say,
    deadline: float | None,
) -> tuple[str, bool]:
    """Start the workers and relay what they say until all have ended: (why they stopped, whether one was lost).

    Raises:
        UserError: a worker met a mistake of the user or a bench that cannot work.
        KeyboardInterrupt: after every worker was told, and has queued its trial again.
    """
    workers: list[subprocess.Popen[bytes]] = []
    reasons: list[str] = []
    try:
        for index, mask in enumerate(masks):
            workers.append(_start(settings, index, mask, len(masks), deadline))
        _relay(workers, progress, say, reasons)
    except KeyboardInterrupt:
        _interrupt(workers)
        raise
    finally:
        for worker in workers:
            worker.kill()  # its run's processes die with it
            worker.wait()
    codes = [worker.returncode for worker in workers]
    mistakes = [reason for reason in reasons if reason.startswith("error: ")]
    if mistakes:
        raise UserError(mistakes[0].removeprefix("error: "))
    ended = [reason for reason in reasons if not reason.startswith("other workers")]
    return (ended or reasons or ["every worker was lost"])[0], any(codes)


def _start(settings: Settings, index: int, mask: str, workers: int, deadline: float | None) -> subprocess.Popen[bytes]:
    request = {
        "command": settings.command,
        "plugins": settings.plugins,
        "index": index,
        "workers": workers,
        "left_s": None if deadline is None else deadline - time.monotonic(),
    }
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": mask, processes.PARENT: str(os.getpid())}
    worker = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:
        pipe.write(json.dumps(request).encode())
    return worker


def _relay(workers: list[subprocess.Popen[bytes]], progress: Say, say: Say, reasons: list[str]) -> None:
    """Hand on the workers' JSON lines until every one has closed its end."""
    rests = [b""] * len(workers)
    with selectors.DefaultSelector() as selector:
        for index, worker in enumerate(workers):
            assert worker.stdout is not None
            selector.register(worker.stdout.fileno(), selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fd)
                *lines, rests[key.data] = (rests[key.data] + data).split(b"\n")
                for line in lines:
                    _hand_on(key.data, line, progress, say, reasons)
    for worker in workers:
        worker.wait()


def _hand_on(index: int, line: bytes, progress: Say, say: Say, reasons: list[str]) -> None:
    try:
        message = json.loads(line)
        kind, text = next(iter(message.items()))
    except (ValueError, AttributeError, StopIteration):  # a plug-in printed something
        kind, text = "progress", line.decode(errors="replace")
    if kind == "say":
        say(text)
    elif kind == "end":
        reasons.append(text)
    else:
        progress(f"gpu {index}: {text}")


def _interrupt(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            worker.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_S
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.1, deadline - time.monotonic()))
