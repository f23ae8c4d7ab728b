"""Filling a schema with a simulated shop, in one transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pgvae.connection import connect
from pgvae.errors import PgvaeError
from pgvae.simulate.behaviour import EVENT_TYPES, QUERIES, Behaviour, Events, behave
from pgvae.simulate.calendar import DAY, EPOCH, WEEK
from pgvae.simulate.config import CONSTANTS, SimulationConfig, random_stream
from pgvae.simulate.copying import HEADER, TRAILER, Column, booleans, cents, encode, numbers, reals, words
from pgvae.simulate.dirt import UNKNOWN_TYPES, add_dirt
from pgvae.simulate.keys import key_column, key_values
from pgvae.simulate.people import People, draw_people
from pgvae.simulate.shop import Shop
from pgvae.simulate.tables import create_tables, finish_tables
from pgvae.simulate.truth import FORMAT, Habits, no_purchase_probability, purchase_rate
from pgvae.simulate.words import ADJECTIVES, AGE_GROUPS, BRANDS, CATEGORIES, CHANNELS, COUNTRIES

HORIZONS = (7, 30, 90)
PILOT_USERS = 2048
CROWD_USERS = 16_384

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SimulationSummary:
    """What was written: row counts, events by type, dirt by kind, and the seconds of each part.

    `write_seconds` is making and copying the rows, `index_seconds` the keys, the index and analyze.
    """

    schema: str
    users: int
    items: int
    events: int
    sessions: int
    events_by_type: dict[str, int]
    dirt: dict[str, int]
    write_seconds: float
    index_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One block of users with what is written about them."""

    people: People
    behaviour: Behaviour
    no_purchase: NDArray[np.float64]
    events: Events
    dirt: NDArray[np.int8]


def simulate(
    dsn: str | None, config: SimulationConfig | None = None, *, on_progress: Progress | None = None
) -> SimulationSummary:
    """Fills the configuration's schema with a simulated shop, all in one transaction.

    `on_progress` is called with the users done and their total. PgvaeError where the schema's tables exist and
    `replace` is false, or where the server refuses.
    """
    config = config or SimulationConfig()
    try:
        with connect(dsn) as connection:
            return _fill(connection, config, on_progress or (lambda done, total: None))
    except psycopg.errors.InsufficientPrivilege as error:
        raise PgvaeError(
            f"cannot write to schema '{config.schema}': {error.diag.message_primary}",
            hint="ask for the privilege to create in this database, or choose another schema with --schema",
        ) from error
    except psycopg.errors.ReservedName as error:
        raise PgvaeError(
            f"cannot create schema '{config.schema}': {error.diag.message_primary}",
            hint="choose another schema with --schema",
        ) from error


def _fill(connection: psycopg.Connection, config: SimulationConfig, on_progress: Progress) -> SimulationSummary:
    started = time.perf_counter()
    create_tables(connection, config.schema, config.key_type, replace=config.replace)
    shop = Shop.build(config, CONSTANTS)
    rate_scale = _rate_scale(shop)
    _write_items(connection, shop)
    _write_promotions(connection, shop)

    types = (*EVENT_TYPES, *UNKNOWN_TYPES)
    by_type, by_dirt = np.zeros(len(types), dtype=np.int64), np.zeros(len(CONSTANTS.dirt_shares), dtype=np.int64)
    events = sessions = users = 0
    for block in _ahead(_blocks(shop, rate_scale)):
        _write_block(connection, shop, block, events)
        users += len(block.people)
        events += len(block.events)
        sessions += block.behaviour.sessions
        by_type += np.bincount(block.events["kind"], minlength=len(types))
        by_dirt += np.bincount(block.dirt[block.dirt >= 0], minlength=len(by_dirt))
        on_progress(users, config.users)

    dirt = {kind: int(count) for (kind, _), count in zip(CONSTANTS.dirt_shares, by_dirt, strict=True)}
    bots = config.blocks if config.dirt else 0
    summary = SimulationSummary(
        schema=config.schema,
        users=users + bots,
        items=config.item_count,
        events=events,
        sessions=sessions,
        events_by_type={kind: int(count) for kind, count in zip(types, by_type, strict=True) if count},
        dirt=dirt if config.dirt else {},
        write_seconds=time.perf_counter() - started,
        index_seconds=0.0,
    )
    _write_parameters(connection, shop, rate_scale, summary)
    indexing = time.perf_counter()
    finish_tables(connection, config.schema)
    connection.commit()
    return SimulationSummary(**(asdict(summary) | {"index_seconds": time.perf_counter() - indexing}))


