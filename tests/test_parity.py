"""PyTorch, NumPy, live calls and the materialized view give the same scores."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from psycopg import sql

import fake_cupy
from conftest import create_database, drop_database
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset, read_dataset
from pgvae.model import AttentionVae
from pgvae.server import Server
from pgvae_runtime import forward
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import History
from shop import Shop, train_and_activate
from variants import install_variant, publish_network, random_network, torch_scores

Connection = psycopg.Connection[Any]

USERS, ITEMS, MAX_HISTORY = 90, 40, 12
TINY = TrainingConfig(embedding=12, hidden=10, latent=6)
NOW = datetime(2025, 1, 1, tzinfo=UTC)


def random_dataset(generator: np.random.Generator, counts: list[int], items: int) -> tuple[Dataset, History]:
    """Gives a dataset of which only the shape matters, and a history of as many events for each user as said."""
    total = sum(counts)
    columns = {
        "item": generator.integers(0, items, total),
        "event_type": generator.integers(0, 3, total),
        "occurred_at": 1.7e9 + 3600.0 * generator.integers(0, 9000, total),
    }
    dataset = Dataset(
        user=np.repeat(np.arange(len(counts)), counts),
        weight=np.ones(total, dtype=np.float32),
        item_keys=[str(item) for item in range(items)],
        event_types=["view", "add_to_cart", "purchase"],
        user_count=len(counts),
        **columns,
    )
    return dataset, History(counts=np.array(counts), **columns)


def assert_same_ranking(columns: Any, expected: Any) -> None:
    """Compares a ranking with the scores that should have ranked it: it may differ only among equal scores."""
    best = np.sort(expected, axis=-1)[..., ::-1][..., : columns.shape[-1]]
    np.testing.assert_allclose(np.take_along_axis(expected, columns, axis=-1), best, rtol=1e-5)


# PyTorch and NumPy


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("config", "items"),
    [(TINY, 40), (TrainingConfig(embedding=1, hidden=1, latent=1), 2), (TrainingConfig(), 3000)],
    ids=["tiny", "of width one", "of default size"],
)
def test_numpy_scores_as_pytorch_does_whatever_the_weights_and_histories(
    config: TrainingConfig, items: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    # Empty, one token, exactly as many as are seen, more, and far more, at the ends and in the middle.
    counts = [0, 1, MAX_HISTORY, MAX_HISTORY + 1, 0, 0, 200, *generator.integers(0, 30, 20).tolist(), 1, 0]
    dataset, history = random_dataset(generator, counts, items)
    network = random_network(dataset, config, seed)
    tokens = history.tokens(MAX_HISTORY)
    weights = network.weights()
    with torch.no_grad():
        mean, _ = network.encode(tokens)
        expected = torch.softmax(network.decode(mean), dim=1).numpy()
    z = forward.encode(np, weights, tokens)
    assert np.abs(z - mean.numpy()).max() <= 1e-5 * np.abs(mean.numpy()).max()
    filled = history.counts > 0
    scores, _ = score_users(np, weights, history, max_history=MAX_HISTORY)
    np.testing.assert_allclose(scores[filled], expected[filled], rtol=1e-5)
    # A user without events is not asked of the network, but it would give the same for an empty history.
    np.testing.assert_allclose(forward.softmax(np, forward.decode(np, weights, z)), expected, rtol=1e-5)
    columns, _ = forward.top_k(np, scores[filled], 20)
    assert_same_ranking(columns, expected[filled])


def test_one_item_again_and_again_is_scored_as_pytorch_does() -> None:
    dataset, history = random_dataset(np.random.default_rng(0), [3, 12, 40], ITEMS)
    history.item[:] = 7
    network = random_network(dataset, TINY, 0)
    with torch.no_grad():
        expected = torch.softmax(network.decode(network.encode(history.tokens(12))[0]), dim=1).numpy()
    scores, _ = score_users(np, network.weights(), history, max_history=12)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_sampled_z_is_centred_on_the_mean_that_is_scored_with() -> None:
    dataset, history = random_dataset(np.random.default_rng(0), [5, 9], ITEMS)
    network = random_network(dataset, TINY, 0)
    tokens = history.tokens(12)
    with torch.no_grad():
        network.log_variance_weight.zero_()
        network.log_variance_bias.fill_(-60.0)
        logits, mean, _ = network(tokens, torch.Generator().manual_seed(1))
        np.testing.assert_allclose(logits.numpy(), network.decode(mean).numpy(), rtol=1e-5, atol=1e-5)


# The database


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
def scored(server: Server, template: str) -> Iterator[tuple[str, AttentionVae, Dataset]]:
    """A database whose model has a random network as its active version, refreshed in batches of seven users."""
    create_database(server, "parity", template)
    dsn = server.dsn("parity")
    shop = Shop()
    with psycopg.connect(dsn, autocommit=True) as connection:
        shop.make(connection)
        connection.execute("truncate events")
        shop.add(connection, shop_rows())
        connection.execute("create table users (user_id bigint primary key)")
        connection.execute("insert into users select generate_series(0, %s)", [USERS + 4])
        options = {"max_history": MAX_HISTORY, "min_events": 100, "recommendations": 15}
        shop.create_model(connection, users="users", options=options)
    version, network, dataset = publish_network(dsn, "shop", TINY, seed=5)
    install_variant(dsn, "batch", ("_MAX_BATCH = 4096", "_MAX_BATCH = 7"))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select * from vae.activate('shop', %s, force => true)", [version])
        connection.execute("call vae.refresh('shop')")
    yield dsn, network, dataset
    drop_database(server, "parity")


@pytest.fixture
def shop(scored: tuple[str, AttentionVae, Dataset]) -> Iterator[Connection]:
    """A connection whose changes are rolled back, since the tests share the database."""
    with psycopg.connect(scored[0]) as connection:
        yield connection
        connection.rollback()


@pytest.fixture(scope="module")
def expected(scored: tuple[str, AttentionVae, Dataset]) -> np.ndarray[Any, Any]:
    """PyTorch's scores of every user with events, [USERS, ITEMS]."""
    _, network, dataset = scored
    assert dataset.item_keys == sorted(str(item) for item in range(ITEMS))
    scores = torch_scores(network, dataset, list(range(USERS)), MAX_HISTORY)
    return scores[:, [dataset.item_keys.index(str(item)) for item in range(ITEMS)]]


