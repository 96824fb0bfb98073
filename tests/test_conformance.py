"""Every option of every axis: its file, its module, its class; a run alone; a step with every option of another axis.

The lists come from the config directory, so a new technique is held to all of this without a line here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import yaml

from dyno.artifacts import acting
from dyno.axes import AXES, BY_NAME
from dyno.composition import CONF
from dyno.data import Document
from dyno.errors import Conflict, Unsupported, UserError
from dyno.measure.environment import Device
from dyno.measure.window import Meter
from dyno.plan import predict, reasons, shape_of
from dyno.recipe import Recipe, compose, groups, option_help
from dyno.record import to_json
from dyno.stages import infer, train
from dyno.technique import Baseline, Footprint, Technique
from dyno.worker import STAGES

CPU = Device("cpu", 0, "a CPU", 2**36, None, None, 1)
GPU = Device("cuda", 0, "a GPU", 2**36, (9, 0), "GPU-0", 8)
OPTIONS = [(axis.name, option) for axis in AXES for option in groups()[axis.name]]
SMALL = [
    "model=draft", "model.layers=2", "model.hidden=32", "model.ffn_width=48", "model.heads=4", "model.kv_heads=2",
    "model.head_dim=8", "corpus=stories", "corpus.size_bytes=40000", "hardware=cpu", "measure=quick",
    "measure.min_steps=2", "measure.max_steps=3", "measure.min_seconds=0.0", "measure.warmup_min_steps=2",
    "measure.warmup_max_steps=2", "measure.bootstrap=20",
]  # fmt: skip
INNER = [
    "model=draft", "model.layers=1", "model.hidden=16", "model.ffn_width=16", "model.heads=2", "model.kv_heads=1",
    "model.head_dim=8", "workload.steps=1", "workload.seq=16",
]  # fmt: skip
WORKLOADS = {
    "train": ["workload=train", "workload.batch=4", "workload.seq=16", "workload.steps=2", "workload.eval_tokens=64"],
    "infer": ["workload=generate", "workload.batch=4", "workload.seq=16", "workload.steps=2",
              "workload.eval_tokens=64", "workload.requests=2", "workload.prompt=8", "workload.new_tokens=6"],
    "data": ["workload=data"],
}  # fmt: skip
# Numbers that keep a technique small; anything not here runs as its file says.
KNOBS = {
    "distillation.steps": 2,
    "accumulation.micro_batches": 2,
    "distillation.teacher": INNER,
    "decoding.draft": INNER,
}


def names(pair):
    return "-".join(f"{axis}={option}" for axis, option in pair) if isinstance(pair[0], tuple) else "=".join(pair)


def measured(axis: str) -> str:
    """The workload in which an axis is measured."""
    return {"data": "data", "train": "train"}.get(BY_NAME[axis].stage, "infer")


@cache
def base(workload: str) -> Recipe:
    baselines = [f"{axis.name}={axis.baseline}" for axis in AXES if not axis.many]
    return compose([*SMALL, *WORKLOADS[workload], *baselines])


@cache
def alone(axis: str, option: str, workload: str) -> Recipe:
    """The smallest recipe with this one option off the baselines: merged, for composing takes 0.1 s each time."""
    node = yaml.safe_load((CONF / axis / f"{option}.yaml").read_text())
    if "${" in str(node):  # it asks the machine
        node = dict(compose([f"{axis}={option}"]).config[axis])
    for name in node:
        node[name] = KNOBS.get(f"{axis}.{name}", node[name])
    many = BY_NAME[axis].many
    config = {**base(workload).config, axis: ({option: node} if option != "none" else {}) if many else node}
    return Recipe(config, {**base(workload).choices, axis: [option] if many else option})


def technique_of(axis: str, option: str) -> Technique:
    return (alone(axis, option, measured(axis)).techniques[axis] or [Baseline()])[0]


# The file, the module and the class


@pytest.mark.parametrize("option", OPTIONS, ids=names)
def test_an_option_composes(option):
    axis, name = option
    recipe = compose([f"{axis}=[{name}]" if BY_NAME[axis].many and name != "none" else f"{axis}={name}"])
    assert [type(t) for t in recipe.techniques[axis]] in ([type(technique_of(*option))], [])
    assert recipe.option(axis) == name


@pytest.mark.parametrize("option", OPTIONS, ids=names)
def test_an_option_has_help_a_source_and_plain_knobs(option):
    assert re.search(r"\w{3,}", option_help(*option)), "the first line of its file is a comment that says what it is"
    technique = technique_of(*option)
    json.dumps(technique.knobs())
    assert dataclasses.is_dataclass(technique)
    if isinstance(technique, Baseline):
        return
    assert type(technique).__module__.startswith(f"dyno.techniques.{option[0]}.")
    text = inspect.getdoc(type(technique)) or ""
    if option[1] != BY_NAME[option[0]].baseline:
        assert re.search(r"(arXiv:|arxiv\.org/abs/)\d{4}\.\d{4,5}|doi:|Source:", text), (
            f"{type(technique)} names no source"
        )
    known = {f.name for f in dataclasses.fields(technique)}
    node = alone(*option, measured(option[0])).config[option[0]]
    node = node[option[1]] if BY_NAME[option[0]].many else node
    assert {k for k in node if k != "_target_"} <= known


@pytest.mark.parametrize("option", OPTIONS, ids=names)
def test_an_option_predicts_finite_needs_and_says_why_it_cannot_run(option):
    recipe, technique = alone(*option, "train"), technique_of(*option)
    shape = shape_of(recipe)
    for device in (CPU, GPU, dataclasses.replace(GPU, capability=(7, 0), count=1)):
        why = technique.unsupported(recipe, device)
        assert why is None or (isinstance(why, str) and len(why) > 15 and "\n" not in why)
        footprint = technique.footprint(shape, device)
        assert isinstance(footprint, Footprint)
        values = [v for v in dataclasses.asdict(footprint).values() if not isinstance(v, str | None)]
        assert all(math.isfinite(v) and v >= 0 for v in values)


def test_the_baselines_exist_and_run_everywhere():
    for axis in AXES:
        assert axis.baseline in groups()[axis.name]
        for device in (CPU, GPU):
            assert (
                technique_of(axis.name, axis.baseline).unsupported(alone(axis.name, axis.baseline, "train"), device)
                is None
            )


def test_no_technique_module_imports_torch():
    modules = sorted({type(technique_of(*option)).__module__ for option in OPTIONS})
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n importlib.import_module(name)\n"
    code += " assert 'torch' not in sys.modules, name\nprint(len(sys.argv) - 1)"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) == len(modules) >= 10
    assert importlib.import_module("torch")


# Alone: the whole path in this process


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def placed(recipe: Recipe, directory: Any) -> Recipe:
    return Recipe({**recipe.config, "results_dir": str(directory)}, recipe.choices, recipe.overrides)


SHARED = [(axis.name, option, "infer") for axis in AXES if axis.shared for option in groups()[axis.name]]
RUNS = [run for run in [(*option, measured(option[0])) for option in OPTIONS] + SHARED if run[0] != "parallelism"]
SLOW = {("compile", "on", "infer")}  # Inductor on a CPU: once is enough


@pytest.mark.parametrize("run", [r for r in RUNS if r not in SLOW], ids=lambda run: f"{run[0]}={run[1]}-{run[2]}")
def test_an_option_runs_alone_and_every_metric_is_a_value_or_a_reason(run, results_dir, tmp_path):
    axis, option, workload = run
    recipe = placed(alone(axis, option, workload), results_dir)
    why = reasons(recipe, CPU)
    if why:
        assert option != BY_NAME[axis].baseline
        assert all(reason.startswith(f"{axis}={option}: ") for reason in why)
        return
    if axis == "compile" and option == "on" and not shutil.which("g++"):
        pytest.skip("Inductor on a CPU needs g++")
    torch.manual_seed(0)
    with Meter(tiny.CPU, recipe.config["measure"], recipe.config["hardware"], tmp_path) as meter:
        pipeline = tiny.pipeline_of(recipe, tmp_path)
        pipeline.meter = meter
        metrics, key = STAGES[recipe.config["workload"]["measures"]](pipeline)
    wanted = {
        "train": {"tokens_per_s", "step_time_s", "validation_loss", "perplexity", "peak_memory_bytes", "train_loss"},
        "infer": {"kl_divergence", "top1_agreement", "validation_loss", "ttft_s", "tpot_s", "model_bytes", "sparsity",
                  "decode_tokens_per_s", "prefill_tokens_per_s", "accepted_tokens_per_pass", "peak_memory_bytes"},
        "data": {"tokens", "documents", "documents_kept", "tokens_per_s"},
    }[workload]  # fmt: skip
    assert wanted <= metrics.keys() and len(key) == 24
    for name, metric in json.loads(json.dumps(to_json(metrics), allow_nan=False)).items():
        assert isinstance(metric["unit"], str), name
        if metric["value"] is None:
            assert len(metric["reason"]) > 5, name
        else:
            assert math.isfinite(metric["value"]) and metric["count"] >= 1, name
            assert metric.get("low") is None or metric["low"] <= metric["value"] <= metric["high"], name
    for name in wanted - {"peak_memory_bytes", "perplexity", "validation_loss", "decode_tokens_per_s", "tpot_s"}:
        assert metrics[name].value is not None, f"{name}: {metrics[name].reason}"
    json.dumps(pipeline.details)
    assert [a["stage"] for a in pipeline.artifacts][:1] == ["data"]


# In pairs: one step of each stage

CHANGING = [o for o in OPTIONS if not isinstance(technique_of(*o), Baseline)]
PAIRS = [(a, b) for a, b in itertools.combinations(CHANGING, 2) if a[0] != b[0]]
TEXTS = [Document(f"d{i}", ("prose", "code")[i % 2], f"One day number {i} the small dog ran to the big tree. " * 6)
         for i in range(12)]  # fmt: skip


def merged(first: tuple[str, str], second: tuple[str, str], workload: str) -> Recipe:
    a, b = alone(*first, workload), alone(*second, workload)
    return Recipe({**a.config, second[0]: b.config[second[0]]}, {**a.choices, second[0]: b.choices[second[0]]})


def one_step(recipe: Recipe, directory: Any) -> None:
    """Data, a training step, compression and a decode step of a recipe, on random tokens; no artifact is written."""
    pipeline = tiny.pipeline_of(recipe, directory)
    workload, stream = recipe.config["workload"], tiny.tokens(1, 400)[0].numpy()
    run = pipeline.run("data")
    run.documents, run.parts["mixture"] = list(TEXTS), None
    apply(recipe, run)
    assert isinstance(run.documents, list)
    if workload["measures"] == "data":
        return
    model = tiny.model()
    trainer = train.Trainer(train.prepared_run(pipeline, model), stream, workload, seed=0)
    trainer.step()
    assert math.isfinite(trainer.finite_loss())
    if workload["measures"] == "train":
        return
    run = pipeline.run("compress")
    served = tiny.model().eval()
    served.load_state_dict(model.state_dict())
    run.model, run.stream = served, stream
    run.build_model = lambda overrides: tiny.model(1, layers=1)
    apply(recipe, run)
    pipeline.build_model = run.build_model  # type: ignore[method-assign]
    served = run.model.eval()
    with torch.inference_mode():
        run = infer.prepared_run(pipeline, served)
        session = run.part("decode").start(run, tiny.tokens(2, 8), 8 + workload["new_tokens"] + 1)
        assert session.step() >= 2
        assert session.tokens.shape[1] >= 10 and int(session.tokens.max()) < served.config.vocab_size
        assert torch.isfinite(run.part("forward")(session.tokens)).all()


def apply(recipe: Recipe, run: Any) -> None:
    for chosen in acting(recipe, run.stage).values():
        for technique in chosen:
            technique.apply(run)


@pytest.fixture
def _no_inductor():
    """compile=on takes its place in the run, but nothing is generated: that costs seconds and is tested alone."""
    with torch.compiler.set_stance("force_eager"):
        yield


def workloads_of(pair) -> list[str]:
    """Where both options act, if anywhere; else where the later one is measured."""
    stages = [BY_NAME[axis].stage for axis, _ in pair]
    if "infer" in stages or "compress" in stages:
        return ["infer"]
    if "train" in stages:
        return ["train", *(["infer"] if all(BY_NAME[axis].shared for axis, _ in pair) else [])]
    return ["data"]


@pytest.mark.parametrize("first", sorted({pair[0] for pair in PAIRS}), ids=names)
def test_an_option_runs_with_every_option_of_another_axis(first, tmp_path, monkeypatch, _no_inductor):
    """One step of every stage; or a reason, told before the run (unsupported, the plan) or by a typed refusal in it."""
    composed = cache(lambda *overrides: compose(list(overrides)))
    monkeypatch.setattr("dyno.plan.compose", lambda overrides, plugins: composed(*overrides))
    ran = told = 0
    for pair in [p for p in PAIRS if p[0] == first]:
        for workload in workloads_of(pair):
            recipe = merged(*pair, workload)
            plan = predict(recipe, CPU)
            assert math.isfinite(plan.peak_memory_bytes)
            if plan.reasons:
                named = {f"{axis}={option}" for axis, option in pair}
                assert all(reason.split(": ")[0] in named for reason in plan.reasons), plan.reasons
                told += 1
                continue
            if "parallelism" in dict(pair):
                continue  # several processes: tests of parallelism
            try:
                one_step(recipe, tmp_path)
                ran += 1
            except (Conflict, Unsupported, UserError) as refusal:
                assert len(str(refusal)) > 15
            except Exception as error:
                raise AssertionError(f"{names(pair)} in {workload}: {type(error).__name__}: {error}") from error
    assert ran or told or first[0] == "parallelism" or reasons(alone(*first, measured(first[0])), CPU)


def test_the_pairs_cover_every_two_axes_with_techniques():
    axes = [axis.name for axis in AXES if any(a == axis.name for a, _ in CHANGING)]
    assert {(a[0], b[0]) for a, b in PAIRS} == set(itertools.combinations(axes, 2))
    assert len(axes) >= 12
