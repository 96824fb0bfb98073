"""What the plan finds best is tried first, once a study, and only where the plan is asked at all."""

from __future__ import annotations

import pytest
from study_bench import quick_compose, records
from study_bench import run as fake_run

from dyno import runner, study
from dyno.errors import UserError
from dyno.measure import environment
from dyno.plan import predict
from dyno.study import foresight, settings

SPACE = ["precision=choice(fp32,bf16)", "checkpointing=choice(none,uniform)", "workload.batch=choice(8,64,4096)"]


@pytest.fixture
def gpu(monkeypatch):
    device = environment.Device("cuda", 0, "NVIDIA H100 80GB HBM3", 85520809984, (9, 0), "GPU-1", 1)
    monkeypatch.setattr(environment, "detect", lambda hardware: device)
    return device


def read(*words: str) -> settings.Settings:
    return settings.read(["study=custom", "study.plan_first=3", "model=160m", "workload.steps=0", *SPACE, *words], [])


def test_a_space_that_is_small_is_ranked_whole(gpu):
    made = read()
    plans = [(point, predict(made.recipe(made.trial_overrides(point)), gpu)) for point in made.space.combinations()]
    fits = [(plan.tokens_per_s, point) for point, plan in plans if not plan.verdict()]
    assert 3 < len(fits) < len(plans) == 12
    found, said = foresight.best(made, (lines := []).append), [point for _, point in sorted(fits, key=lambda f: -f[0])]
    assert found == said[:3] and len(lines) == 12


def test_the_first_objective_that_is_predicted_says_what_is_best(gpu):
    metrics = ("energy_j", "peak_memory_bytes", "tokens_per_s")
    made = read(f"study.objectives=[{','.join(f'{{metric: {m}, direction: minimize}}' for m in metrics)}]")
    peaks = [predict(made.recipe(made.trial_overrides(p)), gpu).peak_memory_bytes for p in made.space.combinations()]
    first, *_ = foresight.best(made, lambda text: None)
    assert predict(made.recipe(made.trial_overrides(first)), gpu).peak_memory_bytes == min(peaks)


@pytest.mark.parametrize("word", ["study.objectives=[{metric: energy_j, direction: minimize}]", "study.plan_gate=false",
                                  "study.plan_first=0", "workload.lr=interval(1e-4,1e-2)"])  # fmt: skip
def test_what_cannot_be_foreseen_is_left_to_the_sampler(gpu, word):
    assert foresight.best(read(word), lambda text: None) == []


def test_of_a_large_space_a_few_points_are_looked_at_and_the_best_are_close_to_the_whole_spaces(gpu, monkeypatch):
    made = settings.read(["study=memory_limit"], [])
    asked: list = []
    score = lambda settings, objective, point: asked.append(point) or figure(point)  # noqa: E731

    def figure(point):
        values = [{p.key: p.choices.index(point[p.key]) for p in made.space.parameters if p.key in point}]
        return float(sum((1 + i) * v for i, v in enumerate(values[0].values())))

    monkeypatch.setattr(foresight, "_score", score)
    found = foresight.best(made, lambda text: None)
    assert len(asked) == foresight.LOOKED_AT and len({str(point) for point in asked}) == len(asked)
    ranked = sorted((figure(point) for point in made.space.combinations()), reverse=True)
    assert len(found) == 3 and figure(found[0]) == ranked[0]  # without hills in between the top is found


@pytest.mark.parametrize("number", ["-1", "1.5", "true", "two"])
def test_a_number_of_trials_is_asked_for(gpu, number):
    with pytest.raises(UserError, match="study.plan_first is .*; it takes a whole number, 0 or more"):
        read(f"study.plan_first={number}")


def test_they_come_after_the_baseline_and_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(settings, "compose", quick_compose)
    monkeypatch.setattr(runner, "run", lambda recipe, **kw: fake_run(recipe, seconds=0.0, **kw))
    monkeypatch.setattr(foresight, "best", lambda settings, progress: [{"workload.batch": n} for n in (40, 24)])
    words = [
        "workload.batch=range(24,200)",
        "study.plan_first=2",
        f"results_dir={tmp_path / 'results'}",
        "hardware=cpu",
    ]
    for trials in (3, 6):
        study.tune([*words, f"study.trials={trials}"], [], lambda text: None, say=lambda text: None)
    made = sorted(records(tmp_path / "results"), key=lambda r: r["id"])
    batches = [r["config"]["workload"]["batch"] for r in sorted(made, key=lambda r: r["created"])]
    assert len(batches) == len(set(batches)) == 6 and {40, 24} < set(batches)
