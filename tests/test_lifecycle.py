"""Versions in service: parity that a user can check, gates before activation, rollback, retention."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from conftest import as_role
from pgvae_runtime.features import FeatureBag
from pgvae_runtime.tokens import History
from shop import QUICK, Shop, refusal
from variants import install_variant, publish_network, torch_scores

Connection = psycopg.Connection[Any]
RunCli = Callable[..., subprocess.CompletedProcess[str]]


def verify(connection: Connection, version: int | None = None) -> dict[str, Any]:
    """Gives the row of vae.verify for the CPU."""
    cursor = connection.execute("select * from vae.verify('shop', %s)", [version])
    names = [column.name for column in cursor.description or ()]
    (row,) = cursor.fetchall()
    return dict(zip(names, row, strict=True))


def states(connection: Connection) -> dict[int, str]:
    return dict(connection.execute("select version, state from vae.versions order by version").fetchall())


def last_activation(connection: Connection) -> Any:
    return connection.execute(
        "select version, previous_version, action, forced, reason, overridden from vae.activations"
        " order by activation_id desc limit 1"
    ).fetchone()


def tamper(connection: Connection, tensor: str, change: Callable[[Any], Any], version: int = 1) -> None:
    """Puts other weights into a published version, with the right checksum, as only a superuser can."""
    (version_id, data), *others = connection.execute(
        "select version_id, data from vae_private.tensors join vae.versions using (version_id)"
        " where name = %s and version = %s",
        [tensor, version],
    ).fetchall()
    assert not others
    array = np.frombuffer(data, "<f4").copy()
    changed = change(array).astype("<f4").tobytes()
    connection.execute("alter table vae_private.tensors disable trigger user")
    connection.execute(
        "update vae_private.tensors set data = %(data)s, sha256 = sha256(%(data)s)"
        " where version_id = %(version_id)s and name = %(name)s",
        {"data": changed, "version_id": version_id, "name": tensor},
    )
    connection.execute("alter table vae_private.tensors enable trigger user")


def measured(connection: Connection, version: int, value: float, *, noise: float, split: str = "temporal") -> None:
    """Writes an NDCG@20 with an interval of that half width for a version."""
    connection.execute(
        "insert into vae.metrics (version_id, method, split, slice, metric, k, value, lower, upper, user_count)"
        " select version_id, 'pgvae', %(split)s, 'all', 'ndcg', 20, %(value)s, %(value)s - %(noise)s,"
        " %(value)s + %(noise)s, 100 from vae.versions where version = %(version)s",
        {"version": version, "split": split, "value": value, "noise": noise},
    )


def another(connection: Connection, *, seed: int = 1) -> int:
    """Publishes one more version, with random weights."""
    return publish_network(connection.info.dsn, "shop", QUICK, seed)[0]


# Parity


def test_a_version_proves_that_it_scores_as_it_was_trained(trained: Connection) -> None:
    row = verify(trained)
    digest = trained.execute("select runtime_digest from vae_private.installation").fetchone()
    assert row["passed"], row["detail"]
    assert (row["model_version"], row["device"], row["golden_users"], row["detail"]) == (1, "cpu", 32, None)
    assert 0 < row["max_difference"] <= 1e-5
    assert row["top_k_agreement"] == 1
    assert (row["runtime_digest"],) == digest
    assert row["numpy_version"].startswith("numpy ")
    assert "blas" in row["blas"].lower()
    logged = trained.execute(
        "select v.version, passed, max_difference, numpy_version, verified_by from vae.verifications"
        " join vae.versions v using (version_id) order by verification_id desc limit 1"
    ).fetchone()
    assert logged == (1, True, row["max_difference"], row["numpy_version"], "postgres")


@pytest.fixture
def with_features(connection: Connection) -> tuple[Connection, Any, Any, Any]:
    """A model with features of users and items, whose only version has random weights: network, links, connection."""
    Shop().make(connection)
    connection.execute(
        "create table users as"
        " select distinct user_id, (user_id % 5)::int as age, array['DE', 'FR'] as tags from events"
    )
    connection.execute("create table items as select distinct item_id, item_id % 3 as price from events")
    connection.execute("insert into items select i, i % 3 from generate_series(1, 4) i")
    Shop().create_model(connection, users="users", items="items")
    _, network, dataset, links = publish_network(connection.info.dsn, "shop", QUICK, 3)
    return connection, network, dataset, links


def test_golden_scores_are_those_of_the_trained_network(with_features: tuple[Connection, Any, Any, Any]) -> None:
    connection, network, dataset, links = with_features
    rows = connection.execute(
        "select items, event_types, occurred_at, features, top_items, top_scores from vae_private.golden_users"
        " order by number"
    ).fetchall()
    history = History(
        counts=np.array([len(row[0]) for row in rows]),
        item=np.array([item for row in rows for item in row[0]]),
        event_type=np.array([kind for row in rows for kind in row[1]]),
        occurred_at=np.array([at for row in rows for at in row[2]]),
        features=FeatureBag.of([row[3] for row in rows]),
    )
    assert history.counts.min() == 0
    assert history.counts.max() == 501
    assert (history.features.counts() > 0).sum() > 10
    scores = torch_scores(network, links, history, 500)
    user, item = history.seen(dataset.targets)
    scores[user, item] = -1
    compared = 0
    for number, (*_, features, top_items, top_scores) in enumerate(rows):
        if history.counts[number] or features:
            np.testing.assert_allclose(scores[number, top_items], top_scores, rtol=1e-5)
            compared += len(top_items)
        assert top_scores == sorted(top_scores, reverse=True)
        assert not set(top_items) & set(item[user == number].tolist())
    assert compared > 100
    # In the database the version is not active.
    assert states(connection) == {1: "ready"}
    assert verify(connection, 1)["passed"]
    tamper(connection, "user_feature_embedding", lambda array: array * 1.001)
    assert not verify(connection, 1)["passed"]


def test_cold_items_of_a_version_without_features_pass_the_parity_gate(
    with_features: tuple[Connection, Any, Any, Any],
) -> None:
    connection, *_ = with_features
    config = replace(QUICK, without=("features",))
    version, _, dataset, _ = publish_network(connection.info.dsn, "shop", config, 3)
    assert not dataset.trained_items.all()
    # Nothing is known of cold items but their features, which are not read.
    row = verify(connection, version)
    assert (row["passed"], row["detail"]) == (True, None)


def test_no_golden_history_is_a_persons(trained: Connection) -> None:
    people = {
        tuple(times)
        for (times,) in trained.execute(
            "select array_agg(extract(epoch from occurred_at)::float8 order by occurred_at) from events"
            " group by user_id"
        ).fetchall()
    }
    golden = trained.execute("select occurred_at from vae_private.golden_users where cardinality(items) > 1").fetchall()
    assert len(golden) == 30
    assert not people & {tuple(sorted(times)) for (times,) in golden}
    # Nor is an event in it, but by chance, of which there are twelve items.
    (real,) = (
        trained.execute(
            "select avg((exists (select from events e where e.item_id::text = i.item_key"
            "     and extract(epoch from e.occurred_at)::float8 = o.at))::integer)::float8"
            " from vae_private.golden_users g cross join unnest(g.items, g.occurred_at) o (item, at)"
            " join vae_private.items i on i.version_id = g.version_id and i.item_index = o.item"
        ).fetchone()
        or ()
    )
    assert real < 0.25


@pytest.mark.parametrize("tensor", ["output_bias", "encoder_gate_bias", "order_embedding", "decoder_weight"])
def test_weights_that_were_changed_a_little_do_not_pass(trained: Connection, tensor: str) -> None:
    version = another(trained)
    assert verify(trained, version)["passed"]
    tamper(trained, tensor, lambda array: array * 1.01, version)
    row = verify(trained, version)
    assert not row["passed"]
    assert row["max_difference"] > 1e-5
    assert "the largest relative difference of a score is" in row["detail"]


def test_damaged_weights_fail_with_what_is_wrong(trained: Connection) -> None:
    version = another(trained)
    trained.execute("alter table vae_private.tensors disable trigger user")
    trained.execute("update vae_private.tensors set sha256 = '\\x00' where name = 'mean_bias' and version_id = 2")
    row = verify(trained, version)
    assert (row["passed"], row["max_difference"]) == (False, None)
    assert row["detail"] == "tensor 'mean_bias' is corrupt: the checksum of chunk 0 does not match its bytes"
    trained.execute("delete from vae_private.tensors where name = 'mean_bias' and version_id = 2")
    assert "tensor 'mean_bias' is missing" in verify(trained, version)["detail"]


def test_other_code_does_not_pass(trained_database: str) -> None:
    install_variant(trained_database, "forward", ("np.tanh(0.5 * x)", "np.tanh(0.501 * x)"))
    with psycopg.connect(trained_database, autocommit=True) as connection:
        row = verify(connection)
        assert not row["passed"]
        gates = connection.execute("select gate, status from vae.check_activation('shop', 1)").fetchall()
    assert gates[:2] == [("code", "fail"), ("parity", "fail")]


def test_a_version_without_golden_users_says_so(trained: Connection) -> None:
    trained.execute("delete from vae_private.golden_users")
    row = verify(trained)
    assert (row["passed"], row["golden_users"]) == (False, 0)
    assert "has no golden users" in row["detail"]


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("cpu", "            values /= total[:, None]\n", "            values /= total[:, None] * 1.001\n"),
        (
            "forward",
            "    logits /= logits.sum(axis=1, keepdims=True)",
            "    logits /= 1.001 * logits.sum(axis=1, keepdims=True)",
        ),
    ],
)
def test_what_refreshes_and_what_live_calls_score_with_must_both_agree(
    trained: Connection, trained_database: str, module: str, line: str, wrong: str
) -> None:
    install_variant(trained_database, module, (line, wrong))
    row = verify(trained)
    assert not row["passed"]
    assert row["max_difference"] == pytest.approx(0.001, rel=0.05)


def test_golden_users_are_immutable(trained: Connection) -> None:
    more = (
        "insert into vae_private.golden_users"
        " select version_id, 99, items, event_types, occurred_at, features, top_items, top_scores"
        " from vae_private.golden_users limit 1"
    )
    for query in (more, "update vae_private.golden_users set top_scores = '{}'", "truncate vae_private.golden_users"):
        assert refusal(trained, query).sqlstate == "VA006", query


def test_a_server_that_cannot_write_answers_without_a_log(trained: Connection) -> None:
    trained.execute("set default_transaction_read_only = on")
    assert verify(trained)["passed"]
    trained.execute("set default_transaction_read_only = off")
    count = trained.execute("select count(*) from vae.verifications").fetchone()
    verify(trained)
    assert trained.execute("select count(*) - 1 from vae.verifications").fetchone() == count


def test_a_model_without_an_active_version_asks_for_a_number(trained: Connection) -> None:
    trained.execute("update vae.versions set state = 'retired'")
    assert refusal(trained, "select * from vae.verify('shop')").sqlstate == "VA002"
    assert refusal(trained, "select * from vae.verify('shop', 7)").sqlstate == "VA007"
    assert verify(trained, 1)["passed"]


@pytest.fixture
def people(trained: Connection, role: str) -> Callable[[str], Connection]:
    """Opens a connection to `trained` as a login role with one of pgvae's roles; usage of the model is not granted."""
    opened: list[Connection] = []

    def connect(kind: str) -> Connection:
        trained.execute(sql.SQL("grant {} to {}").format(sql.Identifier(f"vae_{kind}"), sql.Identifier(role)))
        opened.append(psycopg.connect(as_role(trained.info.dsn, role), autocommit=True))
        return opened[-1]

    yield connect  # type: ignore[misc]
    for connection in opened:
        connection.close()
    trained.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))


