"""Features of users and items: the same rows give the same tokens everywhere, and what cannot be a feature is none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.types.json import Jsonb

from pgvae import resources
from pgvae.dataset import Dataset, read_dataset
from pgvae.errors import PgvaeError
from pgvae.features import Column, fit_pipeline
from pgvae_runtime.features import NO_FEATURES, FeatureBag, FeaturePipeline, feature_bag
from pgvae_runtime.history import read_histories
from shop import SMALL, Shop, refusal, train, train_and_activate

SHOP = Shop()
EVENT_TYPES = ["view", "add_to_cart", "purchase"]

# The runtime in the database reads one user, then all users, as scoring does.
_READERS = """
create function pg_temp.tokens(user_key text, pipeline jsonb) returns bigint[] language plpython3u as $$
from types import SimpleNamespace
import importlib, json
plpy.execute("select vae_private.load_runtime('{digest}')")
runtime = "pgvae_runtime_{short}"
fitted = importlib.import_module(runtime + ".features").FeaturePipeline.from_json(json.loads(pipeline))
types = {types}
no_items = importlib.import_module(runtime + ".item_keys").ItemKeys.none()
version = SimpleNamespace(
    model="shop", model_id={model_id}, version_id=1, user_id_type="bigint", user_pipeline=fitted, event_types=types,
    catalogue_size=0, item_keys=no_items
)
history = importlib.import_module(runtime + ".history")
if user_key is None:
    everybody = {{}}
    for keys, batch in history.read_histories(plpy, version, 7):
        for number, key in enumerate(keys):
            bag = batch.features
            everybody[key] = [] if bag is None else bag.token[bag.start[number]:bag.start[number + 1]].tolist()
    plpy.execute("truncate pg_temp.refreshed")
    plan = plpy.prepare("insert into pg_temp.refreshed values ($1, $2)", ["text", "bigint[]"])
    for key, tokens in everybody.items():
        plpy.execute(plan, [key, tokens])
    return None
bag = history.read_history(plpy, version, user_key).features
return [] if bag is None else bag.token.tolist()
$$;
create temporary table refreshed (user_key text, tokens bigint[]);
"""


def add_readers(connection: psycopg.Connection) -> None:
    digest = resources.runtime_digest()
    types = repr({name: number for number, name in enumerate(EVENT_TYPES)})
    found = connection.execute("select model_id from vae.models where name = 'shop'").fetchone()
    assert found is not None
    readers = _READERS.format(digest=digest, short=digest[:12], types=types, model_id=found[0])
    connection.execute(readers.encode())


def live_tokens(connection: psycopg.Connection, pipeline: FeaturePipeline, user: int) -> list[int]:
    """Gives the tokens that the runtime in the database reads of one user."""
    query = "select pg_temp.tokens(%s, %s)"
    row = connection.execute(query, [str(user), Jsonb(pipeline.to_json())]).fetchone()
    assert row is not None
    return list(row[0])


def refresh_tokens(connection: psycopg.Connection, pipeline: FeaturePipeline) -> dict[int, list[int]]:
    """Gives the tokens that the runtime in the database reads of all users."""
    connection.execute("select pg_temp.tokens(null, %s)", [Jsonb(pipeline.to_json())])
    return {int(key): tokens for key, tokens in connection.execute("select * from refreshed").fetchall()}


def trainer_tokens(connection: psycopg.Connection, dataset: Dataset) -> dict[int, list[int]]:
    """Gives the tokens of a dataset's users by their keys."""
    users = connection.execute("select distinct user_id from shop.clean_events order by 1").fetchall()
    assert len(users) == dataset.user_count
    return {key: tokens_of(dataset.user_features, number) for number, (key,) in enumerate(users)}


def tokens_of(bag: FeatureBag, number: int) -> list[int]:
    tokens: list[int] = bag.token[bag.start[number] : bag.start[number + 1]].tolist()
    return tokens


def read(connection: psycopg.Connection) -> Dataset:
    with psycopg.connect(connection.info.dsn) as reader:
        return read_dataset(reader, "shop")


def meaning(pipeline: FeaturePipeline, tokens: Sequence[int]) -> list[str]:
    """Gives what tokens stand for, as "column=value"."""
    names = {}
    for column in pipeline.columns:
        values = column.vocabulary or [f"bin {number}" for number in range(column.size)]
        names |= {column.first + number: f"{column.name}={value}" for number, value in enumerate(values)}
    assert len(names) == pipeline.size
    return [names[token] for token in tokens]


def reasons(pipeline: FeaturePipeline) -> dict[str, str]:
    return dict(pipeline.left_out)


def fit_values(
    values: Sequence[Any], kind: str, *, source: str = "items", is_used: bool = True
) -> tuple[FeaturePipeline, list[str]]:
    """Gives the pipeline of one column, x, of these values, and the rows as JSON."""
    column = Column(
        source=source, column_name="x", is_used=is_used, kind=kind, reason=None if is_used else "is the key"
    )
    rows = [json.dumps({"x": value}) for value in values]
    return fit_pipeline([column], [[row] for row in rows], source=source), rows


def bins(values: Sequence[float | None]) -> list[list[int]]:
    """Gives the tokens of each value of a column of numbers."""
    pipeline, rows = fit_values(values, "number")
    bag = feature_bag(pipeline, [[row] for row in rows])
    return [tokens_of(bag, number) for number in range(len(rows))]


# Fitting


def test_numbers_fall_into_bins_of_equal_share() -> None:
    found = np.array(bins([float(value) for value in range(1600)])).ravel()
    assert np.bincount(found).tolist() == [100] * 16
    assert (np.diff(found) >= 0).all()


def test_few_numbers_each_have_a_bin_of_their_own() -> None:
    assert bins([3.0, 1.0, 2.0, 1.0]) == [[2], [0], [1], [0]]


def test_a_value_that_most_rows_have_does_not_hide_the_others() -> None:
    found = bins([0.0] * 95 + [float(value) for value in range(1, 6)])
    assert {tuple(tokens) for tokens in found[:95]} == {(0,)}
    assert all(tokens and tokens != [0] for tokens in found[95:])


def test_numbers_outside_the_training_range_fall_into_the_outer_bins() -> None:
    pipeline, _ = fit_values([float(value) for value in range(100)], "number")
    bag = feature_bag(pipeline, [['{"x": -1e300}'], ['{"x": 1e300}'], ['{"x": 1e400}'], [f'{{"x": {"9" * 5000}}}']])
    # The last two are beyond what a double holds.
    assert [tokens_of(bag, number) for number in range(4)] == [[0], [pipeline.size - 1], [], []]


def edges_of(values: Sequence[float], kind: str, *, source: str) -> list[float]:
    pipeline, _ = fit_values(values, kind, source=source)
    return [edge for column in pipeline.columns for edge in column.edges]


