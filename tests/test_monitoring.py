"""What a monitor sees: drift of events, hit rate of recommendations, health of a model, and queries of exporters."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from conftest import as_role
from pgvae.install import install
from pgvae.server import Server
from shop import BEGIN, QUICK, Shop, refusal
from variants import publish_network

Connection = psycopg.Connection[Any]


def drift(connection: Connection, days: int | None = None) -> dict[str, dict[str, Any]]:
    """Calls vae.check_drift; a row per subject."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute("select * from vae.check_drift('shop', %s)", [days]).fetchall()
    return {row["subject"]: row for row in rows}


def health(connection: Connection) -> dict[str, Any]:
    """Gives the row of vae.health of the model shop."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute("select * from vae.health where model = 'shop'").fetchone()
    assert row
    return row


def checks(connection: Connection) -> dict[str, tuple[str, str, str | None]]:
    """Gives status, detail and remedy of each check of the model shop."""
    rows = connection.execute(
        "select check_name, status, detail, remedy from vae.health_checks where model = 'shop'"
    ).fetchall()
    return {row[0]: row[1:] for row in rows}


def problems(connection: Connection) -> dict[str, str]:
    """Gives the checks that are warning or critical."""
    return {name: row[0] for name, row in checks(connection).items() if row[0] in ("warning", "critical")}


# Drift


def test_nothing_drifts_while_no_event_came(trained: Connection) -> None:
    found = drift(trained)
    assert list(found) == ["event types", "items", "activity"]
    for row in found.values():
        assert (row["status"], row["psi"], row["remedy"], row["model_version"]) == ("ok", 0, None, 1)
        assert row["expected_count"] == row["actual_count"] > 0
        assert row["window_end"] - row["window_start"] == timedelta(days=28)
    # Of three event types; where all is in one bin, chance has no part.
    assert found["event types"]["chance"] > 0


def test_the_index_is_that_of_the_shares(trained: Connection) -> None:
    """A month later everybody buys where most looked: the index is computed here from the events themselves."""
    before, now = (dict.fromkeys(("view", "add_to_cart", "purchase"), 0) for _ in range(2))
    last = max(at for *_, at in Shop().rows())
    for _, _, name, at in Shop().rows():
        before[name] += at > last - timedelta(days=28)
    rows = []
    for number, user in enumerate(Shop().users):
        for event in range(6):
            name = ("purchase", "purchase", "purchase", "view", "add_to_cart", "purchase")[event]
            at = last + timedelta(days=40, seconds=60 * number + event)
            rows.append((user, Shop().items[(number + event) % 12], name, at))
            now[name] += 1
    Shop().add(trained, rows)
    found = drift(trained, 28)
    shares = [(before[name] / sum(before.values()), now[name] / sum(now.values())) for name in before]
    expected = sum((b - a) * math.log(b / a) for a, b in shares)
    assert found["event types"]["psi"] == pytest.approx(expected, abs=1e-6)
    assert (found["event types"]["status"], found["event types"]["remedy"]) == (
        "critical",
        "train again with: pgvae retrain shop --activate",
    )
    assert "% before, " in found["event types"]["detail"]
    # Each user had five or six events then, and has six now.
    assert found["activity"]["actual_count"] == 30
    logged = trained.execute(
        "select o.subject, o.value, o.status from vae.observations o order by observation_id"
    ).fetchall()
    assert logged == [(name, row["psi"], row["status"]) for name, row in found.items()]
    bins = trained.execute("select bins from vae.observations where subject = 'event types'").fetchone()
    assert bins and {b["bin"]: (b["expected"], b["actual"]) for b in bins[0]} == {
        name: pytest.approx(share) for name, share in zip(before, shares, strict=True)
    }
    assert problems(trained)["drift"] == "critical"
    assert health(trained)["remedy"] == "train again with: pgvae retrain shop --activate"


def test_new_items_and_a_lost_event_type_are_seen(trained: Connection) -> None:
    last = max(at for *_, at in Shop().rows())
    rows = [
        (user, 7_000 + number % 5 if number % 2 else Shop().items[0], "view", last + timedelta(days=60, seconds=number))
        for number, user in enumerate(Shop().users * 4)
    ]
    Shop().add(trained, rows)
    found = drift(trained)
    assert found["items"]["status"] == "critical"
    assert found["items"]["psi"] > 0.25
    share = trained.execute(
        "select b ->> 'actual' from vae.observations o cross join jsonb_array_elements(o.bins) b"
        " where o.subject = 'items' and b ->> 'bin' = 'new items'"
    ).fetchone()
    assert share and float(share[0]) == pytest.approx(0.5)
    row = found["event types"]
    assert (row["status"], row["remedy"]) == ("critical", "check what loads the events")
    assert row["detail"].startswith("no events of type add_to_cart since ")


def test_few_users_prove_no_drift(trained: Connection) -> None:
    """One user who does something else is chance."""
    last = max(at for *_, at in Shop().rows())
    Shop().add(trained, [(Shop().users[0], Shop().items[0], "purchase", last + timedelta(days=90))])
    trained.execute("delete from events where event_type = 'add_to_cart' and occurred_at > %s", [BEGIN])
    row = drift(trained)["items"]
    assert row["psi"] > 0.25
    assert row["psi"] < row["chance"]
    assert row["status"] == "ok"


def test_the_chance_level_is_the_quantile_of_chi_square(shared_trained: Connection) -> None:
    for bins, quantile in ((2, 3.841), (4, 7.815), (10, 16.919), (20, 30.144)):
        found = shared_trained.execute("select vae_private.chance_psi(%s, 100, 300)", [bins]).fetchone()
        assert found and found[0] == pytest.approx(quantile * (1 / 100 + 1 / 300), rel=0.03)


def test_drift_needs_a_version_and_a_window(trained: Connection) -> None:
    assert refusal(trained, "select * from vae.check_drift('shop', 0)").sqlstate == "22023"
    assert refusal(trained, "select * from vae.check_drift('nothing')").sqlstate == "VA001"
    trained.execute("delete from events")
    assert {(row["status"], row["psi"]) for row in drift(trained).values()} == {("critical", None)}
    assert checks(trained)["drift"][0] == "critical"
    Shop().add(trained, [(Shop().users[0], Shop().items[0], "purchase", BEGIN + timedelta(days=300))])
    assert {row["status"] for row in drift(trained).values()} == {"unknown"}
    assert checks(trained)["drift"][0] == "unknown"
    trained.execute("update vae.versions set state = 'retired'")
    assert refusal(trained, "select * from vae.check_drift('shop')").sqlstate == "VA002"


def test_columns_are_compared_with_their_first_measurement(connection: Connection, role: str) -> None:
    Shop().make(connection)
    connection.execute(
        "create table users as select distinct user_id, (array['north', 'south', 'west'])[1 + user_id % 3] as region,"
        " timestamptz '2024-01-01 12:00+00' + user_id % 30 * interval '1 day' as joined_at from events;"
        "create table items as select distinct item_id, (item_id % 10)::numeric as price, array['a', 'b'] as labels"
        " from events"
    )
    Shop().create_model(connection, users="users", items="items")
    publish_network(connection.info.dsn, "shop", QUICK, 1)
    connection.execute("select * from vae.activate('shop', 1)")
    found = drift(connection)
    assert list(found) == ["event types", "items", "activity", "users.region", "users.joined_at", "items.price"]
    assert {row["psi"] for row in found.values()} == {0}
    assert re.match(r"(from|under) 2024-\d\d-\d\d 00:00 ", found["users.joined_at"]["detail"])
    assert re.match(r"(from|under) \d ", found["items.price"]["detail"])
    before = connection.execute("select region, count(*) from users group by region order by region").fetchall()
    assert (
        connection.execute(
            "select b ->> 'bin', round((b ->> 'actual')::float8 * 30)::int from vae.observations"
            " cross join jsonb_array_elements(bins) b where subject = 'users.region'"
        ).fetchall()
        == before
    )
    # Northerners move to a region that the version has never heard of, some to none; prices double.
    connection.execute("update users set region = case when user_id % 6 = 0 then 'east' end where region = 'north'")
    connection.execute("update items set price = price * 2")
    count = dict(before)
    gone = connection.execute("select count(*) from users where region is null").fetchone()
    assert gone
    found = drift(connection)
    shares = [(count["north"] / 30, 0.01), (0.01, gone[0] / 30), (0.01, (count["north"] - gone[0]) / 30)]
    expected = sum((now - was) * math.log(now / was) for was, now in shares)
    assert found["users.region"]["psi"] == pytest.approx(expected, abs=1e-6)
    # Nobody reads more digits.
    assert all(row[name] == round(row[name], 6) for row in found.values() for name in ("psi", "chance"))
    assert (found["users.region"]["status"], found["items"]["psi"]) == ("critical", 0)
    assert found["items.price"]["psi"] > 0
    assert "users.region: north " in checks(connection)["drift"][1]
    # Whoever may read the events alone has those compared.
    connection.execute(f"grant vae_operator to {role}; grant usage on schema shop to {role}")
    connection.execute(f"grant select (user_id) on users to {role}; grant select (item_id) on items to {role}")
    connection.execute(f"grant select on events to {role}")
    with psycopg.connect(as_role(connection.info.dsn, role), autocommit=True) as operator:
        found = drift(operator)
    assert (found["event types"]["status"], found["users.region"]["status"]) == ("ok", "unknown")
    assert found["users.region"]["detail"] == "permission denied for table users"
    connection.execute(f"drop owned by {role}")


def test_bins_of_a_number_have_one_name_whatever_a_session_prints(connection: Connection) -> None:
    Shop().make(connection)
    connection.execute("create table items as select distinct item_id, item_id % 10 / 3.0 as price from events")
    Shop().create_model(connection, items="items")
    publish_network(connection.info.dsn, "shop", QUICK, 1)
    connection.execute("select * from vae.activate('shop', 1)")
    drift(connection)
    connection.execute("set extra_float_digits = 0")
    assert drift(connection)["items.price"]["psi"] == 0


def test_a_number_that_cannot_be_read_is_missing_and_takes_nothing_from_the_others(connection: Connection) -> None:
    Shop().make(connection)
    make = "select item_id, {} as price, (item_id % 7)::numeric as weight from (select distinct item_id from events) e"
    connection.execute("create table items as " + make.format("(item_id % 10)::numeric"))
    Shop().create_model(connection, items="items")
    publish_network(connection.info.dsn, "shop", QUICK, 1)
    connection.execute("select * from vae.activate('shop', 1)")
    drift(connection)

    def missing() -> Any:
        return connection.execute(
            "select round((b ->> 'actual')::float8 * actual_count) from vae.observations"
            " cross join jsonb_array_elements(bins) b where subject = 'items.price' and b ->> 'bin' = 'missing'"
            " order by observation_id desc limit 1"
        ).fetchone()

    zeros = connection.execute("select count(*) from items where item_id % 10 = 0").fetchone()
    for far in ("1e400", "-1e400", "'NaN'"):
        connection.execute(f"update items set price = {far} where item_id % 10 = 0")
        assert set(drift(connection)) == {"event types", "items", "activity", "items.price", "items.weight"}
        assert missing() == zeros
    connection.execute("update items set price = 1e-400 where item_id % 10 = 0")
    assert drift(connection)["items.price"]["psi"] == 0
    # The column became text, and the shop writes so where it has no price.
    connection.execute("drop table items cascade; create table items as " + make.format("'n/a'::text"))
    connection.execute("select vae.rebuild_model('shop')")
    found = drift(connection)
    assert (found["items.price"]["status"], found["items.weight"]["status"]) == ("critical", "ok")
    assert missing() == connection.execute("select count(*) from items").fetchone()
    # A table that fails is told of, and the events compared.
    connection.execute("drop table items cascade; create view items as " + make.format("1 / (item_id - item_id)"))
    connection.execute("select vae.rebuild_model('shop')")
    found = drift(connection)
    assert (found["items.price"]["status"], found["items.price"]["detail"]) == ("unknown", "division by zero")
    assert found["activity"]["status"] == "ok"


# Hit rate


def hits(connection: Connection) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("select * from vae.hit_rate('shop')").fetchall()


def test_the_hit_rate_counts_what_was_bought_of_what_was_recommended(trained: Connection) -> None:
    (row,) = hits(trained)
    assert (row["hit_rate"], row["bought_share"], row["users"], row["buyers"]) == (None, 0, 30, 0)
    lists: dict[Any, list[Any]] = {}
    for user, item in trained.execute("select user_id, item_id from shop.recommendations order by rank").fetchall():
        lists.setdefault(user, []).append(item)
    first, second, third = list(lists)[:3]
    others = [item for item in Shop().items if item not in lists[second]]
    buy = "insert into events values (%s, %s, %s, now() - %s::interval)"
    trained.execute(buy, [first, lists[first][0], "purchase", "0 s"])
    trained.execute(buy, [first, lists[first][1], "purchase", "0 s"])
    # Twice the same, something else, only looked at, and before it was recommended.
    trained.execute(buy, [first, lists[first][0], "purchase", "0 s"])
    trained.execute(buy, [second, others[0], "purchase", "0 s"])
    trained.execute(buy, [third, lists[third][0], "view", "0 s"])
    trained.execute(buy, [third, lists[third][0], "purchase", "30 days"])
    (row,) = hits(trained)
    count = sum(map(len, lists.values()))
    assert (row["buyers"], row["hit_buyers"], row["hit_rate"]) == (2, 1, 0.5)
    assert (row["recommended"], row["bought"]) == (count, 2)
    assert row["bought_share"] == float(f"{2 / count:.6g}")
    logged = trained.execute(
        "select value, detail from vae.observations where measure = 'hit rate' order by observation_id desc limit 1"
    ).fetchone()
    assert logged == (0.5, "1 of 2 buyers bought what was recommended to them")


def test_no_hit_rate_before_the_first_refresh(connection: Connection) -> None:
    Shop().make(connection)
    Shop().create_model(connection)
    refused = refusal(connection, "select * from vae.hit_rate('shop')")
    assert (refused.sqlstate, refused.message_hint) == ("55000", "refresh first: call vae.refresh('shop')")


# Health


def test_a_model_is_followed_from_nothing_to_health(connection: Connection) -> None:
    Shop().make(connection)
    Shop().create_model(connection)
    row = health(connection)
    assert (row["status"], row["severity"], row["problems"], row["active_version"]) == ("critical", 2, 1, None)
    assert row["detail"] == "active version: no version is active: nothing scores"
    assert row["remedy"] == "in a terminal: pgvae train shop --activate"
    publish_network(connection.info.dsn, "shop", QUICK, 1)
    assert health(connection)["remedy"] == "select * from vae.activate('shop', 1)"
    connection.execute(str(health(connection)["remedy"]))
    assert problems(connection) == {"refreshed": "critical"}
    assert "recommendations" in checks(connection)["refreshed"][1]
    connection.execute("call vae.refresh('shop', views => array['recommendations'])")
    # One view of a release that was installed since, say.
    assert checks(connection)["refreshed"][1].startswith("never refreshed: churn, demand, ")
    assert connection.execute("select count(*) from shop.churn").fetchone() == (0,)
    assert refusal(connection, "select * from shop.demand").sqlstate == "55000"
    connection.execute("call vae.refresh('shop', views => array['churn'])")
    assert checks(connection)["refreshed"][1].startswith("never refreshed: demand, ")
    connection.execute(str(health(connection)["remedy"]))
    connection.execute(
        "alter table events rename to kept; create table events (like kept); select vae.rebuild_model('shop')"
    )
    connection.execute("call vae.refresh('shop', '{recommendations}')")
    assert checks(connection)["refreshed"][:2] == ("critical", "the last refresh found no user")
    connection.execute("insert into events select * from kept")
    connection.execute("call vae.refresh('shop')")
    row = health(connection)
    assert (row["status"], row["severity"], row["problems"], row["detail"], row["remedy"]) == ("ok", 0, 0, None, None)
    assert (row["active_version"], row["refresh_age"] < timedelta(minutes=5)) == (1, True)
    assert {name: check[0] for name, check in checks(connection).items()} == {
        **dict.fromkeys(("views", "active version", "refreshed", "last refresh", "age"), "ok"),
        **dict.fromkeys(("version of predictions", "interrupted refresh", "parity", "gates"), "ok"),
        "drift": "unknown",
        "indexes": "ok",
        "new events": "ok",
        "candidates and offers": "ok",
    }


def test_a_large_table_of_events_without_an_index_for_live_calls_is_told_of(trained: Connection) -> None:
    assert checks(trained)["indexes"][:2] == ("ok", "the table of events is small")
    trained.execute("insert into events select 1, 1, 'view', now() from generate_series(1, 200000)")
    status, detail, remedy = checks(trained)["indexes"]
    assert status == "warning"
    assert detail == "no index of public.events begins with user_id, nor with item_id: live calls read the whole table"
    for statement in str(remedy).split("; "):
        trained.execute(statement)
    assert checks(trained)["indexes"] == ("ok", "live calls find their events by an index", None)


def test_a_dropped_relation_of_candidates_or_an_offer_is_told_before_a_refresh_misses_it(trained: Connection) -> None:
    trained.execute(
        "create table stock as select item_id, user_id from events;"
        " create view listed as select item_id from stock; create view asked as select user_id from stock"
    )
    trained.execute("select vae.set_candidates('shop', 'listed', 'listed')")
    known = "(select array[min(item_id)] from shop.clean_events)"
    trained.execute(f"select vae.create_offer('shop', 'sale', {known}, among => 'asked')")
    trained.execute(f"select vae.create_offer('shop', 'past', {known}, among => 'asked', ends_at => now())")
    assert checks(trained)["candidates and offers"] == ("ok", "what they name is there", None)
    trained.execute("drop view asked; create view asked as select user_id as customer from stock; drop view listed")
    offer = "offer 'sale' reads public.asked, which is gone or has no column user_id"
    lost = f"candidates 'listed' reads public.listed, which is gone or has no column item_id; {offer}"
    assert checks(trained)["candidates and offers"] == (
        "warning",
        lost,
        "make them again, or: select vae.drop_candidates('shop', 'listed'); select vae.drop_offer('shop', 'sale')",
    )
    # The next refresh will fail.
    trained.execute("update vae.candidates set for_refresh = true")
    assert checks(trained)["candidates and offers"][:2] == ("critical", lost)
    assert refusal(trained, "call vae.refresh('shop')").sqlstate == "42P01"
    trained.execute("select vae.drop_candidates('shop', 'listed'); select vae.drop_offer('shop', 'sale')")
    assert checks(trained)["candidates and offers"][0] == "ok"


def test_events_that_no_longer_arrive_show_in_refreshes_that_found_nothing_new(trained: Connection) -> None:
    users = trained.execute("select count(distinct user_id) from shop.recommendations").fetchone()
    assert users is not None
    assert checks(trained)["new events"] == ("ok", f"the last refresh scored {users[0]} users, of {users[0]}", None)
    for _ in range(2):
        trained.execute("call vae.refresh('shop', views => array['recommendations'])")
    trained.execute("update vae.refreshes set events_until = events_until - interval '77 hours' where mode = 'full'")
    assert checks(trained)["new events"][:2] == ("ok", f"the last refresh scored 0 users, of {users[0]}")
    trained.execute("update vae.refreshes set events_until = events_until - interval '2 hours' where mode = 'full'")
    status, detail, remedy = checks(trained)["new events"]
    assert status == "warning"
    assert str(detail).startswith("nothing was new of any user between the refreshes of ")
    assert remedy == "see whether what loads the events still runs"
    # However old the last change is, the log keeps it.
    with trained.transaction(force_rollback=True):
        trained.execute("update vae.refreshes set started_at = started_at - interval '91 days'")
        trained.execute("select vae_private.prune_logs(1)")
        assert checks(trained)["new events"] == (status, detail, remedy)
        assert trained.execute("select count(*) from vae.refreshes where view = 'recommendations'").fetchone() == (2,)
    trained.execute("insert into events select user_id, item_id, event_type, now() from events limit 1")
    trained.execute("call vae.refresh('shop', views => array['recommendations'])")
    assert checks(trained)["new events"][0] == "ok"


def test_each_thing_that_goes_wrong_shows_with_its_remedy(trained: Connection) -> None:
    drift(trained)
    assert problems(trained) == {}
    # Another version waits, is activated by force past a gate that was written by hand, and is not refreshed.
    publish_network(trained.info.dsn, "shop", QUICK, 7)
    status, detail, remedy = checks(trained)["gates"]
    assert (status, detail) == ("warning", "version 2 is newer than the active one and was not activated")
    assert remedy == "select * from vae.check_activation('shop', 2)"
    trained.execute(
        "insert into vae.metrics (version_id, method, split, slice, metric, k, value, user_count)"
        " select version_id, m.method, 'temporal', 'all', 'ndcg', 20, m.value, 100 from vae.versions"
        " cross join (values ('pgvae', 0.1), ('popularity', 0.2)) m (method, value) where version = 2"
    )
    trained.execute("select * from vae.activate('shop', 2, force => true)")
    assert problems(trained) == {"gates": "warning", "version of predictions": "warning"}
    assert "forced past a gate: version 2 of model shop ranks worse than popularity" in checks(trained)["gates"][1]
    assert checks(trained)["version of predictions"][2] == "call vae.refresh('shop')"
    trained.execute("select * from vae.rollback('shop')")
    assert problems(trained) == {}
    # Age.
    trained.execute("set vae.stale_after = '0.1 ms'")
    assert problems(trained) == {"age": "critical"}
    trained.execute("set vae.stale_after = '100 days'")
    trained.execute("update vae.refreshes set events_until = events_until - interval '101 days'")
    assert problems(trained) == {"age": "warning"}
    trained.execute("reset vae.stale_after")
    assert problems(trained) == {"age": "critical"}
    trained.execute("update vae.refreshes set events_until = events_until + interval '101 days'")
    # A refresh whose session is gone, then one that failed.
    trained.execute(
        "insert into vae.refreshes (model_id, view, phase, backend_pid) values (1, 'recommendations', 'scoring', 1)"
    )
    assert problems(trained) == {"interrupted refresh": "warning"}
    trained.execute("update vae.refreshes set state = 'failed', error = 'no room' where state = 'running'")
    assert problems(trained) == {"last refresh": "critical"}
    assert checks(trained)["last refresh"][1].endswith("still there: recommendations: no room")
    trained.execute("call vae.refresh('shop', views => array['recommendations'])")
    assert problems(trained) == {}
    # Parity, after an upgrade and with damaged answers.
    trained.execute("update vae.verifications set runtime_digest = 'older'")
    assert problems(trained) == {"parity": "warning"}
    trained.execute("select * from vae.verify('shop')")
    assert problems(trained) == {}
    trained.execute("update vae.verifications set passed = false, detail = 'scores differ'")
    assert problems(trained) == {"parity": "critical"}
    assert "scores differ" in checks(trained)["parity"][1]
    trained.execute("select * from vae.verify('shop')")
    # What somebody dropped by hand, and what went with a table.
    trained.execute("drop materialized view shop.demand_materialized cascade")
    assert checks(trained)["views"][:2] == ("critical", "missing: demand, demand_materialized")
    trained.execute(str(checks(trained)["views"][2]))
    trained.execute("call vae.refresh('shop', views => array['demand'])")
    assert problems(trained) == {}
    trained.execute("drop function shop.recommend(bigint, integer, jsonb)")
    assert checks(trained)["views"][:2] == ("critical", "missing: recommend(bigint, integer, jsonb)")
    trained.execute(str(checks(trained)["views"][2]))
    assert problems(trained) == {}
    trained.execute("alter table events rename to old")
    assert problems(trained) == {"views": "critical"}
    assert "they read another table than public.events" in health(trained)["detail"]
    trained.execute("create table events (like old)")
    assert problems(trained) == {"views": "critical"}
    trained.execute("select vae.rebuild_model('shop')")
    assert problems(trained) == {}
    trained.execute("alter table events rename column event_type to kind")
    assert problems(trained) == {"views": "critical"}
    assert checks(trained)["views"][1] == "live calls read columns that are gone or renamed: public.events.event_type"
    trained.execute("alter table events rename column kind to event_type")
    assert problems(trained) == {}
    trained.execute("drop table events cascade")
    assert problems(trained) == {"views": "critical"}
    assert health(trained)["remedy"] == "select vae.rebuild_model('shop')"
    # Without vae.activate no gate is asked.
    trained.execute("update vae.versions set state = 'retired' where version = 1")
    trained.execute("update vae.versions set state = 'active', activated_at = now() where version = 2")
    assert checks(trained)["gates"][:2] == ("warning", "postgres forced past a gate: no gate was asked")


@pytest.mark.parametrize("setting", ["a day", "-1 day", "0", "100000000 years"])
def test_a_time_to_grow_stale_that_is_none_is_refused_with_a_remedy(shared_trained: Connection, setting: str) -> None:
    shared_trained.execute("select set_config('vae.stale_after', %s, false)", [setting])
    for view in ("vae.health", "vae.health_checks"):
        refused = refusal(shared_trained, f"select * from {view}")
        assert (refused.sqlstate, refused.message_primary) == ("22023", f"vae.stale_after is '{setting}'")
        assert "set vae.stale_after = '26 hours'" in str(refused.message_hint)
    shared_trained.execute("reset vae.stale_after")


def test_a_model_that_an_upgrade_could_not_remake_is_not_well_until_it_is(trained: Connection) -> None:
    drift(trained)
    for gone, back, why, meanwhile in (
        (
            "alter table events rename to old",
            "alter table old rename to events",
            "table public.events of model shop does not exist",
            "they read another table than public.events, which was renamed or replaced",
        ),
        (
            "alter table events rename occurred_at to moment",
            "alter table events rename moment to occurred_at",
            'public.events has no column "occurred_at" any more, which model shop reads',
            "live calls read columns that are gone or renamed: public.events.occurred_at",
        ),
        (
            "alter schema shop rename to aside",
            "alter schema aside rename to shop",
            "its schema was gone",
            "the schema of the model is gone",
        ),
    ):
        # A release that the model cannot follow brings functions, too.
        trained.execute("drop function shop.audience_of_items(bigint[], integer, jsonb)")
        trained.execute(gone.encode())
        install(trained.info.dsn)
        assert checks(trained)["views"][1] == meanwhile
        trained.execute(back.encode())
        assert problems(trained) == {"views": "critical"}
        detail, remedy = checks(trained)["views"][1:]
        assert remedy
        assert detail == f"they are those of an earlier release, the upgrade could not remake them: {why}"
        assert health(trained)["remedy"] == remedy == "select vae.rebuild_model('shop')"
        trained.execute(remedy)
        assert problems(trained) == {}
    # Or until the next upgrade can.
    trained.execute("update vae.models set rebuild_error = 'something'")
    install(trained.info.dsn)
    assert problems(trained) == {}


def test_health_is_cheap_however_long_the_log(trained: Connection) -> None:
    # Of one view, as where only recommendations are refreshed: the others must not be looked for in all of it.
    trained.execute(
        "delete from vae.refreshes where view <> 'recommendations';"
        " insert into vae.refreshes (model_id, view, state, mode, scored_count, version, started_at, seconds)"
        " select 1, 'recommendations', 'succeeded', 'incremental', n % 3, 1, now() - n * interval '1 hour', 1"
        " from generate_series(30000, 1, -1) n;"
        " analyze vae.refreshes"
    )
    plan = trained.execute("explain (analyze, buffers, format json) select * from vae.health").fetchone()
    assert plan
    # What is estimated to cost more than this is compiled first, which takes a second.
    assert plan[0][0]["Plan"]["Total Cost"] < 100_000
    assert plan[0][0]["Plan"]["Shared Hit Blocks"] + plan[0][0]["Plan"]["Shared Read Blocks"] < 1_000


def test_a_monitor_needs_no_right_but_to_read(trained: Connection, server: Server, role: str) -> None:
    trained.execute(f"grant vae_reader to {role}")
    with psycopg.connect(as_role(trained.info.dsn, role), autocommit=True) as monitor:
        row = health(monitor)
        assert (row["model"], row["status"]) == ("shop", "ok")
        assert len(checks(monitor)) == 13
        assert refusal(monitor, "select * from vae.check_drift('shop')").sqlstate == "42501"
        assert refusal(monitor, "select * from shop.clean_events").sqlstate == "42501"
    trained.execute(f"revoke vae_reader from {role}")


def test_a_standby_answers_and_logs_nothing(trained: Connection) -> None:
    trained.execute("set default_transaction_read_only = on")
    assert len(drift(trained)) == 3
    assert len(hits(trained)) == 1
    assert trained.execute("select count(*) from vae.observations").fetchone() == (0,)


# The logs


def logged(connection: Connection) -> dict[str, list[int]]:
    """Gives the numbers of the rows of each log."""
    numbers = {"refreshes": "refresh_id", "observations": "observation_id", "verifications": "verification_id"}
    query = "select coalesce(array_agg({} order by 1), '{{}}') from vae.{}"
    return {
        name: connection.execute(query.format(number, name).encode()).fetchall()[0][0]
        for name, number in numbers.items()
    }


def what_is_read(connection: Connection) -> list[Any]:
    """Gives what freshness, health and drift say of the model, but for what the clock alone changes."""
    freshness = "select to_jsonb(f) - 'age' from vae.freshness f order by f.prediction"
    compared = (
        "select * from vae_private.stored_bins((select m from vae.models m), (select v from vae.versions v), 'churn')"
    )
    return [
        connection.execute(freshness.encode()).fetchall(),
        checks(connection),
        [row[:-1] for row in connection.execute(compared.encode()).fetchall()],
    ]


def test_old_entries_of_logs_go_and_what_is_read_stays(trained: Connection) -> None:
    trained.execute("set vae.stale_after = '1000 days'")
    for _ in range(3):
        drift(trained)
        trained.execute("select * from vae.verify('shop')")
    # What there is at first, and what came later, of which the last entries count.
    trained.execute(
        "insert into vae.refreshes (model_id, view, state, mode, version, started_at, finished_at, error)"
        " select 1, view, state, 'full', 1, now(), now(), error from (values"
        " ('recommendations', 'succeeded', null), ('recommendations', 'failed', 'x'),"
        " ('recommendations', 'succeeded', null), ('churn', 'failed', 'x'), ('churn', 'failed', 'no room')"
        ") r (view, state, error)"
    )
    trained.execute(
        "update vae.refreshes set started_at = started_at - interval '91 days';"
        " update vae.observations set observed_at = observed_at - interval '91 days';"
        " update vae.verifications set verified_at = verified_at - interval '91 days'"
    )
    before, read = logged(trained), what_is_read(trained)
    trained.execute("set vae.log_retention = '92 days'")
    trained.execute("select vae_private.prune_logs(1)")
    assert logged(trained) == before
    trained.execute("reset vae.log_retention")
    trained.execute("select vae_private.prune_logs(1)")
    assert what_is_read(trained) == read
    after = logged(trained)
    subjects = len(drift(trained))
    assert len(before["refreshes"]) - len(after["refreshes"]) == 4
    assert len(before["observations"]) - len(after["observations"]) == subjects
    assert after["verifications"] == before["verifications"][-1:]
    rows = trained.execute(
        "select state, error from vae.refreshes where view in ('recommendations', 'churn') order by view, refresh_id"
    ).fetchall()
    assert rows == [("succeeded", None), ("failed", "no room"), ("succeeded", None)]
    # A refresh does it; what runs, or what its session left running, is not touched.
    trained.execute("set vae.log_retention = '0'")
    trained.execute("call vae.refresh('shop', array['recommendations'])")
    trained.execute("call vae.refresh('shop', array['recommendations'])")
    assert len(logged(trained)["refreshes"]) == len(after["refreshes"]) + 2


@pytest.mark.parametrize("retention", ["for ever", "-1 day", "1000000 years"])
def test_a_retention_that_is_none_is_refused_before_anything_happens(
    shared_trained: Connection, retention: str
) -> None:
    before = logged(shared_trained)
    shared_trained.execute("select set_config('vae.log_retention', %s, false)", [retention])
    refused = refusal(shared_trained, "call vae.refresh('shop', array['recommendations'])")
    assert (refused.sqlstate, refused.message_primary) == ("22023", f"vae.log_retention is '{retention}'")
    assert refused.message_hint
    shared_trained.execute("reset vae.log_retention")
    assert logged(shared_trained) == before


def test_an_operator_prunes_the_logs_of_its_models_alone(trained: Connection, role: str) -> None:
    drift(trained)
    trained.execute(f"grant vae_operator to {role}")
    before = logged(trained)
    with psycopg.connect(as_role(trained.info.dsn, role), autocommit=True) as operator:
        for name in before:
            assert operator.execute(f"delete from vae.{name}".encode()).rowcount == 0
        assert logged(trained) == before
        trained.execute(f"grant usage on schema shop to {role}")
        operator.execute("set vae.log_retention = '0'")
        operator.execute("call vae.refresh('shop', array['recommendations'])")
        operator.execute("call vae.refresh('shop', array['recommendations'])")
    # The one that scored all users stays beside the two that found nothing new.
    assert len(logged(trained)["refreshes"]) == len(before["refreshes"]) + 2
    trained.execute(f"revoke vae_operator from {role}; revoke all on schema shop from {role}")


# Exporters


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The blocks of YAML of the page, parsed, by what their first line calls them."""
    yaml = pytest.importorskip("yaml")
    text = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    return {
        body.partition("\n")[0].removeprefix("# "): yaml.safe_load(body)
        for body in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    }


