"""From events to tokens: the one definition that training and scoring share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .features import FeatureBag
from .ragged import ranges, starts

AGE_BUCKETS = 12
ORDER_BUCKETS = 10
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Histories of U users as N tokens, users one after the other, each user's oldest event first.

    `start` has shape [U + 1]: user u owns the tokens start[u] to start[u + 1]. `item`, `event_type`, `age` and
    `order` have shape [N] and are rows of the embeddings of that name. `features` are the users'
    own; None: they have none.
    """

    start: NDArray[np.int64]
    item: NDArray[np.int64]
    event_type: NDArray[np.int64]
    age: NDArray[np.int64]
    order: NDArray[np.int64]
    features: FeatureBag | None = None

    @property
    def user_count(self) -> int:
        """The number of users, those without tokens included."""
        return len(self.start) - 1

    def users(self) -> NDArray[np.int64]:
        """Gives the user's number of each token, shape [N]."""
        return np.repeat(np.arange(self.user_count), np.diff(self.start))

    def latest_of_items(self) -> NDArray[np.bool_]:
        """Says which tokens are the latest of their user and item, shape [N]."""
        is_latest = np.zeros(len(self.item), dtype=bool)
        pairs = self.users() * (self.item.max(initial=0) + 1) + self.item
        order = np.argsort(pairs, kind="stable")
        pairs = pairs[order]
        is_latest[order[np.append(pairs[1:] != pairs[:-1], True)[: len(pairs)]]] = True
        return is_latest


def age_bucket(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Gives floor(log2(1 + age in days)), at most AGE_BUCKETS - 1, for ages in seconds, shape [N]."""
    bucket = np.log2(1.0 + np.maximum(seconds, 0.0) / SECONDS_PER_DAY).astype(np.int64)
    return np.minimum(bucket, AGE_BUCKETS - 1)


def order_bucket(moments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Gives the bucket of how many of the user's moments came after an event's: 0 to 4, then by powers of 2, [N]."""
    bucket = np.where(moments < 5, moments, 3 + np.log2(np.maximum(moments, 1)).astype(np.int64))
    return np.minimum(bucket, ORDER_BUCKETS - 1)


def recency_of_orders(exponent: float) -> NDArray[np.float32]:
    """Gives (1 + m)^-exponent of each order bucket, [O], for the m moments of a user that came after an event's.

    A bucket of several numbers stands for the one in its middle.
    """
    buckets = np.arange(ORDER_BUCKETS)
    moments = np.where(buckets < 5, buckets, 1.5 * 2.0 ** (buckets - 3))
    return ((1.0 + moments) ** -exponent).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class History:
    """Events of U users, users one after the other, in any order within a user.

    `counts` [U] says how many of the N events belong to each user. `item` and `event_type` [N] are rows of the
    embeddings of that name, or items behind the catalogue, see `of_known_items`; `occurred_at` [N] is in seconds since
    1970. `features` are the users' own, known without any event; None: they have none. `is_ordered` says that a user's
    events are in the order of the tokens already.
    """

    counts: NDArray[np.int64]
    item: NDArray[np.int64]
    event_type: NDArray[np.int64]
    occurred_at: NDArray[np.float64]
    features: FeatureBag | None = None
    is_ordered: bool = False

    @staticmethod
    def joined(parts: Sequence[History]) -> History:
        """Gives the history of the users of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        features = parts[0].features
        for part in parts[1:]:
            if features is not None and part.features is not None:
                features = features.followed_by(part.features)
        return History(
            counts=np.concatenate([part.counts for part in parts]),
            item=np.concatenate([part.item for part in parts]),
            event_type=np.concatenate([part.event_type for part in parts]),
            occurred_at=np.concatenate([part.occurred_at for part in parts]),
            features=features,
        )

    def users(self) -> NDArray[np.int64]:
        """Gives the user's number of each event, shape [N]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def take(self, users: NDArray[np.int64]) -> History:
        """Gives the history of the users with these numbers, in this order."""
        counts = self.counts[users]
        rows = ranges(starts(self.counts)[users], counts)
        return replace(
            self,
            counts=counts,
            item=self.item[rows],
            event_type=self.event_type[rows],
            occurred_at=self.occurred_at[rows],
            features=None if self.features is None else self.features.take(users),
        )

    def seen(self, targets: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gives the (user, item) pairs of the events whose type is one of `targets`, as two arrays."""
        chosen = np.isin(self.event_type, targets)
        return self.users()[chosen], self.item[chosen]

    def of_known_items(self, catalogue_size: int) -> History:
        """Gives the history without events on items behind the catalogue, which can be counted and not be scored."""
        known = self.item < catalogue_size
        if known.all():
            return self
        return replace(
            self,
            counts=np.bincount(self.users()[known], minlength=len(self.counts)),
            item=self.item[known],
            event_type=self.event_type[known],
            occurred_at=self.occurred_at[known],
        )

    def distinct(self) -> History:
        """Gives the history with each event once, in the order of the tokens: a table may hold an event twice."""
        if self._is_later_each():
            return replace(self, is_ordered=True)
        order, user = self.order(), self.users()
        user, item, event_type, at = user[order], self.item[order], self.event_type[order], self.occurred_at[order]
        is_new = np.ones(len(user), dtype=bool)
        is_new[1:] = (
            (at[1:] != at[:-1])
            | (item[1:] != item[:-1])
            | (event_type[1:] != event_type[:-1])
            | (user[1:] != user[:-1])
        )
        return History(
            counts=np.bincount(user[is_new], minlength=len(self.counts)),
            item=item[is_new],
            event_type=event_type[is_new],
            occurred_at=at[is_new],
            features=self.features,
            is_ordered=True,
        )

    def _is_later_each(self) -> bool:
        """Says whether each event of a user is later than the one before it, as an index on both gives them."""
        is_later = np.ones(len(self.item), dtype=bool)
        is_later[1:] = self.occurred_at[1:] > self.occurred_at[:-1]
        begins = starts(self.counts)[:-1]
        is_later[begins[begins < len(is_later)]] = True
        return bool(is_later.all())

    def order(self) -> NDArray[np.int64]:
        """Gives the events' order by user, time, item and event type."""
        if self.is_ordered:
            return np.arange(len(self.item))
        return np.lexsort((self.event_type, self.item, self.occurred_at, self.users()))

    def tokens(self, max_history: int) -> Tokens:
        """Gives the tokens of the latest `max_history` events of each user.

        Events of one moment are put in the order of item and event type, so that the same events give the same
        tokens however they were read.

        An age counts from the user's own last event, not from the clock: a shop's history of years ago, or a
        model that is a month old, then looks to the model as it did in training.
        """
        counts = self.counts
        order = self.order()
        start = starts(counts)
        if counts.max(initial=0) > max_history:
            # Sorting keeps users in place, so the distance to a user's end says whether a token is among the latest.
            from_end = np.repeat(start[1:], counts) - np.arange(len(order))
            order = order[from_end <= max_history]
            counts = np.minimum(counts, max_history)
            start = starts(counts)
        at = self.occurred_at[order]
        last = np.repeat(start[1:] - 1, counts)
        # Counts the distinct times: the lines of one order are equally recent.
        moment = np.cumsum(np.concatenate(([False], at[1:] != at[:-1]))) if len(at) else np.zeros(0, dtype=np.int64)
        return Tokens(
            start=start,
            item=self.item[order],
            event_type=self.event_type[order],
            age=age_bucket(at[last] - at),
            order=order_bucket(moment[last] - moment),
            features=self.features,
        )
