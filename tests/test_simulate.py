"""The simulated shop: the same seed gives the same rows, they agree with the truth, and bad input leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgvae.errors import PgvaeError
from pgvae.server import Server
from pgvae.simulate import (
    KeyType,
    SimulationConfig,
    SimulationSummary,
    simulate,
    true_item_probability,
    true_purchase_probability,
)

UNTIL = date(2026, 1, 1)
RunCli = Callable[..., subprocess.CompletedProcess[str]]


def small(**changes: Any) -> SimulationConfig:
    return replace(SimulationConfig(users=300, items=60, days=90, seed=7, until=UNTIL), **changes)


def query(dsn: str, statement: str, schema: str = "sim", *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        connection.execute(sql.SQL("set search_path = {}").format(sql.Identifier(schema)))
        connection.execute("set timezone = 'UTC'")
        return connection.execute(statement.encode(), parameters).fetchall()


def digest(dsn: str, schema: str) -> dict[str, str]:
    """Gives a digest of each table's rows, with the configuration left out."""
    order = {"promotions": "t.category, t.starts_at", "users": "t.user_id", "items": "t.item_id"}
    order |= {"true_users": "t.user_id", "true_items": "t.item_id", "true_dirt": "t.event_id", "events": "t.event_id"}
    return {
        table: query(dsn, f"select md5(string_agg(t::text, '|' order by {keys})) from {table} t", schema)[0][0]
        for table, keys in order.items()
    }


@pytest.fixture(scope="module")
def shop(server: Server) -> Iterator[tuple[str, SimulationSummary]]:
    """The DSN of a database with a clean shop of 12 000 users in the schema sim, and its summary."""
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute("create database simulated_shop")
    dsn = server.dsn("simulated_shop")
    yield dsn, simulate(dsn, SimulationConfig(users=12_000, items=1_000, seed=1, until=UNTIL))
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute("drop database simulated_shop with (force)")


