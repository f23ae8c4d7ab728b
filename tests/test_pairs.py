"""Many pairs of user and item at once, and the same user again and again."""

from __future__ import annotations

import itertools
from typing import Any

import psycopg
import pytest

from shop import Shop, refusal

Connection = psycopg.Connection[Any]

USERS, ITEMS = Shop().users, Shop().items
STRANGER, NO_ITEM = -1, -1


def score(connection: Connection, user: Any, item: Any) -> Any:
    found = connection.execute("select shop.score(%s, %s)", [user, item]).fetchone()
    assert found is not None
    return found[0]


def score_pairs(connection: Connection, users: list[Any], items: list[Any]) -> list[Any]:
    query = "select user_id, item_id, score from shop.score_pairs(%s::bigint[], %s::bigint[])"
    return connection.execute(query, [users, items]).fetchall()


# So many users are scored as in a refresh, fewer as in single calls.
@pytest.mark.parametrize("strangers", [1, 200])
def test_pairs_have_the_scores_of_single_calls(shared_trained: Connection, strangers: int) -> None:
    asked = [*USERS, *range(STRANGER, STRANGER - strangers, -1)]
    users = [user for user in asked for _ in [*ITEMS, NO_ITEM]]
    items = [item for _ in asked for item in [*ITEMS, NO_ITEM]]
    # In no order, and some twice.
    users, items = users[::-2] + users[::2] + users[:5], items[::-2] + items[::2] + items[:5]
    found = score_pairs(shared_trained, users, items)
    pairs = [(user, item) for user, item, _ in found]
    assert sorted(pairs) == sorted(zip(users, items, strict=True))
    # A user's pairs stand together.
    assert len([1 for one, other in itertools.pairwise(pairs) if one[0] != other[0]]) == len(asked) - 1
    for user, item, value in found:
        expected = score(shared_trained, user, item)
        assert (value is None) == (item == NO_ITEM)
        assert value == (None if expected is None else pytest.approx(expected, rel=1e-5))


def test_pairs_with_nulls_have_no_score(shared_trained: Connection) -> None:
    found = score_pairs(shared_trained, [None, USERS[0], None], [ITEMS[0], None, None])
    assert sorted(found, key=str) == sorted(
        [(None, ITEMS[0], None), (USERS[0], None, None), (None, None, None)], key=str
    )
    for users, items in (("null", "array[1]"), ("array[1]", "null"), ("array[]", "array[]")):
        query = f"select * from shop.score_pairs({users}::bigint[], {items}::bigint[])"
        assert shared_trained.execute(query.encode()).fetchall() == []


@pytest.mark.parametrize("users", [USERS[:1], [*USERS, *range(-200, 0)]])
def test_what_the_version_does_not_know_changes_no_score(shared_trained: Connection, users: list[Any]) -> None:
    user, item = USERS[0], ITEMS[0]
    before = [score(shared_trained, user, item), *sorted(score_pairs(shared_trained, users, [item] * len(users)))]
    with shared_trained.transaction(force_rollback=True):
        shared_trained.execute(
            "insert into events values (%s, %s, 'review', now()), (%s, %s, 'purchase', now())",
            [user, ITEMS[1], user, NO_ITEM],
        )
        pairs = sorted(score_pairs(shared_trained, users, [item] * len(users)))
        assert [score(shared_trained, user, item), *pairs] == before


def test_lists_of_many_users_leave_out_what_a_list_leaves_out(shared_trained: Connection) -> None:
    counts = "select count(distinct user_id), count(*) from shop.recommend_for_users({})"
    candidates = "create view few as select item_id from events group by 1 order by 1 limit 3"
    with shared_trained.transaction(force_rollback=True):
        shared_trained.execute(f"{candidates}; select * from vae.set_candidates('shop', 'few', 'few')")
        options = """{"candidates": "few", "exclude_seen": false}"""
        found = shared_trained.execute(counts.format("%s, options => %s").encode(), [USERS, options]).fetchone()
        assert found == (len(USERS), 3 * len(USERS))
    for given in ("null", "'{}'", "'{null}'"):
        assert shared_trained.execute(counts.format(given).encode()).fetchall() == [(0, 0)]
    for given, message in (
        ("'{1}', 0", "k is 0"),
        ("'{1}', null", "k is null"),
        ("null, 0", "k is 0"),
        ("""'{1}', 3, '{"limit": 3}'""", "option 'limit' is unknown"),
        ("""'{1}', 3, '{"candidates": "none"}'""", "candidates 'none' of model shop do not exist"),
    ):
        refused = refusal(shared_trained, f"select * from shop.recommend_for_users({given})")
        assert (refused.sqlstate, message in str(refused.message_primary)) == ("22023", True)
        assert refused.message_hint


def test_arrays_of_different_lengths_are_refused(shared_trained: Connection) -> None:
    refused = refusal(shared_trained, "select * from shop.score_pairs(array[1, 2], array[3])")
    assert refused.sqlstate == "22023"
    assert "item_ids has 1 elements, user_ids has 2" in str(refused.message_primary)
    assert "array_agg" in str(refused.message_hint)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("recommend_for_users('{{1,2},{3,4}}')", "user_ids"),
        ("score_pairs('{{1,2},{3,4}}', '{1,2}')", "user_ids"),
        ("score_pairs('{1,2}', '{{1,2},{3,4}}')", "item_ids"),
    ],
)
def test_arrays_of_several_dimensions_are_refused(shared_trained: Connection, call: str, name: str) -> None:
    refused = refusal(shared_trained, f"select * from shop.{call}")
    assert (refused.sqlstate, refused.message_primary) == ("22023", f"pgvae: {name} has more than one dimension")
    assert refused.message_hint


def test_a_score_that_is_remembered_knows_what_the_user_did_since(trained: Connection) -> None:
    user, item = USERS[0], ITEMS[-1]
    before = score(trained, user, item)
    assert score(trained, user, item) == before
    with trained.transaction():
        # The same statement's time and the same transaction, but another history.
        trained.execute("insert into events values (%s, %s, 'purchase', now())", [user, item])
        inside = score(trained, user, item)
        assert inside != before
    assert score(trained, user, item) == inside
    both = trained.execute(
        "select shop.score(u, %s), shop.score(%s, %s) from unnest(%s::bigint[]) u", [item, user, item, USERS[:3]]
    ).fetchall()
    assert [mine for _, mine in both] == [inside] * 3
    assert [other for other, _ in both] == [score(trained, u, item) for u in USERS[:3]]
    trained.execute("delete from events where user_id = %s and occurred_at > now() - interval '1 hour'", [user])
    assert score(trained, user, item) == before
