"""PyTorch, NumPy, live calls and the materialized view give the same scores."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from psycopg import sql
from torch.nn.functional import log_softmax

import cuda_on_cpu
import fake_cupy
from conftest import create_database, drop_database
from pgvae.batches import Batches
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.loop import _losses
from pgvae.model import AttentionVae
from pgvae.server import Server
from pgvae.shortcut import Links
from pgvae_runtime import explain, forward
from pgvae_runtime.features import FeatureBag
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import History
from shop import QUICK, Shop, train_and_activate
from variants import (
    install_variant,
    network_of_active_version,
    publish_network,
    random_links,
    random_network,
    torch_scores,
    with_features,
)

Connection = psycopg.Connection[Any]

USERS, MAX_HISTORY = 90, 12
# Items with events, and items without any of which only the features are known.
ITEMS, COLD = 40, 5
CATALOGUE = ITEMS + COLD
TINY = TrainingConfig(hidden=10, latent=6)
NO_FEATURES_READ = replace(TINY, without=("features",))
NOW = datetime(2025, 1, 1, tzinfo=UTC)


def random_dataset(generator: np.random.Generator, counts: list[int], items: int) -> tuple[Dataset, History]:
    """Gives a dataset of which only the shape matters, and a history of as many events for each user as said.

    Users and items have features. A third of the items have no events in the dataset, but some in the history.
    """
    known = max(1, items * 2 // 3)
    trained = known + items
    dataset = Dataset(
        user=np.sort(generator.integers(0, len(counts), trained)),
        item=np.concatenate((np.arange(known), generator.integers(0, known, items))),
        event_type=generator.integers(0, 3, trained),
        occurred_at=1.7e9 + np.arange(trained),
        weight=np.ones(trained, dtype=np.float32),
        item_keys=[str(item) for item in range(known)],
        event_types=["view", "add_to_cart", "purchase"],
        user_count=len(counts),
    )
    dataset = with_features(dataset, 1, cold_items=items - known)
    total = sum(counts)
    return dataset, History(
        counts=np.array(counts),
        item=generator.integers(0, items, total),
        event_type=generator.integers(0, 3, total),
        occurred_at=1.7e9 + 3600.0 * generator.integers(0, 9000, total),
        features=dataset.user_features,
    )


def assert_same_ranking(columns: Any, expected: Any) -> None:
    """Compares a ranking with the scores that should have ranked it: it may differ only among equal scores."""
    best = np.sort(expected, axis=-1)[..., ::-1][..., : columns.shape[-1]]
    np.testing.assert_allclose(np.take_along_axis(expected, columns, axis=-1), best, rtol=1e-5)


# PyTorch and NumPy


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("config", "items"),
    [(TINY, 40), (TrainingConfig(hidden=1, latent=1), 2), (TrainingConfig(), 3000), (NO_FEATURES_READ, 40)],
    ids=["tiny", "of width one", "of default size", "cold items, without features"],
)
def test_numpy_scores_as_pytorch_does_whatever_the_weights_and_histories(
    config: TrainingConfig, items: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    # Empty, one token, exactly as many as are seen, more, and far more, at the ends and in the middle.
    counts = [0, 0, 1, MAX_HISTORY, MAX_HISTORY + 1, 0, 0, 200, *generator.integers(0, 30, 20).tolist(), 1, 0]
    dataset, history = random_dataset(generator, counts, items)
    network, links = random_network(dataset, config, seed), random_links(dataset, seed)
    tokens = history.tokens(MAX_HISTORY)
    weights: dict[str, Any] = network.weights() | links.tensors()
    neutral = {"item_popularity", *(["user_feature_embedding"] if "features" in config.without else [])}
    assert all(np.any(tensor) for name, tensor in weights.items() if name not in neutral)
    expected = torch_scores(network, links, history, MAX_HISTORY)
    cold_items = ~dataset.trained_items
    with torch.no_grad():
        mean = network.encode(tokens, alone=cold_items[tokens.item])[0].numpy()
    assert np.abs(forward.encode(weights, tokens) - mean).max() <= 1e-5 * np.abs(mean).max()
    known = (history.counts > 0) | (dataset.user_features.counts() > 0)
    assert 0 < np.count_nonzero(known & (history.counts == 0)) < np.count_nonzero(history.counts == 0)
    scores, _ = score_users(weights, history, max_history=MAX_HISTORY)
    np.testing.assert_allclose(scores[known], expected[known], rtol=1e-5)
    np.testing.assert_array_equal(scores[~known], np.tile(dataset.popularity(), ((~known).sum(), 1)))
    columns, _ = forward.top_k(scores[known], 20)
    assert_same_ranking(columns, expected[known])


def test_one_item_again_and_again_is_scored_as_pytorch_does() -> None:
    dataset, history = random_dataset(np.random.default_rng(0), [3, 12, 40], ITEMS)
    history.item[:] = 7
    network, links = random_network(dataset, TINY, 0), random_links(dataset, 0)
    scores, _ = score_users(network.weights() | links.tensors(), history, max_history=12)
    np.testing.assert_allclose(scores, torch_scores(network, links, history, 12), rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 5, 100_000])
def test_what_users_lose_without_an_item_is_what_scoring_without_it_gives(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    for name in ("_GROUPS_AT_ONCE", "_TOKENS_AT_ONCE", "_LINKS_AT_ONCE"):
        monkeypatch.setattr(explain, name, at_once)
    generator = np.random.default_rng(2)
    dataset, history = random_dataset(generator, [0, 1, 1, 3, 0, MAX_HISTORY, 40, 17, 2, 0], ITEMS)
    weights = random_network(dataset, TINY, 2).weights() | random_links(dataset, 2).tensors()
    target = generator.integers(0, ITEMS, len(history.counts))
    tokens, at = explain.latest(history, MAX_HISTORY)
    groups = explain.Groups.by_item(tokens, ITEMS)
    found = explain.leave_one_out(weights, tokens, at, groups, target)

    def logit(user: int, kept: np.ndarray[Any, Any], features: FeatureBag | None) -> float:
        own = History(
            counts=np.array([len(kept)]),
            item=tokens.item[kept],
            event_type=tokens.event_type[kept],
            occurred_at=at[kept],
            features=features,
        )
        if not len(kept) and (features is None or not features.counts()[0]):
            return 0.0
        own_tokens = own.tokens(MAX_HISTORY)
        logits = forward.decode(weights, forward.encode(weights, own_tokens))
        forward.add_shortcut(weights, own_tokens, logits)
        return float(logits[0, target[user]] - weights["output_bias"][target[user]])

    expected = []
    for user in range(len(history.counts)):
        assert dataset.user_features is not None
        bag = dataset.user_features.take(np.array([user]))
        own = np.arange(tokens.start[user], tokens.start[user + 1])
        whole = logit(user, own, bag)
        assert found.logit[user] == pytest.approx(whole, abs=1e-5)
        assert found.of_features[user] == pytest.approx(whole - logit(user, own, None), abs=1e-5)
        expected += [whole - logit(user, own[tokens.item[own] != i], bag) for i in np.unique(tokens.item[own])]
    assert len(expected) == len(found.of_group) > 30
    np.testing.assert_allclose(found.of_group, expected, atol=1e-5)
    np.testing.assert_allclose(
        np.bincount(groups.user, minlength=10), [len(np.unique(tokens.item[a:b])) for a, b in pairwise(tokens.start)]
    )


def test_a_sampled_z_is_centred_on_the_mean_that_is_scored_with() -> None:
    dataset, _ = random_dataset(np.random.default_rng(0), [5] * 20, ITEMS)
    network = random_network(dataset, TINY, 0)
    (batch,) = list(Batches(dataset, TINY, max_history=12).epoch())[:1]
    with torch.no_grad():
        network.log_variance_weight.zero_()
        network.log_variance_bias.fill_(-60.0)
        loss, kl = _losses(network, batch, torch.Generator().manual_seed(1), use_bfloat16=False)
        mean, _ = network.encode(batch.tokens, alone=batch.alone_tokens)
        items = network.item_directions(batch.candidates, alone=batch.alone_candidates)
        logits = network.decode_direction(mean) @ items.T / network.temperature + network.output_bias[batch.candidates]
        evidence = log_softmax(logits, dim=1)[batch.target_row, batch.target_column]
        expected = -(torch.from_numpy(batch.target_weight) * evidence).sum() / batch.tokens.user_count
        of_mean = 0.5 * (mean.square().sum(dim=1) + mean.shape[1] * (np.exp(-60.0) - 1.0 + 60.0)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl.item() == pytest.approx(of_mean.item(), rel=1e-5)


# The database


# The DSN of a database, and what its active version was made of.
Scored = tuple[str, AttentionVae, Dataset, Links]


def shop_rows() -> list[tuple[int, int, str, datetime]]:
    """Gives 1 to 40 events a user, with repeated items and equal times."""
    generator = random.Random(3)
    rows = []
    for user in range(USERS):
        for _ in range(1 + user * 40 // USERS):
            at = NOW - timedelta(days=generator.randrange(700), hours=generator.randrange(3))
            kind = generator.choice(["view", "add_to_cart", "purchase"])
            rows.append((user, generator.randrange(ITEMS), kind, at))
    rows += [(user, item, "purchase", NOW) for user, item in enumerate(range(ITEMS))]
    return rows


@pytest.fixture(scope="module")
def scored(server: Server, template: str) -> Iterator[Scored]:
    """A database whose model has a random network as its active version, refreshed in batches of seven users."""
    create_database(server, "parity", template)
    dsn = server.dsn("parity")
    shop = Shop()
    with psycopg.connect(dsn, autocommit=True) as connection:
        shop.make(connection)
        connection.execute("truncate events")
        shop.add(connection, shop_rows())
        # Of the users without events the last one has features all the same.
        connection.execute(
            "create table users as select u::bigint as user_id, (array['DE', 'FR', null])[1 + u %% 3] as country,"
            " case when u %% 4 > 0 and u < %s then u * 7 %% 20 end as visits from generate_series(0, %s) u",
            [USERS, USERS + 4],
        )
        connection.execute("update users set country = null where user_id between %s and %s", [USERS, USERS + 3])
        connection.execute("update users set country = 'FR' where user_id = %s", [USERS + 4])
        connection.execute(
            "create table items as select i::bigint as item_id, i %% 7 as price,"
            " (array['a', 'b', 'c'])[1 + i %% 3] as kind from generate_series(0, %s) i",
            [CATALOGUE - 1],
        )
        options = {"max_history": MAX_HISTORY, "min_events": 100, "recommendations": 15}
        shop.create_model(connection, users="users", items="items", options=options)
    version, network, dataset, links = publish_network(dsn, "shop", TINY, seed=5)
    assert dataset.user_pipeline.size > 3
    assert dataset.item_pipeline.size > 3
    install_variant(dsn, "batch", ("_MAX_BATCH = 512", "_MAX_BATCH = 7"))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select * from vae.activate('shop', %s, force => true)", [version])
        connection.execute("call vae.refresh('shop')")
    yield dsn, network, dataset, links
    drop_database(server, "parity")


@pytest.fixture
def shop(scored: Scored) -> Iterator[Connection]:
    """A connection whose changes are rolled back, since the tests share the database."""
    with psycopg.connect(scored[0]) as connection:
        yield connection
        connection.rollback()


@pytest.fixture(scope="module")
def expected(scored: Scored) -> np.ndarray[Any, Any]:
    """PyTorch's scores of every user with events, [USERS, CATALOGUE]."""
    _, network, dataset, links = scored
    cold = [str(item) for item in range(ITEMS, CATALOGUE)]
    assert dataset.item_keys == sorted(str(item) for item in range(ITEMS)) + cold
    scores = torch_scores(network, links, dataset.history(np.arange(USERS)), MAX_HISTORY)
    return scores[:, [dataset.item_keys.index(str(item)) for item in range(CATALOGUE)]]


