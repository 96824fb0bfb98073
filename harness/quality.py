"""Quality on fixed text: loss, perplexity, KL divergence and top-1 agreement with the unmodified model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyno.errors import NonFinite
from dyno.record import Metric

Forward = Callable[[Tensor], Tensor]


def windows(held_out: np.ndarray, workload: dict[str, Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Non-overlapping windows from token 0: (tokens, targets) of (b, seq), the same text for every recipe."""
    seq = workload["seq"]
    count = min(max(1, workload["eval_tokens"] // seq), (len(held_out) - 1) // seq)
    rows = np.stack([held_out[i * seq : i * seq + seq + 1] for i in range(count)]).astype(np.int64)
    for chunk in torch.from_numpy(rows).split(max(1, min(16, workload["batch"]))):
        chunk = chunk.to(device)
        yield chunk[:, :-1], chunk[:, 1:]


@torch.no_grad()
def loss_metrics(
    forward: Forward, held_out: np.ndarray, workload: dict[str, Any], device: torch.device
) -> dict[str, Metric]:
    """validation_loss (nats a token) and perplexity with the count of tokens and a 95% interval over windows."""
    if workload["eval_tokens"] <= 0:
        return {
            "validation_loss": Metric(None, "nats", 0, reason="workload.eval_tokens is 0"),
            "perplexity": Metric(None, "1", 0, reason="workload.eval_tokens is 0"),
        }
    rows = []
    for tokens, targets in windows(held_out, workload, device):
        rows.append(token_losses(forward(tokens), targets).double().mean(1).cpu())
    return summarise(torch.cat(rows).numpy(), workload["seq"])


@torch.no_grad()
def against(
    forward: Forward, reference: Forward, held_out: np.ndarray, workload: dict[str, Any], device: torch.device
) -> dict[str, Metric]:
    """loss_metrics, and mean KL(reference || model) in nats and top-1 agreement with the reference, a token."""
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
    out["kl_divergence"] = mean_metric(np.maximum(kl_rows, 0.0), "nats", tokens_seen)
    out["top1_agreement"] = mean_metric(same_rows, "1", tokens_seen)
    return out


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token (b, seq), in fp32."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def mean_metric(rows: np.ndarray, unit: str, tokens: int) -> Metric:
    """Mean over windows with a normal 95% interval; windows, not tokens, are the independent samples."""
    if not np.isfinite(rows).all():
        raise NonFinite("the model's outputs on the validation text are not finite")
    mean = float(rows.mean())
    half = 1.96 * float(rows.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return Metric(mean, unit, tokens, mean - half, mean + half, source="validation text")


def summarise(losses: np.ndarray, seq: int) -> dict[str, Metric]:
    loss = mean_metric(losses, "nats", len(losses) * seq)
    assert loss.value is not None and loss.low is not None and loss.high is not None
    e = lambda x: math.exp(min(x, 700.0))  # noqa: E731
    perplexity = Metric(e(loss.value), "1", loss.count, e(loss.low), e(loss.high), source=loss.source)
    return {"validation_loss": loss, "perplexity": perplexity}
