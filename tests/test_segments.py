"""Segments: found, named, numbered, kept from one version to the next; live, materialized, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psycopg
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from pgvae import segments
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.segments import Previous, find_segments
from pgvae.versions import read_weights
from pgvae_runtime.features import FeatureBag, FeatureColumn, FeaturePipeline
from shop import QUICK, Shop, refusal, train

USERS = Shop().users
STORED = "select user_id, segment, segment_name, similarity, is_cold_start, model_version from shop.user_segments"
ROWS = (
    "select segment, name, share, mean_events, top_categories, similarity, overlap from vae.segments"
    " where version_id = %s order by place"
)


def rows(connection: psycopg.Connection, query: str, parameters: Any = None) -> list[Any]:
    return connection.execute(query, parameters).fetchall()


def refresh(connection: psycopg.Connection) -> None:
    connection.execute("call vae.refresh('shop', views => array['user_segments'])")


# Live and materialized


def test_every_user_has_the_segment_that_a_live_call_gives(shared_trained: psycopg.Connection) -> None:
    stored = {row[0]: row[1:] for row in rows(shared_trained, STORED)}
    assert set(stored) == set(USERS)
    for user in USERS:
        (live,) = rows(shared_trained, "select * from shop.segment(%s)", [user])
        assert (live[:2], live[3:]) == (stored[user][:2], stored[user][3:])
        assert live[2] == pytest.approx(stored[user][2], rel=1e-5)
    assert {row[3] for row in stored.values()} == {False}


def test_a_user_is_in_the_segment_whose_centre_has_the_largest_cosine(shared_trained: psycopg.Connection) -> None:
    centroids = read_weights(shared_trained, 1)["segment_centroids"]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, rtol=1e-6)
    numbers = [row[0] for row in rows(shared_trained, ROWS, [1])]
    assert len(numbers) == len(centroids) > 1
    for user, number, _, similarity, _, _ in rows(shared_trained, STORED):
        position = np.array(rows(shared_trained, "select shop.embedding(%s)", [user])[0][0])
        cosines = centroids @ position / np.linalg.norm(position)
        assert numbers[int(cosines.argmax())] == number
        assert similarity == pytest.approx(cosines.max(), rel=1e-5)


def test_the_segments_add_up(shared_trained: psycopg.Connection) -> None:
    found = rows(
        shared_trained,
        "select segment, name, users, share, mean_similarity, model_version, scored_at from shop.segments"
        " order by segment",
    )
    assert [row[0] for row in found] == list(range(1, len(found) + 1))
    assert len({row[1] for row in found}) == len(found)
    assert sum(row[2] for row in found) == len(USERS)
    assert sum(row[3] for row in found) == pytest.approx(1.0, rel=1e-5)
    for number, name, users, share, similarity, version, scored_at in found:
        assert rows(
            shared_trained,
            "select min(segment_name), count(*), count(*) / %s::float8, max(model_version), max(scored_at)"
            " from shop.user_segments where segment = %s",
            [len(USERS), number],
        ) == [(name, users, pytest.approx(share), version, scored_at)]
        assert -1 <= similarity <= 1


def test_a_null_key_asks_for_nothing_and_a_stranger_is_in_no_segment(shared_trained: psycopg.Connection) -> None:
    assert rows(shared_trained, "select * from shop.segment(null)") == []
    assert rows(shared_trained, "select * from shop.segment(7)") == [(None, None, None, True, 1)]


def test_an_event_of_a_minute_ago_counts(trained: psycopg.Connection) -> None:
    trained.execute(
        "insert into events select 7, item_id, event_type, occurred_at from events where user_id = %s", [USERS[0]]
    )
    own, other = (
        rows(trained, "select segment, similarity from shop.segment(%s)", [user])[0] for user in (USERS[0], 7)
    )
    assert own[0] == other[0]
    assert other[1] == pytest.approx(own[1], rel=1e-5)


def test_a_refresh_of_the_same_events_changes_nothing(trained: psycopg.Connection) -> None:
    of_users = f"{STORED} order by user_id"
    of_segments = "select segment, name, users, share from shop.segments order by segment"
    before = rows(trained, of_users), rows(trained, of_segments)
    refresh(trained)
    assert (rows(trained, of_users), rows(trained, of_segments)) == before
    assert rows(trained, "select view, state, row_count from vae.refreshes order by refresh_id desc limit 1") == [
        ("user_segments", "succeeded", len(USERS))
    ]


# From one version to the next


def test_the_same_data_and_seed_give_the_same_segments(connection: psycopg.Connection) -> None:
    """Also those of a user without events, of a shop whose items have categories, with uuid and text keys."""
    shop = Shop(user_type="uuid", item_type="text")
    shop.make(connection)
    connection.execute("create table users as select distinct user_id from events")
    connection.execute("insert into users values ('00000000-0000-0000-0000-000000000000')")
    connection.execute(
        "create table items as select item_id, case when dense_rank() over (order by item_id) % 2 = 0"
        " then 'Books' else 'Toys' end as category from (select distinct item_id from events) i"
    )
    shop.create_model(connection, users="users", items="items")
    dsn = connection.info.dsn
    train(dsn)
    train(dsn)
    first = rows(connection, ROWS, [1])
    assert first == rows(connection, ROWS, [2])
    assert [row[0] for row in first] == list(range(1, len(first) + 1))
    assert {row[6] for row in first} == {None}
    assert [row[2] for row in first] == sorted((row[2] for row in first), reverse=True)
    assert (read_weights(connection, 1)["segment_centroids"] == read_weights(connection, 2)["segment_centroids"]).all()

    connection.execute("select * from vae.activate('shop', 1, force => true)")
    refresh(connection)
    joined = "select count(*) from users u join shop.user_segments s using (user_id)"
    assert rows(connection, joined) == [(31,)]
    assert rows(connection, STORED + " where is_cold_start") == [
        (rows(connection, "select uuid '00000000-0000-0000-0000-000000000000'")[0][0], None, None, None, True, 1)
    ]
    assert rows(connection, "select sum(users) from shop.segments") == [(30,)]
    before = rows(connection, "select user_id, segment, segment_name from shop.user_segments order by user_id")

    # The next training finds the active version's segments again: same numbers, names, users.
    train(dsn)
    assert [row[:2] for row in rows(connection, ROWS, [3])] == [row[:2] for row in first]
    assert {row[6] for row in rows(connection, ROWS, [3])} == {1.0}
    connection.execute("select * from vae.activate('shop', 3, force => true)")
    refresh(connection)
    assert rows(connection, "select user_id, segment, segment_name from shop.user_segments order by user_id") == before

    # What never was a segment gets a number that none had.
    train(dsn, config=replace(QUICK, seed=5, segments=2))
    for number, name, _, _, _, _, overlap in rows(connection, ROWS, [4]):
        old = {row[0]: row[1] for row in first}
        if overlap is None:
            assert number > max(old)
        else:
            assert (name, overlap >= 1 / 3) == (old[number], True)
    assert len(rows(connection, ROWS, [4])) <= 2


def previous(names: list[tuple[int, str]], highest: int) -> Previous:
    return Previous(weights={}, item_keys=[], event_types=[], user_pipeline={}, names=names, highest=highest)


def test_segments_keep_the_number_of_those_they_share_most_users_with() -> None:
    before = np.array([0] * 10 + [1] * 10 + [2] * 10 + [-1] * 5)
    # Place 0 is segment 8 but for two users; segment 4 fell apart; place 3 is all of segment 9 and four unknown users.
    places = np.array([0] * 8 + [1] * 2 + [1] * 3 + [2] * 3 + [4] * 2 + [5] * 2 + [3] * 10 + [3] * 4 + [0])
    kept = segments._kept(previous([(8, "tea"), (4, "toys"), (9, "wine")], 9), places, before, 6)
    assert kept == {0: (8, "tea", 0.8), 3: (9, "wine", 1.0)}


def test_two_segments_never_claim_the_same_number() -> None:
    before = np.zeros(20, dtype=np.int64)
    places = np.array([0] * 10 + [1] * 10)
    assert segments._kept(previous([(3, "tea")], 3), places, before, 2) == {0: (3, "tea", 0.5)}


# Clustering and names


def taste_shop(*, with_categories: bool) -> Dataset:
    """Gives 60 users, each third of which has events on its own 4 of 12 items, and one on item 0."""
    user, item = [], []
    for number in range(60):
        own = 4 * (number % 3)
        for event in range(6):
            user.append(number)
            item.append(own + event % 4 if event < 5 else 0)
    count = len(user)
    features: dict[str, Any] = {}
    if with_categories:
        column = FeatureColumn(name="category", kind="category", first=0, vocabulary=("Books", "Toys", "Wine"))
        price = FeatureColumn(name="price", kind="number", first=3, edges=(5.0,))
        features["item_pipeline"] = FeaturePipeline(columns=(price, column))
        features["item_features"] = FeatureBag.of([[number // 4, 3] for number in range(12)])
    return Dataset(
        user=np.array(user), item=np.array(item), event_type=np.zeros(count, dtype=np.int64),
        occurred_at=np.arange(count, dtype=np.float64), weight=np.ones(count, dtype=np.float32),
        item_keys=[f"item {number}" for number in range(12)], event_types=["purchase"], user_count=60, **features,
    )  # fmt: skip


def taste_weights(dataset: Dataset) -> dict[str, Any]:
    """Gives weights whose latent position is the mean of the items' embeddings: one direction for each taste."""
    from pgvae.model import AttentionVae

    weights = AttentionVae(dataset, TrainingConfig(latent=8, hidden=4)).weights()
    for name in ("event_type_embedding", "age_embedding", "order_embedding"):
        weights[name][:] = 0
    weights["item_embedding"] = np.repeat(np.eye(8, dtype=np.float32)[:3], 4, axis=0)
    return weights


