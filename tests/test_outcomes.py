"""Who will buy, who is leaving, whom to send an offer: the fit on known truth, and the answers in SQL."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.types.json import Jsonb
from threadpoolctl import threadpool_info, threadpool_limits

from conftest import as_role, create_database, drop_database
from pgvae import regression
from pgvae.checkpoints import Checkpoints
from pgvae.comparison import Evaluation
from pgvae.dataset import Dataset, read_dataset
from pgvae.loop import Fit, fit
from pgvae.outcome_figures import area_under_curve, calibration_error, top_lift
from pgvae.outcome_windows import log_loss, read_window, too_little, windows
from pgvae.outcomes import OutcomeFit, fit_outcomes
from pgvae.regression import fit_cloglog, fit_logistic, fit_platt, fit_poisson
from pgvae.server import Server
from pgvae.splits import temporal
from pgvae.train import Training, _Earlier
from pgvae.train import train as run_training
from pgvae.transfer import export_version, import_version
from pgvae.validation import NO_SHORTCUT
from pgvae.versions import read_weights
from pgvae_runtime.audience import Best
from pgvae_runtime.behaviour import behaviour, behaviour_groups, count, names
from pgvae_runtime.churn import reasons_of
from pgvae_runtime.outcomes import (
    SHAPES,
    Outlook,
    any_probability,
    item_probability,
    moments,
    outlook,
    risk_band,
    sigmoid,
)
from pgvae_runtime.store import Version
from pgvae_runtime.tokens import SECONDS_PER_DAY as DAY
from pgvae_runtime.tokens import History
from shop import QUICK, SMALL, Shop, refusal
from variants import rewritten

Connection = psycopg.Connection[Any]
HORIZON = 7
SHOP = Shop(user_keys=range(1, 161), item_keys=range(1, 13))


# Arithmetic


def test_a_regression_computes_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where several wait for each other, on a busy machine, it takes forty times as long.
    threads: set[int] = set()
    real = regression.sigmoid

    def noted(eta: Any) -> Any:
        threads.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return real(eta)

    monkeypatch.setattr(regression, "sigmoid", noted)
    with threadpool_limits(2, user_api="blas"):
        fit_logistic(np.arange(20.0).reshape(10, 2), np.arange(10) % 3 == 0, np.ones(2))
    assert threads == {1}


def test_a_logistic_regression_finds_the_coefficients_that_made_the_answers() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(40_000, 2))
    y = (generator.random(40_000) < sigmoid(x @ [1.0, -0.5] - 1.0)).astype(np.float64)
    assert fit_logistic(x, y, np.zeros(2)) == pytest.approx([1.0, -0.5, -1.0], abs=0.06)


def test_a_poisson_regression_finds_the_coefficients_that_made_the_counts() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(40_000, 2))
    y = generator.poisson(np.exp(x @ [0.8, -0.3] + 0.5)).astype(np.float64)
    assert fit_poisson(x, y, np.zeros(2), most=12.0) == pytest.approx([0.8, -0.3, 0.5], abs=0.03)


def test_the_head_of_items_finds_the_coefficients_that_made_the_purchases() -> None:
    generator = np.random.default_rng(1)
    x = np.column_stack((generator.normal(-4.0, 1.0, 100_000), generator.normal(size=100_000), np.ones(100_000)))
    y = generator.random(100_000) < -np.expm1(-np.exp(x @ [0.9, 0.5, 1.0]))
    ones = np.ones(len(y))
    assert fit_cloglog(x, y, ones, least=0.05) == pytest.approx([0.9, 0.5, 1.0], abs=0.1)
    # A network that has learned nothing must not turn the order of the scores around.
    turned = fit_cloglog(x * [-1.0, 1.0, 1.0], y, ones, least=0.05)
    assert turned[0] == 0.05
    rate = np.exp(x * [-1.0, 1.0, 1.0] @ turned)
    assert -np.expm1(-rate).sum() == pytest.approx(y.sum(), rel=0.01)


def test_rows_that_stand_for_several_count_as_often() -> None:
    generator = np.random.default_rng(1)
    x = np.column_stack((generator.normal(size=3000), np.ones(3000)))
    y, times = generator.random(3000) < 0.1, generator.integers(1, 4, 3000)
    once = fit_cloglog(np.repeat(x, times, axis=0), np.repeat(y, times), np.ones(times.sum()), least=-9.0)
    assert fit_cloglog(x, y, times.astype(np.float64), least=-9.0) == pytest.approx(once, abs=1e-5)


def test_figures_of_a_hand_made_case() -> None:
    truth = np.array([1.0, 0.0, 1.0, 0.0])
    p = np.array([0.9, 0.4, 0.4, 0.1])
    # Of the four pairs of a buyer and another three are in order, and one is a tie.
    assert area_under_curve(p, truth) == pytest.approx(3.5 / 4)
    assert log_loss(p, truth).tolist() == pytest.approx([-np.log(0.9), -np.log(0.6), -np.log(0.4), -np.log(0.9)])
    # Of one probability for all, it does not matter who comes first.
    assert calibration_error(np.full(1000, 0.3), np.repeat([1.0, 0.0], [300, 700])) == pytest.approx(0.0)
    assert calibration_error(np.full(1000, 0.4), np.repeat([1.0, 0.0], [300, 700])) == pytest.approx(0.1)
    order = np.arange(100.0)
    assert top_lift(order, np.arange(100) >= 90) == pytest.approx(10.0)
    assert top_lift(order, np.arange(100) < 10) == pytest.approx(0.0)
    assert top_lift(np.zeros(100), np.arange(100) < 10) == pytest.approx(1.0)


def test_platt_scaling_keeps_the_order_and_the_mean() -> None:
    generator = np.random.default_rng(1)
    logit = generator.normal(-3.0, 1.0, 5000)
    for sign in (0.8, -0.8):
        truth = (generator.random(5000) < sigmoid(sign * logit)).astype(np.float64)
        slope, intercept = fit_platt(logit, truth, least=0.05)
        assert slope == pytest.approx(max(sign, 0.05), abs=0.1)
        assert sigmoid(slope * logit + intercept).mean() == pytest.approx(truth.mean(), abs=1e-6)


def history(*users: list[tuple[float, int, int]]) -> History:
    """Gives the history of users, each a list of (days since 1970, item, event type)."""
    events = np.array([event for own in users for event in own]).reshape(-1, 3)
    return History(
        counts=np.array([len(own) for own in users]),
        item=events[:, 1].astype(np.int64),
        event_type=events[:, 2].astype(np.int64),
        occurred_at=events[:, 0] * DAY,
    )


def test_behaviour_is_what_its_names_say() -> None:
    own = history(
        [(90.0, 1, 0), (95.5, 2, 1), (99.0, 2, 1), (99.2, 3, 1)], [], [(50.0, 1, 0)], [(80.0, 1, 1)], [(101.0, 1, 0)]
    )
    found = behaviour(own, np.full(5, 100.0 * DAY), horizon=7, targets=(1,), types=2)
    assert found.shape == (5, count(2))
    value = [dict(zip(names(["view", "purchase"]), row, strict=True)) for row in found]
    log = np.log1p

    def fading(half_life: float, *days: float) -> Any:
        return log(sum(0.5 ** (day / (half_life * 7)) for day in days) / 0.05)

    # Days are counted back from the moment, so the purchases of 1 and 0.8 days ago lie on different ones.
    expected = {
        "has bought": 1,
        "log days since the last event": log(0.8),
        "square of log days since the last event": log(0.8) ** 2,
        "log days since the last purchase": log(0.8),
        "square of log days since the last purchase": log(0.8) ** 2,
        "log days since the first event": log(10.0),
        "log days with events": log(4),
        "log days with purchases": log(3),
        "log purchases": log(3),
        "log items bought": log(2),
        "log mean days between purchases": log((4.5 - 0.8) / 2),
        "log days since the last purchase over the mean between": log(0.8) - log((4.5 - 0.8) / 2),
        "days since the last event times days with purchases": log(0.8) * log(3),
        "view: log events": log(1),
        "view: log events in the last horizon": 0,
        "view: log days since the last one": log(10.0),
        "purchase: log events": log(3),
        "purchase: log events in the last horizon": log(3),
        "purchase: log days since the last one": log(0.8),
    }
    for width, days, buying_days in (("0.25", 2, 2), ("1", 3, 3), ("4", 4, 3)):
        expected[f"log days with events in the last {width}"] = log(days)
        expected[f"log days with purchases in the last {width}"] = log(buying_days)
        expected[f"log events, half-life {width}"] = fading(float(width), 10, 4.5, 1, 0.8)
        expected[f"log days with purchases, half-life {width}"] = fading(float(width), 4, 1, 0)
    assert value[0] == pytest.approx(expected)
    assert not found[1].any()
    # Who never bought: as if it had been a horizon before the first event. Who bought once: as if it were as rare.
    assert value[2]["has bought"] == 0
    assert value[2]["log days since the last purchase"] == pytest.approx(log(57.0))
    assert value[2]["purchase: log days since the last one"] == pytest.approx(log(57.0))
    assert [value[user]["log mean days between purchases"] for user in (2, 3)] == pytest.approx(log([57.0, 27.0]))
    # What a clock that is wrong puts into the future happens now.
    assert value[4]["log days since the last event"] == 0


def test_behaviour_does_not_depend_on_who_else_is_in_the_batch_or_on_the_order() -> None:
    generator = np.random.default_rng(1)
    users = [
        [(float(generator.uniform(0, 99)), int(generator.integers(9)), int(generator.integers(2))) for _ in range(n)]
        for n in (3, 0, 12, 1)
    ]
    found = behaviour(history(*users), np.full(4, 100.0 * DAY), horizon=7, targets=(1,), types=2)
    for user, own in enumerate(users):
        alone = behaviour(history(own[::-1]), np.array([100.0 * DAY]), horizon=7, targets=(1,), types=2)
        np.testing.assert_allclose(alone[0], found[user], rtol=1e-12)


def test_each_number_of_behaviour_belongs_to_one_group() -> None:
    groups = behaviour_groups(3)
    assert sorted(column for own in groups.values() for column in own) == list(range(count(3)))
    assert all(groups.values())


def test_the_horizon_of_an_archive_begins_where_its_events_end() -> None:
    own = history([(90.0, 1, 0)], [(120.0, 1, 0)], [])
    times = {"now": 500.0 * DAY, "window_end": 100.0 * DAY, "horizon": 28}
    assert (moments(own, created_at=107.0 * DAY, **times) == 500.0 * DAY).all()
    old = moments(own, created_at=107.1 * DAY, **times)
    assert (old / DAY).tolist() == [100.0, 120.0, 100.0]
    # Of a short horizon the quarter would be hours.
    short = times | {"horizon": 4}
    assert (moments(own, created_at=102.0 * DAY, **short) == 500.0 * DAY).all()
    assert (moments(own, created_at=102.1 * DAY, **short) == old).all()


def test_the_probability_of_an_item_grows_with_its_score_and_stays_below_that_of_any_purchase() -> None:
    weights = {"item_slope": np.array([0.8])}
    found = Outlook(
        purchase=np.array([0.4, np.nan]),
        amount=np.array([3.0, np.nan]),
        item_offset=np.array([1.0, np.nan]),
        behaviour=np.zeros((2, 1)),
    )
    scores = np.array([[0.0, 1e-30, 1e-6, 0.1, 1.0]] * 2)
    p = item_probability(weights, found, scores)
    assert p[0, 0] == 0.0
    assert (np.diff(p[0]) > 0).all()
    assert p[0, -1] < 0.4
    assert np.isnan(p[1]).all()
    either = any_probability(weights, found, scores[:, 2:4])
    assert max(p[0, 2], p[0, 3]) < either[0] < p[0, 2] + p[0, 3]


def test_bands_of_risk() -> None:
    assert [risk_band(p) for p in (0.0, 0.4999, 0.5, 0.7999, 0.8, 1.0)] == [
        "low", "low", "medium", "medium", "high", "high"
    ]  # fmt: skip


def test_the_strongest_reasons_come_first_and_weak_ones_are_none() -> None:
    groups = behaviour_groups(2)
    x = np.zeros((2, count(2)))
    for name, part in {"recency": 0.2, "frequency": 0.4, "activity": 0.15, "tenure": 0.05}.items():
        x[:, groups[name][0]] = -part
    x[:, groups["purchase recency"]] = -0.3 / len(groups["purchase recency"])
    nothing = np.zeros(2)
    found = Outlook(purchase=nothing, amount=nothing, item_offset=nothing, behaviour=x)
    weights = {"behaviour_mean": np.zeros(count(2)), "purchase_behaviour": np.ones(count(2)), "outcome_horizon": [7]}
    version = Version(
        version_id=1, version=1, model_id=1, model="shop", user_id_type="bigint", weights=weights,
        event_types={"purchase": 1, "view": 0}, targets=(1,), max_history=9, user_count=2,
    )  # fmt: skip
    # The second user is somebody of whom nothing is known.
    history = History(
        counts=np.array([5, 0]),
        item=np.zeros(5, dtype=np.int64),
        event_type=np.array([0, 1, 1, 0, 0]),
        occurred_at=100 * DAY - np.array([40.5, 30.5, 20.5, 7.5, 3.5]) * DAY,
    )
    as_of = np.full(2, 100.0 * DAY)
    told = [
        ("bought on 2 days in all", pytest.approx(0.4)),
        ("last purchase 20 days ago, with 10 days between two on average", pytest.approx(0.3)),
        ("last event 3 days ago", pytest.approx(0.2)),
        ("active on 1 day of the last 7", pytest.approx(0.15)),
        ("first seen 40 days ago", pytest.approx(0.05)),
    ]
    assert reasons_of(version, found, history, as_of) == [told[:3], []]
    assert reasons_of(version, found, history, as_of, most=9) == [told[:4], []]
    assert reasons_of(version, found, history, as_of, most=9, least=-1.0) == [told, []]


@pytest.mark.parametrize("k", [1, 7, 40, 1000])
def test_the_best_users_are_those_of_all_batches_and_the_first_of_equal_ones(k: int) -> None:
    generator = np.random.default_rng(1)
    probability = generator.integers(0, 20, 300) / 20
    probability[generator.random(300) < 0.1] = np.nan
    has_bought = generator.random(300) < 0.5
    best = Best(k)
    for first in range(0, 300, 11):
        own = slice(first, first + 11)
        best.add([str(user) for user in range(300)[own]], probability[own], probability[own], has_bought[own])
    known = [user for user in range(300) if not np.isnan(probability[user])]
    wanted = sorted(known, key=lambda user: (-probability[user], user))[:k]
    assert list(best.rows()) == [
        (rank, str(user), probability[user], has_bought[user]) for rank, user in enumerate(wanted, start=1)
    ]


# Windows and the fit


def simulated(users: int = 1500, days: int = 120, seed: int = 1) -> tuple[Dataset, np.ndarray[Any, Any]]:
    """Gives users who buy at steady rates of their own until they leave, and the true rate per day at the end."""
    generator = np.random.default_rng(seed)
    rate = generator.gamma(0.7, 0.08, users)
    leaves = np.minimum(generator.exponential(120.0, users), days)
    events = generator.poisson(rate * leaves)
    user = np.repeat(np.arange(users), events)
    at = generator.random(len(user)) * leaves[user] * DAY
    taste = generator.integers(0, 4, users)
    item = np.where(generator.random(len(user)) < 0.7, taste[user] * 5, 0) + generator.integers(0, 5, len(user))
    kind = (generator.random(len(user)) < 0.5).astype(np.int64)
    order = np.lexsort((kind, item, at, user))
    dataset = Dataset(
        user=user[order],
        item=item[order],
        event_type=kind[order],
        occurred_at=at[order],
        weight=np.ones(len(user), dtype=np.float32),
        item_keys=[f"item {number:02}" for number in range(20)],
        event_types=["view", "purchase"],
        user_count=users,
    )
    return dataset, np.where(leaves >= days, rate * 0.5, 0.0)


def test_windows_lie_side_by_side_and_inside_the_events() -> None:
    dataset, _ = simulated()
    found = windows(dataset, 14, 1)
    end = dataset.occurred_at.max()
    for number, window in enumerate(found, start=1):
        assert window.moment == pytest.approx(end - number * 14 * DAY, abs=1.0)
        assert window.history.occurred_at.max() < window.moment
        assert window.moment - dataset.occurred_at.min() >= 14 * DAY - 1.0
        after = (dataset.occurred_at >= window.moment) & (dataset.occurred_at < window.moment + 14 * DAY)
        bought = after & (dataset.event_type == 1)
        known = np.isin(dataset.user, dataset.user[dataset.occurred_at < window.moment])
        assert window.purchases.sum() == np.count_nonzero(bought & known)
    assert len(found) == 7


def test_a_part_of_a_window_is_that_of_its_users() -> None:
    dataset, _ = simulated(users=300)
    whole = read_window(dataset, 90 * DAY, 14, 1)
    part = whole.of(np.array([0, 5, 9]))
    assert part.users.tolist() == whole.users[[0, 5, 9]].tolist()
    for row, user in enumerate((0, 5, 9)):
        own = set(whole.bought_item[whole.bought_user == user].tolist())
        assert set(part.bought_item[part.bought_user == row].tolist()) == own
    assert part.history.counts.tolist() == whole.history.counts[[0, 5, 9]].tolist()


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    """A network whose only knowledge is which items are popular."""
    dataset, _ = simulated()
    return fit(dataset.between(0.0, 92 * DAY), QUICK, max_history=50, phase="test", epochs=1).weights


def test_probabilities_are_calibrated_and_beat_recency_frequency_and_amount(weights: dict[str, Any]) -> None:
    dataset, _ = simulated(users=8000)
    fitted = fit_outcomes(dataset, earlier=weights, earlier_end=92 * DAY, horizon=14, max_history=50, seed=1)
    assert set(fitted.tensors) == set(SHAPES)
    value = {(metric.method, metric.metric): metric.value for metric in fitted.metrics}
    assert value["pgvae", "churn_log_loss"] < value["base_rate", "churn_log_loss"]
    assert value["pgvae", "churn_log_loss"] <= value["rfm", "churn_log_loss"]
    for method in ("rfm", "base_rate"):
        lead = value[method, "churn_log_loss"] - value["pgvae", "churn_log_loss"]
        assert value[method, "churn_log_loss_lead"] == pytest.approx(lead)
    assert value["pgvae", "churn_auc"] > 0.75
    # The longer somebody has done nothing, the likelier it is that nothing follows.
    newest = windows(dataset, 14, 1)[0]
    now, later = (
        outlook(fitted.tensors, newest.history, as_of, targets=dataset.targets, types=len(dataset.event_types)).purchase
        for as_of in (newest.as_of, newest.as_of + 28 * DAY)
    )
    assert np.nanmean(later < now) > 0.9
    assert value["pgvae", "churn_ece"] < 0.03
    assert value["pgvae", "response_calibration_error"] < 0.2
    assert value["pgvae", "response_lift"] > 1.5 > value["random", "response_lift"]
    bands = [point for point in fitted.curves if point.curve == "churn_bands"]
    assert [point.label for point in bands] == ["low", "medium", "high"]
    assert bands[0].x < 0.5 <= bands[1].x < 0.8 <= bands[2].x
    assert [point.y for point in bands] == pytest.approx([point.x for point in bands], abs=0.06)
    curves = {(point.curve, point.method) for point in fitted.curves}
    assert {
        ("churn_calibration", "pgvae"),
        ("response_calibration", "pgvae"),
        ("response_lift", "popularity"),
    } <= curves
    # Nobody else's network may have seen the truth.
    with pytest.raises(ValueError, match="newest horizon"):
        fit_outcomes(dataset, earlier=weights, earlier_end=119 * DAY, horizon=14, max_history=50, seed=1)


def test_what_foretells_the_newest_horizon_does_not_know_it(weights: dict[str, Any]) -> None:
    dataset, _ = simulated()
    newest = windows(dataset, 14, 1)[0]
    # Who viewed something then bought it, and the other way round.
    is_newest = dataset.occurred_at >= newest.moment
    other = dataclasses.replace(dataset, event_type=np.where(is_newest, 1 - dataset.event_type, dataset.event_type))
    foretold = []
    for given in (dataset, other):
        fitted = fit_outcomes(given, earlier=weights, earlier_end=91 * DAY, horizon=14, max_history=50, seed=1)
        foretold.append(
            [
                (point.curve, point.method, point.position, point.x)
                for point in fitted.curves
                if point.curve in ("churn_calibration", "response_calibration", "churn_bands")
            ]
        )
        (brier,) = (m.value for m in fitted.metrics if (m.method, m.metric) == ("base_rate", "churn_brier"))
        rate = windows(given, 14, 1)[1].has_bought.mean()
        assert brier == pytest.approx(((windows(given, 14, 1)[0].has_bought - rate) ** 2).mean())
    assert {method for _, method, _, _ in foretold[0]} == {"pgvae", "rfm"}
    assert foretold[0] == foretold[1]


def test_too_few_days_or_buyers_are_told() -> None:
    dataset, _ = simulated()
    assert too_little(dataset, 28, 1) == ""
    assert too_little(dataset, 31, 1) == (
        "the events span 119 days, 4 horizons of 31 days are 124:"
        " train again then, or after vae.set_options with horizon_days of at most 29"
    )
    # Neither a number of days that would be enough, nor a horizon that would not.
    span = (dataset.occurred_at.max() - dataset.occurred_at.min()) / DAY
    assert f"{span:.0f}" == "120"
    assert "span 119 days, 4 horizons of 30 days are 120:" in too_little(dataset, 30, 1)
    assert too_little(dataset.between(0.0, 3 * DAY), 1, 1) == (
        "the events span 2 days, 4 horizons of 1 days are 4: train again then"
    )
    few = dataclasses.replace(dataset, event_type=np.where(dataset.user < 3, dataset.event_type, 0))
    assert "users bought and" in too_little(few, 14, 1)
    fitted = fit_outcomes(few, earlier={}, earlier_end=0.0, horizon=14, max_history=50, seed=1)
    assert (fitted.tensors, fitted.metrics) == ({}, [])
    assert fitted.missing == too_little(few, 14, 1)


def test_a_horizon_in_which_half_of_the_users_bought_nothing_is_told(weights: dict[str, Any]) -> None:
    dataset, _ = simulated()
    quiet = (dataset.user % 2 == 0) & (dataset.occurred_at >= 92 * DAY) & (dataset.occurred_at < 107 * DAY)
    few = dataclasses.replace(dataset, event_type=np.where(quiet, 0, dataset.event_type))
    assert too_little(few, 14, 1) == ""
    fitted = fit_outcomes(few, earlier=weights, earlier_end=92 * DAY, horizon=14, max_history=50, seed=1)
    assert (fitted.tensors, fitted.metrics) == ({}, [])
    assert fitted.missing.startswith("nobody in one half of the users bought in the horizon from 1970-04-03 on")


def test_the_odds_of_items_are_fitted_with_a_network_of_the_published_kind(weights: dict[str, Any]) -> None:
    dataset, _ = simulated()
    final = Fit(weights=weights, best_epoch=1, curve=[], shortcut=NO_SHORTCUT)
    evaluation = Evaluation(fit=dataclasses.replace(final, weights={}), metrics=[], learned_until=92 * DAY)
    earlier = _Earlier(
        dataset=dataset,
        config=QUICK,
        max_history=50,
        evaluation=evaluation,
        final=final,
        checkpoints=Checkpoints(Path("/dev/null")),
    )
    # That of the evaluation has learned from the very moment.
    trained, end = earlier.network(92 * DAY, "outcomes")
    assert trained["shortcut_item"].size == 0
    assert end == 92 * DAY
    known, end = earlier.network(93 * DAY, "outcomes")
    assert known == {}
    assert 92 * DAY < end < 92 * DAY + 1


# In the database


@pytest.fixture(scope="module")
def training() -> list[Training]:
    """What the training of `shop` gave, once it ran."""
    return []


@pytest.fixture(scope="module")
def shop(server: Server, template: str, training: list[Training]) -> Iterator[Connection]:
    """A shop with heads of a horizon of seven days, of an archive of 2024, refreshed.

    User 500 has no events at all.
    """
    name = "outcomes"
    create_database(server, name, template)
    dsn = server.dsn(name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        SHOP.make(connection)
        connection.execute("create table users as select distinct user_id from events union all select 500::bigint")
        connection.execute(
            "create table items as select i::bigint as item_id, chr(64 + i % 3) as category"
            " from generate_series(1, 13) i"
        )
        SHOP.create_model(connection, options=SMALL | {"horizon_days": HORIZON}, users="users", items="items")
        training.append(run_training(dsn, "shop", QUICK))
        connection.execute("select * from vae.activate('shop', 1, force => true)")
        connection.execute("call vae.refresh('shop')")
        yield connection
    drop_database(server, name)


def test_a_training_measures_beside_its_baselines(shop: Connection, training: list[Training]) -> None:
    assert training[0].outcomes.missing == ""
    rows = shop.execute(
        "select method, metric from vae.metrics where split = 'horizon' and metric like 'churn%'"
    ).fetchall()
    assert {
        ("pgvae", "churn_auc"),
        ("rfm", "churn_auc"),
        ("pgvae", "churn_ece"),
        ("base_rate", "churn_log_loss"),
    } <= set(rows)
    curves = shop.execute("select distinct curve from vae.curves").fetchall()
    assert {("churn_calibration",), ("response_calibration",), ("response_lift",)} <= set(curves)


def test_as_many_are_expected_to_buy_as_bought_where_behaviour_foretells_nothing(shop: Connection) -> None:
    with psycopg.connect(shop.info.dsn) as other:
        dataset = read_dataset(other, "shop")
        version = other.execute("select version_id from vae.versions").fetchall()[0][0]
        weights = read_weights(other, version)
    # The window that the published heads were calibrated on.
    newest = windows(dataset, HORIZON, 1)[0]
    found = outlook(weights, newest.history, newest.as_of, targets=dataset.targets, types=len(dataset.event_types))
    assert found.purchase.mean() == pytest.approx(newest.has_bought.mean(), abs=1e-4)


def test_in_a_shop_of_few_items_the_curve_of_bestsellers_begins_at_nothing(database: str) -> None:
    few = dataclasses.replace(SHOP, item_keys=range(1, 6))
    with psycopg.connect(database, autocommit=True) as connection:
        few.make(connection)
        few.create_model(connection, options=SMALL | {"horizon_days": HORIZON})
        run_training(database, "shop", QUICK)
        points = connection.execute(
            "select x, y from vae.curves where curve = 'response_lift' and method = 'popularity' and x < 0.201"
        ).fetchall()
        lift = connection.execute(
            "select value from vae.metrics where metric = 'response_lift' and method = 'popularity'"
        ).fetchone()
    # A fifth of the pairs are of the most popular item: of these, all are equal.
    assert len(points) == 4
    assert [y / x for x, y in points] == pytest.approx([points[-1][1] / points[-1][0]] * 4)
    assert lift == pytest.approx((points[0][1] / points[0][0],))


def test_in_a_shop_of_dates_the_last_day_that_was_learned_is_none_of_the_truth(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def watched(dataset: Dataset, **arguments: Any) -> OutcomeFit:
        given.update(arguments, dataset=dataset)
        return fit_outcomes(dataset, **arguments)

    monkeypatch.setattr("pgvae.train.fit_outcomes", watched)
    dates = dataclasses.replace(SHOP, item_keys=range(1, 41), time_type="date")
    with psycopg.connect(database, autocommit=True) as connection:
        dates.make(connection)
        dates.create_model(connection, options=SMALL | {"horizon_days": HORIZON})
    assert {metric.split for metric in run_training(database, "shop", QUICK).metrics} == {"temporal"}
    learned = next(temporal(given["dataset"])).train.occurred_at.max()
    assert learned < given["earlier_end"] < learned + 1


def test_live_and_materialized_churn_are_the_same(shop: Connection) -> None:
    rows = shop.execute(
        "select c.churn_probability, l.churn_probability, c.expected_purchases, l.expected_purchases,"
        " c.risk_band, l.risk_band,"
        " c.reasons, l.reasons, c.last_event_at = l.last_event_at, c.horizon_days, c.is_cold_start, c.model_version"
        " from shop.churn c, shop.churn(c.user_id) l where c.user_id <= 40"
    ).fetchall()
    assert len(rows) == 40
    for churn, live, expected, live_expected, *same in rows:
        assert live == pytest.approx(churn, rel=1e-6)
        assert live_expected == pytest.approx(expected, rel=1e-6)
        assert same[0] == same[1]
        assert same[2:4] == [same[2]] * 2
        assert same[4:] == [True, HORIZON, False, 1]
    total = shop.execute(
        "select count(*), count(distinct user_id), min(churn_probability + purchase_probability) from shop.churn"
    ).fetchone()
    assert total is not None
    assert total[:2] == (161, 161)
    assert total[2] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "answers",
    [
        "select user_key, reasons, round(expected_purchases::numeric, 4) from m, vae_private.churn_all(m.model_id)",
        "select user_key, segment, round(similarity::numeric, 4) from m, vae_private.segment_all(m.model_id)",
        "select user_key, item_key, because, event_counts from m, vae_private.explain_all(m.model_id)",
        "select user_id, item_id, round(score::numeric, 4)"
        " from shop.recommend_for_users(array(select user_id from users))",
        "select user_id, round(response_probability::numeric, 4) from shop.audience(4)",
        "select user_id, round(score::numeric, 4)"
        " from shop.score_pairs(array(select user_id from users), array(select 4 from users))",
        "select user_id, item_id, round(score::numeric, 4) from shop.score_pairs('{1,2,3}', '{4,5,6}')",
    ],
)
def test_an_event_that_stands_twice_counts_once(shop: Connection, answers: str) -> None:
    """The events of many users are read as they stand in the table."""
    query = f"with m as (select model_id from vae.models where name = 'shop') {answers}".encode()
    once = sorted(shop.execute(query).fetchall(), key=str)
    with shop.transaction(force_rollback=True):
        shop.execute("insert into events select * from events where user_id < 100")
        assert sorted(shop.execute(query).fetchall(), key=str) == once
    assert once


def test_a_user_without_events_cannot_leave(shop: Connection) -> None:
    for query in ("select * from shop.churn(500)", "select * from shop.churn where user_id = 500"):
        row = shop.execute(query).fetchone()
        assert row is not None
        assert row[0] == 500
        assert list(row[1:7]) == [None] * 6
        assert row[7:10] == (HORIZON, True, 1)
    assert shop.execute("select shop.response(500, 3)").fetchone() == (None,)
    assert shop.execute("select count(*), count(probability) from shop.recommend(500)").fetchone() == (10, 0)
    assert shop.execute("select count(*) from shop.audience(3) where user_id = 500").fetchone() == (0,)
    assert shop.execute("select * from shop.churn(null)").fetchall() == []


def test_the_clock_counts_for_a_living_shop_and_not_for_an_archive(shop: Connection) -> None:
    query = (
        "select (select churn_probability from shop.churn(1)),"
        " (select string_agg(reason, '; ') from shop.explain_churn(1))"
    )
    archived = shop.execute(query).fetchone()
    assert archived is not None
    # A session of its own: this one has read the version.
    with psycopg.connect(shop.info.dsn) as other:
        other.execute("update vae.versions set window_end = created_at - interval '1 day'")
        living = other.execute(query).fetchone()
        other.rollback()
    assert living is not None
    # Here nobody leaves: which of the two is greater, nothing foretells.
    assert living[0] != archived[0]
    years = shop.execute(
        "select floor(extract(epoch from now() - max(occurred_at)) / 86400)::integer from events where user_id = 1"
    )
    days = years.fetchone()
    assert days is not None
    assert f"{days[0]} days" in living[1]
    assert f"{days[0]} days" not in archived[1]


def test_reasons_add_up_to_the_distance_from_the_average_user(shop: Connection) -> None:
    rows = shop.execute("select rank, reason, contribution, model_version from shop.explain_churn(7)").fetchall()
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    ((one, other),) = shop.execute(
        "select ln(a.churn_probability / a.purchase_probability), ln(b.churn_probability / b.purchase_probability)"
        " from shop.churn(7) a, shop.churn(8) b"
    ).fetchall()
    rest = sum(row[2] for row in shop.execute("select * from shop.explain_churn(8)").fetchall())
    assert sum(row[2] for row in rows) - rest == pytest.approx(one - other, abs=1e-4)
    assert shop.execute("select * from shop.explain_churn(500)").fetchall() == []


def test_reasons_count_days_back_from_the_end_of_an_archive(shop: Connection) -> None:
    rows = shop.execute(
        """
        with ages as (
            select e.user_id, e.event_type, floor(extract(epoch from greatest(v.window_end, max(e.occurred_at) over own)
                - e.occurred_at) / 86400) as day
            from events e, vae.versions v
            where e.user_id <= 60 and v.state = 'active'
            window own as (partition by e.user_id)
        )
        select a.user_id, count(distinct a.day) filter (where a.day < 7),
            count(distinct a.day) filter (where a.event_type = 'purchase'), max(a.day), min(a.day),
            (select string_agg(r.reason, '; ') from shop.explain_churn(a.user_id) r)
        from ages a
        group by a.user_id
        """
    ).fetchall()
    for _, active, buying, first, last, reasons in rows:
        found = {words: int(days) for words, days in re.findall(r"([a-z][a-z ]+) (\d+) days?", reasons)}
        assert (found["active on"], found.get("bought on", 0), found["first seen"]) == (active, buying, first)
        assert found.get("last event", last) == last
    assert len(rows) == 60


def test_no_two_reasons_say_the_same_and_a_last_purchase_is_told_with_the_days_between_two(shop: Connection) -> None:
    rows = shop.execute(
        """
        select
            max(e.occurred_at) filter (where e.event_type = 'purchase') = max(e.occurred_at) as bought_last,
            extract(epoch from max(e.occurred_at) filter (where e.event_type = 'purchase')
                - min(e.occurred_at) filter (where e.event_type = 'purchase')) / 86400 as days,
            (select string_agg(r.reason, '; ') from shop.explain_churn(e.user_id) r) as reasons
        from events e
        where e.user_id <= 60
        group by e.user_id
        having bool_or(e.event_type = 'purchase')
        """
    ).fetchall()
    for bought_last, days, reasons in rows:
        assert ("last event" in reasons) is not bought_last
        buying_days = int(re.findall(r"bought on (\d+) day", reasons)[0])
        if buying_days == 1:
            assert "only purchase" in reasons
        else:
            between = re.findall(r"last purchase \d+ days? ago, with (\d+) days? between two on average", reasons)
            assert between == [str(int(float(days) / (buying_days - 1)))]
    assert {row[0] for row in rows} == {False, True}


def test_probability_follows_the_score(shop: Connection) -> None:
    rows = shop.execute("select probability, score from shop.recommend(3, k => 12) order by rank").fetchall()
    assert all(p is not None and 0 < p < 1 for p, _ in rows)
    assert [p for p, _ in rows] == sorted((p for p, _ in rows), reverse=True)
    stored = shop.execute(
        "select r.probability, l.probability, c.purchase_probability from shop.recommendations r"
        " join shop.recommend(3) l using (item_id) join shop.churn c using (user_id) where r.user_id = 3"
    ).fetchall()
    assert len(stored) == len(rows[:10])
    for p, live, any_purchase in stored:
        assert live == pytest.approx(p, rel=1e-5)
        assert p <= any_purchase


def test_a_share_too_small_for_its_type_has_no_probability(shop: Connection, tmp_path: Path) -> None:
    def one_far_above(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["output_bias"][0] += np.float32(300)

    with psycopg.connect(shop.info.dsn) as connection:
        export_version(connection, "shop", tmp_path / "version")
        import_version(connection, rewritten(tmp_path / "version", tmp_path / "changed", one_far_above))
    shop.execute("select * from vae.activate('shop', 2, force => true)")
    try:
        shop.execute("call vae.refresh('shop', array['recommendations', 'churn'])")
        rows = shop.execute(
            "select r.score, r.probability, l.probability from shop.recommendations r"
            " join shop.recommend(3) l using (item_id) where r.user_id = 3"
        ).fetchall()
        assert {(stored, live) for score, stored, live in rows if score == 0} == {(0, 0)}
    finally:
        shop.execute("select * from vae.rollback('shop')")
        shop.execute("call vae.refresh('shop')")


def test_the_probability_among_candidates_is_that_of_the_whole_catalogue(shop: Connection) -> None:
    with shop.transaction(force_rollback=True):
        shop.execute("create table season as select generate_series(1, 6)::bigint as item_id")
        shop.execute("select * from vae.set_candidates('shop', 'season', 'season', for_refresh => true)")
        among = dict(
            shop.execute(
                """select item_id, probability from shop.recommend(3, 12, '{"candidates": "season"}')"""
            ).fetchall()
        )
        whole = dict(shop.execute("select item_id, probability from shop.recommend(3, 12)").fetchall())
        assert among
        assert among == pytest.approx({item: whole[item] for item in among})
        # Refreshed scores are then shares among the candidates.
        assert shop.execute("select count(probability) from shop.recommendations").fetchone() == (0,)


def test_an_audience_is_ranked_by_the_response(shop: Connection) -> None:
    rows = shop.execute("select * from shop.audience(4, k => 20)").fetchall()
    assert [row[0] for row in rows] == list(range(1, 21))
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    for _, user, response, has_bought, version, uplift in rows[:5]:
        assert shop.execute("select shop.response(%s, 4)", [user]).fetchone() == (pytest.approx(response, rel=1e-5),)
        bought = shop.execute(
            "select exists (select from shop.clean_events"
            " where user_id = %s and item_id = 4 and event_type = 'purchase')",
            [user],
        ).fetchone()
        assert bought == (has_bought,)
        assert (version, uplift) == (1, None)
    everybody = shop.execute("select count(*) from shop.audience(4, k => 100000)").fetchone()
    assert everybody == (160,)


@pytest.mark.parametrize(
    ("call", "first"),
    [("audience_of_category('A')", "refresh_events"), ("demand_by_category()", "item_features")],
)
def test_who_asks_by_category_locks_views_in_the_order_of_a_change(shop: Connection, call: str, first: str) -> None:
    views = "relation in (select oid from pg_class where relnamespace = 'shop'::regnamespace)"
    with ThreadPoolExecutor(1) as threads, psycopg.connect(shop.info.dsn) as holder:
        holder.execute(f"lock table shop.{first}".encode())
        reading = threads.submit(shop.execute, f"select count(*) from shop.{call}".encode())
        waits = f"select from pg_locks where not granted and {views}".encode()
        while not reading.done() and holder.execute(waits).fetchone() is None:
            time.sleep(0.01)
        # Not those of autovacuum.
        held = f"select count(*) from pg_locks where granted and pid = {shop.info.backend_pid} and {views}".encode()
        assert holder.execute(held).fetchone() == (0,)
        holder.rollback()
        assert reading.result(60).fetchone() != (0,)


def test_an_audience_of_several_items_answers_to_any_of_them(shop: Connection) -> None:
    ((one, other, either),) = shop.execute(
        "select shop.response(9, 2), shop.response(9, 5), shop.response_to_items(9, array[2, 5]::bigint[])"
    ).fetchall()
    assert max(one, other) < either < one + other
    of_category = shop.execute(
        "select user_id, response_probability from shop.audience_of_category('A', k => 9)"
    ).fetchall()
    items = shop.execute("select array_agg(item_id) from items where category = 'A'").fetchone()
    assert items is not None
    by_items = shop.execute(
        "select user_id, response_probability from shop.audience_of_items(%s::bigint[], k => 9)", items
    ).fetchall()
    assert of_category == by_items
    # The table may hold an item twice.
    with shop.transaction(force_rollback=True):
        shop.execute("insert into items select * from items")
        twice = shop.execute("select user_id, response_probability from shop.audience_of_category('A', k => 9)")
        assert twice.fetchall() == by_items


def test_options_of_an_audience(shop: Connection) -> None:
    buyers = shop.execute("select count(*) from shop.audience(4) where has_bought").fetchone()
    assert buyers is not None
    assert buyers[0] > 0
    rest = shop.execute(
        """select count(*), bool_or(has_bought) from shop.audience(4, options => '{"exclude_buyers": true}')"""
    ).fetchone()
    assert rest == (160 - buyers[0], False)
    median = shop.execute(
        "select percentile_cont(0.5) within group (order by response_probability) from shop.audience(4)"
    ).fetchone()
    assert median is not None
    above = shop.execute(
        "select count(*), min(response_probability) from shop.audience("
        "4, options => jsonb_build_object('min_probability', %s::float8))",
        median,
    ).fetchone()
    assert above is not None
    assert 0 < above[0] < 160
    assert above[1] >= median[0]


def test_an_audience_among_some_users(shop: Connection) -> None:
    everybody = shop.execute(
        "select user_id, response_probability from shop.audience(4, 1000) order by rank"
    ).fetchall()
    with shop.transaction(force_rollback=True):
        # Whoever stands there twice, is null or unknown is no more and no less.
        shop.execute("create table opted_in as select user_id from users where user_id % 3 = 0")
        shop.execute("insert into opted_in values (3), (null), (123456); alter table opted_in rename user_id to person")
        options = """{"among": "public.opted_in", "among_key": "person"}"""
        some = shop.execute(
            "select rank, user_id, response_probability from shop.audience(4, 1000, %s) order by rank", [options]
        ).fetchall()
        expected = [row for row in everybody if row[0] % 3 == 0]
        assert [row[:2] for row in some] == [(rank, user) for rank, (user, _) in enumerate(expected, start=1)]
        assert [row[2] for row in some] == pytest.approx([row[1] for row in expected], rel=1e-5)
        # The column may be called as in the events.
        shop.execute("update vae.models set user_id_column = 'person'")
        found = shop.execute(
            """select user_id from shop.audience(4, 1000, '{"among": "public.opted_in"}') order by rank"""
        ).fetchall()
        assert found == [(user,) for _, user, _ in some]
        shop.execute("create temporary table few as select 9::integer as user_id")
        found = shop.execute("""select user_id from shop.audience_of_category('A', 5, '{"among": "pg_temp.few"}')""")
        assert found.fetchall() == [(9,)]


def test_an_offer_among_some_users_spends_its_budget_on_them(shop: Connection, role: str) -> None:
    notices: list[str] = []
    handler = lambda notice: notices.append(str(notice.message_primary))  # noqa: E731
    shop.add_notice_handler(handler)
    shop.execute("create table subscribers as select user_id::integer from users where user_id % 3 = 0")
    try:
        among = "value => 40, cost => 0.5, budget => 5, among => 'subscribers'"
        shop.execute(
            f"select vae.create_offer('shop', 'some', array[3], {among}),"
            " vae.create_offer('shop', 'all', array[3], value => 40, cost => 0.5, budget => 5)"
        )
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        listed = "select rank, user_id, is_chosen from shop.offer_responses where offer = %s order by rank"
        some, everybody = (shop.execute(listed, [name]).fetchall() for name in ("some", "all"))
        assert [row[1] for row in some] == [user for _, user, _ in everybody if user % 3 == 0]
        assert [row[0] for row in some if row[2]] == list(range(1, 11)), "a budget of 5 at half each"
        stored = shop.execute("select among_schema, among_table, among_column from vae.offers order by name").fetchall()
        assert stored == [(None, None, None), ("public", "subscribers", "user_id")]
        # An operator makes offers; what a refresh reads with the owner's rights, the owner alone names.
        shop.execute(f"grant vae_operator to {role}; grant usage on schema shop to {role}")
        shop.execute(f"grant select on subscribers to {role}")
        with psycopg.connect(as_role(shop.info.dsn, role), autocommit=True) as other:
            other.execute("select vae.create_offer('shop', 'theirs', array[3])")
            refused = refusal(other, f"select vae.create_offer('shop', 'mine', array[3], {among})")
            assert (refused.sqlstate, refused.message_primary) == ("42501", "model shop belongs to postgres")
            forged = refusal(
                other,
                "insert into vae.offers (model_id, name, item_keys, max_users, exclude_buyers, choose_by, among_schema,"
                " among_table, among_column)"
                " select model_id, 'mine', '{3}', 5, false, 'response', 'public', 'evil', 'user_id' from vae.models",
            )
            assert (forged.sqlstate, "row-level security" in str(forged.message_primary)) == ("42501", True)
        # Emptied by mistake, or gone: nobody is asked.
        for change, message in (
            ("truncate subscribers", "offer some is left out: among: public.subscribers lists no users"),
            ("drop table subscribers", "offer some is left out: among: users cannot be read from public.subscribers"),
        ):
            notices.clear()
            shop.execute(change)
            shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
            assert shop.execute(listed, ["some"]).fetchall() == []
            assert len(shop.execute(listed, ["all"]).fetchall()) == len(everybody)
            assert [notice for notice in notices if notice.startswith(message)]
            logged = shop.execute("select left_out from vae.refreshes order by refresh_id desc limit 1").fetchone()
            assert logged is not None
            assert logged[0].startswith(message.replace("offer some is left out: ", "some: "))
            told = shop.execute(
                "select status, detail, remedy like '%vae.drop_offer(''shop'', ...)%' from vae.health_checks"
                " where check_name = 'last refresh'"
            ).fetchone()
            assert told == ("warning", f"offers were left out: {logged[0]}", True)
        shop.execute("select vae.drop_offer('shop', 'some')")
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        last = "select status from vae.health_checks where check_name = 'last refresh'"
        assert shop.execute(last).fetchall() == [("ok",)]
    finally:
        shop.remove_notice_handler(handler)
        shop.execute("delete from vae.offers")
        shop.execute(f"drop table if exists subscribers; drop owned by {role}")


def test_what_passes_by_itself_empties_no_offer(shop: Connection) -> None:
    shop.execute("create table subscribers as select user_id from users where user_id % 3 = 0")
    listed = "select count(*), min(scored_at) from shop.offer_responses"
    try:
        shop.execute("select vae.create_offer('shop', 'some', array[3], among => 'subscribers')")
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        before = shop.execute(listed).fetchall()
        assert before[0][0] > 0
        shop.execute("set lock_timeout = '100ms'")
        with psycopg.connect(shop.info.dsn) as other:
            other.execute("lock table subscribers")
            refused = refusal(shop, "call vae.refresh('shop', views => '{offer_responses}')")
        assert refused.sqlstate == "55P03"
        assert "cannot be read from public.subscribers" in str(refused.message_primary)
        assert shop.execute(listed).fetchall() == before
        state = shop.execute("select state from vae.refreshes order by refresh_id desc limit 1").fetchone()
        assert state == ("failed",)
    finally:
        shop.execute("reset lock_timeout; delete from vae.offers; drop table subscribers")
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")


def test_offers_among_the_same_users_read_them_once(shop: Connection) -> None:
    shop.execute(
        "create sequence readings; create view subscribers as"
        " select user_id, user_id as person from users where (select nextval('readings')) > 0"
    )
    try:
        for number, key in enumerate(("user_id", "user_id", "person", "user_id")):
            shop.execute(
                f"select vae.create_offer('shop', 'offer {number}', array[3], among => 'subscribers', among_key => %s)",
                [key],
            )
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        assert shop.execute("select last_value from readings").fetchone() == (2,)
        counted = "select distinct count(*) over (partition by offer) from shop.offer_responses"
        assert len(shop.execute(counted).fetchall()) == 1
    finally:
        shop.execute("delete from vae.offers; drop view subscribers; drop sequence readings")


def test_a_list_of_users_under_another_name_is_refused_with_the_option_that_names_it(shop: Connection) -> None:
    found = refusal(shop, """select * from shop.audience(1, options => '{"among": "public.items"}')""")
    assert found.message_hint == "name the column of public.items that holds the keys of the users with among_key"


@pytest.mark.parametrize(
    ("query", "state", "message"),
    [
        ("select shop.response(1, 99)", "VA051", "item 99 is not in the catalogue of version 1 of model shop"),
        ("select shop.response_to_items(1, array[]::bigint[])", "22023", "items names no item"),
        ("select shop.response_to_items(1, array[3, 3]::bigint[])", "22023", "items names item 3 twice"),
        ("select * from shop.audience(99)", "VA051", "item 99 is not in the catalogue of version 1 of model shop"),
        ("select * from shop.audience_of_items(array[1, null]::bigint[])", "22023", "items names item null"),
        ("select * from shop.audience(1, k => 0)", "22023", "k is 0"),
        ("select * from shop.audience(1, k => null)", "22023", "k is null"),
        ("set local vae.max_threads = 0; select * from shop.audience(1)", "22023", "vae.max_threads is '0'"),
        ("""select * from shop.audience(1, options => '{"limit": 3}')""", "22023", "option 'limit' is unknown"),
        ("""select * from shop.audience(1, options => '{"min_probability": 2}')""", "22023", "'min_probability' is 2"),
        ("""select * from shop.audience(1, options => '{"exclude_buyers": 1}')""", "22023", "'exclude_buyers' is 1"),
        ("""select * from shop.audience(1, options => '{"among": 1}')""", "22023", "'among' is 1"),
        ("""select * from shop.audience(1, options => '{"among_key": "x"}')""", "22023", "'among' is not given"),
        ("select * from shop.audience_of_items('{{1,2},{3,4}}')", "22023", "items has more than one dimension"),
        ("select shop.response_to_items(1, '{{1,2},{3,4}}')", "22023", "items has more than one dimension"),
        ("""select * from shop.audience(1, options => '{"among": "public.nobody"}')""", "42P01", "public.nobody"),
        ("""select * from shop.audience(1, options => '{"among": "public.items"}')""", "42703", "user_id"),
        (
            """select * from shop.audience(1, options => '{"among": "public.items", "among_key": "category"}')""",
            "22P02",
            "cannot be read from public.items",
        ),
        (
            """select * from shop.audience(1, options => '{"among": "public.users; drop table events"}')""",
            "42602",
            "cannot be read from",
        ),
        ("select * from shop.audience_of_category('Z')", "22023", "has the category \"Z\""),
        ("select * from shop.audience_of_category('Z', column_name => 'hue')", "42703", 'reads no column "hue"'),
    ],
)  # fmt: skip
def test_bad_input_is_refused(shop: Connection, query: str, state: str, message: str) -> None:
    found = refusal(shop, query)
    assert found.sqlstate == state
    assert message in (found.message_primary or "")
    assert found.message_hint


def test_who_never_bought_is_answered_like_everybody(shop: Connection) -> None:
    with shop.transaction(force_rollback=True):
        shop.execute("insert into users values (600)")
        shop.execute(
            "insert into events select 600, i, 'view', (select max(occurred_at) from events) - i * interval '1 day'"
            " from generate_series(1, 4) i"
        )
        churn = shop.execute("select churn_probability, expected_purchases, reasons from shop.churn(600)").fetchone()
        assert churn is not None
        assert 0 < churn[0] < 1
        assert churn[1] > 0
        reasons = shop.execute("select reason, contribution from shop.explain_churn(600) order by rank").fetchall()
        words = [reason for reason, _ in reasons]
        assert len(words) == len(set(words)) == 4
        assert "no purchase yet" in words
        # Leaving out a group loses nothing: see the sum that two users' logits differ by.
        other = shop.execute("select sum(contribution) from shop.explain_churn(1)").fetchone()
        one = shop.execute("select churn_probability from shop.churn(1)").fetchone()
        assert other is not None
        assert one is not None
        difference = np.log(churn[0] / (1 - churn[0])) - np.log(one[0] / (1 - one[0]))
        assert sum(part for _, part in reasons) - other[0] == pytest.approx(difference, abs=1e-4)
        assert shop.execute("select count(*), bool_or(is_cold_start) from shop.recommend(600, 5)").fetchone() == (
            5,
            False,
        )
        assert shop.execute("select shop.response(600, 3) > 0, shop.because(600, 3) <> ''").fetchone() == (True, True)
        assert shop.execute("select bool_or(has_bought) from shop.audience(3) where user_id = 600").fetchone() == (
            False,
        )


def test_null_asks_for_nothing(shop: Connection) -> None:
    assert shop.execute("select shop.response(null, 3), shop.response(1, null::bigint)").fetchone() == (None, None)
    assert shop.execute("select * from shop.audience(null::bigint)").fetchall() == []
    assert shop.execute("select * from shop.audience_of_category(null)").fetchall() == []


def test_an_offer_that_has_ended_when_it_is_defined_is_told(shop: Connection) -> None:
    notices: list[str | None] = []
    handler = lambda notice: notices.append(notice.message_primary)  # noqa: E731
    shop.add_notice_handler(handler)
    try:
        shop.execute(
            "select vae.create_offer('shop', 'slip', array[3], ends_at => '2025-12-24 00:00+00'),"
            " vae.create_offer('shop', 'later', array[3], ends_at => now() + interval '1 hour')"
        )
    finally:
        shop.remove_notice_handler(handler)
        shop.execute("delete from vae.offers")
    assert notices == ['offer "slip" ended at 2025-12-24 00:00:00+00: it lists nobody']


def test_an_offer_goes_to_whom_the_budget_reaches_and_who_is_worth_it(shop: Connection) -> None:
    try:
        shop.execute("select vae.create_offer('shop', 'spring', array[2, 5], value => 40, cost => 0.5, budget => 20)")
        shop.execute("select vae.create_offer('shop', 'all', array[3], max_users => 500, exclude_buyers => true)")
        shop.execute("select vae.create_offer('shop', 'over', array[3], ends_at => now() - interval '1 day')")
        # Nobody was scored yet, which is not the same as nobody is worth it.
        unknown = (
            "select users, expected_buyers, expected_revenue, total_cost, expected_profit, scored_at from shop.offers"
        )
        assert shop.execute(unknown).fetchall() == [(None,) * 6] * 3
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        logged = shop.execute(
            "select view, state, row_count from vae.refreshes order by refresh_id desc limit 1"
        ).fetchone()
        total = shop.execute("select count(*) from shop.offer_responses").fetchone()
        assert total is not None
        assert logged == ("offer_responses", "succeeded", total[0])
        spring = shop.execute(
            "select user_id, response_probability from shop.offer_responses"
            " where offer = 'spring' order by rank limit 7"
        ).fetchall()
        profits = shop.execute(
            "select expected_profit, response_probability::float8 * 40 - 0.5 from shop.offer_responses"
            " where offer = 'spring'"
        ).fetchall()
        assert [profit for profit, _ in profits] == pytest.approx([expected for _, expected in profits])
        live = shop.execute(
            "select user_id, response_probability from shop.audience_of_items(array[2, 5]::bigint[], 7)"
        ).fetchall()
        assert [user for user, _ in spring] == [user for user, _ in live]
        assert [p for _, p in spring] == pytest.approx([p for _, p in live], rel=1e-5)
        chosen = shop.execute(
            "select count(*), max(rank), bool_and(response_probability * 40 >= 0.5), sum(response_probability::float8)"
            " from shop.offer_responses where offer = 'spring' and is_chosen"
        ).fetchone()
        summed = shop.execute(
            "select users, expected_buyers, expected_revenue, total_cost, expected_profit, items, model_version"
            " from shop.offers where offer = 'spring'"
        ).fetchone()
        assert chosen is not None
        assert summed is not None
        assert chosen[:3] == (40, 40, True), "a budget of 20 at half each"
        assert summed[0] == 40
        assert summed[1] == pytest.approx(chosen[3])
        assert summed[2] == pytest.approx(40 * chosen[3])
        assert summed[3] == 20
        assert summed[4] == pytest.approx(40 * chosen[3] - 20)
        assert summed[5:] == (2, 1)
        free = shop.execute(
            "select count(*), bool_and(is_chosen), bool_or(has_bought), count(expected_profit)"
            " from shop.offer_responses where offer = 'all'"
        ).fetchone()
        buyers = shop.execute("select count(*) from shop.audience(3) where has_bought").fetchone()
        assert buyers is not None
        assert free == (160 - buyers[0], True, False, 0)
        assert shop.execute("select count(*) from shop.offer_responses where offer = 'over'").fetchone() == (0,)
        shop.execute("select vae.drop_offer('shop', 'spring')")
        assert shop.execute("select distinct offer from shop.offer_responses").fetchall() == [("all",)]
        # Who asks too much of a user asks nobody.
        shop.execute("select vae.create_offer('shop', 'dear', array[2], value => 1, cost => 2, max_users => 7)")
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        assert shop.execute("select max(rank) from shop.offer_responses where offer = 'dear'").fetchone() == (7,)
        assert shop.execute(
            "select users, expected_profit, model_version, scored_at is not null from shop.offers where offer = 'dear'"
        ).fetchone() == (0, 0, 1, True)
    finally:
        shop.execute("delete from vae.offers")


def test_offers_begin_and_end_without_a_refresh(shop: Connection) -> None:
    try:
        shop.execute(
            "select vae.create_offer('shop', 'always', array[3], max_users => 4),"
            " vae.create_offer('shop', 'ending', array[3], max_users => 5, ends_at => now() + interval '1 hour'),"
            " vae.create_offer('shop', 'planned', array[3], max_users => 6, starts_at => now() + interval '1 hour')"
        )
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        listed = (
            "select offer, count(*) filter (where is_chosen), bool_and(is_running), min(starts_at) is null,"
            " min(ends_at) is null from shop.offer_responses group by 1 order by 1"
        )
        assert shop.execute(listed).fetchall() == [
            ("always", 4, True, True, True),
            ("ending", 5, True, True, False),
            ("planned", 6, False, False, True),
        ]
        summed = "select offer, users, is_running, scored_at is null from shop.offers order by 1"
        assert shop.execute(summed).fetchall() == [
            ("always", 4, True, False),
            ("ending", 5, True, False),
            ("planned", 6, False, False),
        ]
        shop.execute(
            "update vae.offers set starts_at = starts_at - interval '2 hours', ends_at = ends_at - interval '2 hours'"
        )
        assert shop.execute(listed).fetchall() == [
            ("always", 4, True, True, True),
            ("planned", 6, True, False, True),
        ]
        assert shop.execute(summed).fetchall() == [
            ("always", 4, True, False),
            ("ending", None, False, True),
            ("planned", 6, True, False),
        ]
    finally:
        shop.execute("delete from vae.offers")


def test_an_offer_of_an_item_that_a_later_version_does_not_know_is_left_out(shop: Connection) -> None:
    notices: list[str] = []
    handler = lambda notice: notices.append(str(notice.message_primary))  # noqa: E731
    shop.add_notice_handler(handler)
    try:
        shop.execute(
            "insert into vae.offers (model_id, name, item_keys, max_users, exclude_buyers, choose_by)"
            " select model_id, n, array[k], 5, false, c from vae.models,"
            " (values ('old', '99', 'response'), ('new', '3', 'response'), ('won', '3', 'uplift')) o (n, k, c)"
        )
        shop.execute("call vae.refresh('shop', views => '{offer_responses}')")
        assert shop.execute("select offer, count(*) from shop.offer_responses group by 1").fetchall() == [("new", 5)]
        assert any("offer old is left out" in notice for notice in notices)
        assert "offer won is left out: choose_by is uplift, but version 1 of model shop claims none" in notices
        live = refusal(shop, """select * from shop.audience(3, 9, '{"rank_by": "uplift"}')""")
        assert (live.sqlstate, "claims none" in str(live.message_primary)) == ("VA053", True)
        assert shop.execute("select shop.uplift(1, 3)").fetchone() == (None,)
    finally:
        shop.remove_notice_handler(handler)
        shop.execute("delete from vae.offers")


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        ("'sale', array[]::bigint[]", "22023", "has the items {}"),
        ("'sale', null::bigint[]", "22023", "has the items null"),
        ("'sale', array[1, null]", "22023", "has the items {1,NULL}"),
        ("'sale', array[2, 2]", "22023", "names item 2 twice"),
        ("'sale', array[[1, 2], [3, 4]]", "22023", "has the items {{1,2},{3,4}}"),
        ("'sale', array[99]", "VA051", "item 99 is not in the catalogue of version 1 of model shop"),
        ("'', array[1]", "42602", 'cannot be called ""'),
        ("null, array[1]", "42602", 'cannot be called "null"'),
        ("'sale', array[1], value => -1", "22023", 'value of offer "sale" is -1'),
        ("'sale', array[1], cost => 'nan'", "22023", 'cost of offer "sale" is NaN'),
        ("'sale', array[1], budget => 5", "22023", "a budget of 5 and no cost"),
        ("'sale', array[1], cost => 0, budget => 5", "22023", "a budget of 5 and no cost"),
        ("'sale', array[1], cost => 1, budget => -1", "22023", 'budget of offer "sale" is -1'),
        ("'sale', array[1], choose_by => 'luck'", "22023", 'choose_by of offer "sale" is luck'),
        ("'sale', array[1], max_users => 0", "22023", 'max_users of offer "sale" is 0'),
        ("'sale', array[1], value => 1e400", "22023", 'value of offer "sale" is 1000'),
        ("'sale', array[1], cost => 'infinity'", "22023", 'cost of offer "sale" is Infinity'),
        ("'sale', array[1], max_users => 10000001", "22023", 'max_users of offer "sale" is 10000001'),
        ("'sale', array[1], max_users => null", "22023", 'max_users of offer "sale" is null'),
        ("'sale', array[1], exclude_buyers => null", "22023", 'exclude_buyers of offer "sale" is null'),
        ("'sale', array[1], starts_at => '2025-01-02', ends_at => '2025-01-01'", "22023", "ends_at of offer"),
        ("'sale', array[1], starts_at => '2025-01-01', ends_at => '2025-01-01'", "22023", "ends_at of offer"),
        ("'twice', array[1]", "42710", 'has an offer "twice" already'),
        ("'sale', array[1], among => 'vae.offers_offer_id_seq'", "42809", "offers_offer_id_seq is not a table or view"),
        ("'sale', array[1], among_key => 'nonsense'", "22023", 'among_key of offer "sale" is "nonsense", and among is'),
        ("'sale', array[1], among => 'items'", "42703", 'public.items has no column "user_id"'),
        (
            "'sale', array[1], among => 'items', among_key => 'category'",
            "42804",
            "keys of users differ: bigint in model",
        ),
    ],
)
def test_offers_that_make_no_sense_are_refused(shop: Connection, arguments: str, state: str, message: str) -> None:
    shop.execute("select vae.create_offer('shop', 'twice', array[3])")
    try:
        found = refusal(shop, f"select vae.create_offer('shop', {arguments})")
        assert found.sqlstate == state
        assert message in (found.message_primary or "")
        assert found.message_hint
        assert shop.execute("select name from vae.offers").fetchall() == [("twice",)]
    finally:
        shop.execute("delete from vae.offers")
    gone = refusal(shop, "select vae.drop_offer('shop', 'twice')")
    assert (gone.sqlstate, gone.message_hint) == ("42704", "there are: none")


def test_a_version_without_probabilities_says_so(shared_trained: Connection) -> None:
    user = shared_trained.execute("select user_id from shop.recommendations limit 1").fetchone()
    item = shared_trained.execute("select item_id from shop.recommendations limit 1").fetchone()
    assert user is not None
    assert item is not None
    for query, values in (
        ("select * from shop.churn(%s)", user),
        ("select * from shop.explain_churn(%s)", user),
        ("select shop.response(%s, %s)", (*user, *item)),
        ("select * from shop.audience(%s)", item),
    ):
        found = refusal(shared_trained, query, values)
        assert found.sqlstate == "VA052"
        assert "no calibrated probabilities" in (found.message_primary or "")
        assert "horizon_days" in (found.message_hint or "")
    notices: list[str] = []
    shared_trained.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    shared_trained.execute("call vae.refresh('shop', views => '{churn}')")
    assert any("the view stays empty" in notice for notice in notices)
    assert shared_trained.execute("select count(*) from shop.churn").fetchone() == (0,)
    assert shared_trained.execute("select count(*) > 0, count(probability) from shop.recommendations").fetchone() == (
        True,
        0,
    )
    assert shared_trained.execute(
        "select count(*) > 0, count(probability) from shop.recommend(%s)", user
    ).fetchone() == (True, 0)


def test_whoever_scores_may_ask_and_readers_may_read(shop: Connection, role: str) -> None:
    shop.execute(f"grant vae_scorer to {role}; grant usage on schema shop to {role}")
    shop.execute(f"grant select on events, users, items to {role}")
    try:
        with psycopg.connect(as_role(shop.info.dsn, role)) as other:
            assert other.execute("select count(*) from shop.churn").fetchone() == (161,)
            assert other.execute("select count(probability) > 0 from shop.recommendations").fetchone() == (True,)
            assert other.execute("select count(*) from shop.audience(4, 5)").fetchone() == (5,)
            assert other.execute("select count(*) from shop.audience_of_category('A', 5)").fetchone() == (5,)
            assert other.execute("select user_id from shop.churn(1)").fetchone() == (1,)
            assert other.execute("select count(*) from shop.offers").fetchone() == (0,)
            found = refusal(other, "select vae.create_offer('shop', 'sale', array[1])")
            assert found.sqlstate == "42501"
    finally:
        shop.execute(f"drop owned by {role}")


# Drift


def test_stored_probabilities_are_compared_with_their_first_measurement(shop: Connection) -> None:
    measure = "select subject, psi, status, actual_count from vae.check_drift('shop') where subject ~ 'churn|recomm'"
    try:
        users = shop.execute("select count(*) from shop.churn where churn_probability is not null").fetchone()
        best = shop.execute(
            "select count(*) from shop.recommendations where rank = 1 and probability is not null"
        ).fetchone()
        assert users and best
        first = [("churn", 0.0, "ok", users[0]), ("recommendations", 0.0, "ok", best[0])]
        assert shop.execute(measure).fetchall() == first
        assert shop.execute(measure).fetchall() == first
        shares = shop.execute(
            "select min(least(floor(churn_probability * 10), 9) / 10), count(*)::float8 / sum(count(*)) over ()"
            " from shop.churn where churn_probability is not null group by least(floor(churn_probability * 10), 9)"
        ).fetchall()
        # As if all had been about to stay.
        bins = [{"bin": "0.0 to 0.1", "expected": 1, "actual": 1}]
        shop.execute("update vae.observations set bins = %s where subject = 'churn'", [Jsonb(bins)])
        now = {"0.0": 0.0} | {f"{tenth:.1f}": share for tenth, share in shares}
        expected = sum(
            (max(share, 0.01) - was) * np.log(max(share, 0.01) / was)
            for tenth, share in now.items()
            for was in [1.0 if tenth == "0.0" else 0.01]
        )
        churn, recommendations = shop.execute(measure).fetchall()
        assert churn[1:3] == (pytest.approx(expected), "critical")
        assert recommendations == first[1]
    finally:
        shop.execute("delete from vae.observations")
