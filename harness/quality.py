"""Quality on fixed text: loss, perplexity, KL divergence and top-1 agreement with the unmodified model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import NonFinite, UserError
from dyno.record import Metric, unmeasured

Forward = Callable[[Tensor], Tensor]


def windows(held_out: np.ndarray, workload: dict[str, Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Non-overlapping windows from token 0: (tokens, targets) of (b, seq), the same text for every recipe."""
    seq = workload["seq"]
    if len(held_out) <= seq:
        raise UserError(f"the validation text has {len(held_out)} tokens, workload.seq={seq} needs more")
    count = min(max(1, workload["eval_tokens"] // seq), (len(held_out) - 1) // seq)
    rows = np.stack([held_out[i * seq : i * seq + seq + 1] for i in range(count)]).astype(np.int64)
    for chunk in torch.from_numpy(rows).split(max(1, min(16, workload["batch"]))):
        chunk = chunk.to(device)
        yield chunk[:, :-1], chunk[:, 1:]


@torch.no_grad()
def loss_metrics(
    forward: Forward,
    held_out: np.ndarray,
    workload: dict[str, Any],
    device: torch.device,
    note: Callable[[str, Any], None] = lambda key, value: None,
) -> dict[str, Metric]:
    """validation_loss (nats a token) and perplexity with the count of tokens and a 95% interval over windows.

    Each window's loss is noted as `validation_losses`: windows are the same for every recipe, so that two runs pair up.
    """
    if workload["eval_tokens"] <= 0:
        return switched_off("validation_loss", "perplexity")
    rows = []
    for tokens, targets in windows(held_out, workload, device):
        rows.append(token_losses(forward(tokens), targets).double().mean(1).cpu())
    losses = torch.cat(rows).numpy()
    note("validation_losses", [float(f"{loss:.9g}") for loss in losses])
    return summarise(losses, workload["seq"])


@torch.no_grad()
def against(
    forward: Forward,
    original: Callable[[], Forward],
    held_out: np.ndarray,
    workload: dict[str, Any],
    device: torch.device,
) -> dict[str, Metric]:
    """loss_metrics, and mean KL(original || model) in nats and top-1 agreement with the original, a token.

    `original` makes the unmodified model, which is in memory no longer than this needs it.
    """
    if workload["eval_tokens"] <= 0:
        return switched_off("validation_loss", "perplexity", "kl_divergence", "top1_agreement")
    reference = original()
    losses, divergences, agreements, tokens_seen = [], [], [], 0
    for tokens, targets in windows(held_out, workload, device):
        logits, expected = forward(tokens).float(), reference(tokens).float()
        losses.append(token_losses(logits, targets).double().mean(1).cpu())
        expected_log = F.log_softmax(expected, -1)
        kl = (expected_log.exp() * (expected_log - F.log_softmax(logits, -1))).sum(-1)
        divergences.append(kl.double().mean(1).cpu())
        agreements.append((logits.argmax(-1) == expected.argmax(-1)).double().mean(1).cpu())
        tokens_seen += targets.numel()
    out = summarise(torch.cat(losses).numpy(), workload["seq"])
    kl_rows, same_rows = torch.cat(divergences).numpy(), torch.cat(agreements).numpy()
    out["kl_divergence"] = bounded(mean_metric(np.maximum(kl_rows, 0.0), "nats", tokens_seen), 0.0, math.inf)
    out["top1_agreement"] = bounded(mean_metric(same_rows, "1", tokens_seen), 0.0, 1.0)
    return out


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token (b, seq), in fp32."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def switched_off(*names: str) -> dict[str, Metric]:
    units = {"validation_loss": "nats", "kl_divergence": "nats"}
    return {name: unmeasured(units.get(name, "1"), "workload.eval_tokens is 0") for name in names}


def mean_metric(rows: np.ndarray, unit: str, tokens: int) -> Metric:
    """Mean over windows with a normal 95% interval; windows, not tokens, are the independent samples."""
    if not np.isfinite(rows).all():
        raise NonFinite("the model's outputs on the validation text are not finite")
    mean = float(rows.mean())
    if len(rows) == 1:
        return Metric(mean, unit, tokens, source="validation text, one window")
    half = 1.96 * float(rows.std(ddof=1)) / math.sqrt(len(rows))
    return Metric(mean, unit, tokens, mean - half, mean + half, source="validation text")


def bounded(metric: Metric, low: float, high: float) -> Metric:
    """An interval cut to the values that the quantity can take."""
    if metric.low is None or metric.high is None:
        return metric
    return replace(metric, low=max(low, metric.low), high=min(high, metric.high))


def summarise(losses: np.ndarray, seq: int) -> dict[str, Metric]:
    """Mean loss of each window -> validation_loss and perplexity."""
    loss = mean_metric(losses, "nats", len(losses) * seq)
    value, low, high = (None if x is None else math.exp(min(x, 700.0)) for x in (loss.value, loss.low, loss.high))
    return {"validation_loss": loss, "perplexity": Metric(value, "1", loss.count, low, high, source=loss.source)}
