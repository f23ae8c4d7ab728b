"""From histories to scores: the pure part that live calls, refreshes and the trainer's evaluation share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import forward
from .forward import Array, Weights
from .store import Version
from .tokens import History


def score_users(weights: Weights, history: History, *, max_history: int) -> tuple[Array, Array]:
    """Gives the scores of every item for U users, shape [U, I], and which users are cold starts, shape [U].

    A score is the item's share of the probability that the multinomial likelihood spreads over the catalogue:
    the shares of one user add up to 1. A user without events is a cold start: scored by features where there are some,
    else by each item's share of the catalogue's popularity.
    """
    tokens = history.tokens(max_history)
    logits = forward.decode(weights, forward.encode(weights, tokens))
    forward.add_shortcut(weights, tokens, logits)
    scores = forward.softmax(logits)
    scores[unknown_users(history)] = weights["item_popularity"]
    return scores, history.counts == 0


def unknown_users(history: History) -> NDArray[np.bool_]:
    """Tells of whom neither an event nor a feature is known, [U]: they are scored by popularity."""
    cold: NDArray[np.bool_] = history.counts == 0
    if history.features is not None:
        cold &= history.features.counts() == 0
    return cold


# (version, the history's arrays, scores [1, I]) of the user who was scored last by score_again.
_last: tuple[int, tuple[bytes, ...], Array] | None = None


def score_again(version: Version, history: History) -> Array:
    """Gives the scores of one user, [1, I], from memory where the last call was about the same history.

    A query that asks for many items of one user encodes the user once. What changed in between changes the history.
    """
    global _last
    arrays = [history.item, history.event_type, history.occurred_at]
    if history.features is not None:
        arrays.append(history.features.token)
    known = tuple(array.tobytes() for array in arrays)
    if _last is None or _last[:2] != (version.version_id, known):
        scores, _ = score_users(version.weights, history, max_history=version.max_history)
        _last = version.version_id, known, scores
    return _last[2]


def mask_seen(
    scores: Array, history: History, targets: Sequence[int], columns: NDArray[np.int64] | None = None
) -> None:
    """Sets the scores of items on which a user already has an event of a target type to -1, in place."""
    users, places = seen_columns(history, targets, columns)
    scores[users, places] = -1.0


def seen_columns(
    history: History, targets: Sequence[int], columns: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Gives (user, column of the scores) of the items on which a user has an event of a target type.

    `columns` [I] says in which column an item stands, -1: in none; None: item i stands in column i.
    """
    users, items = history.seen(targets)
    if columns is None:
        return users, items
    places = columns[items]
    return users[places >= 0], places[places >= 0]
