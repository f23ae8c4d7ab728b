"""What an experiment says: the average effect, whether it was random, and what a ranking by uplift is worth.

Intervals are of whole users drawn again (Efron 1979): assignments of one user are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pgvae.bootstrap import SAMPLES, interval
from pgvae.outcome_windows import Floats
from pgvae.regression import fit_logistic, standardising
from pgvae.trials import Integers, Trial
from pgvae_runtime.tokens import SECONDS_PER_DAY

# Of the inputs, per row and of standardised numbers.
_RIDGE = 1e-3
_FOLDS = 3
# Assignments of an item or a week that are taken for the mean one.
_SMOOTHED = 20.0
_WEEK = 7 * SECONDS_PER_DAY
_AUC_BINS = 200
_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % bootstrap interval."""

    value: float
    lower: float
    upper: float


def resampled_counts(cells: Integers, count: int, users: Integers, seed: int) -> Floats:
    """Gives how many rows are in each of so many cells, [1 + SAMPLES, count]: of all, and of users drawn again."""
    _, number = np.unique(users, return_inverse=True)
    size = int(number.max()) + 1
    generator = np.random.default_rng(seed)
    found = np.empty((1 + SAMPLES, count))
    found[0] = np.bincount(cells, minlength=count)
    for sample in range(1, SAMPLES + 1):
        times = np.bincount(generator.integers(0, size, size), minlength=size)
        found[sample] = np.bincount(cells, weights=times[number], minlength=count)
    return found


def estimate(values: Floats) -> Estimate:
    """Gives the first of the values with the interval of the others, [1 + SAMPLES]; nan is left out of it."""
    drawn = values[1:][np.isfinite(values[1:])]
    lower, upper = interval(drawn[:, None])[:, 0] if len(drawn) else (np.nan, np.nan)
    return Estimate(value=float(values[0]), lower=float(lower), upper=float(upper))


def effects(cells: Integers, users: Integers, seed: int) -> tuple[Estimate, Estimate, Estimate]:
    """Gives the response rates of the exposed and of the withheld, and their difference: the average effect."""
    counts = resampled_counts(cells, 4, users, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        exposed = counts[:, 3] / (counts[:, 2] + counts[:, 3])
        withheld = counts[:, 1] / (counts[:, 0] + counts[:, 1])
    return estimate(exposed), estimate(withheld), estimate(exposed - withheld)


def balance(trial: Trial, inputs: Floats, seed: int) -> Estimate:
    """Gives the area under the curve of a regression that foretells who is exposed; of a random experiment it is 0.5.

    It reads `inputs` [N, D], what was known of the users before, the item's popularity, and the share that was exposed
    of the item and in the week. Users are dealt into three parts: shares are of one, the regression of another, the
    third is judged, in turns.
    """
    given = trial.assignments
    popularity = np.log(trial.before.popularity()[given.item] + 1e-6)
    week = np.floor((given.moment - trial.begin) / _WEEK).astype(np.int64)
    part = np.random.default_rng(seed).integers(0, _FOLDS, int(given.user.max()) + 1)[given.user]
    place = np.full(len(given), 0.5)
    for fold in range(_FOLDS):
        shares, fitting, judged = (part == (fold + step) % _FOLDS for step in range(_FOLDS))
        if not (judged.any() and 0 < given.exposed[fitting].sum() < np.count_nonzero(fitting)):
            continue
        columns = [inputs, popularity] + [_shares(group, given.exposed, shares) for group in (given.item, week)]
        x = np.column_stack(columns)
        mean, scale = standardising(x[fitting])
        x = np.clip((x - mean) / scale, -5.0, 5.0)
        fitted = fit_logistic(x[fitting], given.exposed[fitting].astype(np.float64), np.full(x.shape[1], _RIDGE))
        place[judged] = quantiles(x[judged] @ fitted[:-1])
    bins = np.minimum((place * _AUC_BINS).astype(np.int64), _AUC_BINS - 1)
    counts = resampled_counts(2 * bins + given.exposed, 2 * _AUC_BINS, given.user, seed)
    withheld, exposed = counts[:, ::2], counts[:, 1::2]
    below = np.cumsum(withheld, axis=1) - withheld / 2.0
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (exposed * below).sum(axis=1) / (exposed.sum(axis=1) * withheld.sum(axis=1))
    return estimate(area)


def _shares(group: Integers, exposed: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> Floats:
    """Gives the exposed share of each row's group among the chosen rows, [N], near that of all where they are few."""
    size = int(group.max()) + 1
    count = np.bincount(group[chosen], minlength=size)
    own = np.bincount(group[chosen], weights=exposed[chosen], minlength=size)
    mean = exposed[chosen].mean() if chosen.any() else 0.5
    share: Floats = ((own + _SMOOTHED * mean) / (count + _SMOOTHED))[group]
    return share


def quantiles(values: Floats) -> Floats:
    """Gives the place of each value among all, in [0, 1), [N]; equal ones stand at their middle."""
    middle: Floats = (rankdata(values) - 0.5) / len(values)
    return middle


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What it brings to offer to the best shares of all: `share` [P + 1] from 0 to 1, the extra buyers per assignment.

    `gain`, [1 + SAMPLES, P + 1], is of all and of users drawn again; `qini`, [1 + SAMPLES], the area between each
    and the straight line to its end, which is what chance brings.
    """

    share: Floats
    gain: Floats
    qini: Floats


def gains(score: Floats, cells: Integers, users: Integers, seed: int) -> Gains:
    """Gives the uplift curve of a ranking, best first, and its Qini coefficient (Radcliffe 2007).

    Of the best n: (buyers among the exposed - buyers among the withheld · exposed / withheld) / all exposed.
    Gutierrez and Gérardy (2017, section 4) compare this curve with its relatives.
    """
    bins = _POINTS - 1 - np.minimum((quantiles(score) * _POINTS).astype(np.int64), _POINTS - 1)
    counts = resampled_counts(4 * bins + cells, 4 * _POINTS, users, seed).reshape(-1, _POINTS, 4)
    running = np.concatenate((np.zeros((len(counts), 1, 4)), np.cumsum(counts, axis=1)), axis=1)
    exposed, withheld = running[..., 2] + running[..., 3], running[..., 0] + running[..., 1]
    gain = (running[..., 3] - running[..., 1] * exposed / np.maximum(withheld, 1.0)) / np.maximum(exposed[:, -1:], 1.0)
    share = (exposed + withheld) / (exposed + withheld)[:, -1:]
    area = (np.diff(share, axis=1) * (gain[:, 1:] + gain[:, :-1]) / 2.0).sum(axis=1)
    return Gains(share=share[0], gain=gain, qini=area - gain[:, -1] / 2.0)
