"""The README's table of what was predicted and what was measured; `benchmarks/readme.py` puts it in place."""

from __future__ import annotations

import json
from pathlib import Path

from dyno.record import read_records


def table(study: Path, drawn: list[Path], published: Path, served: Path, split: list[Path], decoded: Path) -> list[str]:
    """What was predicted before each run of the study, by nothing but arithmetic, against what was measured."""
    records = [r for r in read_records(study) if r["status"] == "ok"]
    lines = ["| predicted against | runs | median error | worst |", "|---|---|---|---|"]

    def row(what: str, errors: list[float]) -> None:
        errors = sorted(abs(e) for e in errors)
        median = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
        lines.append(f"| {what} | {len(errors)} | {median:.1%} | {errors[-1]:.1%} |")

    for kind, label in (("off", "eager"), ("on", "compiled")):
        chosen = [r for r in records if r["choices"]["compile"] == kind]
        for metric, name in (("peak_memory_bytes", "peak memory"), ("step_time_s", "step time")):
            row(
                f"{name} of the study above, {label}",
                [r["plan"][metric] / r["metrics"][metric]["value"] - 1 for r in chosen],
            )
    outcomes = [""]
    for random in (json.loads(path.read_text()) for path in drawn):
        for metric, which, name in (("memory", "as_derived", "peak memory"), ("time", "calibrated", "step time")):
            found, device = random[metric][which], random["device"].split()[1]
            lines.append(
                f"| {name} of random recipes on one {device}, {which.replace('_', ' ')}, held out of {random['runs']} | "
                f"{found['runs']} | {found['median']:.1%} | {found['p95']:.1%} (95% of them) |"
            )
        machines = random["time"]["by_machine"]
        for i, found in enumerate(machines.values() if len(machines) > 1 else ()):
            lines.append(
                f"| of that step time the part of host {i + 1} of {len(machines)} | {found['runs']} | {found['median']:.1%} | "
                f"{found['p95']:.1%} (95% of them) |"
            )
        found = random["time"]["steady"]
        lines.append(
            f"| the same as derived, of all whose steps were steady (middle half within 5%) | {found['runs']} | "
            f"{found['median']:.1%} | {found['p95']:.1%} (95% of them) |"
        )
        for draw, planned in random["as_planned"].items():
            if draw != "0":  # the plan was corrected with the first draw in sight
                for metric, name in (("memory", "peak memory"), ("time", "step time")):
                    found = planned[metric]
                    lines.append(
                        f"| {name} of fresh draw {draw} on one {device}, as planned before its runs | {found['runs']} | "
                        f"{found['median']:.1%} | {found['p95']:.1%} (95% of them) |"
                    )
        ends = random["outcomes"]
        cut = f", each in {random['audited_share']:.0%} of what it was said to need," if random["audited_share"] else ""
        outcomes.append(
            f"Of the random recipes on one {device} that the plan let through {ends['feasible_ran']} ran and "
            f"{ends['feasible_out_of_memory']} ran out of memory; of refused ones that were tried all the same"
            f"{cut} {ends['refused_ran']} ran and {ends['refused_out_of_memory']} ran out of memory."
        )
        if found := random["repeats"]:
            alone = json.loads(split[-1].read_text())["alone"]["median"]
            outcomes.append(
                f"The same recipe timed twice on a busy {device} host: half of {found['pairs']} pairs within "
                f"{found['median']:.0%}, a tenth over {found['p90']:.0%} apart. The layouts' runs on one GPU, alone there, are "
                f"planned within {alone:.1%} in the median."
            )
    for path, gpus in zip(split, ("two H100", "two and four H200"), strict=True):
        for name, label in (("memory", "peak memory a GPU"), ("time", "step time")):
            found = json.loads(path.read_text())[name]
            lines.append(
                f"| {label} of layouts on {gpus}, host costs fitted to most of these | {found['runs']} | {found['median']:.1%} | "
                f"{found['worst']:.1%} |"
            )
    found = json.loads(published.read_text())["held_out"]
    lines.append(
        f"| throughput of published runs on 8 to 16384 GPUs, those not fitted | {found['runs']} | "
        f"{found['median']:.1%} | {found['worst']:.1%} |"
    )
    serving = json.loads(served.read_text())
    for name, label in (("ttft_s", "time to first token"), ("tpot_s", "time per token")):
        found = serving[name]
        lines.append(
            f"| {label} of the served runs above | {found['runs']} | {found['median']:.1%} | {found['worst']:.1%} |"
        )
    for cache in ("contiguous", "static"):
        row(
            f"time per token of `kv_cache={cache}` in the decode of 8b above, as planned before its runs",
            [
                r["plan"]["serving"]["tpot_s"] / r["metrics"]["tpot_s"]["value"] - 1
                for r in read_records(decoded)
                if r["status"] == "ok" and r["choices"]["kv_cache"] == cache
            ],
        )
    return [*lines, *outcomes]
