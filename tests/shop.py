"""A tiny shop in a database, always the same, and a quick model of it."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import Diagnostic
from psycopg.types.json import Jsonb

from pgvae.config import TrainingConfig

QUICK = TrainingConfig(epochs=2, hidden=8, latent=4, future_share=0.5)
SMALL = {"min_events": 100, "min_users": 20, "min_items": 5}
BEGIN = datetime(2024, 1, 1, tzinfo=UTC)

_MAKE_KEY: dict[str, Callable[[str, int], Any]] = {
    "bigint": lambda kind, number: 2**40 + number,
    "integer": lambda kind, number: 1000 + number,
    "uuid": lambda kind, number: uuid.uuid5(uuid.NAMESPACE_OID, f"{kind} {number}"),
    "text": lambda kind, number: f"{kind} {number}",
}


def keys(kind: str, key_type: str, count: int) -> list[Any]:
    """Gives that many keys of a type: users and items of one number differ where the type allows it."""
    make = _MAKE_KEY.get(key_type, _MAKE_KEY["text"])
    return [make(kind, number) for number in range(count)]


@dataclass(frozen=True, kw_only=True)
class Shop:
    """Names, types and keys of a shop's tables; `make` writes them into a database."""

    schema: str = "public"
    events: str = "events"
    user_id: str = "user_id"
    item_id: str = "item_id"
    event_type: str = "event_type"
    occurred_at: str = "occurred_at"
    user_type: str = "bigint"
    item_type: str = "bigint"
    time_type: str = "timestamptz"
    user_keys: Sequence[Any] = field(default=())
    item_keys: Sequence[Any] = field(default=())
    type_names: Sequence[str] = ("view", "add_to_cart", "purchase")

    @property
    def relation(self) -> sql.Identifier:
        """The table of events, quoted."""
        return sql.Identifier(self.schema, self.events)

    @property
    def users(self) -> list[Any]:
        """Keys of the users."""
        return list(self.user_keys) or keys("user", self.user_type, 30)

    @property
    def items(self) -> list[Any]:
        """Keys of the items."""
        return list(self.item_keys) or keys("item", self.item_type, 12)

    def rows(self) -> list[tuple[Any, Any, str, datetime]]:
        """Gives twelve events a user over two months; each user prefers one half of the items."""
        random_number = random.Random(1)
        rows = []
        half = len(self.items) // 2
        for number, user in enumerate(self.users):
            own = self.items[:half] if number % 2 else self.items[half:]
            for event in range(12):
                item = random_number.choice(own if event < 10 else self.items)
                name = random_number.choices(self.type_names, weights=range(len(self.type_names), 0, -1))[0]
                at = BEGIN + timedelta(days=event * 5, seconds=random_number.randrange(86_400))
                rows.append((user, item, name, at))
        # However the user's tastes fall, each item is in the events.
        for number, item in enumerate(self.items):
            at = BEGIN + timedelta(days=3, seconds=number)
            rows.append((self.users[number % len(self.users)], item, self.type_names[-1], at))
        return rows

    def make(self, connection: psycopg.Connection) -> None:
        """Creates the table of events and fills it."""
        connection.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(self.schema)))
        connection.execute(
            sql.SQL("create table {} ({} {}, {} {}, {} text, {} {})").format(
                self.relation,
                sql.Identifier(self.user_id),
                sql.SQL(self.user_type),
                sql.Identifier(self.item_id),
                sql.SQL(self.item_type),
                sql.Identifier(self.event_type),
                sql.Identifier(self.occurred_at),
                sql.SQL(self.time_type),
            )
        )
        self.add(connection, self.rows())

    def add(self, connection: psycopg.Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Writes events: user, item, event type, time."""
        with connection.cursor() as cursor, cursor.copy(sql.SQL("copy {} from stdin").format(self.relation)) as copy:
            for row in rows:
                copy.write_row(row)

    def create_model(self, connection: psycopg.Connection, model: str = "shop", **arguments: Any) -> list[Any]:
        """Calls vae.create_model on this shop, with a gate that lets few events pass."""
        named: dict[str, Any] = {
            "events": self.relation.as_string(connection),
            "user_id": self.user_id,
            "item_id": self.item_id,
            "event_type": self.event_type,
            "occurred_at": self.occurred_at,
            "options": SMALL,
        } | arguments
        return create_model(connection, model, **named)


def create_model(connection: psycopg.Connection, model: str | None = "shop", **arguments: Any) -> list[Any]:
    """Calls vae.create_model with named arguments; dictionaries become jsonb."""
    named = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in arguments
    )
    query = sql.SQL("select * from vae.create_model(model => %(model)s{})").format(
        sql.SQL(", ") + named if arguments else sql.SQL("")
    )
    values = {name: Jsonb(value) if isinstance(value, dict) else value for name, value in arguments.items()}
    return connection.execute(query, {"model": model, **values}).fetchall()


def train(dsn: str, model: str = "shop", *, config: TrainingConfig = QUICK, force: bool = False) -> int:
    """Trains quickly and gives the number of the version."""
    from pgvae.train import train as run

    return run(dsn, model, config, force=force).version


def train_and_activate(dsn: str, model: str = "shop") -> int:
    """Trains quickly and puts the version into service, whether or not so short a training beats popularity."""
    version = train(dsn, model)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select * from vae.activate(%s, %s, force => true)", [model, version])
    return version


def refusal(connection: psycopg.Connection, query: str, parameters: Sequence[Any] | None = None) -> Diagnostic:
    """Runs a query that must fail, and gives what the server said: sqlstate, message_primary, message_hint."""
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(query, parameters)
    return caught.value.diag
