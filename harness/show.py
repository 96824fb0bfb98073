"""What the terminal shows: records, tables, plans and options, in plain aligned text."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from dyno.axes import AXES, BY_NAME
from dyno.errors import UserError
from dyno.recipe import close, groups, option_help

if TYPE_CHECKING:
    import pandas as pd

    from dyno.plan import Plan
    from dyno.plan.budget import Budget
    from dyno.plan.corrections import Calibration
    from dyno.plan.search import Candidate
    from dyno.plan.serving import ServingTime

MAIN = (
    "tokens_per_s", "step_time_s", "decode_tokens_per_s", "ttft_s", "tpot_s", "validation_loss", "perplexity",
    "kl_divergence", "top1_agreement", "peak_memory_bytes", "model_bytes", "energy_j_per_token", "mfu", "mbu",
)  # fmt: skip
ONE_LINE = ("tokens_per_s", "decode_tokens_per_s", "validation_loss", "peak_memory_bytes")


def si(value: float | None, unit: str = "") -> str:
    """12345 -> 12.3 k; bytes in powers of 1024; dimensionless shares as they are."""
    if value is None or value != value:
        return "-"
    if unit == "B":
        for prefix in ("B", "KiB", "MiB", "GiB", "TiB"):
            if abs(value) < 1024 or prefix == "TiB":
                return f"{value:.3g} {prefix}" if abs(value) < 1000 else f"{value:.0f} {prefix}"
            value /= 1024
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} us"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.4g} {unit}".strip() if unit != "1" else f"{value:.4g}"


def seconds(text: str) -> float:
    """'90s', '12h', '7d' -> seconds."""
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        return float(text[:-1]) * scale[text[-1]]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"'{text}' is no duration; write 90s, 30m, 12h or 7d") from error


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    metrics = record["metrics"]
    parts = [f"{n} {si(metrics[n]['value'], metrics[n]['unit'])}" for n in ONE_LINE if n in metrics]
    return f"ok  {'  '.join(parts)}  ({record['duration_s']:.1f} s)"


def record(record: dict[str, Any]) -> None:
    """A record on stderr: status, then every metric with its interval, or why it is empty."""
    out = [f"{record['id']}  {record['status']}" + (f": {record['reason']}" if record["reason"] else "")]
    chosen = [
        f"{a.name}={_option(record['choices'][a.name])}"
        for a in AXES
        if _option(record["choices"][a.name]) != a.baseline
    ]
    out.append(
        "  " + "  ".join([f"model={record['choices']['model']}", f"workload={record['choices']['workload']}", *chosen])
    )
    empty: dict[str, list[str]] = {}
    for name, metric in record["metrics"].items():
        if metric["value"] is None:
            empty.setdefault(metric["reason"], []).append(name)
            continue
        unit = metric["unit"]
        text = f"  {name:<28} {si(metric['value'], unit):>14}"
        if "low" in metric:
            text += f"   [{si(metric['low'], unit)}, {si(metric['high'], unit)}]"
        out.append(text + (f"   n={metric['count']}" if metric.get("count", 1) > 1 else ""))
    out += [f"  not measured: {', '.join(names)} ({reason})" for reason, names in empty.items()]
    out += [f"  flag: {flag['code']}: {flag['detail']}" for flag in record["validity"].get("flags", [])]
    reused = [f"{a['stage']}{' (cached)' if a['reused'] else ''}" for a in record["artifacts"]]
    if reused:
        out.append(f"  artifacts: {', '.join(reused)}")
    print("\n".join([*out, f"  {record['_path']}"]), file=sys.stderr)


def _option(choice: Any) -> str:
    return "+".join(choice) if isinstance(choice, list) else str(choice)


def rows(records: list[dict[str, Any]]) -> None:
    from dyno.record import table

    print(frame_text(table(records), "text"), file=sys.stderr)


def frame_text(frame: pd.DataFrame, form: str, all_columns: bool = False) -> str:
    """A frame as aligned text, Markdown or CSV. Text and Markdown show what differs and the main metrics."""
    if form == "csv":
        return frame.to_csv(index=False)
    if frame.empty:
        return "no runs"
    shown = frame if all_columns else frame[_telling(frame)]
    units = {"peak_memory_bytes": "B", "model_bytes": "B", "step_time_s": "s", "ttft_s": "s", "tpot_s": "s"}
    cells = [[_cell(value, units.get(str(c), "")) for value in shown[c]] for c in shown.columns]
    heads = [str(c) for c in shown.columns]
    if form == "md":
        body = "\n".join(
            "| " + " | ".join(col[i].replace("|", "\\|") for col in cells) + " |" for i in range(len(shown))
        )
        return "| " + " | ".join(heads) + " |\n|" + "---|" * len(heads) + f"\n{body}"
    widths = [max(len(h), *(len(c) for c in col)) for h, col in zip(heads, cells, strict=True)]
    numeric = [shown[c].dtype.kind in "fiu" for c in shown.columns]
    lines = ["  ".join(h.rjust(w) if n else h.ljust(w) for h, w, n in zip(heads, widths, numeric, strict=True))]
    for i in range(len(shown)):
        lines.append(
            "  ".join(
                col[i].rjust(w) if n else col[i].ljust(w) for col, w, n in zip(cells, widths, numeric, strict=True)
            )
        )
    return "\n".join(lines)


def _telling(frame: pd.DataFrame) -> list[str]:
    """id, status, axes and knobs that differ, main metrics that any row has, and the reason where a row failed."""
    columns = ["id", "status"]
    for group in (*BY_NAME, "model", "workload"):
        if group not in frame:
            continue
        if frame[group].nunique(dropna=False) > 1:
            columns.append(group)
        # A knob that the option already tells says nothing more.
        knobs = [c for c in frame if str(c).startswith(f"{group}.")]
        columns += [c for c in knobs if frame.groupby(group, dropna=False)[c].nunique().max() > 1]
    columns += [c for c in MAIN if c in frame and frame[c].notna().any()]
    return columns + (["reason"] if frame["reason"].notna().any() else [])


def _cell(value: Any, unit: str) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float | int) and not isinstance(value, bool):
        return si(float(value), unit)
    return str(value)[:80]


def plan(prediction: Plan) -> None:
    """A plan on stderr: phases and their terms, the phase that binds, and reasons."""
    verdict = prediction.verdict()
    out = [f"predicted on {prediction.device.name}, {si(prediction.device.memory_bytes, 'B')}"]
    if prediction.shape:
        out.append(f"  {'   '.join(sizes(prediction))}")
    for phase, terms in prediction.terms.items():
        mark = "  <- binds" if phase == prediction.phase else ""
        out.append(f"  {phase:<18} {si(sum(terms.values()), 'B'):>10}{mark}")
        out += [f"    {name:<18} {si(value, 'B'):>10}" for name, value in terms.items() if value]
    if prediction.terms:
        out.append(
            f"  peak memory        {si(prediction.peak_memory_bytes, 'B'):>10}  +-{prediction.memory_band:.0%}; "
            f"with allocator slack and context {si(prediction.needed_bytes, 'B')}"
        )
    if prediction.host_bytes:
        out.append(f"  host memory        {si(prediction.host_bytes, 'B'):>10}  of what is offloaded")
    each = "a step" if prediction.tokens_per_step else "a decode pass"
    each += " and rank" if prediction.ranks > 1 else ""
    if traffic := prediction.memory_traffic_bytes_per_step:
        out.append(f"  memory traffic     {si(traffic, 'B'):>10}  {each}; counted, never measured")
    if prediction.step_s:
        out.append(f"  ceilings           {prediction.machine.source if prediction.machine else '-'}")
        out += [f"    {name:<18} {si(value, 's'):>10}" for name, value in prediction.time_terms.items() if value]
    out += between_ranks(prediction, each)
    if prediction.step_s:
        out.append(
            f"  step               {si(prediction.step_s, 's'):>10}  +-{prediction.time_band:.0%}; "
            f"{si(prediction.tokens_per_step / prediction.step_s, 'token/s')}"
        )
    if prediction.serving:
        out += serving(prediction.serving, prediction.machine.source if prediction.machine else "-")
    out += [f"  {sentence}" for sentence in (*prediction.decisions, *prediction.advice)]
    if prediction.terms and not prediction.calibrated:
        out.append("  uncalibrated: `dyno plan --calibrate DIR` fits these figures to training runs in DIR")
    out.append(f"  cannot run: {verdict[1]}" if verdict else "  can run")
    print("\n".join(out), file=sys.stderr)


def sizes(prediction: Plan) -> list[str]:
    """The model's, the batch's and the layout's sizes, and the FLOPs of all ranks."""
    shape, ranks, trains = prediction.shape, prediction.ranks, prediction.tokens_per_step > 0
    assert shape is not None
    out = [f"parameters {si(shape.parameters)}"]
    if shape.batch:
        out.append(f"{'batch' if trains else 'requests'} {shape.batch} x {shape.seq} tokens")
    out.append(f"{ranks} rank{'s' if ranks > 1 else ''}")
    if flops := prediction.flops_per_step:
        out.append(f"FLOPs a {'step' if trains else 'decode pass'} {si(flops)}{' of all' if ranks > 1 else ''}")
    return out