def test_an_operator_verifies_the_models_that_it_may_use(
    trained: Connection, people: Callable[[str], Connection], role: str
) -> None:
    version = another(trained)
    operator = people("operator")
    for view in ("versions", "tensors", "items", "golden_users"):
        assert operator.execute(f"select count(*) from vae_private.published_{view}").fetchone() == (0,)
        assert refusal(operator, f"select * from vae_private.{view.replace('versions', 'golden_users')}").sqlstate == (
            "42501"
        )
    assert refusal(operator, "select * from vae.verify('shop')").sqlstate == "42501"
    assert operator.execute("select * from vae_private.verify(1, 1)").fetchall()[0][1] is False
    trained.execute(sql.SQL("grant usage on schema shop to {}").format(sql.Identifier(role)))
    assert verify(operator, version)["passed"]
    assert verify(operator)["passed"]
    forged = (
        "insert into vae.verifications (version_id, device, passed, golden_users, runtime_digest, numpy_version, blas,"
        " verified_by) values (1, 'cpu', true, 1, '', '', '', 'somebody else')"
    )
    assert refusal(operator, forged).sqlstate == "42501"
    for query in ("select vae.drop_version('shop', 2)", "select * from vae.prune('shop')"):
        assert refusal(operator, query).sqlstate == "42501"
    assert states(trained) == {1: "active", 2: "ready"}


