"""What goes with what, and sessions that no table holds: the same scores, clear refusals, the shop's own keys."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import psycopg
import pytest

from pgvae_runtime import related
from shop import Shop, refusal

SHOP = Shop()
USERS, ITEMS = SHOP.users, SHOP.items
UNKNOWN = 404
# The columns of recommend that a session has, too: of one nobody knows how often it buys.
SHARED = "rank, item_id, score, is_cold_start, model_version"


def rows(connection: psycopg.Connection, query: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
    return connection.execute(query, parameters).fetchall()


# Sessions


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_users_own_history_as_a_session_gives_the_users_recommendations(
    shared_trained: psycopg.Connection, exclude_seen: bool
) -> None:
    options = json.dumps({"exclude_seen": exclude_seen})
    for user in USERS[:5]:
        own = rows(shared_trained, f"select {SHARED} from shop.recommend(%s, 20, %s)", [user, options])
        assert (
            rows(
                shared_trained,
                "select * from shop.recommend_for((select jsonb_agg(h) from shop.history(%s) h), 20, %s)",
                [user, options],
            )
            == own
        )
        assert (
            rows(
                shared_trained,
                "select r.* from (select array_agg(h.item_id) as items, array_agg(h.event_type) as types,"
                " array_agg(h.occurred_at) as times from shop.history(%s) h) h"
                " cross join lateral shop.recommend_for_items(h.items, h.types, h.times, 20, %s) r",
                [user, options],
            )
            == own
        )
    assert len(own) > 3


def test_a_session_needs_nothing_but_items(shared_trained: psycopg.Connection) -> None:
    first, second = ITEMS[:2]
    bare = rows(
        shared_trained, f'select * from shop.recommend_for(\'[{{"item_id": {first}}}, {{"item_id": {second}}}]\')'
    )
    assert [row[0] for row in bare] == list(range(1, 11))
    assert not any(is_cold for _, _, _, is_cold, _ in bare)
    assert rows(shared_trained, f"select * from shop.recommend_for_items('{{{first},{second}}}')") == bare
    # Without a time the order of the array counts, without a type they are views.
    given = json.dumps(
        [
            {"item_id": first, "event_type": "view", "occurred_at": "2025-01-01 10:00+00"},
            {"item_id": second, "event_type": "view", "occurred_at": "2025-01-01 10:00:01+00"},
        ]
    )
    assert rows(shared_trained, "select * from shop.recommend_for(%s)", [given]) == bare
    swapped = rows(shared_trained, f"select * from shop.recommend_for_items('{{{second},{first}}}')")
    assert swapped != bare
    # The same event twice is one event.
    assert rows(shared_trained, "select * from shop.recommend_for(%s::jsonb || %s)", [given, given]) == bare


def test_a_session_of_nothing_known_is_a_cold_start(shared_trained: psycopg.Connection) -> None:
    cold = rows(shared_trained, f"select {SHARED} from shop.recommend(%s)", [UNKNOWN])
    assert cold[0][3]
    assert rows(shared_trained, "select * from shop.recommend_for('[]')") == cold
    assert rows(shared_trained, "select * from shop.recommend_for_items('{}')") == cold
    notices: list[str] = []
    handler = lambda notice: notices.append(str(notice.message_primary))  # noqa: E731
    shared_trained.add_notice_handler(handler)
    assert rows(shared_trained, f"select * from shop.recommend_for('[{{\"item_id\": {UNKNOWN}}}]')") == cold
    shared_trained.remove_notice_handler(handler)
    assert notices == [f"item {UNKNOWN} is not in the catalogue of version 1 of model shop: left out"]
    for call in ("recommend_for(null)", "recommend_for_items(null)", "related(null)", "basket(null)"):
        assert rows(shared_trained, f"select * from shop.{call}") == []


@pytest.mark.parametrize(
    ("events", "message", "hint"),
    [
        ('{"item_id": 1}', 'events is {"item_id": 1}', "give an array of objects"),
        ('"views"', 'events is "views"', "give an array of objects"),
        ('[{"item_id": 1}, 7]', "events[1] is 7", "give an array of objects"),
        ("[[1]]", "events[0] is [1]", "give an array of objects"),
        ('[{"item": 1}]', "events[0] has the unknown member 'item'", "item_id, event_type, occurred_at"),
        ("[{}]", "events[0] has no item_id", "give an array of objects"),
        ('[{"item_id": null}]', "events[0] has no item_id", "give an array of objects"),
        ('[{"item_id": true}]', "events[0].item_id is true", "a number or a text"),
        ('[{"item_id": 1.5}]', "events[0].item_id is 1.5", "a number or a text"),
        ('[{"item_id": 1}, {"item_id": "x"}]', 'events[1] is "x"', "of the type bigint"),
        ('[{"item_id": 99999999999999999999}]', 'events[0] is "99999999999999999999"', "of the type bigint"),
        ('[{"item_id": 1, "event_type": "wish"}]', 'event_type of events[0] is "wish"', "known types: "),
        ('[{"item_id": 1, "event_type": 3}]', "events[0].event_type is 3", "give a text"),
        ('[{"item_id": 1, "occurred_at": 3}]', "events[0].occurred_at is 3", "give a text"),
        ('[{"item_id": 1, "occurred_at": "soon"}]', 'events[0].occurred_at is "soon"', "give a time"),
        ('[{"item_id": 1, "occurred_at": "2025-13-01"}]', 'events[0].occurred_at is "2025-13-01"', "give a time"),
        ('[{"item_id": 1, "occurred_at": "-infinity"}]', "occurred_at of events[0] is -infinity", "give a time"),
    ],
)
def test_events_of_another_shape_are_refused_by_name(
    shared_trained: psycopg.Connection, events: str, message: str, hint: str
) -> None:
    refused = refusal(shared_trained, "select * from shop.recommend_for(%s)", [events])
    assert (refused.sqlstate, refused.message_primary) == ("22023", f"pgvae: {message}")
    assert hint in str(refused.message_hint)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("recommend_for_items(array[1, 2], array['view'])", "event_types has 1 elements, item_ids has 2"),
        ("recommend_for_items(array[1], null, '{now,now}')", "occurred_ats has 2 elements, item_ids has 1"),
        ("recommend_for_items(array[1, 2], null, '{now,infinity}')", "occurred_at of item_ids[2] is infinity"),
        ("recommend_for_items(array[1, null])", "item_ids[2] is null"),
        ("recommend_for_items('{{1,2},{3,4}}')", "item_ids has more than one dimension"),
        ("recommend_for_items('{1,2}', '{{view},{view}}')", "event_types has more than one dimension"),
        ("recommend_for('[]', 0)", "k is 0"),
        ("recommend_for('[]', 5, '{\"seen\": 1}')", "option 'seen' is unknown"),
        ("recommend_for('[]', 5, '{\"features\": 1}')", "option 'features' is 1"),
        ("recommend_for('[]', 5, '{\"features\": {\"age\": 1}}')", "feature 'age' is unknown"),
        ("related(404)", "item 404 is not in the catalogue of version 1 of model shop"),
        ("related(404, 5, '[]')", "options is []"),
        ('related(404, 5, \'{"rank_by": "price"}\')', "option 'rank_by' is \"price\""),
        ("related(404, 5, '{\"min_support\": -1}')", "option 'min_support' is -1"),
        ("related(404, 5, '{\"min_support\": 1.5}')", "option 'min_support' is 1.5"),
        ("related(404, 5, '{\"min_support\": true}')", "option 'min_support' is true"),
        ("related(404, null)", "k is null"),
        ("basket('{}')", "items is an empty array"),
        ("basket(array[1, null])", "items[2] is null"),
        ("basket('{{1,2},{3,4}}')", "items has more than one dimension"),
        ("basket(array[404, 405, 404])", "items 404, 405 are not in the catalogue of version 1 of model shop"),
    ],
)
def test_bad_arguments_are_refused_by_name(shared_trained: psycopg.Connection, call: str, message: str) -> None:
    refused = refusal(shared_trained, f"select * from shop.{call}")
    sqlstate = "VA051" if "catalogue" in message else "22023"
    assert (refused.sqlstate, refused.message_primary) == (sqlstate, f"pgvae: {message}")
    assert refused.message_hint


def test_ignore_is_no_type_of_an_event(shared_trained: psycopg.Connection) -> None:
    """A word may mean it: its events are left out."""
    with shared_trained.transaction(force_rollback=True):
        shared_trained.execute("select vae.set_event_type('shop', 'scroll', 'ignore')")
        query = "select * from shop.recommend_for_items(array[%s], array[%s])"
        with shared_trained.transaction(force_rollback=True):
            refused = refusal(shared_trained, query, [ITEMS[0], "ignore"])
        assert (refused.sqlstate, refused.message_primary) == (
            "22023", 'pgvae: event_type of item_ids[1] is "ignore"',
        )  # fmt: skip
        assert "purchase" in str(refused.message_hint)
        assert "ignore" not in str(refused.message_hint)
        left_out = shared_trained.execute(query, [ITEMS[0], "scroll"]).fetchall()
        assert left_out == shared_trained.execute("select * from shop.recommend_for('[]')").fetchall()


# What goes with what


def test_related_items_are_those_of_a_history_of_one_purchase(shared_trained: psycopg.Connection) -> None:
    item = ITEMS[3]
    found = rows(shared_trained, "select rank, item_id, score, lift, support from shop.related(%s, 100)", [item])
    assert [row[0] for row in found] == list(range(1, len(ITEMS)))
    assert {row[1] for row in found} == set(ITEMS) - {item}
    scores = dict(
        rows(
            shared_trained,
            "select item_id, score from shop.recommend_for_items(array[%s]::bigint[], array['purchase'], k => 100,"
            """ options => '{"exclude_seen": false}')""",
            [item],
        )
    )
    assert [row[2] for row in found] == pytest.approx([scores[row[1]] for row in found], rel=1e-5)
    balance = [score * lift for _, _, score, lift, _ in found]
    assert balance == sorted(balance, reverse=True)
    for order, column in (("score", 2), ("lift", 3)):
        ranked = rows(shared_trained, "select * from shop.related(%s, 100, %s)", [item, json.dumps({"rank_by": order})])
        assert [row[column] for row in ranked] == sorted((row[column] for row in found), reverse=True)


def test_support_counts_the_users_who_bought_both(shared_trained: psycopg.Connection) -> None:
    item = ITEMS[0]
    expected = dict(
        rows(
            shared_trained,
            "select b.item_id, count(distinct b.user_id) from events a join events b using (user_id)"
            " where a.item_id = %s and a.event_type = 'purchase' and b.event_type = 'purchase' group by 1",
            [item],
        )
    )
    found = rows(shared_trained, "select item_id, support from shop.related(%s, 100)", [item])
    assert [support for _, support in found] == [expected.get(other, 0) for other, _ in found]
    assert len({support for _, support in found}) > 2
    least = sorted(support for _, support in found)[-3]
    often = rows(
        shared_trained, "select item_id, support from shop.related(%s, 100, %s)", [item, f'{{"min_support": {least}}}']
    )
    assert often == [(other, support) for other, support in found if support >= least]
    # A list is filled from further down, not left short.
    assert often != found[: len(often)]
    for k in range(1, len(often) + 1):
        few = rows(
            shared_trained,
            "select item_id, support from shop.related(%s, %s, %s)",
            [item, k, f'{{"min_support": {least}}}'],
        )
        assert few == often[:k]
    # JSON has one kind of number.
    written = f'{{"min_support": {least}.0}}'
    assert rows(shared_trained, "select item_id, support from shop.related(%s, 100, %s)", [item, written]) == often


def test_a_basket_counts_each_item_once_and_names_the_unknown(shared_trained: psycopg.Connection) -> None:
    first, second = ITEMS[:2]
    once = rows(shared_trained, "select * from shop.basket(%s::bigint[], 100)", [[first, second]])
    assert {row[1] for row in once} == set(ITEMS) - {first, second}
    notices: list[str] = []
    handler = lambda notice: notices.append(str(notice.message_primary))  # noqa: E731
    shared_trained.add_notice_handler(handler)
    twice = rows(shared_trained, "select * from shop.basket(%s::bigint[], 100)", [[second, first, UNKNOWN, second]])
    shared_trained.remove_notice_handler(handler)
    assert twice == once
    assert notices == [f"item {UNKNOWN} is not in the catalogue of version 1 of model shop: left out"]
    added = "event_types => array['add_to_cart', 'add_to_cart'], occurred_ats => '{2025-01-01,2025-01-01}', k => 100"
    scores = dict(
        rows(
            shared_trained,
            f"select item_id, score from shop.recommend_for_items(%s::bigint[], {added})",
            [[first, second]],
        )
    )
    assert [row[2] for row in once] == pytest.approx([scores[row[1]] for row in once], rel=1e-5)


def test_the_view_of_related_items_holds_what_related_gives(shared_trained: psycopg.Connection) -> None:
    columns = "rank, {}, score, lift, support, model_version"
    stored = rows(
        shared_trained,
        f"select item_id, {columns.format('related_item_id')} from shop.related_items order by item_id, rank",
    )
    live = rows(
        shared_trained,
        f"select i, {columns.format('item_id')} from unnest(%s::bigint[]) i cross join lateral shop.related(i, 20)"
        " order by i, rank",
        [ITEMS],
    )
    assert len(stored) == len(ITEMS) * (len(ITEMS) - 1)
    assert [row[:3] + row[5:] for row in stored] == [row[:3] + row[5:] for row in live]
    for column in (3, 4):
        assert [row[column] for row in stored] == pytest.approx([row[column] for row in live], rel=1e-5)
    assert rows(shared_trained, "select row_count, version from vae.refreshes where view = 'related_items'") == [
        (len(ITEMS), 1)
    ]


def test_the_mean_lift_over_the_events_of_the_shop_is_one() -> None:
    shares = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=np.float32)
    base = shares.mean(axis=0)
    assert related.chosen_order("lift", shares, base).mean(axis=0) == pytest.approx(np.ones(3))
    assert related.chosen_order("balanced", shares, base) == pytest.approx(shares**2 / base)
