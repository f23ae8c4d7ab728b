"""The numeric core that runs inside PostgreSQL: pure functions, tried on many inputs."""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgvae_runtime import batch, blas, forward, tensors
from pgvae_runtime.cpu import CpuScorer
from pgvae_runtime.errors import ScoringError
from pgvae_runtime.features import FeatureBag, FeatureColumn, FeaturePipeline
from pgvae_runtime.item_keys import ItemKeys
from pgvae_runtime.literals import ItemLiterals, write_scores
from pgvae_runtime.scoring import mask_seen, score_users
from pgvae_runtime.store import Version, check_shapes
from pgvae_runtime.tokens import AGE_BUCKETS, ORDER_BUCKETS, History, Tokens, age_bucket, order_bucket

DAY = 86_400
ITEMS, TYPES, FEATURES = 30, 3, 8
SIZES = {"I": ITEMS, "T": TYPES, "A": AGE_BUCKETS, "O": ORDER_BUCKETS, "F": FEATURES, "H": 10, "Z": 6, "1": 1}
Event = tuple[int, int, float]

settings.register_profile("pgvae", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("pgvae")

# Few items, types and moments, so that repeated items and equal times are the rule.
events = st.tuples(
    st.integers(0, ITEMS - 1), st.integers(0, TYPES - 1), st.integers(0, 40).map(lambda hours: 1.7e9 + 3600.0 * hours)
)
users = st.lists(st.lists(events, max_size=9), max_size=7)
long_ago = st.lists(
    st.lists(events | st.tuples(st.just(0), st.just(0), st.floats(-1e10, 1e10)), max_size=9), max_size=4
)
# Users of whom something else is known than their events, which they may lack.
described = st.lists(
    st.tuples(st.lists(events, max_size=9), st.sets(st.integers(0, FEATURES - 1), max_size=4)), min_size=1, max_size=7
)


def history_of(users: list[list[Event]], features: list[set[int]] | None = None) -> History:
    flat = [event for user in users for event in user]
    return History(
        counts=np.array([len(user) for user in users], dtype=np.int64),
        item=np.array([event[0] for event in flat], dtype=np.int64),
        event_type=np.array([event[1] for event in flat], dtype=np.int64),
        occurred_at=np.array([event[2] for event in flat], dtype=np.float64),
        features=None if features is None else FeatureBag.of([sorted(own) for own in features]),
    )


def random_history(generator: np.random.Generator, count: int, longest: int) -> History:
    counts = generator.integers(0, longest + 1, count)
    total = int(counts.sum())
    return History(
        counts=counts,
        item=generator.integers(0, ITEMS, total),
        event_type=generator.integers(0, TYPES, total),
        occurred_at=1.7e9 + 3600.0 * generator.integers(0, 5000, total),
        features=FeatureBag.of([sorted({*generator.integers(0, FEATURES, user % 3)}) for user in range(count)]),
    )


def random_weights(seed: int = 0, links: int = 150, **sizes: int) -> dict[str, Any]:
    """Gives weights of ordinary size: no gate, embedding or bias is zero, as after a training.

    Item 0 has a third of the shortcut's links, some to one item more than once, and the last items have none.
    """
    generator = np.random.default_rng(seed)
    of = SIZES | sizes
    of |= {"J": of["I"] + 1, "L": links}
    weights = {
        name: generator.normal(0, 0.5, [of[letter] for letter in letters]).astype(np.float32)
        for name, letters in forward.SHAPES.items()
    }
    popularity = generator.random(of["I"])
    weights["item_popularity"] = (popularity / popularity.sum()).astype(np.float32)
    owners = np.sort(np.append(np.zeros(links // 3, int), generator.integers(0, of["I"] - 3, links - links // 3)))
    weights["shortcut_start"] = np.searchsorted(owners, np.arange(of["I"] + 1)).astype(np.int32)
    weights["shortcut_item"] = generator.integers(0, of["I"], links).astype(np.int32)
    return weights


# Tokens


@given(st.integers(0, AGE_BUCKETS + 3), st.floats(0, 0.999))
def test_an_age_falls_into_the_bucket_of_its_power_of_two_of_days(power: int, share: float) -> None:
    days = 2**power - 1 + share * 2**power
    expected = min(power, AGE_BUCKETS - 1)
    assert age_bucket(np.array([days * DAY]))[0] == expected


def test_ages_at_the_edges_have_a_bucket() -> None:
    ages = np.array([-1e12, -1.0, 0.0, DAY - 1e-6, DAY, 3 * DAY, 1e15])
    assert age_bucket(ages).tolist() == [0, 0, 0, 0, 1, 2, AGE_BUCKETS - 1]


def test_of_few_later_moments_each_number_has_a_bucket_and_of_many_each_power_of_two() -> None:
    moments = np.array([0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 63, 64, 127, 10**6])
    assert order_bucket(moments).tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9]
    assert order_bucket(np.arange(10**4)).max() == ORDER_BUCKETS - 1


@given(users | long_ago, st.integers(1, 10))
def test_tokens_are_the_latest_events_of_each_user_oldest_first(users: list[list[Event]], max_history: int) -> None:
    tokens = history_of(users).tokens(max_history)
    assert tokens.user_count == len(users)
    for number, user in enumerate(users):
        latest = sorted(user, key=lambda event: (event[2], event[0], event[1]))[-max_history:]
        part = slice(tokens.start[number], tokens.start[number + 1])
        assert tokens.item[part].tolist() == [event[0] for event in latest]
        assert tokens.event_type[part].tolist() == [event[1] for event in latest]
        # math.log2 of 1 + a whole number of days: exact at the powers of two, where the buckets begin.
        ages = [latest[-1][2] - event[2] for event in latest]
        assert tokens.age[part].tolist() == [min(int(math.log2(1 + age / DAY)), AGE_BUCKETS - 1) for age in ages]
        # The order counts moments, not events: what happened at one moment is equally recent.
        later = [len({other[2] for other in latest if other[2] > event[2]}) for event in latest]
        assert tokens.order[part].tolist() == [n if n < 5 else min(3 + int(math.log2(n)), 9) for n in later]


@given(users, st.randoms(use_true_random=False), st.integers(1, 10))
def test_tokens_do_not_depend_on_the_order_in_which_events_were_read(
    users: list[list[Event]], random: Any, max_history: int
) -> None:
    shuffled = [random.sample(user, len(user)) for user in users]
    one, other = history_of(users).tokens(max_history), history_of(shuffled).tokens(max_history)
    for name in ("start", "item", "event_type", "age", "order"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@given(users, st.floats(-1e9, 1e9))
def test_tokens_do_not_depend_on_when_it_was_only_on_how_long_before_the_last_event(
    users: list[list[Event]], shift: float
) -> None:
    shift = round(shift / DAY) * DAY
    moved = [[(item, kind, at + shift) for item, kind, at in user] for user in users]
    np.testing.assert_array_equal(history_of(users).tokens(5).age, history_of(moved).tokens(5).age)


@given(users, st.sets(st.integers(0, TYPES - 1)))
def test_seen_pairs_are_those_of_target_events(users: list[list[Event]], targets: set[int]) -> None:
    pairs = zip(*(column.tolist() for column in history_of(users).seen(sorted(targets))), strict=True)
    expected = [(number, item) for number, user in enumerate(users) for item, kind, _ in user if kind in targets]
    assert list(pairs) == expected


# Encoder and decoder


def reference_scores(weights: dict[str, Any], tokens: Tokens, user: int) -> np.ndarray[Any, Any]:
    """Gives the scores of one user by the formulas of docs/model.md, token by token, in double precision."""
    w = {name: array.astype(np.float64) for name, array in weights.items() if name not in forward.INTEGERS}
    width = w["item_embedding"].shape[1]
    numbers = range(tokens.start[user], tokens.start[user + 1])
    embedded, gates = [], []
    for i in numbers:
        item, kind, age, order = tokens.item[i], tokens.event_type[i], tokens.age[i], tokens.order[i]
        h = (
            w["item_embedding"][item]
            + w["event_type_embedding"][kind]
            + w["age_embedding"][age]
            + w["order_embedding"][order]
        )
        energy = w["encoder_gate_weight"] @ h + w["encoder_gate_bias"][0]
        energy += w["event_type_gate"][kind] + w["age_gate"][age] + w["order_gate"][order]
        embedded.append(h)
        gates.append(w["gate_recency"][order] / (1 + np.exp(-energy)))
    length = math.sqrt(sum(a * a for a in gates))
    pooled = np.zeros(width)
    for a, h in zip(gates, embedded, strict=True):
        pooled = pooled + a / length * h
    if tokens.features is not None:
        own = tokens.features.token[tokens.features.start[user] : tokens.features.start[user + 1]]
        for token in own:
            pooled = pooled + w["user_feature_embedding"][token] / len(own)
    pooled = math.sqrt(width) * pooled
    hidden = np.tanh(w["encoder_weight"] @ pooled + w["encoder_bias"])
    z = pooled + w["mean_weight"] @ hidden + w["mean_bias"]
    g = z / (1 + np.exp(-(w["decoder_gate_weight"] @ z + w["decoder_gate_bias"])))
    r = g + w["decoder_output_weight"] @ np.tanh(w["decoder_weight"] @ g + w["decoder_bias"])
    logits = w["output_weight"] @ (r / math.sqrt(r @ r)) + w["output_bias"]
    for item, share in shares_of_items(w["shortcut_recency"], tokens, user).items():
        for link in range(*weights["shortcut_start"][item : item + 2]):
            logits[weights["shortcut_item"][link]] += w["shortcut_weight"][link] * share
    odds = np.exp(logits - logits.max())
    return np.asarray(odds / odds.sum())


def shares_of_items(recency: np.ndarray[Any, Any], tokens: Tokens, user: int) -> dict[int, float]:
    """Gives w_i / sqrt(sum w_i^2) of each item of a user's history, w_i the recency of its latest event."""
    own = slice(tokens.start[user], tokens.start[user + 1])
    orders = dict(zip(tokens.item[own].tolist(), tokens.order[own].tolist(), strict=True))
    norm = math.sqrt(sum(float(recency[order]) ** 2 for order in orders.values()))
    return {item: float(recency[order]) / norm for item, order in orders.items()}


@given(users.filter(bool), st.integers(0, 5), st.integers(1, 10))
def test_scores_follow_the_formulas(users: list[list[Event]], seed: int, max_history: int) -> None:
    weights, history = random_weights(seed), history_of(users)
    scores, cold = score_users(weights, history, max_history=max_history)
    tokens = history.tokens(max_history)
    assert scores.dtype == np.float32
    assert cold.tolist() == [not user for user in users]
    for number, user in enumerate(users):
        expected = reference_scores(weights, tokens, number) if user else weights["item_popularity"]
        np.testing.assert_allclose(scores[number], expected, rtol=1e-5)


@given(described, st.integers(0, 5), st.sampled_from([0, 1, 150, 2000]))
def test_scores_with_features_follow_the_formulas_also_of_a_user_without_events(
    users: list[tuple[list[Event], set[int]]], seed: int, links: int
) -> None:
    weights = random_weights(seed, links)
    history = history_of([user for user, _ in users], [own for _, own in users])
    scores, cold = score_users(weights, history, max_history=6)
    tokens = history.tokens(6)
    assert cold.tolist() == [not user for user, _ in users]
    for number, (user, own) in enumerate(users):
        expected = reference_scores(weights, tokens, number) if user or own else weights["item_popularity"]
        np.testing.assert_allclose(scores[number], expected, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 40, 100, 10_000])
def test_the_shortcut_adds_up_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    weights, history = random_weights(), random_history(np.random.default_rng(3), 50, 9)
    tokens = history.tokens(7)
    # Without the network's own part what is left is the shortcut alone.
    logits = np.zeros((50, ITEMS), dtype=np.float32)
    expected = np.zeros((50, ITEMS))
    for user in range(50):
        for item, share in shares_of_items(weights["shortcut_recency"], tokens, user).items():
            for link in range(*weights["shortcut_start"][item : item + 2]):
                expected[user, weights["shortcut_item"][link]] += float(weights["shortcut_weight"][link]) * share
    monkeypatch.setattr(forward, "_SHORTCUT_BLOCK", block)
    forward.add_shortcut(weights, tokens, logits)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@given(users.filter(bool))
def test_a_user_gets_the_same_scores_alone_as_among_others(users: list[list[Event]]) -> None:
    weights = random_weights()
    together, _ = score_users(weights, history_of(users), max_history=5)
    for number, user in enumerate(users):
        alone, _ = score_users(weights, history_of([user]), max_history=5)
        np.testing.assert_allclose(alone[0], together[number], rtol=1e-5)


@given(users)
def test_scores_of_a_user_are_shares_of_one(users: list[list[Event]]) -> None:
    scores, _ = score_users(random_weights(), history_of(users), max_history=5)
    assert (scores >= 0).all()
    np.testing.assert_allclose(scores.sum(axis=1), np.ones(len(users)), rtol=1e-5)


def test_an_empty_batch_and_a_batch_of_empty_users_are_scored() -> None:
    weights = random_weights()
    assert score_users(weights, history_of([]), max_history=5)[0].shape == (0, ITEMS)
    scores, cold = score_users(weights, history_of([[], [], []]), max_history=5)
    np.testing.assert_array_equal(scores, np.tile(weights["item_popularity"], (3, 1)))
    assert cold.all()


def test_absurd_logits_give_shares_all_the_same() -> None:
    weights = random_weights()
    weights["output_weight"] *= 1e4
    scores, _ = score_users(weights, random_history(np.random.default_rng(1), 50, 20), max_history=10)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)


@given(hnp.arrays(np.float32, 5, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_the_sigmoid_is_that_of_double_precision(x: np.ndarray[Any, Any]) -> None:
    with np.errstate(all="raise", under="ignore"):
        actual = forward.sigmoid(x)
    np.testing.assert_allclose(actual, 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -500, 500))), atol=1e-7)


# Top k


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-3, 3))
    | hnp.arrays(np.float32, (3, 400), elements=st.integers(0, 40), fill=st.integers(0, 1))
    | hnp.arrays(np.float32, (3, 40), elements=st.floats(0, 1, width=32), unique=True, fill=st.nothing()),
    st.integers(1, 40),
)
def test_top_k_is_that_of_a_full_sort_whatever_the_ties(scores: np.ndarray[Any, Any], k: int) -> None:
    columns, values = forward.top_k(scores, k)
    np.testing.assert_array_equal(columns, np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(values, np.take_along_axis(scores, columns, axis=1))


def test_seen_items_stand_behind_all_others() -> None:
    history = history_of([[(4, 1, 0.0), (7, 2, 0.0)], [], [(4, 2, 0.0)]])
    scores = np.full((3, ITEMS), 0.5, dtype=np.float32)
    mask_seen(scores, history, targets=[2])
    assert np.argwhere(scores < 0).tolist() == [[0, 7], [2, 4]]


def test_the_sums_of_a_large_batch_are_exact() -> None:
    generator = np.random.default_rng(0)
    tokens = random_history(generator, 2000, 80).tokens(80)
    values = generator.normal(0.05, 0.1, (len(tokens.item), 8)).astype(np.float32)
    parts = np.split(values.astype(np.float64), tokens.start[1:-1])
    expected = np.stack([part.sum(axis=0) for part in parts])
    np.testing.assert_allclose(forward.sum_rows(tokens.start, values), expected, rtol=1e-5, atol=1e-5)


# Keys of items


def test_items_are_found_by_their_keys_and_the_other_way_round() -> None:
    # The first two have the same checksum.
    names = ["plumless", "buckeroo", "Größe 42", "", "x" * 300, "plumles"]
    keys = ItemKeys(ItemKeys.arrays_of(names))
    assert keys.all() == names
    assert keys.items(names) == {name: item for item, name in enumerate(names)}
    assert keys.of_items([2, 0]) == {2: "Größe 42", 0: "plumless"}
    assert [keys.item(name) for name in ("buckeroo", "grosse 42", "")] == [1, None, 3]
    few = ItemKeys(ItemKeys.arrays_of(["plumless"]))
    assert crc32(b"plumless") == crc32(b"buckeroo") and few.item("buckeroo") is None
    assert len(ItemKeys.none()) == 0 and ItemKeys.none().item("plumless") is None


# Lists as array literals


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)))
# Of all shares the one that nine digits round to a power of ten, the least one, and the ends.
@example(np.tile(np.array([1e-23, 1e-45, 0, 1], dtype=np.float32), (3, 1)))
def test_scores_are_written_to_the_last_bit(scores: np.ndarray[Any, Any]) -> None:
    texts = write_scores(scores, np.array([4, 2, 0]))
    assert texts[2] == "{}"
    for text, row in zip(texts[:2], (scores[0], scores[1, :2]), strict=True):
        assert np.float32(text[1:-1].split(",")).tolist() == row.tolist()


