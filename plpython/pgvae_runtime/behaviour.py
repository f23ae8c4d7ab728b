"""What a user did, in numbers that foretell whether and how often the user will buy (docs/outcomes.md).

The trainer fits its heads on the same numbers that the database computes again when it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tokens import SECONDS_PER_DAY, History

# Half-lives of the exponentially weighted counts, in horizons.
_HALF_LIVES = (0.25, 1.0, 4.0)
# A logarithm of such a count begins to grow from here.
_FLOOR = 0.05
# Counts of the latest events, in horizons.
_WIDTHS = (0.25, 1.0, 4.0)

_OF_ALL = (
    "has bought",
    "log days since the last event",
    "square of log days since the last event",
    "log days since the last purchase",
    "square of log days since the last purchase",
    "log days since the first event",
    "log days with events",
    "log days with purchases",
    "log purchases",
    "log items bought",
    "log mean days between purchases",
    "log days since the last purchase over the mean between",
    "days since the last event times days with purchases",
    *(f"log days with events in the last {width:g}" for width in _WIDTHS),
    *(f"log days with purchases in the last {width:g}" for width in _WIDTHS),
    *(f"log events, half-life {half_life:g}" for half_life in _HALF_LIVES),
    *(f"log days with purchases, half-life {half_life:g}" for half_life in _HALF_LIVES),
)
_OF_A_TYPE = ("log events", "log events in the last horizon", "log days since the last one")


def names(event_types: Sequence[str]) -> list[str]:
    """Gives the names of the B numbers of `behaviour`."""
    return [*_OF_ALL, *(f"{kind}: {name}" for kind in event_types for name in _OF_A_TYPE)]


def count(types: int) -> int:
    """Gives B for so many event types."""
    return len(_OF_ALL) + types * len(_OF_A_TYPE)


def behaviour_groups(types: int) -> dict[str, list[int]]:
    """Gives the columns of the numbers that speak of the same thing, by its name."""
    words = {
        # A week is long since the last purchase for who buys daily, and short for who buys twice a year.
        "purchase recency": ("since the last purchase", "days between purchases"),
        "recency": ("since the last event", "since the last one"),
        "tenure": ("since the first event",),
        "frequency": ("purchases", "bought"),
    }
    groups: dict[str, list[int]] = {name: [] for name in (*words, "activity")}
    for column, name in enumerate(names([str(kind) for kind in range(types)])):
        if "in the last" in name or "half-life" in name:
            group = "activity"
        else:
            group = next((group for group, own in words.items() if any(word in name for word in own)), "activity")
        groups[group].append(column)
    return groups


def behaviour(
    history: History, as_of: NDArray[np.float64], *, horizon: float, targets: Sequence[int], types: int
) -> NDArray[np.float64]:
    """Gives the B numbers of U users at the moments `as_of` [U], in seconds since 1970, shape [U, B].

    All are logarithms of days and counts, or their products; a user without events has zeros. `horizon` is in days,
    `types` is the number of event types.
    """
    users = len(history.counts)
    user = history.users()
    age = np.maximum(as_of[user] - history.occurred_at, 0.0) / SECONDS_PER_DAY
    bought = np.isin(history.event_type, targets)
    tenure = _least(-age, history.counts) * -1.0
    since = _least(age, history.counts)
    # Who never bought counts as somebody whose last purchase was before the first event.
    since_purchase = np.minimum(_least(np.where(bought, age, np.inf), history.counts), tenure + horizon)
    day_user, day_age = _days(user, age)
    buy_user, buy_age = _days(user[bought], age[bought])
    purchases = np.bincount(user[bought], minlength=users)
    buying_days = np.bincount(buy_user, minlength=users)
    first_purchase = -_least(np.where(bought, -age, np.inf), history.counts)
    gap = np.where(
        buying_days > 1, (first_purchase - since_purchase) / np.maximum(buying_days - 1, 1), tenure + horizon
    )
    items = int(history.item.max(initial=0)) + 1
    item_count = np.bincount(np.unique(user[bought] * items + history.item[bought]) // items, minlength=users)

    def recent(owner: NDArray[np.int64], ages: NDArray[np.float64], width: float) -> NDArray[np.float64]:
        return np.log1p(np.bincount(owner[ages < width * horizon], minlength=users))

    def level(owner: NDArray[np.int64], ages: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
        weights = 0.5 ** (ages / (half_life * horizon))
        found: NDArray[np.float64] = np.log1p(np.bincount(owner, weights=weights, minlength=users) / _FLOOR)
        return found

    log_since, log_since_purchase, log_buying = np.log1p(since), np.log1p(since_purchase), np.log1p(buying_days)
    columns: list[Any] = [
        purchases > 0,
        log_since,
        log_since**2,
        log_since_purchase,
        log_since_purchase**2,
        np.log1p(tenure),
        np.log1p(np.bincount(day_user, minlength=users)),
        log_buying,
        np.log1p(purchases),
        np.log1p(item_count),
        np.log1p(np.maximum(gap, 0.0)),
        log_since_purchase - np.log1p(np.maximum(gap, 0.0)),
        log_since * log_buying,
        *(recent(day_user, day_age, width) for width in _WIDTHS),
        *(recent(buy_user, buy_age, width) for width in _WIDTHS),
        *(level(user, age, half_life) for half_life in _HALF_LIVES),
        *(level(buy_user, buy_age, half_life) for half_life in _HALF_LIVES),
    ]
    for kind in range(types):
        own = history.event_type == kind
        last = _least(np.where(own, age, np.inf), history.counts)
        columns += [
            np.log1p(np.bincount(user[own], minlength=users)),
            recent(user[own], age[own], 1.0),
            np.log1p(np.minimum(last, tenure + horizon)),
        ]
    matrix: NDArray[np.float64] = np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])
    matrix[history.counts == 0] = 0.0
    return matrix


def _least(values: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gives the least of each user's values, [U]; 0 for a user without any."""
    least = np.zeros(len(counts))
    filled = counts > 0
    if filled.any():
        starts = np.cumsum(counts) - counts
        least[filled] = np.minimum.reduceat(values, starts[filled])
    return least


def _days(user: NDArray[np.int64], age: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Gives the (user, days ago) pairs of the different days, as two arrays; a day is 24 hours counted back."""
    day = age.astype(np.int64)
    width = int(day.max(initial=0)) + 1
    pairs = np.unique(user * width + day)
    return pairs // width, (pairs % width).astype(np.float64)
