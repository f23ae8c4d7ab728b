"""Whom to offer what: the users who are likeliest to buy one of some items, and those of a model's offers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import limits, outcomes, runs
from .batch import report_progress
from .churn import look_ahead
from .errors import INVALID_PARAMETER, ScoringError
from .history import item_indexes, read_histories, read_history, unknown_items
from .scoring import score_users
from .store import Version, execute
from .tokens import History

# (rank, user key, response probability, whether the user bought one of the items before, version)
Row = tuple[int, str, float, bool, int]
# (number of the offer, and the same)
OfferRow = tuple[int, int, str, float, bool, int]
# Users of a batch.
_USERS = 512

_OFFERS = """
select o.offer_id, o.name, o.item_keys, o.max_users, o.exclude_buyers
from vae.offers o
where o.model_id = $1 and (o.ends_at is null or o.ends_at > statement_timestamp())
order by o.offer_id
"""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """An offer that has not ended: what of it a refresh needs."""

    offer_id: int
    name: str
    item_keys: list[str]
    max_users: int
    exclude_buyers: bool


def read_offers(plpy: Any, model_id: int) -> list[Offer]:
    """Gives the offers of a model that have not ended."""
    return [Offer(**row) for row in execute(plpy, _OFFERS, ["integer"], [model_id])]


def offered_items(plpy: Any, version: Version, what: str, item_keys: Sequence[str | None]) -> NDArray[np.int64]:
    """Gives the rows of some items; ScoringError where there is none, one is null, unknown or stands there twice."""
    if not item_keys:
        raise ScoringError(f"{what} names no item", sqlstate=INVALID_PARAMETER, hint="name one or more items")
    indexes = item_indexes(plpy, version, {key for key in item_keys if key is not None})
    # In the order of the items.
    seen: dict[str, None] = {}
    for key in item_keys:
        if key is None or key in seen:
            raise ScoringError(
                f"{what} names item {'null' if key is None else key}{'' if key is None else ' twice'}",
                sqlstate=INVALID_PARAMETER,
                hint="name each item once",
            )
        seen[key] = None
        if key not in indexes:
            raise unknown_items(version, [key])
    return np.array([indexes[key] for key in seen], dtype=np.int64)


def response_of(plpy: Any, version: Version, user_key: str, items: NDArray[np.int64]) -> float | None:
    """Gives P(the user buys one of the items within the horizon); None for a user without known events."""
    history = read_history(plpy, version, user_key)
    probability = _responses(version, history, [items], time.time())[0, 0]
    return None if np.isnan(probability) else float(probability)


class Best:
    """The k users with the highest probabilities so far, and whether they bought one of the items before."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._users: list[str] = []
        self._probability = [np.zeros(0)]
        self._has_bought = [np.zeros(0, dtype=bool)]

    def add(self, users: list[str], probability: NDArray[np.float64], has_bought: NDArray[np.bool_]) -> None:
        """Takes more users; nan is left out. Of equal probabilities the first come first."""
        known = np.flatnonzero(~np.isnan(probability))
        self._users += [users[place] for place in known.tolist()]
        self._probability.append(probability[known])
        self._has_bought.append(has_bought[known])
        # Not each time: the time would grow with k times the users.
        if len(self._users) >= 2 * self._k:
            self._keep()

    def _keep(self) -> None:
        probability, has_bought = np.concatenate(self._probability), np.concatenate(self._has_bought)
        order = np.argsort(-probability, kind="stable")[: self._k]
        self._users = [self._users[place] for place in order.tolist()]
        self._probability, self._has_bought = [probability[order]], [has_bought[order]]

    def rows(self) -> Iterator[tuple[int, str, float, bool]]:
        """Gives (rank, user key, probability, whether the user bought one before)."""
        self._keep()
        (probability,), (has_bought,) = self._probability, self._has_bought
        for rank, row in enumerate(zip(self._users, probability.tolist(), has_bought.tolist(), strict=True), start=1):
            yield rank, *row


def audience_of(
    plpy: Any, version: Version, items: NDArray[np.int64], k: int, *, exclude_buyers: bool, min_probability: float
) -> Iterator[Row]:
    """Gives the k users who are likeliest to buy one of the items within the horizon, of all users."""
    (best,) = _best_of_all(plpy, version, [items], [k], [exclude_buyers], "audience")
    for rank, user, probability, has_bought in best.rows():
        if probability >= min_probability:
            yield rank, user, probability, has_bought, version.version


def offer_responses(plpy: Any, version: Version, offers: Sequence[Offer]) -> Iterator[OfferRow]:
    """Gives the users of each offer, found in one pass over all users.

    An offer of an item that the version does not know is left out, with a notice.
    """
    known, items = [], []
    for offer in offers:
        try:
            items.append(offered_items(plpy, version, f"offer {offer.name}", offer.item_keys))
        except ScoringError as error:
            plpy.notice(f"offer {offer.name} is left out: {error.message}", hint=error.hint)
            continue
        known.append(offer)
    ks = [offer.max_users for offer in known]
    found = _best_of_all(plpy, version, items, ks, [offer.exclude_buyers for offer in known], "offers")
    done = 0
    for offer, best in zip(known, found, strict=True):
        for rank, user, probability, has_bought in best.rows():
            yield offer.offer_id, rank, user, probability, has_bought, version.version
            done += 1
    runs.record(version, "offer_responses", done)


def _best_of_all(
    plpy: Any,
    version: Version,
    items: Sequence[NDArray[np.int64]],
    ks: Sequence[int],
    exclude_buyers: Sequence[bool],
    what: str,
) -> list[Best]:
    """Gives the best users for each of N sets of items, in one pass over all users."""
    best = [Best(k) for k in ks]
    if not best:
        return best
    now, done = time.time(), 0
    # Logits, scores and what the softmax makes of them.
    size = limits.users_at_once(plpy, 4 * 4 * version.item_count, _USERS)
    for users, events in read_histories(plpy, version, size):
        history = events.distinct()
        found = _responses(version, history, items, now)
        for column, (own, wanted) in enumerate(zip(best, items, strict=True)):
            has_bought = _has_bought(version, history, wanted)
            probability = found[:, column]
            if exclude_buyers[column]:
                probability = np.where(has_bought, np.nan, probability)
            own.add(users, probability, has_bought)
        done += len(users)
        report_progress(plpy, f"pgvae {version.model}: {what}, {done} users")
    return best


def _responses(
    version: Version, history: History, items: Sequence[NDArray[np.int64]], now: float
) -> NDArray[np.float64]:
    """Gives P(user buys one of the items within the horizon), [U, N], for N sets of items; nan for unknown users."""
    scores, _ = score_users(np, version.weights, history, max_history=version.max_history)
    found, _ = look_ahead(version, history, now)
    return np.column_stack([outcomes.any_probability(version.weights, found, scores[:, own]) for own in items])


def _has_bought(version: Version, history: History, items: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tells which users have an event of a target type on one of the items, [U]."""
    chosen = np.isin(history.item, items) & np.isin(history.event_type, version.targets)
    return np.bincount(history.users()[chosen], minlength=len(history.counts)) > 0
