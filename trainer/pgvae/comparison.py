"""Measures a training on held-out events, which it does not see, beside baselines on the same split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgvae import baselines
from pgvae.bootstrap import interval, resampled_means
from pgvae.checkpoints import Checkpoints
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.loop import Fit, fit
from pgvae.measurement import Measurement, calibration_error, measure
from pgvae.ranking import Holdout, Scorer, hits_of, list_metrics, per_user_metrics, scorer
from pgvae.rows import ALL, Epoch, Metric
from pgvae.splits import MIN_USERS, SPLITS, Split, measurable
from pgvae_runtime.tokens import SECONDS_PER_DAY

K = 20
METHODS = ("pgvae", *baselines.CHOICES, "popularity")
# Those of the methods whose scores are probabilities.
_PROBABILITIES = ("pgvae", "recency", "popularity")
_SLICED = ("recall", "ndcg")
_CATEGORIES = 10

# A metric of each user, by its name and k.
Values = Mapping[tuple[str, int], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; `fit` is None where the events cannot be split, and `metrics` is then empty.

    `learned_until` is the time of the newest event that the fit has learned from, in seconds since 1970.
    """

    fit: Fit | None
    metrics: list[Metric]
    learned_until: float = np.inf


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All methods on the same splits; `settings` are what was chosen on the validation part of each fold.

    Of pgvae that is the number of epochs, of the baselines what baselines.CHOICES names.
    """

    metrics: list[Metric]
    settings: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Listener:
    """What a comparison tells while it runs: that it reads, epochs, and steps by name and number from 0 of how many."""

    on_read: Callable[[], None] = lambda: None
    on_step: Callable[[str, int, int], None] = lambda step, number, steps: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


def evaluate(
    dataset: Dataset,
    config: TrainingConfig,
    *,
    max_history: int,
    on_epoch: Callable[[Epoch], None],
    checkpoints: Checkpoints | None = None,
) -> Evaluation:
    """Trains on the first 80 % of the events by time, chooses the epoch on the next 10 %, tests on the last 10 %.

    Where time leaves too few users, the same shares of each user's items by chance. The test part is touched once.
    Each method sees a user's events before, and is judged by the new items of the user's target events after.
    """
    found = measurable(dataset, seed=config.seed)
    if found is None:
        return Evaluation(fit=None, metrics=[])
    name, split = found
    fitted = _fit(split, config, max_history, on_epoch, checkpoints)
    methods = {
        "pgvae": scorer(fitted.weights, max_history),
        "item_knn": baselines.item_knn(split.train),
        "popularity": baselines.popularity(split.train),
    }
    values = {}
    for method, score in methods.items():
        measured = per_user_metrics(split.test, score, K)
        values[method] = {(metric, K): measured[metric] for metric in _SLICED}
    return Evaluation(
        fit=fitted,
        metrics=summarise(split.test.users, values, split=name, seed=config.seed),
        learned_until=float(split.train.occurred_at.max()),
    )


def compare(
    dataset: Dataset,
    config: TrainingConfig,
    *,
    max_history: int,
    split: str = "temporal",
    folds: int = 1,
    ks: Sequence[int] = (K,),
    listener: Listener | None = None,
) -> Comparison:
    """Measures pgvae and every baseline on the tests of a split, with everything that there is to measure.

    The settings of the baselines and pgvae's epochs are chosen on the validation parts. PgvaeError where a part has too
    few users.
    """
    listener = listener or Listener()
    settings: dict[str, list[float]] = {}
    parts: list[_Fold] = []
    for number, part in enumerate(SPLITS[split](dataset, folds=folds, seed=config.seed)):
        if not part.is_measurable:
            raise _too_few(part, split, folds)
        measurements = {}
        for step, method in enumerate(METHODS, number * len(METHODS)):
            fold = f", fold {number + 1} of {folds}" if folds > 1 else ""
            listener.on_step(f"{method}{fold}", step, folds * len(METHODS))
            score, setting = _fit_method(method, part, config, max_history, listener.on_epoch)
            if setting is not None:
                settings.setdefault(method, []).append(setting)
            measurements[method] = measure(part.test, score, ks, are_probabilities=method in _PROBABILITIES)
        parts.append(_Fold(holdout=part.test, measurements=measurements))
    name = f"{folds}-fold {split}" if folds > 1 else split
    users = np.concatenate([part.holdout.users for part in parts])
    metrics = summarise(users, _pooled(parts), split=name, seed=config.seed)
    metrics += _of_all_users(parts, name, len(np.unique(users)))
    for label, sliced_users, values in _slices(parts, ks, _categories(dataset)):
        if len(np.unique(sliced_users)) >= MIN_USERS:
            metrics += summarise(sliced_users, values, split=name, slice_=label, seed=config.seed)
    return Comparison(metrics=metrics, settings=settings)


@dataclass(frozen=True, kw_only=True)
class _Fold:
    holdout: Holdout
    measurements: dict[str, Measurement]


def _fit(
    split: Split,
    config: TrainingConfig,
    max_history: int,
    on_epoch: Callable[[Epoch], None],
    checkpoints: Checkpoints | None = None,
) -> Fit:
    return fit(
        split.train,
        config,
        max_history=max_history,
        phase="evaluate",
        validation=split.validation,
        checkpoints=checkpoints,
        on_epoch=on_epoch,
    )


def _fit_method(
    method: str, split: Split, config: TrainingConfig, max_history: int, on_epoch: Callable[[Epoch], None]
) -> tuple[Scorer, float | None]:
    """Gives a method that has learned from the train part, and the setting that the validation part chose for it."""
    if method == "pgvae":
        fitted = _fit(split, config, max_history, on_epoch)
        return scorer(fitted.weights, max_history), fitted.best_epoch
    if method == "popularity":
        return baselines.popularity(split.train), None
    choice = baselines.choose(method, split.train, split.validation, config.seed)
    return choice.scorer, choice.value


def summarise(
    users: NDArray[np.int64], values: Mapping[str, Values], *, split: str, slice_: str = ALL, seed: int
) -> list[Metric]:
    """Gives the mean of each method's metrics with its interval, and pgvae's lead in ndcg over each baseline.

    `users` [N] says whose the rows of the values are. All methods are resampled alike, so that leads are paired.
    """
    keys = [(method, metric, k) for method, of_method in values.items() for metric, k in of_method]
    columns = [values[method][metric, k] for method, metric, k in keys]
    for method, metric, k in list(keys):
        if metric == "ndcg" and method != "pgvae":
            keys.append((method, "ndcg_lead", k))
            columns.append(values["pgvae"][metric, k] - values[method][metric, k])
    matrix = np.column_stack(columns)
    lower, upper = interval(resampled_means(matrix, users, seed))
    count = len(np.unique(users))
    return [
        Metric(
            method=method,
            split=split,
            slice=slice_,
            metric=metric,
            k=k,
            value=float(matrix[:, column].mean()),
            lower=float(lower[column]),
            upper=float(upper[column]),
            user_count=count,
        )
        for column, (method, metric, k) in enumerate(keys)
    ]


def _pooled(parts: Sequence[_Fold]) -> dict[str, Values]:
    first = parts[0].measurements
    return {
        method: {
            key: np.concatenate([part.measurements[method].values[key] for part in parts])
            for key in first[method].values
        }
        for method in first
    }


def _of_all_users(parts: Sequence[_Fold], split: str, user_count: int) -> list[Metric]:
    """Gives what is no mean over users: a resample of users would be biased, so it has no interval."""
    found = []
    for method, first in parts[0].measurements.items():
        of_method = [part.measurements[method] for part in parts]
        values = {("coverage", k): float(np.mean([each.coverage[k] for each in of_method])) for k in first.coverage}
        reliability = [each.reliability for each in of_method if each.reliability is not None]
        if reliability:
            values["calibration_error", 0] = calibration_error(np.sum(reliability, axis=0))
        for (metric, k), value in values.items():
            found.append(
                Metric(
                    method=method,
                    split=split,
                    metric=metric,
                    k=k,
                    value=value,
                    lower=None,
                    upper=None,
                    user_count=user_count,
                )
            )
    return found


def _slices(
    parts: Sequence[_Fold], ks: Sequence[int], categories: NDArray[np.str_] | None
) -> Iterator[tuple[str, NDArray[np.int64], dict[str, Values]]]:
    """Gives the name, the users and the values of each slice: thirds by activity and account age, item categories."""
    users = np.concatenate([part.holdout.users for part in parts])
    pooled = {
        method: {key: value for key, value in values.items() if key[0] in _SLICED}
        for method, values in _pooled(parts).items()
    }
    events, age = np.concatenate([_activity_and_age(part.holdout) for part in parts]).T
    for subject, unit, measure_ in (("activity", "events", events), ("account age", "days", age)):
        for name, chosen in _thirds(measure_):
            label = f"{subject}: {name} {unit}"
            yield label, users[chosen], {m: {key: v[chosen] for key, v in pooled[m].items()} for m in pooled}
    if categories is not None:
        yield from _category_slices(parts, ks, categories)


def _activity_and_age(holdout: Holdout) -> NDArray[np.float64]:
    """Gives the number of events of each user, and the days from the first one to the newest of anybody, [U, 2]."""
    before = holdout.before
    start = np.searchsorted(before.user, holdout.users, "left")
    count = np.searchsorted(before.user, holdout.users, "right") - start
    age = (before.occurred_at.max() - before.occurred_at[start]) / SECONDS_PER_DAY
    return np.column_stack((count, np.floor(age)))


def _thirds(values: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Gives the lower, middle and upper third with their ranges; equal values stay together, so there may be fewer."""
    third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
    if third.min() < third.max():
        for number in np.unique(third):
            chosen = third == number
            yield f"{values[chosen].min():.0f} to {values[chosen].max():.0f}", chosen