def test_the_edges_of_bins_show_no_exact_value_of_fewer_than_five_users() -> None:
    moments = [1_700_000_000.25 + 40_000.0 * number for number in range(200)]
    assert len(edges_of(moments, "time", source="users")) > 10
    assert all(edge % 86_400 == 0 for edge in edges_of(moments, "time", source="users"))
    incomes = [-1234.5, 0.0, 0.012345, *(20_000.0 + 123.45 * number for number in range(20))]
    found = edges_of(incomes, "number", source="users")
    assert found[:2] == [0.0123, 20_100.0]
    assert all(edge == float(f"{edge:.3g}") for edge in found)
    # What coincides then is one.
    assert edges_of([1234.0, 1234.5, 1235.0, 1242.0], "number", source="users") == [1240.0]
    assert edges_of([1231.0, 1232.0, 1233.0, 1234.0] * 4, "number", source="users") == []
    # Five users share these years.
    assert edges_of([2021.0] * 5 + [2022.0] * 5 + [2023.0] * 4, "number", source="users") == [2022.0]
    for values, kind in ((moments, "time"), (incomes, "number")):
        assert set(edges_of(values, kind, source="items")) <= set(values)


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 3000).map(float), min_size=2))
def test_every_bin_of_rounded_edges_has_a_row(values: list[float]) -> None:
    pipeline, rows = fit_values(values, "number", source="users")
    assert set(feature_bag(pipeline, [[row] for row in rows]).token.tolist()) == set(range(pipeline.size))


def test_what_is_not_there_or_no_number_gives_no_token() -> None:
    assert bins([1.0, 2.0, None]) == [[0], [1], []]
    pipeline, _ = fit_values([1.0, 2.0, 3.0], "number")
    strange = ['{"x": null}', "{}", '{"x": "NaN"}', '{"x": "1"}', '{"x": true}', '{"x": [1]}', '{"y": 1}']
    assert feature_bag(pipeline, [[row] for row in strange]).counts().tolist() == [0] * len(strange)


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ([5.0] * 10, "number", "has one value only"),
        ([None] * 10, "number", "has no values"),
        (["NaN"] * 10, "number", "has no finite values"),
        (["same"] * 10, "text", "has one value only"),
        ([f"sku-{n}" for n in range(40)], "text", "looks like an identifier: 40 different values in 40 rows"),
        (
            [f"{n}.{n % 10}" for n in range(40)],
            "text",
            "is text, though its values are numbers: give a view that casts it",
        ),
        ([f"{n:013}" for n in range(40)], "text", "looks like an identifier: 40 different values in 40 rows"),
        ([f"{n:032x}" for n in range(40)], "category", "looks like an identifier: 40 different values in 40 rows"),
        (["a", "b"] * 2, "category", "has no value that occurs in 3 rows"),
        ([["a"], ["b"], []], "tags", "has no value that occurs in 3 rows"),
        (["y" * 201] * 5 + ["z" * 201] * 5, "text", "has values of more than 200 characters"),
        (
            [f"always the same and {n}" for n in range(20)],
            "text",
            "has no word that occurs often, but not in most rows",
        ),
    ],
)
def test_a_column_that_tells_nothing_is_left_out_with_the_reason(values: Any, kind: str, reason: str) -> None:
    pipeline, _ = fit_values(values, kind)
    assert (pipeline.size, reasons(pipeline)) == (0, {"x": reason})


def test_a_number_that_only_some_rows_have_says_which() -> None:
    assert bins([7.0, None, 7.0]) == [[0], [], [0]]


def test_text_is_a_category_where_values_come_again_and_words_where_they_do_not() -> None:
    pipeline, _ = fit_values(["Home & Garden", "Toys", "Toys"] * 5, "text")
    assert [(column.kind, column.vocabulary) for column in pipeline.columns] == [
        ("category", ("Home & Garden", "Toys"))
    ]
    titles = (
        [f"Red mug {n}x" for n in range(8)] + [f"Blue MUG {n}y" for n in range(4)] + [f"Lamp {n}z" for n in range(9)]
    )
    pipeline, rows = fit_values(titles, "text")
    assert [(column.kind, column.vocabulary) for column in pipeline.columns] == [("words", ("blue", "lamp", "red"))]
    assert meaning(pipeline, tokens_of(feature_bag(pipeline, [[rows[8]]]), 0)) == ["x=blue"]


def test_free_text_about_people_is_left_out() -> None:
    pipeline, _ = fit_values([f"I live in house {n}" for n in range(30)], "text", source="users")
    assert reasons(pipeline) == {"x": "is free text about a person"}


def test_categories_new_since_training_give_no_token() -> None:
    pipeline, _ = fit_values(["a", "b"] * 5, "category")
    assert feature_bag(pipeline, [['{"x": "new"}'], ['{"x": "A"}'], ['{"x": "a"}']]).counts().tolist() == [0, 0, 1]


def test_a_wide_column_cannot_explode(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [str(number // 3) for number in range(9000)]
    pipeline, _ = fit_values(values, "category")
    assert pipeline.size == 1000
    words, _ = fit_values([f"w{number // 3} v{number // 3} u{number} t{number}" for number in range(9000)], "text")
    assert words.size == 5000
    tags = feature_bag(fit_values([["a", "b"]] * 5, "tags")[0], [[json.dumps({"x": ["no"] * 100 + ["a"]})]])
    assert tags.counts().tolist() == [0]
    monkeypatch.setattr("pgvae.features._MAX_TOKENS", 1500)
    columns = [Column(source="items", column_name=name, is_used=True, kind="category", reason=None) for name in "xy"]
    both = fit_pipeline(columns, [[json.dumps({"x": value, "y": value})] for value in values], source="items")
    assert both.size == 1000
    assert reasons(both) == {"y": "has 1000 categories or words, and with the columns before it more than 1500"}


def test_of_many_rows_every_second_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgvae.features._MAX_ROWS", 50)
    pipeline, rows = fit_values([f"even {number % 5}" if number % 2 == 0 else "odd" for number in range(99)], "text")
    assert pipeline.columns[0].vocabulary == tuple(f"even {number}" for number in range(5))
    assert feature_bag(pipeline, [[row] for row in rows]).counts().sum() == 50


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "c": st.sampled_from(["a", "B", "é", "", "\U0001f6d2"]) | st.none(),
                "t": st.lists(st.sampled_from(["x", "y z", None]), max_size=4) | st.none() | st.text(max_size=3),
                "n": st.floats() | st.integers() | st.none() | st.text(max_size=2),
            },
        ),
        max_size=30,
    )
)
def test_a_pipeline_survives_json(rows: list[dict[str, Any]]) -> None:
    columns = [
        Column(source="items", column_name=name, is_used=True, kind=kind, reason=None)
        for name, kind in (("c", "category"), ("t", "tags"), ("n", "number"))
    ]
    documents = [[json.dumps(row)] for row in rows]
    pipeline = fit_pipeline(columns, documents, source="items")
    read_back = FeaturePipeline.from_json(json.loads(json.dumps(pipeline.to_json())))
    assert read_back == pipeline
    bag = feature_bag(pipeline, documents)
    assert feature_bag(read_back, documents).token.tolist() == bag.token.tolist()
    assert bag.token.max(initial=-1) < pipeline.size
    assert len(bag) == len(rows)


