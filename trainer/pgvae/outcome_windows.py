"""Windows of time from which the heads of a version learn (docs/outcomes.md).

A window is a moment t: what the heads read is the history before t, the truth is what happened in the horizon after.
Windows stand side by side, back from the newest event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae_runtime.behaviour import behaviour
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import SECONDS_PER_DAY, History

Weights = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]

# One to check, one to calibrate, one to fit, and one of history before it.
HORIZONS_NEEDED = 4
# Windows that fit, at most: what happened two years ago says little of the next month.
_WINDOWS_FITTED = 8
# Users of a window, drawn by chance where there are more.
_MOST_USERS = 20_000
# With fewer buyers, or fewer users who do not buy, in a window there is nothing to fit to.
MIN_EACH = 10
_BATCH = 1024
# Scores at once: with what is made of them some 30 bytes each.
_SCORES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Window:
    """Users with events before a moment, and what they bought in the horizon after it.

    `users` [U] are the users, `history` their events before, `purchases` [U] the numbers of their purchases after,
    `bought_user` and `bought_item` [N] the different (row of `users`, item) pairs of these.
    """

    moment: float
    users: NDArray[np.int64]
    history: History
    purchases: NDArray[np.int64]
    bought_user: NDArray[np.int64]
    bought_item: NDArray[np.int64]

    def of(self, rows: NDArray[np.int64]) -> Window:
        """Gives the part of some users, whose rows are in ascending order."""
        place = np.full(len(self.users), -1)
        place[rows] = np.arange(len(rows))
        own = place[self.bought_user] >= 0
        return Window(
            moment=self.moment,
            users=self.users[rows],
            history=self.history.take(rows),
            purchases=self.purchases[rows],
            bought_user=place[self.bought_user[own]],
            bought_item=self.bought_item[own],
        )

    @property
    def has_bought(self) -> Floats:
        """1 for whom there was a purchase, else 0, [U]."""
        return (self.purchases > 0).astype(np.float64)

    @property
    def as_of(self) -> Floats:
        """The moment for each user, [U]."""
        return np.full(len(self.users), self.moment)


def read_window(dataset: Dataset, moment: float, horizon: int, seed: int) -> Window:
    """Gives the window of a data set that begins its horizon at a moment, in seconds since 1970."""
    before = dataset.between(-np.inf, moment)
    users = np.unique(before.user)
    if len(users) > _MOST_USERS:
        users = np.sort(np.random.default_rng(seed).choice(users, _MOST_USERS, replace=False))
    after = dataset.between(moment, moment + horizon * SECONDS_PER_DAY)
    chosen = np.isin(after.event_type, dataset.targets) & np.isin(after.user, users)
    row = np.searchsorted(users, after.user[chosen])
    items = len(dataset.item_keys)
    pairs = np.unique(row * items + after.item[chosen])
    return Window(
        moment=moment,
        users=users,
        history=before.history(users),
        purchases=np.bincount(row, minlength=len(users)),
        bought_user=pairs // items,
        bought_item=pairs % items,
    )


def windows(dataset: Dataset, horizon: int, seed: int, *, most: int = _WINDOWS_FITTED + 2) -> list[Window]:
    """Gives the windows side by side, newest first; the oldest has a horizon of history before it, or more."""
    end = end_of(dataset)
    count = int((end - dataset.occurred_at.min()) / SECONDS_PER_DAY // horizon) - 1
    return [
        read_window(dataset, end - number * horizon * SECONDS_PER_DAY, horizon, seed)
        for number in range(1, min(count, most) + 1)
    ]


def too_little(dataset: Dataset, horizon: int, seed: int) -> str:
    """Says why there is too little in a data set for heads of a horizon; empty where there is enough."""
    span = (dataset.occurred_at.max() - dataset.occurred_at.min()) / SECONDS_PER_DAY
    if span < HORIZONS_NEEDED * horizon:
        needed = HORIZONS_NEEDED * horizon
        return (
            f"the events span {int(span)} days, {HORIZONS_NEEDED} horizons of {horizon} days are {needed}:"
            f" {later_or_shorter(span)}"
        )
    for window in windows(dataset, horizon, seed, most=3):
        buyers = int(window.has_bought.sum())
        others = len(window.users) - buyers
        if min(buyers, others) < MIN_EACH:
            return (
                f"in one of the newest three horizons of {horizon} days {buyers} users bought and {others} did not,"
                f" {MIN_EACH} of each are needed"
            )
    return ""


def later_or_shorter(span: float) -> str:
    """Says what to do where so many days are less than the horizons that are needed."""
    longest = int(span // HORIZONS_NEEDED)
    shorter = f", or after vae.set_options with horizon_days of at most {longest}" if longest else ""
    return f"train again then{shorter}"


def newest_moment(dataset: Dataset, horizon: int) -> float:
    """Gives the beginning of the newest horizon, in seconds since 1970."""
    return end_of(dataset) - horizon * SECONDS_PER_DAY


def end_of(dataset: Dataset) -> float:
    return float(np.nextafter(dataset.occurred_at.max(), np.inf))


@dataclass(frozen=True, kw_only=True)
class Setting:
    dataset: Dataset
    horizon: int
    max_history: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A window, and the behaviour of its users as the heads see it, [U, B]."""

    window: Window
    behaviour: Floats


def as_seen(window: Window, setting: Setting) -> Seen:
    dataset = setting.dataset
    return Seen(
        window=window,
        behaviour=behaviour(
            window.history,
            window.as_of,
            horizon=setting.horizon,
            targets=dataset.targets,
            types=len(dataset.event_types),
        ),
    )


def in_half(users: NDArray[np.int64], half: int | None) -> NDArray[np.bool_]:
    """Tells which users are in one half of all, 0 or 1, by their number; without a half all are."""
    return np.ones(len(users), dtype=bool) if half is None else users % 2 == half


def score_parts(
    history: History, users: NDArray[np.int64], weights: Weights, setting: Setting
) -> Iterator[tuple[NDArray[np.int64], History, NDArray[np.float32]]]:
    """Gives some of a history's users in batches, with the part of it that is theirs, and the runtime's scores of all
    items for them.
    """
    size = max(1, min(_BATCH, _SCORES // len(weights["item_popularity"])))
    for begin in range(0, len(users), size):
        chosen = users[begin : begin + size]
        part = history.take(chosen)
        yield chosen, part, score_users(weights, part, max_history=setting.max_history)[0]


def log_loss(p: Floats, y: Floats) -> Floats:
    """Gives the log-loss in nats of each probability."""
    p = np.clip(p, 1e-7, 1.0 - 1e-7)
    loss: Floats = -(y * np.log(p) + (1.0 - y) * np.log1p(-p))
    return loss
