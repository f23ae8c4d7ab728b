"""Kills, cuts, cancels and full disks at every stage: nothing half-done is ever seen, and the next run works."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from command import processes, start_server
from conftest import FAST, create_database, drop_database
from pgvae import publish as publishing
from pgvae.config import TrainingConfig
from pgvae.errors import PgvaeError
from pgvae.golden import golden_users
from pgvae.install import install
from pgvae.server import Server
from pgvae.train import Listener
from pgvae.train import train as run_training
from shop import QUICK, Shop, train, train_and_activate
from variants import install_variant, publish_network

Connection = psycopg.Connection[Any]

USER = Shop().users[0]
# Some 25 MB of weights that do not compress.
LARGE = TrainingConfig(epochs=1, hidden=1000, latent=1000)


def rows(connection: Connection, query: str, *parameters: Any) -> list[Any]:
    return connection.execute(query.encode(), parameters).fetchall()


def wait_for(connection: Connection, question: str, *parameters: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while rows(connection, question, *parameters) != [(True,)]:
        assert time.monotonic() < deadline, f"waited in vain for: {question}"
        time.sleep(0.02)


def wait_until_alone(connection: Connection) -> None:
    """Waits until no other session of this database is left."""
    others = "select count(*) = 0 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    wait_for(connection, others)


def temporary_files(connection: Connection) -> int:
    """Gives how many temporary tables have files on the disk, seen or not."""
    directory = "regexp_replace(pg_relation_filepath('pg_class'), '/[^/]*$', '')"
    return int(rows(connection, f"select count(*) from pg_ls_dir({directory}) f where f ~ '^t[0-9]+_'")[0][0])


def what_is_visible(connection: Connection) -> list[Any]:
    """Gives all that a training or a refresh may change, as another session sees it."""
    logs, weights = ("versions", "metrics", "epochs", "activations"), ("tensors", "items")
    tables = [*(f"vae.{name}" for name in logs), *(f"vae_private.{name}" for name in weights)]
    content = "select md5(string_agg(t::text, ' ' order by t::text)) from {} t"
    return [
        *(rows(connection, content.format(table)) for table in tables),
        rows(connection, "select * from shop.recommendations order by user_id, rank"),
        rows(connection, "select * from shop.recommend(%s)", USER),
    ]


@contextmanager
def locked(dsn: str, table: str) -> Iterator[None]:
    """Keeps everybody else out of a table: whoever comes to it stands still in the middle of what it does.

    From pgvae's own tables it keeps only writers: a training reads the version before its own.
    """
    mode = "exclusive" if table.startswith("vae") else "access exclusive"
    with psycopg.connect(dsn) as connection:
        connection.execute(f"lock table {table} in {mode} mode".encode())
        yield


def wait_for_the_one_who_waits(connection: Connection, query: str) -> int:
    """Gives the server process whose query, of that beginning, waits for a lock."""
    waiting = "pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query ilike %s"
    wait_for(connection, f"select count(*) = 1 from {waiting}", query + "%")
    return int(rows(connection, f"select pid from {waiting}", query + "%")[0][0])


def add_users(connection: Connection) -> None:
    """Gives the shop so many users and items that a training has something to measure itself on."""
    connection.execute(
        "insert into events select user_id, item_id, 'purchase', '2024-01-01'::timestamptz + day * interval '1 day'"
        " from generate_series(1, 100) user_id, generate_series(0, 59, 6) day,"
        " lateral (select 1 + (user_id * 7 + day * 13) % 40) i (item_id)"
    )


# The trainer


def stand_still_at(moment: str, dsn: str, arrived: Any) -> None:
    """Trains, in a process of its own, and stands still at a moment."""

    def at(here: str) -> None:
        if here == moment:
            arrived.set()
            time.sleep(600)

    run_training(
        dsn,
        "shop",
        QUICK,
        listener=Listener(
            on_quality=lambda _: at("reading, after the gate"),
            on_data=lambda _: at("reading, with its temporary tables filled"),
            on_epoch=lambda epoch: at({"evaluate": "evaluating", "publish": "training"}[epoch.phase]),
        ),
    )


def test_a_server_that_ends_idle_transactions_ends_no_training(
    trained_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its queries the trainer computes, over a large shop for minutes."""

    def slow_golden_users(*arguments: Any, **options: Any) -> Any:
        time.sleep(3)
        return golden_users(*arguments, **options)

    monkeypatch.setattr(publishing, "golden_users", slow_golden_users)
    dsn = make_conninfo(trained_database, options="-c idle_in_transaction_session_timeout=2s")
    assert run_training(dsn, "shop", QUICK, listener=Listener(on_data=lambda _: time.sleep(3))).version == 2


