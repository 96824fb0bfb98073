"""Failures against a simulation of them, and pooled memory against its own arithmetic and on the command line."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import random

import pytest

from dyno import cli
from dyno.errors import UserError
from dyno.measure.hardware import options
from dyno.plan.elastic import (
    YEAR_S,
    Failures,
    binomial,
    daly_interval_s,
    remote_step_s,
    useful_share,
    young_interval_s,
)
from dyno.plan.links import Link
from dyno.plan.pooled import pooled, remote_of, touches
from dyno.plan.resilience import Job, failures_of, resilience


def test_checkpoint_intervals_are_near_the_best():
    """Daly's interval against the maximum of the exact share, and Young's as its first order."""
    for checkpoint, mean in ((60.0, 36000.0), (300.0, 7200.0), (5.0, 1e6)):
        about = young_interval_s(checkpoint, mean)
        shares = {t: useful_share(t, checkpoint, 0.0, mean) for t in (about * x / 1000 for x in range(300, 2000))}
        best = max(shares, key=lambda t: shares[t])
        assert daly_interval_s(checkpoint, mean) == pytest.approx(best, rel=0.02)
        assert useful_share(young_interval_s(checkpoint, mean), checkpoint, 0.0, mean) <= max(shares.values()) + 1e-12
    assert daly_interval_s(100.0, 40.0) == 40.0
    assert young_interval_s(1.0, 1e8) == pytest.approx(daly_interval_s(1.0, 1e8), rel=1e-3)


def test_the_useful_share_is_that_of_a_simulation():
    rng, mean, interval, checkpoint, restart = random.Random(3), 5000.0, 700.0, 60.0, 120.0
    wall, segments = 0.0, 20000
    for _ in range(segments):
        need = interval + checkpoint
        while (life := rng.expovariate(1 / mean)) < need:
            wall += life
            need = restart + interval + checkpoint  # a failure during the restart starts it again
        wall += need
    simulated = segments * interval / wall
    assert useful_share(interval, checkpoint, restart, mean) == pytest.approx(simulated, rel=0.02)


def simulated(job: Failures, elastic: bool, group: int = 1, failures: int = 4000, seed: int = 0) -> float:
    """Useful node time over all node time, event by event: failures, repairs, checkpoints, restarts, rollbacks."""
    rng, rate = random.Random(seed), job.failures_per_node_year / YEAR_S
    now = useful = unsaved = 0.0
    up, repairs = job.nodes, []
    phase, left = "work", job.interval_s
    while failures:
        runs = elastic or up == job.nodes
        fail = rng.expovariate(rate * up) if up else math.inf
        back = repairs[0] - now if repairs else math.inf
        step = min(left if runs else math.inf, fail, back)
        now += step
        if runs:
            left -= step
            unsaved += step * (up // group * group) if phase == "work" else 0.0
        if step == fail:
            failures, up = failures - 1, up - 1
            heapq.heappush(repairs, now + job.repair_s)
            phase, left, unsaved = "restart", job.restart_s, 0.0
        elif step == back:
            heapq.heappop(repairs)
            up += 1
            rejoins = elastic and phase != "restart"
            phase, left = ("rejoin", job.checkpoint_s) if rejoins else ("restart", job.restart_s)
        elif phase == "work":
            phase, left = "checkpoint", job.checkpoint_s
        else:
            useful, unsaved = useful + (unsaved if phase != "restart" else 0.0), 0.0
            phase, left = ("restart", job.restart_s) if phase == "rejoin" else ("work", job.interval_s)
    return useful / (job.nodes * now)


@pytest.mark.parametrize(
    "job",
    [
        Failures(32, 5.0, 86400.0, 60.0, 300.0),
        Failures(256, 2.0, 86400.0, 120.0, 600.0),
        Failures(16, 50.0, 3600.0, 30.0, 120.0),
    ],
)
def test_an_elastic_job_does_what_a_simulation_of_its_failures_does(job):
    for group in (1, 4):
        assert job.elastic_share(group) == pytest.approx(simulated(job, True, group), rel=0.01)
    assert job.elastic_share(4) < job.elastic_share() < job.available


@pytest.mark.parametrize("job", [Failures(16, 50.0, 3600.0, 30.0, 120.0), Failures(32, 2.0, 43200.0, 60.0, 300.0)])
def test_a_fixed_job_waits_as_a_simulation_does(job):
    assert job.fixed_share() == pytest.approx(simulated(job, False), rel=0.02)
    assert job.fixed_share() < job.spared_share() < 1


def test_what_failures_add_up_to():
    job = Failures(nodes=128, failures_per_node_year=2.0, repair_s=86400.0, checkpoint_s=60.0, restart_s=300.0)
    assert job.mean_between_failures_s == pytest.approx(YEAR_S / 256)
    assert job.available == pytest.approx(182.625 / 183.625)
    assert dataclasses.replace(job, failures_per_node_year=20.0).elastic_share() < job.elastic_share()
    assert sum(p for _, p in binomial(40, 0.3)) == pytest.approx(1) == pytest.approx(dict(binomial(3, 1.0))[3])
    assert sum(k * p for k, p in binomial(40, 0.3)) == pytest.approx(12)
    mean = 128 * 2.0 / 365.25
    chance = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(job.spares + 1)]
    assert sum(chance) >= 0.99 > sum(chance[:-1])


def test_the_ways_cost_what_they_run_on():
    hardware = options()["h100"]
    job = Job(nodes=32, gpus=256, tokens_per_s=3e5, state_bytes=1e12, replica_nodes=4)
    found = resilience(job, failures_of("failures=2,repair=12h,restart=5m"), hardware, 1e12)
    assert found.failures.checkpoint_s == pytest.approx(1e12 / (256 * hardware["storage"]["byte_per_s"]))
    ideal, fixed, spared, elastic, more = found.ways
    assert ideal.days == pytest.approx(1e12 / 3e5 / 86400) and ideal.share == 1
    assert ideal.cost_usd == pytest.approx(256 * 3.0 * 24 * ideal.days)
    assert spared.cost_usd == pytest.approx(spared.nodes * 8 * 3.0 * 24 * spared.days)
    assert fixed.share < elastic.share < more.share <= 1 and more.nodes == 36
    assert resilience(job, failures_of("failures=2"), hardware, None).ways[0].days is None
    for wrong in ("often", "repair=2h", "failures=0", "failures=-1", "failures=2,repair=soon", "failures=inf"):
        with pytest.raises(UserError, match="failures=1.4"):
            failures_of(wrong)
    with pytest.raises(UserError, match=r"hardware\.storage"):
        resilience(job, failures_of("failures=2"), {**hardware, "storage": None}, None)


def test_remote_memory_costs_what_does_not_hide():
    tier = Link(10e9, 1e-5)
    assert remote_step_s(1.0, 80e9, 70e9, 4, tier, 0.5) == 1.0
    assert remote_step_s(1.0, 80e9, 90e9, 1, tier, 1.0) == pytest.approx(1.0, abs=1e-4)
    assert remote_step_s(1.0, 80e9, 100e9, 2, tier, 0.5) == pytest.approx(1.0 + 4.0 + 2e-5 - 0.5)


def test_pooled_memory_takes_what_crosses_least_and_slows_by_what_was_asked():
    state = {"weights": 4e9, "optimizer": 16e9, "gradients": 4e9, "activations": 40e9, "logits": 1e9}
    often = touches(micro_batches=8, in_flight=2)
    asked = remote_of("gb_per_s=50,slower=10%,latency_us=1,overlap=40%")
    found = pooled(state, often, 2.0, asked)
    far = {t.name: t.remote_bytes for t in found.tenants}
    assert far["optimizer"] == 16e9 and 0 < far["activations"] < 40e9 and far["weights"] == far["gradients"] == 0
    assert "logits" not in far and found.slowed_s == pytest.approx(2.2)
    traffic = sum(t.remote_bytes * t.touches for t in found.tenants) / 50e9
    assert traffic == pytest.approx(0.5 * 2.0, rel=1e-4)
    alone = pooled({"optimizer": 100e9}, often, 2.0, asked)
    assert alone.slowed_s == pytest.approx(
        remote_step_s(2.0, 100e9 - alone.remote_bytes, 100e9, 2, Link(50e9, 1e-6), 0.4)
    )
    little = pooled({"optimizer": 1e9}, often, 2.0, remote_of("gb_per_s=50"))
    assert little.remote_bytes == 1e9 and little.slowed_s == 2.0
    shares = [pooled(state, often, 2.0, remote_of(f"gb_per_s={g}")).remote_bytes for g in (8, 64, 512)]
    assert shares == sorted(shares)
    for wrong in ("gb_per_s=fast", "slower=5%", "64"):
        with pytest.raises(UserError, match="gb_per_s=64"):
            remote_of(wrong)


def test_both_on_the_command_line(capsys):
    words = ["plan", "model=70b", "hardware=h100", "workload.batch=512", "workload.seq=4096", "--search", "gpus=64"]
    asked = ["--elastic", "failures=1.4", "--remote-memory", "gb_per_s=64", "--tokens", "1e11"]
    assert cli.main([*words, *asked]) == 0
    shown = capsys.readouterr()
    out = json.loads(shown.out.strip().splitlines()[-1])
    assert out["elastic"]["label"] == out["remote_memory"]["label"] == "predicted"
    assert shown.err.count("never measured") == 2
    names = [way["name"] for way in out["elastic"]["ways"]]
    assert names[0] == "no failures" and "elastic" in names and all(n in shown.err for n in names)
    assert out["elastic"]["state_bytes"] == pytest.approx(14 * 70.6e9, rel=0.01)
    assert 0 < out["remote_memory"]["share"] <= 1
    one = ["plan", "model=160m", "hardware=h100", "precision=bf16"]
    assert cli.main([*one, "--elastic", "failures=1", "--remote-memory", "gb_per_s=64"]) == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert out["elastic"]["state_bytes"] == pytest.approx(12 * 138e6, rel=0.05)
    assert {t["name"] for t in out["remote_memory"]["state"]} >= {"weights", "optimizer", "activations"}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--elastic", "rarely"], "failures=1.4"),
        (["--remote-memory", "slow"], "gb_per_s=64"),
        (["--search", "many"], "gpus=1024"),
        *[(["--tokens", text], f"--tokens {text}: takes") for text in ("-5", "0", "nan", "inf", "abc", "")],
        *[([*flag, "workload=generate"], "training") for flag in (["--elastic", "failures=1"], ["--tokens", "1e9"])],
        (["--elastic", "failures=1", "hardware.storage=null"], "hardware.storage"),
        (["--elastic", "failures=1", "--search", "gpus=8", "hardware.storage=null"], "hardware.storage"),
        (["--search", "gpus=8", "hardware.peak_byte_per_s.value=null"], "hardware.peak_byte_per_s"),
    ],
)
def test_a_flag_that_cannot_be_met_is_told_before_anything_is_shown(words, part, capsys):
    assert cli.main(["plan", "model=160m", "hardware=h100", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("dyno: ") and part in shown.err


@pytest.mark.parametrize("price", ["hardware.price_usd_per_hour=null", "hardware.price_usd_per_hour.value=null"])
def test_a_price_that_is_not_stated_leaves_the_cost_empty(price, capsys):
    assert cli.main(["plan", "model=160m", "hardware=h100", "--tokens", "1e9", price]) == 0
    shown = capsys.readouterr()
    budget = json.loads(shown.out)["budget"]
    assert budget["cost_usd"] is None and "price_usd_per_hour" in budget["reasons"]["cost_usd"] and budget["hours"] > 0
    assert "USD" not in shown.err