def all_scores(connection: Connection, user: int) -> dict[int, float]:
    """Gives the score of every item for a user, by a live call, best first."""
    rows = connection.execute(
        """select item_id, score from shop.recommend(%s, k => 10000, options => '{"exclude_seen": false}')""", [user]
    ).fetchall()
    return dict(rows)


def test_live_calls_give_the_scores_of_pytorch(shop: Connection, expected: np.ndarray[Any, Any]) -> None:
    for user in range(USERS):
        scores = all_scores(shop, user)
        assert len(scores) == CATALOGUE
        np.testing.assert_allclose([scores[item] for item in range(CATALOGUE)], expected[user], rtol=1e-5)
        assert_same_ranking(np.array(list(scores)), expected[user])
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert sum(scores.values()) == pytest.approx(1, rel=1e-5)


def test_the_score_of_one_item_is_the_one_in_the_list(shop: Connection, expected: np.ndarray[Any, Any]) -> None:
    rows = shop.execute(
        "select u, i, shop.score(u, i) from generate_series(0, %s, 9) u, generate_series(0, %s, 7) i",
        [USERS - 1, CATALOGUE - 1],
    ).fetchall()
    assert len(rows) == 70
    assert any(item >= ITEMS for _, item, _ in rows)
    for user, item, score in rows:
        assert score == pytest.approx(expected[user, item], rel=1e-5)
        assert score == all_scores(shop, user)[item]