@pytest.mark.parametrize(
    "moment",
    [
        "reading, in the gate",
        "reading, after the gate",
        "reading, with its temporary tables filled",
        "evaluating",
        "training",
        "publishing, before its first weight",
        "publishing, after its weights",
        "publishing, at its last statement",
    ],
)
def test_a_killed_trainer_leaves_nothing_and_the_next_one_works(trained_database: str, moment: str) -> None:
    # Where a trainer cannot be told to stand still, a lock stops it.
    table, query = {
        "reading, in the gate": ("events", "select * from vae.check_events"),
        "publishing, before its first weight": ("vae_private.tensors", "copy vae_private.tensors"),
        "publishing, after its weights": ("vae_private.items", "copy vae_private.items"),
        "publishing, at its last statement": ("vae.epochs", "insert into vae.epochs"),
    }.get(moment, (None, ""))
    with psycopg.connect(trained_database, autocommit=True) as watcher:
        if moment == "evaluating":
            add_users(watcher)
        before = what_is_visible(watcher)
        start_server()
        arrived = processes.Event()
        trainer = processes.Process(target=stand_still_at, args=(moment, trained_database, arrived))
        try:
            if table:
                with locked(trained_database, table):
                    trainer.start()
                    wait_for_the_one_who_waits(watcher, query)
                    assert trainer.pid
                    os.kill(trainer.pid, signal.SIGKILL)
                    trainer.join()
            else:
                trainer.start()
                assert arrived.wait(60)
                assert (temporary_files(watcher) > 0) == ("temporary tables" in moment)
                assert what_is_visible(watcher) == before
                assert trainer.pid
                os.kill(trainer.pid, signal.SIGKILL)
                trainer.join()
        finally:
            trainer.kill()
        wait_until_alone(watcher)
        assert what_is_visible(watcher) == before
        assert temporary_files(watcher) == 0
        assert train(trained_database) == 2
        assert rows(watcher, "select version, state from vae.versions order by 1") == [(1, "active"), (2, "ready")]


@contextmanager
def training_through_the_command_line(dsn: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pgvae.cli", "train", "shop", "--epochs", "1", "--dsn", dsn],
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("table", "query"),
    [("events", "select * from vae.check_events"), ("vae_private.items", "copy vae_private.items")],
    ids=["while reading", "while publishing"],
)
def test_a_cut_connection_ends_a_training_with_a_clear_error(trained_database: str, table: str, query: str) -> None:
    with (
        psycopg.connect(trained_database, autocommit=True) as watcher,
        training_through_the_command_line(trained_database) as trainer,
    ):
        before = what_is_visible(watcher)
        with locked(trained_database, table):
            pid = wait_for_the_one_who_waits(watcher, query)
            watcher.execute("select pg_terminate_backend(%s)", [pid])
            _, errors = trainer.communicate(timeout=60)
        assert trainer.returncode == 1
        assert "Traceback" not in errors
        assert errors.splitlines()[-2:] == [
            "error: the connection to the server was lost: terminating connection due to administrator command",
            "hint: nothing half-done was kept; once the server takes connections, run the command again",
        ]
        wait_until_alone(watcher)
        assert what_is_visible(watcher) == before
        assert train(trained_database) == 2


