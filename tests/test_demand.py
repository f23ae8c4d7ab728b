"""The forecast of demand: its arithmetic against brute force, its fit on known truth, and its answers in SQL."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pytest

from conftest import as_role, create_database, drop_database
from pgvae.cli.metrics import demand_verdict
from pgvae.demand import Sales, conformal_bounds, fit_demand, fit_interval, fit_log_linear, pinball_loss
from pgvae.server import Server
from pgvae.train import train as run_training
from pgvae.versions import read_version
from pgvae_runtime.demand import FEATURES, Head, ItemDays, bounded, features
from shop import QUICK, SMALL, Shop, refusal

Connection = psycopg.Connection[Any]
RunCli = Callable[..., subprocess.CompletedProcess[str]]

HORIZON = 7


# Arithmetic


def random_days(seed: int = 1, items: int = 40, days: int = 120) -> ItemDays:
    """Gives days on which items sold, at rates that differ by item."""
    generator = np.random.default_rng(seed)
    rate = generator.gamma(0.6, 1.0, items)
    sold = generator.poisson(rate[:, None], (items, days))
    item, day = np.nonzero(sold)
    units = sold[item, day].astype(np.float64)
    views = generator.poisson(3.0, len(item)).astype(np.float64)
    return ItemDays(
        item_count=items, item=item, day=day, units=units, buyers=np.minimum(units, 3.0), views=views, carts=views // 2
    )


def sales_of(days: ItemDays, horizon: int) -> Sales:
    """Gives sales whose every buyer of a day is somebody else."""
    rows = np.repeat(np.arange(len(days.item)), days.buyers.astype(np.int64))
    return Sales(
        horizon=horizon,
        days=days,
        bought_user=np.arange(len(rows)),
        bought_item=days.item[rows],
        bought_day=days.day[rows],
        item_keys=[f"item {number}" for number in range(days.item_count)],
    )


def test_features_are_what_their_names_say() -> None:
    days = random_days(items=5, days=30)
    matrix = features(days, HORIZON)
    assert matrix.shape == (5, len(FEATURES))
    for item in range(5):
        own = days.item == item
        recent = own & (days.day < HORIZON)
        decay = 0.5 ** (1 / (4 * HORIZON))
        smoothed = HORIZON * (1 - decay) * sum(days.units[own] * decay ** days.day[own])
        value = dict(zip(FEATURES, np.exp(matrix[item]) - 0.3, strict=True))
        assert value["log units of the last 1"] == pytest.approx(days.units[recent].sum())
        assert value["log level of units, half-life 4"] == pytest.approx(smoothed)


def test_what_was_known_earlier_holds_nothing_newer() -> None:
    days = random_days()
    before = days.before(10)
    assert before.day.min() == 0
    np.testing.assert_allclose(before.total("units", 0, 5), days.total("units", 10, 15))
    assert days.before(10, width=5).day.max() == 4


def test_poisson_regression_finds_the_coefficients_that_made_the_counts() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(20_000, 2))
    y = generator.poisson(np.exp(0.5 + x @ [0.8, -0.3])).astype(np.float64)
    intercept, coefficients = fit_log_linear(x, y)
    assert [intercept, *coefficients] == pytest.approx([0.5, 0.8, -0.3], abs=0.03)


def test_nothing_sold_expects_next_to_nothing() -> None:
    intercept, coefficients = fit_log_linear(np.ones((5, 2)), np.zeros(5))
    assert np.exp(intercept + sum(coefficients)) < 1e-9


def test_an_interval_covers_what_it_says_at_every_level() -> None:
    generator = np.random.default_rng(1)
    expected = np.exp(generator.uniform(0, 6, 20_000))
    happened = expected * generator.lognormal(-0.5, 1.0, 20_000)
    matrix = np.log(expected)[:, None]
    interval = fit_interval(expected[::2], happened[::2], matrix[::2], 0.0, [1.0])
    found = bounded(expected[1::2], interval, matrix[1::2], is_whole=False)
    inside = (happened[1::2] >= found.low) & (happened[1::2] <= found.high)
    for level in np.array_split(np.argsort(expected[1::2]), 5):
        assert inside[level].mean() == pytest.approx(0.8, abs=0.04)
    assert (found.low <= found.expected).all()
    assert (found.expected <= found.high).all()


@pytest.mark.parametrize("count", [9, 10, 25, 100])
def test_an_interval_fitted_on_few_covers_what_it_says(count: int) -> None:
    draws = np.random.default_rng(1).normal(size=(20_000, count + 1))
    bounds = np.array([conformal_bounds(values) for values in draws[:, 1:]])
    inside = ((draws[:, 0] >= bounds[:, 0]) & (draws[:, 0] <= bounds[:, 1])).mean()
    # Of n + 1 exchangeable values so many lie between two order statistics.
    beyond = (count + 1) // 10
    assert inside == pytest.approx(1 - 2 * beyond / (count + 1), abs=0.01)
    assert 0.79 < inside < 0.86


def test_the_true_quantile_has_the_least_pinball_loss() -> None:
    happened = np.random.default_rng(1).normal(size=10_000)
    loss = {bound: pinball_loss(happened, np.full(10_000, bound), 0.9).mean() for bound in (0.8, 1.28, 1.8)}
    assert min(loss, key=lambda bound: loss[bound]) == 1.28


def test_a_head_is_the_same_after_a_stay_in_the_database() -> None:
    days = random_days()
    fitted = fit_demand(sales_of(days, HORIZON), seed=1)
    assert fitted.head is not None
    again = Head.from_json(json.loads(json.dumps(fitted.head.to_json())))
    assert again == fitted.head
    for one, other in zip(again.forecast(days), fitted.head.forecast(days), strict=True):
        np.testing.assert_array_equal(one.expected, other.expected)


def test_steady_rates_are_forecast_better_than_by_the_last_period() -> None:
    days = random_days(items=400)
    fitted = fit_demand(sales_of(days, HORIZON), seed=1)
    value = {(metric.method, metric.metric): metric.value for metric in fitted.metrics}
    for metric in ("demand_wape", "demand_pinball", "demand_buyers_wape"):
        assert value["pgvae", metric] < 0.85 * value["last_period", metric]
    assert value["pgvae", "demand_coverage"] > 0.75
    assert fitted.head is not None
    units, _ = fitted.head.forecast(days)
    assert units.expected.sum() == pytest.approx(days.units.sum() * HORIZON / 120, rel=0.1)


def test_the_forecast_of_the_newest_horizon_does_not_know_it() -> None:
    days = random_days()
    doubled = ItemDays(
        item_count=days.item_count,
        item=days.item,
        day=days.day,
        units=np.where(days.day < HORIZON, 50 * days.units, days.units),
        buyers=days.buyers,
        views=days.views,
        carts=days.carts,
    )
    curves = [fit_demand(sales_of(each, HORIZON), seed=1).curve for each in (days, doubled)]
    assert [(p.label, p.x, p.lower, p.upper) for p in curves[0]] == [
        (p.label, p.x, p.lower, p.upper) for p in curves[1]
    ]
    assert sum(p.y for p in curves[1]) > sum(p.y for p in curves[0])


def test_a_horizon_longer_than_the_data_allow_has_no_forecast() -> None:
    fitted = fit_demand(sales_of(random_days(), 31), seed=1)
    assert (fitted.head, fitted.metrics, fitted.curve) == (None, [], [])
    assert fitted.missing == (
        "the sales span 120 days, a forecast of 31 days needs 124: train again then, or after"
        " vae.set_options with horizon_days of at most 30"
    )


def test_views_before_the_first_sale_are_no_sales() -> None:
    days = random_days()
    lately = replace(days, units=np.where(days.day < 20, days.units, 0.0), buyers=np.where(days.day < 20, 1.0, 0.0))
    fitted = fit_demand(sales_of(lately, HORIZON), seed=1)
    assert fitted.head is None
    assert fitted.missing.startswith("the sales span 20 days, a forecast of 7 days needs 28:")


def test_of_nothing_sold_there_is_no_share_to_be_off_by() -> None:
    days = random_days()
    closed = replace(days, units=np.where(days.day < 25, 0.0, days.units), buyers=np.where(days.day < 25, 0.0, 1.0))
    fitted = fit_demand(sales_of(closed, HORIZON), seed=1)
    assert {metric.metric for metric in fitted.metrics} == {
        f"demand_{what}{name}" for what in ("", "buyers_") for name in ("pinball", "coverage")
    }
    assert demand_verdict(fitted).startswith("demand of 7 days is not measured: ")
    # One item sells, once: a resample without it has no share either.
    first = np.flatnonzero(closed.day == 3)[0]
    once = replace(closed, units=np.where(np.arange(len(closed.day)) == first, 1.0, closed.units))
    found = next(m for m in fit_demand(sales_of(once, HORIZON), seed=1).metrics if m.metric == "demand_wape")
    assert found.lower is not None
    assert found.upper is not None
    assert 0.5 < found.lower <= found.value <= found.upper < 1e3


def test_what_the_database_does_not_read_any_more_is_not_learned_from() -> None:
    days = random_days()
    columns = ("item", "day", "units", "buyers", "views", "carts")
    # Of items that all moments know already.
    own = np.isin(days.item, days.item[days.day > 100])
    days = replace(days, **{name: getattr(days, name)[own] for name in columns})
    old = replace(days, day=days.day + 400)
    both = replace(days, **{name: np.append(getattr(days, name), getattr(old, name)) for name in columns})
    assert fit_demand(sales_of(both, HORIZON), seed=1).head == fit_demand(sales_of(days, HORIZON), seed=1).head


def test_the_last_period_has_as_many_buyers_as_bought_in_it() -> None:
    # Three regular customers buy each item every day.
    item, day = (place.ravel() for place in np.indices((20, 60)))
    many = np.full(len(item), 3.0)
    days = ItemDays(item_count=20, item=item, day=day, units=many, buyers=many, views=many, carts=many)
    sales = replace(sales_of(days, HORIZON), bought_user=np.tile(np.arange(3), len(item)))
    value = {(metric.method, metric.metric): metric.value for metric in fit_demand(sales, seed=1).metrics}
    assert value["last_period", "demand_wape"] == value["last_period", "demand_buyers_wape"] == 0.0


# In SQL


@pytest.fixture(scope="module")
def stocked(server: Server, template: str) -> Iterator[str]:
    """The DSN of a shop with quantities, returns, anonymous sales and a table of items, its model trained and active.

    Item 12 has no event; the model `late` has too few days for its horizon.
    """
    name = "demand"
    create_database(server, name, template)
    dsn = server.dsn(name)
    shop = Shop()
    with psycopg.connect(dsn, autocommit=True) as connection:
        shop.make(connection)
        connection.execute("alter table events add quantity integer")
        connection.execute("update events set quantity = 1 + (user_id + item_id) % 3 where event_type = 'purchase'")
        connection.execute(
            "insert into events select null, item_id, event_type, occurred_at, 5 from events"
            " where event_type = 'purchase' and user_id % 7 = 0"
        )
        connection.execute(
            "insert into events select user_id, item_id, event_type, occurred_at + interval '1 hour', -quantity"
            " from events where event_type = 'purchase' and user_id % 5 = 0"
        )
        connection.execute("create table items (item_id bigint primary key, category text)")
        connection.execute(
            "insert into items select k, case when k %% 2 = 0 then 'even' else 'odd' end from unnest(%s::bigint[]) k",
            [[*shop.items, 12]],
        )
        for model, horizon in (("shop", HORIZON), ("late", 28)):
            shop.create_model(
                connection, model, items="items", quantity="quantity", options=SMALL | {"horizon_days": horizon}
            )
    for model in ("shop", "late"):
        version = run_training(dsn, model, QUICK).version
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("select * from vae.activate(%s, %s, force => true)", [model, version])
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("call vae.refresh('shop')")
    yield dsn
    drop_database(server, name)


@pytest.fixture
def connection(stocked: str) -> Iterator[Connection]:
    with psycopg.connect(stocked, autocommit=True) as opened:
        yield opened


def test_a_version_keeps_the_horizon_that_it_was_trained_with(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute("""select vae.set_options('shop', '{"horizon_days": 3}')""")
        assert read_version(connection, "shop").horizon_days == HORIZON
        live = connection.execute("select horizon_days from shop.demand(%s)", [Shop().items[0]])
        assert live.fetchall() == [(HORIZON,)]


def test_every_item_with_events_has_a_forecast_and_the_live_call_agrees(connection: Connection) -> None:
    rows = connection.execute("select * from shop.demand order by item_id").fetchall()
    assert [row[0] for row in rows] == sorted(Shop().items)
    for row in rows:
        live = connection.execute("select * from shop.demand(%s)", [row[0]]).fetchone()
        assert live is not None
        np.testing.assert_allclose(live[:9], row[:9], rtol=1e-12)
        assert live[9] == row[9] == 1
        # Nobody reads more digits.
        assert list(row[1:8]) == [round(number, 6) for number in row[1:8]]
        low, expected, high = row[2], row[1], row[3]
        assert low <= expected + 0.5
        assert high >= expected - 0.5


def test_the_last_period_counts_anonymous_sales_and_no_returns(connection: Connection) -> None:
    expected = connection.execute(
        "select item_id, coalesce(sum(quantity) filter (where occurred_at > n.newest - interval '7 days'), 0)::float8"
        " from (select distinct on (user_id, item_id, event_type, occurred_at, quantity) * from events) e,"
        " (select window_end as newest from vae.versions limit 1) n"
        " where event_type = 'purchase' and quantity > 0 group by item_id order by item_id"
    ).fetchall()
    found = connection.execute("select item_id, last_period_units from shop.demand order by item_id").fetchall()
    assert found == expected
    assert sum(units for _, units in found) > 0


@pytest.mark.parametrize("number", ["double precision", "numeric"])
def test_a_quantity_that_stands_for_no_number_is_no_sale(database: str, number: str) -> None:
    shop = Shop()
    with psycopg.connect(database, autocommit=True) as opened:
        shop.make(opened)
        opened.execute(f"alter table events add quantity {number} default 2")
        opened.execute(
            "insert into events select user_id, item_id, 'purchase', occurred_at + interval '1 second',"
            f" (array[1.7976931348623157e308, 1e200, 'NaN'])[1 + user_id % 3]::{number}"
            " from events where user_id % 5 = 0"
        )
        shop.create_model(opened, quantity="quantity", options=SMALL | {"horizon_days": HORIZON})
        run_training(database, "shop", QUICK)
        opened.execute("select * from vae.activate('shop', 1, force => true)")
        opened.execute("call vae.refresh('shop', array['demand'])")
        expected = opened.execute("select count(*), max(expected_units), max(last_period_units) from shop.demand")
        count, most, last = expected.fetchall()[0]
    assert count == len(shop.items)
    assert 0 < most < 200
    assert last < 200


def test_days_of_an_item_are_those_of_all_items(connection: Connection) -> None:
    item = Shop().items[3]
    alone = connection.execute("select * from shop.item_days(%s) order by day", [item]).fetchall()
    among = connection.execute("select * from shop.all_item_days() where item_id = %s order by day", [item]).fetchall()
    assert alone == among
    buyers, units = connection.execute(
        "select sum(buyers), sum(units) from shop.item_days(%s)", [item]
    ).fetchall()[0]  # fmt: skip
    brute = connection.execute(
        "select sum(quantity)::float8 from events where item_id = %s and event_type = 'purchase' and quantity > 0",
        [item],
    ).fetchone()
    assert (units,) == brute
    assert 0 < buyers < units


def test_a_user_counts_once_a_day_and_an_anonymous_sale_has_no_buyer(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        # Again within the day, some of it anonymous.
        connection.execute(
            "insert into events select case when user_id % 3 > 0 then user_id end, item_id, event_type,"
            " occurred_at + interval '1 second', null from events where event_type <> 'purchase'"
        )
        # The moment of an event, which counts.
        as_of = connection.execute("select percentile_disc(0.9) within group (order by occurred_at) from events")
        moment = as_of.fetchall()[0]
        days = connection.execute(
            "select item_id, day, units, buyers, views, carts from shop.all_item_days(%s) order by 1, 2", moment
        ).fetchall()
        users = "count(distinct user_id) filter (where event_type = '{0}')"
        users_and_nobody = f"{users} + count(*) filter (where event_type = '{{0}}' and user_id is null)"
        columns = [users.format("purchase"), *map(users_and_nobody.format, ("view", "add_to_cart"))]
        expected = connection.execute(
            "select item_id, floor(extract(epoch from %s - occurred_at) / 86400)::integer as day,"
            f" coalesce(sum(quantity) filter (where event_type = 'purchase'), 0)::float8, {', '.join(columns)}"
            " from events where occurred_at <= %s and coalesce(quantity, 1) > 0 group by 1, 2 order by 1, 2".encode(),
            [*moment, *moment],
        ).fetchall()
    assert days == expected
    assert min(day for _, day, *_ in days) == 0


def test_an_item_without_events_is_not_guessed_and_an_unknown_one_is_refused(connection: Connection) -> None:
    assert connection.execute("select * from shop.demand(null)").fetchall() == []
    error = refusal(connection, "select * from shop.demand(99)")
    assert error.sqlstate == "VA051"
    assert "item 99," in str(error.message_primary)
    assert "is the key right" in str(error.message_hint)


def test_a_cold_item_has_a_row_without_numbers(connection: Connection) -> None:
    known = connection.execute("select count(*) from vae_private.items where item_key = '12'").fetchone()
    assert known == (2,)
    row = connection.execute(
        "select item_id, expected_units, units_high, last_period_units, horizon_days, model_version"
        " from shop.demand(12)"
    ).fetchone()
    assert row == (12, None, None, 0.0, HORIZON, 1)


def test_a_version_without_a_forecast_says_so_and_leaves_the_view_empty(connection: Connection) -> None:
    error = refusal(connection, "select * from late.demand(1)")
    assert error.sqlstate == "VA050"
    assert "forecasts no demand" in str(error.message_primary)
    assert "horizon_days" in str(error.message_hint)
    notices: list[str] = []
    connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    connection.execute("call vae.refresh('late', array['demand'])")
    assert connection.execute("select count(*) from late.demand").fetchone() == (0,)
    assert any("forecasts no demand" in notice for notice in notices)
    log = connection.execute(
        "select r.state, r.row_count from vae.refreshes r join vae.models m using (model_id) where m.name = 'late'"
    ).fetchall()
    assert log == [("succeeded", 0)]


def test_categories_add_up_and_their_intervals_are_narrower_than_the_sums_of_bounds(connection: Connection) -> None:
    rows = connection.execute("select * from shop.demand_by_category('category')").fetchall()
    assert {row[0] for row in rows} == {"even", "odd"}
    total = connection.execute("select sum(expected_units), sum(last_period_units) from shop.demand").fetchone()
    assert total is not None
    assert sum(row[2] for row in rows) == pytest.approx(total[0])
    assert sum(row[8] for row in rows) == pytest.approx(total[1])
    assert all(0 <= row[3] <= row[2] <= row[4] for row in rows)
    assert all(number == round(number, 6) for row in rows for number in row[2:9])
    # An item that the table holds twice, once without a category, counts once.
    with connection.transaction(force_rollback=True):
        connection.execute("alter table items drop constraint items_pkey")
        connection.execute(
            "insert into items select item_id, category from items union all select item_id, null from items"
        )
        assert connection.execute("select * from shop.demand_by_category('category')").fetchall() == rows
    error = refusal(connection, "select * from shop.demand_by_category('colour')")
    assert error.sqlstate == "42703"
    assert 'no column "colour"' in str(error.message_primary)


def test_categories_before_the_first_refresh(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute("refresh materialized view shop.demand_materialized with no data")
        refused = refusal(connection, "select * from shop.demand_by_category('category')")
    assert (refused.sqlstate, refused.message_hint) == ("55000", "refresh first: call vae.refresh('shop')")


def test_whoever_may_score_adds_up_categories(connection: Connection) -> None:
    query = "select * from shop.demand_by_category('category')"
    rows = connection.execute(query).fetchall()
    with connection.transaction(force_rollback=True):
        connection.execute("grant usage on schema shop, public to vae_scorer")
        connection.execute("grant select on items to vae_scorer")
        connection.execute("set local role vae_scorer")
        assert connection.execute(query).fetchall() == rows


def test_the_figures_stand_beside_their_baselines(connection: Connection) -> None:
    rows = connection.execute(
        "select distinct x.method, x.metric from vae.metrics x join vae.versions v using (version_id)"
        " join vae.models m using (model_id) where m.name = 'shop' and x.split = 'horizon'"
    ).fetchall()
    names = [f"demand_{what}{name}" for what in ("", "buyers_") for name in ("wape", "pinball", "coverage")]
    assert set(rows) == {(m, n) for m in ("pgvae", "last_period", "exponential_smoothing") for n in names}
    points = connection.execute(
        "select label, lower <= upper, weight from vae.curves where curve = 'demand'"
    ).fetchall()
    assert {label for label, _, _ in points} <= {str(item) for item in Shop().items}
    assert len(points) > 5
    assert all(ordered and weight == 1 for _, ordered, weight in points)


def test_a_scorer_forecasts_with_own_rights_only(connection: Connection, stocked: str, role: str) -> None:
    item = Shop().items[0]
    connection.execute(f"grant vae_scorer to {role}")
    connection.execute(f"grant usage on schema shop to {role}")
    with psycopg.connect(as_role(stocked, role), autocommit=True) as scorer:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            scorer.execute("select * from shop.demand(%s)", [item])
        connection.execute(f"grant select on events, items to {role}")
        assert scorer.execute("select count(*) from shop.demand(%s)", [item]).fetchone() == (1,)
    connection.execute(f"revoke select on events, items from {role}")
    connection.execute(f"revoke usage on schema shop from {role}")


def test_an_archive_is_looked_ahead_from_its_end(connection: Connection) -> None:
    ahead = "select vae_private.looks_ahead_from(now(), now() - %s::interval, %s) = now() - %s::interval"
    for silence, horizon, is_archive in (("8 days", 28, True), ("6 days", 28, False), ("1 day", 1, False)):
        assert connection.execute(ahead, [silence, horizon, silence]).fetchone() == (is_archive,)