def test_a_bag_gives_its_parts_in_any_order() -> None:
    bag = FeatureBag.of([[1, 2], [], [0], [3, 4, 5]])
    taken = bag.take(np.array([3, 1, 0, 0]))
    assert [tokens_of(taken, number) for number in range(4)] == [[3, 4, 5], [], [1, 2], [1, 2]]
    both = bag.take(np.array([2])).followed_by(bag.take(np.array([1, 0])))
    assert [tokens_of(both, number) for number in range(3)] == [[0], [], [1, 2]]
    assert FeatureBag.empty(2).take(np.array([1])).counts().tolist() == [0]


# The same tokens in the trainer and in the database

_COLUMNS: dict[str, tuple[str, list[str]]] = {
    "a_boolean": ("boolean", ["true", "false"]),
    "a_uuid": ("uuid", ["'6f1b3f8e-0000-4000-8000-000000000001'", "'6F1B3F8E-0000-4000-8000-000000000002'"]),
    "an_enum": ("mood", ["'glad'", "'so so'"]),
    "a_domain": ("country_code", ["'DE'", "'FR'"]),
    "some_text": ("text", ["'a'", "''", "' a'", "'É\U0001f6d2'", "'null'", "E'\\\\\"{}'", "E'\\x01\\n'", "'%s :x $1'"]),
    "some_char": ("char(4)", ["'ab'", "'abcd'"]),
    "an_integer": ("integer", ["-2147483648", "0", "7", "2147483647"]),
    "shop_id": ("bigint", ["9223372036854775807", "1", "2"]),
    "a_numeric": ("numeric", ["'NaN'", "0.1", "1e-30", "1" + "0" * 400, "-3"]),
    "a_float": ("double precision", ["'NaN'", "'Infinity'", "'-Infinity'", "0.1", "-0.0", "1e308", "3.14159265358979"]),
    "a_real": ("real", ["'NaN'", "'Infinity'", "0.1", "3.4e38", "2"]),
    "a_date": ("date", ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'2024-02-29'", "'9999-12-31'"]),
    "a_timestamp": ("timestamp", ["'infinity'", "'2024-02-29 12:00:00.5'", "'2024-03-01'"]),
    "a_moment": ("timestamptz", ["'-infinity'", "'2024-02-29 12:00:00+02'", "'2024-02-29 06:00:00Z'", "'1200-01-01Z'"]),
    "an_interval": ("interval", ["'1 day'", "'-2 hours'", "'1 mon'"]),
    "some_tags": ("text[]", ["'{}'", "'{a,b}'", "'{a,null,\"x y\"}'", "'{{a,b},{c,d}}'", "'[5:6]={a,é}'"]),
    "some_numbers": ("integer[]", ["'{1,2}'", "'{2}'", "'{null}'"]),
    "some_json": (
        "jsonb",
        ['\'["a", 1, null, 2.50, true, {"b": 1}]\'', "'\"a\"'", "'{\"a\": 1}'", "'null'", "'[]'", "'7'"],
    ),
    'odd "column" %s :x \U0001f6d2\'': ("text", ["'u'", "'v'"]),
}


@pytest.fixture(scope="module")
def everything(shared: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a model whose users have a column of each type, and the runtime's readers.

    Its settings are not the trainer's.
    """
    SHOP.make(shared)
    shared.execute("create type mood as enum ('glad', 'so so')")
    shared.execute("create domain code as text; create domain country_code as code check (length(value) = 2)")
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, (kind, _) in _COLUMNS.items()
    )
    shared.execute(sql.SQL("create table users (user_id bigint primary key, {})").format(columns))
    SHOP.create_model(shared, users="users")
    add_readers(shared)
    for setting in ("datestyle = 'SQL, DMY'", "timezone = 'Asia/Kathmandu'", "extra_float_digits = -10"):
        shared.execute(sql.SQL("set {}").format(sql.SQL(setting)))
    shared.execute("set intervalstyle = 'sql_standard'")
    return shared


def test_every_type_is_read(everything: psycopg.Connection) -> None:
    rows = everything.execute("select column_name, is_used, kind, reason from vae.feature_columns('shop')").fetchall()
    assert [row for row in rows if not row[1]] == [("user_id", False, None, "is the key")]
    assert {name for name, *_ in rows} == {*_COLUMNS, "user_id"}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_trainer_and_database_give_the_same_tokens(everything: psycopg.Connection, data: st.DataObject) -> None:
    rows = st.fixed_dictionaries({name: st.sampled_from([*pool, "null"]) for name, (_, pool) in _COLUMNS.items()})
    # Fewer kinds of rows than users, so that categories come often enough.
    kinds = data.draw(st.lists(rows, min_size=1, max_size=4))
    # The last ten have no event.
    users = [*SHOP.users, *range(10)]
    everything.execute("truncate users")
    for number, user in enumerate(users):
        kind = kinds[number % len(kinds)]
        values = sql.SQL(", ").join(sql.SQL(kind[name]) for name in _COLUMNS)
        everything.execute(sql.SQL("insert into users values ({}, {})").format(sql.Literal(user), values))
    dataset = read(everything)
    pipeline = dataset.user_pipeline
    trained = trainer_tokens(everything, dataset)
    refreshed = refresh_tokens(everything, pipeline)
    assert set(refreshed) == set(users)
    for number, user in enumerate(users):
        # A user without events has the tokens of another one of the same kind.
        expected = trained.get(user, trained[users[number % len(kinds)]])
        assert refreshed[user] == expected
        if number < len(kinds) or number >= len(SHOP.users):
            assert live_tokens(everything, pipeline, user) == expected
        for name in ("an_enum", "some_char", "a_domain"):
            value = kinds[number % len(kinds)][name]
            if value != "null" and name not in reasons(pipeline):
                assert f"{name}={value.strip(chr(39))}" in meaning(pipeline, expected)


# Models with features


def make_tables(connection: psycopg.Connection) -> None:
    """Makes a shop with users and items; four items have no event, the last of them no known feature either."""
    SHOP.make(connection)
    make_users_and_items(connection)


def make_users_and_items(connection: psycopg.Connection) -> None:
    """Makes the tables of `make_tables` beside the events."""
    connection.execute(
        "create table users (user_id bigint primary key, country text, tags text[], first_name text, joined date)"
    )
    connection.execute("create table items (item_id bigint primary key, category text, price numeric)")
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into users values (%s, %s, %s, %s, %s)",
            [
                (user, "DE" if number % 2 else "FR", ["vip"] if number % 3 else [], f"Anna {number}", "2024-01-01")
                for number, user in enumerate([*SHOP.users, 1, 2])
            ],
        )
        items = [(item, "even" if item % 2 == 0 else "odd", item % 7) for item in SHOP.items]
        cold = [(10, "even", 1), (2, "odd", None), (30, "new", 6), (40, "new", None)]
        cursor.executemany("insert into items values (%s, %s, %s)", [*items, *cold])


@pytest.fixture
def with_tables(connection: psycopg.Connection) -> psycopg.Connection:
    make_tables(connection)
    return connection


@pytest.fixture
def model(with_tables: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a model of users and items."""
    SHOP.create_model(with_tables, users="users", items="items")
    add_readers(with_tables)
    return with_tables


@pytest.fixture
def scored(model: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database whose model of users and items is trained, active and refreshed."""
    train_and_activate(model.info.dsn)
    model.execute("call vae.refresh('shop')")
    return model


def stored_pipeline(connection: psycopg.Connection, source: str = "users") -> FeaturePipeline:
    row = connection.execute("select features from vae_private.scoring_versions").fetchone()
    assert row is not None
    return FeaturePipeline.from_json(row[0][source])


def test_a_version_keeps_its_pipeline(scored: psycopg.Connection) -> None:
    users, items = stored_pipeline(scored), stored_pipeline(scored, "items")
    dataset = read(scored)
    assert (users, items) == (dataset.user_pipeline, dataset.item_pipeline)
    assert meaning(users, range(users.size)) == ["country=DE", "country=FR", "tags=vip"]
    assert reasons(users) == {
        "user_id": "is the key",
        "first_name": "looks personal by its name",
        "joined": "has one value only",
    }
    assert [column.name for column in items.columns] == ["category", "price"]
    expected = trainer_tokens(scored, dataset)
    for user in SHOP.users[:4]:
        assert live_tokens(scored, users, user) == expected[user]
    assert {user: tokens for user, tokens in refresh_tokens(scored, users).items() if user > 2} == expected


def test_a_training_says_which_columns_it_reads(
    model: psycopg.Connection, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_cli("train", "shop", "--epochs=1", dsn=model.info.dsn)
    assert done.returncode == 0, done.stderr
    left_out = "user_id is the key, first_name looks personal by its name, joined has one value only"
    assert f"features of users: country, tags; left out: {left_out}\n" in done.stderr
    known_alone = "known by them alone: 3 items"
    assert f"features of items: category, price; {known_alone}; left out: item_id is the key\n" in done.stderr
    assert " of 30 users on 12 items," in done.stderr


def test_a_dataset_hands_on_its_features(model: psycopg.Connection) -> None:
    dataset = read(model)
    early = dataset.between(-np.inf, float(np.median(dataset.occurred_at)))
    assert early.user_features is dataset.user_features
    assert early.item_pipeline is dataset.item_pipeline
    history = dataset.history(np.array([4, 0]))
    assert history.features is not None
    assert [tokens_of(history.features, n) for n in (0, 1)] == [tokens_of(dataset.user_features, n) for n in (4, 0)]
    assert history.tokens(500).features is history.features


def test_items_without_events_are_in_the_catalogue_where_something_is_known_of_them(scored: psycopg.Connection) -> None:
    dataset = read(scored)
    assert sorted(dataset.item_keys[:12]) == sorted(map(str, SHOP.items))
    # The category "new" is no token, since no item with events has it; the price of 30 is.
    assert dataset.item_keys[12:] == ["10", "2", "30"]
    assert dataset.trained_items.tolist() == [True] * 12 + [False] * 3
    assert len(dataset.item_features) == 15
    cold = meaning(dataset.item_pipeline, tokens_of(dataset.item_features, 12))
    assert cold[0] == "category=even"
    assert len(cold) == 2
    keys = scored.execute("select item_key from vae_private.items order by item_index").fetchall()
    assert [key for (key,) in keys] == dataset.item_keys
    assert scored.execute("select item_count from vae.versions").fetchone() == (15,)
    assert scored.execute("select shop.score(%s, 10) > 0", [SHOP.users[0]]).fetchone() == (True,)


def test_of_many_cold_items_those_are_kept_of_which_most_is_known(with_tables: psycopg.Connection) -> None:
    SHOP.create_model(with_tables, users="users", items="items", options=SMALL | {"max_cold_items": 1})
    dataset = read(with_tables)
    assert dataset.item_keys[12:] == ["10"]
    assert dataset.item_features.counts()[12] == 2


def test_items_new_since_training_are_ignored(scored: psycopg.Connection) -> None:
    user = SHOP.users[0]
    everything = """select item_id, score from shop.recommend(%s, 1000, '{"exclude_seen": false}')"""
    before = scored.execute(everything, [user]).fetchall()
    assert len(before) == 15
    scored.execute("insert into items values (99, 'even', 1)")
    scored.execute("insert into events values (%s, 99, 'view', now())", [user])
    assert scored.execute(everything, [user]).fetchall() == before
    assert scored.execute("select shop.score(%s, 99)", [user]).fetchone() == (None,)
    scored.execute("call vae.refresh('shop')")


def test_a_user_who_arrived_after_training_has_features(scored: psycopg.Connection) -> None:
    scored.execute(
        "insert into users values (77, 'FR', '{vip,other}', 'Ida', '2030-01-01'), (78, 'XX', null, null, null)"
    )
    pipeline = stored_pipeline(scored)
    assert meaning(pipeline, live_tokens(scored, pipeline, 77)) == ["country=FR", "tags=vip"]
    assert live_tokens(scored, pipeline, 78) == []
    assert live_tokens(scored, pipeline, 79) == []
    refreshed = refresh_tokens(scored, pipeline)
    assert (refreshed[77], refreshed[78]) == (live_tokens(scored, pipeline, 77), [])
    assert 79 not in refreshed


def test_a_user_of_whom_only_features_are_known_is_answered_by_them(scored: psycopg.Connection) -> None:
    scored.execute("insert into users values (77, 'FR', '{vip}', 'Ida', '2030-01-01'), (78, 'XX', null, null, null)")
    pairs = "shop.score_pairs(array[77, 78, 79, 77], array[%s, %s, %s, %s]::bigint[]) p"
    scores = scored.execute(
        f"select p.score, shop.score(p.user_id, p.item_id) from {pairs}".encode(), [*SHOP.items[:3], 99]
    ).fetchall()
    assert [found for found, _ in scores] == [
        None if alone is None else pytest.approx(alone, rel=1e-5) for _, alone in scores
    ]
    placed = "select segment is not null, is_cold_start from shop.segment(%s)"
    assert [scored.execute(placed, [user]).fetchone() for user in (77, 78)] == [(True, True), (False, True)]
    scored.execute("call vae.refresh('shop', views => array['user_segments'])")
    stored = (
        "select segment is not null, is_cold_start from shop.user_segments where user_id in (77, 78) order by user_id"
    )
    assert scored.execute(stored).fetchall() == [(True, True), (False, True)]
    # Either features speak for an item, or it is popular.
    sentences = scored.execute(
        "select shop.because(77, i), e.contribution > 0 from unnest(%s::bigint[]) i, shop.explain(77, i) e"
        " where e.part = 'features'",
        [SHOP.items],
    ).fetchall()
    assert set(sentences) == {("because of what is known about you", True), ("because it is popular", False)}


def test_rows_of_one_key_are_put_together(with_tables: psycopg.Connection) -> None:
    user = SHOP.users[0]
    with_tables.execute("alter table users drop constraint users_pkey")
    with_tables.execute("insert into users values (%s, 'DE', '{vip}'), (%s, 'FR', null)", [user, user])
    SHOP.create_model(with_tables, users="users")
    add_readers(with_tables)
    dataset = read(with_tables)
    tokens = trainer_tokens(with_tables, dataset)[user]
    assert meaning(dataset.user_pipeline, tokens) == ["country=DE", "country=FR", "tags=vip", "joined=bin 0"]
    assert live_tokens(with_tables, dataset.user_pipeline, user) == tokens
    assert refresh_tokens(with_tables, dataset.user_pipeline)[user] == tokens


def test_text_keys_find_their_features(connection: psycopg.Connection) -> None:
    shop = Shop(user_type="varchar(600)", item_type="char(8)", user_keys=[f"user {n:>3}'" for n in range(30)])
    shop.make(connection)
    connection.execute("create table users as select distinct user_id, 'DE' as country from events")
    connection.execute("insert into users values (repeat('u', 513), 'DE')")
    connection.execute("update users set country = 'FR' where user_id > 'user  12'")
    connection.execute("create table items as select distinct item_id, length(item_id) as size from events")
    shop.create_model(connection, users="users", items="items")
    dataset = read(connection)
    assert dataset.user_features.counts().tolist() == [1] * 30
    assert connection.execute("select count(*) from shop.user_features").fetchone() == (30,)
    assert connection.execute("select features from shop.features(%s)", [shop.users[0]]).fetchone() == (
        {"country": "DE"},
    )


@pytest.mark.parametrize("values", [[], ["a", "b"] * 5])
def test_all_users_are_read_by_one_query_which_joins_features_only_where_there_are_some(values: list[str]) -> None:
    pipeline = fit_values(values, "category")[0] if values else NO_FEATURES
    prepared: list[str] = []
    plpy = SimpleNamespace(
        quote_ident=lambda name: name,
        prepare=lambda query, types: prepared.append(query),
        execute=lambda plan, values: [{"item_id_type": "bigint"}],
        cursor=lambda plan, values: SimpleNamespace(fetch=lambda count: []),
    )
    version: Any = SimpleNamespace(
        model="shop", model_id=1, version_id=1, event_types={}, user_pipeline=pipeline, catalogue_size=0
    )
    assert list(read_histories(plpy, version, 10, keys=["an item"])) == []
    reading = [query for query in prepared if "refresh_events" in query]
    assert len(reading) == 1
    assert ("user_features" in reading[0]) == bool(values)


def test_an_empty_array_takes_no_features(with_tables: psycopg.Connection) -> None:
    SHOP.create_model(with_tables, users="users", items="items", user_features=[], item_features=[])
    dataset = read(with_tables)
    assert (dataset.user_pipeline.size, dataset.item_pipeline.size) == (0, 0)
    assert reasons(dataset.item_pipeline)["price"] == "is not chosen"
    assert len(dataset.item_keys) == 12
    assert dataset.history(np.array([0])).features is None
    assert with_tables.execute("select features from shop.user_features limit 1").fetchone() == ({},)
    train_and_activate(with_tables.info.dsn)
    assert with_tables.execute("select count(*) from shop.recommend(%s, 5)", [SHOP.users[0]]).fetchone() == (5,)


# Choosing columns


def test_columns_that_look_personal_are_left_out_unless_they_are_asked_for(with_tables: psycopg.Connection) -> None:
    personal = (
        *("email", "E-Mail", "userEmail", "name", "firstName", "last_name", "nickname", "phone_number", "mobile"),
        *("address", "streetAddress", "zip", "ip", "last_ip", "birth_date", "dateOfBirth", "dob", "latitude", "IBAN"),
        *("password", "passport_no", "mail", "surname", "fullName", "middle_name", "username", "tel", "fax", "cell"),
        *("street", "zipcode", "postcode", "born", "ssn", "tax_id", "login", "gps", "lat", "lon", "lng", "longitude"),
    )
    fine = ("country", "zipper", "renamed", "description", "shipping", "plan", "latest", "mailing", "phase")
    names = sql.SQL(", ").join(sql.SQL("{} text").format(sql.Identifier(name)) for name in (*personal, *fine))
    with_tables.execute(sql.SQL("create table people (user_id bigint, {})").format(names))
    SHOP.create_model(with_tables, users="people", items="items")
    rows = with_tables.execute(
        "select column_name, is_used, reason from vae.feature_columns('shop') where source = 'users'"
    ).fetchall()
    assert {name for name, is_used, _ in rows if is_used} == set(fine)
    assert {name for name, _, reason in rows if reason == "looks personal by its name"} == set(personal)
    with_tables.execute("select vae.set_features('shop', user_features => '{E-Mail,plan}')")
    assert with_tables.execute("select user_features from vae.models").fetchone() == (["E-Mail", "plan"],)
    assert with_tables.execute("select item_features from vae.models").fetchone() == (["category", "price"],)


@pytest.mark.parametrize(
    ("arguments", "state", "message", "hint"),
    [
        ({"user_features": ["contry"]}, "42703", 'users has no column "contry"', "country, tags, first_name, joined"),
        (
            {"item_features": ["item_id"]},
            "42804",
            'column "item_id" of public.items cannot be a feature: it is the key',
            "view",
        ),
        (
            {"user_features": ["spot"]},
            "42804",
            'column "spot" of public.users cannot be a feature: it has the type point',
            "view",
        ),
        ({"user_features": [None]}, "42703", "users has no column", "country"),
        (
            {"users": None, "user_features": ["country"]},
            "22023",
            "user_features is given, but no table",
            "public.users",
        ),
    ],
)
def test_a_wrong_choice_is_refused_by_name(
    with_tables: psycopg.Connection, arguments: dict[str, Any], state: str, message: str, hint: str
) -> None:
    with_tables.execute("alter table users add spot point")
    with pytest.raises(psycopg.Error) as caught:
        SHOP.create_model(with_tables, **({"users": "users", "items": "items"} | arguments))
    assert caught.value.diag.sqlstate == state
    assert message in str(caught.value.diag.message_primary)
    assert hint in str(caught.value.diag.message_hint)


def test_types_that_cannot_be_read_are_named(with_tables: psycopg.Connection) -> None:
    with_tables.execute("alter table users add spot point, add raw bytea, add paid money, add at time, add doc json")
    SHOP.create_model(with_tables, users="users")
    found = dict(with_tables.execute("select column_name, reason from vae.feature_columns('shop')").fetchall())
    assert found["spot"] == "has the type point"
    assert found["raw"] == "has the type bytea"
    assert {found[name] is None for name in ("paid", "at", "doc")} == {False}


def test_a_table_of_a_thousand_columns_gives_the_first_64(with_tables: psycopg.Connection) -> None:
    with_tables.execute("alter table items " + ", ".join(f"add c{number} integer" for number in range(1000)))  # type: ignore[arg-type]
    SHOP.create_model(with_tables, items="items")
    assert with_tables.execute("select cardinality(item_features) from vae.models").fetchone() == (64,)
    reason = "select reason from vae.feature_columns('shop') where column_name = 'c999'"
    assert with_tables.execute(reason).fetchone() == ("stands behind 64 others",)
    assert read(with_tables).item_pipeline.size


# When tables change


def test_a_feature_column_that_is_dropped(scored: psycopg.Connection) -> None:
    user = SHOP.users[0]
    with pytest.raises(psycopg.errors.DependentObjectsStillExist, match="tags"):
        scored.execute("alter table users drop column tags")
    scored.execute("alter table users drop column tags cascade")
    assert "vae.rebuild_model" in str(refusal(scored, "call vae.refresh('shop')").message_hint)
    gone = 'public.users has no column "tags" any more that model shop can read as a feature'
    for query in ("select vae.rebuild_model('shop')", "select * from vae.check_events('shop')"):
        refused = refusal(scored, query)
        assert (refused.sqlstate, refused.message_primary) == ("42703", gone)
        assert "vae.set_features('shop', user_features => array[...])" in str(refused.message_hint)
    with pytest.raises(psycopg.Error, match=gone):
        train(scored.info.dsn)
    live = refusal(scored, "select * from shop.recommend(%s)", [user])
    assert live.sqlstate == "42703"
    assert "column k.tags does not exist" in str(live.message_primary)
    assert "vae.set_features('shop', ...)" in str(live.message_hint)

    scored.execute("select vae.set_features('shop', user_features => '{country}')")
    pipeline = stored_pipeline(scored)
    assert meaning(pipeline, live_tokens(scored, pipeline, user)) == ["country=FR"]
    scored.execute("call vae.refresh('shop')")
    assert len(scored.execute("select * from shop.recommend(%s)", [user]).fetchall()) > 3
    train_and_activate(scored.info.dsn)
    assert [column.name for column in stored_pipeline(scored).columns] == ["country"]


def test_a_feature_column_that_is_renamed(scored: psycopg.Connection) -> None:
    user = SHOP.users[1]
    pipeline = stored_pipeline(scored)
    before = live_tokens(scored, pipeline, user)
    scored.execute("alter table users rename tags to labels")
    assert refresh_tokens(scored, pipeline)[user] == before
    scored.execute("call vae.refresh('shop')")
    assert "rename the column back" in str(refusal(scored, "select shop.score(%s, 10)", [user]).message_hint)
    with pytest.raises(psycopg.Error, match='no column "tags" any more'):
        train(scored.info.dsn)
    scored.execute("alter table users rename labels to tags")
    assert live_tokens(scored, pipeline, user) == before


def test_a_column_that_comes_later_is_read_once_it_is_chosen(model: psycopg.Connection) -> None:
    model.execute("alter table items add brand text; update items set brand = 'x' where item_id % 3 = 0")
    model.execute("select vae.rebuild_model('shop')")
    assert reasons(read(model).item_pipeline)["brand"] == "is not chosen"
    model.execute("select vae.set_features('shop', item_features => '{brand}')")
    dataset = read(model)
    assert meaning(dataset.item_pipeline, range(dataset.item_pipeline.size)) == ["brand=x"]
    assert dataset.user_pipeline.size


def test_a_column_whose_type_changed_gives_no_token_but_no_error(scored: psycopg.Connection) -> None:
    pipeline = stored_pipeline(scored)
    scored.execute("select vae.set_features('shop', user_features => '{}')")
    scored.execute("alter table users alter country type integer using 7")
    scored.execute("select vae.set_features('shop', user_features => '{country,tags}')")
    assert meaning(pipeline, live_tokens(scored, pipeline, SHOP.users[1])) == ["tags=vip"]
    scored.execute("call vae.refresh('shop')")


def test_drop_model_leaves_nothing(model: psycopg.Connection) -> None:
    model.execute("select vae.drop_model('shop')")
    assert model.execute("select to_regnamespace('shop')").fetchone() == (None,)
    model.execute("alter table users drop column country")


# Rights


@pytest.fixture
def reader(scored: psycopg.Connection, role: str) -> Iterator[psycopg.Connection]:
    """A connection to the scored database as a scorer who may read events, items, and users but for the tags."""
    name = sql.Identifier(role)
    scored.execute(sql.SQL("grant vae_scorer to {0}; grant usage on schema shop to {0}").format(name))
    scored.execute(sql.SQL("grant select on events, items to {}").format(name))
    scored.execute(sql.SQL("grant select (user_id, country) on users to {}").format(name))
    with psycopg.connect(scored.info.dsn, autocommit=True, user=role) as connection:
        yield connection
    scored.execute(sql.SQL("drop owned by {}").format(name))


def test_features_are_read_with_the_rights_of_the_caller(
    scored: psycopg.Connection, reader: psycopg.Connection, role: str
) -> None:
    user = SHOP.users[1]
    refused = refusal(reader, "select * from shop.recommend(%s)", [user])
    assert refused.sqlstate == "42501"
    assert "permission denied for table users" in str(refused.message_primary)
    assert refusal(reader, "select * from shop.user_features").sqlstate == "42501"
    # Audiences read the items' features, with the rights of who asks.
    assert len(reader.execute("select * from shop.item_features").fetchall()) > 3
    scored.execute(sql.SQL("revoke select on items from {}").format(sql.Identifier(role)))
    assert refusal(reader, "select * from shop.item_features").sqlstate == "42501"
    scored.execute(sql.SQL("grant select on items to {}").format(sql.Identifier(role)))
    scored.execute(sql.SQL("grant select on users to {}").format(sql.Identifier(role)))
    assert len(reader.execute("select * from shop.recommend(%s)", [user]).fetchall()) > 3
    seen = "select features from shop.features(%s)"
    assert reader.execute(seen, [user]).fetchall() == [({"country": "DE", "tags": ["vip"], "joined": 1704067200},)]
    scored.execute("alter table users enable row level security; create policy own on users using (country = 'FR')")
    assert reader.execute(seen, [user]).fetchall() == []
    assert len(reader.execute(seen, [SHOP.users[0]]).fetchall()) == 1


def test_a_refusal_names_the_grants_that_are_missing(
    scored: psycopg.Connection, reader: psycopg.Connection, role: str
) -> None:
    scored.execute(sql.SQL("revoke select on events from {}").format(sql.Identifier(role)))
    # Of one row, of many, and of rows that are made one by one.
    for query in (
        "select * from shop.recommend(%(user)s)",
        "select * from shop.related(%(item)s)",
        "select * from shop.score_pairs(array[%(user)s], array[%(item)s])",
    ):
        refused = refusal(reader, query, {"user": SHOP.users[1], "item": SHOP.items[0]})
        assert refused.sqlstate == "42501"
        assert str(refused.message_primary).startswith("pgvae: permission denied for table "), query
        before, _, grants = str(refused.message_hint).partition(" allow it: ")
        assert before == "the shop's tables are read with the rights of whoever scores; their owner can"
    features = ", ".join(column for (column,) in scored.execute("select unnest(user_features) from vae.models"))
    assert grants.split("; ") == [
        f"grant select on public.events to {role}",
        f"grant select (user_id, {features}) on public.users to {role}",
    ]
    # So does what an operator asks of the events.
    scored.execute(sql.SQL("grant vae_operator to {}").format(sql.Identifier(role)))
    for query in (
        "select * from vae.check_events('shop')",
        "select * from vae.check_drift('shop')",
        "select * from vae.check_freshness('shop')",
        "select * from vae.hit_rate('shop')",
    ):
        refused = refusal(reader, query)
        assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for table events")
        assert str(refused.message_hint).endswith(f"; their owner can allow it: {grants}")
    # Only what compares digests reads features.
    of_features = grants.split("; ")[1]
    # The columns of the events that the model reads are as good as all of them.
    scored.execute(
        f"grant select (user_id, item_id, event_type, occurred_at) on events to {role};"
        f" grant select (user_id) on users to {role}"
    )
    refused = refusal(reader, "select * from vae.check_freshness('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for table users")
    assert str(refused.message_hint).endswith(f"; their owner can allow it: {of_features}")
    assert reader.execute("select * from vae.check_drift('shop')").fetchall()
    scored.execute(grants)
    assert reader.execute("select * from shop.recommend(%s)", [SHOP.users[1]]).fetchall()
    assert reader.execute("select * from vae.check_freshness('shop')").fetchall()


def test_a_model_gets_its_tables_later_and_its_version_scores_on(connection: psycopg.Connection) -> None:
    SHOP.make(connection)
    SHOP.create_model(connection)
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    user, item = SHOP.users[0], SHOP.items[0]
    live = f"select rank, item_id, score, model_version from shop.recommend({user})".encode()
    before = connection.execute(live).fetchall()
    refused = refusal(connection, """select * from shop.recommend(1, options => '{"at_most": {"category": 1}}')""")
    assert "select vae.set_tables('shop', items => 'public.items')" in str(refused.message_hint)

    connection.execute("create schema data")
    connection.execute("set search_path = data, public")
    make_users_and_items(connection)
    connection.execute("alter table items add title text; update items set title = 'Item ' || item_id")
    connection.execute("reset search_path")
    connection.execute("select vae.set_tables('shop', users => 'data.users', items => 'data.items')")
    assert connection.execute("select count(*), min(version), max(state) from vae.versions").fetchone() == (
        1, 1, "active",
    )  # fmt: skip
    assert connection.execute(live).fetchall() == before
    assert connection.execute(
        "select users_schema, users_table, users_key_column, user_features, items_table, item_features from vae.models"
    ).fetchone() == ("data", "users", "user_id", ["country", "tags", "joined"], "items", ["category", "price", "title"])
    assert connection.execute("select features from shop.features(%s)", [user]).fetchone() is not None
    assert connection.execute("select title from shop.item_titles(%s)", [[item]]).fetchone() == (f"Item {item}",)
    connection.execute("call vae.refresh('shop')")
    assert connection.execute(
        "select distinct is_cold_start from shop.recommendations where user_id = 1"
    ).fetchall() == [(True,)]
    # So short a history foretells no demand; the function is there.
    assert connection.execute("select * from shop.demand_by_category()").fetchall() == []
    assert train_and_activate(connection.info.dsn) == 2
    connection.execute("call vae.refresh('shop')")
    assert stored_pipeline(connection).size and stored_pipeline(connection, "items").size
    assert connection.execute("select count(*) > 0 from shop.recommendations where item_id = 10").fetchone() == (True,)
    # Others in their place.
    connection.execute(
        "create table people as select user_id as id, country, 7 as height from data.users where user_id <> %s", [user]
    )
    connection.execute(
        "select vae.set_tables('shop', users => 'people', users_key => 'id', user_features => '{height}')"
    )
    assert connection.execute("select users_key_column, user_features, items_table from vae.models").fetchone() == (
        "id", ["height"], "items",
    )  # fmt: skip
    assert connection.execute(f"select * from shop.history({user})".encode()).fetchall() == []
    assert connection.execute("select features from shop.features(1)").fetchone() == ({"height": 7},)
    connection.execute("drop table data.users")
    connection.execute("call vae.refresh('shop')")
    assert connection.execute("select status from vae.health_checks where check_name = 'views'").fetchall() == [("ok",)]
    connection.execute("select vae.drop_model('shop')")


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        ("", "22004", "neither users nor items is given"),
        ("user_features => '{country}'", "22004", "neither users nor items is given"),
        ("users => 'words'", "42804", "keys of users differ: bigint in public.events, text in public.words"),
        ("items => 'words', items_key => 'user_id'", "42804", "keys of items differ: bigint in public.events"),
        ("users => 'users', users_key => 'id'", "42703", 'public.users has no column "id"'),
        ("users => 'users', user_features => '{colour}'", "42703", 'public.users has no column "colour"'),
        ("users => 'users', item_features => '{category}'", "22023", "item_features is given, but no table"),
        ("users => 'users', item_features => '{}'", "22023", "item_features is given, but no table"),
        ("items => 'items', user_features => '{}'", "22023", "user_features is given, but no table"),
        ("users => 'passing'", "42809", "passing is temporary"),
        ("items => 'users_pkey', items_key => 'user_id'", "42809", "public.users_pkey is not a table or view"),
    ],
)
def test_tables_that_a_model_cannot_have_are_refused(
    model: psycopg.Connection, arguments: str, state: str, message: str
) -> None:
    model.execute("create table words as select 'a' as user_id; create temporary table passing as table users")
    before = model.execute("table vae.models").fetchall()
    refused = refusal(model, f"select vae.set_tables('shop'{', ' if arguments else ''}{arguments})")
    assert (refused.sqlstate, message in str(refused.message_primary)) == (state, True), refused.message_primary
    assert refused.message_hint
    assert model.execute("table vae.models").fetchall() == before


def test_only_the_owner_of_a_model_sets_its_tables_and_can_read_them(scored: psycopg.Connection, role: str) -> None:
    name = sql.Identifier(role)
    scored.execute(sql.SQL("grant vae_trainer to {0}; grant usage on schema shop to {0}").format(name))
    scored.execute("create table people as table users")
    try:
        with psycopg.connect(scored.info.dsn, autocommit=True, user=role) as trainer:
            assert refusal(trainer, "select vae.set_tables('shop', users => 'users')").sqlstate == "42501"
            assert trainer.execute("update vae.models set users_table = 'people' returning 1").fetchall() == []
            scored.execute(sql.SQL("grant select on users, items, events to {}").format(name))
            scored.execute(
                sql.SQL("grant create on database {} to {}").format(sql.Identifier(scored.info.dbname), name)
            )
            SHOP.create_model(trainer, "own")
            trainer.execute("select vae.set_tables('own', users => 'users', items => 'items')")
            assert trainer.execute("select users_table from vae.models where name = 'own'").fetchone() == ("users",)
            refused = refusal(trainer, "select vae.set_tables('own', users => 'people')")
            assert refused.message_primary == "permission denied for public.people"
            refused = refusal(scored, "select vae.set_tables('own', users => 'people')")
            assert refused.message_primary == "the owner of model own may not read public.people"
            scored.execute("create schema hidden; create table hidden.people as table users")
            scored.execute(sql.SQL("grant select on hidden.people to {}").format(name))
            refused = refusal(scored, "select vae.set_tables('own', users => 'hidden.people')")
            assert refused.message_primary == "the owner of model own may not use schema hidden"
            assert f"grant usage on schema hidden to {role}" in str(refused.message_hint)
            scored.execute("drop schema hidden cascade")
            scored.execute("select vae.set_tables('own', users => 'users')")
            trainer.execute("select vae.drop_model('own')")
    finally:
        scored.execute(sql.SQL("drop owned by {}").format(name))


def test_only_the_owner_of_a_model_chooses_its_features(scored: psycopg.Connection, role: str) -> None:
    name = sql.Identifier(role)
    scored.execute(sql.SQL("grant vae_trainer to {0}; grant usage on schema shop to {0}").format(name))
    scored.execute(sql.SQL("grant select on users, items, events to {}").format(name))
    scored.execute(sql.SQL("grant create on database {} to {}").format(sql.Identifier(scored.info.dbname), name))
    try:
        with psycopg.connect(scored.info.dsn, autocommit=True, user=role) as trainer:
            updated = trainer.execute("update vae.models set user_features = '{first_name}' returning 1").fetchall()
            assert updated == []
            assert (
                refusal(trainer, "select vae.set_features('shop', user_features => '{first_name}')").sqlstate == "42501"
            )
            assert trainer.execute("select count(*) from vae.feature_columns('shop')").fetchone() == (8,)
            SHOP.create_model(trainer, "own", users="users", items="items")
            trainer.execute("select vae.set_features('own', user_features => '{first_name}')")
            assert trainer.execute("select user_features from vae.models where name = 'own'").fetchone() == (
                ["first_name"],
            )
            with trainer.transaction():
                assert read_dataset(trainer, "own").item_pipeline.size
            trainer.execute("select vae.drop_model('own')")
    finally:
        scored.execute(sql.SQL("drop owned by {}").format(name))
    assert scored.execute("select user_features from vae.models").fetchone() == (["country", "tags", "joined"],)


def test_a_training_says_what_is_wrong_with_a_model_it_may_not_read(model: psycopg.Connection) -> None:
    model.execute("drop view shop.item_features")
    with pytest.raises((PgvaeError, psycopg.Error), match="the views of model shop are gone"):
        train(model.info.dsn)
    model.execute("select vae.rebuild_model('shop')")
    assert read(model).item_pipeline.size


# Names

ODD = [
    'a"b; drop table canary; --',
    "'); drop table canary; --",
    "$f$",
    "%I %s %% :x {schema}",
    "naïve 表 \U0001f6d2\n",
    "x" * 63,
]


def test_odd_names_of_columns_stay_names(connection: psycopg.Connection) -> None:
    connection.execute("create table canary as select 1 as alive")
    SHOP.make(connection)
    names = sql.SQL(", ").join(
        sql.SQL("{} text").format(sql.Identifier(name)) for name in [*ODD, "features", "user_id"]
    )
    connection.execute(sql.SQL("create table users (key bigint, {})").format(names))
    marks = sql.SQL(", ").join(
        sql.SQL("{}").format(sql.Literal(f"value {number % 2}")) for number in range(len(ODD) + 2)
    )
    for user in SHOP.users:
        connection.execute(sql.SQL("insert into users values ({}, {})").format(sql.Literal(user), marks))
    connection.execute("update users set user_id = key % 3")
    SHOP.create_model(connection, users="users", users_key="key", user_features=[*ODD, "features", "user_id"])
    add_readers(connection)
    connection.execute(sql.SQL("update users set {} = 'other' where key % 2 = 0").format(sql.Identifier(ODD[0])))
    dataset = read(connection)
    user = SHOP.users[1]
    tokens = meaning(dataset.user_pipeline, live_tokens(connection, dataset.user_pipeline, user))
    assert tokens == [f"{ODD[0]}=value 0", f"user_id={user % 3}"]
    assert {*reasons(dataset.user_pipeline)} == {*ODD[1:], "features", "key"}
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    assert stored_pipeline(connection) == dataset.user_pipeline
    for name in ODD:
        refused = refusal(connection, "select vae.set_features('shop', user_features => %s)", [[name[:-1]]])
        assert (refused.sqlstate, refused.message_primary) == ("42703", f'public.users has no column "{name[:-1]}"')
    assert connection.execute("select * from canary").fetchall() == [(1,)]


def test_columns_may_have_the_names_that_queries_give_to_tables(connection: psycopg.Connection) -> None:
    shop = Shop(user_id="u", item_id="i", event_type="t", occurred_at="e")
    shop.make(connection)
    connection.execute(
        "create table users as select distinct u as f, (u % 3)::text as k, (u % 2)::text as o from events"
    )
    connection.execute(
        "create table items as select distinct i as k, (i % 3)::text as f, (i % 2)::text as i from events"
    )
    shop.create_model(connection, users="users", users_key="f", items="items", items_key="k")
    assert {status for (status,) in connection.execute("select status from vae.check_events('shop')").fetchall()} == {
        "pass"
    }
    user, item = shop.users[0], shop.items[0]
    assert connection.execute("select features from shop.features(%s)", [user]).fetchone() == (
        {"k": str(user % 3), "o": str(user % 2)},
    )
    assert connection.execute("select features from shop.item_features where item_id = %s", [item]).fetchone() == (
        {"f": str(item % 3), "i": str(item % 2)},
    )
    train_and_activate(connection.info.dsn)
    connection.execute("call vae.refresh('shop')")
    assert connection.execute("select count(distinct user_id) from shop.recommendations").fetchone() == (30,)
    capped = connection.execute("select * from shop.recommend(%s, 4, %s)", [user, '{"at_most": {"f": 1}}']).fetchall()
    assert 1 <= len(capped) <= 3