def test_two_trainers_that_publish_at_once_get_two_numbers(trained_database: str) -> None:
    with psycopg.connect(trained_database, autocommit=True) as watcher, ThreadPoolExecutor() as threads:
        with locked(trained_database, "vae_private.items"):
            published = [threads.submit(publish_network, trained_database, "shop", QUICK, seed) for seed in (1, 2, 3)]
            # One is in the middle of publishing, the others wait for its number.
            waiting = "select count(*) = 3 from pg_stat_activity where wait_event_type = 'Lock' and datname = %s"
            wait_for(watcher, waiting, watcher.info.dbname)
        versions = {future.result(60)[0]: future.result()[1] for future in published}
        assert sorted(versions) == [2, 3, 4]
        assert rows(watcher, "select version, state from vae.versions order by 1") == [
            (1, "active"), (2, "ready"), (3, "ready"), (4, "ready"),
        ]  # fmt: skip
        # Each has its own weights.
        for version, network in versions.items():
            stored = rows(
                watcher,
                "select data from vae_private.tensors join vae.versions using (version_id)"
                " where version = %s and name = 'mean_bias'",
                version,
            )
            assert stored == [(network.weights()["mean_bias"].tobytes(),)]


# Full disks


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """Mounts a small file system that belongs to the server's account; skips where mounting is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode:
        path.rmdir()
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        account = pwd.getpwnam("postgres")
        os.chown(path, account.pw_uid, account.pw_gid)
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        path.rmdir()


def free_megabytes(path: Path) -> float:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize / 2**20


def test_a_full_disk_ends_a_publication_and_the_last_good_version_serves(
    server: Server, trained_template: str, scratch: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with small_disk(scratch / "small", 40) as disk:
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
            admin.execute(f"create tablespace small location '{disk}'".encode())
            admin.execute(f"create database full_disk template {trained_template} tablespace small".encode())
        dsn = server.dsn("full_disk")
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                before = what_is_visible(connection)
            filler = disk / "filler"
            filler.write_bytes(bytes(max(0, int((free_megabytes(disk) - 12) * 2**20))))
            options = ("--epochs", "1", "--hidden", str(LARGE.hidden), "--latent", str(LARGE.latent))
            refused = run_cli("train", "shop", *options, dsn=dsn)
            assert refused.returncode == 1
            assert "Traceback" not in refused.stderr
            assert "No space left on device" in refused.stderr
            assert refused.stderr.splitlines()[-1] == "hint: Check free disk space."
            with psycopg.connect(dsn, autocommit=True) as connection:
                wait_until_alone(connection)
                assert what_is_visible(connection) == before
                assert rows(connection, "select distinct model_version from shop.recommend(%s)", USER) == [(1,)]
            filler.unlink()
            assert train(dsn) == 2
        finally:
            drop_database(server, "full_disk")
            with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
                admin.execute("drop tablespace small")


def test_a_full_disk_ends_a_refresh_and_the_last_content_stays(
    server: Server, trained_template: str, scratch: Path
) -> None:
    with small_disk(scratch / "small", 40) as disk:
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
            admin.execute(f"create tablespace small location '{disk}'".encode())
            admin.execute(f"create database full_disk template {trained_template} tablespace small".encode())
        dsn = server.dsn("full_disk")
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                before = what_is_visible(connection)
                filler = disk / "filler"
                with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
                for full in ("false", "true"):
                    with pytest.raises(psycopg.errors.DiskFull):
                        connection.execute(f"call vae.refresh('shop', full => {full})".encode())
                    assert what_is_visible(connection) == before
                filler.unlink()
                connection.execute("call vae.refresh('shop', full => true)")
                assert last_refresh(connection)[0] == "succeeded"
                assert no_lock_is_left(connection)
        finally:
            drop_database(server, "full_disk")
            with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
                admin.execute("drop tablespace small")


# Refreshes that take their time

# One user in a batch, 60 ms each: thirty users take two seconds.
SLOW = (
    "            yield from [",
    "            import time\n\n            time.sleep(0.06)\n            yield from [",
)


def make_slow(dsn: str) -> None:
    """Gives a database code whose refresh can be met while it runs."""
    install_variant(dsn, "batch", SLOW, ("_MAX_BATCH = 512", "_MAX_BATCH = 1"))


@pytest.fixture
def slow(trained_database: str) -> str:
    """The DSN of a trained database in which a refresh takes seconds."""
    make_slow(trained_database)
    return trained_database


def refresh(dsn: str, *statements: str) -> float:
    """Refreshes in a session of its own, after those statements; gives the seconds."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())
        begun = time.monotonic()
        connection.execute("call vae.refresh('shop', array['recommendations'])")
        return time.monotonic() - begun


