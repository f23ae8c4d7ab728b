"""A refresh that scores only those for whom something changed gives what a full one gives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import create_database, drop_database
from pgvae.server import Server
from shop import QUICK, SMALL, Shop, keys, refusal, train_and_activate
from variants import publish_network

Connection = psycopg.Connection[Any]

REFRESH = "call vae.refresh('shop', array['recommendations'])"
USERS = 80


@dataclass(frozen=True)
class Stage:
    """A shop whose model is active and refreshed, and keys of its users, of strangers and of its items."""

    connection: Connection
    users: list[Any]
    strangers: list[Any]
    items: list[Any]


def make_stage(server: Server, template: str, name: str, key_type: str, *, with_users: bool) -> Iterator[Stage]:
    """Makes a shop of its own, whose tables `reset` puts back."""
    create_database(server, name, template)
    dsn = server.dsn(name)
    everybody = keys("user", key_type, USERS + 10)
    users, strangers = everybody[:USERS], everybody[USERS:]
    shop = Shop(user_type=key_type, item_type=key_type, user_keys=users)
    with psycopg.connect(dsn, autocommit=True) as connection:
        shop.make(connection)
        arguments: dict[str, Any] = {"options": {**SMALL, "recommendations": 5}}
        if with_users:
            connection.execute(f"create table users (user_id {key_type} primary key, plan text, age integer)".encode())
            for number, key in enumerate(everybody):
                plan, age = ("free", "paid")[number % 2], number
                connection.execute("insert into users values (%s, %s, %s)", [key, plan, age])
            connection.execute("create table users_before as select * from users")
            arguments["users"] = "users"
        shop.create_model(connection, **arguments)
        connection.execute("create table events_before as select * from events")
        connection.execute("create index on events (user_id)")
        train_and_activate(dsn)
        connection.execute(REFRESH.encode())
        yield Stage(connection, users, strangers, shop.items)
    drop_database(server, name)


@pytest.fixture(scope="module")
def plain(server: Server, template: str) -> Iterator[Stage]:
    """A shop with bigint keys and nothing but events."""
    yield from make_stage(server, template, "incremental_plain", "bigint", with_users=False)


@pytest.fixture(scope="module")
def featured(server: Server, template: str) -> Iterator[Stage]:
    """A shop with text keys and a table of users, whose columns are features."""
    yield from make_stage(server, template, "incremental_featured", "text", with_users=True)


@pytest.fixture
def stage(plain: Stage) -> Stage:
    """The plain shop as it was."""
    reset(plain)
    return plain


def reset(stage: Stage) -> None:
    """Puts the tables back and stores all users."""
    run = stage.connection.execute
    run("truncate events")
    run("insert into events select * from events_before")
    if run("select to_regclass('users_before')").fetchone() != (None,):
        run("truncate users")
        run("insert into users select * from users_before")
    run("call vae.refresh('shop', array['recommendations'], full => true)")


def stored(connection: Connection) -> dict[Any, list[tuple[Any, float]]]:
    """Gives the list of each user as people read it."""
    lists: dict[Any, list[tuple[Any, float]]] = {}
    rows = connection.execute(
        "select user_id::text, item_id::text, score, is_cold_start from shop.recommendations order by user_id, rank"
    ).fetchall()
    for user, item, score, is_cold in rows:
        lists.setdefault((user, is_cold), []).append((item, score))
    return lists


def scored(connection: Connection) -> dict[Any, list[tuple[Any, float]]]:
    """Gives the list of each user as a full refresh would store it now."""
    rows = connection.execute(
        "select user_key, is_cold_start, item_keys::text[], scores::real[]"
        " from vae_private.recommend_all((select model_id from vae.models), 5)"
    ).fetchall()
    return {(user, is_cold): list(zip(items, scores, strict=True)) for user, is_cold, items, scores in rows if items}


def last(connection: Connection) -> Any:
    """Gives mode, rows and how many of them were scored of the last refresh."""
    return connection.execute(
        "select mode, row_count, scored_count, state from vae.refreshes where view = 'recommendations'"
        " order by refresh_id desc limit 1"
    ).fetchone()


def assert_as_a_full_refresh(connection: Connection) -> None:
    """Fails unless each user has the same items in the same order, with the same scores to 1e-5."""
    assert_same(stored(connection), scored(connection))


def assert_same(found: dict[Any, list[tuple[Any, float]]], wanted: dict[Any, list[tuple[Any, float]]]) -> None:
    """Fails unless these are the same lists, their scores to 1e-5: users are scored beside other users."""
    assert found.keys() == wanted.keys()
    for user, entries in wanted.items():
        assert [item for item, _ in found[user]] == [item for item, _ in entries], user
        for (_, score), (_, right) in zip(found[user], entries, strict=True):
            assert math.isclose(score, right, rel_tol=1e-5), user


# Random streams of events


@st.composite
def acts(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Gives one thing that happens in a shop: numbers stand for users, strangers, items and moments."""
    kind = draw(
        st.sampled_from(["new", "new", "late", "future", "twice", "stranger", "change", "remove", "vanish", "user"])
    )
    return kind, {
        "user": draw(st.integers(0, USERS - 1)),
        "stranger": draw(st.integers(0, 9)),
        "item": draw(st.integers(0, 11)),
        "other": draw(st.integers(0, 11)),
        "type": draw(st.sampled_from(["view", "purchase", "add_to_cart", "unknown"])),
        "days": draw(st.integers(1, 400)),
    }


