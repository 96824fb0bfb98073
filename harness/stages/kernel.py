"""The kernel workload: one operation of kernels/ against its reference and its peers, over shapes.

Variants take turns inside every round and their order is shuffled each time, so that a drift of the clocks hits all of
them; inputs rotate through several copies where one would stay in the cache. On a GPU the call is queued behind a short
spin of the device, so that its launches are already there when the clock starts: a kernel is measured, not the host.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dyno.errors import NonFinite
from dyno.kernels import operation
from dyno.measure.clock import make_clock, synchronize
from dyno.measure.statistics import bootstrap_medians, interval
from dyno.record import Metric
from dyno.stages import bench

if TYPE_CHECKING:
    from dyno.pipeline import Pipeline

CACHE_BYTES = 256e6  # inputs together exceed the last-level cache by far
MAX_COPIES = 8
MIN_ROUNDS = 5  # of a variant so slow that it fills min_seconds alone; it then sits out the other rounds
HEAD_START_CYCLES = 1_000_000  # half a millisecond of the GPU, in which the host queues dozens of launches


def measure(pipeline: Pipeline) -> tuple[dict[str, Metric], str]:
    """A row of metrics `<shape>.<variant>.time_s`, `.tflop_per_s`, `.byte_per_s`, `.error`; key '' (no weights)."""
    import time

    config, device = pipeline.recipe.config, pipeline.device
    workload, settings = config["workload"], config["measure"]
    op = operation(workload["op"])
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, usual if workload["dtype"] == "auto" else workload["dtype"])
    metrics: dict[str, Metric] = {}
    reasons: dict[str, str] = {}
    pattern = re.compile(workload.get("shapes") or ".*")
    bench.FIRST_STEP.append(time.time())
    for shape in op.cases(device):
        if not pattern.search(shape.name):
            continue
        pipeline.progress(f"kernel: {workload['op']} {shape.name}")
        width = torch.empty((), dtype=dtype).element_size()
        copies = int(min(MAX_COPIES, max(1, CACHE_BYTES // op.bytes(shape, width)))) if device.type == "cuda" else 1
        given = [op.inputs(shape, device, dtype, seed) for seed in range(copies)]
        times: dict[str, list[float]] = {}
        variants = usable(op, device, given[0], shape.name, metrics, reasons, dtype)
        for name, call in variants.items():
            for arguments in given:  # warm-up of every copy
                call(**arguments)
            times[name] = []
        order = random.Random(config["seed"])
        rounds = max(MIN_ROUNDS, int(settings["min_steps"]))
        for turn in range(rounds):
            names = [n for n in variants if turn < MIN_ROUNDS or sum(times[n]) < settings["min_seconds"]]
            order.shuffle(names)
            for name in names:
                times[name].append(once(variants[name], given[turn % copies], device))
        for name, samples in times.items():
            values = np.array(samples)
            low, high = interval(bootstrap_medians(values, int(settings["bootstrap"]), int(settings["seed"])))
            median, head = float(np.median(values)), f"{shape.name}.{name}"
            source = "cuda events" if device.type == "cuda" else "perf_counter"
            metrics[f"{head}.time_s"] = Metric(median, "s", len(values), low, high, source)
            metrics[f"{head}.flop_per_s"] = Metric(op.flops(shape) / median, "FLOP/s", len(values), source=source)
            metrics[f"{head}.byte_per_s"] = Metric(op.bytes(shape, width) / median, "B/s", len(values), source=source)
        del given
    pipeline.details["kernel"] = {"op": workload["op"], "dtype": str(dtype), "not_run": reasons}
    return metrics, ""


def usable(
    op: Any, device: torch.device, arguments: dict[str, Any], shape: str,
    metrics: dict[str, Metric], reasons: dict[str, str], dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """The variants that run on these inputs and agree with the reference, each with its error as a metric."""
    expected = op.reference(**arguments).double()
    scale = float(expected.norm()) or 1.0
    allowed = op.tolerance(dtype)
    good = {}
    for name, call in op.implementations(device).items():
        try:
            got = call(**arguments).double()
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:  # a peer's kernel may refuse a shape
            reasons[f"{shape}.{name}"] = str(error).strip().splitlines()[0][:200] or type(error).__name__
            continue
        off = float((got - expected).norm()) / scale
        metrics[f"{shape}.{name}.error"] = Metric(off, "1", source="relative to the reference")
        if not torch.isfinite(got).all():
            raise NonFinite(f"{name} on {shape} is not finite")
        if off > max(allowed.get("rtol", 0.0), allowed.get("atol", 0.0)) * 2:
            reasons[f"{shape}.{name}"] = f"wrong: relative error {off:.2e}"
            continue
        good[name] = call
    return good


def once(call: Any, arguments: dict[str, Any], device: torch.device) -> float:
    """Seconds of one call by the device's own clock."""
    clock = make_clock(device, 2)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)
    clock.start()
    call(**arguments)
    clock.mark()
    synchronize(device)
    return float(clock.durations()[0])
