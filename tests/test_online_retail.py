"""A real shop, from its download to recommendations, through the command line and SQL as people use them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg
import pytest
from psycopg import sql

from conftest import create_database, drop_database
from pages import DOCS, Runner, blocks, column
from pgvae.config import TrainingConfig
from pgvae.server import Server
from variants import network_of_active_version, torch_scores


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A database in which the tutorial was followed, and the answers to the questions at its end, by number."""

    dsn: str
    answers: dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def tutorial(server: Server, folder: Path, psql_folder: Path, shared_data: Path) -> Iterator[Followed]:
    """The tutorial for the analyst, followed from an empty database to its end."""
    name, file = "online_retail", "online_retail.csv.xz"
    create_database(server, name)
    # Cut short: what a whole training reaches is measured by benchmarks.accuracy.
    training = ("--epochs=5", "--latent=64", "--hidden=64")
    runner = Runner(dsn=server.dsn(name), bindir=psql_folder, folder=folder, training=training)
    (folder / file).symlink_to(shared_data / "online-retail" / file)
    for block in blocks(DOCS / "tutorial-analyst.md"):
        runner.run(block)
    yield Followed(dsn=runner.dsn, answers=runner.answer(DOCS / "tutorial" / "online-retail.sql"))
    drop_database(server, name)


@pytest.fixture
def connection(tutorial: Followed) -> Iterator[psycopg.Connection]:
    """A connection whose changes are rolled back, since the tests share the database."""
    with psycopg.connect(tutorial.dsn) as opened:
        yield opened
        opened.rollback()


def test_the_tutorial_runs_and_its_answers_fit_the_questions(tutorial: Followed) -> None:
    """Not how well a training of a few epochs ranks."""
    answers = tutorial.answers
    assert {name.partition(".")[0] for name in answers} == {str(number) for number in range(1, 11)}
    assert all(row["because"].startswith("because you bought") for row in answers["1.1"])
    assert column(answers["1.2"], "share_of_the_score") == sorted(column(answers["1.2"], "share_of_the_score"))[::-1]
    assert all("CHRISTMAS" in row["description"] for row in answers["2.3"])
    assert all(float(row["low"]) <= float(row["units"]) <= float(row["high"]) for row in answers["3.1"])
    other_teacups = {"PINK REGENCY TEACUP AND SAUCER", "ROSES REGENCY TEACUP AND SAUCER"}
    assert {row["description"] for row in answers["4.1"][:2]} == other_teacups
    assert {row["description"] for row in answers["5.1"]} > other_teacups
    assert {row["country"] for row in answers["6.2"]} == {"Germany", "France"}
    probabilities = column(answers["7.1"], "response_probability")
    assert 1 >= probabilities[0] > probabilities[-1] > 0
    assert probabilities == sorted(probabilities)[::-1]
    assert 4 * probabilities[-1] < column(answers["7.2"], "expected_buyers")[0] < 500 * probabilities[0]
    assert [row["risk_band"] for row in answers["8.1"]] == ["high", "medium", "low"]
    assert any("LUNCH" in row["description"] for row in answers["9.2"])
    assert answers["10.1"][0]["method"] == "pgvae"
    assert answers["10.1"][-1]["method"] == "popularity"


def test_every_row_of_the_file_and_of_the_tutorial_is_in_the_table(connection: psycopg.Connection) -> None:
    assert value(connection, "select count(*) from public.events") == 541_909 + 3
    assert value(connection, "select pg_typeof(user_id)::text from public.events limit 1") == "bigint"


def test_the_gate_finds_what_is_known_to_be_wrong_with_this_shop(connection: psycopg.Connection) -> None:
    rows = connection.execute("select check_name, status, row_count from vae.check_events('shop')").fetchall()
    report = {name: (status, count) for name, status, count in rows}
    assert report["null_user_ids"] == ("warn", 134_005)
    assert report["returns"] == ("warn", 10_028)
    assert report["duplicates"][0] == "warn"
    assert "fail" not in {status for status, _ in report.values()}


def test_the_model_clearly_beats_popularity_and_item_knn(connection: psycopg.Connection) -> None:
    metrics = {
        (method, metric): (value, lower, upper)
        for method, metric, value, lower, upper in connection.execute(
            "select method, metric, value, lower, upper from vae.metrics where slice = 'all'"
        ).fetchall()
    }
    for metric in ("recall", "ndcg"):
        assert metrics["pgvae", metric][1] > metrics["popularity", metric][2]
        assert metrics["pgvae", metric][0] > metrics["item_knn", metric][0]
    # Customer by customer: chance does not explain the difference.
    for baseline in ("popularity", "item_knn"):
        assert metrics[baseline, "ndcg_lead"][1] > 0


