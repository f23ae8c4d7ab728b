"""Intervals by resampling users (Efron 1979)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
# Drawn users of a batch of resamples, 8 bytes each.
_BATCH = 4_000_000


def resampled_means(values: NDArray[np.float64], users: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Gives the column means, [SAMPLES, M], of values, [N, M], whose rows belong to `users` [N].

    Whole users are drawn, with all of their rows: rows of one user are not independent. All columns see the same
    draws, so that the difference of two columns is a paired one.
    """
    _, number = np.unique(users, return_inverse=True)
    count = int(number.max()) + 1
    sums = np.zeros((count, values.shape[1] + 1))
    np.add.at(sums, number, np.column_stack((values, np.ones(len(values)))))
    generator = np.random.default_rng(seed)
    means = np.empty((SAMPLES, values.shape[1]))
    size = max(1, _BATCH // count)
    for begin in range(0, SAMPLES, size):
        rows = min(size, SAMPLES - begin)
        drawn = generator.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        totals = times @ sums
        means[begin : begin + rows] = totals[:, :-1] / totals[:, -1:]
    return means


def interval(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives the lower and upper bound of the 95 % percentile interval of each column, [2, M]."""
    bounds: NDArray[np.float64] = np.percentile(means, [2.5, 97.5], axis=0)
    return bounds