@pytest.mark.parametrize("longest", [5, 50])
def test_keys_are_written_as_elements_of_an_array(longest: int) -> None:
    keys = ["7", "a", "x" * longest, 'say "\\"', "1e3", "٣"]
    texts = ItemLiterals(keys).write(np.array([[3, 0, 1], [2, 4, 5], [0, 1, 2]]), np.array([3, 3, 1]))
    # Blanks after an element mean nothing to PostgreSQL.
    assert [re.sub(" +(?=[,}])", "", text) for text in texts] == [
        '{"say \\"\\\\\\"",7,"a"}',
        f'{{"{"x" * longest}","1e3","٣"}}',
        "{7}",
    ]


# Batches


def version(weights: dict[str, Any], **changes: Any) -> Version:
    values: dict[str, Any] = {
        "version_id": 1,
        "version": 3,
        "model_id": 1,
        "model": "shop",
        "user_id_type": "bigint",
        "weights": weights,
        "event_types": {"view": 0, "add_to_cart": 1, "purchase": 2},
        "targets": (2,),
        "max_history": 7,
        "user_count": 40,
        "item_keys": ItemKeys(ItemKeys.arrays_of([f"item {i}" for i in range(ITEMS)])),
        "user_pipeline": FeaturePipeline(columns=(FeatureColumn(name="x", kind="number", first=0, edges=(1.0,) * 7),)),
    }
    return Version(**(values | changes))