@pytest.fixture
def monitor(trained: Connection, server: Server) -> Iterator[str]:
    """The DSN of an account with no right but to read, on a database where drift and hit rate were measured."""
    drift(trained)
    hits(trained)
    trained.execute("create role exporter login in role vae_reader")
    yield as_role(trained.info.dsn, "exporter")
    trained.execute("drop role exporter")


def test_the_queries_of_the_page_give_what_they_declare(page: dict[str, Any], monitor: str) -> None:
    exported = set()
    with psycopg.connect(monitor, row_factory=dict_row) as connection:
        for name, entry in page["pgvae.yaml, for postgres_exporter"].items():
            declared = [column for metric in entry["metrics"] for column in metric]
            labels = [
                column for metric in entry["metrics"] for column, how in metric.items() if how["usage"] == "LABEL"
            ]
            rows = connection.execute(entry["query"]).fetchall()
            assert rows
            for row in rows:
                assert list(row) == declared
                assert all(value is None or isinstance(value, str) == (key in labels) for key, value in row.items())
            assert len({tuple(row[key] for key in labels) for row in rows}) == len(rows)
            exported |= {f"{name}_{column}" for column in declared if column not in labels}
        collector = page["pgvae.collector.yml, for sql_exporter"]
        for metric in collector["metrics"]:
            rows = connection.execute(metric["query"]).fetchall()
            assert rows
            assert set(rows[0]) == {*metric["key_labels"], *metric["values"]}
            assert metric["metric_name"] in exported
    for group in page["rules of Prometheus"]["groups"]:
        for rule in group["rules"]:
            assert set(re.findall(r"pgvae_\w+", rule["expr"])) <= exported


