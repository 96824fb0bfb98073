"""Quality on fixed text: against brute force, zero and one for a model against itself, typed failures."""

import math

import numpy as np
import pytest
import tiny
import torch

from dyno import quality
from dyno.errors import NonFinite, UserError

WORKLOAD = {"seq": 8, "batch": 4, "eval_tokens": 80}
TEXT = tiny.tokens(1, 300, seed=5)[0].numpy()


def against(model, reference, workload=WORKLOAD):
    return quality.against(model, lambda: reference, TEXT, workload, tiny.CPU)


def test_a_model_against_itself_is_at_zero_and_one():
    model = tiny.model(sharpness=6.0)
    found = against(model, model)
    assert found["kl_divergence"].value == pytest.approx(0.0, abs=1e-9)
    assert found["top1_agreement"].value == 1.0
    assert found["kl_divergence"].count == found["validation_loss"].count == 80


def test_every_figure_equals_brute_force():
    model, reference = tiny.model(0, sharpness=5.0), tiny.model(1, sharpness=5.0)
    losses, divergences, same = [], [], []
    with torch.no_grad():
        for i in range(10):
            window = torch.from_numpy(TEXT[8 * i : 8 * i + 9])
            ours, theirs = model(window[None, :-1])[0].double(), reference(window[None, :-1])[0].double()
            for position in range(8):
                p, q = theirs[position].softmax(0), ours[position].softmax(0)
                losses.append(-math.log(q[window[position + 1]]))
                divergences.append(float((p * (p / q).log()).sum()))
                same.append(float(p.argmax() == q.argmax()))
    found = against(model, reference)
    assert found["validation_loss"].value == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["kl_divergence"].value == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found["top1_agreement"].value == pytest.approx(np.mean(same))
    assert 0 < np.mean(same) < 1  # else the line above says nothing
    assert quality.loss_metrics(model, TEXT, WORKLOAD, tiny.CPU)["validation_loss"] == found["validation_loss"]


def test_windows_are_fixed_disjoint_and_do_not_depend_on_the_batch():
    def rows(batch):
        pairs = list(quality.windows(TEXT, {**WORKLOAD, "batch": batch}, tiny.CPU))
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])

    tokens, targets = rows(4)
    assert torch.equal(tokens.flatten(), torch.from_numpy(TEXT[:80]))
    assert torch.equal(targets.flatten(), torch.from_numpy(TEXT[1:81]))
    assert torch.equal(rows(3)[0], tokens)
    whole = torch.cat([t for t, _ in quality.windows(TEXT, {**WORKLOAD, "eval_tokens": 10**9}, tiny.CPU)])
    assert whole.shape == (37, 8)  # 299 tokens that have a successor


def test_the_interval_is_over_windows_and_one_window_has_none():
    found = against(tiny.model(0, sharpness=5.0), tiny.model(1, sharpness=5.0))["validation_loss"]
    assert found.low < found.value < found.high
    alone = against(tiny.model(0), tiny.model(1), {**WORKLOAD, "eval_tokens": 8})
    assert alone["validation_loss"].value is not None and alone["perplexity"].value is not None
    assert all(metric.low is None and metric.high is None for metric in alone.values())


def test_intervals_stay_where_the_quantity_can_be():
    model = tiny.model(sharpness=6.0)
    nearly = tiny.model(sharpness=6.0)
    with torch.no_grad():
        nearly.embed.weight.add_(
            0.05 * torch.randn(nearly.embed.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    found = against(nearly, model)
    assert found["kl_divergence"].value > 0 and found["kl_divergence"].low >= 0
    assert found["top1_agreement"].low <= found["top1_agreement"].value <= found["top1_agreement"].high <= 1


def test_no_evaluation_is_no_figure_but_a_reason():
    off = {**WORKLOAD, "eval_tokens": 0}
    for found in (quality.loss_metrics(tiny.model(), TEXT, off, tiny.CPU), against(tiny.model(), tiny.model(), off)):
        assert all(m.value is None and "eval_tokens" in m.reason for m in found.values())
    assert {"kl_divergence", "top1_agreement"} <= against(tiny.model(), tiny.model(), off).keys()


def test_a_validation_text_shorter_than_a_window_is_the_users_mistake():
    with pytest.raises(UserError, match="workload.seq=8"):
        quality.loss_metrics(tiny.model(), TEXT[:8], WORKLOAD, tiny.CPU)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_a_typed_failure(value):
    broken = tiny.model()
    with torch.no_grad():
        broken.norm.weight[0] = value
    with pytest.raises(NonFinite):
        quality.loss_metrics(broken, TEXT, WORKLOAD, tiny.CPU)
    with pytest.raises(NonFinite):
        against(broken, tiny.model())


def test_the_windows_losses_are_noted():
    noted = {}
    found = quality.loss_metrics(tiny.model(), TEXT, WORKLOAD, tiny.CPU, noted.__setitem__)["validation_loss"]
    assert len(noted["validation_losses"]) * WORKLOAD["seq"] == found.count
    assert np.mean(noted["validation_losses"]) == pytest.approx(found.value, rel=1e-7)