class Plpy:
    """What PL/Python gives a function, as far as batches and the choice of a device use it."""

    def __init__(self, **settings: str) -> None:
        self.settings = settings
        self.notices: list[str] = []

    def execute(self, query: str) -> list[dict[str, Any]]:
        return [
            {
                name: self.settings.get(name)
                for name in ("device", "max_memory", "max_threads", "gpu_memory", "gpu_precision", "gpu_costs")
            }
        ]

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def quote_literal(self, text: str) -> str:
        return f"'{text}'"


@pytest.fixture
def histories(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], History]]:
    """Three batches of users, which a batch run reads."""
    generator = np.random.default_rng(5)
    batches = [([f"{b}-{u}" for u in range(20)], random_history(generator, 20, 6)) for b in range(3)]
    monkeypatch.setattr(batch, "read_histories", lambda *_, **__: iter(batches))
    return batches


def parsed(rows: Any) -> list[tuple[str, list[str], list[float], bool, int]]:
    return [
        (user, re.findall('"([^"]*)"', items), [float(score) for score in scores[1:-1].split(",")], cold, number)
        for user, items, scores, cold, number, _ in rows
    ]


def test_a_batch_run_gives_each_user_the_list_of_a_single_call(histories: list[tuple[list[str], History]]) -> None:
    weights = random_weights()
    rows = parsed(batch.recommend_all(Plpy(), None, version(weights), 8))
    expected = [user for keys, _ in histories for user in keys]
    assert [row[0] for row in rows] == expected
    numbers = iter(rows)
    for keys, history in histories:
        scores, cold = score_users(weights, history, max_history=7)
        mask_seen(scores, history, (2,))
        columns, values = forward.top_k(scores, 8)
        for number in range(len(keys)):
            _, items, row_scores, is_cold, model_version = next(numbers)
            assert items == [f"item {i}" for i in columns[number]]
            np.testing.assert_allclose(row_scores, values[number], rtol=1e-5)
            assert (is_cold, model_version) == (cold[number], 3)


