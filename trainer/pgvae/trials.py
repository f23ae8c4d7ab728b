"""Randomised experiments in a shop's events: who was shown an offer, from whom it was withheld, and who then bought.

An assignment is a user, an item and a moment, exposed or withheld by chance. Its outcome is whether the user bought the
item in the horizon after the moment. All that is said of an assignment, or decides whether it counts, was there before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pgvae.binary_copy import copy_rows
from pgvae.dataset import Dataset
from pgvae.outcome_windows import HORIZONS_NEEDED, Floats, end_of
from pgvae_runtime.tokens import SECONDS_PER_DAY, History

Integers = NDArray[np.int64]
# What an offer did years ago says little of the next one.
_HORIZONS_READ = 8
# Drawn by chance, whole users, where there are more.
_MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Assignments:
    """N assignments of users to exposed or withheld, by their numbers in a data set; `moment` in seconds since 1970."""

    user: Integers
    item: Integers
    moment: Floats
    exposed: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.user)

    def of(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Assignments:
        """Gives some of them."""
        return Assignments(
            user=self.user[rows], item=self.item[rows], moment=self.moment[rows], exposed=self.exposed[rows]
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Assignments that can be judged, [N], in the order of time, and whether the user bought the item then.

    `begin` is the moment of the first one, `before` what had happened until then: nothing in it is an outcome.
    """

    assignments: Assignments
    bought: NDArray[np.bool_]
    before: Dataset
    begin: float
    horizon: int

    @property
    def cells(self) -> Integers:
        """2 · exposed + bought of each assignment, [N]."""
        return 2 * self.assignments.exposed.astype(np.int64) + self.bought


def read_assignments(connection: psycopg.Connection, model: str) -> Assignments | None:
    """Gives the assignments of a model, in the transaction that read its data set; None where no column holds any.

    Left out are those of users and items without events, of whom there is nothing to say.
    """
    row = connection.execute("select exposure_column from vae.models where name = %s", [model]).fetchone()
    if row is None or row[0] is None:
        return None
    query = sql.SQL(
        "select u.user_index, i.item_index, extract(epoch from a.occurred_at)::float8, a.is_exposed::integer"
        " from {} a join pgvae_users u using (user_id) join pgvae_items i on i.item_key = a.item_id::text"
    ).format(sql.Identifier(model, "clean_assignments"))
    rows = copy_rows(connection, query, {"user": "i4", "item": "i4", "moment": "f8", "exposed": "i4"})
    return Assignments(
        user=rows["user"].astype(np.int64),
        item=rows["item"].astype(np.int64),
        moment=rows["moment"].astype(np.float64),
        exposed=rows["exposed"] > 0,
    )


def trial_of(dataset: Dataset, given: Assignments, *, horizon: int, seed: int) -> Trial | str:
    """Gives the assignments of a data set that can be judged; or says why there are none.

    These are the ones whose horizon is over, with four horizons of events before the first of them, of users who had
    events before the moment and of items that had some before `begin`. Of one user and item the next counts
    after the horizon of the one before.
    """
    length = horizon * SECONDS_PER_DAY
    if not len(given):
        return "there are no assignments of users with events"
    over = given.moment + length <= end_of(dataset)
    if not over.any():
        return f"the horizon of {horizon} days is not over for any assignment: train again then"
    found = given.of(over)
    least = max(
        float(dataset.occurred_at.min()) + HORIZONS_NEEDED * length,
        end_of(dataset) - _HORIZONS_READ * length,
    )
    found = found.of(found.moment >= least)
    if not len(found):
        return (
            f"no assignment has {HORIZONS_NEEDED} horizons of {horizon} days of events before it:"
            " load a longer history, or offer later"
        )
    begin = float(found.moment.min())
    before = dataset.between(-np.inf, begin)
    found = found.of(before.trained_items[found.item])
    first = np.full(dataset.user_count, np.inf)
    np.minimum.at(first, dataset.user, dataset.occurred_at)
    found = _without_repeats(found.of(first[found.user] < found.moment), length)
    if len(found) > _MOST:
        users = np.random.default_rng(seed).permutation(np.unique(found.user))
        number = np.empty(dataset.user_count, dtype=np.int64)
        number[users] = np.arange(len(users))
        order = np.argsort(number[found.user], kind="stable")
        last = number[found.user[order[_MOST]]]
        found = found.of(number[found.user] < last)
    if not len(found):
        return "there are no assignments of users and items that had events before"
    found = found.of(np.lexsort((found.item, found.user, found.moment)))
    return Trial(assignments=found, bought=_bought(dataset, found, length), before=before, begin=begin, horizon=horizon)


def _without_repeats(found: Assignments, length: float) -> Assignments:
    """Gives the first of the assignments of a user and an item, the first of those after its horizon, and so on."""
    found = found.of(np.lexsort((found.moment, found.item, found.user)))
    kept = np.ones(len(found), dtype=bool)
    user, item, until = -1, -1, -np.inf
    rows = zip(found.user.tolist(), found.item.tolist(), found.moment.tolist(), strict=True)
    for row, (own_user, own_item, moment) in enumerate(rows):
        if (own_user, own_item) == (user, item) and moment < until:
            kept[row] = False
        else:
            user, item, until = own_user, own_item, moment + length
    return found.of(kept)


def _bought(dataset: Dataset, found: Assignments, length: float) -> NDArray[np.bool_]:
    """Tells of each assignment whether its user has a target event on its item in [moment, moment + length)."""
    target = np.isin(dataset.event_type, dataset.targets)
    items = len(dataset.item_keys)
    pair = np.concatenate((found.user * items + found.item, (dataset.user * items + dataset.item)[target]))
    at = np.concatenate((found.moment, dataset.occurred_at[target]))
    is_event = np.arange(len(pair)) >= len(found)
    # Of one moment the assignment comes first.
    order = np.lexsort((is_event, at, pair))
    place = np.where(is_event[order], np.arange(len(order)), len(order))
    following = np.minimum.accumulate(place[::-1])[::-1]
    next_event = np.append(order, -1)[following]
    own = ~is_event[order]
    row, event = order[own], next_event[own]
    bought = np.zeros(len(found), dtype=bool)
    bought[row] = (event >= 0) & (pair[event] == pair[row]) & (at[event] < at[row] + length)
    return bought


def histories_before(dataset: Dataset, users: Integers, moments: Floats) -> History:
    """Gives the events of users strictly before a moment of each, [U]; a user may stand there with several."""
    rows, counts = dataset.rows_of(users)
    earlier = dataset.occurred_at[rows] < np.repeat(moments, counts)
    owner = np.repeat(np.arange(len(users)), counts)
    return dataset.history_of(users, rows[earlier], np.bincount(owner[earlier], minlength=len(users)))


def has_bought(history: History, owner: Integers, item: Integers, targets: Sequence[int]) -> NDArray[np.bool_]:
    """Tells of pairs of a history's user and an item, [N], whether the user has a target event on the item."""
    user, of_user = history.seen(targets)
    width = int(max(item.max(initial=0), of_user.max(initial=0))) + 1
    return np.isin(owner * width + item, user * width + of_user)
