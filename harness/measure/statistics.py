"""Statistics of samples: medians, percentiles that are only given when the sample carries them, bootstrap intervals.

numpy only. Every random draw is seeded. Outliers are counted and never dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MINIMUM_SAMPLES = {90: 29, 95: 59, 99: 459}
"""Samples that a percentile needs: with fewer, the largest value seen may well lie below it."""

_BLOCK = 1 << 22  # floats drawn at once by the bootstrap of a mean: 32 MiB


def percentile(values: np.ndarray, q: int) -> tuple[float | None, str | None]:
    """The q-th percentile (90, 95 or 99) of `values` (n,), or (None, the reason why not)."""
    needed = MINIMUM_SAMPLES[q]
    if len(values) < needed:
        return None, f"p{q} needs {needed} samples, there are {len(values)}"
    return float(np.percentile(values, q)), None


def tukey_outliers(values: np.ndarray) -> dict[str, int]:
    """How many of `values` (n,) lie beyond 1.5 (mild) and beyond 3 (severe) interquartile ranges of the quartiles."""
    if len(values) == 0:
        return {"mild": 0, "severe": 0}
    low, high = np.percentile(values, [25, 75])
    distance = np.maximum(low - values, values - high)
    severe = int(np.sum(distance > 3 * (high - low)))
    return {"mild": int(np.sum(distance > 1.5 * (high - low))) - severe, "severe": severe}


def summarise(values: np.ndarray) -> dict[str, Any]:
    """All there is to say about one sample (n,), n >= 1, as plain JSON; a percentile it cannot carry is None."""
    q1, median, q3 = (float(x) for x in np.percentile(values, [25, 50, 75]))
    out: dict[str, Any] = {
        "count": len(values), "mean": float(np.mean(values)), "median": median, "iqr": q3 - q1,
        "min": float(np.min(values)), "max": float(np.max(values)), "outliers": tukey_outliers(values), "reasons": {},
    }  # fmt: skip
    for q in MINIMUM_SAMPLES:
        out[f"p{q}"], reason = percentile(values, q)
        if reason:
            out["reasons"][f"p{q}"] = reason
    return out


def bootstrap_medians(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Medians of `resamples` resamples with replacement of `values` (n,), n >= 1; returns (resamples,).

    Drawn exactly, without drawing the resamples: the k-th smallest of n uniform numbers is Beta(k, n - k + 1), and the
    k-th smallest of a resample is the sorted sample at that quantile. The cost does not grow with n.
    """
    rng = np.random.default_rng(seed)
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    k = (n + 1) // 2
    lower = rng.beta(k, n - k + 1, resamples)
    medians = ordered[np.minimum((lower * n).astype(np.int64), n - 1)]
    if n % 2 == 0:  # the mean of the two middle ones: given the k-th, the next is the least of the n - k above it
        upper = lower + (1 - lower) * rng.beta(1, n - k, resamples)
        medians = (medians + ordered[np.minimum((upper * n).astype(np.int64), n - 1)]) / 2
    return medians


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` resamples with replacement of `values` (n,), n >= 1; returns (resamples,)."""
    rng = np.random.default_rng(seed)
    sample, n = np.asarray(values, dtype=np.float64), len(values)
    rows = max(1, _BLOCK // n)
    counts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([sample[rng.integers(0, n, (count, n))].mean(axis=1) for count in counts])


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central interval that holds `level` of the draws (n,)."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def median_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float | None, float | None]:
    """The bootstrap 95% interval of the median of `values` (n,); (None, None) below two samples."""
    return interval(bootstrap_medians(values, resamples, seed)) if len(values) > 1 else (None, None)


def mean_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float | None, float | None]:
    """The bootstrap 95% interval of the mean of `values` (n,); (None, None) below two samples."""
    return interval(bootstrap_means(values, resamples, seed)) if len(values) > 1 else (None, None)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float | None, float | None]:
    """The ratio of two samples' medians with its bootstrap 95% interval: (ratio, low, high).

    The samples (n,) and (m,) are resampled independently. The interval is (None, None) when one has less than two.
    """
    ratio = float(np.median(numerator) / np.median(denominator))
    if min(len(numerator), len(denominator)) < 2:
        return ratio, None, None
    above = bootstrap_medians(numerator, resamples, seed)
    below = bootstrap_medians(denominator, resamples, seed + 1)
    return (ratio, *interval(above / below))


def drift(times: np.ndarray) -> float:
    """The relative drift over `times` (n,), n >= 2: their Theil-Sen slope, times the span, over their median.

    Theil-Sen (the median of all pairs' slopes) because one hiccup must not pass for a trend.
    """
    times = np.asarray(times, dtype=np.float64)
    i, j = np.triu_indices(len(times), k=1)
    slope = float(np.median((times[j] - times[i]) / (j - i)))
    return slope * (len(times) - 1) / float(np.median(times))


def is_steady(times: np.ndarray, window: int = 10, tolerance: float = 0.1) -> bool:
    """Whether the last `window` of `times` (n,) drift by at most `tolerance` of their median; False with fewer."""
    return len(times) >= window and abs(drift(np.asarray(times)[-window:])) <= tolerance
