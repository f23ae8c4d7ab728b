"""The rows of a simulated shop, on their way into its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pgvae.simulate.behaviour import EVENT_TYPES, QUERIES, Behaviour, Events
from pgvae.simulate.calendar import DAY, EPOCH, WEEK
from pgvae.simulate.config import SimulationConfig
from pgvae.simulate.copying import HEADER, TRAILER, Column, booleans, cents, encode, numbers, reals, words
from pgvae.simulate.dirt import UNKNOWN_TYPES
from pgvae.simulate.keys import key_column, key_values
from pgvae.simulate.people import People
from pgvae.simulate.shop import Shop
from pgvae.simulate.truth import HORIZONS, habits_of, purchase_rate
from pgvae.simulate.words import ADJECTIVES, AGE_GROUPS, BRANDS, CATEGORIES, CHANNELS, COUNTRIES


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of users with what is written about them; `bot` is the number of its bot, 0 for none."""

    people: People
    behaviour: Behaviour
    no_purchase: NDArray[np.float64]
    events: Events
    dirt: NDArray[np.int8]
    bot: int


def write_items(connection: psycopg.Connection, shop: Shop) -> None:
    """Writes the items and their truth, in the order of their keys."""
    config, catalogue = shop.config, shop.catalogue
    order = np.argsort(catalogue.number)
    keys = key_values(config.key_type, "P", catalogue.number)
    schema = config.schema
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("copy {} from stdin").format(sql.Identifier(schema, "items"))) as copy,
    ):
        for item in order:
            kind = CATEGORIES[catalogue.category[item]]
            noun, adjective = kind.nouns[catalogue.noun[item]], ADJECTIVES[catalogue.adjective[item]]
            brand = BRANDS[catalogue.brand[item]]
            copy.write_row(
                (
                    keys[item],
                    f"{brand} {adjective} {noun} {catalogue.number[item]}",
                    f"{_article(adjective)} {adjective} {noun} by {brand}, from our {kind.name.lower()} range.",
                    kind.name,
                    brand,
                    f"{catalogue.price_cents[item] / 100:.2f}",
                    _timestamp(catalogue.listed_at[item]),
                )
            )
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("copy {} from stdin").format(sql.Identifier(schema, "true_items"))) as copy,
    ):
        for item in order:
            kind = CATEGORIES[catalogue.category[item]]
            complement = int(catalogue.complement[item])
            copy.write_row(
                (
                    keys[item],
                    int(catalogue.number[item]),
                    catalogue.taste[item].astype(float).tolist(),
                    float(catalogue.appeal[item]),
                    float(catalogue.quality[item]),
                    kind.peak,
                    kind.amplitude,
                    float(catalogue.lasts[item]) or None,
                    None if complement < 0 else keys[complement],
                )
            )


def write_promotions(connection: psycopg.Connection, shop: Shop) -> None:
    """Writes the promotions of the window."""
    calendar = shop.calendar
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("copy {} from stdin").format(sql.Identifier(shop.config.schema, "promotions"))) as copy,
    ):
        for week, kind in np.argwhere(shop.discount[: calendar.weeks_in_window] > 0):
            starts = calendar.since + int(week) * WEEK
            ends = min(starts + WEEK, calendar.until)
            row = (CATEGORIES[kind].name, _timestamp(starts), _timestamp(ends), float(shop.discount[week, kind]))
            copy.write_row(row)


def write_block(connection: psycopg.Connection, shop: Shop, block: Block, written: int) -> None:
    """Writes a block's users, their truth, their events and the dirt; `written` events were written before."""
    config, people, events = shop.config, block.people, block.events

    def with_bot(values: NDArray[Any], of_bot: Any = None) -> NDArray[Any]:
        # A bot looks like the first user of the block, but for the number and the time of registering.
        return np.append(values, values[:1] if of_bot is None else of_bot) if block.bot else values

    _copy(
        connection,
        config,
        "users",
        [
            key_column(config.key_type, "U", with_bot(people.number, block.bot)),
            numbers(with_bot(people.registered_at, shop.calendar.since), ">i8"),
            words(with_bot(people.country), COUNTRIES),
            words(with_bot(people.channel), CHANNELS),
            words(with_bot(people.age_group), AGE_GROUPS),
            booleans(with_bot(people.newsletter)),
        ],
    )
    sensitivity = np.array(shop.constants.price_sensitivities)
    _copy(
        connection,
        config,
        "true_users",
        [
            key_column(config.key_type, "U", people.number),
            numbers(people.number, ">i8"),
            numbers(people.cluster, ">i2"),
            reals(people.weights),
            reals(people.weights @ shop.interest_taste),
            numbers(people.price_group, ">i2"),
            numbers(sensitivity[people.price_group], ">f8"),
            numbers(people.session_rate, ">f8"),
            numbers(people.pay, ">f8"),
            numbers(purchase_rate(shop, habits_of(people)), ">f8"),
            numbers(people.churn, ">f8"),
            numbers(people.churned_at, ">i8", null=people.churned_at >= shop.calendar.until),
            *(numbers(block.no_purchase[:, column], ">f8") for column in range(len(HORIZONS))),
        ],
    )
    event_id = written + 1 + np.arange(len(events), dtype=np.int64)
    for begin in range(0, len(events), config.chunk_rows):
        part = slice(begin, begin + config.chunk_rows)
        _copy(connection, config, "events", _event_columns(config, event_id[part], events[part]))
    if config.dirt:
        wrong = block.dirt >= 0
        kinds = [kind for kind, _ in shop.constants.dirt_shares]
        _copy(connection, config, "true_dirt", [numbers(event_id[wrong], ">i8"), words(block.dirt[wrong], kinds)])


def _event_columns(config: SimulationConfig, event_id: NDArray[np.int64], events: Events) -> list[Column]:
    return [
        numbers(event_id, ">i8"),
        key_column(config.key_type, "U", events["user"]),
        key_column(config.key_type, "P", events["item"].astype(np.int64)),
        words(events["kind"], (*EVENT_TYPES, *UNKNOWN_TYPES)),
        numbers(events["at"], ">i8"),
        numbers(events["quantity"], ">i4", null=events["quantity"] == 0),
        cents(events["price"].astype(np.int64)),
        numbers(events["rating"], ">i2", null=events["rating"] == 0),
        words(events["query"], QUERIES),
        numbers(events["session"], ">i8", null=events["session"] < 0),
    ]


def _copy(connection: psycopg.Connection, config: SimulationConfig, table: str, columns: Sequence[Column]) -> None:
    # freeze: the tables are made in this transaction, so their rows need no hint bits and no first vacuum.
    statement = sql.SQL("copy {} from stdin (format binary, freeze)").format(sql.Identifier(config.schema, table))
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(HEADER)
        copy.write(encode(columns))
        copy.write(TRAILER)


def _article(word: str) -> str:
    return "An" if word[0] in "aeiou" else "A"


def _timestamp(at: int) -> str:
    days, rest = divmod(int(at), DAY)
    seconds = rest // 1_000_000
    return f"{np.datetime64(EPOCH) + days} {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}+00"