def test_who_has_seen_everything_gets_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = history_of([[(item, 2, 0.0) for item in range(ITEMS)], [(1, 2, 0.0)]])
    monkeypatch.setattr(batch, "read_histories", lambda *_, **__: iter([(["greedy", "modest"], everything)]))
    greedy, modest = batch.recommend_all(Plpy(), None, version(random_weights()), ITEMS)
    assert greedy[1:3] == ("{}", "{}")
    assert len(modest[1].split(",")) == len(modest[2].split(",")) == ITEMS - 1


def test_blas_has_the_threads_that_were_allowed_and_then_its_own_again() -> None:
    library = blas._library()
    if library is None:
        pytest.skip("NumPy's BLAS is none that is known")
    with blas.threads(2):
        with blas.one_thread():
            assert library.get_threads() == 1
        assert library.get_threads() == 2
        with suppress(ZeroDivisionError), blas.one_thread():
            raise ZeroDivisionError
        assert library.get_threads() == 2


@pytest.mark.parametrize("has_library", [True, False])
def test_a_product_is_added_to_the_columns_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, has_library: bool
) -> None:
    if not has_library:
        monkeypatch.setattr(blas, "_library", lambda: None)
    elif blas._library() is None:
        pytest.skip("NumPy's BLAS is none that is known")
    generator = np.random.default_rng(0)
    left, right = (generator.normal(size=(n, 7)).astype(np.float32) for n in (5, 40))
    # Rows with something in between, which stays as it is.
    whole = generator.normal(size=(5, 50)).astype(np.float32)
    before = whole.copy()
    add = blas.product_into(left, right, whole[:, :44], np.empty((5, 16), dtype=np.float32))
    for first, last in ((0, 16), (16, 32), (36, 40)):
        add(first, last)
    expected = before[:, :40] + left @ right.T
    expected[:, 32:36] = before[:, 32:36]
    np.testing.assert_allclose(whole[:, :40], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole[:, 40:], before[:, 40:])