def test_users_of_one_taste_are_one_segment_named_by_it() -> None:
    dataset = taste_shop(with_categories=True)
    found = find_segments(dataset, taste_weights(dataset), TrainingConfig(segments=3), max_history=50)
    assert sorted(row.name for row in found.rows) == ["Books", "Toys", "Wine"]
    assert [row.share for row in found.rows] == [pytest.approx(1 / 3)] * 3
    assert {row.mean_events for row in found.rows} == {6.0}
    # 80 + 80 + 80 pairs of a user and an item, and 40 more with item 0, which is a book: 4 of 5 of the toys' pairs.
    assert {row.name: row.top_categories for row in found.rows} == {
        "Books": f"Books {1 / (120 / 280):.1f}×",
        "Toys": f"Toys {0.8 / (80 / 280):.1f}×",
        "Wine": f"Wine {0.8 / (80 / 280):.1f}×",
    }


def test_only_a_segment_that_had_no_name_is_given_another() -> None:
    dataset = taste_shop(with_categories=True)
    weights, config = taste_weights(dataset), TrainingConfig(segments=3)
    first = find_segments(dataset, weights, config, max_history=50)
    before = replace(
        previous([(7, "mixed tastes"), (8, "mixed tastes (2)"), (9, "Toys of old")], 9),
        weights={**weights, **first.tensors()},
        item_keys=list(dataset.item_keys),
        event_types=list(dataset.event_types),
        user_pipeline=FeaturePipeline().to_json(),
    )
    found = find_segments(dataset, weights, config, max_history=50, previous=before)
    assert [(row.segment, row.name) for row in found.rows] == [
        (7, first.rows[0].name),
        (8, first.rows[1].name),
        (9, "Toys of old"),
    ]