def _rate_scale(shop: Shop) -> float:
    """Gives the mean session rate per day that makes the wanted mean number of events per user.

    A crowd gives the users' mean time in the shop, a pilot block the events that come of one visit; these depend a
    little on the rate (through replenishing), hence the second pass.
    """
    constants = shop.constants
    rng = random_stream(shop.config.seed, "pilot")
    crowd = draw_people(shop, rng, 1, CROWD_USERS, 1.0)
    end = np.minimum(crowd.churned_at, shop.calendar.until)
    exposure = shop.calendar.elapsed_at(end) - shop.calendar.elapsed_at(crowd.registered_at)
    # The rates' gamma factor has mean 1 and is left out: it would only add noise.
    visits_per_rate = float(np.mean(exposure * np.where(crowd.newsletter, constants.newsletter_session_factor, 1.0)))
    scale = 5.0 / visits_per_rate
    for _ in range(2):
        behaviour = behave(shop, draw_people(shop, rng, 1, PILOT_USERS, scale), rng, 0)
        events_per_visit = (len(behaviour.events) - PILOT_USERS) / behaviour.visits
        visits = (shop.config.events_per_user - 1) / events_per_visit  # one event is the registration
        scale = max(visits - 1, 0.05) / visits_per_rate  # one visit follows the registration at once
    return scale


def _blocks(shop: Shop, rate_scale: float) -> Iterator[_Block]:
    """Draws the blocks in order; each has its own random streams, so that none depends on another's length."""
    config, calendar = shop.config, shop.calendar
    sessions = 1
    for number in range(config.blocks):
        begin = number * config.block_users
        count = min(config.block_users, config.users - begin)
        people = draw_people(shop, random_stream(config.seed, "people", number), begin + 1, count, rate_scale)
        behaviour = behave(shop, people, random_stream(config.seed, "behaviour", number), sessions)
        sessions += behaviour.sessions
        events, dirt = behaviour.events, np.full(len(behaviour.events), -1, dtype=np.int8)
        if config.dirt:
            rng = random_stream(config.seed, "dirt", number)
            rows = config.users + config.blocks
            events, dirt = add_dirt(shop, rng, behaviour.events, bot=config.users + 1 + number, users=rows)
        no_purchase = no_purchase_probability(shop, _habits(people), behaviour.pending, calendar.until, HORIZONS)
        yield _Block(people=people, behaviour=behaviour, no_purchase=no_purchase, events=events, dirt=dirt)


def _ahead(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Gives the blocks while a thread draws the next one: drawing and copying take about the same time."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


def _habits(people: People) -> Habits:
    return Habits(**{name: getattr(people, name) for name in Habits.__dataclass_fields__})


def _write_block(connection: psycopg.Connection, shop: Shop, block: _Block, written: int) -> None:
    config, people, events = shop.config, block.people, block.events
    bots = people.number[:1] - people.number[0] + config.users + 1 + (people.number[0] - 1) // config.block_users
    number = np.concatenate([people.number, bots]) if config.dirt else people.number

    def with_bot(values: NDArray[Any]) -> NDArray[Any]:
        return np.append(values, values[:1]) if config.dirt else values

    registered_at = with_bot(people.registered_at)
    if config.dirt:
        registered_at[-1] = shop.calendar.since
    _copy(
        connection,
        config,
        "users",
        [
            key_column(config.key_type, "U", number),
            numbers(registered_at, ">i8"),
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
            numbers(purchase_rate(shop, _habits(people)), ">f8"),
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


def _write_items(connection: psycopg.Connection, shop: Shop) -> None:
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


def _write_promotions(connection: psycopg.Connection, shop: Shop) -> None:
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


def _write_parameters(
    connection: psycopg.Connection, shop: Shop, rate_scale: float, summary: SimulationSummary
) -> None:
    config = asdict(shop.config) | {"until": shop.config.until.isoformat(), "replace": False}
    parameters: dict[str, Any] = {
        "format": FORMAT,
        "numpy": np.__version__,
        "seed": shop.config.seed,
        "since": shop.config.since.isoformat(),
        "until": shop.config.until.isoformat(),
        "config": config,
        "constants": asdict(shop.constants),
        "session_rate_mean": rate_scale,
        "interest_taste": shop.interest_taste.astype(float).tolist(),
        "events_by_type": summary.events_by_type,
        "dirt_counts": summary.dirt,
        "promotion_category_weeks": int((shop.discount[: shop.calendar.weeks_in_window] > 0).sum()),
    }
    statement = sql.SQL("insert into {} values (%s, %s)").format(sql.Identifier(shop.config.schema, "true_parameters"))
    with connection.cursor() as cursor:
        cursor.executemany(statement, [(key, json.dumps(value)) for key, value in parameters.items()])


def _article(word: str) -> str:
    return "An" if word[0] in "aeiou" else "A"


def _timestamp(at: int) -> str:
    days, rest = divmod(int(at), DAY)
    seconds = rest // 1_000_000
    return f"{np.datetime64(EPOCH) + days} {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}+00"