@pytest.mark.parametrize(
    ("items", "k"),
    [(1023, 1), (1024, 20), (3000, 20), (3000, 100), (2500, 200), (5119, 20), (5120, 20), (11_000, 100)],
)
def test_the_best_of_several_panels_are_those_of_a_full_sort(items: int, k: int) -> None:
    weights = random_weights(I=items)
    history = random_history(np.random.default_rng(items + k), 30, 6)
    scores, cold = score_users(weights, history, max_history=7)
    mask_seen(scores, history, (2,))
    expected_items, expected = forward.top_k(scores, k)
    found_items, found, found_cold = CpuScorer(version(weights), k)(history)
    np.testing.assert_array_equal(found_items, expected_items)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(found_cold, cold)


@pytest.mark.parametrize("items", [2500, 7000])
def test_of_many_hundreds_only_those_change_places_that_float32_hardly_tells_apart(items: int) -> None:
    weights = random_weights(I=items)
    history = random_history(np.random.default_rng(items + 700), 30, 6)
    scores, _ = score_users(weights, history, max_history=7)
    mask_seen(scores, history, (2,))
    expected_items, expected = forward.top_k(scores, 700)
    found_items, _, _ = CpuScorer(version(weights), 700)(history)
    np.testing.assert_array_equal(np.sort(found_items), np.sort(expected_items))
    np.testing.assert_allclose(np.take_along_axis(scores, found_items, axis=1), expected, rtol=1e-6)
    assert (found_items != expected_items).mean() < 1e-3


