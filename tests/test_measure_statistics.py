"""Statistics against simulated noise whose answer is known."""

import numpy as np
import pytest

from dyno.measure import statistics as st


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(("q", "needed"), [(90, 29), (95, 59), (99, 459)])
def test_a_percentile_needs_its_samples(q, needed):
    value, reason = st.percentile(np.arange(needed - 1.0), q)
    assert value is None
    assert f"needs {needed}" in reason
    value, reason = st.percentile(np.arange(float(needed)), q)
    assert reason is None
    assert value == np.percentile(np.arange(float(needed)), q)


def test_summary_counts_outliers_and_drops_none(rng):
    values = np.concatenate([rng.normal(1.0, 0.01, 500), [5.0]])
    out = st.summarise(values)
    assert out["count"] == 501
    assert out["max"] == 5.0
    assert out["outliers"]["severe"] == 1
    assert out["p99"] is not None
    few = st.summarise(values[:10])
    assert few["p95"] is None
    assert "p95" in few["reasons"]


def test_tukey_classes():
    base = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9])  # quartiles 3 and 7, IQR 4
    assert st.tukey_outliers(base) == {"mild": 0, "severe": 0}
    assert st.tukey_outliers(np.append(np.tile(base, 20), [14.0])) == {"mild": 1, "severe": 0}
    assert st.tukey_outliers(np.append(np.tile(base, 20), [14.0, 30.0])) == {"mild": 1, "severe": 1}
    assert st.tukey_outliers(np.array([])) == {"mild": 0, "severe": 0}


@pytest.mark.parametrize("n", [2, 9, 10, 201])
def test_exact_draws_agree_with_resampling(rng, n):
    values = rng.lognormal(size=n)
    drawn = np.median(values[rng.integers(0, n, (20000, n))], axis=1)
    direct = st.bootstrap_medians(values, 20000, seed=3)
    for q in (5, 25, 50, 75, 95):
        low, high = np.quantile(drawn, [max(0, q - 2) / 100, min(100, q + 2) / 100])
        assert low <= np.quantile(direct, q / 100) <= high


def test_interval_of_the_median_covers_the_truth(rng):
    covered = 0
    for seed in range(200):
        low, high = st.median_interval(rng.exponential(size=60), 1000, seed)
        covered += low <= np.log(2) <= high
    assert 178 <= covered <= 200  # 95% of 200, with room for four standard errors


def test_intervals_are_seeded_and_need_two_samples():
    values = np.arange(30.0)
    assert st.median_interval(values, seed=1) == st.median_interval(values, seed=1)
    assert st.median_interval(values[:1]) == (None, None)
    assert st.mean_interval(values[:1]) == (None, None)
    low, high = st.mean_interval(values)
    assert low < values.mean() < high


def test_ratio_interval(rng):
    slow, fast = rng.normal(2.0, 0.05, 80), rng.normal(1.0, 0.05, 80)
    ratio, low, high = st.ratio_interval(slow, fast)
    assert low < 2.0 < high
    assert low < ratio < high
    _, low, high = st.ratio_interval(fast, rng.permutation(fast))
    assert low <= 1.0 <= high
    assert st.ratio_interval(slow, fast[:1])[1:] == (None, None)


def test_steady_sees_a_trend_and_forgives_a_hiccup(rng):
    flat = rng.normal(1.0, 0.01, 30)
    assert st.is_steady(flat, window=10, tolerance=0.05)
    assert not st.is_steady(np.linspace(1.0, 1.5, 30), window=10, tolerance=0.05)
    assert not st.is_steady(np.linspace(1.5, 1.0, 30), window=10, tolerance=0.05)
    assert not st.is_steady(flat[:9], window=10, tolerance=0.05)
    flat[-2] = 10.0
    assert st.is_steady(flat, window=10, tolerance=0.05)
    settling = 1 + 5 * np.exp(-np.arange(60) / 4) + rng.normal(0, 0.005, 60)
    assert not st.is_steady(settling[:8], window=6, tolerance=0.05)
    assert st.is_steady(settling, window=6, tolerance=0.05)
