"""Names and texts that come from users and catalogues stay names and texts, whatever they hold."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import sql

from shop import SMALL, Shop, create_model, refusal, train_and_activate

NAMES = [
    'a"b; drop table canary; --',
    "'); drop table canary; --",
    "$f$",
    "$pgvae$; drop table canary; $pgvae$",
    "%I %s %% :x {schema}",
    "Upper Case and ' quote \" \\ back",
    "naïve 表 \U0001f6d2\n\ttab",
    "select",
    "x" * 62,
]

# Characters of all seventeen planes; those without assigned characters hold valid code points all the same.
PLANES = [chr(0x10000 * plane + 0x1234) for plane in range(17)]
TEXTS = [
    "",
    " ",
    " leading and trailing ",
    "'",
    '"',
    "\\",
    '\\"',
    "''; drop table canary; --",
    '"; drop table canary; --',
    "{",
    "}",
    "{a,b}",
    '{"a": [1, "b"]}',
    ",",
    "NULL",
    "null",
    "\\N",
    "\\.",
    "\n",
    "two\nlines\r\nand\ttab",
    "\x01\x1f\x7f",
    "$1 %s :x %(y)s",
    "$$ $pgvae$",
    'O\'Reilly "the" \\ {x},{y}',
    # The same letter in two ways, and characters that nobody sees.
    "\u00e9",
    "e\u0301",
    "\u202eright to left\u202c",
    "zero\u200bwidth",
    "0",
    "00",
    "1e3",
    "true",
    "-- comment",
    "/* comment */",
    "e" * 512,
    "é" * 256,
    *PLANES,
    "".join(PLANES),
]


@pytest.fixture
def canary(connection: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with something to lose."""
    connection.execute("create table canary as select 1 as alive")
    return connection