def between_ranks(prediction: Plan, each: str) -> list[str]:
    """What ranks send to each other and what of a step it and a pipeline's idle share take; nothing of one rank."""
    if not prediction.wire_bytes_per_step:
        return []
    terms, exposed, longer = prediction.time_terms, prediction.exposed_communication_s, prediction.bubble_s
    took = "; nothing hides it" if prediction.serving else ""
    if exposed is not None:
        took = f"; {si(terms['wire'] + terms['waited'], 's')}, {si(exposed, 's') if exposed else 'none'} of it exposed"
    out = [f"  communication      {si(prediction.wire_bytes_per_step, 'B'):>10}  {each}{took}"]
    if prediction.bubble:
        told = "" if longer is None else f", {si(longer, 's')} of the step" if longer else "; the host is later still"
        out.append(f"  pipeline bubble    {prediction.bubble:>10.0%}  of the device's time{told}")
    return out


def serving(found: ServingTime, ceilings: str) -> list[str]:
    """Prefill and decode pass by term, and what binds each."""
    out = [f"  ceilings           {ceilings}"]
    for name, terms, seconds in (("prefill", found.prefill, found.ttft_s), ("decode pass", found.decode, found.tpot_s)):
        binds = "the host's launches" if terms["host"] >= sum(terms.values()) - terms["host"] else "the device"
        out.append(
            f"  {name:<18} {si(seconds, 's') if seconds else '-':>10}  {binds} bind{'s' if binds[-1] == 'e' else ''}"
        )
        out += [f"    {term:<18} {si(value, 's'):>10}" for term, value in terms.items() if value]
    out.append(
        f"  ttft {si(found.ttft_s, 's')}, tpot {si(found.tpot_s, 's')}, {si(found.tokens_per_s, 'token/s')} of "
        f"{found.requests} requests (predicted, +-{found.band:.0%})"
    )
    return out + [f"  {name}: {reason}" for name, reason in found.reasons.items()]


