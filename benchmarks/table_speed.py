"""How long `dyno.record.table` takes over 10,000 records, varied from the committed ones of `results/reference`.

python benchmarks/table_speed.py [RECORDS]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dyno import record

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
ROUNDS = 5
# Timed where nothing else was imported or allocated; the first read brings pandas and the page cache in.
TIMED = """
import json, sys, time
from dyno.record import table
table(sys.argv[1])
took = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter(), time.process_time()
    frame = table(sys.argv[1])
    took.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps({"took": took, "shape": frame.shape}))
"""


def varied(given: dict[str, Any], number: int, rng: random.Random) -> dict[str, Any]:
    """A record with an id of its own, two searched knobs and every measured figure another."""
    made: dict[str, Any] = json.loads(json.dumps({k: v for k, v in given.items() if k != "_path"}))
    made["id"] = f"20261201T{number:06d}-{rng.randbytes(4).hex()}-{rng.randbytes(3).hex()}"
    made["config"]["workload"] |= {"lr": 10 ** rng.uniform(-5, -2), "batch": rng.randrange(1, 65)}
    for metric in made["metrics"].values():
        factor = rng.lognormvariate(0, 0.2)
        for key in ("value", "low", "high"):
            if isinstance(metric.get(key), float):
                metric[key] *= factor
    return made


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    rng, given = random.Random(0), [r for r in record.read_records(REFERENCE) if r["status"] == "ok"]
    with tempfile.TemporaryDirectory() as results:
        runs = record.runs_dir(results)
        for number in range(count):
            made = varied(given[number % len(given)], number, rng)
            (runs / made["id"]).mkdir()
            (runs / made["id"] / "record.json").write_text(json.dumps(made, indent=1))
        words = [sys.executable, "-c", TIMED, results, str(ROUNDS)]
        told = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    middle = sorted(told["took"])[ROUNDS // 2]
    print(f"table of {told['shape'][0]} records, {told['shape'][1]} columns: median of {ROUNDS} {middle[0]:.2f} s")
    walls = " ".join(f"{wall:.2f}" for wall, _ in told["took"])
    print(f"  each {walls} s; CPU time {middle[1]:.2f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