@pytest.fixture(scope="module")
def guarded(shared: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a shop and something to lose, for tests that leave no model."""
    shared.execute("create table canary as select 1 as alive")
    Shop().make(shared)
    return shared


def others(connection: psycopg.Connection, *, model: str = "shop") -> list[Any]:
    """Every object outside the model's schema, and what the canary holds."""
    objects = connection.execute(
        "select 'relation', n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname not in ('pg_toast', %(model)s) and n.nspname not like 'pg_temp%%'"
        " union all select 'routine', n.nspname, p.oid::regprocedure::text from pg_proc p"
        " join pg_namespace n on n.oid = p.pronamespace where n.nspname <> %(model)s"
        " union all select 'schema', '', nspname from pg_namespace"
        " where nspname <> %(model)s and nspname not like 'pg_t%%'"
        " union all select 'role', '', rolname from pg_roles"
        " order by 1, 2, 3",
        {"model": model},
    ).fetchall()
    return [*objects, connection.execute("select * from canary").fetchall()]


def odd_shop(name: str) -> Shop:
    """A shop all of whose names are odd, and differ."""
    return Shop(
        schema=f"{name}s",
        events=f"{name}e",
        user_id=f"{name}u",
        item_id=f"{name}i",
        event_type=f"{name}t",
        occurred_at=f"{name}o",
        user_type="text",
    )


def make_users_and_items(connection: psycopg.Connection, shop: Shop, name: str) -> dict[str, str]:
    """Makes tables of users and items of odd names; gives the arguments that name them to vae.create_model."""
    arguments = {}
    for kind, column in (("users", shop.user_id), ("items", shop.item_id)):
        relation = sql.Identifier(shop.schema, f"{name}{kind[0]}")
        connection.execute(
            sql.SQL("create table {} as select distinct {} as {} from {}").format(
                relation, sql.Identifier(column), sql.Identifier(f"{name}k"), shop.relation
            )
        )
        arguments[kind] = relation.as_string(connection)
        arguments[f"{kind}_key"] = f"{name}k"
    return arguments


@pytest.mark.parametrize("name", NAMES)
def test_names_of_schemas_tables_and_columns(guarded: psycopg.Connection, name: str) -> None:
    shop = odd_shop(name)
    shop.make(guarded)
    tables = make_users_and_items(guarded, shop, name)
    before = others(guarded)
    shop.create_model(guarded, **tables)
    report = guarded.execute("select * from vae.check_events('shop')").fetchall()
    assert [row[:3] for row in report if row[1] != "pass"] == []
    assert guarded.execute("select count(*) from shop.clean_events").fetchone() == (len(shop.rows()),)
    user = shop.users[0]
    history = guarded.execute("select item_id, event_type, occurred_at from shop.history(%s)", [user]).fetchall()
    assert history == sorted((row[1:] for row in shop.rows() if row[0] == user), key=lambda row: row[2])
    assert guarded.execute("select count(distinct user_id) from shop.refresh_events").fetchone() == (30,)
    guarded.execute("select vae.rebuild_model('shop')")
    guarded.execute("select vae.set_event_type('shop', %s, 'view')", [name])
    assert others(guarded) == before
    guarded.execute("select vae.drop_model('shop')")
    assert others(guarded) == before


def test_a_shop_of_odd_names_is_trained_and_scored(canary: psycopg.Connection) -> None:
    shop = odd_shop(NAMES[0])
    shop.make(canary)
    shop.create_model(canary, **make_users_and_items(canary, shop, NAMES[0]))
    before = others(canary)
    train_and_activate(canary.info.dsn)
    canary.execute("call vae.refresh('shop')")
    assert len(canary.execute("select * from shop.recommend(%s)", [shop.users[0]]).fetchall()) > 3
    assert canary.execute("select count(distinct user_id) from shop.recommendations").fetchone() == (30,)
    assert others(canary) == before


@pytest.mark.parametrize("name", [*NAMES, "", "x" * 49, "Shop", "pg_shop", "vae", "vae_x", "1shop", "shöp", "user"])
def test_a_models_name_is_a_plain_schema_name(guarded: psycopg.Connection, name: str) -> None:
    before = others(guarded, model="none")
    refused = refusal(guarded, "select * from vae.create_model(%s, 'events')", [name])
    assert refused.sqlstate == "42602"
    assert refused.message_primary == f'model name "{name}" cannot be a schema\'s name'
    assert refused.message_hint
    assert others(guarded, model="none") == before


def test_event_types_of_any_text_are_mapped(canary: psycopg.Connection) -> None:
    words = [text for text in TEXTS if len(text) < 50]
    shop = Shop(type_names=words)
    shop.make(canary)
    standard = ["view", "add_to_cart", "purchase"]
    given = {word: {"event_type": standard[number % 3], "weight": 1} for number, word in enumerate(words)}
    before = others(canary)
    shop.create_model(canary, event_types=given)
    mapped = dict(canary.execute("select name, event_type from vae.event_types").fetchall())
    assert {word: mapped[word] for word in words} == {word: given[word]["event_type"] for word in words}
    unknown = "select row_count from vae.check_events('shop') where check_name = 'unknown_event_types'"
    assert canary.execute(unknown).fetchone() == (0,)
    expected = {standard[words.index(row[2]) % 3] for row in shop.rows()}
    found = canary.execute("select distinct event_type from shop.clean_events").fetchall()
    assert {row[0] for row in found} == expected
    assert others(canary) == before


def test_keys_of_any_text_come_back_as_they_are(canary: psycopg.Connection) -> None:
    shop = Shop(user_type="text", item_type="text", user_keys=TEXTS, item_keys=TEXTS)
    assert len(set(TEXTS)) == len(TEXTS)
    shop.make(canary)
    rows = shop.rows()
    # Too long to be an id: left out, and counted.
    long = [("u" * 513, TEXTS[0]), (TEXTS[0], "i" * 10_240), ("é" * 257, "é" * 257)]
    shop.add(canary, [(user, item, "view", rows[0][3]) for user, item in long])
    shop.create_model(canary)
    assert canary.execute(
        "select status, row_count from vae.check_events('shop') where check_name = 'overlong_ids'"
    ).fetchone() == ("warn", 3)
    before = others(canary)
    train_and_activate(canary.info.dsn)
    canary.execute("call vae.refresh('shop')")

    keys = canary.execute("select distinct user_id from shop.recommendations").fetchall()
    assert {row[0] for row in keys} == set(TEXTS)
    everything = """select item_id from shop.recommend(%s, 1000, '{"exclude_seen": false}')"""
    for user in (TEXTS[0], TEXTS[7], TEXTS[-1]):
        assert sorted(row[0] for row in canary.execute(everything, [user]).fetchall()) == sorted(TEXTS)
    for user in TEXTS:
        live = canary.execute("select rank, item_id from shop.recommend(%s, 20)", [user]).fetchall()
        stored = canary.execute(
            "select rank, item_id from shop.recommendations where user_id = %s order by rank", [user]
        ).fetchall()
        assert live == stored, repr(user)
        bought = {item for who, item, kind, _ in rows if who == user and kind == "purchase"}
        assert {item for _, item in live}.isdisjoint(bought), repr(user)
        history = canary.execute("select item_id from shop.history(%s)", [user]).fetchall()
        assert sorted(row[0] for row in history) == sorted(item for who, item, _, _ in rows if who == user), repr(user)
        assert canary.execute("select shop.embedding(%s)", [user]).fetchone() != (None,), repr(user)
    scored = canary.execute("select count(shop.score('', item)) from unnest(%s::text[]) item", [TEXTS]).fetchone()
    assert scored == (len(TEXTS),)
    assert others(canary) == before


def test_users_that_nobody_knows_are_cold_starts_whatever_their_key(trained_text: psycopg.Connection) -> None:
    before = others(trained_text)
    for text in [*TEXTS, "u" * 10_240]:
        rows = trained_text.execute("select is_cold_start from shop.recommend(%s, 3)", [text]).fetchall()
        assert rows == [(True,)] * 3, repr(text)
        assert trained_text.execute("select shop.score('user 1', %s)", [text]).fetchone() == (None,), repr(text)
        assert trained_text.execute("select shop.embedding(%s)", [text]).fetchone() == (None,), repr(text)
    assert others(trained_text) == before


@pytest.fixture
def trained_text(canary: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a trained shop whose keys are plain text."""
    shop = Shop(user_type="text", item_type="text")
    shop.make(canary)
    shop.create_model(canary)
    train_and_activate(canary.info.dsn)
    return canary


@pytest.mark.parametrize("text", ["x'; drop table canary; --", '"; drop table canary; --', "$f$ %s :x", "\\", "表"])
def test_options_hold_no_statements(guarded: psycopg.Connection, text: str) -> None:
    before = others(guarded)
    for options in ({text: 1}, {"earliest": text}, {"min_events": text}, {"max_share": {text: 0.5}}):
        with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
            create_model(guarded, "shop", events="events", options=SMALL | options)
        assert caught.value.diag.message_hint, options
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="is mapped to") as caught:
        create_model(guarded, "shop", events="events", event_types={"look": text})
    assert caught.value.diag.message_hint
    assert others(guarded) == before
    assert guarded.execute("select to_regnamespace('shop')").fetchone() == (None,)


def test_live_options_hold_no_statements(trained: psycopg.Connection) -> None:
    trained.execute("create table canary as select 1 as alive")
    before = others(trained)
    for options in ('{"x\'; drop table canary; --": true}', '{"exclude_seen": "x\'; drop table canary"}', '"x"', "[1]"):
        refused = refusal(trained, "select * from shop.recommend(1, 5, %s)", [options])
        assert refused.sqlstate == "22023", options
        assert refused.message_hint, options
    assert others(trained) == before


def test_a_hint_quotes_the_role_that_it_names(trained: psycopg.Connection) -> None:
    role = sql.Identifier('x"; drop table events; --')
    trained.execute(sql.SQL("create role {} in role vae_trainer").format(role))
    try:
        trained.execute(sql.SQL("grant select on events to {}; set role {}").format(role, role))
        for query in (
            "select * from vae_private.recommend(1, '1', 5, null)",
            "select * from vae.check_events('shop')",
        ):
            refused = refusal(trained, query)
            assert str(refused.message_primary).endswith("permission denied for model shop")
            hint = str(refused.message_hint)
            grant = hint.removeprefix("its owner can allow it: ")
            assert grant == 'grant usage on schema shop to "x""; drop table events; --"'
            trained.execute("reset role")
            trained.execute(grant)
            trained.execute("revoke usage on schema shop from " + role.as_string(trained))
            trained.execute(sql.SQL("set role {}").format(role))
    finally:
        trained.execute(sql.SQL("reset role; drop owned by {}; drop role {}").format(role, role))
