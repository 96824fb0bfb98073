"""Several GPUs: one worker process a GPU, sharing the study; never two measurements on one device."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from dyno import processes
from dyno.errors import UserError
from dyno.study.settings import Settings

COMMAND = [sys.executable, "-m", "dyno.study.worker"]
INTERRUPTED = 130
PATIENCE_S = 20.0  # for a worker to queue its trial again after Ctrl-C


def count(settings: Settings, asked: int | None) -> int:
    """How many workers a study gets: one a device, and one where a single run may take several devices."""
    device = settings.device
    wide = "parallelism" in {p.key for p in settings.space.parameters} or any(
        t.world_size > 1 for chosen in settings.space.base.techniques.values() for t in chosen
    )
    if device.kind != "cuda" or wide:
        return 1
    return max(1, min(asked or settings.workers or device.count, device.count))


def gpu_masks(number: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker, by UUID: indices depend on the order that CUDA is told to use."""
    from dyno.measure.environment import visible
    from dyno.measure.nvml import devices

    return [gpu.uuid() for gpu in visible(devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))[:number]]


def run(
    settings: Settings,
    masks: list[str],
    progress: Callable[[str], None],
    say: Callable[[str], None],
    deadline: float | None,
) -> tuple[str, bool]:
    """Start the workers and relay what they say until all have ended: (why they stopped, whether one was lost).

    Raises:
        UserError: a worker met a mistake of the user or a bench that cannot work.
        KeyboardInterrupt: after every worker was told, and has queued its trial again.
    """
    workers: list[subprocess.Popen[str]] = []
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


def _start(settings: Settings, index: int, mask: str, workers: int, deadline: float | None) -> subprocess.Popen[str]:
    request = {
        "command": settings.command,
        "plugins": settings.plugins,
        "index": index,
        "workers": workers,
        "left_s": None if deadline is None else deadline - time.monotonic(),
    }
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": mask, processes.RUNNER: str(os.getpid())}
    worker = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
    )
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:
        pipe.write(json.dumps(request))
    return worker


def _relay(
    workers: list[subprocess.Popen[str]],
    progress: Callable[[str], None],
    say: Callable[[str], None],
    reasons: list[str],
) -> None:
    """Hand on the workers' JSON lines until every one has closed its end."""
    with selectors.DefaultSelector() as selector:
        for index, worker in enumerate(workers):
            assert worker.stdout is not None
            selector.register(worker.stdout, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                pipe: IO[str] = key.fileobj  # type: ignore[assignment]
                line = pipe.readline()
                if not line:
                    selector.unregister(pipe)
                    continue
                message: dict[str, Any] = json.loads(line)
                if "progress" in message:
                    progress(f"gpu {key.data}: {message['progress']}")
                elif "say" in message:
                    say(message["say"])
                else:
                    reasons.append(message["end"])
        for worker in workers:
            worker.wait()


def _interrupt(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            worker.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_S
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.1, deadline - time.monotonic()))
