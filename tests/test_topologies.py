"""A streaming standby that scores, PgBouncer in between, and upgrades from each revision of the tables."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from pgvae import resources
from pgvae.errors import PgvaeError
from pgvae.install import install
from pgvae.server import Server
from shop import QUICK, Shop, refusal
from variants import publish_network

Connection = psycopg.Connection[Any]

USERS = Shop().users
REFRESH = "call vae.refresh('shop')"


def run_as_server(arguments: list[Any]) -> None:
    """Runs a program with the account of the server, which refuses to run as root."""
    account = pwd.getpwnam("postgres").pw_uid if os.geteuid() == 0 else os.geteuid()
    done = subprocess.run(arguments, user=account, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def private_folder(path: Path) -> Path:
    """Makes a folder that belongs to the server's account."""
    path.mkdir(mode=0o700)
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(path, account.pw_uid, account.pw_gid)
    return path


def answers(connection: Connection) -> tuple[list[Any], list[Any]]:
    """Gives all that a reader and a scorer see of the shop: live rows and stored ones."""
    live = [row for user in USERS[:10] for row in connection.execute("select * from shop.recommend(%s)", [user])]
    stored = connection.execute("select * from shop.recommendations order by user_id, rank").fetchall()
    return live, stored


# A standby


@pytest.fixture
def standby(server: Server, scratch: Path) -> Iterator[str]:
    """The socket folder of a running streaming standby of the tests' server."""
    data, sockets = private_folder(scratch / "standby"), private_folder(scratch / "standby-sockets")
    target = conninfo_to_dict(server.dsn("postgres"))
    backup = ["-h", target["host"], "-p", target["port"], "-U", target["user"], "-c", "fast", "-R", "-N"]
    run_as_server([server.bindir / "pg_basebackup", "-D", data, *backup])
    control = [server.bindir / "pg_ctl", "-D", data, "-w"]
    # Its settings file stands behind the one of the primary, whose copy it is.
    (data / "postgresql.auto.conf").open("a").write(f"unix_socket_directories = '{sockets}'\nport = 5432\n")
    own = data / "pgvae.conf"
    own.write_text("".join(line for line in own.open() if not line.startswith(("unix_socket", "port", "listen"))))
    run_as_server([*control, "-l", data / "log", "start"])
    yield str(sockets)
    run_as_server([*control, "-m", "immediate", "stop"])
    shutil.rmtree(data)
    shutil.rmtree(sockets)


def test_a_standby_gives_the_answers_of_the_primary_follows_it_and_takes_its_place(
    server: Server, standby: str, trained_database: str
) -> None:
    name = str(conninfo_to_dict(trained_database)["dbname"])

    def caught_up(primary: Connection) -> None:
        # What was inserted: with synchronous_commit off a commit may not have been written yet.
        row = primary.execute("select pg_current_wal_insert_lsn()").fetchone()
        assert row
        with psycopg.connect(make_conninfo(host=standby, user="postgres", dbname="postgres"), autocommit=True) as other:
            for _ in range(600):
                if other.execute("select pg_last_wal_replay_lsn() >= %s::pg_lsn", row).fetchone() == (True,):
                    return
                time.sleep(0.05)
        raise AssertionError("the standby does not catch up")

    with psycopg.connect(trained_database, autocommit=True) as primary:
        # In a clone of a template PostgreSQL logs nothing of sequences for a while, unless a checkpoint came since.
        primary.execute("checkpoint")
        version = publish_network(trained_database, "shop", QUICK, seed=1)[0]
        caught_up(primary)
        with psycopg.connect(make_conninfo(host=standby, user="postgres", dbname=name), autocommit=True) as copy:
            assert copy.execute("select pg_is_in_recovery()").fetchone() == (True,)
            first = answers(primary)
            assert answers(copy) == first
            primary.execute("select * from vae.activate('shop', %s, force => true)", [version])
            primary.execute("insert into events values (%s, %s, 'view', now())", [USERS[0], Shop().items[0]])
            primary.execute(REFRESH)
            caught_up(primary)
            second = answers(primary)
            assert second != first
            assert answers(copy) == second
            refused = refusal(copy, REFRESH)
            assert (refused.sqlstate, refused.message_hint) == ("25006", "refresh on its primary")
            # Whose session runs a refresh, only the primary sees.
            primary.execute("insert into vae.refreshes (model_id, view) select model_id, 'churn' from vae.models")
            query = "select status from vae.health_checks where check_name = 'interrupted refresh'"
            primary.execute("update vae.refreshes set backend_pid = 0 where state = 'running'")
            caught_up(primary)
            assert (primary.execute(query).fetchall(), copy.execute(query).fetchall()) == ([("warning",)], [("ok",)])
            with pytest.raises(PgvaeError, match="the server is a standby"):
                install(make_conninfo(host=standby, user="postgres", dbname=name))
            # A failover: what was the standby goes on alone.
            assert copy.execute("select pg_promote()").fetchone() == (True,)
            assert answers(copy) == second
            copy.execute("insert into events values (%s, %s, 'purchase', now())", [USERS[0], Shop().items[1]])
            copy.execute(REFRESH)
            assert copy.execute("select count(*) from vae.refreshes where state = 'running'").fetchone() == (0,)
            assert answers(copy) != second


# PgBouncer