def wait_for_a_refresh(connection: Connection) -> int:
    """Waits until a refresh has scored a few users; gives its server process."""
    far = "datname = current_database() and application_name ~ '^pgvae shop: [3-9] users scored$'"
    wait_for(connection, f"select count(*) = 1 from pg_stat_activity where {far}")
    return int(rows(connection, "select backend_pid from vae.refreshes where state = 'running'")[0][0])


def last_refresh(connection: Connection) -> Any:
    query = (
        "select state, version, row_count, error from vae.refreshes where view = 'recommendations'"
        " order by refresh_id desc limit 1"
    )
    return rows(connection, query)[0]


def no_lock_is_left(connection: Connection) -> bool:
    return rows(connection, "select count(*) from pg_locks where locktype = 'advisory' and granted") == [(0,)]


def test_a_cancelled_refresh_ends_within_a_batch_and_leaves_the_last_content(slow: str) -> None:
    with psycopg.connect(slow, autocommit=True) as watcher, psycopg.connect(slow, autocommit=True) as session:
        before = what_is_visible(watcher)
        with ThreadPoolExecutor() as threads:
            running = threads.submit(session.execute, "call vae.refresh('shop', array['recommendations'])")
            pid = wait_for_a_refresh(watcher)
            watcher.execute("select pg_cancel_backend(%s)", [pid])
            begun = time.monotonic()
            with pytest.raises(psycopg.errors.QueryCanceled) as cancelled:
                running.result()
            assert time.monotonic() - begun < 1
        assert cancelled.value.diag.message_primary == (
            "refresh of shop.recommendations failed: canceling statement due to user request"
        )
        assert cancelled.value.diag.message_hint == "the view keeps its last good content"
        assert last_refresh(watcher) == ("failed", None, None, "canceling statement due to user request")
        assert what_is_visible(watcher) == before
        assert no_lock_is_left(watcher)
        # The same session, and then another one, can refresh again.
        install(slow)
        session.execute("call vae.refresh('shop', array['recommendations'])")
        refresh(slow)
        assert rows(watcher, "select state from vae.refreshes where view = 'recommendations' order by refresh_id") == [
            ("succeeded",), ("failed",), ("succeeded",), ("succeeded",),
        ]  # fmt: skip


def test_a_statement_timeout_ends_a_refresh_within_a_batch(slow: str) -> None:
    with psycopg.connect(slow, autocommit=True) as watcher:
        before = what_is_visible(watcher)
        begun = time.monotonic()
        with pytest.raises(psycopg.errors.QueryCanceled, match="failed: canceling statement due to statement timeout"):
            refresh(slow, "set statement_timeout = '1s'")
        assert time.monotonic() - begun < 2.5
        assert last_refresh(watcher)[0] == "failed"
        assert what_is_visible(watcher) == before
        assert no_lock_is_left(watcher)


def test_a_statement_timeout_at_any_moment_leaves_no_lock_and_whole_content(trained: Connection) -> None:
    content = "select user_id, rank, item_id, score, model_version from shop.recommendations order by 1, 2"
    before = rows(trained, content)
    cancelled = 0
    for attempt in range(300):
        # The first milliseconds are where a refresh takes its locks and logs itself.
        trained.execute(f"set statement_timeout = {1 + attempt % 6}".encode())
        try:
            trained.execute("call vae.refresh('shop', array['recommendations'])")
        except psycopg.errors.QueryCanceled:
            cancelled += 1
        # On a busy machine this takes longer than allowed, too.
        while True:
            with suppress(psycopg.errors.QueryCanceled):
                trained.execute("reset statement_timeout")
                break
        assert no_lock_is_left(trained)
        assert rows(trained, content) == before
    assert cancelled > 150
    trained.execute("call vae.refresh('shop', array['recommendations'])")
    assert last_refresh(trained) == ("succeeded", 1, len(Shop().users), None)
    assert rows(trained, "select count(*) from vae.refreshes where state = 'running'") == [(0,)]


