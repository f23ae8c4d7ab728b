"""Keys of every type go in and come out as the shop's own, live and materialized, and join without a cast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from conftest import create_database, drop_database
from pgvae.dataset import read_dataset
from pgvae.server import Server
from shop import SMALL, Shop, keys, train_and_activate

# Each public function of a model, each way to call it: rows of a join with the shop's own tables.
SOME_USERS = "(select user_id from users order by user_id limit 2) u"
SOME_ITEMS = "(select item_id from items order by item_id limit 2) i"
ALL_ITEMS = "(select array_agg(item_id order by item_id) as item_ids from items) a"
CALLS = {
    "history": [f"{SOME_USERS} cross join lateral shop.history(u.user_id) r join items using (item_id)"],
    "features": [f"{SOME_USERS} cross join lateral shop.features(u.user_id) r"],
    "recommend": [f"{SOME_USERS} cross join lateral shop.recommend(u.user_id) r join items using (item_id)"],
    "recommend_for_users": [
        "(select array_agg(user_id) as user_ids from users) a cross join lateral shop.recommend_for_users(a.user_ids) r"
        " join users using (user_id) join items using (item_id)"
    ],
    "score": [f"{SOME_USERS} cross join {SOME_ITEMS} where shop.score(u.user_id, i.item_id) > 0"],
    "score_pairs": [
        "(select array_agg(user_id) as user_ids, array_agg(item_id) as item_ids from events) a"
        " cross join lateral shop.score_pairs(a.user_ids, a.item_ids) r join items using (item_id)"
    ],
    "embedding": [f"{SOME_USERS} where cardinality(shop.embedding(u.user_id)) > 0"],
    "churn": [f"{SOME_USERS} cross join lateral shop.churn(u.user_id) r join users own on own.user_id = r.user_id"],
    "explain_churn": [f"{SOME_USERS} cross join lateral shop.explain_churn(u.user_id) r"],
    "response": [f"{SOME_USERS} cross join {SOME_ITEMS} where shop.response(u.user_id, i.item_id) > 0"],
    "response_to_items": [
        f"{SOME_USERS} cross join {ALL_ITEMS} where shop.response_to_items(u.user_id, a.item_ids) > 0"
    ],
    # Nothing that this shop tells says what an offer adds.
    "uplift": [f"{SOME_USERS} cross join {SOME_ITEMS} where shop.uplift(u.user_id, i.item_id) is null"],
    "audience": [f"{SOME_ITEMS} cross join lateral shop.audience(i.item_id, 5) r join users using (user_id)"],
    "audience_of_items": [
        f"{ALL_ITEMS} cross join lateral shop.audience_of_items(a.item_ids, 5) r join users using (user_id)"
    ],
    "audience_of_category": ["shop.audience_of_category('A', 5) r join users using (user_id)"],
    "explain": [
        f"{SOME_USERS} cross join {SOME_ITEMS} cross join lateral shop.explain(u.user_id, i.item_id) r"
        " join items own on own.item_id = r.event_item_id"
    ],
    "because": [f"{SOME_USERS} cross join {SOME_ITEMS} where shop.because(u.user_id, i.item_id) like 'because %'"],
    "item_titles": [f"{ALL_ITEMS} cross join lateral shop.item_titles(a.item_ids) r join items using (item_id, title)"],
    "recommend_for": [
        f"{SOME_ITEMS} cross join lateral shop.recommend_for("
        "jsonb_build_array(jsonb_build_object('item_id', i.item_id))) r join items own on own.item_id = r.item_id"
    ],
    "recommend_for_items": [
        f"{SOME_ITEMS} cross join lateral shop.recommend_for_items(array[i.item_id]) r"
        " join items own on own.item_id = r.item_id"
    ],
    "support": [
        f"{ALL_ITEMS} cross join lateral shop.support(a.item_ids, a.item_ids, array['purchase']) r"
        " join items using (item_id)"
    ],
    "related": [f"{SOME_ITEMS} cross join lateral shop.related(i.item_id) r join items own on own.item_id = r.item_id"],
    "basket": [
        f"{SOME_ITEMS} cross join lateral shop.basket(array[i.item_id]) r join items own on own.item_id = r.item_id"
    ],
    "item_days": [
        f"{SOME_ITEMS} cross join lateral shop.item_days(i.item_id) r join items own on own.item_id = r.item_id"
    ],
    "all_item_days": ["shop.all_item_days() r join items using (item_id)"],
    "demand": [f"{SOME_ITEMS} cross join lateral shop.demand(i.item_id) r join items own on own.item_id = r.item_id"],
    "demand_by_category": ["shop.demand_by_category() r join items using (category)"],
    "segment": [f"{SOME_USERS} cross join lateral shop.segment(u.user_id) r"],
}
DOMAINS = {"shop_id": "integer", "shop_code": "text"}
PUBLIC = "vae.models m cross join lateral vae_private.model_objects(m.model_id) o where o.is_public and m.name = 'shop'"


@pytest.fixture(
    scope="module",
    params=[("bigint", "text"), ("integer", "bigint"), ("uuid", "integer"), ("text", "uuid"), ("shop_id", "shop_code")],
    ids=lambda types: "-".join(types),
)
def shop(request: pytest.FixtureRequest, server: Server, template: str) -> Iterator[Shop]:
    """A shop with users and items of these key types, and all that a model can answer, refreshed."""
    # Keys of a domain come out in the type beneath it.
    user_type, item_type = (DOMAINS.get(name, name) for name in request.param)
    create_database(server, "key_types", template)
    made = Shop(user_type=user_type, item_type=item_type, user_keys=keys("user", user_type, 160))
    with psycopg.connect(server.dsn("key_types"), autocommit=True) as opened:
        for domain, base in DOMAINS.items():
            opened.execute(f"create domain {domain} as {base} check (value is not null)")
        replace(made, user_type=request.param[0], item_type=request.param[1], item_keys=made.items).make(opened)
        opened.execute("create table users as select distinct user_id from events")
        opened.execute("alter table users add country text")
        opened.execute("update users set country = left(md5(user_id::text), 1)")
        opened.execute(
            "create table items as select item_id, 'title of ' || item_id as title,"
            " chr(65 + (row_number() over (order by item_id))::integer % 3) as category"
            " from (select distinct item_id from events) i"
        )
        made.create_model(opened, users="users", items="items", options=SMALL | {"horizon_days": 7})
        train_and_activate(opened.info.dsn)
        opened.execute("call vae.refresh('shop')")
    yield made
    drop_database(server, "key_types")


@pytest.fixture
def typed(server: Server, shop: Shop) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.dsn("key_types"), autocommit=True) as opened:
        yield opened


def test_every_key_of_a_model_is_declared_in_the_shops_type(typed: psycopg.Connection[Any], shop: Shop) -> None:
    declared = typed.execute(
        "select o.object, a.name, format_type(a.type, null)"
        " from pg_proc p cross join unnest(p.proargnames, coalesce(p.proallargtypes, p.proargtypes::oid[]))"
        f" as a (name, type) join (select o.object from {PUBLIC} and o.kind = 'function') o"
        " on p.oid = to_regprocedure('shop.' || o.object)"
        " union all"
        f" select o.object, a.attname, format_type(a.atttypid, null) from (select o.object from {PUBLIC}) o"
        " join pg_attribute a on a.attrelid = to_regclass('shop.' || quote_ident(o.object)) and a.attnum > 0"
    ).fetchall()
    # These two give the column of the events as it is.
    as_it_is = ("clean_events", "outlier_users")
    assert {DOMAINS.get(kind, kind) for view, name, kind in declared if name == "user_id" and view in as_it_is} == {
        shop.user_type
    }
    users = {kind for view, name, kind in declared if name == "user_id" and view not in as_it_is}
    items = {kind for _, name, kind in declared if name.endswith("item_id")}
    lists = {kind for _, name, kind in declared if name in ("items", "item_ids", "with_item_ids") and "[]" in kind}
    assert (users, items, lists) == ({shop.user_type}, {shop.item_type}, {f"{shop.item_type}[]"})
    assert len([None for _, name, _ in declared if name == "user_id"]) > 15


@pytest.mark.parametrize("function", CALLS)
def test_every_function_joins_with_the_shops_tables(typed: psycopg.Connection[Any], function: str) -> None:
    for call in CALLS[function]:
        assert value(typed, f"select count(*) from {call}") > 0, call


def test_a_bare_literal_is_a_key_wherever_one_is_asked_for(typed: psycopg.Connection[Any], shop: Shop) -> None:
    user, item = f"'{shop.users[0]}'", f"'{shop.items[0]}'"
    literals = {
        "user_id": user,
        "item_id": item,
        "user_ids": f"'{{{shop.users[0]}}}'",
        **dict.fromkeys(("item_ids", "items", "with_item_ids"), f"'{{{shop.items[0]}}}'"),
        "event_types": "'{purchase}'",
        "events": "'[]'",
        "category": "'A'",
    }
    functions = typed.execute(
        "select p.proname, coalesce(p.proargnames[:p.pronargs - p.pronargdefaults], '{}')"
        f" from pg_proc p join (select o.object from {PUBLIC} and o.kind = 'function') o"
        " on p.oid = to_regprocedure('shop.' || o.object)"
    ).fetchall()
    assert {name for name, _ in functions} == {*CALLS}
    for name, arguments in functions:
        call = f"shop.{name}({', '.join(literals[argument] for argument in arguments)})"
        assert value(typed, f"select count(*) from {call}") >= 0, call


def test_no_function_of_a_model_is_forgotten(typed: psycopg.Connection[Any]) -> None:
    names = f"select split_part(o.object, '(', 1), count(*) from {PUBLIC} and o.kind = 'function' group by 1"
    assert dict(typed.execute(names).fetchall()) == {name: len(calls) for name, calls in CALLS.items()}


def test_every_view_joins_with_the_shops_tables_and_loses_no_row(typed: psycopg.Connection[Any]) -> None:
    columns = typed.execute(
        f"select o.object, a.attname from (select o.object from {PUBLIC} and o.kind = 'view') o"
        " join pg_attribute a on a.attrelid = to_regclass('shop.' || quote_ident(o.object))"
        " where a.attname in ('user_id', 'item_id', 'related_item_id', 'event_item_id')"
    ).fetchall()
    assert len(columns) >= 9
    for view, column in columns:
        table = "users" if column == "user_id" else "items"
        joined = f"select count(*) from shop.{view} v join {table} t on t.{table[:-1]}_id = v.{column}"
        rows = value(typed, f"select count(v.{column}) from shop.{view} v")
        assert value(typed, joined) == rows, (view, column)
        # No user of this shop is an outlier; whatever else is empty would join with anything.
        assert rows > 0 or view in ("outlier_users", "offer_responses"), view


def test_a_list_that_a_driver_sends_without_a_type_is_told(typed: psycopg.Connection[Any], shop: Shop) -> None:
    if shop.item_type == "text":
        with pytest.raises(psycopg.Error) as refused:
            typed.execute("select * from shop.audience(%s, 5)", [shop.items[:2]])
        assert refused.value.diag.sqlstate == "VA051"
        assert "%s::text[]" in str(refused.value.diag.message_hint)
    # No other function of that name: the list becomes what it has to be.
    if shop.item_type in ("text", "integer"):
        assert typed.execute("select * from shop.audience_of_items(%s, 5)", [shop.items[:2]]).fetchall()
    assert typed.execute(
        f"select * from shop.audience_of_items(%s::{shop.item_type}[], 5)", [shop.items[:2]]
    ).fetchall()


def test_a_key_of_the_shop_finds_its_row_by_the_index(typed: psycopg.Connection[Any], shop: Shop) -> None:
    stored = typed.execute(
        "select i.tablename, a.attname from pg_indexes i"
        " join pg_index x on x.indexrelid = format('%I.%I', i.schemaname, i.indexname)::regclass"
        " join pg_attribute a on a.attrelid = x.indrelid and a.attnum = x.indkey[0]"
        " where i.schemaname = 'shop' and x.indisunique and i.tablename like '%\\_materialized'"
    ).fetchall()
    assert len(stored) >= 5
    typed.execute("set enable_seqscan to off; set enable_bitmapscan to off")
    for relation, column in stored:
        table = "users" if column == "user_id" else "items"
        if column not in ("user_id", "item_id"):
            continue
        key = (shop.users if table == "users" else shop.items)[0]
        view = relation.removesuffix("_materialized")
        plan = typed.execute(f"explain select * from shop.{view} where {column} = '{key}'").fetchall()
        assert any("Index Scan" in line and relation in line for (line,) in plan), (view, plan)


def test_the_view_holds_what_the_live_call_gives(typed: psycopg.Connection[Any], shop: Shop) -> None:
    users = shop.users[:20]
    stored = typed.execute(
        "select user_id, rank, item_id, score, is_cold_start, model_version from shop.recommendations"
        f" where user_id = any (%s::{shop.user_type}[]) order by 1, 2",
        [users],
    ).fetchall()
    live = typed.execute(
        "select u, r.rank, r.item_id, r.score, r.is_cold_start, r.model_version"
        f" from unnest(%s::{shop.user_type}[]) u, shop.recommend(u, 20) r order by u, r.rank",
        [users],
    ).fetchall()
    assert {row[0] for row in stored} == set(users)
    assert {row[2] for row in stored} <= set(shop.items)
    assert [row[:3] + row[4:] for row in live] == [row[:3] + row[4:] for row in stored]
    assert [row[3] for row in live] == pytest.approx([row[3] for row in stored], rel=1e-5)
    # The score of one item is that of the list, and a bare literal is a key, as an analyst types it.
    assert value(typed, f"select shop.score('{stored[0][0]}', '{stored[0][2]}')") == pytest.approx(
        stored[0][3], rel=1e-5
    )


def test_many_users_get_the_lists_that_each_gets_alone(typed: psycopg.Connection[Any], shop: Shop) -> None:
    stranger = keys("user", shop.user_type, 200)[-1]
    users = [*shop.users, stranger, shop.users[0]]
    rows = "r.item_id, r.is_cold_start, r.model_version, r.score, coalesce(r.probability, -1)"
    some = f"%s::{shop.user_type}[]"
    for options in (None, '{"exclude_seen": false, "at_most": {"category": 2}, "min_score": 0.005}'):
        many = typed.execute(
            f"select r.user_id, r.rank, {rows} from shop.recommend_for_users({some}, 7, %s) r order by 1, 2",
            [users, options],
        ).fetchall()
        alone = typed.execute(
            f"select u, r.rank, {rows} from (select distinct u from unnest({some}) u) u, shop.recommend(u, 7, %s) r"
            " order by 1, 2",
            [users, options],
        ).fetchall()
        assert {user for user, *_ in many} == {*users}
        assert [row[:5] for row in many] == [row[:5] for row in alone]
        for place in (5, 6):
            assert [row[place] for row in many] == pytest.approx([row[place] for row in alone], rel=1e-5)
    assert {(row[0], row[6]) for row in many if row[3]} == {(stranger, -1)}


def test_an_audience_may_be_among_keys_that_no_user_of_the_type_has(typed: psycopg.Connection[Any], shop: Shop) -> None:
    column_type = {"integer": "bigint"}.get(shop.user_type, shop.user_type)
    with typed.transaction(force_rollback=True):
        typed.execute(f"create table few as select user_id::{column_type} as user_id from users order by 1 limit 3")
        chosen = typed.execute("select user_id from few").fetchall()
        stranger = {"bigint": -7, "integer": 3_000_000_000}.get(shop.user_type, keys("user", shop.user_type, 200)[-1])
        typed.execute(f"insert into few values (%s::{column_type})", [stranger])
        query = 'select user_id from shop.audience(%s, 1000, \'{"among": "public.few"}\')'
        assert sorted(typed.execute(query, [shop.items[0]]).fetchall()) == sorted(chosen)


def test_a_session_names_items_in_any_spelling_of_their_type(typed: psycopg.Connection[Any], shop: Shop) -> None:
    item = shop.items[0]
    spelled = {"uuid": str(item).upper(), "text": item}.get(shop.item_type, f" {item} ")
    query = "select item_id, score from shop.recommend_for(jsonb_build_array(jsonb_build_object('item_id', %s::text)))"
    assert typed.execute(query, [spelled]).fetchall() == typed.execute(query, [str(item)]).fetchall()


def value(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


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


def test_the_numbers_of_users_and_items_do_not_depend_on_the_locale(connection: psycopg.Connection) -> None:
    connection.execute(
        'create table events (user_id text collate "en-x-icu", item_id text collate "en-x-icu", event_type text,'
        " occurred_at timestamptz)"
    )
    # In the order of English a stands before B, in that of bytes behind it.
    connection.execute("insert into events values ('a', 'y', 'view', now()), ('B', 'Z', 'view', now())")
    connection.execute("select vae.create_model('shop', events => 'events')")
    with connection.transaction():
        dataset = read_dataset(connection, "shop")
    assert [dataset.item_keys[item] for item in dataset.item] == ["Z", "y"]


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


def test_purchases_of_items_newer_than_the_version_count_for_who_buys(
    typed: psycopg.Connection[Any], shop: Shop
) -> None:
    newer = keys("item", shop.item_type, 200)[-2:]
    old, new = shop.users[0], keys("user", shop.user_type, 200)[-1]
    assert not {*newer} & {*shop.items} and new not in shop.users
    # Of one moment: two items are two purchases.
    bought = (
        f"insert into events select u, i, 'purchase', max(e.occurred_at) + interval '1 day' from events e,"
        f" unnest(%s::{shop.user_type}[]) u, unnest(%s::{shop.item_type}[]) i group by u, i"
    )
    churn = f"select u, r.* from unnest(%s::{shop.user_type}[]) u, shop.churn(u) r order by u"
    with typed.transaction(force_rollback=True):
        typed.execute(f"insert into users (user_id) values (%s::{shop.user_type})", [new])
        typed.execute(f"insert into items (item_id) select unnest(%s::{shop.item_type}[])", [newer])
        before = typed.execute(churn, [[old, new]]).fetchall()
        typed.execute(bought, [[old, new], newer])
        after = typed.execute(churn, [[old, new]]).fetchall()
        columns = [column.name for column in typed.execute(churn, [[old, new]]).description or ()]
        newest = value(typed, "select max(occurred_at) from events")
        for one, other in zip(before, after, strict=True):
            first, then = dict(zip(columns, one, strict=True)), dict(zip(columns, other, strict=True))
            assert first["is_cold_start"] == (first["u"] == new)
            assert not then["is_cold_start"]
            assert first["last_event_at"] != then["last_event_at"] == newest
            assert first["purchase_probability"] != then["purchase_probability"]
        # Of all users at once it is the same.
        stored = dict(
            typed.execute("select user_key, (purchase_probability, expected_purchases) from vae_private.churn_all(1)")
        )
        for row in after:
            found = dict(zip(columns, row, strict=True))
            both = stored[str(found["u"])]
            assert [float(part) for part in both] == pytest.approx(
                [found["purchase_probability"], found["expected_purchases"]], rel=1e-6
            )
        # The lists are those of before: nothing is known of such items. But who buys is known.
        lists = f"select is_cold_start, item_id, probability from shop.recommend(%s::{shop.user_type}, 20)"
        response = f"select shop.response(%s::{shop.user_type}, %s::{shop.item_type})"
        audience = f"select user_id, response_probability from shop.audience(%s::{shop.item_type}, 1000)"
        everybody = dict(typed.execute(audience, [shop.items[0]]).fetchall())
        for user in (old, new):
            (is_cold, best, probability), *_ = typed.execute(lists, [user]).fetchall()
            assert (is_cold, best in shop.items) == (user == new, True)
            assert typed.execute(response, [user, best]).fetchone() == (pytest.approx(probability, rel=1e-5),)
            of_first = typed.execute(response, [user, shop.items[0]]).fetchone()
            assert of_first == (pytest.approx(everybody[user], rel=1e-5),)
