"""The embedded server: made, started, stopped and removed for real."""

from __future__ import annotations

import os
import pwd
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from conftest import FAST, as_role, make_folder
from pgvae.errors import PgvaeError
from pgvae.server import Server, find_bindir, has_plpython

AS_ROOT = os.geteuid() == 0
RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A place for one cluster, which is removed at the end whatever the test did."""
    path = scratch / request.node.name
    yield path
    Server(path).remove()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def value(dsn: str, query: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def test_up_twice_starts_once(home: Path) -> None:
    server = Server(home, settings=FAST)
    server.up()
    started = value(server.dsn(), "select pg_postmaster_start_time()")
    Server(home).up()
    assert value(server.dsn(), "select pg_postmaster_start_time()") == started


def test_down_keeps_the_data(home: Path) -> None:
    server = Server(home, settings=FAST)
    server.up()
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("create table kept as select 42 as answer")
    assert server.down()
    assert not server.is_running()
    assert not server.down()
    server.up()
    assert value(server.dsn(), "select answer from kept") == 42


def test_two_starts_at_once_make_one_cluster(home: Path) -> None:
    failures = []

    def start() -> None:
        try:
            Server(home, settings=FAST).up()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert Server(home).is_running()


def test_a_killed_server_comes_up_again(home: Path) -> None:
    server = Server(home, settings=FAST)
    server.up()
    pid = int((server.data / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    # Its other processes notice, and PostgreSQL starts no second server beside them.
    deadline = time.monotonic() + 30
    while True:
        try:
            server.up()
            break
        except (PgvaeError, psycopg.OperationalError):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert value(server.dsn(), "select 1") == 1


def test_what_a_killed_run_of_the_tests_left_goes_with_the_next_one(scratch: Path) -> None:
    parent = scratch / "runs"
    parent.mkdir()
    process = subprocess.Popen(["true"])
    process.wait()
    server = Server(parent / f"pgvae-test-{process.pid}-abc" / "server", settings=FAST)
    server.up()
    # In the server's own folder, and not in the system's shared memory.
    assert list((server.data / "pg_dynshmem").iterdir())
    mine = make_folder(parent)
    assert list(parent.iterdir()) == [mine]
    assert not server.is_running()
    assert make_folder(parent) != mine
    assert mine.exists()


def test_an_interrupted_initdb_is_repeated(home: Path) -> None:
    (home / "data.new").mkdir(parents=True)
    (home / "data.new" / "half").write_text("")
    Server(home, settings=FAST).up()
    assert Server(home).is_running()


def test_remove_takes_only_what_was_made(home: Path) -> None:
    server = Server(home, settings=FAST)
    server.up()
    (home / "notes.txt").write_text("mine")
    server.remove()
    assert [path.name for path in home.iterdir()] == ["notes.txt"]
    server.remove()


def test_dsn_of_a_server_that_is_down(home: Path) -> None:
    with pytest.raises(PgvaeError, match="the embedded server is not running") as caught:
        Server(home).dsn()
    assert "pgvae up" in str(caught.value.hint)
    assert not home.exists()


def test_status_of_nothing_up_and_down(home: Path) -> None:
    server = Server(home, settings=FAST)
    status = server.status()
    assert (status.exists, status.running, status.dsn) == (False, False, None)
    server.up()
    status = server.status()
    assert (status.exists, status.running, status.port, status.tcp_dsn) == (True, True, None, None)
    assert status.version
    assert status.version[:2].isdigit()
    server.down()
    assert server.status().exists
    assert not server.status().running


def test_only_a_socket_that_nobody_else_can_enter(server: Server) -> None:
    assert value(server.dsn(), "show listen_addresses") == ""
    directory = Path(str(value(server.dsn(), "show unix_socket_directories")).strip('"'))
    assert directory.stat().st_mode & 0o777 == 0o700


def test_encoding_and_locale(server: Server) -> None:
    assert value(server.dsn(), "show server_encoding") == "UTF8"
    query = "select datcollate from pg_database where datname = 'pgvae'"
    assert str(value(server.dsn(), query)).replace("-", "").lower() == "c.utf8"


def test_a_port_asks_for_the_password(home: Path, port: int) -> None:
    server = Server(home, settings=FAST)
    server.up(port)
    tcp = server.tcp_dsn()
    assert tcp
    assert value(tcp, "select 1") == 1
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(f"host=localhost port={port} user=postgres dbname=pgvae password=wrong")
    assert (home / "password").stat().st_mode & 0o777 == 0o600
    password = (home / "password").read_text().strip()
    assert password not in server.log.read_text()
    assert value(server.dsn(), "select rolpassword from pg_authid where rolname = 'postgres'") != password
    server.down()
    server.up()
    assert server.status().port == port
    server.up(0)
    assert server.tcp_dsn() is None
    assert value(server.dsn(), "show listen_addresses") == ""


def test_a_full_disk_leaves_port_and_password_as_they_were_or_none(home: Path) -> None:
    server = Server(home)
    home.mkdir()
    server._write_state(5433)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(PgvaeError, match="cannot write"):
            server._write_state(None)
        with pytest.raises(PgvaeError, match="cannot write"):
            server._set_password()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert server.status().port == 5433
    assert [path.name for path in home.iterdir()] == ["server.json"]


def test_a_taken_port_leaves_the_server_up(home: Path) -> None:
    server = Server(home, settings=FAST)
    server.up()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(PgvaeError, match=f"port {taken}"):
            server.up(taken)
        assert server.is_running()
        server.down()
        with pytest.raises(PgvaeError, match=f"port {taken}"):
            server.up(taken)
    server.up()
    assert server.status().port is None


def test_an_impossible_port(home: Path) -> None:
    with pytest.raises(PgvaeError, match="port 70000"):
        Server(home).up(70000)
    assert not home.exists()


def test_a_long_home_puts_the_socket_elsewhere(scratch: Path) -> None:
    server = Server(scratch / ("long " * 30).strip(), settings=FAST)
    try:
        server.up()
        directory = Path(str(value(server.dsn(), "show unix_socket_directories")).strip('"'))
        assert server.home not in directory.parents
        assert directory.stat().st_mode & 0o777 == 0o700
    finally:
        server.remove()
    assert not directory.exists()
    assert not server.home.exists()


def test_a_socket_directory_of_somebody_else_is_refused(home: Path) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run").chmod(0o777)
    with pytest.raises(PgvaeError, match="is not a private folder"):
        Server(home, settings=FAST).up()


def test_data_of_somebody_else_is_left_alone(scratch: Path) -> None:
    data = scratch / "other" / "data"
    data.mkdir(parents=True)
    (data / "precious").write_text("")
    with pytest.raises(PgvaeError, match="was not made by pgvae"):
        Server(scratch / "other").up()
    Server(scratch / "other").remove()
    assert (data / "precious").exists()


def test_the_callers_environment_does_not_reach_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "/nowhere")
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    server = Server(home, settings=FAST)
    server.up()
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("create extension plpython3u")
        connection.execute(
            "do $$ import os, sys, numpy; assert '/nowhere' not in sys.path; assert 'SECRET_TOKEN' not in os.environ; "
            "assert sys.prefix == '/usr', sys.prefix $$ language plpython3u"
        )


def test_settings_reach_the_server(server: Server) -> None:
    assert value(server.dsn(), "show fsync") == "off"


def test_the_installation_of_a_version_that_is_not_there() -> None:
    with pytest.raises(PgvaeError, match="PostgreSQL 99") as caught:
        find_bindir(99)
    assert "postgresql-99" in str(caught.value.hint)


def test_plpython_is_looked_for(server_without_plpython: Server) -> None:
    assert has_plpython(find_bindir())
    assert not has_plpython(server_without_plpython.bindir)


@pytest.mark.skipif(not AS_ROOT, reason="only root's server runs as somebody else")
def test_root_runs_it_as_postgres(server: Server) -> None:
    pid = int((server.data / "postmaster.pid").read_text().split()[0])
    assert pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name == "postgres"


@pytest.mark.skipif(not AS_ROOT, reason="only root's server runs as somebody else")
def test_root_is_told_of_a_home_that_postgres_cannot_reach() -> None:
    with tempfile.TemporaryDirectory() as closed:
        with pytest.raises(PgvaeError, match="cannot enter") as caught:
            Server(Path(closed) / "home").up()
        assert closed in caught.value.message
        assert not list(Path(closed).iterdir())


def test_somebody_without_rights(server: Server, scratch: Path) -> None:
    """An unprivileged login has a server of its own, and is refused root's."""
    if not AS_ROOT:
        pytest.skip("needs root to become somebody else")
    nobody = pwd.getpwnam("nobody")

    def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pgvae.cli", *arguments],
            env={"PGVAE_HOME": str(home), "PATH": os.environ["PATH"], "COLUMNS": "300"},
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
        )

    try:
        readable = run(scratch, "--help").returncode == 0
    except PermissionError:
        readable = False
    if not readable:
        pytest.skip("this checkout cannot be read by an unprivileged login")
    own = scratch / "nobody"
    own.mkdir()
    os.chown(own, nobody.pw_uid, nobody.pw_gid)
    try:
        done = run(own, "up")
        assert done.returncode == 0, done.stderr
        done = run(own, "psql", "-XAtc", "select current_user")
        assert done.stdout.strip() == "postgres"
        done = run(own, "status")
        assert "embedded server: up" in done.stdout
    finally:
        done = run(own, "down", "--remove", "--yes")
    assert done.returncode == 0, done.stderr
    done = run(server.home, "status")
    assert done.returncode == 1
    assert "belongs to another user" in done.stderr