def test_an_embedding_is_the_mean_of_pytorch(shop: Connection, scored: Scored) -> None:
    _, network, dataset, _ = scored
    with torch.no_grad():
        means = network.encode(dataset.history(np.arange(USERS)).tokens(MAX_HISTORY))[0].numpy()
    for user in range(0, USERS, 8):
        row = shop.execute("select shop.embedding(%s)", [user]).fetchone()
        assert row is not None
        assert np.abs(np.array(row[0]) - means[user]).max() <= 1e-5 * np.abs(means[user]).max()


def test_a_trained_model_scores_as_pytorch_does(trained: Connection, trained_database: str) -> None:
    with psycopg.connect(trained_database) as reader:
        network, links, dataset = network_of_active_version(reader)
    users = Shop().users
    expected = torch_scores(network, links, dataset.history(np.arange(len(users))), 500)
    assert np.any(links.weight)
    for number in range(0, len(users), 5):
        scores = all_scores(trained, users[number])
        np.testing.assert_allclose([scores[int(key)] for key in dataset.item_keys], expected[number], rtol=1e-5)


def test_the_view_holds_what_live_calls_give(shop: Connection) -> None:
    differences = shop.execute(
        """
        with live as (
            select u.user_id, r.rank, r.item_id, r.score, r.is_cold_start, r.model_version
            from users u cross join shop.recommend(u.user_id, k => 20) r
        )
        select count(*), count(distinct (v.user_id, v.item_id)),
            -- Of two items with nearly the same score either may stand first.
            count(*) filter (where exists (
                select from live o
                where o.user_id = v.user_id and o.item_id = v.item_id and abs(o.score - v.score) <= 1e-5 * o.score)),
            count(*) filter (where abs(v.score - l.score) <= 1e-5 * l.score),
            count(*) filter (where v.is_cold_start = l.is_cold_start and v.model_version = l.model_version)
        from (select * from live where rank <= 15) l full join shop.recommendations v using (user_id, rank)
        """
    ).fetchone()
    assert differences == ((USERS + 5) * 15,) * 5


