"""What a plan past one machine shows on the terminal, in aligned text."""

from __future__ import annotations

import sys

from dyno.plan.cluster import PUBLISHED_ERROR, PUBLISHED_RUNS, TAKEN_OVER, Cluster
from dyno.plan.collectives import Collective, orders, verdict
from dyno.plan.pooled import Pooled
from dyno.plan.resilience import Resilience
from dyno.show import si


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines, the first two columns to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def error(generation: str) -> None:
    """How far a search's figures may be off, and what they were held against."""
    out = [
        f"  step, token/s and mfu +-{PUBLISHED_ERROR:.0%}: the worst of {PUBLISHED_RUNS} published runs on A100 and H100 that "
        "were not fitted; memory was held against none"
    ]
    if nearest := TAKEN_OVER.get(generation):
        out.append(
            f"  no {generation.upper()} run is among them: its efficiency is taken over from the {nearest.upper()}, and "
            "the error may be larger"
        )
    print("\n".join(out), file=sys.stderr)


def collectives(found: list[Collective], cluster: Cluster) -> None:
    """The best layout's collectives: what each crosses and how long, level by level and as one ring."""
    levels = ", ".join(
        f"{level.name} {f'of {level.gpus:.0f} GPUs ' if level.gpus < float('inf') else ''}{si(level.link.bytes_per_s)}B/s"
        for level in cluster.levels
    )
    out = [f"collectives of the best layout (predicted, before any overlap; one way, each GPU: {levels})"]
    if not found:
        out.append("  none: one GPU")
    rows = [["what", "crosses", "calls", "buffer", "one call", "as one ring", "a step"]]
    for c in found:
        crosses = " ".join(f"{span.name} x{span.ranks}" for span in c.crosses)
        parts = " + ".join(si(s, "s") for s in c.by_level.values())
        rows.append([f"{c.what}: {c.operation}", crosses, f"{c.calls:.0f}", si(c.bytes, "B"), parts, si(c.flat_s, "s"),
                     si(c.calls * c.levels_s, "s")])  # fmt: skip
    out += aligned(rows) if found else []
    for c in found:
        if len(c.crosses) > 1 and c.operation not in ("send", "ring"):
            ways = "; ".join(f"{name} {si(s, 's')}" for name, s in orders(c).items())
            out.append(f"  {c.what}, {c.operation}: {ways}")
    out.append(f"  {verdict(found)}")
    print("\n".join(out), file=sys.stderr)


def resilience(found: Resilience) -> None:
    """What failures make of the job, a way a row."""
    f = found.failures
    out = [
        f"failures (simulated by closed forms, never measured): {f.failures_per_node_year:g} a node and year on "
        f"{f.nodes} nodes, one in {f.mean_between_failures_s / 3600:.3g} h; repair {f.repair_s / 3600:.3g} h, "
        f"restart {si(f.restart_s, 's')}",
        f"  a checkpoint of {si(found.state_bytes, 'B')} takes {si(f.checkpoint_s, 's')}, every {f.interval_s / 60:.3g} min "
        f"(Daly); storage: {found.storage}",
    ]
    rows = [["way", "nodes", "useful", "tokens/s", "days", "USD"]]
    for way in found.ways:
        rows.append(
            [way.name, str(way.nodes), f"{way.share:.1%}", si(way.tokens_per_s), si(way.days), si(way.cost_usd)]
        )
    print("\n".join(out + aligned(rows)), file=sys.stderr)


def pooled(found: Pooled) -> None:
    """The split of a rank's state between its own and pooled memory."""
    whole = sum(t.bytes for t in found.tenants)
    out = [
        f"pooled memory (simulated, never measured): over {si(found.tier.bytes_per_s)}B/s {si(found.remote_bytes, 'B')} of "
        f"{si(whole, 'B')} a rank ({found.remote_bytes / whole:.0%}) may be far; step {si(found.step_s, 's')} -> "
        f"{si(found.slowed_s, 's')} ({found.slowed_s / found.step_s - 1:+.1%}), {found.overlap:.0%} of it overlapped"
    ]
    rows = [["state", "crossings a step", "bytes", "far"]]
    rows += [[t.name, f"{t.touches:g}", si(t.bytes, "B"), si(t.remote_bytes, "B")] for t in found.tenants]
    print("\n".join(out + aligned(rows)), file=sys.stderr)