def test_a_second_refresh_is_told_of_the_first(slow: str) -> None:
    with psycopg.connect(slow, autocommit=True) as watcher, ThreadPoolExecutor() as threads:
        first = threads.submit(refresh, slow)
        wait_for_a_refresh(watcher)
        with pytest.raises(psycopg.errors.LockNotAvailable) as refused:
            refresh(slow)
        assert refused.value.diag.message_primary == "model shop is being refreshed or changed by another session"
        hint = str(refused.value.diag.message_hint)
        assert len(rows(watcher, hint.removeprefix("see: "))) == 1
        first.result(60)
        assert last_refresh(watcher)[:3] == ("succeeded", 1, len(Shop().users))
        assert rows(watcher, "select count(*) from vae.refreshes where view = 'recommendations'") == [(2,)]


def test_refreshes_that_begin_at_the_same_moment_end_well_or_are_refused(trained_database: str) -> None:
    def attempt(_: int) -> str:
        try:
            refresh(trained_database)
        except psycopg.errors.LockNotAvailable as error:
            return str(error.diag.message_primary)
        return "done"

    with ThreadPoolExecutor(6) as threads, psycopg.connect(trained_database, autocommit=True) as watcher:
        outcomes = list(threads.map(attempt, range(24)))
        assert set(outcomes) <= {
            "done",
            "model shop is being refreshed or changed by another session",
            "another session began to refresh model shop at the same moment",
        }
        assert outcomes.count("done") > 0
        succeeded = rows(
            watcher, "select count(*) from vae.refreshes where view = 'recommendations' and state = 'succeeded'"
        )
        assert succeeded == [(1 + outcomes.count("done"),)]
        assert rows(watcher, "select count(*) from vae.refreshes where state = 'running'") == [(0,)]
        assert no_lock_is_left(watcher)


def test_a_refresh_shows_one_version_whatever_is_activated_meanwhile(trained_database: str) -> None:
    slow = trained_database
    second = publish_network(slow, "shop", QUICK, seed=1)[0]
    make_slow(slow)
    with psycopg.connect(slow, autocommit=True) as watcher, ThreadPoolExecutor() as threads:
        running = threads.submit(refresh, slow)
        wait_for_a_refresh(watcher)
        before = rows(watcher, "select user_id, rank, item_id, score from shop.recommendations order by 1, 2")
        watcher.execute("select * from vae.activate('shop', %s, force => true)", [second])
        # Readers are not locked out, live calls have the new version at once, the view keeps the one before.
        watcher.execute("set lock_timeout = '100ms'")
        assert rows(watcher, "select distinct model_version from shop.recommend(%s)", USER) == [(second,)]
        assert rows(watcher, "select distinct model_version from shop.recommendations") == [(1,)]
        assert not running.done()
        # It began again, with the new version.
        running.result(60)
        assert rows(watcher, "select distinct model_version from shop.recommendations") == [(second,)]
        assert last_refresh(watcher)[:3] == ("succeeded", second, len(Shop().users))
        watcher.execute("select * from vae.rollback('shop')")
        install(slow)
        refresh(slow)
        after = rows(watcher, "select user_id, rank, item_id, score from shop.recommendations order by 1, 2")
        assert [row[:3] for row in after] == [row[:3] for row in before]
        assert [row[3] for row in after] == pytest.approx([row[3] for row in before], rel=1e-5)
        assert rows(watcher, "select distinct model_version from shop.recommendations") == [(1,)]
        assert last_refresh(watcher)[:3] == ("succeeded", 1, len(Shop().users))


