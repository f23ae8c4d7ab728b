"""Measures a training on the newest events, which it does not see, beside baselines on the same split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pgvae import baselines
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.ranking import bootstrap_interval, make_holdout, per_user_metrics
from pgvae.training import Epoch, Fit, fit, scorer

K = 20
# Of the events in the order of time: the first part trains, the second chooses the epoch, the third is the test.
VALIDATION_FROM, TEST_FROM = 0.8, 0.9
# With fewer users than this, a metric says nothing.
_MIN_USERS = 20


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean over the users of the test part, with its 95 % bootstrap interval."""

    method: str
    split: str
    metric: str
    k: int
    value: float
    lower: float
    upper: float
    user_count: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; `fit` is None where the events cannot be split by time, and `metrics` is then empty."""

    fit: Fit | None
    metrics: list[Metric]


def evaluate(
    dataset: Dataset, config: TrainingConfig, *, max_history: int, on_epoch: Callable[[Epoch], None]
) -> Evaluation:
    """Trains on the first 80 % of the events by time, chooses the epoch on the next 10 %, tests on the last 10 %.

    The test part is touched once. Each method sees a user's events up to the test, and is judged by the new items
    of the user's target events in it.
    """
    validation_from, test_from = np.quantile(dataset.occurred_at, [VALIDATION_FROM, TEST_FROM])
    train = dataset.between(-np.inf, validation_from)
    validation = make_holdout(train, dataset.between(validation_from, test_from))
    test = make_holdout(dataset.between(-np.inf, test_from), dataset.between(test_from, np.inf))
    if min(len(validation.users), len(test.users)) < _MIN_USERS:
        return Evaluation(fit=None, metrics=[])
    fitted = fit(train, config, max_history=max_history, phase="evaluate", validation=validation, on_epoch=on_epoch)
    methods = {
        "pgvae": scorer(fitted.weights, max_history),
        "item_cooccurrence": baselines.item_cooccurrence(train),
        "popularity": baselines.popularity(train),
    }
    metrics = []
    for method, score in methods.items():
        for name, values in per_user_metrics(test, score, K).items():
            lower, upper = bootstrap_interval(values, config.seed)
            metrics.append(
                Metric(
                    method=method,
                    split="temporal",
                    metric=name,
                    k=K,
                    value=float(values.mean()),
                    lower=lower,
                    upper=upper,
                    user_count=len(values),
                )
            )
    return Evaluation(fit=fitted, metrics=metrics)