def test_a_scorer_does_not_see_weights_that_do_not_score(
    trained: Connection, people: Callable[[str], Connection], role: str
) -> None:
    another(trained)
    scorer = people("scorer")
    trained.execute(sql.SQL("grant usage on schema shop to {}").format(sql.Identifier(role)))
    assert scorer.execute("select distinct version_id from vae_private.scoring_tensors").fetchall() == [(1,)]
    for view in ("versions", "tensors", "items", "golden_users"):
        assert refusal(scorer, f"select * from vae_private.published_{view}").sqlstate == "42501"
    assert refusal(scorer, "select * from vae.verify('shop')").sqlstate == "42501"


# Gates


def test_a_version_whose_scores_differ_is_not_activated(trained: Connection) -> None:
    version = another(trained)
    tamper(trained, "output_bias", lambda array: array * 1.01 + 0.01, version)
    refused = refusal(trained, "select * from vae.activate('shop', 2)")
    assert refused.sqlstate == "VA009"
    assert str(refused.message_primary).startswith(
        "version 2 of model shop does not give its golden users the scores of its training: cpu: the largest relative"
    )
    assert "vae.verify('shop', 2)" in str(refused.message_hint)
    assert refusal(trained, "select * from vae.activate('shop', 2, force => null)").sqlstate == "VA009"
    assert states(trained) == {1: "active", 2: "ready"}
    trained.execute("select * from vae.activate('shop', 2, force => true, reason => 'an emergency')")
    *who, overridden = last_activation(trained)
    assert who == [2, 1, "activate", True, "an emergency"]
    assert overridden == refused.message_primary