@pytest.mark.parametrize("bias", ["above all", "below all", "one far above", "one a little above"])
def test_the_best_are_found_where_exponentials_overflow_or_vanish(bias: str) -> None:
    weights = random_weights(I=60)
    if bias.startswith("one"):
        # The others' exponentials are numbers that float32 holds to a few bits only.
        weights["output_bias"] -= {"one far above": 150.0, "one a little above": 95.0}[bias]
        weights["output_bias"][7] = 0.0
    else:
        weights["output_bias"] += 300.0 if bias == "above all" else -300.0
    history = random_history(np.random.default_rng(3), 30, 6)
    scores, _ = score_users(weights, history, max_history=7)
    mask_seen(scores, history, (2,))
    expected_items, expected = forward.top_k(scores, 20)
    found_items, found, _ = CpuScorer(version(weights), 20)(history)
    np.testing.assert_array_equal(found_items, expected_items)
    # Logits of 300 are known to 3e-5.
    np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.parametrize("items", [60, 5119, 5120, 11_000])
@pytest.mark.parametrize("bias", [0.0, 300.0, -300.0, "one far above"])
def test_scores_of_pairs_are_those_among_all_scores(items: int, bias: float | str) -> None:
    weights = random_weights(I=items)
    if bias == "one far above":
        weights["output_bias"] -= np.float32(150.0)
        weights["output_bias"][7] = 0.0
    else:
        weights["output_bias"] += np.float32(bias)
    generator = np.random.default_rng(items)
    history = random_history(generator, 400, 6)
    # Several of some users, none of others, and one pair twice.
    user = np.sort(generator.integers(0, 400, 1000))
    item = np.where(np.arange(1000) % 9, generator.integers(0, items, 1000), 7)
    user, item = np.append(user, user[-1]), np.append(item, item[-1])
    scores, _ = score_users(weights, history, max_history=7)
    assert (history.counts == 0).any()
    found = CpuScorer(version(weights), 1).of_pairs(history, user, item)
    # Logits of 300 are known to 3e-5.
    np.testing.assert_allclose(found, scores[user, item], rtol=2e-4 if bias else 1e-5, atol=1e-38)