def test_the_view_holds_the_explanations_of_live_calls(shop: Connection) -> None:
    found = shop.execute(
        """
        with live as (
            select r.user_id, r.item_id, l.*
            from shop.recommendations r
            cross join shop.explain(r.user_id, r.item_id, '{"by": "item"}') l
            where r.rank = 1 and l.part = 'item' and l.contribution > 0 and l.rank <= 5
        )
        select count(*), count(*) filter (where v.item_id = l.item_id and v.part = l.part
                and v.event_item_id = l.event_item_id and v.event_type = l.event_type
                and v.occurred_at = l.occurred_at),
            count(*) filter (where abs(v.contribution - l.contribution) <= 1e-4 and abs(v.share - l.share) <= 1e-4),
            count(*) filter (where v.model_version = l.model_version)
        from live l full join (select * from shop.explanations where part = 'item') v using (user_id, rank)
        """
    ).fetchone()
    assert found is not None
    assert found == (found[0],) * 4
    assert found[0] > 3 * USERS
    sentences = shop.execute(
        "select count(*), count(distinct e.user_id),"
        " count(*) filter (where e.because = shop.because(e.user_id, e.item_id)),"
        " count(*) filter (where r.item_id = e.item_id) from shop.explanations e"
        " join shop.recommendations r on r.user_id = e.user_id and r.rank = 1 where e.rank = 1"
    ).fetchone()
    assert sentences == (USERS + 5,) * 4
    counted = shop.execute(
        "select sum(e.event_count), max(e.event_count) from shop.explanations e where e.user_id = %s and e.rank <= 5",
        [USERS - 1],
    ).fetchone()
    assert counted is not None
    assert 5 <= counted[0] <= MAX_HISTORY
    # Of whom nothing is known, and of whom only features are.
    others = shop.execute(
        "select distinct user_id > %s, part, because, rank, event_item_id, event_type, occurred_at, event_count, share"
        " from shop.explanations where user_id >= %s order by 1",
        [USERS + 3, USERS],
    ).fetchall()
    nothing = (1, None, None, None, None, None)
    assert others[0] == (False, "popularity", "because it is popular", *nothing)
    assert others[1:] in (
        [(True, "features", "because of what is known about you", *nothing)],
        [(True, "popularity", "because it is popular", *nothing)],
    )