@pytest.fixture
def pooled(trained_database: str, scratch: Path) -> Iterator[str]:
    """The DSN of a trained database through PgBouncer, whose two server connections each transaction takes anew."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if not program:
        pytest.skip("there is no pgbouncer; on Debian: apt-get install pgbouncer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = private_folder(scratch / "pgbouncer")
    target = conninfo_to_dict(trained_database)
    (folder / "ini").write_text(
        f"[databases]\n{target['dbname']} = host={target['host']} port={target['port']} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 100\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    (folder / "ini").chmod(0o644)
    account = pwd.getpwnam("postgres").pw_uid if os.geteuid() == 0 else os.geteuid()
    pooler = subprocess.Popen([program, "-q", folder / "ini"], user=account, stderr=subprocess.PIPE, text=True)
    dsn = make_conninfo(host="127.0.0.1", port=port, user="postgres", dbname=str(target["dbname"]))
    for _ in range(100):
        try:
            psycopg.connect(dsn).close()
            break
        except psycopg.OperationalError:
            time.sleep(0.05)
    yield dsn
    pooler.terminate()
    pooler.wait()
    shutil.rmtree(folder)


def test_everything_works_through_a_pooler_in_transaction_mode(
    pooled: str, trained: Connection, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    expected = answers(trained)
    # Clients in such pools prepare nothing. More clients than connections, in turns.
    clients = [psycopg.connect(pooled, autocommit=True, prepare_threshold=None) for _ in range(8)]
    for client in clients:
        assert answers(client) == expected
    trained_again = run_cli("train", "shop", "--epochs", "1", dsn=pooled)
    assert trained_again.returncode == 0, trained_again.stderr
    for client in clients[:2]:
        client.execute("select * from vae.activate('shop', 2, force => true)")
        client.execute(REFRESH)
        assert client.execute("select distinct model_version from shop.recommendations").fetchall() == [(2,)]
        client.execute("select * from vae.rollback('shop')")
    assert run_cli("refresh", "shop", dsn=pooled).returncode == 0
    for found, wanted in zip(answers(clients[3])[1], expected[1], strict=True):
        # Which users are scored side by side decides on the last bit of a score.
        assert found[:4] == pytest.approx(wanted[:4], rel=1e-6)
        assert found[4:6] == wanted[4:6]
    assert trained.execute("select count(*) from vae.refreshes where state <> 'succeeded'").fetchone() == (0,)
    assert trained.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)
    for client in clients:
        client.close()


# Upgrades


def revisions() -> list[str]:
    """Gives the revisions of the tables, oldest first."""
    config = Config()
    config.set_main_option("script_location", str(resources.directory("migrations")))
    return [script.revision for script in reversed(list(ScriptDirectory.from_config(config).walk_revisions()))]


def upgrade_to(dsn: str, revision: str) -> None:
    """Makes the tables as they were at a revision, without what sql/ puts over them."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("create schema vae")
        config = Config()
        config.set_main_option("script_location", str(resources.directory("migrations")))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def common_columns(connection: Connection, source: Connection, table: str) -> list[str]:
    """Gives the columns that a table has in both databases, without those that PostgreSQL computes itself."""
    query = (
        "select a.attname::text from pg_attribute a where a.attrelid = %s::regclass and a.attnum > 0"
        " and not a.attisdropped and a.attgenerated = '' order by a.attnum"
    )
    there = {name for (name,) in source.execute(query, [table]).fetchall()}
    return [name for (name,) in connection.execute(query, [table]).fetchall() if name in there]


# In an order in which foreign keys hold.
TABLES = (
    "vae.models", "vae.event_types", "vae.versions", "vae.metrics", "vae.epochs", "vae.activations", "vae.refreshes",
    "vae_private.tensors", "vae_private.items",
)  # fmt: skip


@pytest.mark.parametrize("revision", revisions()[:-1])
def test_an_upgrade_from_each_revision_keeps_the_data_and_scores_the_same(
    server: Server, trained: Connection, empty_database: str, revision: str
) -> None:
    expected = answers(trained)
    upgrade_to(empty_database, revision)
    with psycopg.connect(empty_database, autocommit=True) as old:
        Shop().make(old)
        old.execute("create schema shop")
        for table in TABLES:
            names = ", ".join(f'"{name}"' for name in common_columns(old, trained, table))
            with (
                trained.cursor().copy(f"copy (select {names} from {table}) to stdout".encode()) as out,
                old.cursor().copy(f"copy {table} ({names}) from stdin".encode()) as into,
            ):
                for data in out:
                    into.write(data)
        old.execute(
            "select setval(pg_get_serial_sequence(a.attrelid::regclass::text, a.attname), 100) from pg_attribute a"
            " where a.attidentity <> '' and a.attrelid::regclass::text = any(%s)",
            [list(TABLES)],
        )
        before = {table: old.execute(f"select count(*) from {table}".encode()).fetchone() for table in TABLES}
    installation = install(empty_database)
    assert (installation.models, installation.warnings) == (1, [])
    with psycopg.connect(empty_database, autocommit=True) as new:
        for table in TABLES:
            assert new.execute(f"select count(*) from {table}".encode()).fetchone() == before[table], table
        new.execute("call vae.refresh('shop', array['recommendations'])")
        live, stored = answers(new)
        assert live == expected[0]
        # Users may come in another order here, and the product of several in another order differs in its last bit.
        assert [row[:3] + row[4:6] for row in stored] == [row[:3] + row[4:6] for row in expected[1]]
        assert [row[3] for row in stored] == pytest.approx([row[3] for row in expected[1]], rel=1e-5)
        # What is stored stays readable through an installation that remakes all views.
        install(empty_database)
        assert answers(new)[1] == stored


def test_there_are_revisions_to_upgrade_from() -> None:
    assert len(revisions()) > 3
