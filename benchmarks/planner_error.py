"""The planner against records: errors before and after calibration, by option, on runs that the fit did not see.

    python benchmarks/planner_error.py results/planner [more directories] [--audited results/audit] [--store]

Prints tables, and JSON last: predicted peak against max_memory_allocated, predicted step against the measured one, also
of all runs whose steps were steady, and by draw what was planned before the runs;
recipes called feasible that ran out of memory, and refused ones (benchmarks/planner_recipes.py --audit) that ran, which are
not judged otherwise: they are drawn recipes again.
Runs that a directory's outdated.json names are left out of what judges today's plan.
`--store` keeps the calibration for later plans on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from layouts import outdated

from dyno.plan import calibrate, corrections

STEADY = 0.05  # of their median, the middle half of a run's steps: others were disturbed while they were timed
BY = ("precision", "attention", "checkpointing", "compile", "accumulation", "optimizer", "loss", "offload")


def summary(errors: np.ndarray) -> dict[str, float | int]:
    absolute = np.abs(errors)
    return {
        "runs": len(errors),
        "median": round(float(np.median(absolute)), 4),
        "p95": round(float(np.quantile(absolute, 0.95)), 4),
        "bias": round(float(np.median(errors)), 4),
    }


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title:<34} {'runs':>5} {'median':>8} {'p95':>8} {'bias':>8}")
    for name, row in rows.items():
        print(f"{name:<34} {row['runs']:>5} {row['median']:>8.1%} {row['p95']:>8.1%} {row['bias']:>+8.1%}")


def fit_of(sample: calibrate.Sample, what: str, found: list[corrections.Calibration]) -> corrections.Fit | None:
    """The fit that the plan takes for a run like this one on its machine."""
    mine = [c for c in found if c.machine == sample.machine] + [c for c in found if not c.machine]
    return corrections.fit_of(mine, what, calibrate.kind_of(sample))


def judged(samples: list[calibrate.Sample], what: str, found: list[corrections.Calibration]) -> dict[str, Any]:
    """Errors of samples under their fit: all, by kind, by machine, by option."""
    errors = np.concatenate([calibrate.errors([s], fit_of(s, what, found), what) for s in samples])
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups["all"].append(i)
        groups[calibrate.kind_of(sample)].append(i)
        groups[f"machine {sample.machine}"].append(i)
        for axis in BY:
            if axis in sample.choices:
                groups[f"{axis}={sample.choices[axis]}"].append(i)
    return {name: summary(errors[rows]) for name, rows in groups.items()}


def done(folders: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every drawn recipe's line, and the results directory that it is of."""
    for folder in map(Path, folders):
        path = folder / "done.jsonl"
        for text in path.read_text().splitlines() if path.exists() else ():
            yield folder, json.loads(text)


def outcomes(folders: list[str]) -> dict[str, int]:
    """What became of recipes that the plan let through, and of refused ones that ran all the same."""
    out = dict.fromkeys(("feasible_ran", "feasible_out_of_memory", "refused_ran", "refused_out_of_memory", "other"), 0)
    for _, row in done(folders):
        end = {"ok": "ran", "out_of_memory": "out_of_memory"}.get(row["status"])
        out[f"{'refused' if row['refused'] else 'feasible'}_{end}" if end else "other"] += 1
    return out


def as_planned(folders: list[str]) -> dict[str, dict[str, Any]]:
    """By draw (a recipe's seed): errors of the plan that each record holds, which was made before its run.

    Lines marked "later", by hand, are of recipes run after the plan had been corrected by the others of their draw.
    """
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"memory": [], "time": []})
    for folder, row in done(folders):
        if row["status"] != "ok" or row["refused"] or row.get("later"):
            continue
        record = json.loads((folder / "runs" / row["id"] / "record.json").read_bytes())
        for what, name in (("memory", "peak_memory_bytes"), ("time", "step_time_s")):
            planned = record["plan"].get(name)
            if planned:
                errors[row["key"].split("/")[0]][what].append(planned / record["metrics"][name]["value"] - 1)
    return {draw: {what: summary(np.array(e)) for what, e in found.items()} for draw, found in errors.items()}