def test_the_refresh_went_through_many_batches_and_knows_each_user_once(shop: Connection) -> None:
    rows = shop.execute("select count(*), count(distinct user_id) from shop.recommendations_materialized").fetchall()
    assert rows == [(USERS + 5, USERS + 5)]


def test_a_refresh_gives_the_same_again(shop: Connection, scored: Scored) -> None:
    before = recommendations(shop)
    shop.commit()
    with psycopg.connect(scored[0], autocommit=True) as other:
        other.execute("call vae.refresh('shop', full => true)")
    assert_same(recommendations(shop), before)


def test_what_was_bought_is_left_out_and_brought_back_when_asked(shop: Connection) -> None:
    bought = {
        row[0]
        for row in shop.execute("select item_id from events where user_id = 80 and event_type = 'purchase'").fetchall()
    }
    looked_at = {row[0] for row in shop.execute("select item_id from events where user_id = 80").fetchall()} - bought
    assert len(bought) >= 3
    assert looked_at
    without = shop.execute("select item_id, score from shop.recommend(80, k => 100)").fetchall()
    everything = all_scores(shop, 80)
    assert {item for item, _ in without} == set(range(CATALOGUE)) - bought
    assert set(everything) == set(range(CATALOGUE))
    assert all(everything[item] == score for item, score in without)
    explicit = shop.execute("select item_id, score from shop.recommend(80, 100, '{\"exclude_seen\": true}')").fetchall()
    assert explicit == without
    in_view = shop.execute("select item_id from shop.recommendations where user_id = 80").fetchall()
    assert not {item for (item,) in in_view} & bought


def test_ranks_rise_from_one_and_k_is_the_length(shop: Connection) -> None:
    for k in (1, 2, 10, CATALOGUE - 1):
        rows = shop.execute("select rank from shop.recommend(-1, k => %s)", [k]).fetchall()
        assert [row[0] for row in rows] == list(range(1, k + 1))
    assert shop.execute("select count(*) from shop.recommend(-1)").fetchone() == (10,)


def test_a_user_of_a_minute_ago_is_scored_at_once(shop: Connection, scored: Scored) -> None:
    _, network, dataset, links = scored
    stranger = USERS + 100
    shop.execute("insert into users values (%s)", [stranger])
    cold = all_scores(shop, stranger)
    assert shop.execute("select bool_and(is_cold_start) from shop.recommend(%s)", [stranger]).fetchone() == (True,)
    assert shop.execute("select shop.embedding(%s)", [stranger]).fetchone() == (None,)
    # The last one is an item that had no event when the version was trained.
    bought = [("3", "view", 100.0), ("17", "purchase", 4.0), ("3", "add_to_cart", 0.5), (str(ITEMS + 1), "view", 0.2)]
    for item, kind, days in bought:
        shop.execute(
            "insert into events values (%s, %s, %s, now() - %s * interval '1 day')", [stranger, int(item), kind, days]
        )
    history = History(
        counts=np.array([4]),
        item=np.array([dataset.item_keys.index(item) for item, _, _ in bought]),
        event_type=np.array([dataset.event_types.index(kind) for _, kind, _ in bought]),
        occurred_at=np.array([-86_400 * days for _, _, days in bought]),
        features=FeatureBag.empty(1),
    )
    expected = torch_scores(network, links, history, MAX_HISTORY)[0]
    warm = all_scores(shop, stranger)
    assert warm != cold
    np.testing.assert_allclose([warm[int(key)] for key in dataset.item_keys], expected, rtol=1e-5)
    rows = shop.execute("select item_id, is_cold_start from shop.recommend(%s, k => 100)", [stranger]).fetchall()
    assert {row[1] for row in rows} == {False}
    assert {row[0] for row in rows} == set(range(CATALOGUE)) - {17}


