"""Keys of every type go in and come out as the shop's own, live and materialized."""

from __future__ import annotations

import psycopg
import pytest

from shop import Shop, train_and_activate


@pytest.mark.parametrize(
    ("user_type", "item_type"), [("bigint", "text"), ("integer", "bigint"), ("uuid", "integer"), ("text", "uuid")]
)
def test_every_key_type_is_scored_in_its_own_type(
    connection: psycopg.Connection, user_type: str, item_type: str
) -> None:
    shop = Shop(user_type=user_type, item_type=item_type)
    shop.make(connection)
    shop.create_model(connection)
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    # A bare literal, as an analyst types it.
    user = connection.execute(f"select quote_literal('{shop.users[0]}')").fetchone()
    assert user is not None
    types = connection.execute(
        f"select distinct pg_typeof(rank)::text, pg_typeof(item_id)::text, pg_typeof(score)::text,"
        f" pg_typeof(is_cold_start)::text, pg_typeof(model_version)::text from shop.recommend({user[0]})"
    ).fetchall()
    assert types == [("integer", item_type, "real", "boolean", "integer")]
    assert connection.execute(
        "select distinct pg_typeof(user_id)::text, pg_typeof(item_id)::text from shop.clean_events"
        " union select pg_typeof(user_id)::text, pg_typeof(item_id)::text from shop.recommendations"
    ).fetchall() == [(user_type, item_type)]
    assert connection.execute(f"select distinct pg_typeof(item_id)::text from shop.history({user[0]})").fetchall() == [
        (item_type,)
    ]

    stored = connection.execute(
        "select user_id, rank, item_id, score, is_cold_start, model_version from shop.recommendations order by 1, 2"
    ).fetchall()
    live = connection.execute(
        "select u, r.rank, r.item_id, r.score, r.is_cold_start, r.model_version"
        f" from unnest(%s::{user_type}[]) u, shop.recommend(u, 20) r order by u, r.rank",
        [shop.users],
    ).fetchall()
    assert {row[0] for row in stored} == set(shop.users)
    assert {row[2] for row in stored} <= set(shop.items)
    assert [row[:3] + row[4:] for row in live] == [row[:3] + row[4:] for row in stored]
    assert [row[3] for row in live] == pytest.approx([row[3] for row in stored], rel=1e-5)
    # The score of one item is that of the list, and a join needs no cast.
    scores = connection.execute(
        "select r.score, shop.score(r.user_id, r.item_id) from shop.recommendations r"
        " join events e on e.user_id = r.user_id group by r.user_id, r.item_id, r.score"
    ).fetchall()
    assert len(scores) == len(stored)
    assert [score for score, _ in scores] == pytest.approx([score for _, score in scores], rel=1e-5)
    dimensions = connection.execute(
        "select cardinality(shop.embedding(u)) from (select distinct user_id from events) e (u)"
    ).fetchall()
    assert dimensions == [(4,)] * 30
    assert connection.execute(
        "select indexdef like '%UNIQUE%(user_id)%' from pg_indexes where tablename = 'recommendations_materialized'"
    ).fetchall() == [(True,)]


@pytest.mark.parametrize("known", [True, False])
def test_users_without_events_get_the_popular_items_where_the_shop_has_a_table_of_users(
    connection: psycopg.Connection, known: bool
) -> None:
    shop = Shop(user_type="uuid", item_type="text")
    shop.make(connection)
    connection.execute(
        "create table users as select distinct user_id from events"
        " union all select '00000000-0000-0000-0000-000000000000'"
    )
    shop.create_model(connection, **({"users": "users"} if known else {}))
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    stored = connection.execute(
        "select rank, item_id, score, is_cold_start from shop.recommendations where user_id = %s order by rank",
        ["00000000-0000-0000-0000-000000000000"],
    ).fetchall()
    live = connection.execute(
        "select rank, item_id, score, is_cold_start from shop.recommend(%s, 20)",
        ["00000000-0000-0000-0000-000000000000"],
    ).fetchall()
    assert stored == (live if known else [])
    popular = connection.execute(
        "select item_id, count(distinct user_id) from events where event_type = 'purchase' group by item_id"
    ).fetchall()
    count = dict(popular)
    assert [count.get(row[1], 0) for row in live] == sorted((count.get(item, 0) for item in shop.items), reverse=True)
    assert {row[3] for row in live} == {True}


def test_a_user_key_too_long_for_an_index_stops_no_refresh(connection: psycopg.Connection) -> None:
    shop = Shop(user_type="text")
    shop.make(connection)
    connection.execute("create table users as select distinct user_id from events")
    # Not compressible, as a repeated letter would be.
    connection.execute("insert into users select string_agg(md5(n::text), '') from generate_series(1, 320) n")
    shop.create_model(connection, users="users")
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    assert connection.execute("select count(distinct user_id) from shop.recommendations").fetchone() == (30,)


def test_an_outlier_gets_the_same_answer_from_the_view_as_live(connection: psycopg.Connection) -> None:
    shop = Shop()
    shop.make(connection)
    user = shop.users[3]
    connection.execute(
        "insert into events select %s, %s, 'view', timestamptz '2024-02-01' + n * interval '1 second'"
        " from generate_series(1, 300) n",
        [user, shop.items[0]],
    )
    shop.create_model(connection)
    assert connection.execute("select user_id from shop.outlier_users").fetchall() == [(user,)]
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    view = "select rank, item_id, is_cold_start from shop.recommendations where user_id = %s order by rank"
    live = "select rank, item_id, is_cold_start from shop.recommend(%s, 20) order by rank"
    stored = connection.execute(view, [user]).fetchall()
    assert stored == connection.execute(live, [user]).fetchall()
    assert not stored[0][2]
