"""What scoring, activating and refreshing refuse: with which SQLSTATE, message and hint, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from shop import Shop, refusal, train

USER = Shop().users[0]
RECOMMEND = "select * from shop.recommend(%s)"
SCORING = [
    "select * from shop.recommend(1099511627776)",
    "select shop.score(1099511627776, 1099511627776)",
    "select shop.embedding(1099511627776)",
    "call vae.refresh('shop')",
]

Query = Callable[..., list[Any]]


@pytest.fixture
def ask(trained_database: str) -> Query:
    """Runs a query in a session of its own, which has no weights in memory yet."""

    def run(query: str, parameters: Any = None) -> list[Any]:
        with psycopg.connect(trained_database, autocommit=True) as fresh:
            cursor = fresh.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    return run


def refused_everywhere(dsn: str, sqlstate: str, message: str, hint: str) -> None:
    """Each way to score is refused alike, in a session that holds no weights."""
    for query in SCORING:
        with psycopg.connect(dsn, autocommit=True) as fresh:
            refused = refusal(fresh, query)
        assert refused.sqlstate == sqlstate, query
        assert message in str(refused.message_primary), query
        assert hint in str(refused.message_hint), query


def tamper(connection: psycopg.Connection, change: str) -> None:
    """Changes what is immutable, as only a superuser can."""
    connection.execute("alter table vae_private.tensors disable trigger user")
    assert connection.execute(change).rowcount > 0
    connection.execute("alter table vae_private.tensors enable trigger user")


# What is asked for


@pytest.mark.parametrize("k", [0, -1, 10_001, 10_000_000, None])
def test_k_is_between_1_and_10000(shared_trained: psycopg.Connection, k: int | None) -> None:
    refused = refusal(shared_trained, "select * from shop.recommend(%s, k => %s)", [USER, k])
    assert refused.sqlstate == "22023"
    assert refused.message_primary == f"pgvae: k is {'null' if k is None else k}"
    assert refused.message_hint == "ask for 1 to 10000 items, as in: k => 10"


def test_a_k_beyond_the_catalogue_gives_the_catalogue(shared_trained: psycopg.Connection) -> None:
    rows = shared_trained.execute(
        """select * from shop.recommend(%s, 10000, '{"exclude_seen": false}')""", [USER]
    ).fetchall()
    assert [row[0] for row in rows] == list(range(1, 13))
    assert {row[1] for row in rows} == set(Shop().items)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ('{"exclude": true}', "option 'exclude' is unknown", "known options: exclude_seen"),
        ('{"exclude_seen": 1}', "option 'exclude_seen' is 1", "give true or false"),
        ('{"exclude_seen": null}', "option 'exclude_seen' is null", "give true or false"),
        ('"exclude_seen"', 'options is "exclude_seen"', "give an object"),
        ("[]", "options is []", "give an object"),
        ("null", "options is null", "give an object"),
    ],
)
def test_an_option_that_means_nothing_is_refused_by_name(
    shared_trained: psycopg.Connection, options: str, message: str, hint: str
) -> None:
    refused = refusal(shared_trained, "select * from shop.recommend(%s, 5, %s)", [USER, options])
    assert (refused.sqlstate, refused.message_primary) == ("22023", f"pgvae: {message}")
    assert hint in str(refused.message_hint)


def test_a_null_key_asks_for_nothing(shared_trained: psycopg.Connection) -> None:
    assert shared_trained.execute(RECOMMEND, [None]).fetchall() == []
    assert shared_trained.execute("select shop.embedding(null)").fetchone() == (None,)
    assert shared_trained.execute("select shop.score(null, 1)").fetchone() == (None,)
    assert shared_trained.execute("select shop.score(1, null)").fetchone() == (None,)
    assert shared_trained.execute("select * from shop.history(null)").fetchall() == []


def test_an_unknown_device_is_refused_by_name(shared_trained: psycopg.Connection) -> None:
    shared_trained.execute("set vae.device to 'tpu'")
    refused = refusal(shared_trained, "call vae.refresh('shop', full => true)")
    shared_trained.execute("reset vae.device")
    assert refused.sqlstate == "22023"
    assert refused.message_primary == "refresh of shop.recommendations failed: vae.device is 'tpu'"
    assert "auto, cpu, cuda" in str(refused.message_hint)


# Versions


def test_without_an_active_version_nothing_is_scored(trained: psycopg.Connection, trained_database: str) -> None:
    trained.execute("update vae.versions set state = 'retired'")
    log = trained.execute("select * from vae.refreshes").fetchall()
    remedy = "select * from vae.activate('shop', 1)"
    refused_everywhere(trained_database, "VA002", "model shop has no active version", remedy)
    assert trained.execute("select * from vae.refreshes").fetchall() == log
    for query in ("select * from vae.verify('shop')", "select * from vae.check_drift('shop')"):
        assert "vae.activate('shop', 1)" in str(refusal(trained, query).message_hint)
    trained.execute("delete from vae.versions")
    refused_everywhere(trained_database, "VA002", "model shop has no active version", "pgvae train shop --activate")


def test_a_model_number_that_does_not_exist_is_named(shared_trained: psycopg.Connection) -> None:
    refused = refusal(shared_trained, "select * from vae_private.recommend(99, '1', 5, null)")
    assert (refused.sqlstate, refused.message_primary) == ("VA001", "pgvae: model number 99 does not exist")
    assert refused.message_hint


@pytest.mark.parametrize("version", [0, 2, -1, None])
def test_a_version_that_does_not_exist_is_named(shared_trained: psycopg.Connection, version: int | None) -> None:
    refused = refusal(shared_trained, "select * from vae.activate('shop', %s)", [version])
    assert refused.sqlstate == "VA007"
    assert refused.message_primary == f"model shop has no version {'null' if version is None else version}"
    assert refused.message_hint == "there are: 1"


def test_a_function_of_another_runtime_than_the_databases_is_refused(trained: psycopg.Connection, ask: Query) -> None:
    """As in a session that an upgrade overtook: the function names one digest, load_runtime holds another."""
    row = trained.execute(
        "select pg_get_functiondef('vae_private.score'::regproc), runtime_digest from vae_private.installation"
    ).fetchone()
    assert row is not None
    digest, other = row[1], "f" * 64
    trained.execute(row[0].replace(digest, other))
    refused = refusal(trained, "select shop.score(%s, %s)", [USER, Shop().items[0]])
    assert refused.sqlstate == "VA005"
    assert f"this function is of runtime {other[:12]}, the database holds {digest[:12]}" in str(refused.message_primary)
    assert "pgvae install" in str(refused.message_hint)
    assert len(ask(RECOMMEND, [USER])) > 3


def test_a_cancel_while_a_session_loads_the_code_reads_as_any_other(shared_trained: psycopg.Connection) -> None:
    with psycopg.connect(shared_trained.info.dsn, autocommit=True) as session:
        session.execute(
            "do $$\nimport sys, time\nclass Slow:\n    def find_spec(name, path=None, target=None):\n"
            "        time.sleep(0.5 if name.endswith('.live') else 0)\n"
            "sys.meta_path.insert(0, Slow)\n$$ language plpython3u"
        )
        session.execute("set statement_timeout = 400")
        refused = refusal(session, "select * from shop.recommend(%s)", [USER])
    assert (refused.sqlstate, refused.message_primary) == (
        "57014",
        "pgvae: canceling statement due to statement timeout",
    )


def test_a_tensor_format_of_another_release_is_not_scored(trained: psycopg.Connection, trained_database: str) -> None:
    trained.execute("update vae.versions set format = 99")
    refused_everywhere(
        trained_database, "VA003", "version 1 of model shop has tensor format 99", "train again with: pgvae train shop"
    )


def test_a_version_worse_than_popularity_is_activated_only_by_force(
    trained: psycopg.Connection, trained_database: str
) -> None:
    version = train(trained_database)
    trained.execute(
        "insert into vae.metrics (version_id, method, split, metric, k, value, user_count)"
        " select version_id, method, 'temporal', 'ndcg', 20, value, 30 from vae.versions,"
        " (values ('pgvae', 0.1), ('popularity', 0.2), ('item_knn', 0.3)) as m (method, value)"
        " where version = %s",
        [version],
    )
    activate = "select * from vae.activate('shop', %s)"
    refused = refusal(trained, activate, [version])
    assert refused.sqlstate == "VA008"
    assert refused.message_primary == (
        "version 2 of model shop ranks worse than popularity on held-out events: NDCG@20 0.1000 against 0.2000,"
        " temporal split"
    )
    assert "force => true" in str(refused.message_hint)
    active = "select version from vae.versions where state = 'active'"
    assert trained.execute(active).fetchall() == [(1,)]
    trained.execute("update vae.metrics set value = 0.2 where method = 'pgvae'")
    assert trained.execute(activate, [version]).fetchall() == [(2, 1)]
    trained.execute("update vae.metrics set value = 0.1 where method = 'pgvae'")
    trained.execute("select * from vae.rollback('shop')")
    assert trained.execute("select * from vae.activate('shop', 2, force => true)").fetchall() == [(2, 1)]


def test_without_an_earlier_version_there_is_no_rollback(shared_trained: psycopg.Connection) -> None:
    refused = refusal(shared_trained, "select * from vae.rollback('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("VA007", "model shop has no earlier version to roll back to")
    assert refused.message_hint
    assert shared_trained.execute("select version from vae.versions where state = 'active'").fetchall() == [(1,)]


def test_a_rollback_goes_back_one_step_at_a_time(trained: psycopg.Connection, trained_database: str) -> None:
    for version in (2, 3):
        assert train(trained_database) == version
        trained.execute("select * from vae.activate('shop', %s, force => true)", [version])
    rollback = "select * from vae.rollback('shop')"
    assert trained.execute(rollback).fetchall() == [(2, 3)]
    assert trained.execute(rollback).fetchall() == [(1, 2)]
    assert refusal(trained, rollback).sqlstate == "VA007"
    # Activating what is active already is no step.
    trained.execute("select * from vae.activate('shop', 1, force => true)")
    assert refusal(trained, rollback).sqlstate == "VA007"


def test_a_query_keeps_the_version_that_its_snapshot_sees(
    trained: psycopg.Connection, trained_database: str, ask: Query
) -> None:
    train(trained_database)
    version = "select distinct model_version from shop.recommend(%s)"
    with psycopg.connect(trained_database) as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        assert reader.execute(version, [USER]).fetchall() == [(1,)]
        trained.execute("select * from vae.activate('shop', 2, force => true)")
        assert reader.execute(version, [USER]).fetchall() == [(1,)]
        reader.commit()
        assert reader.execute(version, [USER]).fetchall() == [(2,)]
    assert ask("select distinct model_version from shop.recommendations") == [(1,)]


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "update vae_private.tensors set data = set_byte(data, 5, get_byte(data, 5) # 1) where name = 'mean_weight'",
            "tensor 'mean_weight' is corrupt: the checksum of chunk 0 does not match its bytes",
        ),
        ("delete from vae_private.tensors where name = 'mean_bias'", "tensor 'mean_bias' is missing"),
        ("update vae_private.tensors set chunk = 1 where name = 'mean_bias'", "chunk 0 is missing"),
        ("update vae_private.tensors set dtype = '|O' where name = 'mean_bias'", "it claims dtype '|O'"),
        ("update vae_private.tensors set dtype = '<i4' where name = 'mean_bias'", "'mean_bias'"),
        (
            "update vae_private.tensors set shape = array[3] where name = 'mean_bias'",
            "it is longer than its shape [3] says",
        ),
        ("update vae_private.tensors set shape = array[5] where name = 'mean_bias'", "4 bytes are missing"),
        ("update vae_private.tensors set shape = array[2, 2] where name = 'mean_bias'", "'mean_bias'"),
        ("update vae_private.tensors set shape = array[-4] where name = 'mean_bias'", "'mean_bias'"),
        (
            "update vae_private.tensors set shape = array[2000000000, 2000000000] where name = 'mean_bias'",
            "'mean_bias'",
        ),
        (
            "update vae_private.tensors set data = substr(data, 5), sha256 = sha256(substr(data, 5))"
            " where name = 'mean_bias'",
            "4 bytes are missing",
        ),
        (
            "update vae_private.tensors set data = '\\x0000c07f' || substr(data, 5),"
            " sha256 = sha256('\\x0000c07f' || substr(data, 5)) where name = 'mean_bias'",
            "'mean_bias'",
        ),
        ("delete from vae_private.tensors", "is missing"),
        (
            "update vae_private.tensors set data = '\\xffffff7f' || substr(data, 5),"
            " sha256 = sha256('\\xffffff7f' || substr(data, 5)) where name = 'shortcut_item'",
            "the shortcut's links do not fit 12 items",
        ),
        (
            "update vae_private.tensors set data = '\\x01000000' || substr(data, 5),"
            " sha256 = sha256('\\x01000000' || substr(data, 5)) where name = 'shortcut_start'",
            "the shortcut's links do not fit 12 items",
        ),
        ("update vae_private.tensors set dtype = '<f4' where name = 'shortcut_item'", "'shortcut_item'"),
        ("delete from vae_private.items where item_index = 3", "11 items have a key, 12 have weights"),
    ],
)
def test_corrupt_weights_are_refused(trained: psycopg.Connection, change: str, message: str) -> None:
    tamper(trained, change)
    refused = refusal(trained, RECOMMEND, [USER])
    assert refused.sqlstate == "VA004"
    assert message in str(refused.message_primary)
    assert "activate another version" in str(refused.message_hint)


def test_corrupt_weights_are_refused_however_they_are_used(trained: psycopg.Connection, trained_database: str) -> None:
    stored = trained.execute("select * from shop.recommendations").fetchall()
    tamper(trained, "delete from vae_private.tensors where name = 'output_weight'")
    refused_everywhere(trained_database, "VA004", "tensor 'output_weight' is missing", "activate another version")
    assert trained.execute("select * from shop.recommendations").fetchall() == stored


def test_another_version_mends_corrupt_weights(trained: psycopg.Connection, trained_database: str, ask: Query) -> None:
    train(trained_database)
    tamper(trained, "delete from vae_private.tensors where version_id = 1 and name = 'mean_bias'")
    trained.execute("select * from vae.activate('shop', 2, force => true)")
    assert len(ask(RECOMMEND, [USER])) > 3


@pytest.mark.parametrize(
    "change",
    [
        "update vae_private.tensors set data = '' where name = 'mean_bias'",
        "insert into vae_private.tensors values (1, 'more', 0, '<f4', '{1}', '', '')",
        "truncate vae_private.tensors",
        "update vae_private.items set item_key = 'x' where item_index = 0",
        "insert into vae_private.items values (1, 99, 'x')",
        "truncate vae_private.items",
        "update vae.versions set state = 'loading'",
    ],
)
def test_a_published_version_is_immutable_to_superusers_too(shared_trained: psycopg.Connection, change: str) -> None:
    content = (
        "select md5(string_agg(t::text, '')) from vae_private.tensors t"
        " union all select md5(string_agg(i::text, '')) from vae_private.items i"
        " union all select state from vae.versions"
    )
    before = shared_trained.execute(content).fetchall()
    refused = refusal(shared_trained, change)
    assert refused.sqlstate == "VA006"
    assert refused.message_hint == "versions are immutable: publish a new one with pgvae train"
    assert shared_trained.execute(content).fetchall() == before


def test_a_published_version_is_not_finished_twice(shared_trained: psycopg.Connection) -> None:
    refused = refusal(shared_trained, "select vae_private.finish_version(1)")
    assert (refused.sqlstate, refused.message_primary) == ("VA006", "version number 1 is not loading")


# Refreshes


def test_a_refresh_inside_a_transaction_block_is_refused(trained_database: str, ask: Query) -> None:
    log = ask("select * from vae.refreshes")
    with psycopg.connect(trained_database) as inside:
        inside.execute("select 1")
        refused = refusal(inside, "call vae.refresh('shop')")
    assert refused.sqlstate == "2D000"
    assert "autocommit" in str(refused.message_hint)
    assert ask("select * from vae.refreshes") == log


def test_a_failed_refresh_leaves_the_last_content_and_is_logged(trained: psycopg.Connection, ask: Query) -> None:
    stored = ask("select * from shop.recommendations order by user_id, rank")
    tamper(trained, "delete from vae_private.tensors where name = 'mean_bias'")
    refused = refusal(trained, "call vae.refresh('shop', array['recommendations'], full => true)")
    assert "refresh of shop.recommendations failed: tensor 'mean_bias' is missing" in str(refused.message_primary)
    assert str(refused.message_hint).endswith("the view keeps its last good content")
    assert ask("select * from shop.recommendations order by user_id, rank") == stored
    state, error, version, finished = ask(
        "select state, error, version, finished_at from vae.refreshes where view = 'recommendations'"
        " order by refresh_id desc limit 1"
    )[0]
    assert (state, version) == ("failed", None)
    assert "tensor 'mean_bias' is missing" in error
    assert finished is not None
    assert ask("select count(*) from pg_locks where locktype = 'advisory'") == [(0,)]


def test_a_renamed_table_or_column_is_told_and_nothing_is_computed_of_another(
    trained: psycopg.Connection, ask: Query
) -> None:
    stored = ask("select * from shop.recommendations order by user_id, rank")
    trained.execute("alter table events rename column item_id to article")
    refused = refusal(trained, RECOMMEND, [USER])
    assert refused.sqlstate == "42703"
    assert refused.message_primary == 'pgvae: public.events has no column "item_id" any more, which model shop reads'
    assert "restore it" in str(refused.message_hint)
    trained.execute("alter table events rename column article to item_id")
    trained.execute("alter table events rename to archive")
    refused = refusal(trained, RECOMMEND, [USER])
    assert (refused.sqlstate, refused.message_primary) == (
        "42P01",
        "pgvae: table public.events of model shop does not exist",
    )
    refused = refusal(trained, "call vae.refresh('shop')")
    assert refused.message_primary == "the views of model shop read another table than public.events"
    assert "rename it back" in str(refused.message_hint)
    # A new table of the name: the functions read it, the views still the old one.
    Shop().make(trained)
    refused = refusal(trained, "call vae.refresh('shop')")
    assert refused.message_primary == "the views of model shop read another table than public.events"
    assert ask("select * from shop.recommendations order by user_id, rank") == stored
    trained.execute("select vae.rebuild_model('shop')")
    trained.execute("call vae.refresh('shop')")
    trained.execute("drop table archive")
    # In the table's place a view of its name and columns does.
    trained.execute("alter table events rename to archive")
    trained.execute("create view events as select * from archive")
    trained.execute("select vae.rebuild_model('shop')")
    trained.execute("call vae.refresh('shop')")


def test_a_refresh_without_the_shops_table_says_how_to_mend_it(trained: psycopg.Connection, ask: Query) -> None:
    stored = ask("select * from shop.recommendations order by user_id, rank")
    live = ask(RECOMMEND, [USER])
    trained.execute("drop table events cascade")
    refused = refusal(trained, "call vae.refresh('shop', array['recommendations'])")
    assert (refused.sqlstate, refused.message_primary) == ("42P01", "the views of model shop are gone")
    assert "select vae.rebuild_model('shop')" in str(refused.message_hint)
    refused = refusal(trained, RECOMMEND, [USER])
    gone = "table public.events of model shop does not exist"
    assert (refused.sqlstate, refused.message_primary) == ("42P01", f"pgvae: {gone}")
    assert str(refused.message_hint).startswith("restore it, or make a view of the same name")
    # What was predicted is there all the while, and everything works on the table that comes back.
    assert ask("select * from shop.recommendations order by user_id, rank") == stored
    Shop().make(trained)
    trained.execute("select vae.rebuild_model('shop')")
    trained.execute("call vae.refresh('shop', array['recommendations'])")
    assert ask(RECOMMEND, [USER]) == live
    assert [row[:4] for row in ask("select * from shop.recommendations order by user_id, rank")] == [
        row[:4] for row in stored
    ]


def test_an_event_of_a_minute_ago_counts_and_a_new_user_is_no_cold_start(
    trained: psycopg.Connection, ask: Query
) -> None:
    best = ask(RECOMMEND, [USER])
    newcomer = 7
    assert {row[3] for row in ask(RECOMMEND, [newcomer])} == {True}
    bought = best[0][1]
    trained.execute(
        "insert into events select u, %s, 'purchase', now() - interval '1 minute' from unnest(%s::bigint[]) u",
        [bought, [USER, newcomer]],
    )
    assert bought not in [row[1] for row in ask(RECOMMEND, [USER])]
    assert bought not in [row[1] for row in ask(RECOMMEND, [newcomer])]
    assert {row[3] for row in ask(RECOMMEND, [newcomer])} == {False}
    # What lies ahead, or before the shop's time, is not seen.
    trained.execute("delete from events where user_id = %s", [newcomer])
    trained.execute(
        "insert into events values (7, %s, 'purchase', 'infinity'), (7, %s, 'view', '-infinity')", [bought] * 2
    )
    assert {row[3] for row in ask(RECOMMEND, [newcomer])} == {True}