def repeats(folders: list[str], audited: list[str]) -> dict[str, float | int] | None:
    """How far two timings of one recipe by today's step lie apart: as drawn, and again under an audit that it passed."""
    old = {run for folder in (*folders, *audited) for run in outdated(Path(folder))}

    def steps(where: list[str]) -> dict[str, float]:
        finished = [(folder, row) for folder, row in done(where) if row["status"] == "ok" and row["id"] not in old]
        read = {
            row["key"].partition("/audit")[0]: folder / "runs" / row["id"] / "record.json" for folder, row in finished
        }
        return {key: json.loads(path.read_bytes())["metrics"]["step_time_s"]["value"] for key, path in read.items()}

    again = steps(audited)
    first = steps(folders) if again else {}
    apart = [abs(again[key] / first[key] - 1) for key in again.keys() & first.keys()]
    if not apart:
        return None
    median, most = (round(float(np.quantile(apart, q)), 4) for q in (0.5, 0.9))
    return {"pairs": len(apart), "median": median, "p90": most}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--audited", nargs="*", default=[], help="results directories of audits")
    parser.add_argument("--device", help="the device's name where there are several; default: the one with most runs")
    parser.add_argument("--worst", type=int, default=5, help="how many of the worst predictions are shown")
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    shares = {row.get("share") for _, row in done(arguments.audited)}
    if len(shares) > 1:
        parser.error(f"--audited: audits of one share are judged together, here are {', '.join(map(str, shares))}")
    samples, left_out = [], 0
    for folder in arguments.folders:
        more, bad = calibrate.read(folder)
        old = outdated(Path(folder))
        samples, left_out = samples + [s for s in more if s.id not in old], left_out + bad
    names = [s.device for s in samples]
    if not names:
        print(f"no finished training runs ({left_out} records left out)", file=sys.stderr)
        return 1
    device = arguments.device or max(set(names), key=names.count)
    mine = [s for s in samples if s.device == device]
    fitted = calibrate.of_all(mine, device, left_out)
    out: dict[str, Any] = {"device": device, "runs": len(mine), "left_out": left_out}
    for what in ("memory", "time"):
        usable = calibrate.usable(mine, what)
        held = [s for s in usable if calibrate.is_held_out(s)]
        if not held:
            continue
        before, after = judged(held, what, []), judged(held, what, fitted)
        show(f"{what}: as derived, held-out", before)
        show(f"{what}: calibrated, held-out", after)
        coefficients = {
            f"{kind} {found.machine}".strip(): fit.coefficients
            for found in fitted
            for kind, fit in getattr(found, what).items()
        }
        for name, factors in coefficients.items():
            print(f"  {name}: " + "  ".join(f"{n} {x:.2f}" for n, x in factors.items()))
        errors = [(float(calibrate.errors([s], fit_of(s, what, fitted), what)[0]), s) for s in held]
        for error, s in sorted(errors, key=lambda pair: -abs(pair[0]))[: arguments.worst]:
            print(f"  worst: {error:+.1%}  {s.id}  " + " ".join(str(s.choices.get(axis)) for axis in BY))
        out[what] = {
            "as_derived": before["all"],
            "calibrated": after["all"],
            "by_machine": {name: row for name, row in after.items() if name.startswith("machine ")},
            "coefficients": coefficients,
        }
        steady = [s for s in usable if s.spread <= STEADY]
        if what == "time" and steady:
            row = out[what]["steady"] = judged(steady, what, [])["all"]
            show(f"time: as derived, steady steps ({STEADY:.0%})", {"all": row})
    out["as_planned"] = as_planned(arguments.folders)
    out["repeats"] = repeats(arguments.folders, arguments.audited)
    out["audited_share"] = next(iter(shares), None)
    out["outcomes"] = outcomes([*arguments.folders, *arguments.audited])
    print("\n" + "  ".join(f"{name} {count}" for name, count in out["outcomes"].items()))
    if arguments.store:
        out["stored"] = [str(corrections.store(one)) for one in fitted]
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
