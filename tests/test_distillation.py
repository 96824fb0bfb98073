"""Response distillation: the loss by its formula, a student that comes to agree with its teacher, typed refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from dyno import quality
from dyno.errors import NonFinite, Unsupported
from dyno.recipe import compose
from dyno.stages import compress
from dyno.technique import Run
from dyno.techniques.distillation.response import Response, response_loss

WORKLOAD = {"batch": 8, "seq": 12, "eval_tokens": 240}
STREAM = np.tile(np.random.default_rng(0).permutation(20), 30)


def distil(student, teacher, tmp_path, **knobs):
    recipe = SimpleNamespace(config={"workload": WORKLOAD, "seed": 0})
    run = Run(recipe, "compress", tiny.CPU, tmp_path, model=student, stream=STREAM)
    asked: list[list[str]] = []
    run.build_model = lambda overrides: asked.append(overrides) or teacher
    technique = Response(**knobs)
    technique.apply(run)
    assert asked == [technique.teacher]
    student.eval()
    return run


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.7), (4.0, 0.3), (3.0, 0.0)])
def test_the_loss_is_the_papers_formula(temperature, alpha):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 7, generator=generator) * 2 for _ in range(2))
    targets = torch.randint(7, (2, 3), generator=generator)
    total = 0.0
    for b in range(2):
        for s in range(3):
            soft_t = [math.exp(x / temperature) for x in teacher[b, s].tolist()]
            soft_s = [math.exp(x / temperature) for x in student[b, s].tolist()]
            hard = [math.exp(x) for x in student[b, s].tolist()]
            pairs = [(t / sum(soft_t), q / sum(soft_s)) for t, q in zip(soft_t, soft_s, strict=True)]
            divergence = sum(t * math.log(t / q) for t, q in pairs)
            label = -math.log(hard[targets[b, s]] / sum(hard))
            total += alpha * temperature**2 * divergence + (1 - alpha) * label
    assert response_loss(student, teacher, targets, temperature, alpha).item() == pytest.approx(total / 6, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = response_loss(logits, logits.detach(), torch.zeros(2, 3, dtype=torch.long), 2.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6


def test_the_student_comes_to_agree_with_its_teacher(tmp_path):
    teacher, student = tiny.model(0, sharpness=8.0, tied_embeddings=False), tiny.model(1, layers=1)
    before_teacher = [p.clone() for p in teacher.parameters()]

    def figures():
        found = quality.against(student, lambda: teacher, STREAM, WORKLOAD, tiny.CPU)
        return found["kl_divergence"].value, found["top1_agreement"].value

    divergence, agreement = figures()
    run = distil(student, teacher, tmp_path, alpha=1.0, steps=60, lr=1e-2)
    assert figures()[0] < 0.3 * divergence
    assert figures()[1] > agreement + 0.3
    assert run.details["distillation_loss"] < 1 and run.details["teacher_parameters"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before_teacher, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_labels_alone_lower_the_loss_and_no_step_changes_nothing(tmp_path):
    teacher, student = tiny.model(0, sharpness=6.0), tiny.model(1)
    loss = lambda: quality.loss_metrics(student, STREAM, WORKLOAD, tiny.CPU)["validation_loss"].value  # noqa: E731
    before = loss()
    distil(student, teacher, tmp_path, steps=0)
    assert loss() == before
    distil(student, teacher, tmp_path, alpha=0.0, steps=30, lr=1e-2)
    assert loss() < before - 1


def test_another_vocabulary_and_a_loss_that_is_not_finite_are_typed(tmp_path):
    with pytest.raises(Unsupported, match="the teacher has 13 tokens, the student 61"):
        distil(tiny.model(), tiny.model(vocab_size=13), tmp_path)
    broken = tiny.model()
    with torch.no_grad():
        broken.embed.weight.fill_(math.nan)
    with pytest.raises(NonFinite, match="distillation"):
        distil(tiny.model(), broken, tmp_path, steps=1)


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"alpha": 1.5}, {"alpha": -0.1}, {"steps": -1}, {"lr": 0.0}])
def test_impossible_knobs_are_told_before_any_work(knobs):
    assert "temperature > 0" in Response(**knobs).unsupported(None, None)
    assert Response().unsupported(None, None) is None


TINY_MODEL = ["model=draft", "model.layers=1", "model.hidden=16", "model.ffn_width=16", "model.head_dim=8"]
MENTOR = """# a teacher from a plug-in
source: config
name: mentor
layers: LAYERS
hidden: 16
ffn_width: 16
heads: 2
kv_heads: 1
head_dim: 8
vocab_size: null
max_seq: 64
rope_theta: 10000.0
norm_eps: 1.0e-5
tied_embeddings: true
"""


def test_the_student_is_an_artifact_of_its_own_and_follows_its_teachers_recipe(tmp_path):
    """Distilled once, reused by the same recipe; another number of steps or a teacher of another size misses."""
    plugins = tmp_path / "plugins"
    (plugins / "conf" / "model").mkdir(parents=True)

    def student(steps=2, layers=1):
        (plugins / "conf" / "model" / "mentor.yaml").write_text(MENTOR.replace("LAYERS", str(layers)))
        overrides = [
            f"results_dir={tmp_path}", *TINY_MODEL, "corpus=stories", "corpus.size_bytes=40000", "workload=eval",
            "workload.steps=2", "workload.batch=4", "workload.seq=16", "distillation=response",
            f"distillation.steps={steps}", "distillation.teacher=['model=mentor','workload.steps=1','workload.seq=16']",
        ]  # fmt: skip
        pipeline = tiny.pipeline_of(compose(overrides, [str(plugins)]), tmp_path)
        model, original, key = compress.compress(pipeline)
        assert not torch.equal(model.embed.weight, original().embed.weight)
        return model.state_dict(), key, [(a["stage"], a["reused"]) for a in pipeline.artifacts]

    first, key, artifacts = student()
    assert artifacts[-1] == ("compress", False)
    again, same, artifacts = student()
    assert same == key and all(reused for _, reused in artifacts)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for changed in ({"steps": 3}, {"layers": 2}):
        _, other, artifacts = student(**changed)
        assert other != key and artifacts[-1] == ("compress", False)
