"""Options of the axis attention: each gives the attention of the reference, or the reason why it cannot."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dyno.composition import CONF
from dyno.errors import Conflict
from dyno.kernels.attention import reference
from dyno.recipe import make
from dyno.technique import Run

OPTIONS = sorted(path.stem for path in (CONF / "attention").glob("*.yaml"))


def build(option, **knobs):
    return make({**yaml.safe_load((CONF / "attention" / f"{option}.yaml").read_text()), **knobs}, [])


def device(kind, capability=None):
    return SimpleNamespace(kind=kind, name="a GPU", capability=capability)


def recipe(precision):
    return SimpleNamespace(option=lambda axis: precision)


def run():
    return Run(recipe=None, stage="infer", device=torch.device("cpu"), directory=Path("."))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("queries,keys", [(9, 9), (1, 9), (3, 9)])
def test_option_computes_attention_or_says_why_not(option, queries, keys):
    technique = build(option)
    if technique.unsupported(recipe("fp32"), device("cpu")) is not None:
        pytest.skip("has its reason")
    made = run()
    technique.apply(made)
    q, k, v = torch.randn(2, 9, queries, 64), torch.randn(2, 3, keys, 64), torch.randn(2, 3, keys, 64)
    out = made.part("attention")(q, k, v, causal=True, scale=None)
    torch.testing.assert_close(out, reference(q, k, v), atol=2e-5, rtol=2e-5)


def test_reasons():
    assert "CUDA" in build("sdpa_cudnn").unsupported(recipe("bf16"), device("cpu"))
    assert "precision=bf16" in build("sdpa_flash").unsupported(recipe("fp32"), device("cuda", (9, 0)))
    assert "8.0" in build("sdpa_flash").unsupported(recipe("fp16"), device("cuda", (7, 5)))
    assert build("sdpa_flash").unsupported(recipe("bf16"), device("cuda", (9, 0))) is None
    assert "it takes auto" in build("sdpa", backend="fast").unsupported(recipe("bf16"), device("cpu"))


def test_triton_without_interpreter_has_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "NVIDIA GPU" in build("triton_flash").unsupported(recipe("fp32"), device("cpu"))


def test_two_owners_conflict():
    made = run()
    build("math").apply(made)
    with pytest.raises(Conflict, match="SDPA and Math"):
        build("sdpa").apply(made)


def test_score_matrix_is_predicted():
    matrices = {option: build(option).footprint(None, device("cuda")).attention_matrix for option in OPTIONS}
    assert {option for option, matrix in matrices.items() if matrix} == {"math", "sdpa_math"}
