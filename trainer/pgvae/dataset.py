"""Reads a model's cleaned events out of PostgreSQL, by COPY, in one snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.rows import dict_row

from pgvae.binary_copy import copy_rows
from pgvae.errors import PgvaeError
from pgvae.features import Column, fit_pipeline, read_columns, read_documents
from pgvae_runtime.features import NO_FEATURES, FeatureBag, FeaturePipeline, feature_bag
from pgvae_runtime.ragged import ranges
from pgvae_runtime.tokens import History

# A fixed order, so that the same data gives the same embedding rows.
EVENT_TYPES = ("view", "search", "add_to_cart", "purchase", "review", "share", "register")
TARGET = "purchase"
# Data has an order where more than this share of the users with several events has one. Not to see one costs those who
# have it up to 22 % of their NDCG (Beauty), to see one costs all others 1 to 3 % (gowalla, Electronics; docs/model.md):
# one costs as much as the other at 5 to 12 %.
_ORDERED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """N events of U users on I items, sorted by user, time, item and event type.

    `user`, `item`, `event_type` [N] count from 0; `occurred_at` [N] is in seconds since 1970; `weight` [N] says
    how much an event counts as a target. `item_keys` [I] are the shop's keys as text. `targets` are the event types
    that are predicted: purchases, or whatever there is where a shop has none. `user_features` (n = U) and
    `item_features` (n = I) hold the tokens that the pipelines give; without any the bags are empty.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    event_type: NDArray[np.int64]
    occurred_at: NDArray[np.float64]
    weight: NDArray[np.float32]
    item_keys: list[str]
    event_types: list[str]
    user_count: int
    user_pipeline: FeaturePipeline = NO_FEATURES
    item_pipeline: FeaturePipeline = NO_FEATURES
    # None, which __post_init__ replaces, only while the object is made.
    user_features: FeatureBag = None  # type: ignore[assignment]
    item_features: FeatureBag = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.user_features is None:
            object.__setattr__(self, "user_features", FeatureBag.empty(self.user_count))
        if self.item_features is None:
            object.__setattr__(self, "item_features", FeatureBag.empty(len(self.item_keys)))

    @property
    def moments(self) -> NDArray[np.int64]:
        """The moment of each event, counted from 0, shape [N]: one for all events of a user at one time."""
        user, at = self.user, self.occurred_at
        is_new = (user[1:] != user[:-1]) | (at[1:] != at[:-1])
        return np.concatenate(([False], is_new))[: len(user)].cumsum()

    @cached_property
    def has_order(self) -> bool:
        """Whether more than one in twenty of the users with several events has them at different times."""
        user, at = self.user, self.occurred_at
        again = user[1:] == user[:-1]
        several, ordered = (
            np.count_nonzero(np.bincount(user[1:][rows])) for rows in (again, again & (at[1:] > at[:-1]))
        )
        return bool(ordered > _ORDERED_SHARE * several)

    @property
    def trained_items(self) -> NDArray[np.bool_]:
        """Which items have an event, shape [I]; the others, cold items, are known by their features alone."""
        return np.bincount(self.item, minlength=len(self.item_keys)) > 0

    @property
    def targets(self) -> tuple[int, ...]:
        """The event types that are predicted, as rows of `event_types`."""
        if TARGET in self.event_types:
            return (self.event_types.index(TARGET),)
        return tuple(range(len(self.event_types)))

    def between(self, begin: float, end: float) -> Dataset:
        """Gives the events with begin <= occurred_at < end; users and items keep their numbers."""
        return self.of((self.occurred_at >= begin) & (self.occurred_at < end))

    def of(self, chosen: NDArray[np.bool_]) -> Dataset:
        """Gives some of the events; users and items keep their numbers."""
        return replace(
            self,
            user=self.user[chosen],
            item=self.item[chosen],
            event_type=self.event_type[chosen],
            occurred_at=self.occurred_at[chosen],
            weight=self.weight[chosen],
        )

    def pairs(self, types: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Gives user · I + item of each (user, item) pair with an event of these types, once each, ascending."""
        chosen = slice(None) if types is None else np.isin(self.event_type, types)
        return np.unique(self.user[chosen] * len(self.item_keys) + self.item[chosen])

    def history(self, users: NDArray[np.int64]) -> History:
        """Gives the events of the users with these numbers, in this order."""
        return self.history_of(users, *self.rows_of(users))

    def history_of(self, users: NDArray[np.int64], rows: NDArray[np.int64], counts: NDArray[np.int64]) -> History:
        """Gives some of the events of these users: their rows, one user after the other, and how many each has."""
        return History(
            counts=counts,
            item=self.item[rows],
            event_type=self.event_type[rows],
            occurred_at=self.occurred_at[rows],
            features=self.user_features.take(users) if self.user_pipeline.size else None,
        )

    def rows_of(self, users: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gives the rows of the events of the users with these numbers, one user after the other, and their counts."""
        starts = np.searchsorted(self.user, users, side="left")
        counts = np.searchsorted(self.user, users, side="right") - starts
        return ranges(starts, counts), counts

    def popularity(self) -> NDArray[np.float32]:
        """Gives each item's share of the (user, item) pairs with a target event, [I], summing to 1."""
        items = len(self.item_keys)
        counts = np.bincount(self.pairs(self.targets) % items, minlength=items).astype(np.float64)
        shares: NDArray[np.float32] = (counts / max(counts.sum(), 1.0)).astype(np.float32)
        return shares

    def window(self) -> tuple[datetime, datetime]:
        """Gives the time of the oldest and of the newest event."""
        return (
            datetime.fromtimestamp(self.occurred_at.min(), UTC),
            datetime.fromtimestamp(self.occurred_at.max(), UTC),
        )


@dataclass(frozen=True, kw_only=True)
class ModelDefinition:
    """The row of vae.models that a training needs, and the report of its quality gate."""

    model_id: int
    name: str
    max_history: int
    quality: list[dict[str, Any]]

    @property
    def failed_checks(self) -> list[dict[str, Any]]:
        """The checks of the quality gate that failed."""
        return [check for check in self.quality if check["status"] == "fail"]


def read_definition(connection: psycopg.Connection, model: str) -> ModelDefinition:
    """Gives the definition of a model and runs its quality gate."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            "select model_id, name, (options ->> 'max_history')::integer as max_history"
            " from vae.models where model_id = vae_private.model_id(%s)",
            [model],
        ).fetchone()
        assert row is not None  # vae_private.model_id raises for an unknown model.
        quality = cursor.execute("select * from vae.check_events(%s)", [model]).fetchall()
    return ModelDefinition(**row, quality=quality)


def read_dataset(connection: psycopg.Connection, model: str) -> Dataset:
    """Gives the cleaned events of a model, and the features of its users and items.

    The connection's transaction should be of one snapshot.
    """
    events = sql.Identifier(model, "clean_events")
    connection.execute(
        sql.SQL(
            "create temporary table pgvae_events on commit drop as"
            " select user_id, item_id::text as item_key, event_type, occurred_at, weight from {}"
        ).format(events)
    )
    connection.execute("analyze pgvae_events")
    # Collation "C": the orders, and with them the training, must not depend on the server's locale.
    connection.execute(
        "create temporary table pgvae_items on commit drop as"
        ' select (row_number() over (order by item_key collate "C") - 1)::integer as item_index, item_key'
        " from (select distinct item_key from pgvae_events) i"
    )
    # Keys that are no texts keep their own order.
    connection.execute(
        "create temporary table pgvae_users on commit drop as"
        " select (row_number() over (order by"
        " case when pg_typeof(user_id) = 'text'::regtype then user_id::text end collate \"C\", user_id) - 1)::integer"
        " as user_index, user_id"
        " from (select distinct user_id from pgvae_events) u"
    )
    keys = [row[0] for row in connection.execute("select item_key from pgvae_items order by item_index").fetchall()]
    if not keys:
        raise PgvaeError(f"model {model} has no clean events", hint="see what vae.check_events says of it")
    present = {row[0] for row in connection.execute("select distinct event_type from pgvae_events").fetchall()}
    event_types = [name for name in EVENT_TYPES if name in present]
    rows = _read_events(connection, event_types)
    user_count = int(rows["user"][-1]) + 1
    columns = read_columns(connection, model)
    user_pipeline, user_features = _user_features(connection, model, columns, user_count)
    item_pipeline, item_features, cold_keys = _item_features(connection, model, columns, len(keys))
    return Dataset(
        user=rows["user"].astype(np.int64),
        item=rows["item"].astype(np.int64),
        event_type=rows["event_type"].astype(np.int64),
        occurred_at=rows["occurred_at"].astype(np.float64),
        weight=rows["weight"].astype(np.float32),
        item_keys=keys + cold_keys,
        event_types=event_types,
        user_count=user_count,
        user_pipeline=user_pipeline,
        item_pipeline=item_pipeline,
        user_features=user_features,
        item_features=item_features,
    )


def _user_features(
    connection: psycopg.Connection, model: str, columns: list[Column], user_count: int
) -> tuple[FeaturePipeline, FeatureBag]:
    """Gives the pipeline of the users' columns, and what it makes of the users with events."""
    if not any(column.source == "users" and column.is_used for column in columns):
        return fit_pipeline(columns, [], source="users"), FeatureBag.empty(user_count)
    query = sql.SQL(
        "select u.user_index, f.features::text from pgvae_users u join {} f using (user_id) order by u.user_index"
    ).format(sql.Identifier(model, "user_features"))
    documents: list[list[str]] = [[] for _ in range(user_count)]
    for number, own in read_documents(connection, query):
        documents[int(number)] = own
    pipeline = fit_pipeline(columns, documents, source="users")
    return pipeline, feature_bag(pipeline, documents)


def _item_features(
    connection: psycopg.Connection, model: str, columns: list[Column], item_count: int
) -> tuple[FeaturePipeline, FeatureBag, list[str]]:
    """Gives the pipeline of the items' columns, what it makes of the items with events and then of the cold ones, and
    the keys of the cold ones: those without an event of which the pipeline knows something, or the most.
    """
    if not any(column.source == "items" and column.is_used for column in columns):
        return fit_pipeline(columns, [], source="items"), FeatureBag.empty(item_count), []
    relation = sql.Identifier(model, "item_features")
    query = sql.SQL(
        "select i.item_index, f.features::text from pgvae_items i"
        " join {} f on f.item_id::text = i.item_key order by i.item_index"
    ).format(relation)
    documents: list[list[str]] = [[] for _ in range(item_count)]
    for number, own in read_documents(connection, query):
        documents[int(number)] = own
    pipeline = fit_pipeline(columns, documents, source="items")
    trained = feature_bag(pipeline, documents)
    query = sql.SQL(
        "select f.item_id::text, f.features::text from {} f"
        " where not exists (select from pgvae_items i where i.item_key = f.item_id::text)"
        ' order by f.item_id::text collate "C"'
    ).format(relation)
    cold = list(read_documents(connection, query)) if pipeline.size else []
    bag = feature_bag(pipeline, [own for _, own in cold])
    row = connection.execute(
        "select (options ->> 'max_cold_items')::integer from vae.models where name = %s", [model]
    ).fetchone()
    assert row is not None  # read_columns raises for an unknown model.
    known = np.sort(np.argsort(-bag.counts(), kind="stable")[: min(row[0], np.count_nonzero(bag.counts()))])
    return pipeline, trained.followed_by(bag.take(known)), [cold[number][0] for number in known]


def _read_events(connection: psycopg.Connection, event_types: list[str]) -> NDArray[Any]:
    query = sql.SQL(
        "select u.user_index, i.item_index,"
        " (array_position({types}::text[], e.event_type) - 1)::smallint,"
        " extract(epoch from e.occurred_at)::float8, e.weight"
        " from pgvae_events e join pgvae_items i using (item_key) join pgvae_users u using (user_id)"
        " order by 1, 4, 2, 3"
    ).format(types=sql.Literal(event_types))
    columns = {"user": "i4", "item": "i4", "event_type": "i2", "occurred_at": "f8", "weight": "f4"}
    return copy_rows(connection, query, columns)
