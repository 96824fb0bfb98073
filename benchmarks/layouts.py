"""The layouts to be measured on a machine with several GPUs, through `dyno sweep`; nothing is measured by reading this.

    python benchmarks/layouts.py            # prints the sweeps for as many GPUs as there are
    python benchmarks/layouts.py --gpus 8   # for that many, present or not
    python benchmarks/layouts.py --run      # runs them; every record lands under results/

The sizes are 160m (replication is enough), 1b (sharding starts to pay) and a deep model in the shape of 8b, which one
GPU cannot hold. Every sweep keeps its batch, so that its rows can be compared; layouts that a model or a machine cannot
take become rows that say why.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

COMMON = ["workload=train", "precision=bf16", "compile=on", "compile.per_block=true", "attention=sdpa"]
MODELS = {
    "160m": ["model=160m", "workload.seq=1024", "workload.batch=64"],
    "1b": ["model=1b", "workload.seq=2048", "workload.batch=16", "checkpointing=uniform"],
    "deep": ["model=8b", "workload.seq=4096", "workload.batch=16", "checkpointing=uniform"],
}


def sweeps(gpus: int) -> list[list[str]]:
    """Overrides of each sweep over a number of GPUs that is a power of two."""
    half = gpus // 2
    layouts = [
        ["parallelism=ddp,zero1,zero2,zero3", f"parallelism.dp={gpus}"],
        ["parallelism=tensor", f"parallelism.tp={min(gpus, 8)}", "parallelism.sequence_parallel=false,true"],
        ["parallelism=pipeline", f"parallelism.pp={gpus}", "parallelism.schedule=gpipe,1f1b",
         f"parallelism.micro_batches={gpus},{2 * gpus}"],
        ["parallelism=context", f"parallelism.cp={gpus}", "parallelism.context=ring,ulysses", "parallelism.zero=3"],
    ]  # fmt: skip
    if gpus >= 4:
        layouts += [
            ["parallelism=hybrid", f"parallelism.dp={gpus}", "parallelism.zero=2,3"],
            ["parallelism=mesh", f"parallelism.dp={half}", "parallelism.tp=2", "parallelism.zero=1,3"],
            ["parallelism=mesh", "parallelism.dp=1", f"parallelism.tp={half}", "parallelism.pp=2", "parallelism.zero=0"],
            ["parallelism=mesh", f"parallelism.dp={half}", "parallelism.tp=1", "parallelism.pp=2", "parallelism.zero=1"],
        ]  # fmt: skip
    if gpus >= 8:
        layouts.append(["parallelism=mesh", f"parallelism.dp={gpus // 4}", "parallelism.tp=2", "parallelism.pp=2"])
    alone = ["parallelism=none"]
    return [[*COMMON, *model, *layout] for model in MODELS.values() for layout in [alone, *layouts]]


def visible_gpus() -> int:
    from dyno.measure.environment import detect

    device = detect({"device": "auto"})
    return device.count if device.kind == "cuda" else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="for so many GPUs; as many as there are unless given")
    parser.add_argument("--run", action="store_true", help="run the sweeps instead of printing them")
    arguments = parser.parse_args()
    gpus = arguments.gpus or visible_gpus()
    if gpus < 2 or gpus & (gpus - 1):
        print(f"layouts need 2, 4, 8, ... GPUs, there are {gpus}: name a number with --gpus to see the sweeps")
        return 2
    for overrides in sweeps(gpus):
        command = ["dyno", "sweep", *overrides]
        print(shlex.join(command), flush=True)
        if arguments.run and subprocess.run(command).returncode == 130:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