def test_a_failed_refresh_gives_its_lock_back(trained: Connection, trained_database: str) -> None:
    trained.execute("set vae.device = 'x'")
    with pytest.raises(psycopg.Error, match="'x'"):
        trained.execute("call vae.refresh('shop', array['recommendations'], full => true)")
    trained.execute("reset vae.device")
    assert last_refresh(trained) == ("failed", None, None, "vae.device is 'x'")
    assert no_lock_is_left(trained)
    with psycopg.connect(trained_database) as transaction:
        transaction.execute("select 1")
        with pytest.raises(psycopg.Error, match="cannot run inside a transaction block"):
            transaction.execute("call vae.refresh('shop', array['recommendations'])")
        assert no_lock_is_left(trained)
    trained.execute("update vae.versions set state = 'retired'")
    with pytest.raises(psycopg.Error, match="model shop has no active version"):
        trained.execute("call vae.refresh('shop', array['recommendations'])")
    assert no_lock_is_left(trained)
    trained.execute("update vae.versions set state = 'active'")
    refresh(trained_database)


# Activations


def test_a_second_activation_waits_for_the_first_and_follows_it(trained_database: str) -> None:
    versions = [publish_network(trained_database, "shop", QUICK, seed)[0] for seed in (1, 2)]
    with (
        psycopg.connect(trained_database) as first,
        psycopg.connect(trained_database, autocommit=True) as second,
        psycopg.connect(trained_database, autocommit=True) as watcher,
        ThreadPoolExecutor() as threads,
    ):
        assert rows(first, "select * from vae.activate('shop', %s, force => true)", versions[0]) == [(2, 1)]
        query = "select * from vae.activate('shop', %s, force => true)"
        waiting = threads.submit(rows, second, query, versions[1])
        wait_for_the_one_who_waits(watcher, "select * from vae.activate")
        assert rows(watcher, "select version from vae.versions where state = 'active'") == [(1,)]
        first.commit()
        assert waiting.result(60) == [(3, 2)]
        assert rows(watcher, "select version, state from vae.versions order by 1") == [
            (1, "retired"), (2, "retired"), (3, "active"),
        ]  # fmt: skip
        assert rows(watcher, "select version, previous_version from vae.activations order by activation_id") == [
            (1, None), (2, 1), (3, 2),
        ]  # fmt: skip
        assert rows(watcher, "select distinct model_version from shop.recommend(%s)", USER) == [(3,)]


def test_an_activation_that_is_rolled_back_never_was(trained: Connection, trained_database: str) -> None:
    before = what_is_visible(trained)
    version = publish_network(trained_database, "shop", QUICK, seed=1)[0]
    with psycopg.connect(trained_database) as session:
        session.execute("select * from vae.activate('shop', %s, force => true)", [version])
        assert rows(session, "select distinct model_version from shop.recommend(%s)", USER) == [(version,)]
        session.rollback()
        assert rows(session, "select distinct model_version from shop.recommend(%s)", USER) == [(1,)]
    trained.execute("delete from vae.versions where version = %s", [version])
    # The log keeps who dropped it.
    trained.execute("delete from vae.activations where action = 'drop'")
    assert what_is_visible(trained) == before


# Servers that crash