def test_users_are_clustered_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where several wait for each other, on a busy machine, it takes seven times as long.
    threads: set[int] = set()
    real = segments._lloyd

    def noted(*arguments: Any) -> Any:
        threads.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return real(*arguments)

    monkeypatch.setattr(segments, "_lloyd", noted)
    dataset = taste_shop(with_categories=False)
    with threadpool_limits(2, user_api="blas"):
        find_segments(dataset, taste_weights(dataset), TrainingConfig(segments=3), max_history=50)
    assert threads == {1}


def test_without_a_column_that_tells_a_segment_is_named_by_its_items() -> None:
    dataset = taste_shop(with_categories=False)
    found = find_segments(dataset, taste_weights(dataset), TrainingConfig(segments=3), max_history=50)
    assert sorted(row.name for row in found.rows) == ["item 1, item 2", "item 4, item 5", "item 8, item 9"]


def test_what_few_users_have_is_no_name() -> None:
    dataset = taste_shop(with_categories=False)
    # Four of the users, fewer than the support, are known for item 11 alone.
    places = np.where(np.arange(60) < 4, 0, 1)
    few, others = segments._characteristics(dataset, np.arange(60), places, 2)
    assert few == []
    assert segments._name(few, set()) == "mixed tastes"
    assert segments._name(few, {"mixed tastes"}) == "mixed tastes (2)"
    assert segments._name([("tea", 2.0), ("wine", 1.5), ("toys", 1.4)], {"tea, wine"}) == "tea, wine, toys"
    assert segments._name([("tea", 2.0)], {"tea"}) == "tea (2)"
    assert all(lift >= 1.2 for _, lift in others)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ([("title", "words"), ("brand", "category"), ("category_name", "category")], "category_name"),
        ([("title", "words"), ("brand", "category")], "brand"),
        ([("title", "words"), ("tags", "tags")], "tags"),
        ([("price", "number")], None),
    ],
)
def test_the_column_that_names_segments(columns: list[tuple[str, str]], chosen: str | None) -> None:
    given = [FeatureColumn(name=name, kind=kind, first=0, vocabulary=("a", "b")) for name, kind in columns]
    found = segments._telling_columns(given)
    assert (found[0].name if found else None) == chosen


