"""The best items of a user, or of many, as live calls give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, churn, limits, outcomes, runs
from .filters import Candidates, Filters, best_items, keep_candidates, read_candidates
from .history import read_chosen
from .scoring import mask_seen, score_users
from .session import check_flat
from .store import Version
from .tokens import History

# (rank, item key, score, whether the user is a cold start, version)
Row = tuple[int, str, float, bool, int]
# The same and the probability, None where the version has no heads and for a user without events.
ProbableRow = tuple[int, str, float, bool, int, float | None]

# Users of a batch: more would hold up a cancel.
_FEW = 128


def chosen_candidates(plpy: Any, version: Version, filters: Filters) -> Candidates | None:
    """Gives the candidate set that a call names, None for the whole catalogue."""
    return None if filters.candidates is None else read_candidates(plpy, version, filters.candidates)


def best_lists(
    plpy: Any, version: Version, history: History, k: int, filters: Filters, candidates: Candidates | None
) -> Iterator[tuple[list[Row], NDArray[np.floating[Any]]]]:
    """Gives each user's rows, best first, and their shares of the whole catalogue, [1, N]."""
    scores, cold = score_users(version.weights, history, max_history=version.max_history)
    shares = scores.copy() if candidates is not None else scores
    if candidates is not None:
        keep_candidates(scores, candidates)
    if filters.exclude_seen:
        mask_seen(scores, history, version.targets)
    for user in range(len(cold)):
        best = best_items(plpy, version, scores[user : user + 1], k, filters)
        items = [item for item, _ in best]
        keys = version.item_keys.of_items(items)
        yield (
            [
                (rank, keys[item], value, bool(cold[user]), version.version)
                for rank, (item, value) in enumerate(best, start=1)
            ],
            shares[user : user + 1, items],
        )


def probable_lists(
    plpy: Any, version: Version, history: History, k: int, filters: Filters, candidates: Candidates | None
) -> Iterator[list[ProbableRow]]:
    """Gives each user's rows, with the probabilities.

    The history holds events on items behind the catalogue too: whoever buys something that is newer than the version
    is no less likely to buy again.
    """
    found = None
    if outcomes.has_heads(version.weights) and history.counts.any():
        found, _ = churn.look_ahead(version, history)
    known = history.of_known_items(version.catalogue_size)
    for user, (rows, shares) in enumerate(best_lists(plpy, version, known, k, filters, candidates)):
        probabilities: list[float | None] = [None] * len(rows)
        if found is not None and history.counts[user]:
            own = found.of(np.array([user]))
            probabilities = outcomes.item_probability(version.weights, own, shares)[0].tolist()
        yield [(*row, probability) for row, probability in zip(rows, probabilities, strict=True)]


def lists_of_users(
    plpy: Any, version: Version, user_keys: Sequence[str | None], k: int, filters: Filters
) -> Iterator[tuple[str, int, str, float, bool, int, float | None]]:
    """Gives (user key, …) of the best items of each of these users, a user once, one user after the other."""
    check_flat("user_ids", user_keys)
    users = list(dict.fromkeys(key for key in user_keys if key is not None))
    candidates = chosen_candidates(plpy, version, filters)
    done = 0
    with blas.one_thread():
        # Logits, scores, what the softmax makes of them, and the shares.
        size = limits.users_at_once(plpy, 5 * 4 * version.item_count, _FEW)
        for keys, history in read_chosen(plpy, version, users, size, all_items=True):
            lists = probable_lists(plpy, version, history.distinct(), k, filters, candidates)
            for key, rows in zip(keys, lists, strict=True):
                for row in rows:
                    yield key, *row
            done += len(keys)
            runs.report_progress(plpy, f"pgvae {version.model}: {done} users scored")
