"""The memory map that a server's sessions share: one copy of the weights, and never a wrong one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from pgvae.server import Server
from pgvae_runtime import mapping

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


def forge(path: Path) -> None:
    """Gives a map other weights, which nothing in it tells."""
    content = bytearray(path.read_bytes())
    header = json.loads(content[16 : 16 + int.from_bytes(content[8:16], "little")])
    _, (items,), offset = header["tensors"]["output_bias"]
    content[offset : offset + 4 * items] = np.linspace(-9, 9, items, dtype="<f4").tobytes()
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def be_of_another_format(path: Path) -> None:
    path.write_bytes(b"pgvae-0\n" + path.read_bytes()[8:])


def be_of_another_version(path: Path) -> None:
    content = path.read_bytes()
    digest = json.loads(content[16 : 16 + int.from_bytes(content[8:16], "little")])["digest"].encode()
    path.write_bytes(content.replace(digest, digest[::-1], 1))


def link(path: Path) -> None:
    real = path.with_name("elsewhere")
    path.rename(real)
    path.symlink_to(real)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, 65_534, 65_534)
    path.chmod(0o644)


def open_to_the_group(path: Path) -> None:
    path.chmod(0o660)


def open_to_others(path: Path) -> None:
    path.chmod(0o606)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    os.chown(path, path.parent.stat().st_uid, path.parent.stat().st_gid)


@pytest.mark.parametrize(
    "tamper",
    [
        overwrite,
        truncate,
        empty,
        be_of_another_format,
        be_of_another_version,
        link,
        give_away,
        open_to_the_group,
        open_to_others,
        become_a_folder,
        Path.unlink,
    ],
)
def test_a_map_that_the_server_did_not_write_is_never_scored_with(
    server: Server, trained_database: str, trained: psycopg.Connection, user: int, tamper: Callable[[Path], None]
) -> None:
    answer = trained.execute(QUERY, [user]).fetchall()
    (path,) = maps(server, trained)
    forge(path)
    with psycopg.connect(trained_database) as fresh:
        assert fresh.execute(QUERY, [user]).fetchall() != answer, "who can write the server's own files can forge"
    tamper(path)
    try:
        with psycopg.connect(trained_database) as fresh:
            assert fresh.execute(QUERY, [user]).fetchall() == answer
    finally:
        if path.is_dir():
            path.rmdir()
        (path.with_name("elsewhere")).unlink(missing_ok=True)


def test_of_a_map_that_cannot_be_finished_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "folder" / "map"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "replace", fail)
        mapping.write_map(path, "digest", {"a": np.ones(3, dtype="<f4")})
    assert list(path.parent.iterdir()) == []
    assert path.parent.stat().st_mode & 0o777 == 0o700
    mapping.write_map(path, "digest", {"a": np.ones(3, dtype="<f4")})
    assert path.stat().st_mode & 0o777 == 0o600
    assert [array.tolist() for array in (mapping.read_map(path, "digest") or {}).values()] == [[1.0, 1.0, 1.0]]


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
    of_another_database = before[0].with_name("pgsql_tmp_pgvae_1_1_0123")
    of_another_database.touch()
    train_and_activate(trained_database)
    trained.execute(QUERY, [user])
    after = maps(server, trained)
    assert of_another_database.exists()
    of_another_database.unlink()
    assert len(before) == len(after) == 1
    assert before != after
