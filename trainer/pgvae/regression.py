"""Regressions on few columns and many rows, by Newton's method: all that demand, outcomes and uplift are fitted by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pgvae_runtime.outcomes import sigmoid

Floats = NDArray[np.float64]
# Gives the value, the slope and the curvature of each row's loss.
Loss = Callable[[Floats], tuple[Floats, Floats, Floats]]

_STEPS = 50
# A standard deviation of less is rounding.
_LEAST_DEVIATION = 1e-6
# exp of more is no rate of anything.
_MOST = 12.0


def standardising(x: Floats) -> tuple[Floats, Floats]:
    """Gives mean and scale of the columns, [D] each, so that (x - mean) / scale has the mean 0 and the variance 1.

    A number that never varies says nothing: its scale is infinite, so that it is 0 everywhere and its coefficient, too.
    """
    scale = x.std(axis=0)
    return x.mean(axis=0), np.where(scale > _LEAST_DEVIATION, scale, np.inf)


def fit_logistic(x: Floats, y: Floats, ridge: Floats) -> Floats:
    """Gives coefficients and, last, the intercept of a logistic regression, by Newton's method.

    `ridge` [D] is the penalty of each coefficient, per row.
    """
    return _newton(x, ridge, lambda eta: _logistic(eta, y), np.log((y.sum() + 0.5) / (len(y) - y.sum() + 0.5)))


def _logistic(eta: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    p = sigmoid(eta)
    return np.logaddexp(0.0, eta) - y * eta, p - y, p * (1.0 - p)


def fit_platt(logit: Floats, y: Floats, *, least: float) -> tuple[float, float]:
    """Gives slope, `least` or more, and intercept of a logistic regression on one logit (Platt 1999)."""
    slope, intercept = fit_logistic(logit[:, None], y, np.array([1e-6]))
    if slope >= least:
        return float(slope), float(intercept)
    # The intercept of another slope would leave the mean probability off.
    fixed = least * logit
    return least, float(_newton(np.empty((len(y), 0)), np.zeros(0), lambda eta: _logistic(eta + fixed, y), 0.0)[0])


def fit_poisson(x: Floats, y: Floats, ridge: Floats, *, most: float) -> Floats:
    """Gives coefficients and, last, the intercept of a log-linear regression of counts, by Newton's method.

    `ridge` [D] is the penalty of each coefficient, per row and in units of the mean count; exp of more than `most` is
    no count of anything.
    """
    return _newton(x, ridge, lambda eta: _poisson(eta, y, most), np.log(max(y.mean(), 1e-3)))


def _poisson(eta: Floats, y: Floats, most: float) -> tuple[Floats, Floats, Floats]:
    # Per unit: the penalty then weighs alike for small and for large counts.
    unit = max(y.mean(), 1e-9)
    mean = np.exp(np.minimum(eta, most))
    return (mean - y * eta) / unit, (mean - y) / unit, mean / unit


def fit_cloglog(x: Floats, y: NDArray[np.bool_], count: Floats, *, least: float) -> Floats:
    """Gives the coefficients of P(y) = 1 - exp(-exp(x · b)), each row standing for `count` ones.

    The first is `least` or more, the last one's column is all ones.
    """
    beginning = np.array([1.0, *np.zeros(x.shape[1] - 1)])
    beginning[-1] = np.log(count[y].sum() / max((count * np.exp(x @ beginning)).sum(), 1e-300))
    found = _descend(x, np.zeros(x.shape[1]), _cloglog(y, count, 0.0), beginning)
    if found[0] >= least:
        return found
    fixed = least * x[:, 0]
    beginning = np.zeros(x.shape[1] - 1)
    beginning[-1] = np.log(count[y].sum() / max((count * np.exp(fixed)).sum(), 1e-300))
    return np.append(least, _descend(x[:, 1:], np.zeros(len(beginning)), _cloglog(y, count, fixed), beginning))


def _cloglog(y: NDArray[np.bool_], count: Floats, fixed: Floats | float) -> Loss:

    def loss(eta: Floats) -> tuple[Floats, Floats, Floats]:
        rate = np.exp(np.minimum(eta + fixed, _MOST))
        p = np.maximum(-np.expm1(-rate), 1e-300)
        none = np.exp(-rate)
        value = count * np.where(y, -np.log(p), rate)
        slope = count * np.where(y, -rate * none / p, rate)
        # The expected second derivative (Fisher's): always positive.
        return value, slope, count * rate**2 * none / p

    return loss


def _newton(x: Floats, ridge: Floats, loss: Loss, intercept: float) -> Floats:
    matrix = np.column_stack((x, np.ones(len(x))))
    beginning = np.zeros(matrix.shape[1])
    beginning[-1] = intercept
    return _descend(matrix, np.append(ridge, 0.0) * len(x), loss, beginning)


def _descend(matrix: Floats, ridge: Floats, loss: Loss, beginning: Floats) -> Floats:
    """Gives the least of a convex loss, by Newton's method with steps that are halved until they lead down."""
    # The matrices are narrow: threads of OpenBLAS gain little, and wait for each other for seconds on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        return _steps_down(matrix, ridge, loss, beginning)


def _steps_down(matrix: Floats, ridge: Floats, loss: Loss, beginning: Floats) -> Floats:
    b = beginning
    value, gradient, curvature = loss(matrix @ b)
    total = value.sum() + 0.5 * (ridge * b * b).sum()
    for _ in range(_STEPS):
        hessian = (matrix * curvature[:, None]).T @ matrix + np.diag(ridge)
        hessian[np.diag_indices(len(b))] += 1e-9 * (1.0 + np.trace(hessian) / len(b))
        step = np.linalg.solve(hessian, matrix.T @ gradient + ridge * b)
        scale = 1.0
        while scale > 1e-4:
            candidate = b - scale * step
            value, gradient, curvature = loss(matrix @ candidate)
            now = value.sum() + 0.5 * (ridge * candidate * candidate).sum()
            if np.isfinite(now) and now <= total:
                break
            scale /= 2
        else:
            break
        b, moved, total = candidate, total - now, now
        if moved < 1e-8 * (1.0 + abs(total)):
            break
    return b