def test_a_user_of_whom_only_features_are_known_is_scored_by_them(shop: Connection, scored: Scored) -> None:
    _, network, dataset, links = scored
    known = USERS + 4
    column = dataset.user_pipeline.columns[0]
    assert (column.name, column.kind) == ("country", "category")
    bag = FeatureBag.of([[column.first + column.vocabulary.index("FR")]])
    empty = np.zeros(0, dtype=np.int64)
    history = History(counts=np.array([0]), item=empty, event_type=empty, occurred_at=np.zeros(0), features=bag)
    expected = torch_scores(network, links, history, MAX_HISTORY)[0]
    scores = all_scores(shop, known)
    np.testing.assert_allclose([scores[int(key)] for key in dataset.item_keys], expected, rtol=1e-5)
    in_view = shop.execute("select item_id, score, is_cold_start from shop.recommendations where user_id = %s", [known])
    for item, score, is_cold_start in in_view.fetchall():
        assert score == pytest.approx(scores[item], rel=1e-5)
        assert is_cold_start
    # A category that training did not have says nothing.
    shop.execute("update users set country = 'XX' where user_id = %s", [known])
    assert all_scores(shop, known) == all_scores(shop, USERS)


def test_each_further_event_changes_the_answer_at_once(shop: Connection) -> None:
    answers = [all_scores(shop, 4)]
    for item in (5, 6, 5):
        shop.execute("insert into events values (4, %s, 'view', clock_timestamp())", [item])
        answers.append(all_scores(shop, 4))
    assert all(one != other for one, other in pairwise(answers))
    shop.execute("delete from events where user_id = 4 and occurred_at > %s", [NOW])
    assert all_scores(shop, 4) == answers[0]


def test_a_long_transaction_sees_what_others_wrote_since_it_began(trained_database: str) -> None:
    user, item = Shop().users[0], Shop().items[0]
    with psycopg.connect(trained_database) as analyst, psycopg.connect(trained_database, autocommit=True) as shop:
        before = all_scores(analyst, user)
        shop.execute("insert into events values (%s, %s, 'purchase', now())", [user, item])
        assert all_scores(analyst, user) != before


def test_the_order_and_repetition_of_rows_in_the_table_do_not_matter(shop: Connection) -> None:
    before = all_scores(shop, 70)
    shop.execute("create temporary table copy as select * from events where user_id = 70 order by md5(events::text)")
    shop.execute("delete from events where user_id = 70")
    shop.execute("insert into events select * from copy")
    shop.execute("insert into events select * from copy order by occurred_at desc")
    assert all_scores(shop, 70) == before


def test_a_user_without_known_events_gets_the_popular_items(shop: Connection, scored: Scored) -> None:
    dataset = scored[2]
    popularity = dict(zip(map(int, dataset.item_keys), dataset.popularity().tolist(), strict=True))
    counts = dict(
        shop.execute(
            "select item_id, count(distinct user_id) from events where event_type = 'purchase' group by 1"
        ).fetchall()
    )
    expected = {item: counts.get(item, 0) / sum(counts.values()) for item in range(CATALOGUE)}
    assert popularity == pytest.approx(expected, rel=1e-6)
    # Of the shop's user table, of nowhere, and with events only on items that the version does not know.
    shop.execute("insert into events values (%s, 9999, 'purchase', now())", [USERS + 1])
    for user in (USERS, USERS + 1, -5):
        rows = shop.execute("select item_id, score, is_cold_start from shop.recommend(%s, 5)", [user]).fetchall()
        assert [row[2] for row in rows] == [True] * 5
        assert [row[1] for row in rows] == pytest.approx(sorted(popularity.values(), reverse=True)[:5])
        assert all(row[1] == pytest.approx(popularity[row[0]]) for row in rows)
    in_view = shop.execute(
        "select user_id, is_cold_start, array_agg(score order by rank) from shop.recommendations"
        " where user_id >= %s or user_id = 0 group by 1, 2 order by 1",
        [USERS],
    ).fetchall()
    assert [(row[0], row[1]) for row in in_view] == [(0, False), *((USERS + extra, True) for extra in range(5))]
    assert all(row[2] == pytest.approx(sorted(popularity.values(), reverse=True)[:15]) for row in in_view[1:-1])


def test_nobody_and_nothing_have_no_score(shop: Connection) -> None:
    assert shop.execute("select * from shop.recommend(null)").fetchall() == []
    assert shop.execute("select shop.score(1, null), shop.score(null, 1), shop.score(1, 9999)").fetchone() == (
        (None,) * 3
    )
    assert shop.execute("select shop.embedding(null)").fetchone() == (None,)