def test_the_same_seed_gives_the_same_rows_whatever_the_chunks(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgvae.simulate.config.BLOCK_EVENTS", 8192)  # so that the 300 users are several blocks
    assert small().blocks == 3
    simulate(empty_database, small(dirt=0.05))
    simulate(empty_database, small(dirt=0.05, schema="chunks", chunk_rows=997))
    simulate(empty_database, small(dirt=0.05, schema="other", seed=8))
    first, chunked, other = (digest(empty_database, schema) for schema in ("sim", "chunks", "other"))
    assert first == chunked
    assert not set(first.values()) & set(other.values())


def test_the_rows_are_counted_and_every_kind_of_event_is_there(shop: tuple[str, SimulationSummary]) -> None:
    dsn, summary = shop
    counts = dict(query(dsn, "select event_type, count(*) from events group by event_type"))
    assert counts == summary.events_by_type
    assert set(counts) == {"register", "view", "search", "add_to_cart", "purchase", "review", "share"}
    assert sum(counts.values()) == summary.events
    assert query(dsn, "select count(*), max(event_id) from events") == [(summary.events, summary.events)]
    assert query(dsn, "select count(*) from users") == [(summary.users,)] == [(12_000,)]
    assert query(dsn, "select count(*) from items") == [(summary.items,)] == [(1_000,)]
    assert summary.events / summary.users == pytest.approx(40, rel=0.05)
    assert 0.03 < counts["purchase"] / summary.events < 0.15
    assert counts["register"] == 12_000


def test_each_kind_of_event_fills_its_own_columns(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    wrong = query(
        dsn,
        "select event_type, count(*) from events where"
        " (item_id is null) <> (event_type in ('register', 'search'))"
        " or (quantity is null) <> (event_type <> 'purchase') or (price is null) <> (event_type <> 'purchase')"
        " or (rating is null) <> (event_type <> 'review') or (query is null) <> (event_type <> 'search')"
        " or (session_id is null) <> (event_type = 'review')"
        " or user_id is null or quantity < 1 or price <= 0 or rating not between 1 and 5 or query = ''"
        " or occurred_at < '2025-01-01' or occurred_at >= '2026-01-01' group by event_type",
    )
    assert wrong == []


def test_keys_refer_to_rows_and_time_runs_forward(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    assert query(dsn, "select 1 from events e left join users u using (user_id) where u.user_id is null limit 1") == []
    assert (
        query(
            dsn,
            "select 1 from events e left join items i using (item_id)"
            " where e.item_id is not null and i.item_id is null limit 1",
        )
        == []
    )
    early = "select 1 from events join items using (item_id) where occurred_at < listed_at limit 1"
    assert query(dsn, early) == []
    assert query(dsn, "select 1 from events join users using (user_id) where occurred_at < registered_at limit 1") == []
    assert (
        query(dsn, "select 1 from events join true_users using (user_id) where occurred_at >= churned_at limit 1") == []
    )
    assert (
        query(dsn, "select session_id from events group by 1 having min(user_id) < max(user_id) and session_id > 0")
        == []
    )


def test_the_price_paid_is_the_list_price_less_the_promotion(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    wrong = query(
        dsn,
        "select e.price, i.price, p.discount from events e join items i using (item_id)"
        " left join promotions p on p.category = i.category and e.occurred_at >= starts_at and e.occurred_at < ends_at"
        " where event_type = 'purchase' and abs(e.price - i.price * (1 - coalesce(p.discount, 0))::numeric) > 0.0051"
        " limit 1",
    )
    assert wrong == []
    lifted = query(
        dsn,
        "select count(*) filter (where event_type = 'purchase')::float / count(*) filter (where event_type = 'view')"
        " from events e join items i using (item_id) left join promotions p"
        " on p.category = i.category and e.occurred_at >= starts_at and e.occurred_at < ends_at"
        " group by p.category is null order by p.category is null",
    )
    assert lifted[0][0] > 1.1 * lifted[1][0]  # with a promotion, then without


def test_activity_is_heavy_tailed_and_users_return(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    counts = np.array([row[0] for row in query(dsn, "select count(*) from events group by user_id")])
    assert np.median(counts) < 0.65 * counts.mean()
    assert np.sort(counts)[-len(counts) // 100 :].sum() > 0.06 * counts.sum()
    days = query(dsn, "select count(distinct occurred_at::date) from events where event_type = 'view' group by user_id")
    assert np.mean(np.array(days) >= 3) > 0.35


@pytest.mark.parametrize(("days_before", "horizon"), [(30, 30), (90, 90), (150, 7)])
def test_purchases_happen_as_often_as_the_truth_says(
    shop: tuple[str, SimulationSummary], days_before: int, horizon: int
) -> None:
    dsn, _ = shop
    at = UNTIL - timedelta(days=days_before)
    truth = true_purchase_probability(dsn, at=at, horizon_days=horizon)
    buyers = query(
        dsn,
        "select distinct user_id from events where event_type = 'purchase' and occurred_at >= %s and occurred_at < %s",
        "sim",
        at,
        at + timedelta(days=horizon),
    )
    bought = np.isin(np.array(truth.user_id), np.array(buyers))
    assert len(truth.user_id) > 6_000
    assert not np.any(truth.probability[~truth.alive])
    assert _surprise(bought, truth.probability) < 4
    bands = np.digitize(truth.probability, [0.01, 0.05, 0.2, 0.5, 0.8])
    assert [band for band in range(6) if _surprise(bought[bands == band], truth.probability[bands == band]) > 4] == []
    # The truth tells users apart: a buyer is ranked above a user who does not buy nearly always.
    rank = np.argsort(np.argsort(truth.probability))
    area = (rank[bought].mean() - (bought.sum() - 1) / 2) / (~bought).sum()
    assert area > 0.85


def _surprise(happened: np.ndarray[Any, Any], probability: np.ndarray[Any, Any]) -> float:
    """Gives by how many standard deviations the count of what happened differs from its expectation."""
    deviation = float(np.sqrt(np.sum(probability * (1 - probability))))
    return abs(float(happened.sum() - probability.sum())) / max(deviation, 1.0)


def test_items_are_bought_as_often_as_the_truth_says(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    at, later = date(2025, 12, 2), date(2025, 12, 16)
    truth = true_item_probability(dsn, [*range(1, 3001), -1], at=at, horizon_days=14)
    assert truth.item_id == list(range(1, 1001))
    assert truth.probability.shape == (len(truth.user_id), 1000)
    statement = "select user_id, item_id from events where event_type = 'purchase' and occurred_at between %s and %s"
    row = {user: position for position, user in enumerate(truth.user_id)}
    bought = np.zeros(truth.probability.shape, dtype=bool)
    for user, item in query(dsn, statement, "sim", at, later):
        if user in row:
            bought[row[user], item - 1] = True
    assert bought.sum() > 500
    bands = np.digitize(truth.probability, [1e-4, 1e-3, 0.01, 0.05, 0.2])
    assert [band for band in range(6) if _surprise(bought[bands == band], truth.probability[bands == band]) > 4] == []
    nobody = true_item_probability(dsn, [-1], at=at)
    assert nobody.user_id == []


def test_the_stored_truth_is_the_computed_one(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    truth = true_purchase_probability(dsn, horizon_days=30)
    stored = dict(query(dsn, "select user_id, no_purchase_probability from true_churn where horizon_days = 30"))
    expected = np.array([1 - stored[user] for user in truth.user_id])
    assert len(stored) == len(truth.user_id) == 12_000
    np.testing.assert_allclose(truth.probability, expected, atol=1e-6)
    alive = query(dsn, "select count(*) from true_churn where is_alive and horizon_days = 7")
    assert alive == [(int(truth.alive.sum()),)]
    rising = query(
        dsn, "select 1 from true_users where no_purchase_7 < no_purchase_30 or no_purchase_30 < no_purchase_90"
    )
    assert rising == []


def test_the_mean_purchase_rate_is_realised(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    expected, bought = query(
        dsn,
        "select sum(purchase_rate * extract(epoch from least(coalesce(churned_at, '2026-01-01'), '2026-01-01')"
        " - registered_at) / 86400), (select count(distinct session_id) from events where event_type = 'purchase')"
        " from true_users join users using (user_id)",
    )[0]
    # Sessions at registering, complements and replenishing come on top of the rate.
    assert 0.9 * float(expected) < bought < 2 * float(expected)


def test_taste_explains_ratings_and_complements_go_together(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    ratings = query(
        dsn,
        "select rating, (select sum(a * b) from unnest(u.taste, i.taste) as t (a, b)) from events"
        " join true_users u using (user_id) join true_items i using (item_id) where event_type = 'review'",
    )
    assert np.corrcoef(np.array(ratings, dtype=float).T)[0, 1] > 0.3
    together = query(
        dsn,
        "with baskets as (select distinct session_id, item_id from events where event_type = 'purchase')"
        " select avg((exists (select from baskets c where c.session_id = b.session_id"
        " and c.item_id = t.complement_item_id))::int)"
        " from baskets b join true_items t using (item_id) where t.complement_item_id is not null",
    )
    assert 0.15 < together[0][0] < 0.4


def test_a_personal_recommendation_beats_popularity(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    rows = query(
        dsn,
        "select user_id, item_id, bool_or(occurred_at < '2025-12-02'), bool_or(occurred_at >= '2025-12-02')"
        " from events where item_id is not null and user_id <= 5000 group by user_id, item_id",
    )
    seen, later = np.zeros((5001, 1001), dtype=np.float32), np.zeros((5001, 1001), dtype=bool)
    for user, item, before, after in rows:
        seen[user, item], later[user, item] = before, after and not before
    users = np.flatnonzero((seen.sum(axis=1) >= 3) & later.any(axis=1))
    cosine = seen.T @ seen
    norm = np.sqrt(np.diag(cosine)) + 1e-6
    cosine = cosine / norm / norm[:, None]
    np.fill_diagonal(cosine, 0)

    def recall(scores: np.ndarray[Any, Any]) -> float:
        top = np.argsort(-np.where(seen[users] > 0, -1, scores), axis=1)[:, :20]
        found = np.take_along_axis(later[users], top, axis=1).sum(axis=1)
        return float(np.mean(found / np.minimum(later[users].sum(axis=1), 20)))

    popular = recall(np.broadcast_to(seen.sum(axis=0), (len(users), 1001)))
    assert recall(seen[users] @ cosine) > 1.4 * popular


def test_every_table_and_column_is_commented(shop: tuple[str, SimulationSummary]) -> None:
    dsn, _ = shop
    silent = query(
        dsn,
        "select c.relname, a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid"
        " where c.relnamespace = 'sim'::regnamespace and c.relkind in ('r', 'v') and a.attnum >= 0 and"
        " (col_description(c.oid, a.attnum) is null or obj_description(c.oid, 'pg_class') is null)",
    )
    assert silent == []


@pytest.mark.parametrize("key_type", ["bigint", "integer", "uuid", "text"])
def test_the_keys_have_the_chosen_type(empty_database: str, key_type: KeyType) -> None:
    summary = simulate(empty_database, small(key_type=key_type, schema='Odd "name"', dirt=0.1))
    types = query(
        empty_database,
        "select distinct data_type from information_schema.columns where table_schema = 'Odd \"name\"'"
        " and column_name in ('user_id', 'item_id', 'complement_item_id')",
    )
    assert types == [(key_type,)]
    joined = query(
        empty_database,
        "select count(*) from events join true_users using (user_id) join true_items using (item_id)"
        " where event_id not in (select event_id from true_dirt)",
        'Odd "name"',
    )
    clean = summary.events - sum(summary.dirt.values())
    assert (
        joined[0][0]
        == clean
        - query(
            empty_database,
            "select count(*) from events where event_type in ('register', 'search')"
            " and event_id not in (select event_id from true_dirt)",
            'Odd "name"',
        )[0][0]
    )
    truth = true_purchase_probability(empty_database, schema='Odd "name"')
    assert len(set(truth.user_id)) == 300


def test_dirt_is_added_counted_and_named(empty_database: str) -> None:
    simulate(empty_database, small(schema="clean"))
    summary = simulate(empty_database, small(dirt=0.2, users=300))
    kinds = dict(query(empty_database, "select kind, count(*) from true_dirt group by kind"))
    assert kinds == summary.dirt
    assert dict(query(empty_database, "select key, value from true_parameters"))["dirt_counts"] == kinds
    assert min(kinds.values()) > 0
    clean = summary.events - sum(kinds.values())
    assert sum(kinds.values()) == pytest.approx(0.2 * clean, abs=len(kinds))
    without_ids = (
        "select md5(string_agg(e::text, '|' order by e)) from (select user_id, item_id, event_type, occurred_at,"
        " quantity, price, rating, query, session_id from events"
        " where event_id not in (select event_id from true_dirt)) e"
    )
    assert query(empty_database, without_ids) == query(empty_database, without_ids, "clean")
    for at in (date(2025, 12, 1), UNTIL):  # the truth reads the events, and is not misled by the wrong ones
        dirty, pure = (true_purchase_probability(empty_database, schema=name, at=at) for name in ("sim", "clean"))
        assert dirty.user_id == pure.user_id
        np.testing.assert_array_equal(dirty.probability, pure.probability)

    def found(condition: str) -> int:
        statement = "select count(*) from events e where event_id in (select event_id from true_dirt) and " + condition
        return int(query(empty_database, statement)[0][0])

    assert found("user_id is null") == kinds["null_user"]
    assert found("item_id is null and event_type not in ('register', 'search')") >= kinds["null_item"]
    assert found("occurred_at = '1970-01-01'") == kinds["epoch_timestamp"]
    assert found("occurred_at > '2026-01-01'") == kinds["future_timestamp"]
    assert found("quantity < 0") == kinds["return"]
    assert found("user_id not in (select user_id from users)") == kinds["orphan_user"]
    assert found("item_id not in (select item_id from items)") == kinds["orphan_item"]
    assert found("user_id > 300 and user_id in (select user_id from users)") == kinds["bot"]
    known = "('register', 'view', 'search', 'add_to_cart', 'purchase', 'review', 'share')"
    assert found(f"event_type not in {known}") == kinds["unknown_type"]
    twins = (
        "exists (select from events c where (c.user_id, c.event_type, c.occurred_at) = (e.user_id, e.event_type,"
        " e.occurred_at) and c.item_id is not distinct from e.item_id and c.event_id <> e.event_id)"
    )
    assert found(twins) >= kinds["duplicate"]


def test_the_smallest_shop_is_simulated(empty_database: str) -> None:
    summary = simulate(empty_database, small(users=10, items=20, days=28, events_per_user=12, dirt=0.5))
    assert summary.users == 11
    assert query(empty_database, "select count(*) from true_users") == [(10,)]


def test_until_is_today_by_default(empty_database: str) -> None:
    assert SimulationConfig().until == datetime.now(UTC).date()


def test_an_earlier_simulation_is_replaced_only_if_told_to(empty_database: str) -> None:
    simulate(empty_database, small())
    before = digest(empty_database, "sim")
    with pytest.raises(PgvaeError, match="schema 'sim' holds a simulated shop already") as refused:
        simulate(empty_database, small(seed=8))
    assert "--replace" in str(refused.value.hint)
    assert digest(empty_database, "sim") == before
    simulate(empty_database, small(seed=8, replace=True))
    assert digest(empty_database, "sim") != before


def test_a_foreign_table_is_never_replaced(empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection:
        connection.execute("create table public.users (user_id bigint)")
    with pytest.raises(PgvaeError, match=r"public\.users exists and was not made by pgvae simulate"):
        simulate(empty_database, small(schema="public", replace=True))
    assert query(empty_database, "select count(*) from users", "public") == [(0,)]


def test_what_depends_on_an_earlier_simulation_stays(empty_database: str) -> None:
    simulate(empty_database, small())
    with psycopg.connect(empty_database) as connection:
        connection.execute("create view public.buyers as select user_id from sim.events where event_type = 'purchase'")
    with pytest.raises(PgvaeError, match=r"other objects depend on sim\.events.*buyers"):
        simulate(empty_database, small(replace=True))
    assert query(empty_database, "select count(*) > 0 from buyers", "public") == [(True,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 9}, "users 9 is out of range"),
        ({"users": 10_000_001}, "users 10000001 is out of range"),
        ({"items": 19}, "items 19 is out of range"),
        ({"days": 1}, "days 1 is out of range"),
        ({"events_per_user": float("nan")}, "events per user nan is out of range"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"dirt": 0.51}, "dirt 0.51 is out of range"),
        ({"dirt": -0.1}, "dirt -0.1 is out of range"),
        ({"until": date(1815, 6, 18)}, "until 1815-06-18 is out of range"),
        ({"until": "2026-01-01"}, "until '2026-01-01' is not a date"),
        ({"key_type": "varchar"}, "unknown key type 'varchar'"),
        ({"schema": ""}, "schema '' is no name"),
        ({"schema": "s" * 64}, "is no name"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PgvaeError, match=message) as refused:
        small(**changes)
    assert refused.value.hint


def test_the_truth_is_asked_within_the_window(empty_database: str) -> None:
    with pytest.raises(PgvaeError, match="schema 'sim' holds no simulated shop"):
        true_purchase_probability(empty_database)
    simulate(empty_database, small())
    with pytest.raises(PgvaeError, match="2026-01-02 lies outside of the simulated window"):
        true_purchase_probability(empty_database, at=date(2026, 1, 2))
    with pytest.raises(PgvaeError, match="a horizon of 0 days is out of range"):
        true_purchase_probability(empty_database, horizon_days=0)
    longest = true_purchase_probability(empty_database, at=date(2025, 12, 1), horizon_days=365)
    assert np.all((longest.probability >= 0) & (longest.probability <= 1))


def test_the_command_prints_a_summary_and_the_next_step(empty_database: str, run_cli: RunCli) -> None:
    arguments = ("simulate", "--users", "200", "--items", "40", "--until", "2026-01-01", "--dirt", "0.1")
    done = run_cli(*arguments, dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "add_to_cart" in done.stdout
    assert "null_user" in done.stdout
    command = "vae.create_model('shop', events => 'sim.events', users => 'sim.users', items => 'sim.items');"
    assert f"select * from {command}" in done.stdout
    again = run_cli(*arguments, dsn=empty_database)
    assert again.returncode == 1
    assert again.stderr == (
        "error: schema 'sim' holds a simulated shop already\n"
        "hint: make it again with --replace, or choose another schema with --schema\n"
    )
    wrong = run_cli("simulate", "--until", "31/12/2025", dsn=empty_database)
    assert (wrong.returncode, wrong.stderr.splitlines()[0]) == (1, "error: until '31/12/2025' is not a date")
    reserved = run_cli(*arguments, "--schema", "pg_shop", dsn=empty_database)
    assert reserved.returncode == 1
    assert reserved.stderr.startswith("error: cannot create schema 'pg_shop'")


def test_who_may_not_create_is_told_so(empty_database: str, role: str) -> None:
    dsn = make_conninfo(empty_database, user=role)
    with pytest.raises(PgvaeError, match="cannot write to schema 'sim'"):
        simulate(dsn, small())


def test_a_kill_leaves_nothing(empty_database: str) -> None:
    command = [sys.executable, "-m", "pgvae.cli", "simulate", "--users", "1000000", "--dsn", empty_database]
    with psycopg.connect(empty_database, autocommit=True) as watcher:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_until(watcher, "select coalesce(sum(tuples_processed), 0) > 20000 from pg_stat_progress_copy")
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        others = "select count(*) = 0 from pg_stat_activity where datname = current_database() and pid <> %s"
        _wait_until(watcher, others, watcher.info.backend_pid)
        assert watcher.execute("select count(*) from pg_namespace where nspname = 'sim'").fetchone() == (0,)


def _wait_until(connection: psycopg.Connection, question: str, *parameters: Any) -> None:
    deadline = time.monotonic() + 60
    while connection.execute(question.encode(), parameters).fetchone() != (True,):
        assert time.monotonic() < deadline, f"waited in vain for: {question}"
        time.sleep(0.02)


def test_an_experiment_adds_its_assignments_and_what_they_cause(empty_database: str) -> None:
    simulate(empty_database, small(users=900, days=200, key_type="text", schema="plain"))
    found = simulate(empty_database, small(users=900, days=200, key_type="text", experiment=0.8)).experiment
    assert found is not None
    before = "select md5(string_agg(e::text, '|' order by event_id)) from events e"
    columns = "event_id, user_id, item_id, event_type, occurred_at, quantity, price, rating, query, session_id"
    last = query(empty_database, "select max(event_id) from events", "plain")[0][0]
    assert query(empty_database, before, "plain") == query(
        empty_database, before.replace("events e", f"(select {columns} from events where event_id <= {last}) e")
    )
    known = query(empty_database, "select count(*) from users where registered_at < '2025-09-11'")[0][0]
    assert found.assignments == pytest.approx(0.8 * known, rel=0.1)
    assert found.exposed == pytest.approx(found.assignments / 2, rel=0.15)
    # Who was won has one more purchase of the item, within 28 days; nobody else has.
    rows = query(
        empty_database,
        "select e.exposed, t.is_won, t.buys_anyway, t.win_probability, (select count(*) from events p"
        " where p.user_id = e.user_id and p.item_id = e.item_id and p.event_type = 'purchase' and p.session_id is null"
        " and p.occurred_at > e.occurred_at and p.occurred_at < e.occurred_at + interval '28 days')"
        " from true_experiment t join events e using (event_id)",
    )
    assert len(rows) == found.assignments
    assert all(count == is_won for _, is_won, _, _, count in rows)
    assert all(exposed or not is_won for exposed, is_won, _, _, _ in rows)
    assert sum(row[1] for row in rows) == pytest.approx(sum(row[3] for row in rows if row[0]), abs=12)
    assert 0 < found.effect == pytest.approx(np.mean([row[3] * (not row[2]) for row in rows]))
    assert max(row[3] for row in rows) > 3 * found.effect
    simulate(empty_database, small(users=900, days=200, key_type="text", experiment=0.8, replace=True))
    simulate(empty_database, small(replace=True))
    assert query(empty_database, "select to_regclass('sim.true_experiment')::text") == [(None,)]


def test_an_experiment_needs_room() -> None:
    with pytest.raises(PgvaeError, match="an experiment does not fit into 90 days"):
        small(experiment=0.5)
    with pytest.raises(PgvaeError, match=r"experiment 1.5 is out of range"):
        small(experiment=1.5)


def test_an_experiment_needs_something_that_sells(empty_database: str) -> None:
    # Of seeds of so small a shop some sell nothing in the first 56 days.
    config = SimulationConfig(users=10, items=20, days=168, events_per_user=12, experiment=1, seed=2, until=UNTIL)
    with pytest.raises(PgvaeError, match="nothing was sold in the 56 days before the experiment"):
        simulate(empty_database, config)
    assert query(empty_database, "select to_regclass('sim.events')::text") == [(None,)]
