"""study=layout and parallelism=fill: degrees that multiply to the GPUs there are, whatever their number."""

from __future__ import annotations

import pytest

from dyno.claims.claim import load
from dyno.errors import UserError
from dyno.measure import environment
from dyno.plan import predict, reasons
from dyno.recipe import compose
from dyno.study import settings, workers


@pytest.fixture
def machine(monkeypatch):
    def with_gpus(count: int) -> environment.Device:
        device = environment.Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), "GPU-1", count)
        monkeypatch.setattr(environment, "detect", lambda hardware: device)
        return device

    return with_gpus


@pytest.mark.parametrize("gpus", [1, 2, 6, 8])
def test_fill_takes_all_gpus_or_says_why_not(machine, gpus):
    machine(gpus)
    node = compose(["parallelism=fill"]).config["parallelism"]
    assert node["dp"] == gpus and node["tp"] == node["pp"] == node["cp"] == 1
    if gpus % 2 == 0:
        node = compose(["parallelism=fill", "parallelism.tp=2", "workload.batch=${gpus:3}"])
        assert node.config["parallelism"]["dp"] == gpus // 2 and node.config["workload"]["batch"] == 3 * gpus
    device = machine(gpus)
    plan = predict(compose(["parallelism=fill", "parallelism.tp=5", "parallelism.cp=2"]), device)
    assert "the 5 x 1 x 2 ranks of tp, pp and cp may not divide" in plan.reasons[0]
    with pytest.raises(UserError, match="whole numbers of at least 1, not 0, 1, 1"):
        compose(["parallelism=fill", "parallelism.tp=0"])


def test_a_processor_counts_as_two():
    assert compose(["parallelism=fill", "hardware=cpu"]).config["parallelism"]["dp"] == 2


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_point_of_the_layout_study_fills_the_machine_or_is_refused_free(machine, gpus):
    device = machine(gpus)
    read = settings.read(["study=layout"], [])
    assert workers.count(read, None) == 1  # a run takes all GPUs
    degrees = {p.key: p.choices for p in read.space.parameters}
    assert [int(n) for n in degrees["parallelism.tp"]] == [n for n in (1, 2, 4, 8) if n <= gpus]
    points = read.space.combinations()
    seen: dict[str, int] = {"runs": 0, "refused": 0}
    one_each = {tuple(sorted((k, v) for k, v in p.items() if k.startswith("parallelism"))): p for p in points}
    chosen = list(one_each.values())
    for point in chosen[:: max(1, len(chosen) // 12)]:
        piped, split = point["parallelism.pp"] != "1", point["parallelism.cp"] != "1"
        assert ("parallelism.schedule" in point, "parallelism.micro_batches" in point) == (piped, piped)
        assert ("parallelism.zero" in point, "parallelism.context" in point) == (not piped, split)
        recipe = read.recipe(read.trial_overrides(point))
        (layout,) = recipe.techniques["parallelism"]
        refused = bool(predict(recipe, device).reasons)
        assert refused or layout.world_size == gpus
        seen["refused" if refused else "runs"] += 1
    assert seen["runs"] and seen["refused"]


def test_a_search_over_degrees_alone_is_one_worker(machine):
    machine(4)
    read = settings.read(
        ["study=custom", "parallelism=mesh", "parallelism.dp=1", "parallelism.tp=1,2,4", "study.trials=3"], []
    )
    assert workers.count(read, None) == 1


@pytest.mark.parametrize(("words", "most"), [([], 2), (["measure.exclusive=window"], 6)])
def test_runs_under_a_memory_limit_share_a_gpu_only_when_they_measure_in_turn(machine, words, most):
    machine(2)  # of 80 GB each; a run of this study takes 24 GiB
    read = settings.read(["study=memory_limit", *words], [])
    assert workers.count(read, None) == 2 and workers.count(read, 99) == most


def test_sharding_over_one_data_rank_is_refused():
    device = environment.Device("cuda", 0, "a card", 80 * 2**30, (9, 0), None, 2)
    words = ["parallelism=mesh", "parallelism.dp=1", "parallelism.tp=2", "model.vocab_size=258"]
    assert "one data rank" in reasons(compose([*words, "parallelism.zero=3"]), device)[0]
    assert not reasons(compose([*words, "parallelism.zero=1"]), device)


@pytest.mark.parametrize("gpus", [2, 4])
def test_claims_on_data_parallel_ranks_take_all_gpus(machine, gpus):
    machine(gpus)
    for name in ("ddp-scaling", "zero1-memory", "zero2-memory", "zero3-memory"):
        claim = load()[name]
        recipes = {label: compose(claim.overrides(label, "cuda", ["model=160m"])) for label in claim.needed("cuda")}
        ranks = {label: r.techniques["parallelism"][0].world_size for label, r in recipes.items()}
        assert set(ranks.values()) <= {1, gpus} and gpus in ranks.values()
        assert any(figure.formula.endswith(".ranks") for figure in claim.told_on("cuda"))
        if name == "ddp-scaling":
            rows = {label: r.config["workload"]["batch"] for label, r in recipes.items()}
            assert rows == {"one": 8, "all": 8 * gpus}