@pytest.mark.parametrize(("user_type", "item_type"), [("uuid", "text"), ("text", "integer"), ("integer", "uuid")])
def test_batch_and_live_agree_for_every_type_of_key(database: str, user_type: str, item_type: str) -> None:
    shop = Shop(user_type=user_type, item_type=item_type)
    with psycopg.connect(database, autocommit=True) as connection:
        shop.make(connection)
        shop.create_model(connection)
        train_and_activate(database)
        connection.execute("call vae.refresh('shop')")
        counted = connection.execute(
            "select count(*), count(distinct u.user_id) from (select distinct user_id from shop.clean_events) u"
            " cross join shop.recommend(u.user_id, k => 20) l"
            " join shop.recommendations v using (user_id, rank, item_id) where abs(v.score - l.score) <= 1e-5 * l.score"
        ).fetchone()
        shown = connection.execute("select count(*) from shop.recommendations").fetchone()
    assert counted is not None
    assert shown == (counted[0],)
    assert counted[1] == len(shop.users)


# Devices


def put_into_sessions_python(connection: Connection, kernels_on_cpu: Callable[..., str], then: str = "") -> None:
    """Makes `import cupy` find the stand-in in the session's Python, with the kernels of the shop's model."""
    digest, library = cuda_on_cpu.digest_and_library(kernels_on_cpu, QUICK.latent)
    body = (
        "import sys, types\nmodule = sys.modules['cupy'] = types.ModuleType('cupy')\n"
        f"exec({inspect.getsource(fake_cupy)!r}, vars(module))\n"
        f"module.state.libraries[{digest!r}] = {library!r}\n{then}"
    )
    connection.execute(sql.SQL("do language plpython3u {}").format(sql.Literal(body)))


def has_gpu(connection: Connection) -> bool:
    connection.execute(
        "create function pg_temp.gpus() returns integer language plpython3u as"
        " $$\ntry:\n    import cupy\n    return cupy.cuda.runtime.getDeviceCount()\nexcept Exception:\n    return 0\n$$"
    )
    row = connection.execute("select pg_temp.gpus()").fetchone()
    return row is not None and row[0] > 0


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    """Fails unless the lists are the same, scores to 1e-5: their last bit depends on who shares a tile."""
    assert [(*row[:3], row[4]) for row in found] == [(*row[:3], row[4]) for row in wanted]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in wanted], rel=1e-5)


def recommendations(connection: Connection) -> list[Any]:
    return connection.execute(
        "select user_id, rank, item_id, score, is_cold_start from shop.recommendations order by 1, 2"
    ).fetchall()


def test_cuda_without_a_gpu_gives_a_notice_and_the_answer_of_the_cpu(trained: Connection) -> None:
    if has_gpu(trained):
        pytest.skip("this server has a GPU")
    notices: list[str] = []
    trained.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    before = recommendations(trained)
    trained.execute("set vae.device = 'cuda'")
    trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
    assert len(notices) == 1
    assert notices[0].startswith("vae.device is cuda, but no GPU is usable (")
    assert notices[0].endswith("; the CPU scores")
    assert_same(recommendations(trained), before)


@pytest.mark.parametrize("setting", ["auto", "cpu"])
def test_other_settings_say_nothing(trained: Connection, setting: str) -> None:
    notices: list[str] = []
    trained.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    before = recommendations(trained)
    trained.execute(f"set vae.device = '{setting}'")
    trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
    assert notices == []
    assert_same(recommendations(trained), before)


def of_the_stand_in(connection: Connection, expression: str) -> Any:
    """Evaluates an expression in the session's Python, where `cupy` is the stand-in."""
    connection.execute(
        sql.SQL("create or replace function pg_temp.stand_in() returns text language plpython3u as {}").format(
            sql.Literal(f"import cupy; return repr({expression})")
        )
    )
    row = connection.execute("select pg_temp.stand_in()").fetchone()
    assert row is not None
    return ast.literal_eval(row[0])


@pytest.mark.parametrize("precision", ["float32", "float16x3"])
def test_a_refresh_on_a_device_gives_the_answer_of_the_cpu(
    trained: Connection, kernels_on_cpu: Callable[..., str], precision: str
) -> None:
    notices: list[str] = []
    trained.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    before = recommendations(trained)
    put_into_sessions_python(trained, kernels_on_cpu)
    trained.execute(f"set vae.device = 'cuda'; set vae.gpu_memory = '100MB'; set vae.gpu_precision = '{precision}'")
    trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
    assert notices == []
    assert of_the_stand_in(trained, "cupy.state.computations") > 30
    assert 0 < of_the_stand_in(trained, "cupy.state.most") <= 100 * 2**20
    # The session goes on and holds nothing.
    assert of_the_stand_in(trained, "(cupy.state.used, len(cupy.state.handles))") == (0, 0)
    after = recommendations(trained)
    assert [(row[:3], row[4]) for row in after] == [(row[:3], row[4]) for row in before]
    np.testing.assert_allclose([row[3] for row in after], [row[3] for row in before], rtol=1e-5)