def test_the_commands(run_cli: RunCli, home: Path) -> None:
    env = {"PGVAE_HOME": str(home)}
    assert "embedded server: none" in run_cli("status", env=env).stdout
    assert "not running" in run_cli("doctor", env=env).stderr
    done = run_cli("up", env=env)
    assert done.returncode == 0, done.stderr
    assert f"in {home}" in done.stdout
    status = run_cli("status", env=env).stdout
    assert "embedded server: up" in status
    assert "pgvae is not installed" in status
    done = run_cli("psql", "-X", "-A", "-t", "-c", "select 6 * 7", env=env)
    assert done.stdout.strip() == "42"
    assert "is down" in run_cli("down", env=env).stdout
    assert "was not running" in run_cli("down", env=env).stdout
    assert "embedded server: down" in run_cli("status", env=env).stdout
    refused = run_cli("down", "--remove", input="n\n", env=env)
    assert refused.returncode == 1
    assert home.exists()
    assert "is removed" in run_cli("down", "--remove", "--yes", env=env).stdout
    assert not home.exists()


def test_a_string_that_is_no_dsn_is_no_lost_connection(run_cli: RunCli) -> None:
    done = run_cli("status", dsn="shop")
    assert done.returncode == 1
    assert 'error: the connection string is none: missing "=" after "shop"' in done.stderr
    assert "postgresql://" in done.stderr