def layouts(found: list[Candidate], looked: int, fitting: int, refused: str | None) -> None:
    """The best layouts on stderr, each as a tuned engine and as a recipe, its overrides and why it is no quicker."""
    out = [f"predicted; {looked} layouts, {fitting} fit; the best:"]
    if refused:
        out[0] = (
            f"predicted; {looked} layouts, {fitting} fit, none that was tried as a recipe here ({refused}); the quickest:"
        )
    for c in found:
        x = c.layout
        out.append(
            f"  dp {x.dp} x tp {x.tp} x pp {x.pp} x cp {x.cp}  zero {x.zero}  micro-batch {x.micro}  "
            f"recompute {x.recompute}: step {si(c.step_s, 's')}  {si(c.tokens_per_s, 'token/s')}  mfu {c.mfu:.0%}  "
            f"{si(c.memory_bytes, 'B')}"
        )
        out += [f"    {c.why()}"]
        if c.plan and c.plan.step_s:
            out += [f"    as a recipe here: step {si(c.plan.step_s, 's')}, needs {si(c.plan.needed_bytes, 'B')}"]
        out += [f"    {' '.join(c.overrides)}"]
    print("\n".join(out), file=sys.stderr)


def budget(total: Budget) -> None:
    """What so many tokens cost, on stderr."""
    from dyno.plan.budget import DRAWN

    devices = f"{total.gpus} device{'s' if total.gpus > 1 else ''}"
    parts = [f"{si(total.tokens)} tokens on {devices}: {total.hours / 24:.3g} days"]
    parts += [f"{si(total.energy_kwh)} kWh"] if total.energy_kwh is not None else []
    parts += [f"{si(total.carbon_kg)} kg CO2"] if total.carbon_kg is not None else []
    parts += [f"{si(total.cost_usd)} USD"] if total.cost_usd is not None else []
    out = [f"  {', '.join(parts)} (predicted)"]
    if total.relative_error is not None:
        out.append(
            f"  each at least +-{total.relative_error:.0%}, as the step; {DRAWN:.0%} of the power limit is taken to be drawn, "
            "prices as stated"
        )
    out += [f"  {name}: {reason}" for name, reason in total.reasons.items()]
    print("\n".join(out), file=sys.stderr)