def test_a_device_that_runs_out_of_memory_in_a_refresh_leaves_it_to_the_cpu(
    trained: Connection, kernels_on_cpu: Callable[..., str]
) -> None:
    notices: list[str] = []
    trained.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    before = recommendations(trained)
    broken = "module.state.failure, module.state.countdown = module.OutOfMemoryError('out of memory'), 60"
    put_into_sessions_python(trained, kernels_on_cpu, broken)
    trained.execute("set vae.device = 'cuda'")
    trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
    assert notices == ["the GPU failed (out of memory); the CPU scores"]
    assert of_the_stand_in(trained, "cupy.state.computations") > 60
    assert of_the_stand_in(trained, "cupy.state.used") == 0
    assert_same(recommendations(trained), before)


def test_a_device_is_verified_as_the_cpu_is(trained: Connection, kernels_on_cpu: Callable[..., str]) -> None:
    put_into_sessions_python(trained, kernels_on_cpu)
    query = "select device, passed, numpy_version, blas, golden_users > 10, detail from vae.verify('shop') order by 1"
    for precision in ("float32", "float16x3"):
        trained.execute(f"set vae.gpu_precision = '{precision}'")
        cpu, cuda = trained.execute(query).fetchall()
        assert (cpu[:2], cpu[4:]) == (("cpu", True), (True, None))
        assert cuda == ("cuda", True, "cupy 14.2.0", "a stand-in", True, None)
    assert of_the_stand_in(trained, "cupy.state.used") == 0
    # A precision that gives up the promise does not keep it.
    trained.execute("set vae.gpu_precision = 'float16'")
    _, cuda = trained.execute(query).fetchall()
    assert cuda[1] is False
    assert "the largest relative difference of a score is" in cuda[5]


def test_a_device_that_breaks_is_no_fault_of_the_version(
    trained: Connection, kernels_on_cpu: Callable[..., str]
) -> None:
    notices: list[str] = []
    trained.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    broken = "module.state.failure, module.state.countdown = ImportError('libcublas.so.12: not found'), 20"
    put_into_sessions_python(trained, kernels_on_cpu, broken)
    assert trained.execute("select device, passed, detail from vae.verify('shop')").fetchall() == [("cpu", True, None)]
    assert notices == ["the GPU failed (libcublas.so.12: not found); the CPU scores"]
    assert trained.execute(
        "select status from vae.models m, vae_private.activation_gates(m.model_id, m.name, 1) where gate = 'parity'"
    ).fetchone() == ("pass",)


def test_live_calls_stay_on_the_cpu(trained: Connection, kernels_on_cpu: Callable[..., str]) -> None:
    put_into_sessions_python(trained, kernels_on_cpu)
    trained.execute("set vae.device = 'cuda'")
    assert trained.execute("select count(*) from shop.recommend(%s, 5)", [Shop().users[0]]).fetchone() == (5,)
    assert of_the_stand_in(trained, "cupy.state.computations") == 0


def test_a_session_gives_the_gpu_back(trained: Connection, kernels_on_cpu: Callable[..., str]) -> None:
    if has_gpu(trained):
        pytest.skip("this server has a GPU")
    assert trained.execute("select vae.release_gpu()").fetchone() == (False,)
    put_into_sessions_python(trained, kernels_on_cpu)
    # There is no driver whose context could be reset.
    assert trained.execute("select vae.release_gpu()").fetchone() == (False,)


def test_a_wrong_device_is_refused_and_the_view_keeps_its_content(trained: Connection) -> None:
    before = recommendations(trained)
    trained.execute("set vae.device = 'gpu'")
    with pytest.raises(psycopg.Error, match=r"failed: vae\.device is 'gpu'") as refused:
        trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
    assert refused.value.sqlstate == "22023"
    assert refused.value.diag.message_hint == ("set it to one of auto, cpu, cuda; the view keeps its last good content")
    assert_same(recommendations(trained), before)
    trained.execute("reset vae.device")
    trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