def do(stage: Stage, kind: str, choice: dict[str, Any]) -> None:
    """Does it to the shop's tables, as a shop does: no trigger, nothing that tells pgvae of it."""
    user, item, other = stage.users[choice["user"]], stage.items[choice["item"]], stage.items[choice["other"]]
    stranger, event_type = stage.strangers[choice["stranger"]], choice["type"]
    now, span = datetime.now(UTC), timedelta(days=choice["days"])
    insert = "insert into events values (%s, %s, %s, %s)"
    run = stage.connection.execute
    match kind:
        case "new":
            run(insert, [user, item, event_type, now])
        case "late":
            run(insert, [user, item, event_type, now - span])
        case "future":
            run(insert, [user, item, event_type, now + span])
        case "twice":
            run(insert, [user, item, event_type, now - span])
            run(insert, [user, item, event_type, now - span])
        case "stranger":
            run(insert, [stranger, item, event_type, now])
        case "change":
            run("update events set item_id = %s where user_id = %s and item_id = %s", [other, user, item])
        case "remove":
            run("delete from events where user_id = %s and item_id = %s", [user, item])
        case "vanish":
            run("delete from events where user_id = %s", [user])
            if run("select to_regclass('users')").fetchone() != (None,):
                run("delete from users where user_id = %s", [user])
        case "user" if run("select to_regclass('users')").fetchone() != (None,):
            run("update users set plan = 'other', age = %s where user_id = %s", [choice["days"], user])


STREAMS = st.lists(st.lists(acts(), max_size=12), min_size=1, max_size=4)
QUIETLY = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def play(stage: Stage, stream: list[list[tuple[str, dict[str, Any]]]]) -> None:
    reset(stage)
    for step in stream:
        for kind, choice in step:
            do(stage, kind, choice)
        stage.connection.execute(REFRESH.encode())
        assert_as_a_full_refresh(stage.connection)
        assert last(stage.connection)[0] == "incremental"
        assert last(stage.connection)[2] <= 2 * len(step)


@given(stream=STREAMS)
@QUIETLY
def test_any_stream_of_events_gives_what_a_full_refresh_gives(plain: Stage, stream: Any) -> None:
    play(plain, stream)


@given(stream=STREAMS)
@QUIETLY
def test_so_it_does_with_text_keys_users_and_features(featured: Stage, stream: Any) -> None:
    play(featured, stream)


# What is scored, and what is not


