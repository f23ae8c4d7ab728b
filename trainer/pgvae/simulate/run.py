"""Filling a schema with a simulated shop, in one transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from pgvae.connection import connect
from pgvae.errors import PgvaeError
from pgvae.simulate.behaviour import EVENT_TYPES, behave
from pgvae.simulate.config import CONSTANTS, SimulationConfig, random_stream
from pgvae.simulate.dirt import UNKNOWN_TYPES, add_dirt
from pgvae.simulate.experiment import ExperimentSummary, add_experiment
from pgvae.simulate.people import draw_people
from pgvae.simulate.rows import Block, write_block, write_items, write_promotions
from pgvae.simulate.shop import Shop
from pgvae.simulate.tables import create_tables, finish_tables
from pgvae.simulate.truth import FORMAT, HORIZONS, habits_of, no_purchase_probability

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
    experiment: ExperimentSummary | None = None


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
    write_items(connection, shop)
    write_promotions(connection, shop)

    types = (*EVENT_TYPES, *UNKNOWN_TYPES)
    by_type, by_dirt = np.zeros(len(types), dtype=np.int64), np.zeros(len(CONSTANTS.dirt_shares), dtype=np.int64)
    events = sessions = users = 0
    for block in _ahead(_blocks(shop, rate_scale)):
        write_block(connection, shop, block, events)
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
    experiment = add_experiment(connection, shop) if config.experiment else None
    connection.commit()
    return replace(summary, index_seconds=time.perf_counter() - indexing, experiment=experiment)


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


def _blocks(shop: Shop, rate_scale: float) -> Iterator[Block]:
    """Draws the blocks in order; each has its own random streams, so that none depends on another's length."""
    config, calendar = shop.config, shop.calendar
    sessions = 1
    for number in range(config.blocks):
        begin = number * config.block_users
        count = min(config.block_users, config.users - begin)
        people = draw_people(shop, random_stream(config.seed, "people", number), begin + 1, count, rate_scale)
        behaviour = behave(shop, people, random_stream(config.seed, "behaviour", number), sessions)
        sessions += behaviour.sessions
        events, dirt, bot = behaviour.events, np.full(len(behaviour.events), -1, dtype=np.int8), 0
        if config.dirt:
            bot = config.users + 1 + number
            rng = random_stream(config.seed, "dirt", number)
            events, dirt = add_dirt(shop, rng, events, bot=bot, users=config.users + config.blocks)
        no_purchase = no_purchase_probability(shop, habits_of(people), behaviour.pending, calendar.until, HORIZONS)
        yield Block(people=people, behaviour=behaviour, no_purchase=no_purchase, events=events, dirt=dirt, bot=bot)


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Gives the blocks while a thread draws the next one: drawing and copying take about the same time."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


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
