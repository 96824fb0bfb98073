"""The serving predictor against committed records: time to first token and per token, predicted over measured.

    python benchmarks/serving_error.py [results/reference/h100/generate-160m]

Nothing in the predictor was fitted to these records. Prints a table, and JSON last.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from dyno.measure.environment import Device
from dyno.plan import shape_of
from dyno.plan.machine import from_ceilings
from dyno.plan.serving import ServingTime, serving_time
from dyno.recipe import compose
from dyno.technique import combined

RECORDS = Path(__file__).parent.parent / "results" / "reference" / "h100" / "generate-160m"


def predicted(record: dict[str, Any]) -> ServingTime:
    """What the arithmetic says of a record's recipe, under the ceilings that its machine was probed to have."""
    recipe = compose(record["overrides"])
    shape, ceilings = shape_of(recipe), record["environment"]["ceilings"]
    assert shape is not None
    device = Device("cuda", 0, ceilings["device"], 80 * 2**30, (9, 0), None, 1)
    techniques = [t for chosen in recipe.techniques.values() for t in chosen]
    share = combined(t.footprint(shape, device) for t in techniques)
    workload = recipe.config["workload"]
    return serving_time(
        shape, share, from_ceilings(ceilings, record["config"]["hardware"]), "cuda", workload["prompt"],
        workload["new_tokens"], max(getattr(t, "positions_per_pass", 1) for t in techniques),
    )  # fmt: skip


def errors(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """A row a record: the options, and relative errors of what is predicted."""
    rows = []
    for path in sorted(folder.glob("runs/*/record.json")):
        record = json.loads(path.read_text())
        found = predicted(record)
        row = {axis: record["choices"][axis] for axis in ("attention", "quantization", "decoding")}
        for name in ("ttft_s", "tpot_s"):
            told, measured = getattr(found, name), record["metrics"][name]["value"]
            row |= {name: measured, f"{name}_predicted": told, f"{name}_error": told and told / measured - 1}
        rows.append(row)
    return rows


def main() -> int:
    rows = errors(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDS)
    out: dict[str, Any] = {"rows": rows}
    for row in rows:
        told = [f"{row['attention']:<13}{row['quantization']:<6}{row['decoding']:<12}"]
        for name in ("ttft_s", "tpot_s"):
            error = row[f"{name}_error"]
            told.append(f"{name} {1e3 * row[name]:6.2f} ms {'not predicted' if error is None else f'{error:+.0%}'}")
        print("  ".join(told))
    for name in ("ttft_s", "tpot_s"):
        found = [abs(row[f"{name}_error"]) for row in rows if row[f"{name}_error"] is not None]
        out[name] = {"runs": len(found), "median": round(statistics.median(found), 4), "worst": round(max(found), 4)}
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