def test_the_real_exporter_exports_them(page: dict[str, Any], monitor: str, tmp_path: Path) -> None:
    program = shutil.which("prometheus-postgres-exporter") or shutil.which("postgres_exporter")
    if program is None:
        pytest.skip("postgres_exporter is not installed: apt-get install prometheus-postgres-exporter")
    yaml = pytest.importorskip("yaml")
    queries = tmp_path / "pgvae.yaml"
    queries.write_text(yaml.safe_dump(page["pgvae.yaml, for postgres_exporter"]))
    with psycopg.connect(monitor) as connection:
        target = connection.info
        place = f"host={target.host} port={target.port} user={target.user} dbname={target.dbname}"
    exporter = subprocess.Popen(
        [
            program,
            f"--extend.query-path={queries}",
            "--disable-default-metrics",
            "--disable-settings-metrics",
            "--web.listen-address=127.0.0.1:0",
        ],
        # Its driver knows not all that libpq does.
        env={"DATA_SOURCE_NAME": f"{place} sslmode=disable"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert exporter.stderr
        address = next(
            found[1] for line in exporter.stderr if (found := re.search(r"address=(127\.0\.0\.1:\d+)", line))
        )
        deadline = time.monotonic() + 20
        text = ""
        while "pgvae_health_severity" not in text and time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
                text = answer.read().decode()
    finally:
        exporter.terminate()
        log = exporter.communicate()[1]
    assert re.search(r'^pgvae_health_severity\{.*model="shop".*\} 0$', text, re.MULTILINE), log
    assert re.search(r'^pgvae_check_severity\{check="last refresh",model="shop".*\} 0$', text, re.MULTILINE)
    assert re.search(
        r'^pgvae_observation_value\{measure="drift",model="shop",.*subject="items"\} 0$', text, re.MULTILINE
    )
    assert re.search(r'^pgvae_refresh_rows\{model="shop",.*view="recommendations"\} 30$', text, re.MULTILINE)