def test_a_terminal_without_utf8_shows_question_marks(database: str, run_cli: RunCli) -> None:
    done = run_cli("status", dsn=database, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "select * from vae.create_model(?)" in done.stdout


@pytest.mark.parametrize("command", ["up", "status", "down", "psql"])
def test_a_home_that_is_a_file_is_refused(run_cli: RunCli, tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    for path in (file, file / "beneath"):
        done = run_cli(command, env={"PGVAE_HOME": str(path)})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: PGVAE_HOME is {path}: Not a directory")
    assert file.read_text() == "no folder"


def test_somebody_without_a_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for name in ("PGVAE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PgvaeError, match="has no home folder") as caught:
        Server.default()
    assert caught.value.hint == "set HOME to a folder that this user may write to"


def test_status_of_another_server_needs_no_home(database: str, run_cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    done = run_cli("status", dsn=database, env={"PGVAE_HOME": str(file)})
    assert done.returncode == 0, done.stderr
    assert f"embedded server: PGVAE_HOME is {file}: Not a directory" in done.stdout
    assert "no model yet" in done.stdout


def test_status_of_a_database_with_pgvae(run_cli: RunCli, database: str, role: str) -> None:
    done = run_cli("status", dsn=database)
    assert done.returncode == 0, done.stderr
    assert "no model yet" in done.stdout
    done = run_cli("status", dsn=as_role(database, role))
    assert done.returncode == 0, done.stderr
    assert "cannot be read" in done.stdout


def test_psql_keeps_the_password_out_of_its_arguments(run_cli: RunCli, home: Path, port: int) -> None:
    server = Server(home, settings=FAST)
    server.up(port)
    done = run_cli("psql", "-XAt", "-c", r"\! tr '\0' ' ' < /proc/$PPID/cmdline", dsn=server.tcp_dsn())
    assert "psql" in done.stdout
    assert (home / "password").read_text().strip() not in done.stdout
