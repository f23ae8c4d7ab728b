"""Explanations: the sums, the deletion against a real one, faithfulness, the time for the longest history."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import psycopg
import pytest

from pgvae.config import TrainingConfig
from pgvae.connection import connect
from pgvae.dataset import read_dataset
from pgvae.loop import fit
from pgvae.simulate import simulate
from pgvae.simulate.config import SimulationConfig
from pgvae_runtime import forward
from pgvae_runtime.explain import Groups, latest, leave_one_out
from pgvae_runtime.scoring import mask_seen, score_users
from pgvae_runtime.tokens import History
from shop import Shop, refusal
from test_runtime import random_weights

SHOP = Shop()
USERS, ITEMS = SHOP.users, SHOP.items


def rows(connection: psycopg.Connection, query: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
    return connection.execute(query, parameters).fetchall()


def explained(connection: psycopg.Connection, user: Any, item: Any, by: str = "event") -> list[tuple[Any, ...]]:
    query = (
        "select part, event_item_id, event_type, occurred_at, contribution, relevance, share"
        " from shop.explain(%s, %s, jsonb_build_object('by', %s::text)) order by rank"
    )
    return rows(connection, query, [user, item, by])


def odds_without(
    connection: psycopg.Connection, user: Any, items: list[Any], condition: str, values: list[Any]
) -> float:
    """Gives the logarithm of the quotient of two items' scores for the part of a history that a condition keeps."""
    scores = dict(
        rows(
            connection,
            "select r.item_id, r.score from shop.recommend_for("
            f"(select jsonb_agg(h) from shop.history(%s) h where {condition}), 100,"
            """ '{"exclude_seen": false}') r""",
            [user, *values],
        )
    )
    return math.log(scores[items[0]] / scores[items[1]])


@pytest.mark.parametrize("by", ["event", "item"])
def test_both_columns_add_up_to_the_logit(shared_trained: psycopg.Connection, by: str) -> None:
    for user in USERS[:4]:
        sums = []
        for item in ITEMS[:2]:
            parts = explained(shared_trained, user, item, by)
            assert [part[0] for part in parts[-2:]] == ["popularity", "remainder"]
            assert {part[0] for part in parts[:-2]} == {by}
            contributions = [part[4] for part in parts[:-2]]
            assert contributions == sorted(contributions, reverse=True)
            assert sum(part[6] for part in parts[:-2]) == pytest.approx(1, abs=1e-5)
            sums.append((sum(part[4] for part in parts), sum(part[5] for part in parts)))
        odds = odds_without(shared_trained, user, ITEMS[:2], "true", [])
        assert sums[0][0] - sums[1][0] == pytest.approx(odds, abs=1e-4)
        assert sums[0][1] - sums[1][1] == pytest.approx(odds, abs=1e-4)


