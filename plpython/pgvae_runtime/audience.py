"""Whom to offer what: the users who are likeliest to buy one of some items, and those of a model's offers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, outcomes, runs, uplift
from .batch import Batch, score_on_cpu
from .churn import look_ahead
from .cpu import CpuScorer
from .errors import (
    INSUFFICIENT_PRIVILEGE,
    INVALID_PARAMETER,
    NO_UPLIFT,
    QUERY_CANCELED,
    UNDEFINED_COLUMN,
    UNKNOWN_ITEM,
    ScoringError,
)
from .history import read_histories, read_history, unknown_items
from .scoring import score_users
from .session import check_flat
from .store import Version, execute
from .tokens import History

# (rank, user key, response probability, whether the user bought one of the items before, version, uplift)
Row = tuple[int, str, float, bool, int, float | None]
# (number of the offer, and the same)
OfferRow = tuple[int, int, str, float, bool, int, float | None]
# What users are ranked by.
RESPONSE, UPLIFT = "response", "uplift"
# Of N sets of items: P(the user buys one), whether the user did before, and the uplift of an offer, [U, N] each.
_Answers = tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]

_OFFERS = """
select o.offer_id, o.name, o.item_keys, o.max_users, o.exclude_buyers, o.choose_by,
    case when o.among_table is not null then pg_catalog.format('%I.%I', o.among_schema, o.among_table) end as among,
    o.among_column as among_key
