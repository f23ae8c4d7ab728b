"""Measures a training on the newest events, which it does not see, beside baselines on the same split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pgvae import baselines
from pgvae.bootstrap import interval, resampled_means
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.ranking import per_user_metrics
from pgvae.splits import measurable
from pgvae.training import Epoch, Fit, fit, scorer

K = 20


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
    found = measurable(dataset, seed=config.seed)
    if found is None:
        return Evaluation(fit=None, metrics=[])
    name, split = found
    fitted = fit(
        split.train, config, max_history=max_history, phase="evaluate", validation=split.validation, on_epoch=on_epoch
    )
    methods = {
        "pgvae": scorer(fitted.weights, max_history),
        "item_knn": baselines.item_knn(split.train),
        "popularity": baselines.popularity(split.train),
    }
    metrics = []
    for method, score in methods.items():
        values = {
            key: value for key, value in per_user_metrics(split.test, score, K).items() if key in ("recall", "ndcg")
        }
        bounds = interval(resampled_means(np.column_stack(list(values.values())), split.test.users, config.seed))
        for metric, value, lower, upper in zip(values, values.values(), *bounds.tolist(), strict=True):
            metrics.append(
                Metric(
                    method=method,
                    split=name,
                    metric=metric,
                    k=K,
                    value=float(value.mean()),
                    lower=lower,
                    upper=upper,
                    user_count=len(value),
                )
            )
    return Evaluation(fit=fitted, metrics=metrics)
