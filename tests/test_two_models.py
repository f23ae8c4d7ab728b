"""Two models in one database, whose versions, offers, sets and words have the same names, and nothing in common."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from shop import Shop, train, train_and_activate

Connection = psycopg.Connection[Any]
USERS, ITEMS = Shop().users, Shop().items

# {0} is the model, {1} its name as a text.
_ASKED = (
    "select u, r from unnest(%(users)s) u, {0}.recommend(u, 12) r",
    'select r from {0}.recommend(%(user)s, 12, \'{{"candidates": "few", "exclude_seen": false}}\') r',
    "select u, s from unnest(%(users)s) u, {0}.segment(u) s",
    "select i, r from unnest(%(items)s) i, {0}.related(i) r",
    "select e from {0}.explain(%(user)s, %(item)s) e",
    "select * from vae.check_events({1})",
    "select * from vae.check_freshness({1})",
    "select model_version, active_version, refreshed_at, row_count, scored_count, mode, last_state, last_started_at"
    " from vae.freshness where model = {1}",
    "select * from vae.health_checks where model = {1}",
    "select v.*, vae_private.rollback_target(model_id), vae_private.next_version(model_id),"
    " vae_private.scoring_context(model_id), vae_private.activation_hint(model_id, name)"
    " from vae.versions v join vae.models using (model_id) where name = {1} order by version",
    *(
        f"select t.* from vae.{table} t join vae.models m using (model_id) where m.name = {{1}} order by t"
        for table in ("activations", "candidates", "event_types", "offers", "refreshes")
    ),
    *(
        f"select t.* from vae.{table} t join vae.versions using (version_id) join vae.models m using (model_id)"
        " where m.name = {1} order by t"
        for table in ("observations", "segments", "verifications")
    ),
)


def everything(connection: Connection, model: str) -> dict[str, list[Any]]:
    """Gives all that a model answers, and all that is told about it."""
    name = sql.Identifier(model)
    views = connection.execute(
        "select relname from pg_class where relnamespace = %s::regnamespace and relkind in ('v', 'm')", [model]
    ).fetchall()
    queries = [sql.SQL("select * from {}.{} t order by t").format(name, sql.Identifier(view)) for (view,) in views]
    queries += [sql.SQL(query).format(name, sql.Literal(model)) for query in _ASKED]
    given = {"users": USERS[:5], "user": USERS[0], "items": ITEMS, "item": ITEMS[0]}
    # Not all of them say an order.
    return {query.as_string(connection): sorted(connection.execute(query, given), key=repr) for query in queries}


def offer_and_set(connection: Connection, model: str, item: int, cost: int) -> None:
    connection.execute("select vae.create_offer(%s, 'sale', array[%s], 9, %s, 20)", [model, item, cost])
    connection.execute("select from vae.set_candidates(%s, 'few', 'few')", [model])


def test_what_happens_to_a_model_changes_nothing_of_another(trained: Connection) -> None:
    trained.execute("create table few as select unnest(%s) as item_id", [ITEMS[:4]])
    offer_and_set(trained, "shop", ITEMS[0], 1)
    # A version that waits.
    train(trained.info.dsn)
    trained.execute("call vae.refresh('shop')")
    for _ in range(3):
        trained.execute("select from vae.verify('shop'); select from vae.check_drift('shop')")
    before = everything(trained, "shop")
    assert all(before[query] for query in before if "offers t" in query or "candidates t" in query)

    # The other one's users are the same, and like other items; what the shop calls a view is a purchase there.
    trained.execute(
        "create table visits as select e.user_id, i.item_id, e.event_type, e.occurred_at from events e join ("
        "    select item_id as old, coalesce(lead(item_id, 5) over own, first_value(item_id) over own) as item_id"
        "    from (select distinct item_id from events) i window own as (order by item_id)"
        ") i on i.old = e.item_id"
    )
    Shop(events="visits").create_model(trained, "other", event_types={"view": "purchase"})
    for _ in range(2):
        train_and_activate(trained.info.dsn, "other")
    offer_and_set(trained, "other", ITEMS[5], 2)
    trained.execute("select from vae.set_candidates('other', 'many', 'visits', for_refresh => true)")
    trained.execute("set vae.log_retention = '1 microsecond'")
    for _ in range(2):
        trained.execute("call vae.refresh('other')")
        trained.execute("select from vae.verify('other'); select from vae.check_drift('other')")
    trained.execute("reset vae.log_retention")
    trained.execute("insert into visits select user_id, item_id, 'view', now() from events limit 5")
    for query, rows in everything(trained, "shop").items():
        assert rows == before[query], query

    trained.execute("select vae.drop_offer('other', 'sale'); select vae.drop_candidates('other', 'few')")
    trained.execute("select vae.set_event_type('other', 'look', 'view'); select from vae.rollback('other')")
    trained.execute(
        "select from vae.prune('other', keep => 0); select from vae.drop_version('other', 1, force => true)"
    )
    for query, rows in everything(trained, "shop").items():
        assert rows == before[query], query
    trained.execute("select vae.drop_model('other')")
    for query, rows in everything(trained, "shop").items():
        assert rows == before[query], query
