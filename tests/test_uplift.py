"""Whom an offer makes buy: what an experiment of known truth says, what is claimed and what not, and the SQL."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from conftest import as_role, create_database, drop_database
from pgvae import outcome_windows
from pgvae.cli.metrics import uplift_verdict
from pgvae.dataset import Dataset, read_dataset
from pgvae.loop import fit
from pgvae.outcome_windows import Setting, Weights
from pgvae.outcomes import fit_heads
from pgvae.server import Server
from pgvae.simulate import SimulationConfig, simulate
from pgvae.train import Training
from pgvae.train import train as run_training
from pgvae.trials import Assignments, Trial, histories_before, read_assignments, trial_of
from pgvae.uplift import NO_COLUMN, UpliftFit, _Subjects, fit_head, fit_uplift
from pgvae.uplift_figures import balance, effects, gains, quantiles
from pgvae_runtime.outcomes import sigmoid
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import SECONDS_PER_DAY as DAY
from pgvae_runtime.tokens import History
from pgvae_runtime.uplift import SHAPES, inputs_of, uplift_of
from shop import BEGIN, QUICK, SMALL, Shop, create_model, refusal

Connection = psycopg.Connection[Any]
HORIZON, DAYS, ITEMS = 7, 100, 20
FIRST, LAST = 60, 92


@dataclass(frozen=True, kw_only=True)
class World:
    """A shop in which somebody ran an experiment, and the true average effect on whoever was assigned."""

    dataset: Dataset
    assignments: Assignments
    effect: float


def world(*, users: int = 2500, each: int = 3, effect: float = 0.15, random: bool = True, seed: int = 1) -> World:
    """Users buy at steady rates of their own; an offer makes them buy more often where the item is to their taste.

    `effect` is the largest one. Where the experiment is not random, the best customers get most offers.
    """
    generator = np.random.default_rng(seed)
    rate = generator.gamma(0.7, 0.15, users)
    taste = generator.integers(0, 4, users)
    user = np.repeat(np.arange(users), generator.poisson(rate * DAYS))
    at = generator.random(len(user)) * DAYS * DAY
    item = np.where(generator.random(len(user)) < 0.7, taste[user] * 5, 0) + generator.integers(0, 5, len(user))
    kind = (generator.random(len(user)) < 0.5).astype(np.int64)
    assigned = np.repeat(np.arange(users), each)
    offered = generator.integers(0, ITEMS, len(assigned))
    moment = generator.uniform(FIRST, LAST, len(assigned)) * DAY
    chance = np.full(len(assigned), 0.5) if random else np.clip(3.0 * rate[assigned], 0.1, 0.9)
    exposed = generator.random(len(assigned)) < chance
    won = effect * np.where(offered // 5 == taste[assigned], 1.0, 0.2)
    more = exposed & (generator.random(len(assigned)) < won)
    user = np.concatenate((user, assigned[more]))
    item = np.concatenate((item, offered[more]))
    at = np.concatenate((at, moment[more] + generator.random(more.sum()) * HORIZON * DAY))
    kind = np.concatenate((kind, np.ones(more.sum(), dtype=np.int64)))
    order = np.lexsort((kind, item, at, user))
    dataset = Dataset(
        user=user[order],
        item=item[order],
        event_type=kind[order],
        occurred_at=at[order],
        weight=np.ones(len(user), dtype=np.float32),
        item_keys=[f"item {number:02}" for number in range(ITEMS)],
        event_types=["view", "purchase"],
        user_count=users,
    )
    # Who buys anyway is not won.
    anyway = 1.0 - np.exp(-rate[assigned] * 0.5 * HORIZON * np.where(offered // 5 == taste[assigned], 0.14, 0.015))
    return World(
        dataset=dataset,
        assignments=Assignments(user=assigned, item=offered, moment=moment, exposed=exposed),
        effect=float((won * (1.0 - anyway)).mean()),
    )


def fitted(made: World, *, asked: list[float] | None = None) -> UpliftFit:
    """Fits the head of uplift with a quick network, and notes until when that one learned."""

    def network(until: float) -> Weights:
        if asked is not None:
            asked.append(until)
        dataset = made.dataset.between(-np.inf, until)
        return fit(dataset, QUICK, max_history=50, phase="test", epochs=2).weights

    return fit_uplift(made.dataset, made.assignments, network, horizon=HORIZON, max_history=50, seed=1)


def value_of(found: UpliftFit, metric: str, method: str = "experiment") -> Any:
    (own,) = [each for each in found.metrics if (each.method, each.metric) == (method, metric)]
    return own


# Arithmetic


def test_effects_of_a_hand_made_experiment() -> None:
    # Of 40 exposed 10 bought, of 60 withheld 6.
    cells = np.repeat([3, 2, 1, 0], [10, 30, 6, 54])
    exposed, withheld, effect = effects(cells, np.arange(100), seed=1)
    assert (exposed.value, withheld.value) == (0.25, 0.1)
    assert effect.value == pytest.approx(0.15)
    # The standard error of the difference of two shares.
    error = np.sqrt(0.25 * 0.75 / 40 + 0.1 * 0.9 / 60)
    assert effect.lower == pytest.approx(0.15 - 1.96 * error, abs=0.02)
    assert effect.upper == pytest.approx(0.15 + 1.96 * error, abs=0.02)
    # Of as many rows of fewer users less is known.
    clustered = effects(cells, np.arange(100) // 10, seed=1)[2]
    assert clustered.upper - clustered.lower > effect.upper - effect.lower


def test_the_qini_coefficient_is_the_area_above_chance() -> None:
    # Offers win the first half alone: the best order wins all of them at half of the way.
    score = -np.arange(400.0)
    exposed = np.arange(400) % 2 == 0
    cells = 2 * exposed + (exposed & (score > -200))
    best = gains(score, cells, np.arange(400), seed=1)
    assert best.gain[0, -1] == pytest.approx(0.5)
    assert best.gain[0, 10] == pytest.approx(0.5)
    assert best.qini[0] == pytest.approx(0.125)
    assert gains(-score, cells, np.arange(400), seed=1).qini[0] == pytest.approx(-0.125)
    assert gains(np.zeros(400), cells, np.arange(400), seed=1).qini[0] == pytest.approx(0.0, abs=0.02)
    assert best.share[[0, -1]].tolist() == [0.0, 1.0]


def test_equal_values_stand_at_their_middle() -> None:
    assert quantiles(np.array([3.0, 1.0, 1.0, 9.0])).tolist() == [0.625, 0.25, 0.25, 0.875]


def test_the_head_finds_the_effects_that_made_the_outcomes() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(60_000, 3)) * [1.0, 2.0, 0.5]
    exposed = generator.random(60_000) < 0.5
    response, effect = np.array([0.8, 0.1, 0.0]), np.array([-0.4, 0.1, 0.3])
    p = sigmoid(x @ response - 2.0 + exposed * (x @ effect + 0.7))
    trial = Trial(
        assignments=Assignments(
            user=np.arange(60_000), item=np.zeros(60_000, dtype=int), moment=np.zeros(60_000), exposed=exposed
        ),
        bought=generator.random(60_000) < p,
        before=world(users=50).dataset,
        begin=0.0,
        horizon=HORIZON,
    )
    head = fit_head(x, trial)
    assert set(head) == set(SHAPES)
    assert head["uplift_response"] == pytest.approx([0.8, 0.1, 0.0, -2.0], abs=0.08)
    assert head["uplift_effect"] == pytest.approx([-0.4, 0.1, 0.3, 0.7], abs=0.12)
    truth = sigmoid(x @ (response + effect) - 1.3) - sigmoid(x @ response - 2.0)
    assert np.abs(uplift_of(head, x) - truth).mean() < 0.01
    # Nothing is said of what lies beyond the experiment.
    for edge, beyond in ((x.max(axis=0), 0.5), (x.min(axis=0), -0.5)):
        assert uplift_of(head, edge[None] + beyond) == pytest.approx(uplift_of(head, edge[None]), rel=1e-5)


def test_inputs_of_probabilities_at_their_ends_are_numbers() -> None:
    found = inputs_of(np.array([0.0, 0.5, 1.0, np.nan]), np.full(4, 0.5), np.array([True, False, False, False]))
    assert np.isfinite(found[:3]).all()
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(uplift_of({name: np.zeros(int(size)) for name, size in SHAPES.items()}, found)).tolist() == [
        False, False, False, True
    ]  # fmt: skip


def test_inputs_are_the_same_in_batches_that_a_large_catalogue_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(users=200)
    weights = fit(made.dataset, QUICK, max_history=50, phase="test", epochs=1).weights
    setting = Setting(dataset=made.dataset, horizon=HORIZON, max_history=50, seed=1)
    heads = fit_heads(setting, weights, -np.inf)
    trial = trial_of(made.dataset, made.assignments, horizon=HORIZON, seed=1)
    assert isinstance(trial, Trial)
    subjects = _Subjects(trial, setting)
    whole = subjects.inputs({**weights, **heads})
    sizes = []

    def counted(weights: Weights, history: History, *, max_history: int) -> Any:
        sizes.append(len(history.counts))
        return score_users(weights, history, max_history=max_history)

    monkeypatch.setattr(outcome_windows, "score_users", counted)
    monkeypatch.setattr(outcome_windows, "_SCORES", 7 * ITEMS)
    np.testing.assert_allclose(subjects.inputs({**weights, **heads}), whole, rtol=1e-4)
    assert max(sizes) == 7


# Outcomes


def events(*rows: tuple[int, int, int, float]) -> Dataset:
    """A data set of (user, item, event type, day); type 1 is a purchase."""
    user, item, kind, day = (np.array(column) for column in zip(*sorted(rows, key=lambda r: (r[0], r[3])), strict=True))
    return Dataset(
        user=user,
        item=item,
        event_type=kind,
        occurred_at=day * DAY,
        weight=np.ones(len(user), dtype=np.float32),
        item_keys=["a", "b", "c"],
        event_types=["view", "purchase"],
        user_count=int(user.max()) + 1,
    )


def given(*rows: tuple[int, int, float, bool]) -> Assignments:
    user, item, day, exposed = (np.array(column) for column in zip(*rows, strict=True))
    return Assignments(user=user, item=item, moment=day * DAY, exposed=exposed)


def test_the_outcome_is_a_purchase_of_the_item_within_the_horizon() -> None:
    dataset = events(
        (0, 0, 0, 0.0), (0, 0, 1, 31.0), (0, 1, 0, 33.0), (1, 1, 0, 1.0), (1, 1, 1, 42.0), (2, 0, 1, 60.0)
    )  # fmt: skip
    trial = trial_of(
        dataset,
        given(
            (0, 0, 30.0, True),  # bought a day later
            (0, 0, 31.5, False),  # within the horizon of the one before: not counted
            (0, 1, 32.0, False),  # viewed only
            (1, 1, 34.0, True),  # bought eight days later
            (1, 1, 42.0, True),  # bought at that moment, the horizon of the one before being over
            (1, 0, 29.0, False),  # bought by others
            (2, 0, 40.0, True),  # no event before
            (0, 2, 40.0, True),  # an item without events
            (0, 0, 55.0, True),  # the horizon is not over
            (0, 0, 20.0, True),  # fewer than four horizons of events before
        ),
        horizon=HORIZON,
        seed=1,
    )
    assert isinstance(trial, Trial)
    rows = zip(
        trial.assignments.user.tolist(), trial.assignments.item.tolist(),
        (trial.assignments.moment / DAY).tolist(), trial.bought.tolist(), strict=True,
    )  # fmt: skip
    assert list(rows) == [
        (1, 0, 29.0, False), (0, 0, 30.0, True), (0, 1, 32.0, False), (1, 1, 34.0, False), (1, 1, 42.0, True)
    ]  # fmt: skip
    assert trial.begin == 29.0 * DAY
    assert trial.before.occurred_at.max() < trial.begin
    before = histories_before(dataset, np.array([0, 0, 1]), np.array([31.0, 31.1, 42.0]) * DAY)
    assert before.counts.tolist() == [1, 2, 1]


def test_what_cannot_be_judged_is_told() -> None:
    dataset = events((0, 0, 0, 0.0), (0, 0, 1, 60.0))
    for assignments, words in (
        (given((0, 0, 58.0, True)), "the horizon of 7 days is not over"),
        (given((0, 0, 20.0, True)), "no assignment has 4 horizons of 7 days of events before it"),
        (given((0, 2, 40.0, True)), "of users and items that had events before"),
        (given((0, 0, 40.0, True)).of(np.zeros(0, dtype=int)), "no assignments of users with events"),
    ):
        found = trial_of(dataset, assignments, horizon=HORIZON, seed=1)
        assert isinstance(found, str)
        assert words in found


# What is claimed


def test_an_effect_is_measured_and_foretold() -> None:
    made, asked = world(effect=0.3), []
    found = fitted(made, asked=asked)
    assert (found.missing, set(found.tensors)) == ("", set(SHAPES))
    # The network has learned from no outcome of an assignment, nor from what the heads are fitted to.
    assert asked[0] <= made.assignments.moment.min() - HORIZON * DAY
    effect = value_of(found, "uplift_average_effect")
    assert effect.lower < made.effect < effect.upper
    area = value_of(found, "uplift_balance_auc")
    assert area.lower < 0.5 < area.upper
    qini = value_of(found, "uplift_qini", "pgvae")
    assert qini.lower > 0
    foretold = value_of(found, "uplift_checked_effect", "pgvae").value
    measured = value_of(found, "uplift_checked_effect")
    assert measured.lower < foretold < measured.upper
    curve = [point for point in found.curves if point.method == "pgvae"]
    assert (curve[0].x, curve[0].y, curve[-1].x) == (0.0, 0.0, 1.0)
    assert curve[-1].y == pytest.approx(measured.value, abs=1e-6)
    assert max(point.y - point.x * curve[-1].y for point in curve) > 0.01


@pytest.mark.parametrize("seed", [1, 2])
def test_without_an_effect_nothing_is_claimed(seed: int) -> None:
    found = fitted(world(effect=0.0, seed=seed))
    assert found.tensors == {}
    assert "the average effect cannot be told from none" in found.missing
    effect = value_of(found, "uplift_average_effect")
    assert effect.lower < 0 < effect.upper


def test_of_offers_to_the_best_customers_nothing_is_claimed() -> None:
    found = fitted(world(random=False))
    assert found.tensors == {}
    assert "the assignments do not look random" in found.missing
    assert value_of(found, "uplift_balance_auc").lower > 0.6
    assert value_of(found, "uplift_average_effect").lower > 0


def test_shares_that_differ_from_item_to_item_do_not_look_random() -> None:
    made = world(effect=0.0)
    share = np.where(made.assignments.item < ITEMS / 2, 0.8, 0.2)
    exposed = np.random.default_rng(1).random(len(share)) < share
    found = fitted(dataclasses.replace(made, assignments=dataclasses.replace(made.assignments, exposed=exposed)))
    assert "the assignments do not look random" in found.missing


def test_of_few_assignments_or_buyers_nothing_is_claimed() -> None:
    found = fitted(world(users=150, each=1))
    assert "there are too few assignments" in found.missing
    assert value_of(found, "uplift_assignments", "exposed").value < 100
    made = world(effect=0.0)
    nobody = made.dataset.event_type * (made.dataset.occurred_at < FIRST * DAY)
    found = fitted(dataclasses.replace(made, dataset=dataclasses.replace(made.dataset, event_type=nobody)))
    assert "there are too few buyers" in found.missing
    one = dataclasses.replace(made.assignments, exposed=np.ones(len(made.assignments), dtype=bool))
    assert "no assignment is withheld" in fitted(dataclasses.replace(made, assignments=one)).missing


# In the database


def make(connection: Connection, made: World, table: str = "events") -> None:
    """Writes a world into a table: assignments are views of the item, but for their column."""
    connection.execute(
        f"create table {table} (user_id bigint, item_id bigint, event_type text, occurred_at timestamptz,"
        " exposed boolean)"
    )
    data, own = made.dataset, made.assignments
    users = np.concatenate((data.user, own.user))
    items = np.concatenate((data.item, own.item))
    kinds = ["purchase" if kind else "view" for kind in data.event_type] + ["view"] * len(own)
    times = np.concatenate((data.occurred_at, own.moment)) + BEGIN.timestamp()
    exposed = [None] * len(data.user) + own.exposed.tolist()
    with connection.cursor() as cursor, cursor.copy(f"copy {table} from stdin") as copy:
        for user, item, kind, at, shown in zip(users, items, kinds, times, exposed, strict=True):
            copy.write_row((int(user) + 1, int(item) + 1, kind, datetime.fromtimestamp(at, UTC), shown))


@pytest.fixture(scope="module")
def training() -> list[Training]:
    """What the training of `shop` gave, once it ran."""
    return []


@pytest.fixture(scope="module")
def shop(server: Server, template: str, training: list[Training]) -> Iterator[Connection]:
    """A shop with an experiment that worked, trained, active and refreshed, with two offers of item 3."""
    name = "uplift"
    create_database(server, name, template)
    dsn = server.dsn(name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        make(connection, world(users=1200, effect=0.3))
        create_model(connection, events="events", exposure_column="exposed", options=SMALL | {"horizon_days": HORIZON})
        training.append(run_training(dsn, "shop", QUICK))
        connection.execute("select * from vae.activate('shop', 1, force => true)")
        connection.execute("select vae.create_offer('shop', 'likely', array[3], value => 10, cost => 0.5)")
        connection.execute(
            "select vae.create_offer('shop', 'won', array[3], value => 10, cost => 0.5, max_users => 200,"
            " choose_by => 'uplift')"
        )
        connection.execute("select vae.create_offer('shop', 'two', array[3, 4], value => 10, cost => 0.5)")
        connection.execute("call vae.refresh('shop')")
        yield connection
    drop_database(server, name)


def one(connection: Connection, query: str, parameters: Any = None) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def test_the_effect_on_a_simulated_shop_is_the_true_one(database: str) -> None:
    config = SimulationConfig(
        users=2500, items=60, days=300, events_per_user=25, seed=7, until=date(2026, 1, 1), experiment=1.0
    )
    truth = simulate(database, config).experiment
    assert truth is not None
    with psycopg.connect(database) as connection:
        create_model(connection, events="sim.events", users="sim.users", items="sim.items", exposure_column="exposed")
        dataset = read_dataset(connection, "shop")
        assignments = read_assignments(connection, "shop")
    assert assignments is not None
    # But for users whose only event is their registration.
    assert 0.98 * truth.assignments < len(assignments) <= truth.assignments
    trial = trial_of(dataset, assignments, horizon=28, seed=1)
    assert isinstance(trial, Trial)
    effect = effects(trial.cells, trial.assignments.user, seed=1)[2]
    assert 0 < effect.lower < truth.effect < effect.upper
    assert balance(trial, np.zeros((len(trial.bought), 1)), seed=1).lower < 0.5


def test_an_assignment_is_no_behaviour(shop: Connection) -> None:
    ordinary = one(
        shop, "select count(distinct (user_id, item_id, event_type, occurred_at)) from events where exposed is null"
    )
    assert one(shop, "select count(*) from shop.clean_events") == ordinary
    assert one(shop, "select count(*) from shop.refresh_events") == ordinary
    assigned = one(shop, "select count(*) from events where exposed is not null")
    assert 0 < one(shop, "select count(*) from shop.clean_assignments") <= assigned
    user = one(shop, "select user_id from shop.clean_assignments order by 1 limit 1")
    before = (
        shop.execute("select * from shop.history(%s)", [user]).fetchall(),
        shop.execute("select * from shop.recommend(%s)", [user]).fetchall(),
        one(shop, "select digest from shop.refresh_digests where user_id = %s", [user]),
        one(shop, "select sum(views) from shop.all_item_days(now())"),
        one(shop, "select row_count from vae.check_events('shop') where check_name = 'enough_events'"),
    )
    with shop.transaction(force_rollback=True):
        # However many of one day: they make nobody an outlier either.
        shop.execute(
            "insert into events select %s, 1 + n %% 20, 'view', '2024-02-01'::timestamptz - n * interval '1 s', true"
            " from generate_series(1, 3000) n",
            [user],
        )
        assert before == (
            shop.execute("select * from shop.history(%s)", [user]).fetchall(),
            shop.execute("select * from shop.recommend(%s)", [user]).fetchall(),
            one(shop, "select digest from shop.refresh_digests where user_id = %s", [user]),
            one(shop, "select sum(views) from shop.all_item_days(now())"),
            one(shop, "select row_count from vae.check_events('shop') where check_name = 'enough_events'"),
        )
        assert shop.execute("select * from shop.outlier_users where user_id = %s", [user]).fetchall() == []


def test_a_training_says_what_the_experiment_says(shop: Connection, training: list[Training]) -> None:
    found = training[0].uplift
    assert found.missing == ""
    assert uplift_verdict(found).startswith("experiment: ")
    assert "Qini coefficient" in uplift_verdict(found)
    assert one(shop, "select has_uplift, no_uplift from vae.versions") == (True, None)
    rows = shop.execute("select method, metric, lower < upper from vae.metrics where split = 'experiment'").fetchall()
    assert {
        ("exposed", "uplift_assignments", None),
        ("withheld", "uplift_response_rate", True),
        ("experiment", "uplift_average_effect", True),
        ("experiment", "uplift_balance_auc", True),
        ("pgvae", "uplift_qini", True),
        ("response", "uplift_qini_lead", True),
    } <= set(rows)
    assert set(shop.execute("select distinct method from vae.curves where curve = 'uplift'").fetchall()) == {
        ("pgvae",),
        ("response",),
    }


def test_every_metric_is_named_in_the_comment(shop: Connection) -> None:
    metrics = {row[0] for row in shop.execute("select distinct metric from vae.metrics").fetchall()}
    assert {"ndcg", "demand_buyers_wape", "churn_auc", "uplift_qini"} <= metrics
    comment = one(
        shop,
        "select col_description('vae.metrics'::regclass, attnum) from pg_attribute"
        " where attrelid = 'vae.metrics'::regclass and attname = 'metric'",
    )
    assert metrics <= set(re.findall(r"\w+", comment))


def test_uplift_live_and_materialized_is_the_same(shop: Connection) -> None:
    rows = shop.execute(
        "select r.user_id, r.rank, r.uplift, r.response_probability, a.uplift, a.rank, shop.uplift(r.user_id, 3)"
        ' from shop.offer_responses r join shop.audience(3, 200, \'{"rank_by": "uplift"}\') a using (user_id)'
        " where r.offer = 'won' order by r.rank"
    ).fetchall()
    assert len(rows) == 200
    for _, rank, uplift, response, of_audience, rank_of_audience, live in rows:
        assert rank == rank_of_audience
        assert of_audience == pytest.approx(uplift, rel=1e-5)
        assert live == pytest.approx(uplift, rel=1e-5)
        assert -response <= uplift <= 1
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert [row[0] for row in rows] != [
        row[0] for row in shop.execute("select user_id from shop.audience(3, 200) order by rank").fetchall()
    ]
    assert one(shop, "select count(*), count(uplift) from shop.audience_of_items(array[3, 4]::bigint[])") == (1000, 0)
    assert one(shop, "select shop.uplift(null, 3)") is None
    assert one(shop, "select shop.uplift(999999, 3)") is None


def test_an_audience_by_uplift_is_found_among_those_who_are_likely_enough(shop: Connection) -> None:
    everybody = shop.execute(
        """select user_id, response_probability from shop.audience(3, 10000, '{"rank_by": "uplift"}')"""
    ).fetchall()
    # Of the twenty best ten are not likely enough.
    least = float(np.median([probability for _, probability in everybody[:20]]))
    found = shop.execute(
        "select rank, user_id from shop.audience("
        "3, 20, jsonb_build_object('rank_by', 'uplift', 'min_probability', %s::float8))",
        [least],
    ).fetchall()
    likely = [user for user, probability in everybody if probability >= least][:20]
    assert found == list(enumerate(likely, start=1))
    assert len(likely) == 20


def test_an_offer_that_chooses_by_uplift_counts_whom_it_wins(shop: Connection) -> None:
    for offer, buyers, profit, chosen in shop.execute(
        "select offer, incremental_buyers, incremental_profit, users from shop.offers where offer in ('likely', 'won')"
    ).fetchall():
        total, count = one(
            shop,
            "select sum(uplift), count(*) from shop.offer_responses where offer = %s and is_chosen",
            [offer],
        )
        assert chosen == count > 0
        assert buyers == pytest.approx(total, rel=1e-4)
        assert profit == pytest.approx(buyers * 10 - 0.5 * chosen)
    wrong = "select count(*) from shop.offer_responses where offer = 'won' and is_chosen <> (uplift * 10 >= 0.5)"
    assert one(shop, wrong) == 0
    assert one(shop, "select choose_by, incremental_buyers from shop.offers where offer = 'two'") == ("response", None)
    # A hundred users that are chosen by uplift are more won than a hundred by the response.
    best, likeliest = (
        one(shop, "select sum(uplift) from shop.offer_responses where offer = %s and rank <= 100", [offer])
        for offer in ("won", "likely")
    )
    assert best > likeliest


def test_an_offer_by_an_uplift_that_nobody_claims_is_refused(shop: Connection) -> None:
    several = refusal(shop, "select vae.create_offer('shop', 'x', array[3, 4], choose_by => 'uplift')")
    assert several.message_primary == 'offer "x" is of 2 items and chooses by uplift'
    wrong = refusal(shop, "select vae.create_offer('shop', 'x', array[3], choose_by => 'luck')")
    assert (wrong.sqlstate, wrong.message_primary) == ("22023", 'choose_by of offer "x" is luck')
    assert "rank_by" in str(
        refusal(shop, """select * from shop.audience(3, 9, '{"rank_by": "luck"}')""").message_primary
    )
    many = refusal(shop, """select * from shop.audience_of_items(array[3, 4]::bigint[], 9, '{"rank_by": "uplift"}')""")
    assert (many.sqlstate, "2 items together" in str(many.message_primary)) == ("22023", True)


def test_without_the_column_nothing_changes_and_the_reason_is_told(shared_trained: Connection) -> None:
    assert one(shared_trained, "select has_uplift, no_uplift from vae.versions") == (False, NO_COLUMN)
    assert one(shared_trained, "select to_regclass('shop.clean_assignments') is null")
    checks = {row[0] for row in shared_trained.execute("select check_name from vae.check_events('shop')").fetchall()}
    assert not any("assignments" in check for check in checks)
    # The tiny shop's heads need more days; none of them would claim uplift.
    refused = refusal(
        shared_trained,
        "select vae.create_offer('shop', 'x', array[(select item_id from events limit 1)], choose_by => 'uplift')",
    )
    assert (refused.sqlstate, refused.message_primary) == (
        "VA053",
        f"version 1 of model shop claims no uplift: {NO_COLUMN}",
    )


def test_a_column_of_another_type_is_refused(shared: Connection) -> None:
    with shared.transaction(force_rollback=True):
        Shop().make(shared)
        shared.execute("alter table events add exposed integer")
        columns = "select * from vae.create_model('other', 'events', exposure_column => '{}')"
        wrong = refusal(shared, columns.format("exposed"))
    assert (wrong.sqlstate, wrong.message_primary) == (
        "42804",
        'column "exposed" of public.events has the type integer',
    )
    assert "true where the offer was made" in str(wrong.message_hint)


def test_the_quality_gate_counts_what_is_unusable(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        Shop().make(connection)
        connection.execute("alter table events add shown boolean")
        Shop().create_model(connection, exposure_column="shown")
        plain = {row[0]: row[1:] for row in connection.execute("select * from vae.check_events('shop')").fetchall()}
        assert plain["unusable_assignments"][:2] == ("pass", 0)
        assert plain["enough_assignments"][0] == "warn"
        user, item = one(connection, "select user_id, item_id from events limit 1")
        connection.execute(
            "insert into events (user_id, item_id, occurred_at, shown)"
            " select %(user)s + n, %(item)s, '2024-02-01'::timestamptz, true from generate_series(100, 400) n"
            " union all values (null, %(item)s, '2024-02-01'::timestamptz, true), (%(user)s, null, '2024-02-01', true),"
            " (%(user)s, %(item)s, null, false), (%(user)s, %(item)s, '2090-02-01', false),"
            # Both, 27 days apart; and again, a horizon apart.
            " (%(user)s, %(item)s, '2024-01-01', true), (%(user)s, %(item)s, '2024-01-28', false),"
            " (%(user)s + 1, %(item)s, '2024-01-01', true), (%(user)s + 1, %(item)s, '2024-01-29 01:00', false)",
            {"user": user, "item": item},
        )
        found = {row[0]: row[1:] for row in connection.execute("select * from vae.check_events('shop')").fetchall()}
        assert found["unusable_assignments"][:2] == ("warn", 4)
        for words in ("a user (1)", "an item (1)", "a time (1)", "before 1995-01-01 (1)"):
            assert words in found["unusable_assignments"][4]
        assert found["conflicting_assignments"][:2] == ("warn", 2)
        assert "within 28 days" in found["conflicting_assignments"][4]
        assert found["enough_assignments"][:2] == ("warn", 1)
        assert one(connection, "select count(*) from shop.clean_assignments") == 303
        # What is said of events is said without them.
        assert {name: row for name, row in found.items() if "assignments" not in name} == {
            name: row for name, row in plain.items() if "assignments" not in name
        }
        connection.execute("alter table events drop column shown cascade")
        gone = refusal(connection, "select * from vae.check_events('shop')")
        assert 'has no column "shown" any more' in str(gone.message_primary)


@pytest.mark.parametrize(
    ("user_type", "item_type", "time_type"),
    [("text", "uuid", "date"), ("uuid", "text", "timestamp"), ("integer", "integer", "timestamptz")],
)
def test_assignments_have_the_keys_of_the_shop(
    shared: Connection, user_type: str, item_type: str, time_type: str
) -> None:
    own = Shop(user_type=user_type, item_type=item_type, time_type=time_type, events='the "events"', user_id="who?")
    with shared.transaction(force_rollback=True):
        own.make(shared)
        relation = own.relation.as_string(shared)
        shared.execute(f"""alter table {relation} add "on %offer" boolean""".encode())
        own.create_model(shared, exposure_column="on %offer")
        insert = f"""insert into {relation} ("who?", item_id, occurred_at, "on %%offer") values (%s, %s, %s, true)"""
        shared.execute(insert.encode(), [own.users[3], own.items[4], BEGIN])
        rows = shared.execute("select user_id, item_id, occurred_at, is_exposed from shop.clean_assignments").fetchall()
        assert rows == [(own.users[3], own.items[4], BEGIN, True)]
        types = shared.execute(
            "select format_type(atttypid, null) from pg_attribute where attrelid = 'shop.clean_assignments'::regclass"
            " and attnum in (1, 2) order by attnum"
        ).fetchall()
        assert types == [(user_type,), (item_type,)]
        assert one(shared, "select count(*) from vae.check_events('shop') where check_name like '%assign%'") == 3
        shared.execute("select vae.rebuild_model('shop'), vae.drop_model('shop')")


def test_a_model_that_exists_gets_a_column_of_exposure_and_loses_it(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        Shop().make(connection)
        Shop().create_model(connection)
        events = one(connection, "select count(*) from shop.clean_events")
        connection.execute("alter table events add exposed boolean")
        connection.execute(
            "insert into events select user_id, item_id, event_type, '2024-01-01', true from events limit 1"
        )
        assert one(connection, "select count(*) from shop.clean_events") == events + 1
        connection.execute("select vae.set_exposure('shop', 'exposed')")
        assert one(connection, "select count(*) from shop.clean_events") == events
        assert one(connection, "select count(*) from shop.clean_assignments") == 1
        wrong = refusal(connection, "select vae.set_exposure('shop', 'occurred_at')")
        assert (wrong.sqlstate, wrong.message_primary) == (
            "42804",
            'column "occurred_at" of public.events has the type timestamptz',
        )
        assert refusal(connection, "select vae.set_exposure('shop', 'nothing')").sqlstate == "42703"
        connection.execute("select vae.set_exposure('shop', null)")
        assert one(connection, "select count(*) from shop.clean_events") == events + 1
        assert one(connection, "select to_regclass('shop.clean_assignments') is null")
        connection.execute("select vae.drop_model('shop')")


def test_roles_are_enough_for_an_experiment(server: Server, database: str, role: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        Shop().make(connection)
        connection.execute("alter table events add exposed boolean")
        for statement in (
            "grant vae_trainer to {0}",
            "grant select on events to {0}",
            "grant create on database {1} to {0}",
        ):
            connection.execute(sql.SQL(statement).format(sql.Identifier(role), sql.Identifier(connection.info.dbname)))
        with psycopg.connect(as_role(database, role), autocommit=True) as own:
            Shop().create_model(own, exposure_column="exposed")
            own.execute("select vae.set_exposure('shop', null)")
            own.execute("select vae.set_exposure('shop', 'exposed')")
            assert one(own, "select count(*) from vae.check_events('shop') where check_name like '%assign%'") == 3
            assert one(own, "select count(*) from shop.clean_assignments") == 0
            own.execute("select vae.create_offer('shop', 'x', array[7], choose_by => 'uplift')")
            # What is missing is a version, not a right.
            for call in ("shop.uplift(1, 7)", "shop.audience(7)"):
                assert refusal(own, f"select * from {call}").sqlstate == "VA002"
            own.execute("select vae.drop_model('shop')")
        connection.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))
