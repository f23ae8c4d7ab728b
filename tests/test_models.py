"""Defining a model, and the quality gate before its training."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import Diagnostic
from psycopg.types.json import Jsonb

from pgvae.errors import PgvaeError
from shop import SMALL, Shop, create_model, keys, refusal, train, train_and_activate

CHECKS = [
    "null_user_ids", "null_item_ids", "null_timestamps", "overlong_ids", "unknown_event_types", "future_timestamps",
    "absurd_timestamps", "orphan_users", "orphan_items", "returns", "duplicates", "outlier_users", "items_seen_once",
    "enough_events", "enough_users", "enough_items", "enough_days",
]  # fmt: skip


def report(connection: psycopg.Connection, model: str = "shop") -> dict[str, tuple[str, int]]:
    """The quality report: status and rows of each check."""
    rows = connection.execute("select check_name, status, row_count from vae.check_events(%s)", [model]).fetchall()
    return {name: (status, count) for name, status, count in rows}


def schemas(connection: psycopg.Connection) -> list[Any]:
    """What a refused call must leave as it was."""
    return connection.execute(
        "select nspname from pg_namespace union all select name from vae.models"
        " union all select name from vae.event_types"
    ).fetchall()


@pytest.fixture
def shop(connection: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a shop, without a model."""
    Shop().make(connection)
    return connection