def all_scores(connection: Connection, user: int) -> dict[int, float]:
    """Gives the score of every item for a user, by a live call, best first."""
    rows = connection.execute(
        """select item_id, score from shop.recommend(%s, k => 10000, options => '{"exclude_seen": false}')""", [user]
    ).fetchall()
    return dict(rows)


def test_live_calls_give_the_scores_of_pytorch(shop: Connection, expected: np.ndarray[Any, Any]) -> None:
    for user in range(USERS):
        scores = all_scores(shop, user)
        assert len(scores) == ITEMS
        np.testing.assert_allclose([scores[item] for item in range(ITEMS)], expected[user], rtol=1e-5)
        assert_same_ranking(np.array(list(scores)), expected[user])
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert sum(scores.values()) == pytest.approx(1, rel=1e-5)


def test_the_score_of_one_item_is_the_one_in_the_list(shop: Connection, expected: np.ndarray[Any, Any]) -> None:
    rows = shop.execute(
        "select u, i, shop.score(u, i) from generate_series(0, %s, 9) u, generate_series(0, %s, 7) i",
        [USERS - 1, ITEMS - 1],
    ).fetchall()
    assert len(rows) == 60
    for user, item, score in rows:
        assert score == pytest.approx(expected[user, item], rel=1e-5)
        assert score == all_scores(shop, user)[item]


def test_an_embedding_is_the_mean_of_pytorch(shop: Connection, scored: tuple[str, AttentionVae, Dataset]) -> None:
    _, network, dataset = scored
    with torch.no_grad():
        means = network.encode(dataset.history(np.arange(USERS)).tokens(MAX_HISTORY))[0].numpy()
    for user in range(0, USERS, 8):
        row = shop.execute("select shop.embedding(%s)", [user]).fetchone()
        assert row is not None
        assert np.abs(np.array(row[0]) - means[user]).max() <= 1e-5 * np.abs(means[user]).max()


def test_a_trained_model_scores_as_pytorch_does(trained: Connection, trained_database: str) -> None:
    with psycopg.connect(trained_database) as reader:
        dataset = read_dataset(reader, "shop")
        network = network_of_active_version(reader, dataset)
    users = Shop().users
    expected = torch_scores(network, dataset, list(range(len(users))), 500)
    for number in range(0, len(users), 5):
        scores = all_scores(trained, users[number])
        np.testing.assert_allclose([scores[int(key)] for key in dataset.item_keys], expected[number], rtol=1e-5)