def test_events_that_are_in_order_are_left_as_they_are() -> None:
    sorted_once = random_history(np.random.default_rng(4), 50, 9).distinct()
    again = replace(sorted_once, is_ordered=False).distinct()
    for name in ("counts", "item", "event_type", "occurred_at"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sorted_once, name))


# Weights


finite = {"<f4": {"allow_nan": False, "allow_infinity": False}, "<i4": None}
small_arrays = st.sampled_from([*finite]).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6), elements=finite[dtype]
    )
)


def assemble(chunks: Any) -> Any:
    chunks = list(chunks)
    assembler = tensors.Assembler("t", chunks[0][1], chunks[0][2])
    for number, _, _, sha256, data in chunks:
        assembler.add(number, sha256, data)
    return assembler.finish()


@given(small_arrays, st.integers(1, 40))
def test_a_tensor_survives_its_chunks_bit_for_bit(array: np.ndarray[Any, Any], chunk_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "CHUNK_BYTES", chunk_bytes)
        chunks = list(tensors.to_chunks(array))
    assert all(len(chunk[4]) <= chunk_bytes for chunk in chunks)
    back = assemble(chunks)
    assert back.shape == array.shape
    assert back.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()
    assert not back.flags.writeable


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.object_, np.float16])
def test_other_types_are_not_stored(dtype: type) -> None:
    with pytest.raises(ValueError, match="tensors are stored as"):
        list(tensors.to_chunks(np.zeros(3, dtype=dtype)))