def test_only_who_changed_is_scored_again(stage: Stage) -> None:
    run = stage.connection.execute
    at = "select user_id, scored_at from shop.recommendations where rank = 1 order by 1"
    before = dict(run(at).fetchall())
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS, 0, "succeeded")
    assert dict(run(at).fetchall()) == before
    run("insert into events values (%s, %s, 'view', now())", [stage.users[3], stage.items[0]])
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS, 1, "succeeded")
    after = dict(run(at).fetchall())
    assert {user for user in before if after[user] != before[user]} == {stage.users[3]}
    # Once is enough, and who changed before stays as it was scored then.
    run("delete from events where user_id = %s and item_id = %s", [stage.users[5], stage.items[1]])
    run("insert into events values (%s, %s, 'view', now())", [stage.users[5], stage.items[1]])
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS, 1, "succeeded")
    again = dict(run(at).fetchall())
    assert {user for user in again if again[user] != after[user]} == {stage.users[5]}
    assert run("select count(*) from shop.recommendations_changed").fetchone() == (2,)
    assert_as_a_full_refresh(stage.connection)


def test_an_event_of_the_future_counts_when_its_time_has_come(stage: Stage) -> None:
    run = stage.connection.execute
    run(
        "insert into events values (%s, %s, 'view', clock_timestamp() + interval '2 s')",
        [stage.users[0], stage.items[0]],
    )
    run(REFRESH)
    assert last(stage.connection)[2] == 0
    time.sleep(2.1)
    run(REFRESH)
    assert last(stage.connection)[2] == 1
    assert_as_a_full_refresh(stage.connection)


def test_two_pairs_of_equal_events_are_told_apart(stage: Stage) -> None:
    """A digest by exclusive or would take any pair of equal events for nothing."""
    run = stage.connection.execute
    for _ in range(2):
        run("insert into events values (%s, %s, 'view', '2024-02-01')", [stage.users[0], stage.items[0]])
    run(REFRESH)
    assert last(stage.connection)[2] == 1
    run(
        "update events set item_id = %s where user_id = %s and occurred_at = '2024-02-01'",
        [stage.items[11], stage.users[0]],
    )
    run(REFRESH)
    assert last(stage.connection)[2] == 1
    assert_as_a_full_refresh(stage.connection)


def test_scores_are_carried_over_to_the_last_digit_whatever_the_session_prints(stage: Stage) -> None:
    run = stage.connection.execute
    try:
        run("set extra_float_digits = -3")
        # Enough users for a merge, which copies the others.
        for user in stage.users[: USERS // 4]:
            run("insert into events values (%s, %s, 'view', now())", [user, stage.items[0]])
        run(REFRESH)
    finally:
        run("reset extra_float_digits")
    assert last(stage.connection) == ("incremental", USERS, USERS // 4, "succeeded")
    assert_as_a_full_refresh(stage.connection)


def test_who_vanishes_is_gone_and_may_come_back(stage: Stage) -> None:
    run = stage.connection.execute
    user = stage.users[0]
    count = "select count(*) from shop.recommendations where user_id = %s"
    run("delete from events where user_id = %s", [user])
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS - 1, 0, "succeeded")
    assert run(count, [user]).fetchone() == (0,)
    run("insert into events select * from events_before where user_id = %s", [user])
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS, 1, "succeeded")
    assert run(count, [user]).fetchone() == (5,)
    # A tenth of all: the gone leave recommendations_materialized too.
    run("delete from events where user_id = any(%s)", [stage.users[:20]])
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS - 20, 0, "succeeded")
    assert run("select count(*) from shop.recommendations_materialized").fetchone() == (USERS - 20,)
    assert_as_a_full_refresh(stage.connection)


def test_many_changes_are_merged_into_the_materialized_view(stage: Stage) -> None:
    run = stage.connection.execute
    insert = "insert into events select u, %s, 'view', now() from unnest(%s::bigint[]) u"
    count = "select (select count(*) from shop.recommendations_changed), (select count(*) from {})"
    count = count.format("shop.recommendations_materialized")
    run(insert, [stage.items[0], stage.users[:8]])
    run(REFRESH)
    assert run(count.encode()).fetchone() == (8, USERS)
    run(insert, [stage.items[1], stage.users[8:9]])
    run(REFRESH)
    assert last(stage.connection) == ("incremental", USERS, 1, "succeeded")
    assert run(count.encode()).fetchone() == (0, USERS)
    scored_at = run("select count(distinct scored_at) from shop.recommendations_materialized").fetchone()
    assert scored_at == (3,)
    assert_as_a_full_refresh(stage.connection)