def test_a_version_that_passes_everything_overrides_nothing(trained: Connection) -> None:
    another(trained)
    trained.execute("select * from vae.activate('shop', 2)")
    assert last_activation(trained) == (2, 1, "activate", False, None, None)
    trained.execute("select * from vae.activate('shop', 1, force => true, reason => 'back')")
    assert last_activation(trained) == (1, 2, "activate", True, "back", None)


def test_a_version_that_ranks_worse_than_the_active_one_is_not_activated(trained: Connection) -> None:
    another(trained)
    measured(trained, 1, 0.0520, noise=0.0020)
    measured(trained, 2, 0.0412, noise=0.0020)
    refused = refusal(trained, "select * from vae.activate('shop', 2)")
    assert refused.sqlstate == "VA010"
    assert refused.message_primary == (
        "version 2 of model shop ranks worse than the active version 1: NDCG@20 0.0412 (0.0392 to 0.0432) against"
        " 0.0520 (0.0500 to 0.0540), temporal split"
    )
    gates = trained.execute("select gate, status from vae.check_activation('shop', 2)").fetchall()
    assert gates == [("code", "pass"), ("parity", "pass"), ("popularity", "skip"), ("active version", "fail")]
    assert states(trained) == {1: "active", 2: "ready"}
    # Going back is never refused.
    trained.execute("select * from vae.activate('shop', 2, force => true)")
    assert last_activation(trained)[-1] == refused.message_primary
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(1, 2)]


@pytest.mark.parametrize(
    ("value", "noise", "split", "status"),
    [
        (0.0510, 0.0020, "temporal", "pass"),
        (0.0600, 0.0001, "temporal", "pass"),
        # The half width of the difference of two intervals of 0.002 is 0.0028.
        (0.0493, 0.0020, "temporal", "pass"),
        (0.0490, 0.0020, "temporal", "fail"),
        (0.0100, 0.0001, "random", "skip"),
    ],
)
def test_only_what_is_no_chance_and_of_the_same_split_counts(
    trained: Connection, value: float, noise: float, split: str, status: str
) -> None:
    another(trained)
    measured(trained, 1, 0.0520, noise=0.0020)
    measured(trained, 2, value, noise=noise, split=split)
    gates = dict(trained.execute("select gate, status from vae.check_activation('shop', 2)").fetchall())
    assert gates["active version"] == status


def test_a_failed_activation_leaves_the_active_version_and_a_way_back(trained: Connection) -> None:
    another(trained)
    trained.execute("select * from vae.activate('shop', 2)")
    another(trained, seed=2)
    tamper(trained, "output_bias", lambda array: array + np.arange(len(array)), 3)
    assert refusal(trained, "select * from vae.activate('shop', 3)").sqlstate == "VA009"
    assert states(trained) == {1: "retired", 2: "active", 3: "ready"}
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(1, 2)]