def test_words_name_segments_rather_than_numbers_do() -> None:
    column = partial(FeatureColumn, kind="category", first=0)
    seller = column(name="seller_id", vocabulary=("23", "5"))
    organic = column(name="organic", vocabulary=("false", "true"))
    colour = column(name="colour", vocabulary=("", "12", "red"))
    title = replace(colour, name="title", kind="words")
    category = replace(seller, name="category_no")
    assert segments._telling_columns([seller, title, organic, colour, category]) == [
        category,
        colour,
        title,
        seller,
        organic,
    ]


def test_segments_are_named_by_a_column_that_sets_them_apart() -> None:
    dataset = taste_shop(with_categories=True)
    _, category = dataset.item_pipeline.columns
    colour = FeatureColumn(name="colour", kind="category", first=0, vocabulary=("blue", "red"))
    # A column that comes first, and that is the same in all segments.
    tokens = [[item % 2, 2 + item // 4] for item in range(12)]
    coloured = replace(
        dataset,
        item_features=FeatureBag.of(tokens),
        item_pipeline=FeaturePipeline(columns=(colour, replace(category, name="kind", first=2))),
    )
    places = np.arange(60) % 3
    assert segments._characteristics(coloured, np.arange(60), places, 3) == segments._characteristics(
        dataset, np.arange(60), places, 3
    )
    assert segments._set_apart(coloured, np.arange(60), places, 3, colour) == [[], [], []]


def test_the_number_of_segments_is_the_one_that_fits() -> None:
    random = np.random.default_rng(3)
    centres = np.eye(16, dtype=np.float32)[:6]
    own = np.repeat(centres, 40, axis=0) + 0.05 * random.normal(size=(240, 16)).astype(np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    found = segments._cluster(own, TrainingConfig(), None, 0)
    assert len(found) == 6
    np.testing.assert_allclose(np.sort(found @ centres.T, axis=1)[:, -1], 1.0, atol=0.01)
    assert segments.silhouette(own, found) > 0.9
    assert segments.silhouette(own, found[:1]) == 0.0
    # Few users have few segments, one alone has one.
    assert len(segments._cluster(own[:25], TrainingConfig(), None, 0)) <= 2
    assert len(segments._cluster(own[:1], TrainingConfig(), None, 0)) == 1
    assert len(segments._cluster(np.repeat(own[:1], 30, axis=0), TrainingConfig(), None, 0)) == 1


def test_there_are_more_segments_where_tastes_have_come() -> None:
    random = np.random.default_rng(3)
    own = np.repeat(np.eye(16, dtype=np.float32)[:6], 40, axis=0) + 0.05 * random.normal(size=(240, 16))
    own = (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32)
    taste = np.repeat(np.arange(6), 40)
    # Three of the tastes were one segment.
    before = np.minimum(taste, 3)
    assert len(segments._cluster(own, TrainingConfig(), before, 4)) == 6
    # Segments that dissolve come back.
    assert len(segments._cluster(own, TrainingConfig(), np.where(taste < 2, taste, -1), 2)) == 6
    # Where as many are asked for as there were, they stay.
    assert len(segments._cluster(own, TrainingConfig(segments=4), before, 4)) == 4


def test_segments_that_separate_about_as_well_as_new_ones_go_on() -> None:
    own = np.random.default_rng(4).normal(size=(600, 3)).astype(np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    first = segments._cluster(own, TrainingConfig(seed=1), None, 0)
    before, _ = segments.nearest(own, first)
    other = segments._cluster(own, TrainingConfig(seed=2), None, 0)
    assert (segments.nearest(own, first)[1] != segments.nearest(own, other)[1]).any()
    again = segments._cluster(own, TrainingConfig(seed=2), before, len(first))
    assert (segments.nearest(own, again)[0] == before).all()


def test_no_segment_is_of_a_handful_of_users_unless_so_many_are_asked_for() -> None:
    own = np.repeat(np.eye(16, dtype=np.float32)[:5], [40, 40, 40, 40, 3], axis=0)
    own += 0.05 * np.random.default_rng(3).normal(size=own.shape).astype(np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    before = np.repeat(np.arange(5), [40, 40, 40, 40, 3])
    for places, count in ((None, 0), (before, 5)):
        found = segments._cluster(own, TrainingConfig(), places, count)
        assert np.bincount(segments.nearest(own, found)[0]).min() >= 10
        assert len(segments._cluster(own, TrainingConfig(segments=5), places, count)) == 5


# Refused


def test_a_version_without_segments_says_so(trained: psycopg.Connection) -> None:
    version = train(trained.info.dsn, config=replace(QUICK, segments=0))
    trained.execute("select * from vae.activate('shop', %s, force => true)", [version])
    refused = refusal(trained, "select * from shop.segment(%s)", [USERS[0]])
    assert (refused.sqlstate, refused.message_primary) == ("VA058", "pgvae: version 2 of model shop has no segments")
    assert "pgvae train shop" in str(refused.message_hint)
    heard: list[str] = []
    trained.add_notice_handler(lambda notice: heard.append(str(notice.message_primary)))
    refresh(trained)
    assert any("version 2 of model shop has no segments: user_segments is empty" in message for message in heard)
    assert rows(trained, "select * from shop.user_segments") == rows(trained, "select * from shop.segments") == []


@pytest.mark.parametrize("number", [-1, 101])
def test_a_number_of_segments_that_cannot_be_is_refused(number: int) -> None:
    with pytest.raises(PgvaeError, match=f"segments is {number}"):
        TrainingConfig(segments=number)


def test_segments_of_a_published_version_are_never_written(trained: psycopg.Connection) -> None:
    for query in (
        "insert into vae.segments select version_id, 99, 99, 'forged', 0, 0, '', 0, null from vae.versions",
        "update vae.segments set name = 'forged'",
        "truncate vae.segments",
    ):
        assert refusal(trained, query).sqlstate == "VA006"


def test_names_that_are_missing_are_a_corrupt_version(trained: psycopg.Connection) -> None:
    trained.execute("alter table vae.segments disable trigger user")
    trained.execute("delete from vae.segments where place = 0")
    refused = refusal(trained, "select * from shop.segment(%s)", [USERS[0]])
    assert refused.sqlstate == "VA004"
    assert "names" in str(refused.message_primary)
