"""The dynamic programme of checkpointing against every schedule there is, and against Revolve's closed form."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from dyno.technique import Footprint, Shape
from dyno.techniques.checkpointing._chain import (
    Chain,
    Optimum,
    Segment,
    all_kept,
    depth,
    described,
    kept,
    peak,
    recomputed,
    segments,
)
from dyno.techniques.checkpointing.optimal import Optimal, predicted_chain


def every_schedule(start, end, whole=True):
    """All schedules of blocks start..end-1; `whole` says whether one segment may be all of it."""
    if start == end:
        yield ()
        return
    for rest in every_schedule(start + 1, end):
        yield (start, *rest)
    for k in range(start + 1, end + whole):
        for inner in every_schedule(start, k, whole=False):
            for rest in every_schedule(k, end):
                yield (Segment(start, k, inner), *rest)


def simulated(chain, schedule):
    """(peak, forward passes beyond the first) of a schedule, by holding and dropping named things step by step."""
    holders: dict[tuple[str, int], int] = {}
    most, work = 0, 0.0
    sizes = {"input": chain.boundary, "inside": chain.inside}

    def hold(name, change):
        nonlocal most
        holders[name] = holders.get(name, 0) + change
        most = max(most, sum(sizes[kind][i] for (kind, i), count in holders.items() if count))

    def forward(items):
        nonlocal work
        for item in items:
            if isinstance(item, Segment):
                hold(("input", item.start), 1)
                work += sum(chain.cost[item.start : item.end])
            else:
                hold(("inside", item), 1)
                if chain.keeps_input[item]:
                    hold(("input", item), 1)

    def backward(items):
        for item in reversed(items):
            if isinstance(item, Segment):
                forward(item.inner)
                backward(item.inner)
                hold(("input", item.start), -1)
            else:
                hold(("inside", item), -1)
                if chain.keeps_input[item]:
                    hold(("input", item), -1)

    forward(schedule)
    backward(schedule)
    assert not any(holders.values())
    return most, work


def random_chain(rng, length):
    return Chain(
        boundary=[rng.randint(1, 4) for _ in range(length)],
        inside=[rng.randint(0, 9) for _ in range(length)],
        keeps_input=[rng.random() < 0.5 for _ in range(length)],
        cost=[float(rng.randint(1, 9)) for _ in range(length)],
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_is_better_for_any_budget(seed):
    rng = random.Random(seed)
    chain = random_chain(rng, rng.choice((1, 3, 4, 5)))
    n = len(chain)
    found = [simulated(chain, schedule) for schedule in every_schedule(0, n)]
    limit = max(chain.everything, max(peak for peak, _ in found))
    optimum = Optimum(chain, limit)
    for budget in range(limit + 1):
        best = min((work for most, work in found if most <= budget), default=math.inf)
        schedule = optimum.schedule(budget)
        if schedule is None:
            assert best == math.inf and budget < (optimum.least_budget or 0)
            continue
        most, work = simulated(chain, schedule)
        assert most <= budget and work == best
        assert peak(chain, schedule) == most and recomputed(chain, schedule) == work
    assert optimum.least_budget == min(most for most, _ in found)
    assert recomputed(chain, optimum.schedule(chain.everything)) == 0


def flat_schedules(n):
    for cuts in itertools.product((False, True), repeat=n - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        spans = list(itertools.pairwise(bounds))
        for recompute in itertools.product((False, True), repeat=len(spans)):
            yield tuple(
                item
                for (s, e), again in zip(spans, recompute, strict=True)
                for item in ([Segment(s, e, all_kept(s, e))] if again else all_kept(s, e))
            )


@pytest.mark.parametrize("seed", range(4))
def test_without_nesting_no_flat_schedule_is_better(seed):
    chain = random_chain(random.Random(100 + seed), 5)
    found = [simulated(chain, schedule) for schedule in flat_schedules(5)]
    optimum = Optimum(chain, chain.everything, nested=False)
    for budget in range(chain.everything + 1):
        best = min((work for most, work in found if most <= budget), default=math.inf)
        schedule = optimum.schedule(budget)
        got = (math.inf, 0) if schedule is None else (simulated(chain, schedule)[1], depth(schedule))
        assert got[0] == best and got[1] <= 1


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_a_budget_in_gib_is_spent_as_every_schedule_there_is_would(layers):
    """Against brute force over the predicted chain, at budgets from too little to more than everything."""
    shape = Shape(1, 1, layers, 64, 160, 4, 2, 16, 256, 2, 128, kept_bytes=3.0 * 2**30)
    chain = predicted_chain(shape)
    found = [simulated(chain, schedule) for schedule in every_schedule(0, layers)]
    for gib in (0.05, 0.7, 1.1, 1.7, 2.3, 2.9, 3.0, 9.0):
        units = gib / 3 * chain.everything
        best = min((work for most, work in found if most <= units), default=math.inf)
        schedule = Optimal(budget_gib=gib).planned(shape)[1]
        if schedule is None:
            assert best == math.inf
            continue
        most, work = simulated(chain, schedule)
        assert most <= units and work == best
    assert Optimal(budget_gib=9.0).footprint(shape, None).flops_factor == 1
    assert Optimal(budget_gib=1.7).footprint(dataclasses.replace(shape, kept_bytes=0.0), None) == Footprint()


@pytest.mark.parametrize(("steps", "snapshots"), [(1, 1), (5, 1), (7, 2), (10, 3), (16, 2), (21, 4), (30, 5)])
def test_equal_steps_with_one_tape_take_revolve_s_number_of_forward_runs(steps, snapshots):
    """One tape that is larger than all snapshots: r l - beta(c + 1, r - 1) runs (Griewank and Walther, 2000)."""

    def beta(c, r):
        return math.comb(c + r, c) if r >= 0 else 0

    repeats = next(r for r in range(steps + 1) if beta(snapshots, r) >= steps)
    runs = repeats * steps - beta(snapshots + 1, repeats - 1)
    tape = 100
    chain = Chain([1] * steps, [tape] * steps, [False] * steps, [1.0] * steps)
    schedule = Optimum(chain, tape + snapshots).schedule(tape + snapshots)
    assert recomputed(chain, schedule) == runs
    assert peak(chain, schedule) <= tape + snapshots


def transformer(layers, ratio=30):
    return Chain([1] * layers, [ratio] * layers, [False] * layers, [1.0] * layers)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75, 0.9])
def test_of_transformer_blocks_the_first_are_recomputed_one_by_one(budget):
    chain = transformer(16)
    schedule = Optimum(chain, chain.everything).schedule(int(budget * chain.everything))
    count = sum(isinstance(item, Segment) for item in schedule)
    assert schedule == (*segments([1] * count), *range(count, 16)) and 0 < count < 16
    assert kept(chain, schedule) <= budget * chain.everything < kept(chain, schedule) + 29  # one fewer would not fit


def test_the_least_memory_needs_nesting_and_sizes_that_do_not_divide_stay_within_the_budget():
    chain = transformer(40, ratio=3)
    deep, flat = (Optimum(chain, chain.everything, nested=nested) for nested in (True, False))
    assert deep.least_budget < flat.least_budget
    assert depth(deep.schedule(deep.least_budget)) > 1
    odd = Chain([1_000_003] * 16, [17_000_017] * 16, [True] * 16, [1.0] * 16)
    optimum = Optimum(odd, odd.everything)
    assert optimum.unit > 1
    for share in (0.15, 0.4, 0.8):
        assert peak(odd, optimum.schedule(int(share * odd.everything))) <= share * odd.everything


def test_a_schedule_reads_well():
    assert described((*segments([2, 1]), 3)) == "[0 1] [2] 3"
    assert described(()) == ""