# Going back


def test_a_rollback_goes_past_dropped_versions(trained: Connection) -> None:
    for number in (2, 3, 4):
        another(trained, seed=number)
        trained.execute("select * from vae.activate('shop', %s)", [number])
    assert trained.execute("select model_version, state from vae.drop_version('shop', 3)").fetchall() == [
        (3, "retired")
    ]
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(2, 4)]
    # And where the active one itself was dropped, to the latest that is left.
    assert refusal(trained, "select * from vae.drop_version('shop', 2, force => null)").sqlstate == "55006"
    refused = refusal(trained, "select * from vae.drop_version('shop', 2)")
    assert (refused.sqlstate, refused.message_primary) == ("55006", "version 2 of model shop is active")
    trained.execute("select * from vae.drop_version('shop', 2, force => true)")
    assert states(trained) == {1: "retired", 4: "retired"}
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(4, None)]
    trained.execute("select * from vae.drop_version('shop', 4, force => true)")
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(1, None)]
    assert refusal(trained, "select * from vae.rollback('shop')").sqlstate == "VA007"
    assert trained.execute("select count(*) from shop.recommend(%s)", [Shop().users[0]]).fetchone() != (0,)


def test_a_rollback_after_a_drop_and_a_new_activation_goes_to_what_was_before(trained: Connection) -> None:
    another(trained)
    trained.execute("select * from vae.activate('shop', 2)")
    trained.execute("select * from vae.drop_version('shop', 2, force => true)")
    assert last_activation(trained)[:4] == (2, None, "drop", True)
    # A number is not given twice: prediction rows of version 2 are still there.
    assert another(trained, seed=2) == 3
    trained.execute("select * from vae.activate('shop', 3)")
    assert last_activation(trained)[:2] == (3, None)
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(1, 3)]


# Retention


def test_pruning_keeps_what_is_needed_and_says_what_it_removed(trained: Connection, run_cli: RunCli) -> None:
    weights = trained.execute("select sum(octet_length(data)) from vae_private.tensors").fetchone()
    for number in range(2, 8):
        another(trained, seed=number)
    trained.execute("select * from vae.activate('shop', 3)")
    trained.execute("select * from vae.activate('shop', 2)")
    removed = trained.execute("select model_version, state, bytes from vae.prune('shop', keep => 2)").fetchall()
    # 2 is active, 3 was before it, 6 and 7 are the newest.
    assert [(number, state) for number, state, _ in removed] == [(1, "retired"), (4, "ready"), (5, "ready")]
    assert removed[0][2] == weights[0]
    assert states(trained) == {2: "active", 3: "retired", 6: "ready", 7: "ready"}
    for table in ("tensors", "items", "golden_users"):
        left = trained.execute(f"select count(distinct version_id) from vae_private.{table}").fetchone()
        assert left == (4,), table
    done = run_cli("prune", "shop", "--keep", "0", dsn=trained.info.dsn)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("removed version 6 (ready, published ")
    assert done.stdout.splitlines()[-1].startswith("2 versions removed, ")
    assert run_cli("prune", "shop", dsn=trained.info.dsn).stdout == "nothing to remove\n"
    assert trained.execute("select * from vae.rollback('shop')").fetchall() == [(3, 2)]
    assert refusal(trained, "select * from vae.prune('shop', keep => -1)").sqlstate == "22023"
    assert refusal(trained, "select * from vae.prune('shop', keep => null)").sqlstate == "22023"


