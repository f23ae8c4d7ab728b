"""Lists of all items, ranked for held-out users, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae_runtime import forward
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import History

# The scores of a batch of users take at most this much memory: users × items × 4 bytes.
_SCORES_BYTES = 64 * 1024 * 1024

# Gives a score for every item of the catalogue, [U, I], for the histories of U users.
Scorer = Callable[[History], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """What a list is judged by: users with a history, and the new items of their held-out target events.

    `before` holds the histories that a scorer sees. `users` [U] are the users; `truth_start` [U + 1] and `truth_item`
    list the items of each. An item on which the user already had an event of a type in `seen` is not in the truth, and
    is masked in the ranking; an earlier event of another type leaves it in both. `item_share` [I] is each item's share
    of the users that methods learn from; an item without any is neither in the truth nor in a list.
    """

    before: Dataset
    users: NDArray[np.int64]
    truth_start: NDArray[np.int64]
    truth_item: NDArray[np.int64]
    item_share: NDArray[np.float64]
    seen: tuple[int, ...]

    def truth(self, part: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gives the (user within the part, item) pairs of a part of the users, as two arrays, users in order."""
        begin, end, _ = part.indices(len(self.users))
        counts = np.diff(self.truth_start[begin : end + 1])
        return np.repeat(np.arange(end - begin), counts), self.truth_item[
            self.truth_start[begin] : self.truth_start[end]
        ]


def make_holdout(
    before: Dataset,
    after: Dataset,
    *,
    item_share: NDArray[np.float64] | None = None,
    seen: Sequence[int] | None = None,
) -> Holdout:
    """Gives the holdout of the users who have events in `before` and a target event on a new item in `after`.

    `item_share` is that of `before` where it is not given. An item is new to a user without an earlier event of a type
    in `seen`, which are the target types where they are not given.
    """
    items = len(before.item_keys)
    item_share = item_shares(before) if item_share is None else item_share
    seen = before.targets if seen is None else tuple(seen)
    pairs = np.setdiff1d(after.pairs(after.targets), before.pairs(seen), assume_unique=True)
    # No method here can know an item that nobody had an event on; it is left out of the truth for all.
    pairs = pairs[item_share[pairs % items] > 0]
    pairs = pairs[np.isin(pairs // items, before.user)]
    users, counts = np.unique(pairs // items, return_counts=True)
    return Holdout(
        before=before,
        users=users,
        truth_start=np.concatenate(([0], np.cumsum(counts))),
        truth_item=pairs % items,
        item_share=item_share,
        seen=seen,
    )


def item_shares(dataset: Dataset) -> NDArray[np.float64]:
    """Gives each item's share of the users who have an event, [I]."""
    items = len(dataset.item_keys)
    pairs = dataset.pairs()
    counts = np.bincount(pairs % items, minlength=items)
    share: NDArray[np.float64] = counts / max(1, len(np.unique(pairs // items)))
    return share


def scorer(weights: Mapping[str, NDArray[Any]], max_history: int) -> Scorer:
    """Gives the runtime's own scores for these weights: what is evaluated is what the database will compute."""

    def score(history: History) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = score_users(weights, history, max_history=max_history)[0]
        return scores

    return score


def ranked_batches(holdout: Holdout, scorer: Scorer) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Gives the users batch by batch with their scores, [users of the batch, I]: -inf where an item is not ranked."""
    for part, history in histories(holdout):
        scores = scorer(history)
        leave_out(holdout, history, scores)
        yield part, scores


def histories(holdout: Holdout) -> Iterator[tuple[slice, History]]:
    """Gives the users batch by batch with their histories."""
    size = max(1, _SCORES_BYTES // (4 * len(holdout.before.item_keys)))
    for begin in range(0, len(holdout.users), size):
        part = slice(begin, begin + size)
        yield part, holdout.before.history(holdout.users[part])


def leave_out(holdout: Holdout, history: History, scores: NDArray[np.float32]) -> None:
    """Sets the scores of items that are not ranked to -inf, in place: seen ones, and those that no method can know."""
    scores[history.seen(holdout.seen)] = -np.inf
    scores[:, np.flatnonzero(holdout.item_share == 0)] = -np.inf


def best_items(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Gives the k best items of each user, best first, [U, k]; -1 where a user has no more items to rank."""
    items, values = forward.top_k(scores, k)
    found: NDArray[np.int64] = np.full((len(scores), k), -1)
    found[:, : items.shape[1]] = np.where(np.isneginf(values), -1, items)
    return found


def hits_of(best: NDArray[np.signedinteger], users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tells which of the best items, [U, k], are among the (user, item) pairs of the truth."""
    width = 1 + max(best.max(initial=0), items.max(initial=0))
    wanted = np.where(best >= 0, np.arange(len(best))[:, None] * width + best, -1)
    return np.isin(wanted, users * width + items)


def list_metrics(hits: NDArray[np.bool_], truth_count: NDArray[np.int64], k: int) -> dict[str, NDArray[np.float64]]:
    """Gives the metrics of the first k places of lists with these hits, [U, at least k], per user.

    With n items in the user's truth: recall is the hits over n, precision the hits over k, hit_rate whether there is
    one, mrr one over the rank of the first, map the sum over the hits of the precision up to them, over min(k, n),
    ndcg the discounted hits over those of min(k, n) hits at the top (recall and ndcg as He et al. 2020).
    """
    hits = hits[:, :k].astype(np.float64)
    rank = np.arange(1, k + 1)
    discount = 1.0 / np.log2(rank + 1)
    ideal = np.concatenate(([0.0], np.cumsum(discount)))
    possible = np.minimum(truth_count, k)
    found = hits.sum(axis=1)
    return {
        "recall": found / truth_count,
        "ndcg": hits @ discount / ideal[possible],
        "precision": found / k,
        "hit_rate": (found > 0).astype(np.float64),
        "mrr": (hits / rank).max(axis=1),
        "map": (hits * np.cumsum(hits, axis=1) / rank).sum(axis=1) / possible,
    }


def per_user_metrics(holdout: Holdout, scorer: Scorer, k: int) -> dict[str, NDArray[np.float64]]:
    """Gives the list metrics at k of each user of the holdout, all items ranked, seen ones masked."""
    hits = np.zeros((len(holdout.users), k), dtype=bool)
    for part, scores in ranked_batches(holdout, scorer):
        hits[part] = hits_of(best_items(scores, k), *holdout.truth(part))
    return list_metrics(hits, np.diff(holdout.truth_start), k)


def some_users(holdout: Holdout, most: int, seed: int) -> Holdout:
    """Gives the holdout of at most so many of its users, drawn by chance."""
    count = len(holdout.users)
    if count <= most:
        return holdout
    kept = np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
    lengths = np.diff(holdout.truth_start)
    chosen = np.repeat(np.isin(np.arange(count), kept), lengths)
    return replace(
        holdout,
        users=holdout.users[kept],
        truth_start=np.concatenate(([0], np.cumsum(lengths[kept]))),
        truth_item=holdout.truth_item[chosen],
    )