def calibration(found: Calibration) -> None:
    """What a calibration found, on stderr: coefficients and the errors on runs that it did not see."""
    where = f"{found.device} of machine {found.machine}" if found.machine else found.device
    out = [f"calibrated on {where}: {found.records} runs, {found.left_out} records left out"]
    for what, fits in (("memory", found.memory), ("time", found.time)):
        for kind, fit in fits.items():
            error = (
                f"median error {fit.median_error:.1%}, 95% within {fit.p95_error:.1%} of {fit.held_out} held-out runs"
                if fit.median_error is not None
                else "no run was held out"
            )
            out.append(f"  {what:<7} {kind:<9} {fit.fitted} runs fitted; {error}")
            out.append("    " + "  ".join(f"{name} {x:.2f}" for name, x in fit.coefficients.items()))
    print("\n".join(out), file=sys.stderr)


def options(group: str | None, plugins: list[str]) -> None:
    """All groups, or one group's options with their knobs."""
    known = groups(plugins)
    if group is None:
        for axis in AXES:
            print(f"{axis.name:<14} {axis.stage:<9} {axis.help}\n{'':<25}{', '.join(known.get(axis.name, []))}")
        for name in sorted(set(known) - set(BY_NAME)):
            print(f"{name:<14} {'':<9} {', '.join(known[name])}")
        return
    if group not in known:
        raise UserError(f"there is no group '{group}'{close(group, known)}")
    for option in known[group]:
        print(f"{group}={option:<20} {option_help(group, option, plugins)}")
        for knob, value in knobs(group, option, plugins).items():
            print(f"    {group}.{knob}={value}")


def knobs(group: str, option: str, plugins: list[str]) -> dict[str, Any]:
    """The knobs of an option file, as written."""
    from dyno.composition import written

    node = written(group, option, plugins)
    return {k: v for k, v in node.items() if k not in ("_target_", "defaults")} if isinstance(node, dict) else {}


def artifacts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        age = time.time() - row["used_s"]
        state = "" if row["whole"] else "  half-written"
        print(f"{row['stage']:<9} {row['key']:<26} {si(row['bytes'], 'B'):>10}  used {age / 3600:.1f} h ago{state}")
    print(f"{len(rows)} artifacts, {si(sum(r['bytes'] for r in rows), 'B')}")