def wait_until_it_waits(connection: Connection, query: str, running: Future[Any]) -> None:
    """Returns once another session's query waits for a lock."""
    waits = "select count(*) from pg_stat_activity where query = %s and wait_event_type = 'Lock'"
    while not running.done() and connection.execute(waits, [query]).fetchone() == (0,):
        # Within a transaction the activity is read once.
        connection.execute("select pg_stat_clear_snapshot()")
        time.sleep(0.01)
    assert not running.done()


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("check_activation('shop', 2)", "prune('shop', keep => 0)"),
        ("verify('shop', 2)", "drop_version('shop', 2)"),
        ("check_drift('shop')", "drop_version('shop', 1, force => true)"),
        ("hit_rate('shop')", "drop_version('shop', 1, force => true)"),
        ("check_activation('shop', 2)", "drop_model('shop')"),
        ("activate('shop', 1)", "drop_model('shop')"),
    ],
)
def test_who_looks_at_a_version_and_then_activates_it_meets_no_deadlock(
    trained: Connection, first: str, other: str
) -> None:
    another(trained)
    dropping = f"select * from vae.{other}"
    with ThreadPoolExecutor(1) as threads, psycopg.connect(trained.info.dsn, autocommit=True) as dropper:
        with trained.transaction():
            trained.execute(f"select * from vae.{first}".encode())
            dropped = threads.submit(dropper.execute, dropping.encode())
            wait_until_it_waits(trained, dropping, dropped)
            trained.execute("select * from vae.activate('shop', 2, force => true)")
        # Nothing is left to prune where the version became active meanwhile; one that is active is not dropped.
        if "'shop', 2" in other:
            with pytest.raises(psycopg.errors.ObjectInUse):
                dropped.result(60)
        else:
            dropped.result(60)


@pytest.mark.parametrize(
    "first", ["hit_rate('shop')", "check_drift('shop')", "verify('shop')", "check_activation('shop', 2)"]
)
def test_who_only_looks_at_a_version_lets_others_activate_and_look(trained: Connection, first: str) -> None:
    another(trained)
    look = f"select * from vae.{first}".encode()
    with psycopg.connect(trained.info.dsn, autocommit=True) as other, trained.transaction():
        trained.execute(look)
        other.execute("set lock_timeout = '2s'")
        for query in (
            look,
            b"select * from vae.activate('shop', 2, force => true)",
            b"select * from vae.rollback('shop')",
        ):
            assert other.execute(query).fetchall()
        assert refusal(other, "select * from vae.drop_version('shop', 2)").sqlstate == "55P03"
    assert trained.execute("select * from vae.drop_version('shop', 2)").fetchall()


def test_two_who_look_at_a_version_and_then_activate_it_meet_no_deadlock(trained: Connection) -> None:
    another(trained)
    look = "select * from vae.check_activation('shop', 2)"
    activation = "select * from vae.activate('shop', 2, force => true)"
    with ThreadPoolExecutor(1) as threads, psycopg.connect(trained.info.dsn, autocommit=True) as other:
        other.execute("set lock_timeout = '5s'")
        with trained.transaction():
            trained.execute(look)
            with other.transaction():
                other.execute(look)
                assert other.execute(activation).fetchall() == [(2, 1)]
                later = threads.submit(trained.execute, activation)
                wait_until_it_waits(other, activation, later)
            assert later.result(60).fetchall() == [(2, 2)]


def test_the_command_line_reads_times_and_texts_whatever_the_settings_of_a_role(
    trained: Connection, trained_database: str, run_cli: RunCli
) -> None:
    database = sql.Identifier(trained.info.dbname)
    trained.execute(sql.SQL("alter database {} set datestyle = 'German, DMY'").format(database))
    settings = {"PGCLIENTENCODING": "LATIN1"}
    for arguments in (["status"], ["install"], ["train", "shop", "--epochs", "1"], ["prune", "shop", "--keep", "0"]):
        done = run_cli(*arguments, dsn=trained_database, env=settings)
        assert done.returncode == 0, done.stderr


def test_only_the_owner_removes_versions(trained: Connection, people: Callable[[str], Connection], role: str) -> None:
    another(trained)
    trainer = people("trainer")
    trained.execute(sql.SQL("grant usage on schema shop to {}").format(sql.Identifier(role)))
    for query in ("select * from vae.drop_version('shop', 2)", "select * from vae.prune('shop', 0)"):
        refused = refusal(trainer, query)
        assert (refused.sqlstate, refused.message_primary) == ("42501", "model shop belongs to postgres")
    assert trainer.execute("delete from vae.versions").rowcount == 0
    assert states(trained) == {1: "active", 2: "ready"}
    trained.execute(sql.SQL("alter schema shop owner to {}").format(sql.Identifier(role)))
    assert trainer.execute("select model_version from vae.drop_version('shop', 2)").fetchall() == [(2,)]
    for query in ("select * from vae.drop_version('shop', 2)", "select * from vae.drop_version('shop', null)"):
        assert refusal(trainer, query).sqlstate == "VA007"
    trained.execute("alter schema shop owner to postgres")
