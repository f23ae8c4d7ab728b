"""`pgvae demo`: a shop from nothing to recommendations, through the same calls that anybody would make."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql

MODEL = "demo"
SHOP = "demo_shop"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an analyst asks, and the SQL that answers it."""

    text: str
    query: str


CREATE_MODEL = """\
select * from vae.create_model('demo',
    events => 'demo_shop.events',
    users => 'demo_shop.users',
    items => 'demo_shop.items');"""

CHECK_EVENTS = """\
select check_name, status, row_count, share, remedy
from vae.check_events('demo')
where status <> 'pass';"""

REFRESH = "call vae.refresh('demo');"

QUESTIONS = (
    Question(
        text="What should we recommend to user 42, this moment?",
        query="""\
select r.rank, r.item_id, i.title, i.category, i.price, r.score
from demo.recommend(42, k => 5) r
join demo_shop.items i using (item_id)
order by r.rank;""",
    ),
    Question(
        text="What has this user done that the model knows of?",
        query="""\
select h.occurred_at::date as day, h.event_type, i.title, i.category
from demo.history(42) h
join demo_shop.items i using (item_id)
order by h.occurred_at desc
limit 5;""",
    ),
    Question(
        text="A user whom the model has never seen views two items a minute ago. And now?",
        query="""\
insert into demo_shop.users (user_id, registered_at)
values (1000000042, now());

insert into demo_shop.events
    (event_id, user_id, item_id, event_type, occurred_at)
select 1000000000 + i.item_id, 1000000042, i.item_id, 'view', now()
from demo_shop.items i
where i.category = 'Toys'
order by i.item_id
limit 2;

select r.rank, r.item_id, i.title, i.category, r.score, r.is_cold_start
from demo.recommend(1000000042, k => 5) r
join demo_shop.items i using (item_id)
order by r.rank;""",
    ),
    Question(
        text="Who may leave? Of those in the middle band, whom we would miss most:",
        query="""\
select c.user_id, c.churn_probability, c.expected_purchases, c.reasons
from demo.churn c
where c.risk_band = 'medium'
order by c.expected_purchases desc
limit 3;""",
    ),
    Question(
        text="What will be sold in the next four weeks, between which bounds?",
        query="""\
select i.title, i.category, d.expected_units::integer as units,
    d.units_low::integer as low, d.units_high::integer as high,
    d.last_period_units::integer as last_weeks
from demo.demand d
join demo_shop.items i using (item_id)
order by d.expected_units desc nulls last
limit 3;""",
    ),
    Question(
        text="And what goes with the first of them?",
        query="""\
select r.rank, i.title, i.category, r.lift, r.support
from demo.related_items r
join demo_shop.items i on i.item_id = r.related_item_id
where r.item_id = (
    select d.item_id from demo.demand d
    order by d.expected_units desc nulls last
    limit 1)
order by r.rank
limit 3;""",
    ),
    Question(
        text="Where do these scores come from?",
        query="""\
select distinct r.model_version as version, v.window_start::date as trained_from,
    v.window_end::date as to, v.event_count as events, v.seed
from demo.recommendations r
join vae.models m on m.name = 'demo'
join vae.versions v on v.model_id = m.model_id
    and v.version = r.model_version;""",
    ),
    Question(
        text="How good is it, on events that it had not seen?",
        query="""\
select x.method, x.metric, x.k, x.value, x.lower, x.upper
from vae.metrics x
join vae.versions v using (version_id)
join vae.models m using (model_id)
where m.name = 'demo' and v.state = 'active'
    and x.slice = 'all' and x.metric in ('recall', 'ndcg')
order by x.metric, x.value desc;""",
    ),
)


def drop_model(connection: psycopg.Connection) -> None:
    """Drops the demo's model of an earlier run, if there is one."""
    if connection.execute("select 1 from vae.models where name = %s", [MODEL]).fetchone():
        connection.execute("select vae.drop_model(%s)", [MODEL])


def answer(connection: psycopg.Connection, query: str) -> tuple[list[str], list[tuple[object, ...]]]:
    """Gives the column names and the rows of a script's last statement."""
    cursor = connection.execute(sql.SQL(query))
    while cursor.nextset():
        pass
    if cursor.description is None:
        return [], []
    return [column.name for column in cursor.description], cursor.fetchall()
