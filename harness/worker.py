"""The worker: one process a rank, born for one run. `python -m dyno.worker DIRECTORY`, started by the runner.

Progress goes to stdout a line at a time; the result is written whole to result.json.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from dyno.errors import RunFailure, UserError
from dyno.forkserver import FORKED
from dyno.processes import die_with_parent
from dyno.record import write_json


def main(directory: Path) -> int:
    request = json.loads((directory / "request.json").read_text())
    rank, ranks = int(os.environ.get("RANK", "0")), request["ranks"]
    try:
        result = execute(request, directory, rank, ranks)
    except MemoryError as error:
        result = {"status": "out_of_memory", "reason": f"the machine's memory ran out: {error}"}
    except RunFailure as failure:
        result = {"status": failure.status, "reason": str(failure)}
    except UserError as error:
        result = {"status": "unsupported", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  whatever ends a run becomes a typed record
        traceback.print_exc()
        result = classify(error)
    name = "result.json" if rank == 0 else f"result-rank{rank}.json"
    if rank == 0 or result["status"] != "ok":
        try:
            write_json(directory / name, result)
        except ValueError as error:  # a note that JSON cannot hold, such as NaN
            result = {"status": "crashed", "reason": f"the result cannot be written: {error}"}
            write_json(directory / name, result)
    # One rank's failure ends the run at once: the others would wait for it in a collective.
    return 0 if ranks == 1 or result["status"] == "ok" else 1


def classify(error: Exception) -> dict[str, Any]:
    """An exception as a typed failure with one line of reason."""
    import torch

    line = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return {"status": "out_of_memory", "reason": f"at a step: {line}"}
    return {"status": "crashed", "reason": f"{type(error).__name__}: {line}"}


def execute(request: dict[str, Any], directory: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Run the recipe's measured stage with every meter on; the result as plain data."""
    import numpy as np
    import torch

    from dyno.measure.environment import environment, machine_id
    from dyno.measure.window import Meter
    from dyno.pipeline import Pipeline
    from dyno.plan import CONTEXT_BYTES
    from dyno.recipe import Recipe, digest
    from dyno.record import Metric, to_json
    from dyno.stages import bench

    recipe = Recipe.from_json(request["recipe"])
    config = recipe.config
    device = (
        torch.device("cuda", rank if ranks > 1 else request["index"])
        if request["device"] == "cuda"
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if (limit := config["measure"]["memory_limit_gib"]) is not None:
            share = (limit * 2**30 - CONTEXT_BYTES) / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    torch.manual_seed(config["seed"])
    if ranks > 1:
        store = torch.distributed.FileStore(str(directory / "rendezvous"), ranks)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)

    def progress(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    bench.mark("imports")
    progress(f"worker: {torch.__version__} on {device}")
    with Meter(device, config["measure"], config["hardware"], directory, locks=request["turns"]) as meter:
        bench.mark("meters")
        pipeline = Pipeline(recipe, device, directory, meter=meter, rank=rank, ranks=ranks, progress=progress)
        stage = STAGES[config["workload"]["measures"]]
        metrics, weights = stage(pipeline)
        if bench.FIRST_STEP:
            metrics["startup_s"] = Metric(
                bench.FIRST_STEP[0] - request["born"],
                "s",
                source=f"time from the start of the worker to its first measured step; {birth()}",
            )
        ceilings = meter.ceilings()
        bench.mark("ceilings")
    verdict = meter.validity()
    figures: list[dict[str, Any]] = []
    if ranks > 1:
        metrics, verdict, figures = of_all_ranks(metrics, verdict, device)
    bench.mark("meters_off")
    pipeline.details["phases"] = bench.phases(request["born"])
    data = next((a["key"] for a in pipeline.artifacts if a["stage"] == "data"), None)
    result: dict[str, Any] = {
        "status": "ok",
        "reason": None,
        "metrics": to_json(metrics),
        "details": pipeline.details,
        "windows": {window.name: window.summary() for window in meter.windows},
        "environment": environment() | {"ceilings": ceilings, "birth": birth()},
        "validity": verdict,
        "artifacts": pipeline.artifacts,
        "ranks": figures,
    }
    foreign = [f["detail"] for f in result["validity"]["flags"] if f["code"] == "contaminated"]
    if foreign and rank == 0:  # the others let it finish: it has what was measured
        result |= {"status": "contaminated", "reason": foreign[0]}
    result["fingerprint"] = {
        "machine": machine_id(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else result["environment"]["cpu"],
        "data": data,
        "weights": weights,
        "workload": digest(config["workload"])[:16],
        "torch": torch.__version__,
    }
    if rank == 0:
        arrays = {f"{w.name}.{name}": array for w in meter.windows for name, array in w.samples().items()}
        np.savez_compressed(directory / "samples.npz", **arrays)  # type: ignore[arg-type]
    if ranks > 1:
        torch.distributed.destroy_process_group()
    return result


def birth() -> str:
    """How this process came to be: a fork has torch's import behind it already."""
    return "forked, torch imported before" if FORKED in os.environ else "started"


def of_all_ranks(metrics: dict[str, Any], verdict: dict[str, Any], device: Any) -> tuple[Any, Any, Any]:
    """The run's metrics and validity, and the figures of each rank; all ranks call this together."""
    from dyno.measure.together import ADDED, FULLEST, gathered, together
    from dyno.measure.validity import of_ranks

    names = ("step_time_s", "tokens_per_s", *ADDED, *FULLEST)
    mine = {n: metrics[n] for n in names if n in metrics}
    rows, verdicts, devices = zip(*gathered((mine, verdict, str(device))), strict=True)
    figures = [
        {"rank": rank, "device": devices[rank], **{name: metric.value for name, metric in row.items()}}
        for rank, row in enumerate(rows)
    ]
    return together(metrics, rows, device.type), of_ranks(verdicts), figures


def _train(pipeline: Any) -> Any:
    from dyno.stages import train

    return train.measure(pipeline)


def _infer(pipeline: Any) -> Any:
    from dyno.stages import infer

    return infer.measure(pipeline)


def _data(pipeline: Any) -> Any:
    from dyno.stages import data

    _, manifest, key = pipeline.data()
    return data.metrics(manifest), key


def _kernel(pipeline: Any) -> Any:
    from dyno.stages import kernel

    return kernel.measure(pipeline)


STAGES = {"train": _train, "infer": _infer, "data": _data, "kernel": _kernel}

if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(Path(sys.argv[1])))