def test_the_view_holds_what_live_calls_give(shop: Connection) -> None:
    differences = shop.execute(
        """
        with live as (
            select u.user_id, r.rank, r.item_id, r.score, r.is_cold_start, r.model_version
            from users u cross join shop.recommend(u.user_id, k => 15) r
        )
        select count(*), count(v.item_id), count(*) filter (where v.item_id = l.item_id),
            count(*) filter (where abs(v.score - l.score) <= 1e-5 * l.score),
            count(*) filter (where v.is_cold_start = l.is_cold_start and v.model_version = l.model_version)
        from live l full join shop.recommendations v using (user_id, rank)
        """
    ).fetchone()
    assert differences == ((USERS + 5) * 15,) * 5


def test_the_refresh_went_through_many_batches_and_knows_each_user_once(shop: Connection) -> None:
    rows = shop.execute("select count(*), count(distinct user_id) from shop.recommendations_materialized").fetchall()
    assert rows == [(USERS + 5, USERS + 5)]


def test_a_refresh_gives_the_same_again(shop: Connection, scored: tuple[str, AttentionVae, Dataset]) -> None:
    before = recommendations(shop)
    shop.commit()
    with psycopg.connect(scored[0], autocommit=True) as other:
        other.execute("call vae.refresh('shop')")
    assert recommendations(shop) == before


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
    assert {item for item, _ in without} == set(range(ITEMS)) - bought
    assert set(everything) == set(range(ITEMS))
    assert all(everything[item] == score for item, score in without)
    explicit = shop.execute("select item_id, score from shop.recommend(80, 100, '{\"exclude_seen\": true}')").fetchall()
    assert explicit == without
    in_view = shop.execute("select item_id from shop.recommendations where user_id = 80").fetchall()
    assert not {item for (item,) in in_view} & bought


def test_ranks_rise_from_one_and_k_is_the_length(shop: Connection) -> None:
    for k in (1, 2, 10, ITEMS - 1):
        rows = shop.execute("select rank from shop.recommend(-1, k => %s)", [k]).fetchall()
        assert [row[0] for row in rows] == list(range(1, k + 1))
    assert shop.execute("select count(*) from shop.recommend(-1)").fetchone() == (10,)


def test_a_user_of_a_minute_ago_is_scored_at_once(shop: Connection, scored: tuple[str, AttentionVae, Dataset]) -> None:
    _, network, dataset = scored
    stranger = USERS + 100
    shop.execute("insert into users values (%s)", [stranger])
    cold = all_scores(shop, stranger)
    assert shop.execute("select bool_and(is_cold_start) from shop.recommend(%s)", [stranger]).fetchone() == (True,)
    assert shop.execute("select shop.embedding(%s)", [stranger]).fetchone() == (None,)
    bought = [("3", "view", 100.0), ("17", "purchase", 4.0), ("3", "add_to_cart", 0.5)]
    for item, kind, days in bought:
        shop.execute(
            "insert into events values (%s, %s, %s, now() - %s * interval '1 day')", [stranger, int(item), kind, days]
        )
    history = History(
        counts=np.array([3]),
        item=np.array([dataset.item_keys.index(item) for item, _, _ in bought]),
        event_type=np.array([dataset.event_types.index(kind) for _, kind, _ in bought]),
        occurred_at=np.array([-86_400 * days for _, _, days in bought]),
    )
    with torch.no_grad():
        expected = torch.softmax(network.decode(network.encode(history.tokens(MAX_HISTORY))[0]), dim=1).numpy()[0]
    warm = all_scores(shop, stranger)
    assert warm != cold
    np.testing.assert_allclose([warm[int(key)] for key in dataset.item_keys], expected, rtol=1e-5)
    rows = shop.execute("select item_id, is_cold_start from shop.recommend(%s, k => 100)", [stranger]).fetchall()
    assert {row[1] for row in rows} == {False}
    assert {row[0] for row in rows} == set(range(ITEMS)) - {17}


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