def test_full_scores_everybody(stage: Stage) -> None:
    stage.connection.execute("call vae.refresh('shop', full => true)")
    assert last(stage.connection) == ("full", USERS, USERS, "succeeded")


def test_what_all_scores_depend_on_scores_everybody(trained: Connection, trained_database: str) -> None:
    users = len(Shop().users)
    trained.execute(REFRESH.encode())
    assert last(trained) == ("incremental", users, 0, "succeeded")
    version = publish_network(trained_database, "shop", QUICK, seed=1)[0]
    for statement in (
        f"select * from vae.activate('shop', {version}, force => true)",
        "select * from vae.rollback('shop')",
        "create table stock as select min(item_id) as item_id from events;"
        "select * from vae.set_candidates('shop', 'stock', 'stock', for_refresh => true)",
        "insert into stock select distinct item_id from events",
        "delete from stock where item_id = (select max(item_id) from events)",
        "select vae.drop_candidates('shop', 'stock')",
        "update vae.models set options = options || '{\"max_history\": 3}'",
    ):
        trained.execute(statement.encode())
        trained.execute(REFRESH.encode())
        assert last(trained) == ("full", users, users, "succeeded"), statement
        trained.execute(REFRESH.encode())
        assert last(trained) == ("incremental", users, 0, "succeeded"), statement


def test_a_failed_full_refresh_leaves_both_parts_as_they_were(stage: Stage) -> None:
    run = stage.connection.execute
    run("insert into events values (%s, %s, 'view', now())", [stage.users[0], stage.items[0]])
    run(REFRESH)
    before = stored(stage.connection)
    run(
        "insert into events select u, %s, 'view', now() from unnest(%s::bigint[]) u", [stage.items[1], stage.users[:30]]
    )
    run("set vae.device = 'x'")
    refused = refusal(stage.connection, REFRESH)
    assert refused.message_primary == "refresh of shop.recommendations failed: vae.device is 'x'"
    run("reset vae.device")
    assert stored(stage.connection) == before
    run(REFRESH)
    assert_as_a_full_refresh(stage.connection)


def test_a_refresh_by_hand_that_would_mix_is_refused(stage: Stage) -> None:
    run = stage.connection.execute
    by_hand = "refresh materialized view shop.recommendations_materialized"
    run(by_hand)
    assert_as_a_full_refresh(stage.connection)
    run("insert into events values (%s, %s, 'view', now())", [stage.users[0], stage.items[0]])
    run(REFRESH)
    refused = refusal(stage.connection, by_hand)
    assert refused.sqlstate == "55000"
    assert refused.message_hint == "call vae.refresh('shop', full => true)"
    # Emptied by hand, it is filled again by the next refresh.
    run("refresh materialized view shop.recommendations_changed")
    run(REFRESH)
    assert last(stage.connection)[2] == 1
    assert_as_a_full_refresh(stage.connection)


def test_a_lookup_of_one_user_goes_through_both_indexes(stage: Stage) -> None:
    run = stage.connection.execute
    run("insert into events values (%s, %s, 'view', now())", [stage.users[0], stage.items[0]])
    run(REFRESH)
    run("set enable_seqscan = off")
    plan = "\n".join(row[0] for row in run("explain select * from shop.recommendations where user_id = 1").fetchall())
    run("reset enable_seqscan")
    assert "Seq Scan" not in plan
    assert "recommendations_user_id" in plan
    assert "recommendations_changed_user_id" in plan


# Freshness


def freshness(connection: Connection) -> Any:
    """Gives version, users, stale users, since when and whether that is exact, of the recommendations."""
    return connection.execute(
        "select model_version, user_count, stale_users, stale_since, is_exact from vae.check_freshness('shop')"
        " where prediction = 'recommendations'"
    ).fetchone()


