"""Splits, metrics, intervals and baselines against brute force; `pgvae evaluate` against a real server."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from psycopg import sql
from rich.table import Table

from conftest import as_role, create_database, drop_database
from pgvae import baselines, bootstrap, comparison, item_graph
from pgvae.baselines import CHOICES
from pgvae.cli.metrics import verdicts
from pgvae.comparison import METHODS, compare, evaluate, summarise
from pgvae.config import TrainingConfig
from pgvae.console import out
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.evaluate import config_of, evaluate_version
from pgvae.measurement import BINS, LEAST_SHARE, calibration_error, measure
from pgvae.publish import replace_metrics
from pgvae.ranking import Holdout, Scorer, make_holdout, per_user_metrics, ranked_batches
from pgvae.rows import ALL, Metric
from pgvae.server import Server
from pgvae.splits import MIN_USERS, SPLITS, Split, measurable
from pgvae.versions import find_version
from pgvae_runtime.features import FeatureBag, FeatureColumn, FeaturePipeline
from pgvae_runtime.tokens import History
from shop import BEGIN, QUICK, Shop, train
from test_docs import DOCS, blocks

RunCli = Callable[..., subprocess.CompletedProcess[str]]
Event = tuple[int, int, int, float]

DAY = 86_400.0
VIEW, PURCHASE = 0, 1


def dataset_of(events: Sequence[Event], users: int, items: int) -> Dataset:
    """Gives events of user, item, event type and time as a dataset."""
    columns = np.array(sorted(events, key=lambda e: (e[0], e[3], e[1], e[2])), dtype=float).reshape(-1, 4).T
    return Dataset(
        user=columns[0].astype(np.int64),
        item=columns[1].astype(np.int64),
        event_type=columns[2].astype(np.int64),
        occurred_at=columns[3],
        weight=np.ones(len(events), dtype=np.float32),
        item_keys=[str(item) for item in range(items)],
        event_types=["view", "purchase"],
        user_count=users,
    )


def by_user(scores: NDArray[np.float32], holdout: Holdout) -> Scorer:
    """Gives a scorer with these scores of all users, [users, I], for the users of a holdout, in one batch."""

    def score(history: History) -> NDArray[np.float32]:
        assert len(history.counts) == len(holdout.users)
        return scores[holdout.users].copy()

    return score


def shop_dataset(users: int = 500, items: int = 40, *, timeless: bool = False) -> Dataset:
    """Gives users who each like one of four groups of items, with a few views and purchases over a hundred days."""
    generator = np.random.default_rng(1)
    events = [
        (
            user,
            int(items // 4 * (user % 4) + generator.zipf(1.7) % (items // 4)),
            int(generator.random() < 0.6),
            0.0 if timeless else DAY * float(generator.uniform(0, 100)),
        )
        for user in range(users)
        for _ in range(generator.integers(6, 25))
    ]
    return dataset_of(events, users, items)


# Metrics against brute force


@st.composite
def judged(draw: st.DrawFn) -> tuple[list[Event], list[Event], NDArray[np.float32]]:
    """Events before and after, and scores with many ties."""
    users, items = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    event = st.tuples(
        st.integers(0, users - 1), st.integers(0, items - 1), st.sampled_from([VIEW, PURCHASE]), st.just(0.0)
    )
    before = draw(st.lists(event, min_size=1, max_size=20))
    after = draw(st.lists(event, max_size=25))
    scores = draw(st.lists(st.integers(0, 3), min_size=users * items, max_size=users * items))
    return before, after, np.array(scores, dtype=np.float32).reshape(users, items)


def the_best(candidates: set[int], scores: NDArray[np.float32], given_: Sequence[int], k: int) -> list[int]:
    """Gives the list of a user, as it was made, if it is one of the k best: of equal scores at its end any will do."""
    made = [item for item in given_ if item >= 0]
    assert len(made) == min(k, len(candidates)) == len(set(made) & candidates)
    assert made == sorted(made, key=lambda item: (-scores[item], item))
    assert all(scores[made[-1]] >= scores[item] for item in candidates - set(made))
    return made


def reference(
    before: list[Event], after: list[Event], scores: NDArray[np.float32], lists: NDArray[np.int32]
) -> dict[int, dict[str, float]]:
    """Gives the metrics of each user as their definitions say, one number at a time."""
    k = lists.shape[1]
    known = {event[1] for event in before}
    found: dict[int, dict[str, float]] = {}
    for user in sorted({event[0] for event in before}):
        seen = {e[1] for e in before if e[0] == user and e[2] == PURCHASE}
        truth = {e[1] for e in after if e[0] == user and e[2] == PURCHASE} & known - seen
        if not truth:
            continue
        ranked = known - seen
        best = the_best(ranked, scores[user], lists[len(found)].tolist(), k)
        hits = [item in truth for item in best]
        gains = [1 / math.log2(rank + 1) for rank, hit in enumerate(hits, 1) if hit]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(truth)) + 1))
        precisions = [sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit]
        others = known - seen - truth
        orders = [
            1.0 if scores[user, good] > scores[user, bad] else 0.5 if scores[user, good] == scores[user, bad] else 0.0
            for good in truth
            for bad in others
        ]
        total = sum(float(scores[user, item]) for item in ranked)
        share = {item: float(scores[user, item]) / total if total else 0.0 for item in ranked}
        people = len({e[0] for e in before})
        knows = {item: len({e[0] for e in before if e[1] == item}) / people for item in known}
        found[user] = {
            "recall": sum(hits) / len(truth),
            "precision": sum(hits) / k,
            "hit_rate": float(any(hits)),
            "mrr": 1 / (1 + hits.index(True)) if any(hits) else 0.0,
            "map": sum(precisions) / min(k, len(truth)),
            "ndcg": sum(gains) / ideal,
            "auc": sum(orders) / len(orders) if orders else 0.5,
            "log_loss": sum(-math.log(max(share[item], LEAST_SHARE)) for item in truth) / len(truth),
            "brier": sum(sum((share[other] - (other == item)) ** 2 for other in ranked) for item in truth) / len(truth),
            "novelty": sum(-math.log2(knows[item]) for item in best) / len(best),
        }
    return found


@settings(max_examples=200, deadline=None)
@given(judged(), st.integers(1, 11))
def test_every_metric_is_what_its_definition_says(
    example: tuple[list[Event], list[Event], NDArray[np.float32]], k: int
) -> None:
    before, after, scores = example
    users, items = scores.shape
    holdout = make_holdout(dataset_of(before, users, items), dataset_of(after, users, items))
    if not len(holdout.users):
        return
    measured = measure(holdout, by_user(scores, holdout), (k,), are_probabilities=True)
    expected = reference(before, after, scores, measured.best)
    assert holdout.users.tolist() == list(expected)
    for (name, _), values in measured.values.items():
        np.testing.assert_allclose(values, [row[name] for row in expected.values()], rtol=1e-5, atol=1e-6, err_msg=name)
    assert {name for name, _ in measured.values} == set(next(iter(expected.values())))
    quick = per_user_metrics(holdout, by_user(scores, holdout), k)
    for name, values in quick.items():
        np.testing.assert_array_equal(values, measured.values[name, k])


@settings(max_examples=100, deadline=None)
@given(judged(), st.integers(1, 11))
def test_coverage_and_calibration_are_what_their_definitions_say(
    example: tuple[list[Event], list[Event], NDArray[np.float32]], k: int
) -> None:
    before, after, scores = example
    users, items = scores.shape
    holdout = make_holdout(dataset_of(before, users, items), dataset_of(after, users, items))
    if not len(holdout.users):
        return
    measured = measure(holdout, by_user(scores, holdout), (k,), are_probabilities=True)
    known = {event[1] for event in before}
    shown: set[int] = set()
    given_, happened = [0.0] * BINS, [0.0] * BINS
    for row, user in enumerate(holdout.users):
        seen = {e[1] for e in before if e[0] == user and e[2] == PURCHASE}
        truth = holdout.truth_item[holdout.truth_start[row] : holdout.truth_start[row + 1]]
        ranked = known - seen
        shown |= set(the_best(ranked, scores[user], measured.best[row].tolist(), k))
        total = sum(float(scores[user, item]) for item in ranked)
        for item in ranked:
            share = float(scores[user, item]) / total if total else 0.0
            number = next((b for b in range(BINS - 1) if share >= 0.5 / 4**b), BINS - 1)
            given_[number] += share
            happened[number] += (item in truth) / len(truth)
    assert measured.coverage == {k: pytest.approx(len(shown) / len(known))}
    assert measured.reliability is not None
    np.testing.assert_allclose(measured.reliability, np.column_stack((given_, happened)), rtol=1e-5, atol=1e-6)
    error = sum(abs(g - h) for g, h in zip(given_, happened, strict=True)) / 2 / len(holdout.users)
    assert calibration_error(measured.reliability) == pytest.approx(error, rel=1e-5, abs=1e-6)


def test_a_list_is_shorter_where_there_are_no_more_items() -> None:
    before = dataset_of([(0, item, VIEW, 0.0) for item in range(3)] + [(0, 0, PURCHASE, 0.0)], 1, 5)
    holdout = make_holdout(before, dataset_of([(0, 2, PURCHASE, 1.0), (0, 4, PURCHASE, 1.0)], 1, 5))
    # Item 0 was bought, items 3 and 4 nobody knows.
    assert holdout.truth_item.tolist() == [2]
    measured = measure(holdout, lambda _: np.array([[5, 1, 2, 9, 9]], dtype=np.float32), (4,), are_probabilities=True)
    assert measured.best.tolist() == [[2, 1, -1, -1]]
    assert measured.values["precision", 4].tolist() == [0.25]
    assert measured.coverage == {4: 2 / 3}
    np.testing.assert_allclose(measured.values["log_loss", 0], -np.log(2 / 3), rtol=1e-6)


def test_a_perfect_scorer_gets_one_and_chance_gets_k_of_the_catalogue() -> None:
    generator = np.random.default_rng(3)
    users, items, k = 400, 200, 20
    before = dataset_of([(user, user % items, VIEW, 0.0) for user in range(users)], users, items)
    bought = [generator.choice(items, 5, replace=False) for _ in range(users)]
    after = dataset_of([(user, int(i), PURCHASE, 1.0) for user in range(users) for i in bought[user]], users, items)
    holdout = make_holdout(before, after)
    truth = np.zeros((users, items), dtype=np.float32)
    truth[np.repeat(np.arange(users), 5), np.concatenate(bought)] = 0.2
    perfect = measure(holdout, by_user(truth, holdout), (k,), are_probabilities=True)
    for name in ("recall", "ndcg", "hit_rate", "mrr", "map"):
        np.testing.assert_allclose(perfect.values[name, k], 1.0)
    np.testing.assert_allclose(perfect.values["auc", 0], 1.0)
    np.testing.assert_allclose(perfect.values["log_loss", 0], np.log(5), rtol=1e-6)
    assert calibration_error(perfect.reliability) == pytest.approx(0, abs=1e-6)
    chance = measure(
        holdout, by_user(generator.random((users, items), dtype=np.float32), holdout), (k,), are_probabilities=False
    )
    assert chance.values["recall", k].mean() == pytest.approx(k / items, abs=0.025)
    assert chance.values["auc", 0].mean() == pytest.approx(0.5, abs=0.02)
    assert chance.reliability is None
    assert ("log_loss", 0) not in chance.values


def test_scores_below_minus_one_do_not_rank_behind_what_was_bought() -> None:
    before = dataset_of([(0, 0, PURCHASE, 0.0), (0, 1, VIEW, 0.0), (0, 2, VIEW, 0.0)], 1, 3)
    holdout = make_holdout(before, dataset_of([(0, 1, PURCHASE, 1.0)], 1, 3))
    measured = per_user_metrics(holdout, lambda _: np.array([[5.0, -7.0, -9.0]], dtype=np.float32), 1)
    assert measured["recall"].tolist() == [1.0]


def test_batches_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    split = next(SPLITS["temporal"](shop_dataset()))
    scorer = baselines.item_knn(split.train)
    whole = measure(split.test, scorer, (5, 20), are_probabilities=True)
    monkeypatch.setattr("pgvae.ranking._SCORES_BYTES", 4 * 40 * 7)
    parts = measure(split.test, scorer, (5, 20), are_probabilities=True)
    np.testing.assert_array_equal(whole.best, parts.best)
    for key, values in whole.values.items():
        np.testing.assert_allclose(parts.values[key], values, rtol=1e-12)
    assert whole.reliability is not None
    np.testing.assert_allclose(whole.reliability, parts.reliability, rtol=1e-6)


# Splits


events = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 6), st.sampled_from([VIEW, PURCHASE]), st.integers(0, 9).map(float)),
    min_size=1,
    max_size=80,
)


def pairs_of(dataset: Dataset, *, targets: bool) -> set[tuple[int, int]]:
    chosen = dataset.event_type == PURCHASE if targets else np.ones(len(dataset.user), dtype=bool)
    return set(zip(dataset.user[chosen].tolist(), dataset.item[chosen].tolist(), strict=True))


def truth_of(holdout: Holdout) -> set[tuple[int, int]]:
    users, items = holdout.truth(slice(None))
    return set(zip(holdout.users[users].tolist(), items.tolist(), strict=True))


@settings(max_examples=100, deadline=None)
@given(events, st.sampled_from(sorted(SPLITS)), st.integers(1, 4), st.integers(0, 3))
def test_no_split_shows_what_is_to_be_found(rows: list[Event], name: str, folds: int, seed: int) -> None:
    dataset = dataset_of(rows, 12, 7)
    bought = pairs_of(dataset, targets=True)
    splits = list(SPLITS[name](dataset, folds=folds, seed=seed))
    assert len(splits) == folds
    for split in splits:
        for holdout in (split.validation, split.test):
            truth = truth_of(holdout)
            assert truth <= bought
            assert not truth & pairs_of(holdout.before, targets=True)
            assert set(holdout.users.tolist()) <= set(holdout.before.user.tolist())
            assert not truth & pairs_of(split.train, targets=True)
            if name != "temporal":
                assert not truth & pairs_of(holdout.before, targets=False)
                assert not truth & pairs_of(split.train, targets=False)
        assert not truth_of(split.test) & truth_of(split.validation)
        # What chooses settings must not know what is tested either.
        assert not truth_of(split.test) & pairs_of(split.validation.before, targets=True)


@settings(max_examples=50, deadline=None)
@given(events, st.integers(1, 5))
def test_a_split_by_time_knows_nothing_of_the_future(rows: list[Event], folds: int) -> None:
    dataset = dataset_of(rows, 12, 7)
    last_seen = -np.inf
    for split in SPLITS["temporal"](dataset, folds=folds):
        train_end = split.train.occurred_at.max(initial=-np.inf)
        assert train_end >= last_seen
        last_seen = train_end
        for holdout in (split.validation, split.test):
            until = holdout.before.occurred_at.max(initial=-np.inf)
            first = {}
            for user, item, kind, at in sorted(rows, key=lambda row: row[3]):
                if kind == PURCHASE:
                    first.setdefault((user, item), at)
            assert all(first[pair] > until for pair in truth_of(holdout))
            assert train_end <= until


def test_rolling_origins_move_forward_and_tests_lie_side_by_side() -> None:
    dataset = dataset_of([(user, item, PURCHASE, float(item)) for user in range(5) for item in range(100)], 5, 100)
    # An item that nobody knows yet is not to be found, so one user knows all of them.
    everything = [(5, item, VIEW, -1.0) for item in range(100)]
    dataset = dataset_of([*zip_events(dataset), *everything], 6, 100)
    splits = list(SPLITS["temporal"](dataset, folds=4))
    tested = [sorted({item for _, item in truth_of(split.test)}) for split in splits]
    flat = [item for items in tested for item in items]
    assert flat == list(range(flat[0], 100))
    validated = [sorted({item for _, item in truth_of(split.validation)}) for split in splits]
    assert [items[-1] + 1 for items in validated] == [items[0] for items in tested]
    assert validated[1:] == tested[:-1]
    # Whoever is judged is known by all that happened before, in a test by what chose the settings, too.
    assert [split.validation.before.occurred_at.max() + 1 for split in splits] == [items[0] for items in validated]
    assert [split.test.before.occurred_at.max() + 1 for split in splits] == [items[0] for items in tested]


def zip_events(dataset: Dataset) -> Iterator[Event]:
    columns = (dataset.user, dataset.item, dataset.event_type, dataset.occurred_at)
    return zip(*(column.tolist() for column in columns), strict=True)


@settings(max_examples=50, deadline=None)
@given(events, st.integers(1, 5), st.integers(0, 3))
def test_held_out_users_are_never_trained_on(rows: list[Event], folds: int, seed: int) -> None:
    dataset = dataset_of(rows, 12, 7)
    tested: list[int] = []
    for split in SPLITS["strong"](dataset, folds=folds, seed=seed):
        parts = [set(part.user.tolist()) for part in (split.train, split.validation.before, split.test.before)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        tested += split.test.users.tolist()
        known = set(split.train.item.tolist())
        assert {item for _, item in truth_of(split.test)} <= known
    assert len(tested) == len(set(tested))


@pytest.mark.parametrize("name", ["random", "strong"])
def test_folds_test_everything_once(name: str) -> None:
    dataset = dataset_of([(user, item, PURCHASE, 0.0) for user in range(60) for item in range(10)], 60, 10)
    splits = list(SPLITS[name](dataset, folds=5, seed=7))
    if name == "random":
        tested = [pair for split in splits for pair in truth_of(split.test)]
        assert sorted(tested) == sorted(pairs_of(dataset, targets=True))
    else:
        assert sorted(user for split in splits for user in split.test.users) == list(range(60))
        # Of each held-out user's ten items a fifth is to be found.
        assert {len(truth_of(split.test)) / len(split.test.users) for split in splits} == {2.0}


@pytest.mark.parametrize("name", ["random", "strong"])
def test_what_chance_holds_out_is_looked_for_outside_of_the_history(name: str) -> None:
    dataset = shop_dataset()
    split = next(SPLITS[name](dataset, seed=1))
    for holdout in (split.validation, split.test):

        def as_before(history: History) -> NDArray[np.float32]:
            scores = np.zeros((len(history.counts), len(dataset.item_keys)), dtype=np.float32)
            scores[history.users(), history.item] = 1.0
            return scores

        # Some were viewed and not bought: none of them is ranked, however high a method thinks of it.
        assert holdout.before.pairs().size > holdout.before.pairs(holdout.before.targets).size
        assert all((scores < 1.0).all() for _, scores in ranked_batches(holdout, as_before))
        assert (per_user_metrics(holdout, as_before, 1000)["recall"] == 1.0).all()


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_a_tenth_tests_a_tenth_validates_and_the_seed_decides_which(name: str) -> None:
    dataset = shop_dataset()
    first, again, other = (next(SPLITS[name](dataset, seed=seed)) for seed in (1, 1, 2))
    assert truth_of(first.test) == truth_of(again.test)
    assert (truth_of(first.test) == truth_of(other.test)) == (name == "temporal")
    assert 0.7 < len(first.train.user) / len(dataset.user) < 0.85
    if name == "random":
        bought = len(pairs_of(dataset, targets=True))
        for holdout in (first.validation, first.test):
            assert len(truth_of(holdout)) == pytest.approx(bought / 10, rel=0.15)
        # In a test what chose the settings is part of the histories.
        assert truth_of(first.validation) < pairs_of(first.test.before, targets=True)


def test_without_times_a_training_is_measured_by_chance() -> None:
    timeless = shop_dataset(timeless=True)
    found = measurable(timeless, seed=1)
    assert found is not None
    assert found[0] == "random"
    result = evaluate(timeless, QUICK, max_history=50, on_epoch=lambda epoch: None)
    assert {metric.split for metric in result.metrics} == {"random"}
    assert result.fit is not None
    assert result.fit.curve[0].validation_ndcg is not None
    timed = measurable(shop_dataset(), seed=1)
    assert timed is not None
    assert timed[0] == "temporal"


def test_too_few_users_are_not_measured() -> None:
    few = shop_dataset(MIN_USERS - 1)
    assert measurable(few, seed=1) is None
    result = evaluate(few, QUICK, max_history=50, on_epoch=lambda epoch: None)
    assert (result.fit, result.metrics) == (None, [])
    with pytest.raises(PgvaeError, match=r"only \d+ users .* 20 are needed") as refused:
        compare(few, QUICK, max_history=50, split="strong")
    assert "--split random" in str(refused.value.hint)


# Intervals


def test_an_interval_of_a_mean_is_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, (2000, 1))
    lower, upper = bootstrap.interval(bootstrap.resampled_means(values, np.arange(2000), seed=1))[:, 0]
    half = 1.96 * 2.0 / np.sqrt(2000)
    assert (upper - lower) / 2 == pytest.approx(half, rel=0.1)
    assert lower < values.mean() < upper
    assert (upper + lower) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_rows_of_one_user_are_drawn_together() -> None:
    values = np.random.default_rng(1).normal(size=(100, 2))
    once = bootstrap.resampled_means(values, np.arange(100), seed=5)
    twice = bootstrap.resampled_means(np.repeat(values, 2, axis=0), np.repeat(np.arange(100), 2), seed=5)
    # More rows of the same users are no more evidence.
    np.testing.assert_allclose(once, twice)
    assert not np.allclose(once, bootstrap.resampled_means(values, np.arange(100), seed=6))


def test_batches_of_resamples_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_BATCH", 730)
    values = np.random.default_rng(1).normal(size=(100, 1))
    means = bootstrap.resampled_means(values, np.arange(100), seed=5)
    assert means.shape == (1000, 1)
    assert len(np.unique(means)) > 990
    assert means.std() == pytest.approx(values.std() / 10, rel=0.1)


def test_a_lead_is_judged_user_by_user() -> None:
    generator = np.random.default_rng(1)
    easy = generator.random(300)
    # A small lead of every user is clear, although the means of so different users overlap widely.
    ndcg = {"pgvae": easy + 0.01, "ease": easy, "popularity": 1 - easy}
    values = {method: {("ndcg", 20): value} for method, value in ndcg.items()}
    metrics = {(m.method, m.metric): m for m in summarise(np.arange(300), values, split="temporal", seed=1)}
    own, other = metrics["pgvae", "ndcg"], metrics["ease", "ndcg"]
    assert own.lower is not None
    assert other.upper is not None
    assert own.lower < other.upper
    lead = metrics["ease", "ndcg_lead"]
    assert (lead.value, lead.lower, lead.upper) == tuple(pytest.approx(0.01) for _ in range(3))
    unclear = metrics["popularity", "ndcg_lead"]
    assert unclear.lower is not None
    assert unclear.upper is not None
    assert unclear.lower < 0 < unclear.upper
    assert ("pgvae", "ndcg_lead") not in metrics


def test_a_baseline_that_never_hits_is_not_beaten_a_billion_times() -> None:
    values = {method: {("ndcg", 20): np.full(30, value)} for method, value in (("pgvae", 0.2), ("popularity", 0.0))}
    metrics = summarise(np.arange(30), values, split="temporal", seed=1)
    assert list(verdicts(metrics)) == ["pgvae beats popularity, whose NDCG is 0"]


# Baselines against their formulas


@pytest.fixture(scope="module")
def small() -> Dataset:
    """60 users and 12 items, of which each two have users in common."""
    generator = np.random.default_rng(2)
    rows = [(user, item, VIEW, DAY * item) for user in range(60) for item in range(12) if generator.random() < 0.4]
    return dataset_of(rows, 60, 12)


def matrix_of(dataset: Dataset) -> NDArray[np.float64]:
    matrix = np.zeros((dataset.user_count, len(dataset.item_keys)))
    matrix[dataset.user, dataset.item] = 1.0
    return matrix


def scores_of(scorer: Scorer, dataset: Dataset) -> NDArray[np.float32]:
    return scorer(dataset.history(np.arange(dataset.user_count)))


def test_ease_reconstructs_best_among_all_with_a_zero_diagonal(small: Dataset) -> None:
    x = matrix_of(small)
    weights = scores_of(baselines.ease(small, l2=7.0), dataset_of([(i, i, VIEW, 0.0) for i in range(12)], 12, 12))
    np.testing.assert_array_equal(np.diag(weights), 0.0)
    # At the optimum the gradient of |X - XB|² + l2 |B|² vanishes off the diagonal.
    gradient = x.T @ (x @ weights - x) + 7.0 * weights
    np.testing.assert_allclose(gradient - np.diag(np.diag(gradient)), 0.0, atol=1e-4)


def test_sparse_ease_with_all_neighbours_is_ease(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = scores_of(baselines.ease(small, l2=7.0), small)
    monkeypatch.setattr(baselines, "EXACT_ITEMS", 5)
    np.testing.assert_allclose(scores_of(baselines.ease(small, l2=7.0), small), exact, atol=1e-4)
    monkeypatch.setattr(baselines, "_EASE_NEIGHBOURS", 6)
    fewer = scores_of(baselines.ease(small, l2=7.0), small)
    assert 0.001 < np.abs(fewer - exact).max() < 0.5


def test_item_knn_is_the_shrunk_cosine_of_the_nearest(small: Dataset) -> None:
    x = matrix_of(small)
    count = x.sum(axis=0)
    cosine = x.T @ x / (np.sqrt(np.outer(count, count)) + 3.0)
    np.fill_diagonal(cosine, 0.0)
    for row in cosine:
        row[np.argsort(-row)[4:]] = 0.0
    np.testing.assert_allclose(scores_of(baselines.item_knn(small, neighbours=4), small), x @ cosine.T, rtol=1e-5)


def test_the_graph_filter_is_neighbours_plus_low_frequencies(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "RANK", 3)
    x = matrix_of(small)
    user, item = np.diag(x.sum(axis=1) ** -0.5), np.diag(x.sum(axis=0) ** -0.5)
    graph = user @ x @ item
    low = np.linalg.svd(graph)[2][:3].T
    expected = x @ (graph.T @ graph + 0.3 * item @ low @ low.T @ np.linalg.inv(item))
    np.testing.assert_allclose(scores_of(baselines.graph_filter(small, alpha=0.3), small), expected, rtol=2e-3)


def test_sequential_rules_are_what_followed_the_last_moment() -> None:
    # 0 then 1 and 2 at once then 3; 0 then 3; and somebody who is at 0 and 4 now.
    rows = [(0, 0, VIEW, 0.0), (0, 1, VIEW, DAY), (0, 2, VIEW, DAY), (0, 3, VIEW, 2 * DAY)]
    rows += [(1, 0, VIEW, 0.0), (1, 3, PURCHASE, DAY), (2, 3, VIEW, 0.0), (2, 0, VIEW, DAY), (2, 4, VIEW, DAY)]
    dataset = dataset_of(rows, 3, 5)
    for steps, of_three in ((1, 1.0), (10, 1.5)):
        scores = scores_of(baselines.sequential_rules(dataset, steps=steps), dataset)
        np.testing.assert_allclose(scores, [[1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [0, 1, 1, of_three, 0]])


def test_products_of_items_are_made_in_blocks(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [scores_of(make(small), small) for make in (baselines.item_knn, baselines.graph_filter)]
    monkeypatch.setattr(item_graph, "_BLOCK", 30)
    parts = [scores_of(make(small), small) for make in (baselines.item_knn, baselines.graph_filter)]
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    monkeypatch.setattr(baselines, "EDGES", 12 * 3)
    one = dataset_of([(0, 5, VIEW, 0.0)], 1, 12)
    for pruned in (baselines.graph_filter(small, alpha=0.0), baselines.sequential_rules(small)):
        assert 1 <= np.count_nonzero(scores_of(pruned, one)) < 12


def test_singular_values_and_vectors_are_those_of_numpy() -> None:
    from scipy import sparse

    dense = np.random.default_rng(1).random((80, 50)) * np.linspace(1, 0.1, 50)
    values, vectors = baselines.truncated_svd(sparse.csr_array(dense.astype(np.float32)), 4)
    _, expected, right = np.linalg.svd(dense, full_matrices=False)
    np.testing.assert_allclose(values, expected[:4], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(vectors * right[:4].T, axis=0)), 1.0, rtol=1e-3)
    assert len(baselines.truncated_svd(sparse.csr_array(dense[:3].astype(np.float32)), 256)[0]) == 3


def test_recency_forgets_by_half_lives() -> None:
    rows = [(user, 0, PURCHASE, 0.0) for user in range(4)] + [(5, 1, PURCHASE, 20 * DAY), (5, 2, VIEW, 20 * DAY)]
    dataset = dataset_of(rows, 6, 3)
    scores = baselines.recency(dataset, half_life=10.0)(dataset.history(np.array([0, 1])))
    np.testing.assert_allclose(scores, [[0.5, 0.5, 0.0]] * 2)
    np.testing.assert_allclose(
        baselines.popularity(dataset)(dataset.history(np.array([0]))), [[0.8, 0.2, 0.0]], rtol=1e-6
    )


@pytest.mark.parametrize("name", CHOICES)
def test_a_setting_is_chosen_on_the_validation_part(name: str) -> None:
    split = next(SPLITS["random"](shop_dataset(), seed=1))
    _, values, make = CHOICES[name]
    ndcg = [per_user_metrics(split.validation, scorer, 20)["ndcg"].mean() for scorer in make(split.train, values)]
    choice = baselines.choose(name, split.train, split.validation)
    assert choice.value == values[int(np.argmax(ndcg))]
    measured = per_user_metrics(split.validation, choice.scorer, 20)["ndcg"].mean()
    assert measured == pytest.approx(max(ndcg))


def test_settings_are_compared_on_some_of_many_users(monkeypatch: pytest.MonkeyPatch) -> None:
    split = next(SPLITS["random"](shop_dataset(), seed=1))
    monkeypatch.setattr(baselines, "_CHOOSING_USERS", 25)
    judged_users: list[int] = []
    compared = baselines.per_user_metrics

    def watch(holdout: Holdout, scorer: Scorer, k: int) -> dict[str, NDArray[np.float64]]:
        judged_users.append(len(holdout.users))
        assert truth_of(holdout) < truth_of(split.validation)
        return compared(holdout, scorer, k)

    monkeypatch.setattr(baselines, "per_user_metrics", watch)
    baselines.choose("recency", split.train, split.validation)
    assert judged_users == [25] * len(CHOICES["recency"][1])


# Comparisons


def test_nothing_is_fitted_or_chosen_on_the_test_part(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = shop_dataset()
    split = next(SPLITS["temporal"](dataset))
    monkeypatch.setitem(SPLITS, "temporal", lambda dataset, **_: iter([split]))
    learned: list[tuple[Dataset, Holdout | None]] = []
    fit, choose = comparison.fit, baselines.choose

    def watched_fit(train: Dataset, *arguments: Any, **named: Any) -> Any:
        learned.append((train, named["validation"]))
        return fit(train, *arguments, **named)

    def watched_choose(name: str, train: Dataset, validation: Holdout, seed: int) -> Any:
        learned.append((train, validation))
        return choose(name, train, validation, seed)

    monkeypatch.setattr(comparison, "fit", watched_fit)
    monkeypatch.setattr(baselines, "choose", watched_choose)
    compare(dataset, QUICK, max_history=50)
    assert len(learned) == 1 + len(CHOICES)
    evaluate(dataset, QUICK, max_history=50, on_epoch=lambda epoch: None)
    assert len(learned) == 2 + len(CHOICES)
    assert all(train is split.train and validation is split.validation for train, validation in learned)


@pytest.fixture(scope="module")
def compared() -> list[Metric]:
    return compare(shop_dataset(), QUICK, max_history=50, ks=(5, 100)).metrics


def test_a_comparison_has_every_figure_of_every_method(compared: list[Metric]) -> None:
    whole = [metric for metric in compared if metric.slice == ALL]
    assert list(dict.fromkeys(metric.method for metric in whole)) == list(METHODS)
    lists = {"recall", "ndcg", "precision", "hit_rate", "mrr", "map", "coverage", "novelty"}
    for method in METHODS:
        found = {(m.metric, m.k) for m in whole if m.method == method}
        gives_probabilities = method in ("pgvae", "recency", "popularity")
        probabilities = {"log_loss", "brier", "calibration_error"} if gives_probabilities else set()
        lead = set() if method == "pgvae" else {"ndcg_lead"}
        assert found == {(name, k) for name in lists | lead for k in (5, 100)} | {
            (name, 0) for name in {"auc"} | probabilities
        }
    for metric in whole:
        if metric.metric in ("coverage", "calibration_error"):
            assert (metric.lower, metric.upper) == (None, None)
        else:
            assert metric.lower is not None
            assert metric.upper is not None
            assert metric.lower <= metric.value <= metric.upper
    # Longer lists than the catalogue hold all of it.
    assert {m.value for m in whole if (m.metric, m.k) == ("recall", 100)} == {1.0}
    assert len({(m.method, m.split, m.slice, m.metric, m.k) for m in compared}) == len(compared)


def test_slices_are_parts_of_the_whole(compared: list[Metric]) -> None:
    for subject in ("activity", "account age"):
        for method in METHODS:
            rows = [m for m in compared if (m.method, m.metric, m.k) == (method, "ndcg", 5)]
            whole = next(m for m in rows if m.slice == ALL)
            parts = [m for m in rows if m.slice.startswith(f"{subject}: ")]
            assert len(parts) == 3
            assert sum(m.user_count for m in parts) == whole.user_count
            assert sum(m.user_count * m.value for m in parts) / whole.user_count == pytest.approx(whole.value)


def with_categories(dataset: Dataset) -> Dataset:
    """Gives the dataset with the category of each item: its group, but for the last ten items, which have none."""
    column = FeatureColumn(name="category", kind="category", first=3, vocabulary=("red", "green", "blue"))
    other = FeatureColumn(name="price", kind="number", first=0, edges=(1.0, 2.0))
    tokens = [[item % 3, 3 + item // 10] if item < 30 else [item % 3] for item in range(40)]
    return replace(dataset, item_pipeline=FeaturePipeline(columns=(other, column)), item_features=FeatureBag.of(tokens))


def test_categories_judge_their_own_items_only() -> None:
    dataset = with_categories(shop_dataset(900))
    metrics = compare(dataset, QUICK, max_history=50, ks=(5,)).metrics
    slices = {metric.slice for metric in metrics if metric.slice.startswith("category")}
    assert slices == {"category: red", "category: green", "category: blue"}
    split = next(SPLITS["temporal"](dataset, seed=QUICK.seed))
    truth = truth_of(split.test)
    scores = baselines.popularity(split.train)(split.test.before.history(split.test.users))
    recalls = []
    for row, user in enumerate(split.test.users.tolist()):
        own = {item for u, item in truth if u == user and item // 10 == 1}
        seen = {item for u, item in pairs_of(split.test.before, targets=True) if u == user}
        best = sorted(set(range(40)) - seen, key=lambda item: (-scores[row, item], item))[:5]
        if own:
            recalls.append(len(own & set(best)) / len(own))
    found = next(m for m in metrics if (m.method, m.slice, m.metric) == ("popularity", "category: green", "recall"))
    assert found.user_count == len(recalls)
    assert found.value == pytest.approx(np.mean(recalls))


def test_items_without_a_category_take_no_place_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgvae.comparison.MIN_USERS", 1)
    column = FeatureColumn(name="category", kind="category", first=0, vocabulary=tuple("abcdefghijk"))
    # A quarter of the items have none, more than any category has.
    tokens: list[list[int]] = [[item % 11] if item % 4 else [] for item in range(40)]
    dataset = replace(
        shop_dataset(), item_pipeline=FeaturePipeline(columns=(column,)), item_features=FeatureBag.of(tokens)
    )
    metrics = compare(dataset, QUICK, max_history=50, ks=(5,), split="random").metrics
    assert len({metric.slice for metric in metrics if metric.slice.startswith("category: ")}) == 10


@pytest.mark.parametrize("split", ["temporal", "random", "strong"])
def test_folds_are_pooled_by_user(split: str) -> None:
    dataset = shop_dataset(700)
    result = compare(dataset, QUICK, max_history=50, split=split, folds=2)
    assert {metric.split for metric in result.metrics} == {f"2-fold {split}"}
    assert {len(values) for values in result.settings.values()} == {2}
    users = set()
    hits = []
    for part in SPLITS[split](dataset, folds=2, seed=QUICK.seed):
        users |= set(part.test.users.tolist())
        hits.append(per_user_metrics(part.test, baselines.popularity(part.train), 20)["ndcg"])
    found = next(m for m in result.metrics if (m.method, m.metric, m.slice) == ("popularity", "ndcg", ALL))
    assert found.user_count == len(users)
    assert found.value == pytest.approx(np.concatenate(hits).mean())


def test_a_split_is_measurable_with_enough_users_in_both_parts() -> None:
    split = next(SPLITS["random"](shop_dataset(), seed=1))
    assert split.is_measurable
    few = replace(split.test, users=split.test.users[: MIN_USERS - 1])
    assert not Split(train=split.train, validation=split.validation, test=few).is_measurable


# The command


@pytest.fixture(scope="module")
def lively(server: Server, template: str) -> Iterator[str]:
    """The DSN of a database with a shop of 500 users and 40 items, and one version of its model."""
    create_database(server, "lively", template)
    dsn = server.dsn("lively")
    with psycopg.connect(dsn, autocommit=True) as connection:
        shop = Shop(user_keys=range(500), item_keys=range(40))
        shop.make(connection)
        shop.create_model(connection)
    train(dsn)
    yield dsn
    drop_database(server, "lively")


def stored(dsn: str, split: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(
            "select method, split, slice, metric, k, value, lower, upper, user_count from vae.metrics"
            " where split = %s order by 1, 2, 3, 4, 5",
            [split],
        ).fetchall()


def test_in_a_log_a_sentence_is_one_line_and_a_table_has_a_width(capsys: pytest.CaptureFixture[str]) -> None:
    out.print("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1
    table = Table("column")
    table.add_row("word " * 100)
    out.print(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) == out.width


def test_the_command_measures_writes_and_shows(lively: str, run_cli: RunCli) -> None:
    trained = stored(lively, "temporal")
    assert {row[3] for row in trained} == {"recall", "ndcg", "ndcg_lead"}
    done = run_cli("evaluate", "shop", "--k", "5", "--k", "20", dsn=lively)
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        assert f"\n  {method} " in done.stdout
    for text in ("version 1 of model shop", "ndcg@5", "novelty@20", "auc", "activity: ", "ease l2"):
        assert text in done.stdout
    assert "pgvae beats" in done.stdout or "pgvae loses to" in done.stdout or "does not clearly beat" in done.stdout
    assert "* the best of its column" in done.stdout
    assert f"1 of {len(METHODS)}: pgvae" in done.stderr
    written = stored(lively, "temporal")
    assert len(written) > 100
    # What the training measured is measured again: the same events, the same seed.
    same = {row[:5]: row[5:] for row in written}
    for row in trained:
        assert same[row[:5]] == tuple(pytest.approx(value) for value in row[5:])
    again = run_cli("evaluate", "shop", "--json", dsn=lively)
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    assert (document["model"], document["version"]) == ("shop", 1)
    assert set(document["settings"]) == set(METHODS) - {"popularity"}
    columns = ("method", "split", "slice", "metric", "k", "value", "lower", "upper", "user_count")
    rows = sorted(tuple(metric[column] for column in columns) for metric in document["metrics"])
    assert rows == sorted(stored(lively, "temporal"), key=lambda row: row[:5])
    assert {row[4] for row in rows} == {0, 20}


def test_whatever_lists_are_asked_for_versions_can_be_compared(lively: str, run_cli: RunCli) -> None:
    before = {row[:5] for row in stored(lively, "temporal") if row[3] == "ndcg"}
    done = run_cli("evaluate", "shop", "--k", "10", dsn=lively)
    assert done.returncode == 0, done.stderr
    assert "lists of 10" in done.stdout
    assert "lists of 20" not in done.stdout
    assert "ndcg@20" not in done.stdout
    assert "coverage@20" not in done.stdout
    # vae.activate compares the NDCG of lists of one length.
    ndcg = {row[:5] for row in stored(lively, "temporal") if row[3] == "ndcg"}
    assert {row for row in ndcg if row[2] == "all"} >= {row for row in before if row[2] == "all"}
    assert {row[4] for row in ndcg} == {10, 20}


def test_other_splits_stand_beside_the_first(lively: str, run_cli: RunCli) -> None:
    before = stored(lively, "temporal")
    for split in ("random", "strong"):
        done = run_cli("evaluate", "shop", "--split", split, dsn=lively)
        assert done.returncode == 0, done.stderr
        assert len(stored(lively, split)) > 50
    assert stored(lively, "temporal") == before
    folds = run_cli("evaluate", "shop", "--split", "random", "--folds", "2", dsn=lively)
    assert folds.returncode == 0, folds.stderr
    assert "on the 2-fold random split" in folds.stdout
    assert len(stored(lively, "2-fold random")) > 50


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["shop", "--version", "7"], 1, "model shop has no version 7"),
        (["nothing"], 1, "nothing"),
        (["shop", "--split", "weekly"], 2, "weekly"),
        (["shop", "--folds", "0"], 2, "--folds"),
        (["shop", "--k", "0"], 2, "--k"),
    ],
)
def test_a_wrong_question_is_refused(
    lively: str, run_cli: RunCli, options: list[str], status: int, message: str
) -> None:
    done = run_cli("evaluate", *options, dsn=lively)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stdout == ""


def test_a_shop_with_too_few_users_is_told_so(trained_database: str, run_cli: RunCli) -> None:
    done = run_cli("evaluate", "shop", "--split", "strong", dsn=trained_database)
    assert done.returncode == 1
    assert "20 are needed" in done.stderr
    assert "hint: give --split random" in done.stderr
    assert stored(trained_database, "strong") == []


def test_of_two_evaluations_at_once_the_later_one_stays(trained_database: str) -> None:
    def metric(value: float) -> Metric:
        return Metric(
            method="pgvae", split="random", metric="ndcg", k=20, value=value, lower=None, upper=None, user_count=1
        )

    def replaced(value: float) -> None:
        with psycopg.connect(trained_database) as connection:
            replace_metrics(connection, find_version(connection, "shop"), [metric(value)])

    with ThreadPoolExecutor(1) as pool:
        with psycopg.connect(trained_database) as first:
            replace_metrics(first, find_version(first, "shop"), [metric(0.1)])
            second = pool.submit(replaced, 0.2)
            with pytest.raises(TimeoutError):
                second.result(0.5)
        second.result(30)
    assert [row[5] for row in stored(trained_database, "random")] == [0.2]


def test_the_queries_of_the_page_find_what_was_measured(lively: str, run_cli: RunCli) -> None:
    done = run_cli("evaluate", "shop", dsn=lively)
    assert done.returncode == 0, done.stderr
    queries = [block.text for block in blocks(DOCS / "evaluation.md") if block.language == "sql"]
    with psycopg.connect(lively) as connection:
        slices, leads = (connection.execute(query.encode()).fetchall() for query in queries)
    assert {row[0].split(":")[0] for row in slices} == {"activity"}
    assert all(None not in row for row in slices)
    assert {row[1] for row in leads if row[0] == "temporal"} == set(METHODS) - {"pgvae"}


def test_the_configuration_is_that_of_the_version(lively: str) -> None:
    with psycopg.connect(lively) as connection:
        row = connection.execute("select config from vae.versions").fetchone()
    assert row is not None
    assert config_of(row[0]) == QUICK
    assert config_of({"epochs": 9, "event_types": []}).epochs == 9
    # As versions have it that were trained when 0 stood for no temperature.
    assert config_of({"temperature": 0.0}) == TrainingConfig()


def test_trainers_replace_the_metrics_of_models_that_they_may_use(lively: str, role: str) -> None:
    dsn = as_role(lively, role)
    with psycopg.connect(lively, autocommit=True) as admin:
        admin.execute(sql.SQL("grant vae_trainer to {}").format(sql.Identifier(role)))
        before = stored(lively, "temporal")
        with psycopg.connect(dsn, autocommit=True) as stranger:
            assert stranger.execute("delete from vae.metrics").rowcount == 0
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.execute("update vae.metrics set value = 1")
        assert stored(lively, "temporal") == before
        admin.execute(sql.SQL("grant usage on schema shop to {}").format(sql.Identifier(role)))
        admin.execute(sql.SQL("grant select on events to {}").format(sql.Identifier(role)))
        try:
            assert evaluate_version(dsn, "shop", ks=(3,)).version == 1
        finally:
            admin.execute(sql.SQL("revoke all on events from {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("revoke all on schema shop from {}").format(sql.Identifier(role)))
    assert {row[4] for row in stored(lively, "temporal")} == {0, 3, 20}


def test_only_the_whole_decides_over_an_activation(trained: psycopg.Connection) -> None:
    trained.execute("delete from vae.metrics")
    insert = (
        "insert into vae.metrics (version_id, method, split, slice, metric, k, value, user_count)"
        " select version_id, m.method, 'temporal', %s, 'ndcg', 20, m.value, 30 from vae.versions,"
        " (values ('pgvae', 0.1), ('popularity', 0.2)) as m (method, value)"
    )
    trained.execute(insert, ["activity: 1 to 3 events"])
    assert trained.execute("select * from vae.activate('shop', 1)").fetchall() == [(1, 1)]
    trained.execute(insert, ["all"])
    with pytest.raises(psycopg.Error, match="ranks worse than popularity"):
        trained.execute("select * from vae.activate('shop', 1)")


def test_events_of_one_moment_are_measured_in_the_database_too(connection: psycopg.Connection, database: str) -> None:
    shop = Shop(user_keys=range(300), item_keys=range(60))
    shop.make(connection)
    connection.execute("update events set occurred_at = %s", [BEGIN])
    shop.create_model(connection)
    train(database, force=True)
    assert {row[1] for row in stored(database, "random")} == {"random"}
    assert stored(database, "temporal") == []
