"""A randomised experiment in a simulated shop: offers made or withheld by chance, of known effect.

Each chosen user is assigned once, at a random moment, an item that sells; in half of the cases the offer is made.
Whoever gets it and has not left buys the item because of it with the probability

    offer_ceiling · pay_probability / (1 + exp(offer_threshold - offer_pull · affinity))

whatever else the user does; affinity is the product of the tastes of user and item. Who buys the item in the 28 days
from then on anyway can be won, too, and then buys it once more, so that win_probability is the same for both; the true
effect, which counts buyers, is 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from pgvae.errors import PgvaeError
from pgvae.simulate.calendar import DAY
from pgvae.simulate.config import random_stream
from pgvae.simulate.shop import Shop
from pgvae.simulate.tables import create_experiment

# Outcomes are looked at for so long, and the last assignment is so long before the end of the window.
HORIZON_DAYS = 28
# Days in which users are assigned, before that.
PERIOD_DAYS = 84
_USERS = """
select u.user_id, (extract(epoch from t.churned_at - {epoch}) * 1000000)::bigint, t.pay_probability, t.taste
from {schema}.users u
join {schema}.true_users t using (user_id)
where u.registered_at < {epoch} + %(begin)s * interval '1 microsecond'
order by t.user_number
"""
_ITEMS = """
select t.item_id, t.taste, i.price, (
    select count(*) from {schema}.events e
    where e.item_id = t.item_id and e.event_type = 'purchase'
        and e.occurred_at < {epoch} + %(begin)s * interval '1 microsecond')
from {schema}.true_items t
join {schema}.items i using (item_id)
order by t.item_number
"""
_ASSIGNED = """
create temporary table pgvae_experiment on commit drop as
select x.event_id, x.purchase_id, x.user_key::{key} as user_id, x.item_key::{key} as item_id, x.exposed,
    x.probability, x.price, {epoch} + x.at * interval '1 microsecond' as at,
    {epoch} + x.won_at * interval '1 microsecond' as won_at
from unnest(%s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::boolean[], %s::float8[], %s::numeric[],
    %s::bigint[], %s::bigint[]) x (event_id, purchase_id, user_key, item_key, exposed, probability, price, at, won_at)
"""
# In this order: who buys anyway is seen before the purchases that offers cause are there.
_WRITE = (
    """
insert into {schema}.true_experiment (event_id, win_probability, buys_anyway, is_won)
select x.event_id, x.probability, exists (
    select from {schema}.events e
    where e.user_id = x.user_id and e.item_id = x.item_id and e.event_type = 'purchase' and e.quantity > 0
        and e.occurred_at >= x.at and e.occurred_at < x.at + {days} * interval '1 day'), x.purchase_id is not null
from pgvae_experiment x
""",
    """
insert into {schema}.events (event_id, user_id, item_id, event_type, occurred_at, exposed)
select x.event_id, x.user_id, x.item_id, 'view', x.at, x.exposed from pgvae_experiment x
""",
    """
insert into {schema}.events (event_id, user_id, item_id, event_type, occurred_at, quantity, price)
select x.purchase_id, x.user_id, x.item_id, 'purchase', x.won_at, 1, x.price
from pgvae_experiment x where x.purchase_id is not null
""",
    "analyze {schema}.events, {schema}.true_experiment",
)
_SUMMARY = """
select count(*), count(*) filter (where e.exposed),
    coalesce(avg(t.win_probability * (not t.buys_anyway)::integer), 0)::float8
from {schema}.true_experiment t
join {schema}.events e using (event_id)
"""


@dataclass(frozen=True, kw_only=True)
class ExperimentSummary:
    """How many users were assigned and exposed, and the true average effect on those assigned."""

    assignments: int
    exposed: int
    effect: float


def add_experiment(connection: psycopg.Connection, shop: Shop) -> ExperimentSummary:
    """Writes the assignments and the purchases that they cause, with the truth, into a simulated shop's tables."""
    config, constants = shop.config, shop.constants
    begin = shop.calendar.until - (HORIZON_DAYS + PERIOD_DAYS) * DAY
    names = {
        "schema": sql.Identifier(config.schema),
        "key": sql.SQL(config.key_type),
        "days": sql.Literal(HORIZON_DAYS),
        "epoch": sql.SQL("'2000-01-01 00:00+00'::timestamptz"),
    }
    create_experiment(connection, config.schema, config.key_type)
    users = connection.execute(sql.SQL(_USERS).format(**names), {"begin": begin}).fetchall()
    items = connection.execute(sql.SQL(_ITEMS).format(**names), {"begin": begin}).fetchall()
    newest = connection.execute(sql.SQL("select max(event_id) from {schema}.events").format(**names)).fetchone()
    assert newest is not None
    generator = random_stream(config.seed, "experiment")
    sold = np.array([row[3] for row in items], dtype=float)
    if not sold.any():
        raise PgvaeError(
            f"nothing was sold in the {config.days - HORIZON_DAYS - PERIOD_DAYS} days before the experiment, so that"
            " there is nothing to offer",
            hint="give more --users, --days or --events-per-user",
        )
    chosen = [users[row] for row in np.flatnonzero(generator.random(len(users)) < config.experiment)]
    offered = [items[place] for place in generator.choice(len(items), len(chosen), p=sold / sold.sum())]
    at = begin + generator.integers(0, PERIOD_DAYS * DAY, len(chosen))
    exposed = generator.random(len(chosen)) < 0.5
    stays = np.array([left is None or left > moment for (_, left, _, _), moment in zip(chosen, at, strict=True)])
    pay = np.array([row[2] for row in chosen])
    affinity = np.array([np.dot(user[3], item[1]) for user, item in zip(chosen, offered, strict=True)])
    pull = 1.0 / (1.0 + np.exp(constants.offer_threshold - constants.offer_pull * affinity))
    probability = np.where(stays, constants.offer_ceiling * pay * pull, 0.0)
    wins = exposed & (generator.random(len(chosen)) < probability)
    won_at = at + generator.integers(DAY // 24, HORIZON_DAYS * DAY, len(chosen))
    event_id = newest[0] + 1 + np.arange(len(chosen))
    purchase_id = newest[0] + len(chosen) + np.cumsum(wins)
    columns: list[list[Any]] = [
        event_id.tolist(),
        [number if won else None for number, won in zip(purchase_id.tolist(), wins, strict=True)],
        [str(user[0]) for user in chosen],
        [str(item[0]) for item in offered],
        exposed.tolist(),
        probability.tolist(),
        [item[2] for item in offered],
        (at // 1000 * 1000).tolist(),
        (won_at // 1000 * 1000).tolist(),
    ]
    connection.execute(sql.SQL(_ASSIGNED).format(**names), columns)
    for statement in _WRITE:
        connection.execute(sql.SQL(statement).format(**names))
    row = connection.execute(sql.SQL(_SUMMARY).format(**names)).fetchone()
    assert row is not None
    return ExperimentSummary(assignments=row[0], exposed=row[1], effect=row[2])
