"""What a method's lists and scores are worth, user by user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgvae.ranking import Holdout, Scorer, best_items, hits_of, list_metrics, ranked_batches

# Bins of probabilities: bin b holds those around 4 to the power of -b, the last one all that are smaller.
BINS = 16
# A share of nothing would be infinitely wrong about an item that was bought.
LEAST_SHARE = 1e-9
_EDGES = (0.5 * 0.25 ** np.arange(BINS - 2, -1, -1)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one method gave for U users.

    `best` [U, K] are the items of the lists, -1 where there are no more. `values` holds a metric of each user, [U], by
    its name and k (0 where it has none); `coverage` the share of the known items that are in anybody's list, by k.
    `reliability` [BINS, 2] is, for scores that are probabilities, the probability that was given to all users' items
    and the probability that it should have been, by the size of what was given.
    """

    best: NDArray[np.int32]
    values: dict[tuple[str, int], NDArray[np.float64]]
    coverage: dict[int, float]
    reliability: NDArray[np.float64] | None


def measure(holdout: Holdout, scorer: Scorer, ks: Sequence[int], *, are_probabilities: bool) -> Measurement:
    """Ranks all items for all users of a holdout, seen ones masked, and measures the lists and the scores.

    Scores that are probabilities are taken as shares among the ranked items: the probability that the user's next
    target event on a new item is on this one. What happened is that each item of the truth was next equally often.
    """
    users = len(holdout.users)
    truth_count = np.diff(holdout.truth_start)
    best = np.empty((users, max(ks)), dtype=np.int32)
    hits = np.empty((users, max(ks)), dtype=bool)
    auc, log_loss, brier = np.empty((3, users))
    reliability = np.zeros((BINS, 2))
    for part, scores in ranked_batches(holdout, scorer):
        truth = holdout.truth(part)
        best[part] = best_items(scores, max(ks))
        hits[part] = hits_of(best[part], *truth)
        ordered = np.sort(scores, axis=1)
        auc[part] = area_under_curve(ordered, truth[0], scores[truth])
        if are_probabilities:
            scale = scale_of(scores)
            given = np.maximum(scores[truth], 0.0) * scale[truth[0]]
            ordered = np.maximum(ordered, 0.0, out=ordered)
            ordered *= scale[:, None]
            log_loss[part], brier[part] = probability_losses(ordered, truth[0], given)
            reliability += binned(ordered, truth[0], given)
    values = {("auc", 0): auc} | ({("log_loss", 0): log_loss, ("brier", 0): brier} if are_probabilities else {})
    for k in ks:
        values |= {(name, k): value for name, value in list_metrics(hits, truth_count, k).items()}
        values["novelty", k] = self_information(best[:, :k], holdout.item_share)
    known = np.count_nonzero(holdout.item_share)
    return Measurement(
        best=best,
        values=values,
        coverage={k: len(np.setdiff1d(best[:, :k], [-1])) / known for k in ks},
        reliability=reliability if are_probabilities else None,
    )


def area_under_curve(
    ordered: NDArray[np.float32], users: NDArray[np.int64], own: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Gives the share of the (truth item, other ranked item) pairs that are in the right order, per user; ties half.

    `ordered` [U, I] are the scores of each user in ascending order, `own` those of the truth items of `users`. A user
    with no other ranked item gets 0.5.
    """
    ends = np.searchsorted(users, np.arange(len(ordered) + 1))
    area = np.full(len(ordered), 0.5)
    for user, row in enumerate(ordered):
        of_user = own[ends[user] : ends[user + 1]]
        masked, count = np.searchsorted(row, -np.inf, "right"), len(of_user)
        others = len(row) - masked - count
        if others:
            below = (np.searchsorted(row, of_user, "left") + np.searchsorted(row, of_user, "right")).sum() / 2
            # Among the truth items themselves there are half as many right orders as pairs, each with itself included.
            area[user] = (below - count * masked - count**2 / 2) / (count * others)
    return area


def scale_of(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives what turns the scores of each user's ranked items into shares of their sum, [U]."""
    totals = np.maximum(scores, 0.0).sum(axis=1)
    scale: NDArray[np.float32] = 1.0 / np.maximum(totals, np.float32(1e-30))
    return scale


def probability_losses(
    shares: NDArray[np.float32], users: NDArray[np.int64], given: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gives the log-loss, in nats, and the Brier score of each user's mean truth item.

    `shares` [U, I] are what each user's items were given, in any order, `given` what the truth items of `users` were.
    Log-loss is -ln of the item's share, at least 1e-9; Brier is the sum over the catalogue of the squared differences
    of the share and 1 for that item, 0 for the others: 0 to 2 (Brier 1950).
    """
    given = given.astype(np.float64)
    count = np.bincount(users, minlength=len(shares))
    log_loss = np.bincount(users, weights=-np.log(np.maximum(given, LEAST_SHARE)), minlength=len(shares)) / count
    mean = np.bincount(users, weights=given, minlength=len(shares)) / count
    return log_loss, np.einsum("ui,ui->u", shares, shares, dtype=np.float64) - 2.0 * mean + 1.0


def binned(ordered: NDArray[np.float32], users: NDArray[np.int64], given: NDArray[np.float32]) -> NDArray[np.float64]:
    """Gives the sums of the shares and of what they should have been, by the bin of the share, [BINS, 2].

    `ordered` [U, I] are the shares of each user in ascending order, `given` those of the truth items of `users`.
    """
    sums = np.zeros(BINS)
    for row in ordered:
        ends = np.searchsorted(row, _EDGES, "left")
        running = np.concatenate(([0.0], np.cumsum(row, dtype=np.float64)))
        sums += np.diff(running[ends], prepend=0.0, append=running[-1])
    happened = np.bincount(
        np.searchsorted(_EDGES, given, "right"), weights=1.0 / np.bincount(users)[users], minlength=BINS
    )
    return np.column_stack((sums, happened)).astype(np.float64)[::-1]


def calibration_error(reliability: NDArray[np.float64]) -> float:
    """Gives the share of the probability that lies in the wrong bins: half the sum of the bins' absolute differences.

    0 where what was given a probability of around p happens that often, for every p; at most 1.
    """
    given, happened = reliability.T
    return float(np.abs(given - happened).sum() / (2.0 * max(happened.sum(), 1e-30)))


def self_information(best: NDArray[np.int32], item_share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives the mean of -log2 of the share of users who know the item, over each list (Zhou et al. 2010)."""
    bits = np.zeros(len(item_share))
    np.log2(item_share, out=bits, where=item_share > 0)
    filled = best >= 0
    mean: NDArray[np.float64] = np.where(filled, -bits[best], 0.0).sum(axis=1) / filled.sum(axis=1)
    return mean