def _categories(dataset: Dataset) -> NDArray[np.str_] | None:
    """Gives the category of each item, [I], "" where it has none; None without a feature of that name."""
    bag = dataset.item_features
    for column in dataset.item_pipeline.columns:
        if column.name == "category" and column.kind == "category":
            item = np.repeat(np.arange(len(bag)), bag.counts())
            chosen = (bag.token >= column.first) & (bag.token < column.first + column.size)
            number = np.full(len(bag), -1)
            number[item[chosen]] = bag.token[chosen] - column.first
            names: NDArray[np.str_] = np.array([*column.vocabulary, ""])
            labels: NDArray[np.str_] = names[number]
            return labels
    return None


def _category_slices(
    parts: Sequence[_Fold], ks: Sequence[int], category: NDArray[np.str_]
) -> Iterator[tuple[str, NDArray[np.int64], dict[str, Values]]]:
    """Gives the categories with the most truth items; a user is judged there by the items of the category only."""
    names, counts = np.unique(np.concatenate([category[part.holdout.truth_item] for part in parts]), return_counts=True)
    ordered = names[np.argsort(-counts, kind="stable")]
    for name in ordered[ordered != ""][:_CATEGORIES]:
        users: list[NDArray[np.int64]] = []
        values: dict[str, dict[tuple[str, int], list[NDArray[np.float64]]]] = {}
        for part in parts:
            owner, item = part.holdout.truth(slice(None))
            inside = category[item] == name
            judged, owner, count = np.unique(owner[inside], return_inverse=True, return_counts=True)
            users.append(part.holdout.users[judged])
            for method, measured in part.measurements.items():
                hits = hits_of(measured.best[judged], owner, item[inside])
                for k in ks:
                    for metric, value in list_metrics(hits, count, k).items():
                        if metric in _SLICED:
                            values.setdefault(method, {}).setdefault((metric, k), []).append(value)
        yield (
            f"category: {name}",
            np.concatenate(users),
            {method: {key: np.concatenate(v) for key, v in of.items()} for method, of in values.items()},
        )


def _too_few(part: Split, split: str, folds: int) -> PgvaeError:
    users = min(len(part.validation.users), len(part.test.users))
    other = {"temporal": "--split random", "random": "more events", "strong": "--split random"}[split]
    fewer = ", or fewer --folds" if folds > 1 else ""
    return PgvaeError(
        f"a part of the {split} split has only {users} users with something new to find, {MIN_USERS} are needed",
        hint=f"give {other}{fewer}",
    )
