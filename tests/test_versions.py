"""Versions over time: dumps and restores, upgrades under open sessions, seeds, and data that is hard to learn."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from psycopg import sql

from conftest import as_role, create_database, drop_database
from pgvae import install as installing
from pgvae import resources
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.golden import golden_users
from pgvae.install import install
from pgvae.loop import Fit, fit
from pgvae.ranking import Holdout, make_holdout, per_user_metrics, scorer
from pgvae.server import Server
from pgvae.shortcut import UNORDERED_WAYS, WAYS, Links, shortcuts
from pgvae.splits import hold_out
from pgvae.train import Listener
from pgvae.train import train as run_training
from pgvae.validation import NO_SHORTCUT, RECENCIES, SHORTCUT_SCALES, VALIDATION_K, ShortcutChoice, with_links
from pgvae_runtime import forward
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import History, order_bucket, recency_of_orders
from shop import BEGIN, QUICK, SMALL, Shop, train, train_and_activate
from variants import dataset_of, install_variant, publish_network

Connection = psycopg.Connection[Any]
RunCli = Callable[..., subprocess.CompletedProcess[str]]

USER = Shop().users[0]


def rows(connection: Connection, query: str, *parameters: Any) -> list[Any]:
    return connection.execute(query.encode(), parameters).fetchall()


def answers(dsn: str) -> dict[str, list[Any]]:
    """Gives what the model of a database says: live, in its view, and of itself."""
    everything = "(user_id, k => 100, options => '{\"exclude_seen\": false}')"
    with psycopg.connect(dsn) as connection:
        return {
            "live": rows(
                connection,
                f"select u.user_id, r.* from (select distinct user_id from events) u, shop.recommend{everything} r"
                " order by u.user_id, r.rank",
            ),
            "embedding": rows(connection, "select shop.embedding(%s), shop.score(%s, 1099511627776)", USER, USER),
            "view": rows(
                connection,
                # The last bit of a score depends on which users share a tile.
                "select user_id, rank, item_id, round(score::numeric, 4), is_cold_start, model_version"
                " from shop.recommendations"
                " order by user_id, rank",
            ),
            "gate": rows(connection, "select * from vae.check_events('shop')"),
            "versions": rows(connection, "select * from vae.versions order by version"),
            "activations": rows(connection, "select * from vae.activations order by activation_id"),
        }


# Dumps


@pytest.fixture
def restored(server: Server) -> Iterator[str]:
    """The DSN of an empty database for a dump."""
    create_database(server, "restored", "template0")
    yield server.dsn("restored")
    drop_database(server, "restored")


def move(server: Server, source: str, target: str, dump_format: str, path: Path, *options: str) -> None:
    """Dumps a database and restores it into another; any error or warning fails."""
    dump = [server.bindir / "pg_dump", *options, "--format", dump_format, "--file", path, "--dbname", source]
    restore = {
        "plain": [server.bindir / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "--dbname", target, "--file", path],
        "custom": [server.bindir / "pg_restore", "--exit-on-error", "--dbname", target, path],
    }[dump_format]
    for command in (dump, restore):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("dump_format", ["plain", "custom"])
def test_a_restored_dump_gives_the_same_answers_refreshes_and_trains(
    server: Server, trained_database: str, restored: str, dump_format: str, tmp_path: Path
) -> None:
    before = answers(trained_database)
    assert len(before["live"]) == len(Shop().users) * len(Shop().items)
    move(server, trained_database, restored, dump_format, tmp_path / "dump")
    assert answers(restored) == before
    with psycopg.connect(restored, autocommit=True) as connection:
        connection.execute("call vae.refresh('shop')")
        assert answers(restored) == before
        assert train(restored) == 2
        rows(connection, "select * from vae.activate('shop', 2, force => true)")
        connection.execute("call vae.refresh('shop')")
        assert rows(connection, "select distinct model_version from shop.recommendations") == [(2,)]
        assert rows(connection, "select * from vae.rollback('shop')") == [(1, 2)]
    assert answers(restored)["live"] == before["live"]
    assert install(restored).models == 1


def test_a_dump_without_content_is_filled_by_the_next_refresh(
    server: Server, trained_database: str, restored: str, tmp_path: Path
) -> None:
    # A model that was never refreshed has a view without content, which a dump does not fill either.
    with psycopg.connect(trained_database, autocommit=True) as connection:
        connection.execute("refresh materialized view shop.recommendations_materialized with no data")
    move(server, trained_database, restored, "plain", tmp_path / "dump")
    with psycopg.connect(restored, autocommit=True) as connection:
        with pytest.raises(psycopg.Error, match="has not been populated"):
            rows(connection, "select * from shop.recommendations")
        connection.execute("call vae.refresh('shop')")
        assert len(rows(connection, "select distinct user_id from shop.recommendations")) == len(Shop().users)


def test_a_dump_of_the_schema_alone_is_refused_with_a_way_out(
    server: Server, trained_database: str, restored: str, tmp_path: Path, run_cli: RunCli
) -> None:
    with psycopg.connect(trained_database, autocommit=True) as connection:
        connection.execute('create table events_too as select * from events; create schema "Other"')
        Shop(events="events_too").create_model(connection, "too")
    move(server, trained_database, restored, "plain", tmp_path / "dump", "--schema-only")
    found = "pgvae's tables without their rows, as after a restore of a dump with --schema-only"
    done = run_cli("doctor", "--json", dsn=restored)
    assert done.returncode == 1
    (check,) = (check for check in json.loads(done.stdout) if check["name"] == "pgvae")
    assert (check["status"], found in check["found"]) == ("fail", True)
    done = run_cli("install", dsn=restored)
    assert (done.returncode, found in done.stderr) == (1, True)
    statement = re.search(r"drop schema .* cascade", " ".join(done.stderr.split()))
    assert statement
    assert statement[0] == "drop schema vae, vae_private, shop, too cascade"
    with psycopg.connect(restored, autocommit=True) as connection:
        connection.execute(statement[0].encode())
        assert install(restored).models == 0
        Shop().add(connection, Shop().rows())
        Shop().create_model(connection)
        assert rows(connection, "select name from vae.models") == [("shop",)]
    assert run_cli("doctor", dsn=restored).returncode == 0


def test_the_model_of_a_role_that_is_no_superuser_is_restored_too(
    server: Server, database: str, restored: str, role: str, tmp_path: Path
) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        Shop().make(admin)
        admin.execute(sql.SQL("grant vae_trainer to {}").format(sql.Identifier(role)))
        admin.execute(sql.SQL("grant select on events to {}").format(sql.Identifier(role)))
        admin.execute(
            sql.SQL("grant create on database {} to {}").format(
                sql.Identifier(str(admin.info.dbname)), sql.Identifier(role)
            )
        )
    try:
        with psycopg.connect(as_role(database, role), autocommit=True) as owner:
            Shop().create_model(owner)
            train_and_activate(as_role(database, role))
            owner.execute("call vae.refresh('shop')")
        before = answers(database)
        move(server, database, restored, "plain", tmp_path / "dump")
        assert answers(restored) == before
        with psycopg.connect(as_role(restored, role), autocommit=True) as owner:
            owner.execute("call vae.refresh('shop')")
            assert rows(owner, "select count(distinct user_id) from shop.recommendations") == [(len(Shop().users),)]
    finally:
        for dsn in (database, restored):
            with psycopg.connect(dsn, autocommit=True) as admin:
                admin.execute("drop schema if exists shop cascade")
                admin.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))


# Upgrades


@pytest.fixture
def session(trained_database: str) -> Iterator[Connection]:
    """An open session that has scored."""
    with psycopg.connect(trained_database, autocommit=True) as connection:
        connection.execute(
            "create function pg_temp.loaded() returns table (digest text, module text) language plpython3u as $$"
            "\nreturn [(d, m.forward.__name__) for d, m in GD.items() if hasattr(m, 'recommend_all')]\n$$"
        )
        rows(connection, "select * from shop.recommend(%s)", USER)
        yield connection


def hint_about_k(connection: Connection) -> str | None:
    with pytest.raises(psycopg.Error) as refused:
        rows(connection, "select * from shop.recommend(%s, k => 0)", USER)
    return refused.value.diag.message_hint


# A release whose answers are the same and whose words are not.
NEW_WORDS = "ask for 1 to {MAX_K} items", "ask for 1 to {MAX_K} goods"


def test_an_open_session_takes_up_new_code_and_mixes_nothing(trained_database: str, session: Connection) -> None:
    old = resources.runtime_digest()
    assert rows(session, "select * from pg_temp.loaded()") == [(old, f"pgvae_runtime_{old[:12]}.forward")]
    before = answers(trained_database)
    live = rows(session, "select * from shop.recommend(%s)", USER)
    assert hint_about_k(session) == "ask for 1 to 10000 items, as in: k => 10"

    new = install_variant(trained_database, "entry", NEW_WORDS)
    assert new != old
    assert rows(session, "select runtime_digest from vae_private.installation") == [(new,)]
    assert rows(session, "select * from shop.recommend(%s)", USER) == live
    assert hint_about_k(session) == "ask for 1 to 10000 goods, as in: k => 10"
    assert sorted(rows(session, "select * from pg_temp.loaded()")) == sorted(
        (digest, f"pgvae_runtime_{digest[:12]}.forward") for digest in (old, new)
    )
    assert answers(trained_database) == before
    session.execute("call vae.refresh('shop')")
    assert answers(trained_database) == before

    # And back again, to code that the session still holds.
    install(trained_database)
    assert hint_about_k(session) == "ask for 1 to 10000 items, as in: k => 10"
    assert rows(session, "select * from shop.recommend(%s)", USER) == live


def test_an_upgrade_within_a_transaction_of_one_snapshot_changes_no_answer(trained_database: str) -> None:
    with psycopg.connect(trained_database) as reader:
        before = rows(reader, "select * from shop.recommend(%s)", USER)
        reader.commit()
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("select 1")
        install_variant(trained_database, "entry", NEW_WORDS)
        assert rows(reader, "select * from shop.recommend(%s)", USER) == before
        assert hint_about_k(reader) == "ask for 1 to 10000 goods, as in: k => 10"


def test_a_version_of_earlier_code_scores_on_but_is_not_activated(trained_database: str) -> None:
    version = publish_network(trained_database, "shop", QUICK, seed=1)[0]
    old = resources.runtime_digest()
    new = install_variant(trained_database, "entry", NEW_WORDS)
    with psycopg.connect(trained_database, autocommit=True) as connection:
        with pytest.raises(psycopg.Error) as refused:
            rows(connection, "select * from vae.activate('shop', %s)", version)
        assert refused.value.sqlstate == "VA003"
        assert refused.value.diag.message_primary == (
            f"version {version} of model shop was trained and evaluated with the code {old[:12]},"
            f" this database holds {new[:12]}"
        )
        assert "pgvae train shop" in str(refused.value.diag.message_hint)
        assert "force => true" in str(refused.value.diag.message_hint)
        assert rows(connection, "select state from vae.versions where version = %s", version) == [("ready",)]
        assert rows(connection, "select distinct model_version from shop.recommend(%s)", USER) == [(1,)]
        connection.execute("call vae.refresh('shop')")
        assert rows(connection, "select distinct model_version from shop.recommendations") == [(1,)]
        # Whoever trusts it all the same can say so, and the way back is always open.
        forced = "select * from vae.activate('shop', %s, force => true, reason => 'its metrics hold')"
        assert rows(connection, forced, version) == [(version, 1)]
        assert rows(connection, "select * from vae.rollback('shop')") == [(1, version)]
        log = "select version, forced, reason from vae.activations order by activation_id desc limit 2"
        assert rows(connection, log) == [(1, False, None), (version, True, "its metrics hold")]


def test_a_trainer_of_other_code_is_told_before_it_trains(trained_database: str) -> None:
    new = install_variant(trained_database, "entry", NEW_WORDS)
    begun: list[str] = []
    with pytest.raises(PgvaeError, match=rf"the database holds the code of pgvae .* \({new[:12]}\)") as refused:
        run_training(trained_database, "shop", QUICK, listener=Listener(on_phase=begun.append))
    assert "pgvae install" in str(refused.value.hint)
    assert begun == ["read"]


def test_an_upgrade_does_not_wait_for_ever_behind_an_open_transaction(
    trained_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "_LOCK_TIMEOUT", "300ms")
    with psycopg.connect(trained_database) as analyst:
        before = rows(analyst, "select * from shop.recommend(%s)", USER)
        with pytest.raises(PgvaeError, match="another session holds pgvae's tables in an open transaction") as refused:
            install_variant(trained_database, "entry", NEW_WORDS)
        assert "pg_stat_activity" in str(refused.value.hint)
        assert rows(analyst, "select * from shop.recommend(%s)", USER) == before
        assert hint_about_k(analyst) == "ask for 1 to 10000 items, as in: k => 10"
    install_variant(trained_database, "entry", NEW_WORDS)


def test_an_upgrade_and_who_scores_do_not_end_in_a_deadlock(trained_database: str) -> None:
    with ThreadPoolExecutor(1) as threads, psycopg.connect(trained_database) as scoring:
        scoring.execute("select from vae.models limit 0")
        upgrading = threads.submit(install, trained_database)
        waits = "select count(*) from pg_locks where relation = 'vae.models'::regclass and not granted"
        while scoring.execute(waits).fetchone() == (0,):
            time.sleep(0.01)
        # What the upgrade has locked, if it did not let go.
        scoring.execute("select from vae.freshness limit 0")
        scoring.commit()
        assert upgrading.result(60).models == 1


def test_an_installation_over_models_says_what_comes_next(trained_database: str, run_cli: RunCli) -> None:
    done = run_cli("install", dsn=trained_database)
    assert done.stdout.splitlines()[-1] == "  next     select * from vae.health where severity > 0"
    with psycopg.connect(trained_database, autocommit=True) as connection:
        connection.execute("alter table vae.versions disable trigger user")
        connection.execute("update vae.versions set code_digest = repeat('0', 64)")
    done = run_cli("install", dsn=trained_database)
    assert done.stdout.splitlines()[-2:] == [
        "  trained by other code, and scoring on: shop",
        "  next     pgvae retrain shop --activate --refresh",
    ]
    # Of a release that laid the weights out in another way.
    with psycopg.connect(trained_database, autocommit=True) as connection:
        connection.execute("update vae.versions set format = format - 1")
        connection.execute("alter table vae.versions enable trigger user")
        with pytest.raises(psycopg.Error, match="has tensor format"):
            connection.execute("select * from shop.recommend(%s)", [USER])
    done = run_cli("install", dsn=trained_database)
    assert done.stdout.splitlines()[-2:] == [
        "  trained by other code, and not scoring until trained again: shop",
        "  next     pgvae retrain shop --activate --refresh",
    ]


def test_a_database_of_a_newer_release_is_left_alone(trained_database: str, run_cli: RunCli) -> None:
    with psycopg.connect(trained_database, autocommit=True) as connection:
        connection.execute("update vae.alembic_version set version_num = 'ffff'")
        connection.execute("update vae_private.installation set release = '99.1'")
    before = answers(trained_database)
    refused = run_cli("install", dsn=trained_database)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "error: the database holds pgvae 99.1, which is newer than this pgvae, " in refused.stderr
    assert "hint: upgrade this one: pip install --upgrade pgvae" in refused.stderr
    with psycopg.connect(trained_database) as connection:
        assert rows(connection, "select version_num from vae.alembic_version") == [("ffff",)]
        assert rows(connection, "select release from vae_private.installation") == [("99.1",)]
    assert answers(trained_database) == before


# Training


@pytest.fixture(scope="module")
def learnable() -> Dataset:
    """Users who each like one of four groups of items, over a hundred days."""
    generator = np.random.default_rng(1)
    events = [
        (user, int(10 * (user % 4) + generator.zipf(1.7) % 10), int(generator.integers(0, 2)), 86_400.0 * day)
        for user in range(200)
        for day in generator.integers(0, 100, 15)
    ]
    return dataset_of(events, 200, 40)


DAY = 86_400.0
FAST_LEARNER = TrainingConfig(epochs=40, patience=3, hidden=24, latent=16, batch_size=32, learning_rate=0.01)


def trained_on(dataset: Dataset, **changes: Any) -> Fit:
    settings = {"epochs": 3, "hidden": 12, "latent": 8, "batch_size": 64, **changes}
    return fit(dataset, TrainingConfig(**settings), max_history=20, phase="publish")


def same(one: Fit, other: Fit) -> bool:
    return all(one.weights[name].tobytes() == other.weights[name].tobytes() for name in one.weights)


def test_a_seed_decides_every_bit_whatever_went_before(learnable: Dataset) -> None:
    first = trained_on(learnable, seed=7)
    torch.randn(1000)
    np.random.default_rng().random(10)
    again = trained_on(learnable, seed=7)
    assert same(first, again)
    assert [epoch.loss for epoch in first.curve] == [epoch.loss for epoch in again.curve]
    other = trained_on(learnable, seed=8)
    changed = {name for name in first.weights if first.weights[name].tobytes() != other.weights[name].tobytes()}
    # No user has more items than the shortcut counts, so that nothing of it is drawn by chance.
    drawn = set(first.weights) - {"item_popularity", "gate_recency"}
    drawn -= {f"shortcut_{name}" for name in ("start", "item", "weight", "recency")}
    assert changed == {name for name in drawn if first.weights[name].size}
    assert drawn - changed == {"user_feature_embedding"}


def test_two_trainings_of_one_seed_publish_the_same_bytes(trained_database: str, run_cli: RunCli) -> None:
    train(trained_database)
    widths = {"epochs": QUICK.epochs, "hidden": QUICK.hidden, "latent": QUICK.latent}
    options = [f"--{name}={value}" for name, value in widths.items()]
    done = run_cli("train", "shop", *options, dsn=trained_database)
    assert done.returncode == 0, done.stderr
    train(trained_database, config=replace(QUICK, seed=2))
    with psycopg.connect(trained_database) as connection:
        digests = rows(
            connection,
            "select version, seed, md5(string_agg(sha256::text, '' order by name, chunk))"
            " from vae_private.tensors join vae.versions using (version_id) group by 1, 2 order by 1",
        )
    # Twice in this process, once in another one; and with another seed.
    assert [row[:2] for row in digests] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert digests[0][2] == digests[1][2] == digests[2][2] != digests[3][2]


def test_early_stopping_gives_the_best_epoch(learnable: Dataset) -> None:
    cut = float(np.quantile(learnable.occurred_at, 0.8))
    before = learnable.between(-np.inf, cut)
    validation = make_holdout(before, learnable.between(cut, np.inf))
    stopped = fit(before, FAST_LEARNER, max_history=20, phase="evaluate", validation=validation)
    ndcg = [epoch.validation_ndcg for epoch in stopped.curve]
    assert None not in ndcg
    assert stopped.best_epoch == 1 + int(np.argmax(np.array(ndcg, dtype=float)))
    assert stopped.best_epoch < len(stopped.curve) == stopped.best_epoch + FAST_LEARNER.patience
    # The weights are those of that epoch: without shortcut and recency they rank as it did, and a training of that many
    # epochs gives them.
    none = Links.none(len(before.item_keys)).tensors() | {"gate_recency": recency_of_orders(0.0)}
    assert validation_ndcg(validation, stopped.weights | none) == ndcg[stopped.best_epoch - 1]
    straight = fit(
        before,
        FAST_LEARNER,
        max_history=20,
        phase="publish",
        epochs=stopped.best_epoch,
        recency=stopped.recency,
        shortcut=stopped.shortcut,
    )
    assert same(stopped, straight)
    assert ndcg[stopped.best_epoch - 1] > ndcg[0]


def validation_ndcg(validation: Holdout, weights: dict[str, Any]) -> float:
    return float(per_user_metrics(validation, scorer(weights, 20), VALIDATION_K)["ndcg"].mean())


@pytest.mark.parametrize("neighbours", [2, 64])
def test_the_shortcut_is_the_one_that_ranks_best_on_the_validation_part(learnable: Dataset, neighbours: int) -> None:
    cut = float(np.quantile(learnable.occurred_at, 0.8))
    before = learnable.between(-np.inf, cut)
    validation = make_holdout(before, learnable.between(cut, np.inf))
    # A network that has hardly learned needs help.
    config = replace(FAST_LEARNER, epochs=1, learning_rate=1e-4, neighbours=neighbours)
    fitted = fit(before, config, max_history=20, phase="evaluate", validation=validation)
    without = fit(
        before, replace(config, without=("shortcut",)), max_history=20, phase="evaluate", validation=validation
    )
    assert without.shortcut == NO_SHORTCUT
    assert without.weights["shortcut_item"].size == 0
    own = without.weights
    ndcg = {NO_SHORTCUT: validation_ndcg(validation, own)}
    links = shortcuts(before, neighbours, config.seed)
    choices = [ShortcutChoice(way=way, scale=scale) for way in links for scale in SHORTCUT_SCALES]
    plain = [choice for choice in [NO_SHORTCUT, *choices] if choice.way in (None, *UNORDERED_WAYS)]
    flat = {max(part, key=fitted.shortcut_ndcg.__getitem__).way for part in (plain, [NO_SHORTCUT, *choices])} - {None}
    # The ways that are best where nothing fades are tried where something does.
    choices += [
        ShortcutChoice(way=way, recency=recency, scale=scale)
        for way in flat
        for recency in RECENCIES[1:]
        for scale in SHORTCUT_SCALES
    ]
    for choice in choices:
        ndcg[choice] = validation_ndcg(validation, with_links(own, links, choice))
    chosen = validation_ndcg(validation, fitted.weights)
    assert chosen == ndcg[fitted.shortcut] > ndcg[NO_SHORTCUT]
    # Equal but for the last bit of a score.
    assert fitted.shortcut_ndcg == pytest.approx(ndcg, rel=1e-3)
    assert fitted.shortcut_ndcg[fitted.shortcut] == max(fitted.shortcut_ndcg.values())


def wanderers(*, in_order: bool) -> Dataset:
    """Gives users who go from an item to the next one, or begin anew anywhere: where they are says what comes next."""
    generator = np.random.default_rng(1)
    events = []
    for user in range(400):
        item = int(generator.integers(0, 60))
        for moment in range(12):
            events.append((user, item, 1, DAY * moment if in_order else 0.0))
            item = (item + 1) % 60 if generator.random() < 0.6 else int(generator.integers(0, 60))
    return dataset_of(events, 400, 60)


def test_the_recency_is_the_one_that_ranks_best_on_the_validation_part() -> None:
    whole = wanderers(in_order=True)
    before = whole.between(-np.inf, 11 * DAY)
    validation = make_holdout(before, whole.between(11 * DAY, np.inf))
    config = replace(FAST_LEARNER, epochs=8)

    def fitted(*without: str) -> Fit:
        own = replace(config, without=without)
        return fit(before, own, max_history=20, phase="evaluate", validation=validation)

    found = fitted()
    assert found.recency > 0
    assert found.shortcut.recency > 0
    np.testing.assert_array_equal(found.weights["gate_recency"], recency_of_orders(found.recency))
    np.testing.assert_array_equal(found.weights["shortcut_recency"], recency_of_orders(found.shortcut.recency))
    flat = {"gate_recency": recency_of_orders(0.0), "shortcut_recency": recency_of_orders(0.0)}
    assert validation_ndcg(validation, found.weights) > 1.2 * validation_ndcg(validation, found.weights | flat)
    assert {choice.recency for choice in found.shortcut_ndcg if choice.way} == set(RECENCIES)
    unordered = fitted("order")
    assert (unordered.recency, unordered.shortcut.recency) == (0.0, 0.0)
    assert fitted("encoder_attention").recency == 0.0


def test_links_of_what_came_before_what_are_taken_only_where_they_last() -> None:
    lasting = wanderers(in_order=True)
    # On the last day that is learned from, which is of the newest tenth, and on the one to guess all go another way.
    item = lasting.item.copy()
    for day in (10, 11):
        late = np.flatnonzero(lasting.occurred_at == day * DAY)
        item[late] = (item[late - 1] + 23) % 60
    changed = replace(lasting, item=item)
    config = replace(FAST_LEARNER, epochs=2)
    ways = {}
    for name, whole in (("lasting", lasting), ("changed", changed)):
        before = whole.between(-np.inf, 11 * DAY)
        validation = make_holdout(before, whole.between(11 * DAY, np.inf))
        found = fit(before, config, max_history=20, phase="evaluate", validation=validation)
        assert max(found.shortcut_ndcg, key=found.shortcut_ndcg.__getitem__).way == "transitions"
        ways[name] = found.shortcut.way
    assert ways["lasting"] == "transitions"
    assert ways["changed"] not in ("transitions", "baskets")


def test_where_nothing_has_an_order_nothing_fades() -> None:
    whole = wanderers(in_order=False)
    before, after = hold_out(whole, np.arange(0, 400 * 60, 60) + whole.item[::12])
    validation = make_holdout(before, after)
    found = fit(before, replace(FAST_LEARNER, epochs=2), max_history=20, phase="evaluate", validation=validation)
    assert (found.recency, found.shortcut.recency) == (0.0, 0.0)
    assert {choice.recency for choice in found.shortcut_ndcg} == {0.0}


def test_a_bucket_of_orders_fades_as_the_number_in_its_middle() -> None:
    np.testing.assert_array_equal(recency_of_orders(0.0), 1.0)
    fading = recency_of_orders(1.0)
    np.testing.assert_allclose(fading[:5], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    moments = np.arange(1, 100)
    np.testing.assert_allclose(fading[order_bucket(moments)], 1 / (1 + moments), rtol=0.51)
    assert (np.diff(fading) < 0).all()


def test_a_heavy_shortcut_ranks_as_if_it_weighed_more_and_leaves_every_item_a_share(learnable: Dataset) -> None:
    own = fit(learnable, replace(FAST_LEARNER, neighbours=0), max_history=20, phase="publish", epochs=2).weights
    ways = shortcuts(learnable, 64, seed=1, ways=["regression_30"])
    history = learnable.history(np.arange(200))
    light, heavy = (
        with_links(own, ways, ShortcutChoice(way="regression_30", scale=scale, recency=1.0)) for scale in (4.0, 128.0)
    )
    links = ways["regression_30"].fading(1.0)
    plain = scorer(light, 20)(history)
    np.testing.assert_array_equal(plain, scorer(own | links.tensors(4.0), 20)(history))
    scores = scorer(heavy, 20)(history)
    assert (scores > 0).all()
    logits = forward.decode(own, forward.encode(own, history.tokens(20))).astype(np.float64)
    sums = np.zeros_like(logits, dtype=np.float32)
    forward.add_shortcut(links.tensors(), history.tokens(20), sums)
    logits += 128.0 * sums
    # The same order: logarithms of the shares are an eighth of the sums, but for a constant of each user.
    apart = np.log(scores) - logits / 8
    np.testing.assert_allclose(apart, np.broadcast_to(apart[:, :1], apart.shape), atol=1e-3)
    # The scores that a database must give again are those of these weights.
    config = replace(FAST_LEARNER, neighbours=64)
    for weights in (light, heavy):
        golden = golden_users(learnable, config, weights, max_history=20)
        known = [user for user in golden if user.items]
        assert len(known) > 20
        asked = History(
            counts=np.array([len(user.items) for user in known]),
            item=np.concatenate([user.items for user in known]),
            event_type=np.concatenate([user.event_types for user in known]),
            occurred_at=np.concatenate([user.occurred_at for user in known]),
        )
        scores, _ = score_users(weights, asked, max_history=20)
        for user, row in zip(known, scores, strict=True):
            np.testing.assert_allclose(row[user.top_items], user.top_scores, rtol=1e-5)


def test_training_lowers_the_loss_and_learns_who_likes_what(learnable: Dataset) -> None:
    learned = fit(learnable, FAST_LEARNER, max_history=20, phase="publish", epochs=15)
    assert learned.curve[-1].reconstruction < 0.9 * learned.curve[0].reconstruction
    scores = scorer(learned.weights, 20)(learnable.history(np.arange(200)))
    own = scores.reshape(200, 4, 10).sum(axis=2)[np.arange(200), np.arange(200) % 4]
    assert np.median(own) > 0.9


def test_an_absurd_learning_rate_ends_in_weights_or_in_an_error_with_a_remedy(learnable: Dataset) -> None:
    try:
        diverged = trained_on(learnable, learning_rate=0.99, epochs=30)
    except PgvaeError as error:
        assert "lower --learning-rate than 0.99" in str(error.hint)
    else:
        assert all(np.isfinite(tensor).all() for tensor in diverged.weights.values())


def test_a_loss_that_explodes_ends_the_training_with_a_remedy(
    learnable: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    # Finite, as the losses of a learning rate far too high can be.
    monkeypatch.setattr(
        "pgvae.loop.kl_divergence", lambda mean, _: mean.sum(dim=1) * 0 + (1e9 if len(told) == 2 else 1.0)
    )
    config = TrainingConfig(epochs=9, hidden=12, latent=8)
    with pytest.raises(PgvaeError, match=r"the training diverged in epoch 3: its loss is \d") as refused:
        fit(learnable, config, max_history=20, phase="publish", on_epoch=lambda epoch: told.append(epoch.epoch))
    assert refused.value.hint == "train again with a lower --learning-rate than 0.004; or stop before: --epochs 2"


def test_a_loss_that_is_not_finite_ends_the_training(learnable: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgvae.loop.kl_divergence", lambda mean, log_variance: mean.sum(dim=1) * float("nan"))
    with pytest.raises(PgvaeError, match="the training diverged in epoch 1: its loss is nan") as refused:
        trained_on(learnable)
    assert refused.value.hint == "train again with a lower --learning-rate than 0.004"


def test_a_last_step_that_breaks_the_weights_ends_the_training(
    learnable: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = torch.optim.Adam.step

    def break_at_the_end(self: torch.optim.Adam, *args: Any) -> None:
        nonlocal steps
        step(self, *args)
        steps += 1
        if steps == 3 * 32:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = float("nan")

    monkeypatch.setattr(torch.optim.Adam, "step", break_at_the_end)
    with pytest.raises(PgvaeError, match="the training diverged in epoch 3") as refused:
        trained_on(learnable)
    assert steps == 3 * 32
    assert "--learning-rate than 0.004; or stop before: --epochs 2" in str(refused.value.hint)


# Data that is hard to learn


def degenerate(kind: str) -> list[tuple[Any, ...]]:
    ordinary = Shop().rows()
    users, items = Shop().users, Shop().items
    day = timedelta(days=1)
    made: dict[str, list[tuple[Any, ...]]] = {
        "all at one moment": [(*row[:3], BEGIN) for row in ordinary],
        "one user dominates": [
            *ordinary,
            *((users[0], items[n % 12], "view", BEGIN + n * day / 90) for n in range(5000)),
        ],
        "one user only": [(users[0], items[n % 12], "purchase", BEGIN + n * day) for n in range(200)],
        "all users identical": [(user, items[n], "purchase", BEGIN + n * day) for user in users for n in range(12)],
        "one event each": [(user, items[n % 12], "purchase", BEGIN + n * day) for n, user in enumerate(users)],
        "views only": [(*row[:2], "view", row[3]) for row in ordinary],
        "purchases only": [(*row[:2], "purchase", row[3]) for row in ordinary],
        "searches only": [(*row[:2], "search", row[3]) for row in ordinary],
        "one item only": [(row[0], items[0], *row[2:]) for row in ordinary],
        "two items": [(row[0], items[row[1] % 2], *row[2:]) for row in ordinary],
        "purchases long before everything else": [
            (*row[:3], row[3] - 3000 * day if row[2] == "purchase" else row[3]) for row in ordinary
        ],
        "one event": [ordinary[0]],
    }
    return made[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "all at one moment",
        "one user dominates",
        "one user only",
        "all users identical",
        "one event each",
        "views only",
        "purchases only",
        "searches only",
        "one item only",
        "two items",
        "purchases long before everything else",
        "one event",
    ],
)
def test_data_that_is_hard_to_learn_gives_a_model_that_scores(database: str, kind: str) -> None:
    shop = Shop()
    with psycopg.connect(database, autocommit=True) as connection:
        shop.make(connection)
        connection.execute("truncate events")
        shop.add(connection, degenerate(kind))
        shop.create_model(connection, options=SMALL | {"outlier_events_per_day": 1000})
        version = train(database, force=True)
        rows(connection, "select * from vae.activate('shop', %s, force => true)", version)
        connection.execute("call vae.refresh('shop')")
        users = rows(connection, "select count(distinct user_id) from shop.clean_events")
        assert rows(connection, "select count(*) from shop.recommendations_materialized") == users
        totals = rows(
            connection,
            "select sum(r.score), min(r.score) > 0, count(*) = count(distinct r.item_id)"
            " from (select distinct user_id from shop.clean_events) u,"
            " shop.recommend(u.user_id, 100, '{\"exclude_seen\": false}') r group by u.user_id",
        )
        assert len(totals) == users[0][0]
        for total, positive, distinct in totals:
            assert total == pytest.approx(1, rel=1e-5)
            assert positive
            assert distinct


def test_a_version_says_which_shortcut_it_has(trained: psycopg.Connection) -> None:
    (recorded,) = rows(trained, "select config -> 'shortcut' from vae.versions")[0]
    (links,) = rows(trained, "select shape[1] from vae_private.tensors where name = 'shortcut_item'")[0]
    assert recorded["way"] in (None, *WAYS)
    assert (recorded["way"] is None) == (recorded["scale"] == 0) == (links == 0)