def test_every_user_of_the_cleaned_events_has_recommendations(connection: psycopg.Connection) -> None:
    users = value(connection, "select count(distinct user_id) from shop.clean_events")
    assert value(connection, "select count(distinct user_id) from shop.recommendations") == users == 4_335 + 2
    assert value(connection, "select count(*) from shop.recommendations") == users * 20


def test_nothing_that_was_bought_is_recommended(connection: psycopg.Connection) -> None:
    bought = "select count(*) from shop.recommendations r join shop.clean_events e using (user_id, item_id)"
    assert value(connection, bought) == 0


def test_the_live_call_gives_the_rows_of_the_view(connection: psycopg.Connection) -> None:
    for user in (17850, 13047, 12583, 14911):
        live = connection.execute(
            "select rank, item_id, score from shop.recommend(%s, k => 20) order by rank", [user]
        ).fetchall()
        view = connection.execute(
            "select rank, item_id, score from shop.recommendations where user_id = %s order by rank", [user]
        ).fetchall()
        assert [row[:2] for row in live] == [row[:2] for row in view]
        np.testing.assert_allclose([row[2] for row in live], [row[2] for row in view], rtol=1e-5)


def test_the_database_gives_the_scores_of_pytorch(connection: psycopg.Connection) -> None:
    network, links, dataset = network_of_active_version(connection)
    assert len(links.item)
    users = [17850, 13047, 12583, 14911, 12748]
    numbers = dict(
        connection.execute(
            "select user_id, dense_rank() over (order by user_id) - 1"
            " from (select distinct user_id from shop.clean_events) u"
        ).fetchall()
    )
    expected = torch_scores(network, links, dataset.history(np.array([numbers[user] for user in users])), 500)
    for row, user in zip(expected, users, strict=True):
        ranked = connection.execute(
            """select item_id, score from shop.recommend(%s, k => 10000, options => '{"exclude_seen": false}')""",
            [user],
        ).fetchall()
        in_database = dict(ranked)
        assert len(in_database) == len(dataset.item_keys)
        # Relative to the user's largest score: a share of 1e-12 has no digits worth comparing.
        actual = np.array([in_database[key] for key in dataset.item_keys])
        assert np.abs(actual - row).max() <= 1e-5 * row.max()
        np.testing.assert_allclose(np.sort(actual)[-20:], np.sort(row)[-20:], rtol=1e-5)
        assert [key for key, _ in ranked[:10]] == [dataset.item_keys[i] for i in np.argsort(-row, kind="stable")[:10]]


def test_an_unknown_customer_gets_the_popular_items_flagged(connection: psycopg.Connection) -> None:
    rows = connection.execute("select is_cold_start, item_id from shop.recommend(1, k => 3)").fetchall()
    assert [row[0] for row in rows] == [True, True, True]
    popular = connection.execute(
        "select item_id from shop.clean_events group by item_id order by count(distinct user_id) desc limit 3"
    ).fetchall()
    assert {row[1] for row in rows} == {row[0] for row in popular}


def test_a_purchase_of_a_minute_ago_changes_the_answer(connection: psycopg.Connection) -> None:
    connection.execute(
        "insert into public.events (user_id, item_id, occurred_at, quantity)"
        " select 1, item_id, now() - interval '1 minute', 1 from unnest(array['22697', '22698']) as item_id"
    )
    rows = connection.execute("select item_id, is_cold_start from shop.recommend(1, k => 3)").fetchall()
    # Two of the three Regency teacups were bought: the third one comes first.
    assert rows[0] == ("22699", False)


def test_a_prediction_row_leads_to_its_training(connection: psycopg.Connection) -> None:
    row = connection.execute(
        "select v.event_count, v.user_count, v.item_count, v.window_end::date::text, v.seed, v.quality, v.durations"
        " from shop.recommendations r join vae.models m on m.name = 'shop'"
        " join vae.versions v on v.model_id = m.model_id and v.version = r.model_version limit 1"
    ).fetchone()
    assert row is not None
    assert row[:5] == (386_278, 4_335, 3_659, "2011-12-09", TrainingConfig().seed)
    assert {check["check_name"] for check in row[5]} >= {"returns", "duplicates"}
    assert all(seconds > 0 for seconds in row[6].values())


def value(connection: psycopg.Connection, query: str) -> object:
    row = connection.execute(sql.SQL(query)).fetchone()
    assert row is not None
    return row[0]