def test_a_contribution_is_what_a_real_deletion_does(shared_trained: psycopg.Connection) -> None:
    user, pair = USERS[1], ITEMS[:2]
    whole = odds_without(shared_trained, user, pair, "true", [])
    first, second = (explained(shared_trained, user, item) for item in pair)
    other = {(part[1], part[2], part[3]): part[4] for part in second}
    assert len(other) > 10
    for part in first[:-2]:
        key = (part[1], part[2], part[3])
        kept = "(h.item_id, h.event_type, h.occurred_at) <> (%s, %s, %s)"
        without = odds_without(shared_trained, user, pair, kept, list(key))
        assert part[4] - other[key] == pytest.approx(whole - without, abs=1e-4)
    for part in explained(shared_trained, user, pair[0], "item")[:-2]:
        without = odds_without(shared_trained, user, pair, "h.item_id <> %s", [part[1]])
        of_second = {row[1]: row[4] for row in explained(shared_trained, user, pair[1], "item")}
        assert part[4] - of_second[part[1]] == pytest.approx(whole - without, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_a_contribution_is_what_a_deletion_does_also_of_one_of_several_events_of_an_item(seed: int) -> None:
    generator, weights, target = np.random.default_rng(seed), random_weights(seed), 7
    history = History(
        counts=np.array([12]),
        item=generator.integers(0, 5, 12),
        event_type=generator.integers(0, 3, 12),
        occurred_at=1.7e9 + 86400.0 * generator.integers(0, 6, 12),
    ).distinct()

    def logit(kept: Any) -> float:
        part = History(
            counts=np.array([kept.sum()]),
            item=history.item[kept],
            event_type=history.event_type[kept],
            occurred_at=history.occurred_at[kept],
        ).tokens(12)
        logits = forward.decode(weights, forward.encode(weights, part)) - weights["output_bias"]
        forward.add_shortcut(weights, part, logits)
        return float(logits[0, target])

    tokens, at = latest(history, 12)
    for groups in (Groups.by_event(tokens), Groups.by_item(tokens, len(weights["item_embedding"]))):
        found = leave_one_out(weights, tokens, at, groups, np.array([target]))
        whole = logit(np.ones(len(tokens.item), dtype=bool))
        assert found.logit[0] == pytest.approx(whole, abs=1e-5)
        expected = [whole - logit(groups.of != group) for group in range(len(groups.size))]
        np.testing.assert_allclose(found.of_group, expected, atol=1e-5)


def test_deleting_what_is_named_lowers_the_score_more_than_deleting_by_chance(
    shared_trained: psycopg.Connection,
) -> None:
    generator = random.Random(1)
    losses: dict[str, list[float]] = {"named": [], "chance": []}

    def log_score(user: Any, item: Any, gone: list[Any]) -> float:
        found = rows(
            shared_trained,
            "select ln(r.score) from shop.recommend_for((select jsonb_agg(h) from shop.history(%s) h"
            """ where h.item_id <> all (%s::bigint[])), 100, '{"exclude_seen": false}') r where r.item_id = %s""",
            [user, gone, item],
        )
        return float(found[0][0])

    for user in USERS:
        item = rows(shared_trained, "select item_id from shop.recommend(%s, 1)", [user])[0][0]
        parts = explained(shared_trained, user, item, "item")[:-2]
        before = log_score(user, item, [])
        losses["named"].append(before - log_score(user, item, [part[1] for part in parts[:2]]))
        chance = [part[1] for part in generator.sample(parts, 2)]
        losses["chance"].append(before - log_score(user, item, chance))
    assert np.mean(losses["named"]) > np.mean(losses["chance"])
    assert np.mean(np.array(losses["named"]) > np.array(losses["chance"])) > 0.6


def test_explanations_of_simulated_users_are_faithful(database: str) -> None:
    """Of a thousand users: the score without what is named, without as many by chance, and without the newest."""
    simulate(database, SimulationConfig(users=1500, items=200, days=120, seed=3, until=date(2026, 1, 1)))
    with connect(database) as connection:
        Shop(schema="sim").create_model(connection)
        connection.commit()
        dataset = read_dataset(connection, "shop")
    config = TrainingConfig(epochs=5, hidden=32, latent=32)
    weights = fit(dataset, config, max_history=100, phase="test", epochs=5).weights
    history = dataset.history(np.arange(dataset.user_count)).distinct()
    scores, _ = score_users(weights, history, max_history=100)
    users = np.arange(len(scores))
    unseen = scores.copy()
    mask_seen(unseen, history, [dataset.event_types.index("purchase")])
    best = unseen.argmax(axis=1)
    tokens, at = latest(history, 100)
    groups = Groups.by_item(tokens, len(dataset.item_keys))
    found = leave_one_out(weights, tokens, at, groups, best)
    items = np.bincount(groups.user, minlength=len(users))
    several = items >= 5
    assert np.count_nonzero(several) > 1000

    def fall_without_two(order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Gives by how much the logarithm of the score falls without the two items that come first in an order."""
        sorted_groups = np.lexsort((order, groups.user))
        place = np.arange(len(order)) - np.repeat(np.cumsum(items) - items, items)
        kept = ~np.isin(groups.of, sorted_groups[place < 2])
        rest = History(
            counts=np.bincount(np.repeat(users, np.diff(tokens.start))[kept], minlength=len(users)),
            item=tokens.item[kept],
            event_type=tokens.event_type[kept],
            occurred_at=at[kept],
        )
        left, _ = score_users(weights, rest, max_history=100)
        return np.log(scores[users, best] / np.maximum(left[users, best], 1e-30))[several]

    named, newest = fall_without_two(-found.of_group), fall_without_two(-at[groups.last])
    chance = fall_without_two(np.random.default_rng(1).random(len(groups.user)))
    against = fall_without_two(found.of_group)
    assert named.mean() > 3 * max(chance.mean(), newest.mean())
    assert np.mean(named > chance) > 0.8
    assert chance.mean() > 0 > against.mean()
    # What single events contribute goes with what all of them do together, and is less: several say the same.
    together = np.bincount(groups.user, weights=found.of_group, minlength=len(users))[several]
    assert np.corrcoef(together, found.logit[several])[0, 1] > 0.8
    assert 0.2 < together.mean() / found.logit[several].mean() < 1


def test_five_hundred_events_are_explained_at_once(trained: psycopg.Connection) -> None:
    user = 77
    trained.execute(
        "insert into events select %s, (%s::bigint[])[1 + n %% 12], (array['view', 'purchase'])[1 + n %% 2],"
        " timestamptz '2024-01-01' + n * interval '7 hours' from generate_series(1, 600) n",
        [user, ITEMS],
    )
    assert len(explained(trained, user, ITEMS[0])) == 502
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        explained(trained, user, ITEMS[0])
        seconds.append(time.perf_counter() - begun)
    # On an idle machine a tenth of this.
    assert min(seconds) < 1


def test_who_is_unknown_is_explained_by_popularity(shared_trained: psycopg.Connection) -> None:
    ((part, _, _, _, contribution, relevance, share),) = explained(shared_trained, 404, ITEMS[0])
    score = rows(shared_trained, "select ln(shop.score(404, %s))", [ITEMS[0]])[0][0]
    assert (part, share) == ("popularity", None)
    assert contribution == relevance == pytest.approx(score, abs=1e-5)
    assert rows(shared_trained, "select * from shop.explain(null, %s)", [ITEMS[0]]) == []


def test_bad_arguments_are_refused_by_name(shared_trained: psycopg.Connection) -> None:
    for call, sqlstate, message in (
        ("explain(1, 404)", "VA051", "item 404 is not in the catalogue of version 1 of model shop"),
        ("because(1, 404)", "VA051", "item 404 is not in the catalogue of version 1 of model shop"),
        ('explain(1, 404, \'{"by": "user"}\')', "22023", "option 'by' is \"user\""),
    ):
        refused = refusal(shared_trained, f"select * from shop.{call}")
        assert (refused.sqlstate, refused.message_primary) == (sqlstate, f"pgvae: {message}")


def in_words(parts: list[tuple[Any, ...]], title: Callable[[int], str] = str) -> str:
    """Gives the sentence of `because` for two items of a history or one, by their rows of `explain`."""
    deeds = {"purchase": "bought {}", "view": "viewed {}", "add_to_cart": "put {} into the cart"}
    names = [title(part[1]) for part in parts]
    if len({part[2] for part in parts}) == 1:
        return "because you " + deeds[parts[0][2]].format(" and ".join(names))
    return "because you " + " and ".join(deeds[part[2]].format(name) for part, name in zip(parts, names, strict=True))


def test_because_is_a_sentence_with_the_shops_titles(trained: psycopg.Connection) -> None:
    user = USERS[0]
    item = rows(trained, "select item_id from shop.recommend(%s, 1)", [user])[0][0]
    best = [part for part in explained(trained, user, item, "item")[:2] if part[4] > 0]
    assert rows(trained, "select shop.because(%s, %s)", [user, item]) == [(in_words(best),)]
    # Two deeds of one kind, and of two kinds.
    everybody = [(one, rows(trained, "select item_id from shop.recommend(%s, 1)", [one])[0][0]) for one in USERS]
    kinds = set()
    # And of items that are not recommended, for which little speaks.
    for one, other in [*everybody, *itertools.product(USERS, ITEMS)]:
        parts = [part for part in explained(trained, one, other, "item")[:2] if part[1] is not None and part[4] > 0]
        assert rows(trained, "select shop.because(%s, %s)", [one, other]) == [(in_words(parts),)]
        kinds.add((len(parts), len({part[2] for part in parts})))
    assert kinds == {(1, 1), (2, 1), (2, 2)}
    assert rows(trained, "select shop.because(404, %s)", [item]) == [("because it is popular",)]
    assert rows(trained, "select shop.because(null, %s)", [item]) == [(None,)]
    # With the shop's titles, in the view too.
    trained.execute(
        "create table goods as"
        " select distinct item_id as id,"
        " case item_id % 4"
        " when 0 then ' Good ' || item_id || ' '"
        " when 1 then ' ' when 2 then E'Good\\n\\t' || item_id end"
        ' as "Name" from events'
    )
    trained.execute("update vae.models set items_schema = 'public', items_table = 'goods', items_key_column = 'id'")
    trained.execute("select vae.rebuild_model('shop')")
    trained.execute("call vae.refresh('shop', views => '{explanations}')")
    titled = in_words(best, lambda key: f"Good {key}" if key % 2 == 0 else str(key))
    titles = "select item_id, title from shop.item_titles((select array_agg(id) from goods)) order by 1"
    even = rows(trained, "select id from goods where id % 2 = 0 order by 1")
    assert rows(trained, titles) == [(key, f"Good {key}") for (key,) in even]
    assert rows(trained, "select shop.because(%s, %s)", [user, item]) == [(titled,)]
    assert rows(trained, "select distinct because from shop.explanations where user_id = %s", [user]) == [(titled,)]
    found = rows(
        trained,
        "select count(*), count(*) filter (where e.because = shop.because(e.user_id, e.item_id)),"
        " bool_or(e.because like '%Good%') from shop.explanations e where e.rank = 1",
    )
    assert found == [(30, 30, True)]
    trained.execute("""update goods set "Name" = repeat('ä b ', 4000) where id = (select min(id) from goods)""")
    assert ("ä b " * 19 + "ä...") in [title for _, title in rows(trained, titles)]


def test_recommendations_are_refreshed_before_they_are_explained(trained: psycopg.Connection) -> None:
    before = rows(trained, "select * from shop.explanations order by user_id, rank")
    assert len(before) > 60
    assert rows(trained, "select row_count, version, state from vae.refreshes where view = 'explanations'") == [
        (30, 1, "succeeded")
    ]
    trained.execute("update vae.versions set version = 7")
    found = refusal(trained, "call vae.refresh('shop', views => '{explanations}')")
    assert found.sqlstate == "55000"
    assert "recommendations of model shop are of version 1, the active one is 7" in (found.message_primary or "")
    assert "call vae.refresh('shop')" in (found.message_hint or "")
    assert rows(trained, "select * from shop.explanations order by user_id, rank") == before
    trained.execute("refresh materialized view shop.recommendations_materialized with no data")
    found = refusal(trained, "call vae.refresh('shop', views => '{explanations}')")
    assert "model shop has no recommendations yet" in (found.message_primary or "")
    trained.execute("call vae.refresh('shop', full => true)")
    assert rows(trained, "select distinct model_version from shop.explanations") == [(7,)]
