"""What the meters cost: the same decode loop with every meter on and with none, in alternating rounds.

    python benchmarks/meter_overhead.py model=160m precision=bf16 attention=sdpa_flash --rounds 20

A round is `--steps` passes of a decode loop (`workload=generate`); metered rounds run inside a window, with the sampler
and codecarbon awake; in the others both processes are stopped (SIGSTOP) and nothing marks the steps. The host's clock
times both alike, device synchronised at both ends; who goes first changes every round. Prints one JSON document: the
median of the paired log-ratios and its bootstrap interval, as a share of the loop's time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dyno.measure.clock import synchronize
from dyno.measure.environment import detect
from dyno.measure.statistics import bootstrap_medians, interval
from dyno.measure.window import Meter
from dyno.pipeline import Pipeline
from dyno.recipe import compose
from dyno.stages import compress, infer


def pause(meter: Meter, sign: signal.Signals) -> None:
    """Stop or wake the processes that measure beside this one."""
    for helper in (meter.sampler, meter.codecarbon):
        if helper:
            os.kill(helper.process.pid, sign)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="passes of the model a round")
    given = parser.parse_intermixed_args()
    # no limit but the count of steps; energy and codecarbon on
    recipe = compose(["workload=generate", "measure=default", *given.overrides])
    found = detect(recipe.config["hardware"])
    device = torch.device(found.kind, found.index) if found.kind == "cuda" else torch.device("cpu")
    workload = {**recipe.config["workload"], "new_tokens": given.steps + 1}
    recipe.config["workload"] = workload
    with (
        tempfile.TemporaryDirectory() as folder,
        Meter(device, recipe.config["measure"], recipe.config["hardware"], Path(folder)) as meter,
    ):
        pipeline = Pipeline(recipe, device, Path(folder), meter=meter)
        model, _, _ = compress.compress(pipeline)
        run = infer.prepared_run(pipeline, model)
        held_out = np.load(pipeline.data()[0] / "validation.npy", mmap_mode="r")
        prompts = infer.take_prompts(held_out, workload).to(device)
        ratios, plain_s = [], []
        with torch.inference_mode(), run.part("autocast")():
            length = prompts.shape[1] + workload["new_tokens"] + 1
            session = run.part("decode").start(run, prompts, length)

            def metered() -> float:
                session.rewind()
                with meter.window("decode") as window:
                    start = time.perf_counter()
                    for _ in window.steps(given.steps):
                        session.step()
                    synchronize(device)
                    return time.perf_counter() - start

            def plain() -> float:
                session.rewind()
                pause(meter, signal.SIGSTOP)
                try:
                    synchronize(device)
                    start = time.perf_counter()
                    for _ in range(given.steps):
                        session.step()
                    synchronize(device)
                    return time.perf_counter() - start
                finally:
                    pause(meter, signal.SIGCONT)

            for turn in range(given.rounds + 1):
                first, second = (metered, plain) if turn % 2 else (plain, metered)
                a, b = first(), second()
                on, off = (a, b) if turn % 2 else (b, a)
                if turn:  # the first round of both is warm-up: every length of the context once
                    ratios.append(np.log(on / off))
                    plain_s.append(off)
    shares = np.exp(np.array(ratios)) - 1
    low, high = interval(bootstrap_medians(shares, 5000, 0))
    print(
        json.dumps(
            {
                "device": found.name,
                "torch": torch.__version__,
                "overrides": given.overrides,
                "rounds": len(shares),
                "steps_a_round": given.steps,
                "plain_step_s": float(np.median(plain_s)) / given.steps,
                "overhead": float(np.median(shares)),
                "overhead_low": low,
                "overhead_high": high,
                "overheads": [round(float(s), 6) for s in shares],
            }
        )
    )


if __name__ == "__main__":
    main()
