"""Who will buy and who is leaving: the heads of the active version, asked about users (docs/outcomes.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import outcomes, runs
from .behaviour import behaviour_groups
from .errors import NO_OUTCOMES, ScoringError
from .history import read_histories, read_history
from .outcomes import Outlook
from .store import Version, active_version
from .tokens import SECONDS_PER_DAY, History

# (user key, probability of no purchase and of one, expected purchases, risk band, reasons, seconds since 1970 of the
# last event, cold start, version, item_offset, item_slope, horizon)
Row = tuple[
    str,
    float | None,
    float | None,
    float | None,
    str | None,
    str | None,
    float | None,
    bool,
    int,
    float | None,
    float,
    int,
]
_BATCH = 4096
_REASONS = 3
# A part of the logit from which on it is a reason: it changes the odds by a tenth.
_LEAST_REASON = 0.1


def version_with_heads(plpy: Any, model_id: int) -> Version:
    """Gives the active version; ScoringError where it has no heads."""
    version = active_version(plpy, model_id)
    if not outcomes.has_heads(version.weights):
        raise ScoringError(
            f"version {version.version} of model {version.model} has no calibrated probabilities: its events span fewer"
            " than four horizons, or too few users bought",
            sqlstate=NO_OUTCOMES,
            hint=f"pgvae train {version.model} says what is missing; a shorter horizon needs fewer days:"
            f""" select vae.set_options('{version.model}', '{{"horizon_days": 7}}'), then train again""",
        )
    return version


def look_ahead(version: Version, history: History, now: float | None = None) -> tuple[Outlook, NDArray[np.float64]]:
    """Gives what users will do, and from which moment on, [U]; `now` is in seconds since 1970."""
    horizon = outcomes.horizon_of(version.weights)
    as_of = outcomes.moments(
        history,
        now=time.time() if now is None else now,
        created_at=version.created_at,
        window_end=version.window_end,
        horizon=horizon,
    )
    found = outcomes.outlook(version.weights, history, as_of, targets=version.targets, types=len(version.event_types))
    return found, as_of


def churn_of_user(plpy: Any, version: Version, user_key: str) -> Row:
    """Gives the row of one user, with the rights of the caller."""
    (row,) = _rows(version, [user_key], read_history(plpy, version, user_key, all_items=True), time.time())
    return row


def churn_of_all(plpy: Any, version: Version) -> Iterator[Row]:
    """Gives a row per user."""
    now, done = time.time(), 0
    for users, history in read_histories(plpy, version, _BATCH, all_items=True):
        yield from _rows(version, users, history.distinct(), now)
        done += len(users)
        runs.report_progress(plpy, f"pgvae {version.model}: churn of {done} users")
    runs.record(version, "churn", done)


def _rows(version: Version, users: list[str], history: History, now: float) -> Iterator[Row]:
    found, as_of = look_ahead(version, history, now)
    slope = float(version.weights["item_slope"][0])
    horizon = outcomes.horizon_of(version.weights)
    reasons = reasons_of(version, found, history, as_of)
    last, _ = _last_times(version, history)
    columns = (found.purchase, found.expected, found.item_offset, last)
    for user, purchase, expected, offset, at, why in zip(
        users, *(column.tolist() for column in columns), reasons, strict=True
    ):
        if math.isnan(purchase):
            yield (user, None, None, None, None, None, None, True, version.version, None, slope, horizon)
            continue
        churn = 1.0 - purchase
        band = outcomes.risk_band(churn)
        texts = "; ".join(text for text, _ in why) or None
        yield (user, churn, purchase, expected, band, texts, at, False, version.version, offset, slope, horizon)


def reasons_of(
    version: Version,
    found: Outlook,
    history: History,
    as_of: NDArray[np.float64],
    *,
    most: int = _REASONS,
    least: float = _LEAST_REASON,
) -> list[list[tuple[str, float]]]:
    """Gives what speaks most for no purchase: of each user up to three (words, part of the logit), the greatest first.

    A part is how much more the numbers of a group speak for it than those of the average user.
    """
    types = sorted(version.event_types, key=lambda name: version.event_types[name])
    groups = behaviour_groups(len(types))
    weights = version.weights
    parts = -(found.behaviour - weights["behaviour_mean"]) * weights["purchase_behaviour"]
    by_group = np.column_stack([parts[:, columns].sum(axis=1) for columns in groups.values()])
    names = list(groups)
    # Where two groups say the same, their parts are one: of who never bought, and of whose last event is a purchase.
    last, last_purchase = _last_times(version, history)
    for same, kept, other in (
        (np.isneginf(last_purchase), "frequency", "purchase recency"),
        (last == last_purchase, "purchase recency", "recency"),
    ):
        into, out_of = names.index(kept), names.index(other)
        by_group[same, into] += by_group[same, out_of]
        by_group[same, out_of] = -math.inf
    order = np.argsort(-by_group, axis=1, kind="stable")[:, :most]
    facts = _facts(version, history, as_of)
    return [
        []
        if not history.counts[user]
        else [
            (_WORDS[names[group]].format(**fact), float(by_group[user, group]))
            for group in order[user].tolist()
            if by_group[user, group] > least
        ]
        for user, fact in enumerate(facts)
    ]


def explained(version: Version, history: History) -> list[tuple[int, str, float, int]]:
    """Gives (rank, reason, contribution, version) of one user, [1] history: all groups, those for no purchase first.

    There is one fewer where two groups say the same, see reasons_of.
    """
    if not history.counts[0]:
        return []
    found, as_of = look_ahead(version, history)
    words = reasons_of(version, found, history, as_of, most=len(_WORDS), least=-math.inf)[0]
    return [(rank, text, part, version.version) for rank, (text, part) in enumerate(words, start=1)]


_WORDS = {
    "recency": "{since_event}",
    "purchase recency": "{since_purchase}",
    "frequency": "{buying_days}",
    "activity": "{recent}",
    "tenure": "first seen {tenure} ago",
}


def _last_times(version: Version, history: History) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gives the times of the last event and of the last purchase, both [U], -infinity where there is none."""
    user, bought = history.users(), np.isin(history.event_type, version.targets)
    last, last_purchase = np.full((2, len(history.counts)), -np.inf)
    np.maximum.at(last, user, history.occurred_at)
    np.maximum.at(last_purchase, user[bought], history.occurred_at[bought])
    return last, last_purchase


