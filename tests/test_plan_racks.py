"""Levels of a cluster: what groups cross, collectives level by level against flat, and the search on racks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest

from dyno import cli
from dyno.errors import UserError
from dyno.measure.hardware import options
from dyno.plan import shape_of
from dyno.plan.cluster import Layout, cluster_of, time_terms
from dyno.plan.collectives import collectives, orders, verdict
from dyno.plan.links import Level, Link, Span, half_s, hierarchical_s, merged, ring_half_s, ring_s, spans, tree_s
from dyno.plan.search import search
from dyno.recipe import compose

FAST, SLOW, FAR = Link(450e9, 2e-6), Link(50e9, 5e-6), Link(12.5e9, 1e-5)
LEVELS = (Level("node", 8, FAST), Level("rack", 32, SLOW), Level("cluster", math.inf, FAR))


@pytest.fixture(scope="module")
def shape():
    return shape_of(compose(["model=70b", "workload.batch=512", "workload.seq=4096"]))


def crossing(ranks, stride, levels=LEVELS):
    return [(span.name, span.ranks) for span in spans(ranks, stride, levels)]


def test_what_a_group_crosses():
    assert crossing(1, 1) == [] and crossing(8, 1) == [("node", 8)]
    assert crossing(128, 2) == [("node", 4), ("rack", 4), ("cluster", 8)]
    assert crossing(4, 8) == [("rack", 4)] and crossing(8, 32) == [("cluster", 8)]
    assert crossing(6, 8) == [("rack", 4), ("cluster", 2)]  # four of them here, two there


@pytest.mark.parametrize("sizes", [(8, 4, 16), (4, 18, 3), (2, 2)])
def test_a_group_crosses_what_its_ranks_lie_in(sizes):
    """Against placing every rank: at each level the group has as many parts as there are units it touches."""
    counts, levels = list(itertools.accumulate(sizes, lambda a, b: a * b)), []
    for i, gpus in enumerate(counts):
        levels.append(Level(str(i), gpus if i < len(counts) - 1 else math.inf, FAST))
    for stride in (s for s in (1, 2, 4) if sizes[0] % s == 0):
        ranks = counts[-1] // stride
        places = [i * stride for i in range(ranks)]
        parts = [len({p // c for p in places}) for c in [stride, *counts[:-1]]] + [1]
        want = [a // b for a, b in itertools.pairwise(parts) if a // b > 1]
        assert [n for _, n in crossing(ranks, stride, levels)] == want


def test_inside_first_is_quicker_than_one_ring_through_all():
    """For large buffers by almost the GPUs of a node; inside one node it is the same ring."""
    two = (Span("node", 8, FAST), Span("cluster", 16, SLOW))
    assert 4 < hierarchical_s(merged(two), 4e9) / hierarchical_s(two, 4e9) < 8
    assert hierarchical_s(two[:1], 4e9) == pytest.approx(min(ring_s(8, 4e9, FAST), tree_s(8, 4e9, FAST)))
    assert 2 * half_s(two, 4e9) == pytest.approx(2 * ring_half_s(8, 4e9, FAST) + ring_s(16, 5e8, SLOW))
    assert half_s((), 1e9) == hierarchical_s((), 1e9) == 0.0


def test_each_level_further_in_that_is_done_first_pays():
    three = spans(128, 1, LEVELS)
    flat, node, rack = (hierarchical_s(w, 4e9) for w in (merged(three), (three[0], *merged(three[1:])), three))
    assert rack < node < flat
    link = Link(50e9, 0.0)  # over equal links without latency every order moves the same bytes
    same = tuple(Span(n, r, link) for n, r in (("a", 4), ("b", 4), ("c", 4)))
    assert half_s(same, 1e9) == pytest.approx(ring_half_s(64, 1e9, link))


def test_the_collectives_are_the_step_s(shape):
    """Tensor collectives add up to the step's term; of data-parallel ones ZeRO-1 hides a share of exactly three halves."""
    cluster = cluster_of(options()["h100_racks"])
    layout = Layout(dp=16, tp=4, pp=4, zero=1)
    found, terms = collectives(shape, layout, cluster), time_terms(shape, layout, cluster)
    tensor = sum(c.calls * c.levels_s for c in found if c.what.startswith("activations"))
    assert tensor == pytest.approx(terms["tensor wire"])
    (stages,) = [c for c in found if c.operation == "send"]
    assert stages.calls * stages.levels_s == pytest.approx(terms["stage wire"])
    gradients, weights = (next(c for c in found if c.what.startswith(n)) for n in ("gradients", "weights"))
    assert gradients.bytes == 2 * weights.bytes
    assert [(s.name, s.ranks) for s in gradients.crosses] == [("node", 2), ("rack", 4), ("cluster", 2)]
    everything = collectives(shape, dataclasses.replace(layout, zero=0), cluster)[-1]
    assert everything.operation == "all-reduce" and everything.levels_s == pytest.approx(
        hierarchical_s(everything.crosses, everything.bytes)
    )
    assert everything.flat_s == pytest.approx(orders(everything)["one ring"])
    assert "rack" in verdict([gradients]) and "x quicker" in verdict([gradients])
    assert "no order" in verdict([stages])


def test_a_narrow_way_out_of_the_rack_costs(shape):
    """The same search on nodes alone, on racks with narrow links between, and where a rack is one NVLink domain."""
    plain, racks = (cluster_of(options()[name]) for name in ("h100", "h100_racks"))
    assert [level.name for level in racks.levels] == ["node", "rack", "cluster"]
    best = [search(shape, 128, c)[0][0] for c in (plain, racks)]
    assert best[0].step_s < best[1].step_s
    wide = cluster_of(options()["gb200"])
    assert (wide.node, wide.domain, plain.domain, racks.domain) == (4, 72, 8, 8)
    across = time_terms(shape, Layout(dp=8, tp=8), wide)["tensor wire"]
    torn = dataclasses.replace(wide, levels=(wide.levels[0], wide.levels[2]))
    assert across < time_terms(shape, Layout(dp=8, tp=8), torn)["tensor wire"] / 3


def test_the_command_says_what_crosses_what(capsys):
    words = ["plan", "model=70b", "hardware=gb200", "workload.batch=1024", "workload.seq=8192", "--search", "gpus=256"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    out = json.loads(shown.out.strip().splitlines()[-1])
    data = [c for c in out["collectives"] if c["what"].startswith("weights")]
    assert data[0]["crosses"]["rack"] > 1 and data[0]["level_by_level_s"] < data[0]["flat_s"]
    assert "node, then rack, then cluster is" in out["synchronisation"] and out["synchronisation"] in shown.err
    assert (
        cli.main([*words[:2], "hardware=h100", "hardware.rack={gpus: 12, byte_per_s: 1e9, latency_s: 0}", *words[3:]])
        == 2
    )
    assert "no multiple" in capsys.readouterr().err
    with pytest.raises(UserError, match="hardware.node"):
        cluster_of(options()["cpu"])