def damaged(how: str) -> list[tuple[int, str, list[int], bytes, bytes]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "CHUNK_BYTES", 16)
        chunks = list(tensors.to_chunks(np.arange(10, dtype=np.float32)))
    number, dtype, shape, sha256, data = chunks[1]
    if how == "bit":
        chunks[1] = (number, dtype, shape, sha256, bytes([data[0] ^ 1]) + data[1:])
    elif how == "missing":
        del chunks[1]
    elif how == "last missing":
        del chunks[2]
    elif how == "order":
        chunks[1], chunks[2] = chunks[2], chunks[1]
    elif how == "longer":
        chunks.append((3, dtype, shape, hashlib.sha256(b"1234").digest(), b"1234"))
    elif how == "not a number":
        chunks = list(tensors.to_chunks(np.array([1, np.nan], dtype=np.float32)))
    elif how == "dtype":
        chunks[0] = (0, "|O", shape, chunks[0][3], chunks[0][4])
    elif how == "negative":
        chunks[0] = (0, dtype, [-1], chunks[0][3], chunks[0][4])
    elif how == "enormous":
        chunks[0] = (0, dtype, [2**31 - 1] * 3, chunks[0][3], chunks[0][4])
    return chunks


@pytest.mark.parametrize(
    "how", ["bit", "missing", "last missing", "order", "longer", "dtype", "negative", "enormous", "not a number"]
)
def test_damaged_weights_are_refused(how: str) -> None:
    assert assemble(damaged("not")).tolist() == list(range(10))
    with pytest.raises(ScoringError, match="tensor 't' is corrupt") as refused:
        assemble(damaged(how))
    assert refused.value.sqlstate == "VA004"
    assert "vae.rollback" in refused.value.hint


@pytest.mark.parametrize("links", [0, 1, 150])
def test_weights_that_fit_together_are_taken(links: int) -> None:
    check_shapes(random_weights(links=links), types=TYPES, features=FEATURES)


@pytest.mark.parametrize("name", forward.SHAPES)
@pytest.mark.parametrize("how", ["missing", "one more dimension", "wrong type", "one row more"])
def test_weights_that_do_not_fit_together_are_refused(name: str, how: str) -> None:
    weights = random_weights()
    array = weights[name]
    if how == "missing":
        del weights[name]
    elif how == "one more dimension":
        weights[name] = array[None]
    elif how == "wrong type":
        weights[name] = array.astype("<f4" if name in forward.INTEGERS else "<i4")
    else:
        weights[name] = np.concatenate((array, array[:1]))
    with pytest.raises(ScoringError, match=r"tensor |the shortcut's links do not fit 30 items") as refused:
        check_shapes(weights, types=TYPES, features=FEATURES)
    assert refused.value.sqlstate == "VA004"


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("shortcut_item", 0, -1),
        ("shortcut_item", -1, ITEMS),
        ("shortcut_item", 7, 2**31 - 1),
        ("shortcut_start", 0, 1),
        ("shortcut_start", 0, -1),
        ("shortcut_start", 5, -1),
        ("shortcut_start", 5, 2**31 - 1),
        ("shortcut_start", 5, 151),
        ("shortcut_start", -1, 149),
        ("shortcut_start", -1, 151),
    ],
)
def test_links_that_lead_outside_are_refused(name: str, place: int, value: int) -> None:
    weights = random_weights()
    weights[name][place] = value
    with pytest.raises(ScoringError, match="the shortcut's links do not fit 30 items") as refused:
        check_shapes(weights, types=TYPES, features=FEATURES)
    assert refused.value.sqlstate == "VA004"
    assert "vae.rollback" in refused.value.hint
