"""Few positive coefficients from few measurements: robust non-negative least squares drawn to 1. No dependency but numpy."""

from __future__ import annotations

import numpy as np

HUBER = 0.1  # relative residuals beyond this count linearly, not squared
ROUNDS = 20


def non_negative(matrix: np.ndarray, target: np.ndarray, sweeps: int = 500) -> np.ndarray:
    """argmin |matrix x - target|, x >= 0, by coordinate descent on the normal equations. matrix (rows, n) -> (n,)."""
    gram, right = matrix.T @ matrix, matrix.T @ target
    x = np.maximum(0.0, right / np.maximum(gram.diagonal() * len(gram), 1e-30))
    for _ in range(sweeps):
        before = x.copy()
        for j in range(len(x)):
            if gram[j, j] > 0:
                x[j] = max(0.0, x[j] + (right[j] - gram[j] @ x) / gram[j, j])
        if np.abs(x - before).max(initial=0.0) < 1e-10:
            break
    return x


def coefficients(terms: np.ndarray, measured: np.ndarray, draw: float) -> np.ndarray:
    """Coefficients (n,) of terms (rows, n) so that terms @ x is near `measured` in relative error.

    Rows are weighted by Huber's rule, so that one wild run does not bend the rest; `draw` pulls every coefficient
    towards 1 as strongly as one run with that relative error would, so that a term that nobody measured stays as
    derived.
    """
    rows = terms / measured[:, None]
    n = rows.shape[1]
    pull = draw * np.eye(n)
    weight = np.ones(len(rows))
    x = np.ones(n)
    for _ in range(ROUNDS):
        root = np.sqrt(weight)
        x = non_negative(np.vstack([rows * root[:, None], pull]), np.concatenate([root, np.full(n, draw)]))
        residual = np.abs(rows @ x - 1.0)
        weight = np.minimum(1.0, HUBER / np.maximum(residual, 1e-12))
    return x
