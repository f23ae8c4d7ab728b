"""Ranking metrics as LightGCN defines them, with bootstrap intervals (He et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae_runtime import forward
from pgvae_runtime.scoring import mask_seen
from pgvae_runtime.tokens import History

# The scores of a batch of users take at most this much memory: users × items × 4 bytes.
_SCORES_BYTES = 64 * 1024 * 1024

# Gives a score for every item of the catalogue, [U, I], for the histories of U users.
Scorer = Callable[[History], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """What a list is judged by: users with a history before a moment, and the new items of target events after it.

    `users` [U] are the users; `truth_start` [U + 1] and `truth_item` list the items of each. An item that the user
    already had a target event on is not in the truth, and is masked in the ranking.
    """

    before: Dataset
    users: NDArray[np.int64]
    truth_start: NDArray[np.int64]
    truth_item: NDArray[np.int64]


def make_holdout(before: Dataset, after: Dataset) -> Holdout:
    """Gives the holdout of the users who have events before and a target event on a new item after."""
    items = len(before.item_keys)
    seen = np.unique(_target_pairs(before))
    # Items without an event before cannot be known to any method here; they are left out of the truth for all.
    known = np.zeros(items, dtype=bool)
    known[before.item] = True
    pairs = np.setdiff1d(np.unique(_target_pairs(after)), seen)
    pairs = pairs[known[pairs % items]]
    pairs = pairs[np.isin(pairs // items, before.user)]
    users, counts = np.unique(pairs // items, return_counts=True)
    return Holdout(
        before=before, users=users, truth_start=np.concatenate(([0], np.cumsum(counts))), truth_item=pairs % items
    )


def _target_pairs(dataset: Dataset) -> NDArray[np.int64]:
    chosen = np.isin(dataset.event_type, dataset.targets)
    return dataset.user[chosen] * len(dataset.item_keys) + dataset.item[chosen]


def per_user_metrics(holdout: Holdout, scorer: Scorer, k: int) -> dict[str, NDArray[np.float64]]:
    """Gives recall and ndcg at k of each user of the holdout, all items ranked, seen ones masked.

    Recall is the hits over the number of the user's truth items; the ideal DCG is that of min(k, that number) hits.
    """
    batch_size = max(1, _SCORES_BYTES // (4 * len(holdout.before.item_keys)))
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate(([0.0], np.cumsum(discount)))
    truth_counts = np.diff(holdout.truth_start)
    recall = np.zeros(len(holdout.users))
    ndcg = np.zeros(len(holdout.users))
    for begin in range(0, len(holdout.users), batch_size):
        part = slice(begin, begin + batch_size)
        history = holdout.before.history(holdout.users[part])
        scores = scorer(history)
        mask_seen(np, scores, history, holdout.before.targets)
        top, _ = forward.top_k(np, scores, k)
        relevant = np.zeros(scores.shape, dtype=bool)
        counts = truth_counts[part]
        rows = np.repeat(np.arange(len(counts)), counts)
        relevant[rows, holdout.truth_item[holdout.truth_start[begin] : holdout.truth_start[begin + len(counts)]]] = True
        hits = np.take_along_axis(relevant, top, axis=1)
        recall[part] = hits.sum(axis=1) / counts
        ndcg[part] = hits @ discount[: hits.shape[1]] / ideal[np.minimum(counts, k)]
    return {"recall": recall, "ndcg": ndcg}


def bootstrap_interval(values: NDArray[np.float64], seed: int, samples: int = 1000) -> tuple[float, float]:
    """Gives the 95 % percentile interval of the mean of the users' values (Efron 1979)."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(samples)]
    lower, upper = np.percentile(means, [2.5, 97.5])
    return float(lower), float(upper)