@pytest.fixture(scope="module")
def untouched(shared: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a shop of which no model is made."""
    Shop().make(shared)
    shared.execute(
        "alter table events add id serial, add price numeric, add tags text[], add gone bigint;"
        " alter table events drop gone;"
        " create index events_by_user on events (user_id);"
        " create table people (id text);"
        " create temporary table passing as table events;"
        " create domain shop_number as integer; create domain shop_id as shop_number check (value > 0)"
    )
    return shared


@pytest.fixture
def rolled_back(untouched: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """As `untouched`, in a transaction that is rolled back."""
    with untouched.transaction(force_rollback=True):
        yield untouched


# vae.create_model


def refused_model(connection: psycopg.Connection, **arguments: Any) -> Diagnostic:
    before = schemas(connection)
    with pytest.raises(psycopg.Error) as caught:
        create_model(connection, **({"model": "shop", "events": "events"} | arguments))
    assert caught.value.diag.message_hint
    assert schemas(connection) == before
    return caught.value.diag


def test_a_model_is_defined_with_one_call(shop: psycopg.Connection) -> None:
    made = shop.execute("select * from vae.create_model('shop', events => 'events')").fetchall()
    assert [row[0] for row in made][:8] == [
        "shop.outlier_users",
        "shop.clean_events",
        "shop.history(bigint)",
        "shop.recommend(bigint, integer, jsonb)",
        "shop.score(bigint, bigint)",
        "shop.score_pairs(bigint[], bigint[])",
        "shop.embedding(bigint)",
        "shop.recommendations",
    ]
    assert all(row[1] for row in made)
    assert shop.execute(
        "select events_schema, events_table, event_type_column, quantity_column, created_by from vae.models"
    ).fetchone() == ("public", "events", "event_type", None, "postgres")


@pytest.mark.parametrize(
    "name", ["select", "table", "user", "Shop", "my shop", "1st", "pg_shop", "vae", "x" * 49, None]
)
def test_a_name_that_cannot_be_a_schema_is_refused(untouched: psycopg.Connection, name: str | None) -> None:
    refused = refused_model(untouched, model=name)
    assert refused.sqlstate == "42602"
    assert f'"{name or "<NULL>"}"' in str(refused.message_primary)


def test_a_name_that_is_taken_is_refused(shop: psycopg.Connection) -> None:
    create_model(shop, "shop", events="events")
    refused = refused_model(shop)
    assert (refused.sqlstate, refused.message_primary) == ("42710", 'model "shop" exists already')
    assert "vae.drop_model('shop')" in str(refused.message_hint)
    refused = refused_model(shop, model="public")
    assert (refused.sqlstate, refused.message_primary) == ("42P06", 'schema "public" exists already')
    # Of a model whose schema somebody dropped the row is left.
    shop.execute("drop schema shop cascade")
    refused = refused_model(shop)
    assert (refused.sqlstate, refused.message_primary) == ("42710", 'model "shop" exists already')
    notices: list[Diagnostic] = []
    shop.add_notice_handler(notices.append)
    shop.execute("select vae.drop_model('shop')")
    assert not notices
    create_model(shop, "shop", events="events")


def test_of_two_sessions_that_make_a_model_at_once_one_is_told_that_it_exists(shop: psycopg.Connection) -> None:
    create = "select from vae.create_model('shop', 'events')"
    waits = "select count(*) from pg_stat_activity where query = %s and wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as threads, psycopg.connect(shop.info.dsn, autocommit=True) as other:
        with shop.transaction():
            shop.execute(create)
            refused = threads.submit(refusal, other, create)
            while not refused.done() and shop.execute(waits, [create]).fetchone() != (1,):
                # Within a transaction the activity is read once.
                shop.execute("select pg_stat_clear_snapshot()")
                time.sleep(0.02)
        told = refused.result(60)
    assert (told.sqlstate, told.message_primary) == ("42710", 'model "shop" exists already')
    assert "vae.drop_model('shop')" in str(told.message_hint)


def test_a_table_that_does_not_exist_is_named(untouched: psycopg.Connection) -> None:
    refused = refusal(untouched, "select * from vae.create_model('shop', events => 'nothing')")
    assert (refused.sqlstate, refused.message_primary) == ("42P01", 'relation "nothing" does not exist')


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message"),
    [
        ({"events": None}, "22004", "events is null"),
        ({"events": "events_id_seq"}, "42809", "public.events_id_seq is not a table or view"),
        ({"events": "events_by_user"}, "42809", "public.events_by_user is not a table or view"),
        ({"events": "passing"}, "42809", "passing is temporary"),
        ({"user_id": "customer"}, "42703", 'public.events has no column "customer"'),
        ({"item_id": "Item_Id"}, "42703", 'public.events has no column "Item_Id"'),
        ({"occurred_at": None}, "42703", 'public.events has no column "<NULL>"'),
        ({"event_type": "kind"}, "42703", 'public.events has no column "kind"'),
        ({"quantity": "pieces"}, "42703", 'public.events has no column "pieces"'),
        ({"user_id": "ctid"}, "42703", 'public.events has no column "ctid"'),
        ({"user_id": "gone"}, "42703", 'public.events has no column "gone"'),
        ({"user_id": "price"}, "42804", 'column "price" of public.events has the type numeric'),
        ({"item_id": "tags"}, "42804", 'column "tags" of public.events has the type text[]'),
        ({"occurred_at": "event_type"}, "42804", 'column "event_type" of public.events has the type text'),
        ({"quantity": "event_type"}, "42804", 'column "event_type" of public.events has the type text'),
        ({"users": "people"}, "42703", 'public.people has no column "user_id"'),
        (
            {"users": "people", "users_key": "id"},
            "42804",
            "keys of users differ: bigint in public.events, text in public.people",
        ),
        (
            {"items": "people", "items_key": "id"},
            "42804",
            "keys of items differ: bigint in public.events, text in public.people",
        ),
    ],
)
def test_tables_and_columns_that_do_not_fit_are_refused(
    untouched: psycopg.Connection, arguments: dict[str, Any], sqlstate: str, message: str
) -> None:
    refused = refused_model(untouched, **arguments)
    assert (refused.sqlstate, refused.message_primary) == (sqlstate, message)


def test_keys_of_other_tables_are_called_as_in_the_events_unless_they_are_named(
    rolled_back: psycopg.Connection,
) -> None:
    rolled_back.execute(
        "create view orders as select user_id as customer, item_id as sku, occurred_at from events;"
        "create view customers as select distinct customer from orders;"
        # Both names: that of the events is meant.
        "create view goods as select distinct sku, 'x' as item_id, 'y' as title from orders;"
        "create view people_of_old as select distinct customer as user_id from orders"
    )
    columns = {"user_id": "customer", "item_id": "sku", "event_type": "", "quantity": ""}
    create_model(rolled_back, "shop", events="orders", users="customers", items="goods", **columns)
    keys = "select users_key_column, items_key_column from vae.models where name = %s"
    assert rolled_back.execute(keys, ["shop"]).fetchall() == [("customer", "sku")]
    create_model(rolled_back, "usual", events="orders", users="people_of_old", **columns)
    assert rolled_back.execute(keys, ["usual"]).fetchall() == [("user_id", None)]
    rolled_back.execute("select vae.set_tables('usual', users => 'customers', items => 'goods')")
    assert rolled_back.execute(keys, ["usual"]).fetchall() == [("customer", "sku")]
    rolled_back.execute("select * from vae.set_candidates('usual', 'all', 'goods')")
    rolled_back.execute("select vae.create_offer('usual', 'sale', array[1], among => 'customers')")
    rolled_back.execute("select vae.create_offer('usual', 'old', array[1], among => 'people_of_old')")
    assert rolled_back.execute("select item_id_column from vae.candidates").fetchall() == [("sku",)]
    assert rolled_back.execute("select among_column from vae.offers order by offer_id").fetchall() == [
        ("customer",), ("user_id",),
    ]  # fmt: skip


def test_a_quantity_that_is_none_by_its_name_is_refused_with_a_way_out(rolled_back: psycopg.Connection) -> None:
    rolled_back.execute("alter table events add quantity text")
    with rolled_back.transaction(force_rollback=True):
        refused = refusal(rolled_back, "select * from vae.create_model('shop', events => 'events')")
    assert (refused.sqlstate, refused.message_primary) == (
        "42804", 'column "quantity" of public.events has the type text',
    )  # fmt: skip
    assert "give a view that casts the column; or take none: quantity => ''" in str(refused.message_hint)
    create_model(rolled_back, "shop", events="events", quantity="")
    assert rolled_back.execute("select quantity_column from vae.models").fetchall() == [(None,)]


def test_columns_that_are_taken_by_their_names_are_told_and_can_be_refused(shop: psycopg.Connection) -> None:
    shop.execute("alter table events add quantity integer default 0")
    notices: list[tuple[str | None, str | None]] = []
    shop.add_notice_handler(lambda notice: notices.append((notice.message_primary, notice.message_hint)))
    create_model(shop, "taken", events="events")
    assert notices == [
        (
            'column "event_type" of public.events is taken as the type of the event',
            "if it is something else: event_type => '', or the name of another column",
        ),
        (
            'column "quantity" of public.events is taken as the quantity: rows of 0 or less are returns, and left out',
            "if it is something else: quantity => '', or the name of another column",
        ),
    ]
    notices.clear()
    create_model(shop, "named", events="events", event_type="event_type", quantity="quantity")
    create_model(shop, "refused", events="events", event_type="", quantity="")
    assert not notices
    columns = "select name, event_type_column, quantity_column from vae.models order by name"
    assert shop.execute(columns).fetchall() == [
        ("named", "event_type", "quantity"),
        ("refused", None, None),
        ("taken", "event_type", "quantity"),
    ]
    assert shop.execute("select count(*) from taken.clean_events").fetchone() == (0,)
    assert shop.execute("select distinct event_type from refused.clean_events").fetchall() == [("purchase",)]


def test_what_it_means_that_no_column_is_the_event_type_or_quantity_is_told(shop: psycopg.Connection) -> None:
    shop.execute(
        "create view sales as"
        " select user_id as customer, item_id, occurred_at, event_type as action, 1 as pieces from events"
    )
    notices: list[tuple[str | None, str | None]] = []
    shop.add_notice_handler(lambda notice: notices.append((notice.message_primary, notice.message_hint)))
    create_model(shop, "unnamed", events="sales", user_id="customer")
    assert notices == [
        (
            "each row of public.sales counts as a purchase: no column says what happened",
            "name it if one of these is it, event_type => '...': action; else say event_type => ''",
        ),
        (
            "each row of public.sales counts as one piece, a return too: no column is a quantity",
            "name it if one of these is it, quantity => '...': pieces; else say quantity => ''",
        ),
    ]
    notices.clear()
    create_model(shop, "named", events="sales", user_id="customer", event_type="action", quantity="pieces")
    create_model(shop, "refused", events="sales", user_id="customer", event_type="", quantity="")
    shop.execute("create view bare as select user_id, item_id, occurred_at from events")
    create_model(shop, "bare", events="bare")
    assert not notices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 1}, 'option "colour" is unknown'),
        ({"min_events": "many"}, 'option "min_events" is "many"'),
        ({"min_events": 0}, 'option "min_events" is 0'),
        ({"min_events": None}, 'option "min_events" is null'),
        ({"min_users": 10**9}, 'option "min_users" is 1000000000'),
        ({"max_history": 2.5}, 'option "max_history" is 2.5'),
        ({"recommendations": 0.5}, 'option "recommendations" is 0.5'),
        ({"recommendations": 10_001}, 'option "recommendations" is 10001'),
        ({"recommendations": True}, 'option "recommendations" is true'),
        ({"earliest": "soon"}, 'option "earliest" is "soon"'),
        ({"earliest": ""}, 'option "earliest" is ""'),
        ({"earliest": "2024-13-41"}, 'option "earliest" is "2024-13-41"'),
        ({"earliest": "2024-01-01 Nowhere/City"}, 'option "earliest" is "2024-01-01 Nowhere/City"'),
        ({"earliest": 2024}, 'option "earliest" is 2024'),
        ({"max_share": 0.5}, 'option "max_share" is 0.5'),
        ({"max_share": {"rain": 0.5}}, 'option "max_share" names the unknown check "rain"'),
        ({"max_share": {"duplicates": 1.5}}, 'option "max_share" of "duplicates" is 1.5'),
        ({"max_share": {"duplicates": "all"}}, 'option "max_share" of "duplicates" is "all"'),
        (Jsonb([1]), "options is [1]"),
        (Jsonb("x"), 'options is "x"'),
    ],
)
def test_options_that_mean_nothing_are_refused(untouched: psycopg.Connection, options: Any, message: str) -> None:
    refused = refused_model(untouched, options=options)
    assert (refused.sqlstate, refused.message_primary) == ("22023", message)


def test_whole_numbers_are_stored_as_integers(rolled_back: psycopg.Connection) -> None:
    create_model(rolled_back, "shop", events="events", options={"min_events": 500.0, "recommendations": 20.0})
    stored = rolled_back.execute("select options ->> 'min_events', options ->> 'recommendations' from vae.models")
    assert stored.fetchall() == [("500", "20")]
    assert rolled_back.execute("select count(*) > 9 from vae.check_events('shop')").fetchone() == (True,)


def test_options_of_a_model_change_and_the_others_stay(rolled_back: psycopg.Connection) -> None:
    create_model(rolled_back, "shop", events="events", options=SMALL | {"max_share": {"returns": 0.1}})
    before = rolled_back.execute("select options from vae.models").fetchall()[0][0]
    gate = "select threshold, status from vae.check_events('shop') where check_name = 'enough_events'"
    assert rolled_back.execute(gate).fetchall() == [(100.0, "pass")]
    given = {"min_events": 1_000_000.0, "earliest": "2024-02-01", "max_share": {"duplicates": 0.2}}
    rolled_back.execute("select vae.set_options('shop', %s)", [Jsonb(given)])
    after = rolled_back.execute("select options from vae.models").fetchall()[0][0]
    assert after == before | {
        "min_events": 1_000_000,
        "earliest": "2024-02-01",
        "max_share": before["max_share"] | {"duplicates": 0.2},
    }
    assert after["max_share"]["returns"] == 0.1
    assert rolled_back.execute(gate).fetchall() == [(1_000_000.0, "fail")]
    oldest = rolled_back.execute("select min(occurred_at) >= '2024-02-01 00:00+00' from shop.clean_events")
    assert oldest.fetchall() == [(True,)]


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        (None, "22004", "options is null"),
        (Jsonb([1]), "22023", "options is [1]"),
        (Jsonb({"colour": 1}), "22023", 'option "colour" is unknown'),
        (Jsonb({"horizon_days": 366}), "22023", 'option "horizon_days" is 366'),
        (Jsonb({"max_share": {"rain": 0.5}}), "22023", 'option "max_share" names the unknown check "rain"'),
        (Jsonb({"max_history": 40}), "22023", "max_history of model shop is 500 and stays so"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_changes(
    rolled_back: psycopg.Connection, options: Any, state: str, message: str
) -> None:
    create_model(rolled_back, "shop", events="events")
    before = rolled_back.execute("select options from vae.models").fetchall()
    with pytest.raises(psycopg.Error) as caught, rolled_back.transaction():
        rolled_back.execute("select vae.set_options('shop', %s)", [options])
    assert (caught.value.diag.sqlstate, caught.value.diag.message_primary) == (state, message)
    assert caught.value.diag.message_hint
    assert rolled_back.execute("select options from vae.models").fetchall() == before


def test_the_next_refresh_gives_so_many_items_as_are_asked_for(
    trained: psycopg.Connection,
) -> None:
    trained.execute("""select vae.set_options('shop', '{"recommendations": 3, "horizon_days": 7}')""")
    counts = "select min(n), max(n) from (select count(*) as n from shop.recommendations group by user_id) c"
    assert trained.execute(counts).fetchall() != [(3, 3)]
    trained.execute("call vae.refresh('shop', views => array['recommendations'])")
    assert trained.execute(counts).fetchall() == [(3, 3)]
    assert trained.execute("select * from vae.verify('shop')").fetchall()[0][2]


@pytest.mark.parametrize(
    ("event_types", "message"),
    [
        ({"buy": "bought"}, 'event type "buy" is mapped to "bought"'),
        ({"mystery": 3}, 'event type "mystery" has no meaning of its own'),
        ({"buy": {"event_type": "purchase", "weight": -1}}, 'weight of event type "buy" is -1'),
        ({"buy": {"event_type": "purchase", "weight": "heavy"}}, 'weight of event type "buy" is "heavy"'),
        ({"buy": {"event_type": "purchase", "wieght": 4}}, 'event type "buy" has the unknown key "wieght"'),
        ({"buy": ["purchase"]}, 'event type "buy" is mapped to ["purchase"]'),
        (Jsonb(["purchase"]), 'event_types is ["purchase"]'),
    ],
)
def test_event_types_that_mean_nothing_are_refused(
    untouched: psycopg.Connection, event_types: Any, message: str
) -> None:
    refused = refused_model(untouched, event_types=event_types)
    assert (refused.sqlstate, refused.message_primary) == ("22023", message)


def test_event_types_are_mapped_by_name_by_weight_or_by_both(shop: psycopg.Connection) -> None:
    given = {"look": "view", "buy": 7, "take": {"event_type": "add_to_cart", "weight": 0.5}, "view": {"weight": 3}}
    create_model(shop, "shop", events="events", event_types=given)
    shop.execute("select vae.set_event_type('shop', 'show', 'view')")
    shop.execute("select vae.set_event_type('shop', 'look', 'share', 2.5)")
    rows = shop.execute(
        "select name, event_type, weight from vae.event_types where name in ('look', 'buy', 'take', 'view', 'show')"
        " order by name"
    ).fetchall()
    assert rows == [
        ("buy", "purchase", 7.0), ("look", "share", 2.5), ("show", "view", 1.0), ("take", "add_to_cart", 0.5),
        ("view", "view", 3.0),
    ]  # fmt: skip


def test_event_types_can_be_left_out(shop: psycopg.Connection) -> None:
    """Of the gate, too: they are no dirt, and who has many of them is no outlier."""
    shop.execute(
        "insert into events select user_id, null, 'scroll', occurred_at from events;"
        " insert into events select %s, %s, 'ping', timestamptz '2024-02-01' + n * interval '1 s'"
        " from generate_series(1, 500) n".replace("%s", "{}").format(Shop().users[0], Shop().items[0])
    )
    Shop().create_model(shop, event_types={"scroll": "ignore", "ping": {"event_type": "ignore"}})
    found = report(shop)
    assert {name: row for name, row in found.items() if row[0] != "pass"} == {}
    assert found["enough_events"] == ("pass", 372)
    assert shop.execute("table shop.outlier_users").fetchall() == []
    # A word that means something by itself.
    shop.execute("select vae.set_event_type('shop', 'view', 'ignore')")
    kinds = "select distinct event_type from {} order by 1"
    for relation in ("shop.clean_events", "shop.refresh_events", f"shop.history({Shop().users[0]})"):
        assert shop.execute(kinds.format(relation).encode()).fetchall() == [("add_to_cart",), ("purchase",)]
    shop.execute("select vae.set_event_type('shop', 'view', null)")
    assert report(shop) == found
    refused = refusal(shop, "select vae.set_event_type('shop', 'scroll', null)")
    assert (refused.sqlstate, refused.message_primary) == (
        "22023", 'event type "scroll" has no meaning of its own',
    )  # fmt: skip
    assert "or to ignore" in str(refused.message_hint)
    refused = refusal(shop, "select vae.set_event_type('shop', 'scroll', 'ignore', 4)")
    assert (refused.sqlstate, refused.message_primary) == (
        "22023",
        'event type "scroll" is ignored, and its weight is 4',
    )
    assert refused.message_hint
    shop.execute("select vae.set_event_type('shop', 'scroll', 'ignore', 0)")


def test_an_event_type_without_a_name_is_refused(rolled_back: psycopg.Connection) -> None:
    create_model(rolled_back, "shop", events="events")
    with rolled_back.transaction(force_rollback=True):
        refused = refusal(rolled_back, "select vae.set_event_type('shop', null, 'view')")
    assert (refused.sqlstate, refused.message_primary) == ("22004", "name of an event type is null")
    assert refused.message_hint


def test_two_names_of_one_type_at_one_moment_are_one_event(trained: psycopg.Connection) -> None:
    """Live, in a refresh and in a training alike, with the greater weight."""
    user, item = trained.execute("select user_id, item_id from events order by 1, 2 limit 1").fetchone() or ()
    trained.execute("select vae.set_event_type('shop', 'look', 'view', 0.5)")
    trained.execute(
        "insert into events select %s, %s, n, '2024-03-01 10:00+00' from unnest(array['look', 'view']) n",
        [user, item],
    )
    (of_view,) = trained.execute("select weight from vae.event_types where name = 'view'").fetchone() or ()
    at_that_moment = "where occurred_at = '2024-03-01 10:00+00'"
    assert trained.execute(f"select count(*) from shop.history(%s) {at_that_moment}".encode(), [user]).fetchall() == [
        (1,)
    ]
    weights = trained.execute(f"select weight from shop.clean_events {at_that_moment}".encode()).fetchall()
    assert weights == [(of_view,)]
    trained.execute("call vae.refresh('shop')")
    scores = trained.execute(
        "select r.score, shop.score(r.user_id, r.item_id) from shop.recommendations r where r.user_id = %s", [user]
    ).fetchall()
    assert len(scores) > 1
    for stored, live in scores:
        assert live == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize(
    "query",
    [
        "select * from vae.check_events(%s)",
        "select vae.set_event_type(%s, 'look', 'view')",
        "select vae.rebuild_model(%s)",
        "select vae.drop_model(%s)",
        "select * from vae.activate(%s, 1)",
        "select * from vae.rollback(%s)",
        "call vae.refresh(%s)",
    ],
)
def test_a_model_that_does_not_exist_is_named(shop: psycopg.Connection, query: str) -> None:
    refused = refusal(shop, query, ["nothing"])
    assert (refused.sqlstate, refused.message_primary) == ("VA001", 'model "nothing" does not exist')
    assert "vae.create_model" in str(refused.message_hint)
    create_model(shop, "shop", events="events")
    assert refusal(shop, query, ["nothing"]).message_hint == "there are: shop"
    assert refusal(shop, query, [None]).sqlstate == "VA001"


# vae.check_events


# So many users that one of them does not change what is a busy day in this shop.
MANY = Shop(user_type="text", item_type="text", user_keys=keys("user", "text", 150))
BASE_TIME = datetime(2024, 2, 2, tzinfo=UTC)


def planted() -> dict[str, Sequence[tuple[Any, Any, Any, Any, Any]]]:
    """Rows that each concern one check of the gate: user, item, event type, time, quantity."""
    user, item = MANY.users[0], MANY.items[0]
    at = datetime(2024, 2, 1, tzinfo=UTC)
    later = datetime.now(UTC) + timedelta(hours=1)

    def moments(count: int) -> list[datetime]:
        return [at + timedelta(seconds=number) for number in range(count)]

    return {
        "null_user_ids": [(None, item, "view", moment, 1) for moment in moments(3)],
        "null_item_ids": [(user, None, "view", moment, 1) for moment in moments(2)],
        "null_timestamps": [(MANY.users[number], item, "view", None, 1) for number in range(4)],
        "overlong_ids": [("u" * 513, item, "view", at, 1), (user, "é" * 257, "view", at, 1)],
        "unknown_event_types": [(user, item, kind, at, 1) for kind in ("mystery", "View", " view", "", None)],
        "future_timestamps": [(user, item, "view", moment, 1) for moment in (later, "infinity", "294276-01-01")],
        "absurd_timestamps": [
            (user, item, "view", moment, 1) for moment in ("1970-01-01", "-infinity", "4713-01-01 BC")
        ],
        "orphan_users": [("a ghost", item, "view", moment, 1) for moment in moments(6)],
        "orphan_items": [(user, "a phantom", "view", moment, 1) for moment in moments(7)],
        "returns": [
            (user, item, "view", at + timedelta(days=1, seconds=-quantity), quantity) for quantity in (0, -1, -5)
        ],
        "duplicates": [(*MANY.rows()[number], None) for number in (0, 0, 5)],
        # What busy people do in two months, in one day, and on the day before.
        "outlier_users": [("a bot", item, "view", moment, 1) for moment in moments(150)]
        + [("a bot", item, "view", at - timedelta(days=1), 1)],
        "items_seen_once": [(user, f"rare {number}", "view", at, 1) for number in range(2)],
    }


@pytest.fixture
def dirty(connection: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a shop's events, users and items, and dirt of every kind in the events."""
    MANY.make(connection)
    connection.execute("alter table events add quantity integer")
    for rows in planted().values():
        MANY.add(connection, rows)
    # Searches and registrations have no item; they are no dirt.
    MANY.add(connection, [(MANY.users[0], None, kind, BASE_TIME, 1) for kind in ("search", "register")])
    connection.execute("create table users (user_id varchar(600)); create table items (item_id varchar(600))")
    for table, known in (
        ("users", [*MANY.users, "a bot", "u" * 513]),
        ("items", [*MANY.items, "rare 0", "rare 1", "é" * 257]),
    ):
        connection.execute(f"insert into {table} select unnest(%s::text[])", [known])
    # Keys that are there twice, or null, count once, and not.
    connection.execute("insert into users select user_id from users; insert into users values (null)")
    return connection


def test_each_check_counts_what_was_planted_and_nothing_else(dirty: psycopg.Connection) -> None:
    MANY.create_model(dirty, users="users", items="items")
    expected = {name: len(rows) for name, rows in planted().items()}
    found = report(dirty)
    assert list(found) == CHECKS
    assert {name: found[name][1] for name in expected} == expected
    remedy = dirty.execute("select remedy from vae.check_events('shop') where check_name = 'unknown_event_types'")
    assert remedy.fetchall() == [
        (
            "rows of event types without a meaning are left out: '', ' view', 'View', 'mystery'; say what they mean:"
            " select vae.set_event_type('shop', '', 'view'); or that they mean nothing here: 'ignore'"
            "; rows with no event type at all: 1; fill the column event_type, or give a view that does",
        )
    ]
    good = len(MANY.rows()) + expected["items_seen_once"]
    assert found["enough_events"] == ("pass", good)
    assert found["enough_users"] == ("pass", 150)
    assert found["enough_items"] == ("pass", 14)
    assert found["enough_days"] == ("pass", 55)
    assert dirty.execute("select count(*) from shop.clean_events").fetchone() == (good,)
    assert dirty.execute(
        "select user_id, busiest_day_events, threshold, events from shop.outlier_users"
    ).fetchall() == [("a bot", 150, 100.0, 151)]
    total = dirty.execute("select count(*) from events").fetchone()
    assert total is not None
    shares = dirty.execute("select check_name, share from vae.check_events('shop') where share > 0").fetchall()
    for name, share in shares:
        assert share == pytest.approx(expected[name] / (14 if name == "items_seen_once" else total[0])), name


def test_a_check_warns_below_its_threshold_and_fails_above_it(dirty: psycopg.Connection) -> None:
    gentle = dict.fromkeys(planted(), 1.0)
    MANY.create_model(dirty, "gentle", users="users", items="items", options=SMALL | {"max_share": gentle})
    strict = dict.fromkeys(planted(), 0.0)
    MANY.create_model(dirty, "strict", users="users", items="items", options=SMALL | {"max_share": strict})
    # Few items with one event are no reason to worry: only where they are the most of a shop's items.
    quiet = {"items_seen_once"}
    for name in planted():
        assert report(dirty, "gentle")[name][0] == ("pass" if name in quiet else "warn"), name
        assert report(dirty, "strict")[name][0] == ("pass" if name in quiet else "fail"), name
    for model in ("gentle", "strict"):
        rows = dirty.execute("select status, remedy from vae.check_events(%s)", [model]).fetchall()
        assert all((status == "pass") == (remedy is None) for status, remedy in rows)
    with pytest.raises(
        PgvaeError, match="quality gate of model strict failed: null_user_ids: rows without a user"
    ) as caught:
        train(dirty.info.dsn, "strict")
    assert "pgvae train strict --force" in str(caught.value.hint)
    assert dirty.execute("select count(*) from vae.versions").fetchone() == (0,)
    assert train(dirty.info.dsn, "strict", force=True) == 1


def test_a_clean_shop_passes_every_check(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    assert {status for status, _ in report(shop).values()} == {"pass"}


def test_items_seen_once_are_a_warning_where_they_are_most_of_the_items(shop: psycopg.Connection) -> None:
    Shop().add(shop, [(2**40, number, "view", BASE_TIME) for number in range(13)])
    Shop().create_model(shop)
    assert report(shop)["items_seen_once"] == ("warn", 13)
    Shop().add(shop, [(2**40 + number % 20, number, "view", BASE_TIME) for number in range(100, 100 + 96)])
    assert report(shop)["items_seen_once"] == ("fail", 109)


@pytest.mark.parametrize(
    ("check", "option", "count"),
    [("enough_events", "min_events", 372), ("enough_users", "min_users", 30), ("enough_items", "min_items", 12)],
)
def test_too_few_rows_fail(shop: psycopg.Connection, check: str, option: str, count: int) -> None:
    Shop().create_model(shop, "enough", options=SMALL | {option: count})
    Shop().create_model(shop, "few", options=SMALL | {option: count + 1})
    assert report(shop, "enough")[check] == ("pass", count)
    assert report(shop, "few")[check] == ("fail", count)
    with pytest.raises(PgvaeError, match=check):
        train(shop.info.dsn, "few")


def test_too_few_days_are_a_warning(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    shop.execute("delete from events where occurred_at >= '2024-01-07'")
    assert report(shop)["enough_days"] == ("warn", 5)


def test_an_empty_table_fails_and_is_not_trained_on(shop: psycopg.Connection) -> None:
    shop.execute("truncate events")
    Shop().create_model(shop)
    found = report(shop)
    assert list(found) == CHECKS
    assert {name for name, (status, _) in found.items() if status == "fail"} == {
        "enough_events", "enough_users", "enough_items",
    }  # fmt: skip
    with pytest.raises(PgvaeError, match="quality gate of model shop failed"):
        train(shop.info.dsn)
    with pytest.raises(PgvaeError, match="model shop has no clean events"):
        train(shop.info.dsn, force=True)
    assert shop.execute("select count(*) from vae.versions").fetchone() == (0,)


def test_without_an_event_type_every_row_is_a_purchase(shop: psycopg.Connection) -> None:
    shop.execute("alter table events rename event_type to kind")
    create_model(shop, "shop", events="events", options=SMALL)
    assert shop.execute("select distinct event_type, weight from shop.clean_events").fetchall() == [("purchase", 4.0)]
    assert report(shop)["unknown_event_types"] == ("pass", 0)


def test_a_table_dropped_with_cascade_is_told_and_rebuilding_mends_it(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    clean = shop.execute("select count(*) from shop.clean_events").fetchone()
    shop.execute("drop table events cascade")
    refused = refusal(shop, "select * from vae.check_events('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("42P01", "table public.events of model shop does not exist")
    assert "restore it" in str(refused.message_hint)
    refused = refusal(shop, "select vae.rebuild_model('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("42P01", "table public.events of model shop does not exist")
    assert refused.message_hint
    Shop().make(shop)
    refused = refusal(shop, "select * from vae.check_events('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("42P01", "the views of model shop are gone")
    assert "select vae.rebuild_model('shop')" in str(refused.message_hint)
    shop.execute("select vae.rebuild_model('shop')")
    assert report(shop)["enough_events"] == ("pass", 372)
    assert shop.execute("select count(*) from shop.clean_events").fetchone() == clean


def test_a_table_that_came_back_with_other_columns_is_told(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    shop.execute("alter table events rename column item_id to article")
    for query in ("select vae.rebuild_model('shop')", "select * from vae.check_events('shop')"):
        refused = refusal(shop, query)
        assert (refused.sqlstate, refused.message_primary) == (
            "42703",
            'public.events has no column "item_id" any more, which model shop reads',
        )
        assert "vae.drop_model" in str(refused.message_hint)
    shop.execute("drop table events cascade")
    Shop(user_type="text").make(shop)
    refused = refusal(shop, "select vae.rebuild_model('shop')")
    assert refused.sqlstate == "42804"
    assert "has the type text, model shop was made for bigint" in str(refused.message_primary)
    assert "vae.drop_model" in str(refused.message_hint)


def test_functions_of_an_earlier_release_are_dropped_unless_somebody_uses_them(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    old = {
        "audience(item_ids bigint[], k integer, options jsonb)": (
            "select a.user_key from vae_private.audience(1, $1::text[], $2, $3) a"
        ),
        "response(user_id bigint, item_ids bigint[])": "select vae_private.response(1, $1::text, $2::text[])",
    }
    mine = {"audience(item_id text)": "select 1"}
    for signature, body in [*old.items(), *mine.items()]:
        shop.execute(f"create function shop.{signature} returns text language sql as '{body}'")
    left = "select pronargs from pg_proc where pronamespace = 'shop'::regnamespace and proname = any (%s) order by 1"
    shop.execute("create view used as select shop.response(1, array[2::bigint])")
    notices: list[tuple[str | None, str | None]] = []
    shop.add_notice_handler(lambda notice: notices.append((notice.message_primary, notice.message_hint)))
    shop.execute("select vae.rebuild_model('shop')")
    assert shop.execute(left, [["audience"]]).fetchall() == [(1,), (3,)]
    assert shop.execute(left, [["response"]]).fetchall() == [(2,), (2,)]
    (dropped, _), (message, hint) = notices
    assert dropped == "shop.audience(bigint[], integer, jsonb) is of an earlier release, and was dropped"
    assert message == "shop.response(bigint, bigint[]) is of an earlier release, and stays since others use it"
    assert "select vae.rebuild_model('shop')" in str(hint)
    assert shop.execute("select viewname from pg_views where viewname = 'used'").fetchall() == [("used",)]
    shop.execute("drop view used; drop function shop.audience(text)")
    notices.clear()
    shop.execute("select vae.drop_model('shop')")
    assert not notices


def test_a_function_that_somebody_made_with_the_arguments_of_an_old_one_stays(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    shop.execute(
        "create function shop.response(user_id bigint, item_ids bigint[]) returns real language sql"
        " as 'select shop.response_to_items($1, $2)'"
    )
    bridge = "select to_regprocedure('shop.response(bigint, bigint[])') is not null"
    shop.execute("select vae.rebuild_model('shop')")
    assert shop.execute(bridge).fetchall() == [(True,)]
    # As anything else of others in the schema.
    assert refusal(shop, "select vae.drop_model('shop')").sqlstate == "2BP01"
    assert shop.execute(bridge).fetchall() == [(True,)]


def test_features_need_a_table(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    assert shop.execute("select * from vae.feature_columns('shop')").fetchall() == []
    shop.execute("select vae.set_features('shop', user_features => '{}', item_features => '{}')")
    refused = refusal(shop, "select vae.set_features('shop', user_features => '{age}')")
    assert (refused.sqlstate, refused.message_primary) == ("22023", "user_features is given, but no table")


def test_a_renamed_schema_is_told(shop: psycopg.Connection) -> None:
    Shop().create_model(shop)
    shop.execute("alter schema shop rename to elsewhere")
    for query in (
        "select * from vae.check_events('shop')",
        "select * from elsewhere.recommend(1)",
        "call vae.refresh('shop')",
        "select vae.rebuild_model('shop')",
        "select vae.set_features('shop', user_features => '{}')",
    ):
        refused = refusal(shop, query)
        assert refused.sqlstate == "3F000"
        assert str(refused.message_primary).removeprefix("pgvae: ") == "schema shop of model shop is gone"
        assert "rename to shop" in str(refused.message_hint)
    found = shop.execute("select detail, remedy from vae.health_checks where check_name = 'views'").fetchone()
    assert found == (
        "the schema of the model is gone",
        "if it was renamed: alter schema ... rename to shop; else: select vae.drop_model('shop')",
    )


def test_duplicates_are_counted_among_the_rows_that_the_other_rules_admit(shop: psycopg.Connection) -> None:
    shop.execute("alter table events add quantity integer")
    user, item = Shop().users[0], Shop().items[0]
    Shop().add(shop, [(user, item, "view", BASE_TIME, -1)] * 10)
    Shop().add(shop, [(user, item, "mystery", BASE_TIME, 1)] * 10)
    # Two words for one thing, at one moment, are one event.
    Shop().add(shop, [(user, item, word, BASE_TIME, 1) for word in ("cart", "add_to_cart")])
    Shop().create_model(shop)
    found = report(shop)
    assert (found["returns"][1], found["unknown_event_types"][1], found["duplicates"][1]) == (10, 10, 1)


@pytest.mark.parametrize("earliest", ["now", "01/02/2015", "2015-13-01", "2015-01-01 00:00 Asia/Tokyo", ""])
def test_the_earliest_time_is_a_plain_date(shop: psycopg.Connection, earliest: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="earliest"):
        Shop().create_model(shop, options={"earliest": earliest})


def test_a_session_that_reads_backslashes_as_escapes_makes_the_same_model(shop: psycopg.Connection) -> None:
    shop.execute('create table users (user_id bigint, "firstName" text, plan text)')
    warnings: list[Any] = []
    shop.add_notice_handler(lambda notice: warnings.append(notice.message_primary))
    shop.execute("set standard_conforming_strings = off")
    Shop().create_model(shop, users="users", options=SMALL | {"earliest": "2020-01-01"})
    assert shop.execute("select user_features from vae.models").fetchone() == (["plan"],)
    assert report(shop)["enough_events"] == ("fail", 0)
    assert warnings == []


@pytest.mark.parametrize(
    "call", ["vae.check_events('shop')", "vae.feature_columns('shop')", "vae.set_candidates('shop', 'few', 'events')"]
)
def test_a_model_that_is_none_is_told_where_there_is_no_model_at_all(shop: psycopg.Connection, call: str) -> None:
    """Of an empty table of models a plan made for any name asks for none."""
    shop.execute("set plan_cache_mode = force_generic_plan")
    with pytest.raises(psycopg.Error) as caught:
        shop.execute(f"select * from {call}".encode())
    assert caught.value.sqlstate == "VA001"


def test_the_earliest_date_begins_at_midnight_utc_for_everybody(shop: psycopg.Connection) -> None:
    user, item = Shop().users[0], Shop().items[0]
    moments = ("2023-01-01 23:59:59+00", "2023-01-02 00:00:00+00")
    Shop().add(shop, [(user, item, "view", moment) for moment in moments])
    shop.execute("set timezone to 'America/New_York'")
    Shop().create_model(shop, options=SMALL | {"earliest": "2023-01-02"})
    for zone in ("America/New_York", "Asia/Tokyo", "UTC"):
        shop.execute(f"set timezone to '{zone}'")
        for source in ("shop.clean_events", "shop.history(%(user)s)"):
            query = f"select count(*) from {source} e where e.occurred_at < '2023-02-01'"
            assert shop.execute(query, {"user": user}).fetchone() == (1,), (zone, source)


# Types and kinds of the tables


@pytest.mark.parametrize("key_type", ["bigint", "integer", "uuid", "text", "varchar(40)", "char(12)", "shop_id"])
@pytest.mark.parametrize("time_type", ["timestamptz", "timestamp", "date"])
def test_events_of_every_type_are_read_alike(rolled_back: psycopg.Connection, key_type: str, time_type: str) -> None:
    same = "integer" if key_type == "shop_id" else key_type
    base = Shop(
        schema="typed",         user_type=key_type, item_type=key_type, time_type=time_type,
        user_keys=keys("user", same, 30), item_keys=keys("item", same, 12),
    )  # fmt: skip
    # A time without a zone is UTC, whatever the session thinks.
    rolled_back.execute("set timezone to 'Asia/Tokyo'")
    base.make(rolled_back)
    base.create_model(rolled_back)
    found = report(rolled_back)
    assert {status for status, _ in found.values()} == {"pass"}
    assert found["enough_events"] == ("pass", 372)
    history = rolled_back.execute("select * from shop.history(%s)", [base.users[3]]).fetchall()
    expected = sorted((row for row in base.rows() if row[0] == base.users[3]), key=lambda row: row[3])
    assert [row[0] for row in history] == [row[1] for row in expected]
    if time_type != "date":
        assert [row[2] for row in history] == [row[3] for row in expected]
    # A live call finds its events by an index.
    user_type = base.user_type.replace("shop_id", "integer")
    rolled_back.execute("create index on typed.events (user_id); set local enable_seqscan = off")
    query = rolled_back.execute("select vae_private.clean_select(model_id, 'one user') from vae.models").fetchone()
    assert query is not None
    parameter = "text" if "char" in user_type else user_type
    rolled_back.execute(f"prepare live ({parameter}) as {query[0]}".encode())
    plan = rolled_back.execute(sql.SQL("explain execute live({})").format(base.users[3])).fetchall()
    rolled_back.execute("deallocate live")
    assert re.search(r"Index Cond: \(\(user_id IS NOT NULL\) AND \(\(?user_id\)?(::\w+)? = ", str(plan))
    # The ends of time are no events, and no errors.
    extremes = [(base.users[0], base.items[0], "view", moment) for moment in ("infinity", "-infinity")]
    base.add(rolled_back, extremes)
    found = report(rolled_back)
    assert (found["future_timestamps"], found["absurd_timestamps"]) == (("warn", 1), ("warn", 1))
    assert found["enough_events"] == ("pass", 372)


@pytest.mark.parametrize("time_type", ["timestamp", "date"])
def test_local_times_hide_the_newest_events_until_a_view_says_their_zone(
    connection: psycopg.Connection, time_type: str
) -> None:
    # A day ahead of UTC, so that today's date is later than now at any hour.
    zone = "<+24>-24"
    local = Shop(events="local_events", occurred_at="ordered_at", time_type=time_type)
    local.make(connection)
    user = local.users[0]
    connection.execute(
        "insert into local_events values (%s, %s, 'purchase', now() at time zone %s)", [user, local.items[0], zone]
    )
    local.create_model(connection)
    newest = "select max(h.occurred_at) > now() - interval '1 day 1 hour' from shop.history(%s) h"
    assert connection.execute(newest, [user]).fetchone() == (False,)
    assert report(connection)["future_timestamps"] == ("warn", 1)
    query = "select remedy from vae.check_events('shop') where check_name = 'future_timestamps'"
    (remedy,) = connection.execute(query).fetchone() or ("",)
    mend = re.search(r"a view with (.*), say", remedy)
    assert mend, remedy
    column = mend[1].replace("Europe/Berlin", zone)
    connection.execute(f"create view events as select user_id, item_id, event_type, {column} from local_events")
    connection.execute("select vae.drop_model('shop')")
    Shop(occurred_at="ordered_at").create_model(connection)
    assert report(connection)["future_timestamps"] == ("pass", 0)
    assert connection.execute(newest, [user]).fetchone() == (True,)


@pytest.mark.parametrize("kind", ["partitioned", "view", "materialized view"])
def test_events_may_lie_in_a_partitioned_table_or_a_view(connection: psycopg.Connection, kind: str) -> None:
    Shop(events="origin").make(connection)
    if kind == "partitioned":
        connection.execute(
            "create table events (like origin) partition by range (occurred_at);"
            " create table events_1 partition of events for values from ('2024-01-01') to ('2024-02-01');"
            " create table events_2 partition of events default;"
            " insert into events select * from origin"
        )
    else:
        connection.execute(f"create {kind} events as select * from origin")
    Shop().create_model(connection)
    assert report(connection)["enough_events"] == ("pass", 372)
    assert connection.execute("select count(*) from shop.history(%s)", [2**40]).fetchone() != (0,)
    assert train(connection.info.dsn) == 1


def test_keys_of_different_collations_belong_together(connection: psycopg.Connection) -> None:
    shop = Shop(user_type='text collate "C"', item_type='text collate "C"', user_keys=keys("user", "text", 30))
    shop.make(connection)
    for table, column in (("users", "user_id"), ("items", "item_id")):
        connection.execute(
            f'create table {table} as select distinct {column} collate "POSIX" as {column},'
            f" right({column}, 1) as digit from events"
        )
    # One without an event, and an event of somebody unknown.
    connection.execute("insert into users values ('new', '1')")
    connection.execute("insert into events select 'unknown', item_id, event_type, occurred_at from events limit 1")
    shop.create_model(connection, users="users", items="items")
    found = report(connection)
    assert (found["orphan_users"], found["orphan_items"]) == (("warn", 1), ("pass", 0))
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    assert connection.execute("select count(distinct user_id) from shop.recommendations").fetchone() == (31,)
    assert connection.execute("select count(*) from shop.recommend('user 1', 3)").fetchone() == (3,)
    assert connection.execute("select features from shop.features('user 1')").fetchone() == ({"digit": "1"},)


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_keys_of_which_two_spellings_are_equal_need_a_view(connection: psycopg.Connection, column: str) -> None:
    connection.execute("create collation same (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    types = {"user_type": "text", "item_type": "text"} | {column.replace("_id", "_type"): "text collate same"}
    Shop(**types).make(connection)
    refused = refused_model(connection)
    assert (refused.sqlstate, refused.message_primary) == (
        "42804",
        f'column "{column}" of public.events has a nondeterministic collation',
    )
    columns = "user_id, item_id, event_type, occurred_at"
    better = columns.replace(column, f'lower({column}) collate "default" as {column}')
    assert f'lower({column}) collate "default" as {column}' in str(refused.message_hint)
    connection.execute(f"create view better as select {better} from events".encode())
    Shop(events="better").create_model(connection)
    assert report(connection)["enough_users"] == ("pass", 30)


def test_keys_of_other_types_need_a_view_that_casts_them(connection: psycopg.Connection) -> None:
    Shop(user_type="smallint", user_keys=range(30)).make(connection)
    refused = refused_model(connection)
    assert refused.sqlstate == "42804"
    assert "give a view that casts the column" in str(refused.message_hint)
    connection.execute("create view better as select user_id::integer, item_id, event_type, occurred_at from events")
    Shop(events="better").create_model(connection)
    assert report(connection)["enough_users"] == ("pass", 30)