def test_freshness_counts_the_users_who_changed_since(stage: Stage) -> None:
    run = stage.connection.execute
    assert freshness(stage.connection) == (1, USERS, 0, None, True)
    refreshed_at = run("select refreshed_at from vae.freshness where prediction = 'recommendations'").fetchone()
    assert refreshed_at
    # Late and deleted: since when is not known.
    run("insert into events values (%s, %s, 'view', '2024-01-05')", [stage.users[0], stage.items[0]])
    run("delete from events where user_id = %s", [stage.users[1]])
    assert freshness(stage.connection) == (1, USERS - 1, 2, *refreshed_at, True)
    moment = run("select now()").fetchone()
    assert moment
    run("insert into events values (%s, %s, 'view', %s)", [stage.users[2], stage.items[0], *moment])
    run("insert into events values (%s, %s, 'view', now())", [stage.strangers[0], stage.items[0]])
    assert freshness(stage.connection) == (1, USERS, 4, *moment, True)
    run(REFRESH)
    assert freshness(stage.connection) == (1, USERS, 0, None, True)


def test_work_mem_is_raised_for_the_comparison_alone(trained: Connection) -> None:
    for before, meanwhile in (("4MB", "64MB"), ("100MB", "100MB")):
        with trained.transaction():
            trained.execute(f"set local work_mem = '{before}'")
            assert freshness(trained)
            assert trained.execute("show work_mem").fetchone() == (before,)
            assert trained.execute("select vae_private.raise_work_mem()").fetchone() == (before,)
            assert trained.execute("show work_mem").fetchone() == (meanwhile,)


def test_freshness_of_a_view_without_digests_counts_users_with_new_events(trained: Connection) -> None:
    trained.execute("insert into events select user_id, item_id, 'view', now() from events order by 1, 2 limit 1")
    found = trained.execute(
        "select prediction, stale_users, is_exact, stale_since > refreshed_at from vae.check_freshness('shop')"
    ).fetchall()
    assert ("recommendations", 1, True, True) in found
    others = [row for row in found if row[0] != "recommendations"]
    assert others
    assert {row[1:] for row in others} == {(1, False, True)}


def test_the_freshness_view_tells_version_age_and_the_last_failure(trained: Connection, trained_database: str) -> None:
    version = publish_network(trained_database, "shop", QUICK, seed=1)[0]
    trained.execute("select * from vae.activate('shop', %s, force => true)", [version])
    trained.execute("set vae.device = 'x'")
    refusal(trained, REFRESH)
    trained.execute("reset vae.device")
    query = (
        "select model_version, active_version, is_active_version, row_count, last_state, last_error,"
        " age between '0 s' and '1 hour' from vae.freshness where model = 'shop' and prediction = 'recommendations'"
    )
    users = len(Shop().users)
    assert trained.execute(query).fetchone() == (1, 2, False, users, "failed", "vae.device is 'x'", True)
    trained.execute(REFRESH.encode())
    assert trained.execute(query).fetchone() == (2, 2, True, users, "succeeded", None, True)


def test_a_view_that_the_active_version_leaves_empty_is_of_that_version(
    trained: Connection, trained_database: str
) -> None:
    # It has neither heads nor a forecast nor segments: its events span two months.
    version = publish_network(trained_database, "shop", QUICK, seed=1)[0]
    trained.execute("select * from vae.activate('shop', %s, force => true)", [version])
    trained.execute("select vae.create_offer('shop', 'spring', array[item_id], 1) from events limit 1")
    trained.execute("call vae.refresh('shop')")
    found = trained.execute("select prediction, model_version, is_active_version, row_count from vae.freshness")
    rows = {row[0]: row[1:] for row in found}
    empty = ("churn", "demand", "offer_responses", "user_segments")
    assert {name: rows[name] for name in empty} == dict.fromkeys(empty, (version, True, 0))
    assert {row[:2] for row in rows.values()} == {(version, True)}


def test_freshness_of_a_model_that_was_never_refreshed_is_unknown(trained: Connection) -> None:
    Shop().create_model(trained, "other")
    found = trained.execute("select distinct model_version, stale_users, is_exact from vae.check_freshness('other')")
    assert found.fetchall() == [(None, None, False)]
    assert trained.execute("select count(*) from vae.freshness where model = 'other'").fetchone() == (0,)
