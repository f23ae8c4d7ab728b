"""From histories to scores: the pure part that live calls, refreshes and the trainer's evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import forward
from .forward import Array, Weights
from .tokens import History


def score_users(
    xp: Any, weights: Weights, history: History, *, max_history: int, out: Array | None = None
) -> tuple[Array, Array]:
    """Gives the scores of every item for U users, shape [U, I], and which users are cold starts, shape [U].

    A score is the item's share of the probability that the multinomial likelihood spreads over the catalogue:
    the shares of one user add up to 1. A user without events is a cold start: scored by features where there are some,
    else by each item's share of the catalogue's popularity.
    """
    tokens = history.tokens(max_history)
    logits = forward.decode(xp, weights, forward.encode(xp, weights, tokens), out=out)
    forward.add_shortcut(xp, weights, tokens, logits)
    scores = forward.softmax(xp, logits)
    cold = history.counts == 0
    unknown = cold if history.features is None else cold & (history.features.counts() == 0)
    scores[xp.asarray(unknown)] = weights["item_popularity"]
    return scores, xp.asarray(cold)


def mask_seen(xp: Any, scores: Array, history: History, targets: Sequence[int]) -> None:
    """Sets the scores of items on which a user already has an event of a target type to -1, in place."""
    users, items = history.seen(targets)
    scores[xp.asarray(users), xp.asarray(items)] = -1.0
