"""The memory map that a server's sessions share: one copy of the weights, and never a wrong one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgvae.server import Server

QUERY = "select rank, item_id, score from shop.recommend(%s, k => 5) order by rank"


@pytest.fixture
def user(trained: psycopg.Connection) -> int:
    row = trained.execute("select min(user_id) from public.events").fetchone()
    assert row is not None
    return int(row[0])


def maps(server: Server, connection: psycopg.Connection) -> list[Path]:
    """The map files of the connection's database."""
    row = connection.execute("select oid from pg_database where datname = current_database()").fetchone()
    assert row is not None
    return sorted((server.data / "base" / "pgsql_tmp").glob(f"pgsql_tmp_pgvae_{row[0]}_*"))


def test_sessions_share_one_map_of_the_weights(
    server: Server, trained_database: str, trained: psycopg.Connection, user: int
) -> None:
    answer = trained.execute(QUERY, [user]).fetchall()
    (path,) = maps(server, trained)
    assert path.stat().st_mode & 0o777 == 0o600
    written = path.stat().st_mtime_ns
    with psycopg.connect(trained_database) as second:
        assert second.execute(QUERY, [user]).fetchall() == answer
        assert path.stat().st_mtime_ns == written
        for connection in (trained, second):
            lines = Path(f"/proc/{connection.info.backend_pid}/maps").read_text()
            assert re.search(rf"r--s .*{path.name}", lines), "the weights are mapped, shared and read-only"


def overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def link(path: Path) -> None:
    real = path.with_name("elsewhere")
    path.rename(real)
    path.symlink_to(real)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, 65_534, 65_534)
    path.chmod(0o666)


def open_to_others(path: Path) -> None:
    path.chmod(0o666)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    os.chown(path, path.parent.stat().st_uid, path.parent.stat().st_gid)


@pytest.mark.parametrize(
    "tamper", [overwrite, truncate, empty, link, give_away, open_to_others, become_a_folder, Path.unlink]
)
def test_a_map_that_the_server_did_not_write_is_never_scored_with(
    server: Server, trained_database: str, trained: psycopg.Connection, user: int, tamper: Callable[[Path], None]
) -> None:
    answer = trained.execute(QUERY, [user]).fetchall()
    (path,) = maps(server, trained)
    tamper(path)
    try:
        with psycopg.connect(trained_database) as fresh:
            assert fresh.execute(QUERY, [user]).fetchall() == answer
    finally:
        if path.is_dir():
            path.rmdir()
        (path.with_name("elsewhere")).unlink(missing_ok=True)


def test_without_room_for_the_map_a_notice_says_so_and_the_answer_is_right(
    server: Server, trained_database: str, trained: psycopg.Connection, user: int
) -> None:
    answer = trained.execute(QUERY, [user]).fetchall()
    (path,) = maps(server, trained)
    folder = path.parent
    path.unlink()
    mode = folder.stat().st_mode
    folder.chmod(0o500)
    try:
        notices: list[str] = []
        with psycopg.connect(trained_database) as fresh:
            fresh.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary or ""))
            assert fresh.execute(QUERY, [user]).fetchall() == answer
        assert any("cannot be shared" in notice for notice in notices)
    finally:
        folder.chmod(mode)


def test_the_map_of_a_version_goes_when_another_one_is_scored(
    server: Server, trained_database: str, trained: psycopg.Connection, user: int
) -> None:
    from shop import train_and_activate

    trained.execute(QUERY, [user])
    before = maps(server, trained)
    train_and_activate(trained_database)
    trained.execute(QUERY, [user])
    after = maps(server, trained)
    assert len(before) == len(after) == 1
    assert before != after