@pytest.fixture(scope="module")
def crashing(scratch: Path) -> Iterator[Server]:
    """A server of its own, whose processes may be killed, on a disk that may be filled where mounting is allowed."""
    home = scratch / "crashing"
    with small_disk(home, 400) if os.geteuid() == 0 else _folder(home):
        crashing = Server(home, settings={**FAST, "max_wal_size": "64MB", "min_wal_size": "32MB"})
        crashing.up()
        create_database(crashing, "crashing")
        dsn = crashing.dsn("crashing")
        install(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            Shop().make(connection)
            Shop().create_model(connection)
        train_and_activate(dsn)
        refresh(dsn)
        yield crashing
        crashing.remove()


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    path.mkdir()
    yield path


def wait_for_restart(server: Server) -> Connection:
    """Gives a connection, once the server takes one; starts it where it is down."""
    deadline = time.monotonic() + 60
    while True:
        try:
            # Orphans of a killed server hold its memory until they notice.
            server.up()
            return psycopg.connect(server.dsn("crashing"), autocommit=True)
        except (psycopg.OperationalError, PgvaeError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def wait_until_down(connection: Connection, seconds: float = 5) -> None:
    """Waits until the server takes all its sessions down with one that was killed; one that was ending takes none."""
    deadline = time.monotonic() + seconds
    with suppress(psycopg.OperationalError):
        while time.monotonic() < deadline:
            rows(connection, "select 1")
            time.sleep(0.02)


@pytest.mark.parametrize("victim", ["backend", "whole server"])
def test_a_kill_in_the_middle_of_a_refresh_leaves_the_last_content(crashing: Server, victim: str) -> None:
    dsn = crashing.dsn("crashing")
    make_slow(dsn)
    with psycopg.connect(dsn, autocommit=True) as watcher, ThreadPoolExecutor() as threads:
        before = what_is_visible(watcher)
        running = threads.submit(refresh, dsn)
        backend = wait_for_a_refresh(watcher)
        postmaster = int((crashing.data / "postmaster.pid").read_text().splitlines()[0])
        if victim == "whole server":
            os.kill(postmaster, signal.SIGKILL)
        os.kill(backend, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            running.result(60)
        # Until the server has noticed, it takes connections that it cuts a moment later.
        wait_until_down(watcher, seconds=60)
    with wait_for_restart(crashing) as connection:
        assert what_is_visible(connection) == before
        assert last_refresh(connection) == ("running", None, None, None)
        install(dsn)
        connection.execute("call vae.refresh('shop', array['recommendations'])")
        query = (
            "select state, error, finished_at > started_at from vae.refreshes where view = 'recommendations'"
            " order by refresh_id desc limit 2"
        )
        assert rows(connection, query) == [
            ("succeeded", None, True),
            ("failed", "the session ended before the refresh did", True),
        ]
        assert rows(connection, "select item_id from shop.recommend(%s)", USER)


def test_a_server_that_dies_while_a_version_is_published_has_nothing_of_it(crashing: Server) -> None:
    dsn = crashing.dsn("crashing")
    with psycopg.connect(dsn, autocommit=True) as watcher, training_through_the_command_line(dsn) as trainer:
        before = what_is_visible(watcher)
        with pytest.raises(psycopg.OperationalError), locked(dsn, "vae_private.items"):
            wait_for_the_one_who_waits(watcher, "copy vae_private.items")
            postmaster = int((crashing.data / "postmaster.pid").read_text().splitlines()[0])
            os.kill(postmaster, signal.SIGKILL)
            _, errors = trainer.communicate(timeout=60)
            assert trainer.returncode == 1
            assert "Traceback" not in errors
            assert "error: the connection to the server was lost: " in errors
            assert errors.splitlines()[-1].startswith("hint: nothing half-done was kept")
        wait_until_down(watcher, seconds=60)
    with wait_for_restart(crashing) as connection:
        assert what_is_visible(connection) == before
        highest = rows(connection, "select max(version) from vae.versions")[0][0]
        assert train(dsn) == highest + 1


def test_a_server_whose_whole_disk_is_full_serves_again_once_there_is_room(crashing: Server) -> None:
    if not crashing.home.is_mount():
        pytest.skip("mounting a small disk is not allowed here")
    dsn = crashing.dsn("crashing")
    with psycopg.connect(dsn, autocommit=True) as connection:
        before = what_is_visible(connection)
        versions = rows(connection, "select count(*) from vae.versions")
    filler = crashing.home / "filler"
    filler.write_bytes(bytes(int((free_megabytes(crashing.home) - 8) * 2**20)))
    # The write-ahead log needs room too: PostgreSQL may give an error, or go down until there is some.
    with pytest.raises(psycopg.Error):
        publish_network(dsn, "shop", LARGE, seed=1)
    filler.unlink()
    with wait_for_restart(crashing) as connection:
        wait_until_alone(connection)
        assert what_is_visible(connection) == before
        assert rows(connection, "select count(*) from vae.versions") == versions
        publish_network(dsn, "shop", LARGE, seed=1)
        connection.execute("call vae.refresh('shop', array['recommendations'])")
        assert last_refresh(connection)[0] == "succeeded"
