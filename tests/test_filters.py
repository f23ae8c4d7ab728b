"""Filters: candidate sets, caps for diversity, a least score; live, in a refresh, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from pgvae_runtime import filters, forward, scoring
from pgvae_runtime.filters import Candidates
from pgvae_runtime.gpu_costs import Work
from pgvae_runtime.store import Version
from pgvae_runtime.tokens import History
from shop import Shop, train_and_activate
from shop import refusal as refused_for_good

USERS, ITEMS = Shop().users, Shop().items
USER = USERS[0]


@pytest.fixture
def shop(shared_trained: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """The shared shop with a table of stock, in a transaction that is rolled back."""
    shared_trained.execute("begin")
    shared_trained.execute("create table stock (item_id bigint primary key, on_hand integer)")
    with shared_trained.cursor() as cursor:
        cursor.executemany("insert into stock values (%s, %s)", [(item, number) for number, item in enumerate(ITEMS)])
    shared_trained.execute("create view in_stock as select item_id from stock where on_hand >= 6")
    yield shared_trained
    shared_trained.execute("rollback")


def refusal(connection: psycopg.Connection, query: str, parameters: Any = None) -> Any:
    """Gives what a query was refused with; an open transaction goes on."""
    if connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
        return refused_for_good(connection, query, parameters)
    connection.execute("savepoint before")
    refused = refused_for_good(connection, query, parameters)
    connection.execute("rollback to before")
    return refused


def define(connection: psycopg.Connection, relation: str = "in_stock", **arguments: Any) -> Any:
    named = {"name": "in_stock", "relation": relation} | arguments
    shown = ", ".join(f"{name} => %({name})s" for name in named)
    return connection.execute(f"select * from vae.set_candidates('shop', {shown})", named).fetchone()


def ask(connection: psycopg.Connection, options: dict[str, Any], *, user: int = USER, k: int = 12) -> list[Any]:
    """Gives (item, score) of the recommendations, in their order."""
    rows = connection.execute(
        "select rank, item_id, score from shop.recommend(%s, %s, %s)", [user, k, json.dumps(options)]
    ).fetchall()
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    return [row[1:] for row in rows]


ALL = {"exclude_seen": False}


# Candidates, live


def test_a_set_is_defined_beside_a_model_with_keys_of_another_type(shop: psycopg.Connection) -> None:
    """Whatever the plan: no item of the other model is read as a number."""
    shop.execute(
        "create table visits (user_id text, item_id text, occurred_at timestamptz);"
        " select from vae.create_model('words', 'visits');"
        " insert into vae.versions overriding system value select n.*"
        " from vae.versions v join vae.models m using (model_id)"
        " cross join vae.models w, jsonb_populate_record(null::vae.versions,"
        " to_jsonb(v) || jsonb_build_object('version_id', -1, 'model_id', w.model_id, 'state', 'loading')) n"
        " where m.name = 'shop' and v.state = 'active' and w.name = 'words';"
        " insert into vae_private.items (version_id, item_index, item_key)"
        " select -1, n, 'word ' || n from generate_series(0, 999) n;"
        " update vae.versions set state = 'ready' where version_id = -1;"
        " update vae.versions set state = 'active' where version_id = -1;"
        " analyze vae_private.items"
    )
    joins = ("nestloop", "hashjoin", "mergejoin")
    for chosen in joins:
        for join in joins:
            shop.execute(f"set local enable_{join} = {join == chosen}".encode())
        assert define(shop) == (6, 6, False)


def test_only_candidates_are_recommended_in_their_order(shop: psycopg.Connection) -> None:
    assert define(shop) == (6, 6, False)
    everything = ask(shop, ALL)
    found = ask(shop, {**ALL, "candidates": "in_stock"})
    assert [item for item, _ in found] == [item for item, _ in everything if item in ITEMS[6:]]
    # A share among the candidates: 1 for all of them, in the proportions that they have in the catalogue.
    assert sum(score for _, score in found) == pytest.approx(1.0, rel=1e-5)
    total = sum(score for item, score in everything if item in ITEMS[6:])
    np.testing.assert_allclose(
        [score for _, score in found], [s / total for i, s in everything if i in ITEMS[6:]], 1e-5
    )


def test_what_was_bought_is_left_out_of_the_candidates_too(shop: psycopg.Connection) -> None:
    define(shop)
    bought = {
        row[0]
        for row in shop.execute("select item_id from shop.history(%s) where event_type = 'purchase'", [USER]).fetchall()
    }
    found = {item for item, _ in ask(shop, {"candidates": "in_stock"})}
    assert found == set(ITEMS[6:]) - bought


def test_a_set_is_read_when_it_is_used(shop: psycopg.Connection) -> None:
    define(shop)
    shop.execute("update stock set on_hand = 0 where item_id <> %s", [ITEMS[7]])
    assert [item for item, _ in ask(shop, {**ALL, "candidates": "in_stock"})] == [ITEMS[7]]


def test_unknown_items_duplicates_and_nulls_are_left_out(shop: psycopg.Connection) -> None:
    shop.execute("create table season (sku bigint)")
    shop.execute("insert into season values (%s), (%s), (7), (null)", [ITEMS[0], ITEMS[0]])
    assert define(shop, "season", item_id="sku") == (2, 1, False)
    assert [item for item, _ in ask(shop, {**ALL, "candidates": "in_stock"})] == [ITEMS[0]]


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        ("delete from stock", "pgvae: candidates 'in_stock' of model shop are empty"),
        (
            "delete from stock; insert into stock values (7, 10), (8, 10)",
            "candidates 'in_stock' of model shop name 2 items, none of which version 1 knows",
        ),
    ],
)
def test_an_empty_set_gives_no_row_and_says_why(shop: psycopg.Connection, change: str, notice: str) -> None:
    define(shop)
    shop.execute(change)
    heard: list[str] = []
    shop.add_notice_handler(lambda diagnostic: heard.append(str(diagnostic.message_primary)))
    assert ask(shop, {"candidates": "in_stock"}) == []
    assert len(heard) == 1
    assert notice.removeprefix("pgvae: ") in heard[0]


@pytest.mark.parametrize(
    ("change", "sqlstate", "message"),
    [
        ("drop view in_stock", "42P01", 'relation "public.in_stock" does not exist'),
        (
            "drop view in_stock; create view in_stock as select item_id as sku from stock",
            "42703",
            "column c.item_id does not exist",
        ),
        (
            "drop view in_stock; create view in_stock as select item_id::text from stock",
            "42883",
            "operator does not exist: bigint = text",
        ),
        (
            "create or replace view in_stock as select item_id from stock where 1 / on_hand > 0",
            "22012",
            "division by zero",
        ),
    ],
)
def test_a_relation_that_fails_is_named_with_its_error(
    shop: psycopg.Connection, change: str, sqlstate: str, message: str
) -> None:
    define(shop)
    shop.execute(change)
    refused = refusal(shop, """select * from shop.recommend(%s, 5, '{"candidates": "in_stock"}')""", [USER])
    assert refused.sqlstate == sqlstate
    assert str(refused.message_primary).startswith(
        "pgvae: candidates 'in_stock' of model shop cannot be read from public.in_stock: "
    )
    assert message in str(refused.message_primary)
    assert "vae.set_candidates" in str(refused.message_hint)


def test_a_relation_that_fails_from_the_start_is_not_defined(shop: psycopg.Connection) -> None:
    shop.execute("create view broken as select item_id from stock where 1 / (on_hand - on_hand) > 0")
    refused = refusal(shop, "select * from vae.set_candidates('shop', 'broken', 'broken')")
    assert refused.sqlstate == "22012"
    assert refused.message_primary == 'candidates "broken" cannot be read from public.broken: division by zero'
    assert refused.message_hint == "mend public.broken until this gives rows: select item_id from public.broken"
    assert shop.execute("select count(*) from vae.candidates").fetchone() == (0,)


def test_candidates_that_nobody_defined_are_refused_with_those_that_are(shop: psycopg.Connection) -> None:
    define(shop)
    refused = refusal(shop, """select * from shop.recommend(%s, 5, '{"candidates": "in_season"}')""", [USER])
    assert refused.sqlstate == "22023"
    assert refused.message_primary == "pgvae: candidates 'in_season' of model shop do not exist"
    assert "there are: in_stock" in str(refused.message_hint)


def test_candidates_are_read_with_the_rights_of_who_asks(role: str, shop: psycopg.Connection) -> None:
    define(shop, "stock")
    shop.execute(f"grant vae_scorer to {role}")
    shop.execute(f"grant usage on schema shop to {role}")
    shop.execute(f"grant select on events to {role}")
    options = json.dumps({**ALL, "candidates": "in_stock"})
    query = "select count(*) from shop.recommend(%s, 12, %s)"
    assert shop.execute(query, [USER, options]).fetchone() == (12,)
    shop.execute(f"set local role {role}")
    refused = refusal(shop, query, [USER, options])
    shop.execute("reset role")
    assert refused.sqlstate == "42501"
    assert "candidates 'in_stock' of model shop cannot be read from public.stock" in str(refused.message_primary)
    assert "grant" in str(refused.message_hint)
    # Row security decides which items somebody may be shown.
    shop.execute(f"grant select on stock to {role}")
    shop.execute("alter table stock enable row level security")
    shop.execute(f"create policy own on stock to {role} using (on_hand < 3)")
    shop.execute(f"set local role {role}")
    rows = shop.execute("select item_id from shop.recommend(%s, 12, %s)", [USER, options]).fetchall()
    shop.execute("reset role")
    assert {row[0] for row in rows} == set(ITEMS[:3])


# Defining candidates


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message"),
    [
        ({"name": ""}, "42602", 'candidates cannot be called ""'),
        ({"name": None}, "42602", 'candidates cannot be called "null"'),
        ({"name": "x" * 64}, "42602", "candidates cannot be called"),
        ({"relation": None}, "22004", "relation is null"),
        ({"relation": "nothing"}, "42P01", 'relation "nothing" does not exist'),
        ({"relation": "stock_pkey"}, "42809", "stock_pkey is not a table or view"),
        ({"relation": "passing"}, "42809", "passing is temporary"),
        ({"item_id": "sku"}, "42703", 'stock has no column "sku"'),
        ({"relation": "words"}, "42804", "keys of items differ: bigint in model shop, text in public.words"),
        ({"relation": "broken"}, "22012", "division by zero"),
    ],
)
def test_a_set_that_cannot_be_is_refused_and_nothing_kept(
    shop: psycopg.Connection, arguments: dict[str, Any], sqlstate: str, message: str
) -> None:
    shop.execute("create temporary table passing as table stock")
    shop.execute("create view words as select 'a'::varchar(5) as item_id")
    shop.execute("create view broken as select 1 / (on_hand - 3) as item_id from stock")
    refused = refusal(
        shop,
        "select * from vae.set_candidates('shop', %(name)s, %(relation)s, %(item_id)s)",
        {"name": "in_stock", "relation": "stock", "item_id": "item_id"} | arguments,
    )
    assert (refused.sqlstate, message in str(refused.message_primary)) == (sqlstate, True), refused.message_primary
    assert shop.execute("select count(*) from vae.candidates").fetchone() == (0,)


def test_a_set_is_defined_anew_and_dropped(shop: psycopg.Connection) -> None:
    define(shop, for_refresh=True)
    define(shop, "stock", name="all", for_refresh=True)
    query = (
        "select name, relation_schema, relation_table, item_id_column, for_refresh from vae.candidates order by name"
    )
    assert shop.execute(query).fetchall() == [
        ("all", "public", "stock", "item_id", True),
        ("in_stock", "public", "in_stock", "item_id", False),
    ]
    assert define(shop, "stock", name="all", for_refresh=False)[2] is False
    assert [row[4] for row in shop.execute(query).fetchall()] == [False, False]
    shop.execute("select vae.drop_candidates('shop', 'all')")
    assert [row[0] for row in shop.execute(query).fetchall()] == ["in_stock"]
    refused = refusal(shop, "select vae.drop_candidates('shop', 'all')")
    assert (refused.sqlstate, refused.message_primary) == ("42704", 'model shop has no candidates "all"')
    assert "there are: in_stock" in str(refused.message_hint)


def test_a_set_is_of_one_model(shop: psycopg.Connection) -> None:
    Shop().create_model(shop, "other")
    of_other = "select c.name, c.relation_table, c.for_refresh from vae.candidates c join vae.models m using (model_id)"
    shop.execute("select from vae.set_candidates('other', 'theirs', 'stock', for_refresh => true)")
    refused = refusal(shop, """select * from shop.recommend(%s, 5, '{"candidates": "theirs"}')""", [USER])
    assert refused.message_primary == "pgvae: candidates 'theirs' of model shop do not exist"
    assert "there are: none" in str(refused.message_hint)
    define(shop, name="theirs")
    assert define(shop, for_refresh=True)[2] is True
    assert {item for item, _ in ask(shop, {**ALL, "candidates": "theirs"})} == set(ITEMS[6:])
    shop.execute("select vae.drop_candidates('shop', 'theirs')")
    assert shop.execute(f"{of_other} where m.name = 'other'".encode()).fetchall() == [("theirs", "stock", True)]


def test_what_refreshes_recommend_changes_only_on_demand_and_never_silently(
    role: str, shop: psycopg.Connection
) -> None:
    shop.execute("create view sellable as select * from in_stock")
    notices: list[str | None] = []
    shop.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    assert define(shop)[2] is False
    assert define(shop, for_refresh=True)[2] is True
    assert define(shop)[2] is True
    assert define(shop, "stock", name="another")[2] is False
    assert not notices
    assert define(shop, "sellable")[2] is True
    assert define(shop, "stock", name="another", for_refresh=True)[2] is True
    assert define(shop, "stock")[2] is False
    assert define(shop, "stock", name="another", for_refresh=False)[2] is False
    of_now, before = "refreshes of model shop recommend", "and no longer the items of"
    assert notices == [
        f"{of_now} only the items of in_stock (public.sellable), {before} in_stock (public.in_stock)",
        f"{of_now} only the items of another (public.stock), {before} in_stock (public.sellable)",
        f"{of_now} the whole catalogue, {before} another (public.stock)",
    ]
    # Kept or given, the owner must be able to read it.
    define(shop, for_refresh=True)
    shop.execute(f"alter schema shop owner to {role}")
    refused = refusal(shop, "select * from vae.set_candidates('shop', 'in_stock', 'sellable')")
    assert refused.message_primary == "the owner of model shop may not read public.sellable"


def test_only_the_models_owner_defines_what_its_refresh_runs(role: str, shop: psycopg.Connection) -> None:
    define(shop)
    shop.execute(f"grant vae_trainer to {role}")
    shop.execute(f"grant usage on schema shop to {role}")
    shop.execute(f"grant select on stock to {role}")
    shop.execute(f"set local role {role}")
    for name in ("mine", "in_stock"):
        refused = refusal(shop, "select * from vae.set_candidates('shop', %s, 'stock', for_refresh => true)", [name])
        assert (refused.sqlstate, refused.message_primary) == ("42501", "model shop belongs to postgres")
        assert refused.message_hint == "act as its owner: set role postgres"
    assert refusal(shop, "select vae.drop_candidates('shop', 'in_stock')").sqlstate == "42704"
    shop.execute("reset role")
    assert shop.execute("select name, relation_table, for_refresh from vae.candidates").fetchall() == [
        ("in_stock", "in_stock", False)
    ]
    # Nor does a superuser what the owner could not read.
    shop.execute(f"alter schema shop owner to {role}")
    refused = refusal(shop, "select * from vae.set_candidates('shop', 'mine', 'in_stock', for_refresh => true)")
    assert (refused.sqlstate, refused.message_primary) == (
        "42501",
        "the owner of model shop may not read public.in_stock",
    )
    assert refused.message_hint == (
        f"a refresh reads it with the owner's rights: grant select on public.in_stock to {role}"
    )
    shop.execute("create schema hidden; create view hidden.shelf as table stock")
    shop.execute(f"grant select on hidden.shelf to {role}")
    refused = refusal(shop, "select * from vae.set_candidates('shop', 'mine', 'hidden.shelf', for_refresh => true)")
    assert (refused.sqlstate, refused.message_primary) == (
        "42501",
        "the owner of model shop may not use schema hidden",
    )
    assert refused.message_hint == (
        f"a refresh reads hidden.shelf with the owner's rights: grant usage on schema hidden to {role}"
    )


# Caps and the least score


@pytest.fixture(scope="module")
def labelled(shared_trained: psycopg.Connection) -> psycopg.Connection:
    """The shared database with a second model, whose items have categories; items 0 and 1 have none."""
    shared_trained.execute("create schema catalogue")
    shared_trained.execute("create table catalogue.items (item_id bigint primary key, category text, brand integer)")
    with shared_trained.cursor() as cursor:
        cursor.executemany(
            "insert into catalogue.items values (%s, %s, %s)",
            [(item, None if n < 2 else f"c{n % 3}", n % 2) for n, item in enumerate(ITEMS)],
        )
    arguments = {"users": None, "items": "catalogue.items", "item_features": []}
    Shop().create_model(shared_trained, "labelled", **arguments)
    train_and_activate(shared_trained.info.dsn, "labelled")
    return shared_trained


def asked(connection: psycopg.Connection, options: dict[str, Any], k: int = 12) -> list[Any]:
    return connection.execute(
        "select r.rank, r.item_id, i.category, i.brand, r.score from labelled.recommend(%s, %s, %s) r"
        " join catalogue.items i using (item_id) order by r.rank",
        [USER, k, json.dumps({**ALL, **options})],
    ).fetchall()


def test_a_cap_takes_the_best_of_each_category(labelled: psycopg.Connection) -> None:
    everything = asked(labelled, {})
    kept, counts = [], Counter[str]()
    for row in everything:
        counts[row[2]] += 1
        if row[2] is None or counts[row[2]] <= 2:
            kept.append(row[1:])
    capped = asked(labelled, {"at_most": {"category": 2}})
    assert [row[1:] for row in capped] == kept
    assert [row[0] for row in capped] == list(range(1, 9))
    # A short list is filled from further down, not left short.
    assert [row[1:] for row in asked(labelled, {"at_most": {"category": 1}}, k=3)] == [
        row
        for place, row in enumerate(row[1:] for row in everything)
        if row[1] is None or row[1] not in [other[2] for other in everything[:place]]
    ][:3]


def test_two_caps_hold_together(labelled: psycopg.Connection) -> None:
    capped = asked(labelled, {"at_most": {"category": 2, "brand": 3}})
    assert max(Counter(row[3] for row in capped).values()) <= 3
    assert max(Counter(row[2] for row in capped if row[2]).values()) <= 2
    # An item that one cap leaves out uses up nothing of the other.
    counts: Counter[Any] = Counter()
    kept = []
    for row in asked(labelled, {}):
        own = [value for value in (row[2] and ("category", row[2]), ("brand", row[3])) if value]
        if all(counts[value] < {"category": 2, "brand": 3}[value[0]] for value in own):
            counts.update(own)
            kept.append(row[1])
    assert [row[1] for row in capped] == kept


def test_items_below_the_least_score_are_left_out(shop: psycopg.Connection) -> None:
    everything = ask(shop, ALL)
    least = everything[4][1]
    assert ask(shop, {**ALL, "min_score": least}) == everything[:5]
    assert ask(shop, {**ALL, "min_score": 0}) == everything
    assert ask(shop, {**ALL, "min_score": 1}) == []


def test_a_filter_of_the_query_leaves_the_order_alone(shop: psycopg.Connection) -> None:
    """The set-based form: more than are needed, joined with what the shop knows."""
    rows = shop.execute(
        """select r.item_id, r.score from shop.recommend(%s, k => 12, options => '{"exclude_seen": false}') r
        join stock s using (item_id) where s.on_hand >= 6 order by r.rank limit 4""",
        [USER],
    ).fetchall()
    assert rows == [row for row in ask(shop, ALL) if row[0] in ITEMS[6:]][:4]


@pytest.mark.parametrize(
    ("options", "sqlstate", "message", "hint"),
    [
        ({"candidates": 3}, "22023", "option 'candidates' is 3", "give the name of a candidate set"),
        ({"candidates": None}, "22023", "option 'candidates' is null", "give the name of a candidate set"),
        ({"at_most": 3}, "22023", "option 'at_most' is 3", '{"at_most": {"category": 3}}'),
        ({"at_most": {"category": 0}}, "22023", "option 'at_most' is {\"category\": 0}", "with 1 or more"),
        ({"at_most": {"category": True}}, "22023", "option 'at_most' is {\"category\": true}", "with 1 or more"),
        (
            {"at_most": {"colour": 2}},
            "42703",
            "'colour', which catalogue.items does not have",
            "item_id, category, brand",
        ),
        ({"min_score": "0.1"}, "22023", "option 'min_score' is \"0.1\"", "0 to 1"),
        ({"min_score": 2}, "22023", "option 'min_score' is 2", "0 to 1"),
        ({"in_stock": True}, "22023", "option 'in_stock' is unknown", "exclude_seen, candidates, at_most, min_score"),
    ],
)
def test_an_option_of_a_wrong_value_is_refused_by_name(
    labelled: psycopg.Connection, options: dict[str, Any], sqlstate: str, message: str, hint: str
) -> None:
    refused = refusal(labelled, "select * from labelled.recommend(%s, 5, %s)", [USER, json.dumps(options)])
    assert refused.sqlstate == sqlstate
    assert message in str(refused.message_primary)
    assert hint in str(refused.message_hint)


def test_a_cap_needs_a_table_of_items(shop: psycopg.Connection) -> None:
    refused = refusal(shop, "select * from shop.recommend(%s, 5, %s)", [USER, json.dumps({"at_most": {"category": 2}})])
    assert refused.message_primary == "pgvae: option 'at_most' names 'category', but model shop has no table of items"


# Candidates of refreshes


def test_a_refresh_recommends_the_candidates_with_the_scores_of_a_live_call(
    trained: psycopg.Connection,
) -> None:
    trained.execute("create table few as select unnest(%s) as item_id", [ITEMS[:2]])
    define(trained, "few", name="of no refresh")
    trained.execute("create table stock as select unnest(%s) as item_id", [ITEMS[6:]])
    define(trained, "stock", for_refresh=True)
    trained.execute("call vae.refresh('shop')")
    for user in USERS[:10]:
        view = trained.execute(
            "select item_id, score from shop.recommendations where user_id = %s order by rank", [user]
        ).fetchall()
        live = ask(trained, {"candidates": "in_stock"}, user=user)
        assert [item for item, _ in view] == [item for item, _ in live]
        assert set(ITEMS[6:]) >= {item for item, _ in view} != set()
        np.testing.assert_allclose([score for _, score in view], [score for _, score in live], rtol=1e-5)
    # A live call ranks the whole catalogue unless it names the set.
    assert len(ask(trained, ALL)) == 12

    before = trained.execute("select * from shop.recommendations order by user_id, rank").fetchall()
    trained.execute("delete from stock")
    refused = refusal(trained, "call vae.refresh('shop', views => array['recommendations'])")
    assert "candidates 'in_stock' of model shop are empty" in str(refused.message_primary)
    assert "vae.drop_candidates('shop', 'in_stock')" in str(refused.message_hint)
    assert trained.execute("select * from shop.recommendations order by user_id, rank").fetchall() == before
    trained.execute("drop table stock")
    refused = refusal(trained, "call vae.refresh('shop', views => array['recommendations'])")
    assert "candidates 'in_stock' of model shop cannot be read from public.stock" in str(refused.message_primary)
    trained.execute("select vae.drop_candidates('shop', 'in_stock')")
    trained.execute("call vae.refresh('shop', views => array['recommendations'])")
    assert trained.execute("select count(distinct item_id) from shop.recommendations").fetchone() == (12,)


def test_a_restricted_version_gives_the_shares_among_the_candidates() -> None:
    random = np.random.default_rng(0)
    sizes = {"I": 40, "J": 41, "Z": 4, "H": 6, "T": 2, "A": 12, "O": 10, "F": 0, "L": 120, "1": 1}
    weights: dict[str, Any] = {
        name: random.normal(size=[sizes[letter] for letter in letters]).astype(np.float32)
        for name, letters in forward.SHAPES.items()
    }
    weights["item_popularity"] = np.abs(weights["item_popularity"])
    weights["shortcut_start"] = np.arange(0, 121, 3, dtype=np.int32)
    weights["shortcut_item"] = random.integers(40, size=120, dtype=np.int32)
    version = Version(
        version_id=1, version=1, model_id=1, model="m", user_id_type="text", weights=weights,
        event_types={"view": 0, "purchase": 1}, targets=(1,), max_history=9, user_count=5,
    )  # fmt: skip
    history = History(
        counts=np.array([6, 0, 12]),
        item=random.integers(40, size=18),
        event_type=random.integers(2, size=18),
        occurred_at=random.uniform(0, 1e7, size=18),
    )
    candidates = Candidates(name="few", items=np.array([1, 5, 6, 30, 39]))
    whole, cold = scoring.score_users(weights, history, max_history=9)
    small = filters.restricted(version, candidates)
    few, cold_of_few = scoring.score_users(small.weights, history, max_history=9)
    assert small.item_count == 5
    assert Work.of(1, small.weights).items == 5
    assert cold.tolist() == cold_of_few.tolist() == [False, True, False]
    scoring.mask_seen(few, history, [1], small.columns)
    filters.keep_candidates(whole, candidates)
    scoring.mask_seen(whole, history, [1])
    np.testing.assert_allclose(few, whole[:, candidates.items], rtol=1e-5)
    assert (np.delete(whole, candidates.items, axis=1) == -1).all()