def test_a_user_without_known_events_gets_the_popular_items(shop: Connection, scored: tuple[Any, Any, Dataset]) -> None:
    dataset = scored[2]
    popularity = dict(zip(map(int, dataset.item_keys), dataset.popularity().tolist(), strict=True))
    counts = dict(
        shop.execute(
            "select item_id, count(distinct user_id) from events where event_type = 'purchase' group by 1"
        ).fetchall()
    )
    assert popularity == pytest.approx({item: counts[item] / sum(counts.values()) for item in counts}, rel=1e-6)
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
    assert all(row[2] == pytest.approx(sorted(popularity.values(), reverse=True)[:15]) for row in in_view[1:])


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


def put_into_sessions_python(connection: Connection) -> None:
    """Makes `import cupy` find the stand-in in the session's Python."""
    body = (
        "import sys, types\nmodule = sys.modules['cupy'] = types.ModuleType('cupy')\n"
        f"exec({inspect.getsource(fake_cupy)!r}, vars(module))"
    )
    connection.execute(sql.SQL("do language plpython3u {}").format(sql.Literal(body)))


def has_gpu(connection: Connection) -> bool:
    connection.execute(
        "create function pg_temp.gpus() returns integer language plpython3u as"
        " $$\ntry:\n    import cupy\n    return cupy.cuda.runtime.getDeviceCount()\nexcept Exception:\n    return 0\n$$"
    )
    row = connection.execute("select pg_temp.gpus()").fetchone()
    return row is not None and row[0] > 0


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
    trained.execute("call vae.refresh('shop')")
    assert len(notices) == 1
    assert notices[0].startswith("vae.device is cuda, but no GPU is usable (")
    assert notices[0].endswith("; the CPU scores")
    assert recommendations(trained) == before


@pytest.mark.parametrize("setting", ["auto", "cpu"])
def test_other_settings_say_nothing(trained: Connection, setting: str) -> None:
    notices: list[str] = []
    trained.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    before = recommendations(trained)
    trained.execute(f"set vae.device = '{setting}'")
    trained.execute("call vae.refresh('shop')")
    assert notices == []
    assert recommendations(trained) == before


def test_a_refresh_on_a_device_gives_the_answer_of_the_cpu(trained: Connection) -> None:
    before = recommendations(trained)
    put_into_sessions_python(trained)
    trained.execute("set vae.device = 'cuda'")
    trained.execute("call vae.refresh('shop')")
    trained.execute(
        "create function pg_temp.computations() returns integer language plpython3u as"
        " 'import cupy; return cupy.state.computations'"
    )
    row = trained.execute("select pg_temp.computations()").fetchone()
    assert row is not None
    assert row[0] > 10
    after = recommendations(trained)
    assert [(row[:3], row[4]) for row in after] == [(row[:3], row[4]) for row in before]
    np.testing.assert_allclose([row[3] for row in after], [row[3] for row in before], rtol=1e-5)


def test_a_wrong_device_is_refused_and_the_view_keeps_its_content(trained: Connection) -> None:
    before = recommendations(trained)
    trained.execute("set vae.device = 'gpu'")
    with pytest.raises(psycopg.Error, match=r"failed: vae\.device is 'gpu'") as refused:
        trained.execute("call vae.refresh('shop')")
    assert refused.value.sqlstate == "22023"
    assert refused.value.diag.message_hint == ("set it to one of auto, cpu, cuda; the view keeps its last good content")
    assert recommendations(trained) == before
    trained.execute("reset vae.device")
    trained.execute("call vae.refresh('shop')")


def network_of_active_version(connection: Connection, dataset: Dataset) -> AttentionVae:
    """Gives the active version as a PyTorch network, from the raw bytes of its tensors."""
    parts: dict[str, tuple[str, list[int], bytes]] = {}
    for name, dtype, shape, data in connection.execute(
        "select t.name, t.dtype, t.shape, t.data from vae_private.scoring_tensors t order by t.name, t.chunk"
    ).fetchall():
        parts[name] = (dtype, shape, parts.get(name, ("", [], b""))[2] + data)
    weights = {
        name: torch.tensor(np.frombuffer(data, dtype).reshape(shape)) for name, (dtype, shape, data) in parts.items()
    }
    _, embedding = weights["item_embedding"].shape
    latent, hidden = weights["mean_weight"].shape
    network = AttentionVae(
        item_popularity=weights["item_popularity"].numpy(),
        event_types=len(dataset.event_types),
        config=TrainingConfig(embedding=embedding, hidden=hidden, latent=latent),
    )
    network.load_state_dict(weights)
    return network.eval()