def _facts(version: Version, history: History, as_of: NDArray[np.float64]) -> list[dict[str, str]]:
    """Gives what the words about each user speak of."""
    horizon = outcomes.horizon_of(version.weights)
    user = history.users()
    age = np.maximum(as_of[user] - history.occurred_at, 0.0) / SECONDS_PER_DAY
    bought = np.isin(history.event_type, version.targets)
    users = len(history.counts)
    since, since_purchase = np.full(users, np.inf), np.full(users, np.inf)
    tenure, since_first, buying_days, recent = np.zeros((4, users))
    np.minimum.at(since, user, age)
    np.minimum.at(since_purchase, user[bought], age[bought])
    np.maximum.at(since_first, user[bought], age[bought])
    np.maximum.at(tenure, user, age)
    for counted, chosen in ((buying_days, bought), (recent, age < horizon)):
        days = np.unique(user[chosen] * 1_000_000 + age[chosen].astype(np.int64)) // 1_000_000
        counted += np.bincount(days, minlength=users)
    columns = (since, since_purchase, since_first, buying_days, recent, tenure)
    return [
        {
            "since_event": f"last event {_days(event)} ago",
            "since_purchase": _purchases(purchase, first, int(days)),
            "buying_days": f"bought on {_days(days)} in all" if days else "no purchase yet",
            "recent": f"active on {_days(active)} of the last {horizon}",
            "tenure": _days(seen),
        }
        for event, purchase, first, days, active, seen in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _purchases(last: float, first: float, days: int) -> str:
    """Gives words for when somebody bought, `last` and `first` in days before, on so many days."""
    if days == 0:
        return "no purchase yet"
    if days == 1:
        return f"only purchase {_days(last)} ago"
    return f"last purchase {_days(last)} ago, with {_days((first - last) / (days - 1))} between two on average"


def _days(count: float) -> str:
    whole = int(count) if math.isfinite(count) else 0
    return "1 day" if whole == 1 else f"{whole} days"