from vae.offers o
where o.model_id = $1 and (o.ends_at is null or o.ends_at > statement_timestamp())
order by o.offer_id
"""


# The column is the one that is named, else the one that the events call so, else user_id.
_RELATION = """
select r.relation::text as name, vae_private.named_key(r.relation, $2, m.user_id_column, 'user_id') as column
from (select $1::regclass as relation) r
cross join vae.models m
where m.model_id = $3
"""
# Spelled as the shop's own type spells them.
_USERS = """
select array_agg(distinct u.{column}::{key_type}::text) as users
from {relation} u
where u.{column} is not null{fitting}
"""
# Of a model whose keys are integer, where a relation may hold any bigint: one that is none of its users is no error.
_INTEGERS = "\n    and u.{column}::bigint between -2147483648 and 2147483647"
# Why an offer is left out of a refresh: classes of errors that stay until somebody mends their cause (data, names and
# rights, a schema that is gone), and what a version cannot tell. A lock or a lack of memory passes: whoever left the
# offer out for that would empty it until the next refresh.
_LASTING = ("22", "42", "3F", UNKNOWN_ITEM, NO_UPLIFT)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """An offer that has not ended: what of it a refresh needs."""

    offer_id: int
    name: str
    item_keys: list[str]
    max_users: int
    exclude_buyers: bool
    choose_by: str
    among: str | None
    among_key: str | None


def read_offers(plpy: Any, model_id: int) -> list[Offer]:
    """Gives the offers of a model that have not ended."""
    return [Offer(**row) for row in execute(plpy, _OFFERS, ["integer"], [model_id])]


def offered_items(version: Version, what: str, item_keys: Sequence[str | None]) -> NDArray[np.int64]:
    """Gives the rows of some items; ScoringError where there is none, one is null, unknown or stands there twice."""
    if not item_keys:
        raise ScoringError(f"{what} names no item", sqlstate=INVALID_PARAMETER, hint="name one or more items")
    check_flat(what, item_keys)
    indexes = version.item_keys.items({key for key in item_keys if key is not None})
    # In the order of the items.
    seen: dict[str, None] = {}
    for key in item_keys:
        if key is None or key in seen:
            raise ScoringError(
                f"{what} names item {'null' if key is None else key}{'' if key is None else ' twice'}",
                sqlstate=INVALID_PARAMETER,
                hint="leave it out, as array_remove does" if key is None else "name each item once",
            )
        seen[key] = None
        if key not in indexes:
            raise unknown_items(version, [key])
    return np.array([indexes[key] for key in seen], dtype=np.int64)


def response_of(plpy: Any, version: Version, user_key: str, items: NDArray[np.int64]) -> float | None:
    """Gives P(the user buys one of the items within the horizon); None for a user without events."""
    history = read_history(plpy, version, user_key, all_items=True)
    response, _, _ = _answers_of_one(version, history, items)
    return None if np.isnan(response[0, 0]) else float(response[0, 0])


def uplift_of_user(plpy: Any, version: Version, user_key: str, items: NDArray[np.int64]) -> float | None:
    """Gives by how much an offer of an item raises P(the user buys it); None where that is not known."""
    if not uplift.has_uplift(version.weights):
        return None
    history = read_history(plpy, version, user_key, all_items=True)
    _, _, found = _answers_of_one(version, history, items)
    return None if np.isnan(found[0, 0]) else float(found[0, 0])


class Best:
    """The k users with the highest values so far, and what else is known of them."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._users: list[str] = []
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, users: list[str], value: NDArray[np.float64], *others: NDArray[Any]) -> None:
        """Takes more users, whose value is nan being left out. Of equal values the first come first."""
        known = np.flatnonzero(~np.isnan(value))
        self._users += [users[place] for place in known.tolist()]
        self._parts.append(tuple(column[known] for column in (value, *others)))
        # Not each time: the time would grow with k times the users.
        if len(self._users) >= 2 * self._k:
            self._keep()

    def _keep(self) -> None:
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        order = np.argsort(-columns[0], kind="stable")[: self._k]
        self._users = [self._users[place] for place in order.tolist()]
        self._parts = [tuple(column[order] for column in columns)]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Gives (rank, user key, what else is known), best first."""
        if not self._users:
            return
        self._keep()
        columns = (column.tolist() for column in self._parts[0][1:])
        for rank, row in enumerate(zip(self._users, *columns, strict=True), start=1):
            yield rank, *row


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """The k users who are likeliest to buy one of some items, or whom an offer of them wins (`rank_by`).

    `exclude_buyers` leaves out who bought one of the items before, `min_probability` who is less likely to buy. `among`
    are the keys of those who may be chosen; None: everybody.
    """

    items: NDArray[np.int64]
    k: int
    exclude_buyers: bool = False
    min_probability: float = 0.0
    rank_by: str = RESPONSE
    among: frozenset[str] | None = None


def audience_of(plpy: Any, version: Version, criteria: Criteria) -> Iterator[Row]:
    """Gives the best users of all, best first."""
    chosen = None if criteria.among is None else sorted(criteria.among)
    (best,) = _best_of_all(plpy, version, [criteria], "audience", chosen)
    for rank, user, probability, has_bought, won in best.rows():
        yield rank, user, probability, has_bought, version.version, _or_none(won)


def check_uplift(version: Version, what: str, items: int) -> None:
    """Refuses to rank by an uplift that the version does not claim, or that nobody has measured."""
    if not uplift.has_uplift(version.weights):
        raise ScoringError(
            f"{what} is uplift, but version {version.version} of model {version.model} claims none",
            sqlstate=NO_UPLIFT,
            hint="no_uplift of vae.versions says why; docs/outcomes.md, what it takes to claim any",
        )
    if items > 1:
        raise ScoringError(
            f"{what} is uplift, which is not known of {items} items together",
            sqlstate=INVALID_PARAMETER,
            hint="an experiment offers one item at a time: ask for one item",
        )


def read_users(plpy: Any, version: Version, relation: str, column: str | None) -> frozenset[str]:
    """Gives the keys of the users that a relation lists, read with the rights of the caller.

    ScoringError where it cannot be read, or lists nobody: a list of subscribers that is empty by mistake is no list.
    """
    try:
        # By its name as regclass reads it: no other text becomes part of the query.
        row = execute(plpy, _RELATION, ["text", "text", "integer"], [relation, column, version.model_id])[0]
        name, column = row["name"], plpy.quote_ident(row["column"])
        is_integer = version.user_id_type == "integer"
        query = _USERS.format(
            relation=name,
            column=column,
            key_type="bigint" if is_integer else version.user_id_type,
            fitting=_INTEGERS.format(column=column) if is_integer else "",
        )
        users = frozenset(execute(plpy, query, [], [])[0]["users"] or ())
    except plpy.SPIError as error:
        if error.sqlstate == QUERY_CANCELED:
            raise
        hint = f"name a table or view with its schema, as public.subscribers, whose users are {version.user_id_type}"
        if error.sqlstate == INSUFFICIENT_PRIVILEGE:
            hint = f"the owner of {relation} can allow it with a grant of select, and of usage on its schema"
        elif error.sqlstate == UNDEFINED_COLUMN:
            hint = f"name the column of {relation} that holds the keys of the users with among_key"
        elif not error.sqlstate.startswith(_LASTING):
            hint = "try again once that has passed"
        raise ScoringError(
            f"among: users cannot be read from {relation}: {error}", sqlstate=error.sqlstate, hint=hint
        ) from None
    if not users:
        raise ScoringError(f"among: {relation} lists no users", sqlstate=INVALID_PARAMETER, hint=f"fill {relation}")
    return users


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def offer_audiences(plpy: Any, version: Version, offers: Sequence[Offer]) -> Iterator[OfferRow]:
    """Gives the users of each offer, found in one pass over all users.

    An offer of an item that the version does not know, by an uplift that it does not claim, or among users that cannot
    be read for a lasting cause, is left out, with a notice and a word in the log of refreshes. What may pass by itself
    is raised, so that the view keeps what it holds.
    """
    known: list[tuple[Offer, Criteria]] = []
    left_out: list[str] = []
    # Of many offers among the same users one copy, and one moment.
    users_of = cache(partial(read_users, plpy, version))
    for offer in offers:
        try:
            known.append((offer, _criteria_of(version, offer, users_of)))
        except ScoringError as error:
            if not error.sqlstate.startswith(_LASTING):
                raise
            left_out.append(f"{offer.name}: {error.message}")
            plpy.notice(f"offer {offer.name} is left out: {error.message}", hint=error.hint)
    found = _best_of_all(plpy, version, [criteria for _, criteria in known], "offers")
    done = 0
    for (offer, _), best in zip(known, found, strict=True):
        for rank, user, probability, has_bought, won in best.rows():
            yield offer.offer_id, rank, user, probability, has_bought, version.version, _or_none(won)
            done += 1
    runs.record(version, "offer_responses", done, left_out="; ".join(left_out) or None)


def _criteria_of(version: Version, offer: Offer, users_of: Callable[[str, str | None], frozenset[str]]) -> Criteria:
    """Gives the users that an offer asks for; ScoringError where the version cannot tell them."""
    if offer.choose_by == UPLIFT:
        check_uplift(version, "choose_by", len(offer.item_keys))
    return Criteria(
        items=offered_items(version, f"offer {offer.name}", offer.item_keys),
        k=offer.max_users,
        exclude_buyers=offer.exclude_buyers,
        rank_by=offer.choose_by,
        among=None if offer.among is None else users_of(offer.among, offer.among_key),
    )


def _best_of_all(
    plpy: Any, version: Version, criteria: Sequence[Criteria], what: str, chosen: Sequence[str] | None = None
) -> list[Best]:
    """Gives the best users for each of N sets of items, in one pass over all users, or those with the chosen keys."""
    best = [Best(each.k) for each in criteria]
    if not best:
        return best
    items = [each.items for each in criteria]
    columns, now, done = np.concatenate(items), time.time(), 0

    def answer(scorer: CpuScorer, batch: Batch) -> tuple[list[str], _Answers]:
        users, history = batch[0], batch[1].distinct()
        pairs = np.repeat(np.arange(len(users)), len(columns)), np.tile(columns, len(users))
        scores = scorer.of_pairs(history.of_known_items(version.catalogue_size), *pairs).reshape(len(users), -1)
        return users, _answers(version, history, scores, items, now)

    read = partial(read_histories, plpy, version, chosen=chosen, all_items=True)
    answers = score_on_cpu(plpy, version, read, answer, numbers=len(columns))
    with blas.one_thread(), closing(answers) as batches:
        for users, (response, has_bought, won) in batches:
            for column, (each, own) in enumerate(zip(criteria, best, strict=True)):
                value = (won if each.rank_by == UPLIFT else response)[:, column]
                left_out = response[:, column] < each.min_probability
                if each.exclude_buyers:
                    left_out |= has_bought[:, column]
                if each.among is not None:
                    left_out |= np.fromiter((user not in each.among for user in users), bool, count=len(users))
                own.add(
                    users, np.where(left_out, np.nan, value), response[:, column], has_bought[:, column], won[:, column]
                )
            done += len(users)
            runs.report_progress(plpy, f"pgvae {version.model}: {what}, {done} users")
    return best


def _answers_of_one(version: Version, history: History, items: NDArray[np.int64]) -> _Answers:
    known = history.of_known_items(version.catalogue_size)
    scores, _ = score_users(version.weights, known, max_history=version.max_history)
    return _answers(version, history, scores[:, items], [items], time.time())


def _answers(
    version: Version,
    history: History,
    scores: NDArray[np.float32],
    items: Sequence[NDArray[np.int64]],
    now: float,
) -> _Answers:
    """Gives what is known of N sets of items, from the scores of the first set's items, then the second's, [U, …].

    nan for unknown users; the uplift also for several items together, and where the version claims none.
    """
    found, _ = look_ahead(version, history, now)
    sets = np.split(scores, np.cumsum([len(own) for own in items])[:-1], axis=1)
    response = np.column_stack([outcomes.any_probability(version.weights, found, own) for own in sets])
    has_bought = np.column_stack([_has_bought(version, history, own) for own in items])
    won = np.full(response.shape, np.nan)
    if uplift.has_uplift(version.weights):
        for column in (number for number, own in enumerate(items) if len(own) == 1):
            inputs = uplift.inputs_of(response[:, column], found.purchase, has_bought[:, column])
            won[:, column] = uplift.uplift_of(version.weights, inputs)
    return response, has_bought, won


def _has_bought(version: Version, history: History, items: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tells which users have an event of a target type on one of the items, [U]."""
    chosen = np.isin(history.item, items) & np.isin(history.event_type, version.targets)
    return np.bincount(history.users()[chosen], minlength=len(history.counts)) > 0
