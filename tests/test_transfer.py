"""A version carried to another database as a file: the same scores, and every damage refused."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from safetensors import safe_open
from safetensors.numpy import save_file

from conftest import as_role, create_database, drop_database
from pgvae.errors import PgvaeError
from pgvae.server import Server
from pgvae.transfer import export_version, import_version, read_file
from shop import QUICK, SMALL, Shop
from variants import publish_network, rewritten

Connection = psycopg.Connection[Any]
RunCli = Callable[..., subprocess.CompletedProcess[str]]


def make_shop(connection: Connection, model: str, **options: Any) -> None:
    """Makes a shop with features of users and items, and a model of it."""
    Shop().make(connection)
    connection.execute(
        "create table users as"
        " select distinct user_id, (user_id % 5)::int as age, array['DE', 'FR'] as tags from events"
    )
    connection.execute("create table items as select distinct item_id, item_id % 3 as price from events")
    Shop().create_model(connection, model, users="users", items="items", options=SMALL | options)


@pytest.fixture(scope="module")
def source(server: Server, template: str, scratch: Path) -> Iterator[tuple[str, Path]]:
    """A database with a published version, and the file that was exported from it."""
    create_database(server, "transfer_source", template)
    dsn = server.dsn("transfer_source")
    with psycopg.connect(dsn, autocommit=True) as connection:
        make_shop(connection, "shop")
        publish_network(dsn, "shop", QUICK, 7)
        connection.execute(
            "insert into vae.metrics select version_id, 'pgvae', 'temporal', 'ndcg', 20, 1.0 / 3, 0.1, 0.5, 30, 'all'"
            " from vae.versions"
        )
        connection.execute("select * from vae.activate('shop', 1)")
    path = scratch / "shop.safetensors"
    with psycopg.connect(dsn) as connection:
        assert export_version(connection, "shop", path).bytes == path.stat().st_size
    yield dsn, path
    drop_database(server, "transfer_source")


def count(connection: Connection) -> Any:
    return connection.execute("select count(*) from vae.versions").fetchone()


def test_a_version_scores_alike_in_another_database(
    source: tuple[str, Path], connection: Connection, run_cli: RunCli, tmp_path: Path
) -> None:
    dsn, _ = source
    path = tmp_path / "shop v1.safetensors"
    done = run_cli("export", "shop", str(path), "--version", "1", dsn=dsn)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote version 1 of model shop to {path}, ")
    make_shop(connection, "store")
    publish_network(connection.info.dsn, "store", QUICK, 1)
    done = run_cli("import", str(path), "--model", "store", dsn=connection.info.dsn)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "imported as version 2 of model store: version 1 of model shop in database transfer_source, published "
    )
    assert connection.execute("select state, version from vae.versions order by version").fetchall() == [
        ("ready", 1),
        ("ready", 2),
    ]
    origin = connection.execute("select origin from vae.versions where version = 2").fetchone()[0]  # type: ignore[index]
    assert (origin["database"], origin["model"], origin["version"], origin["exported_by"]) == (
        "transfer_source",
        "shop",
        1,
        "postgres",
    )
    assert origin["imported_from"] == path.name
    assert connection.execute("select passed, golden_users from vae.verify('store', 2)").fetchall() == [(True, 32)]
    connection.execute("select * from vae.activate('store', 2)")
    with psycopg.connect(dsn) as original:
        for user in Shop().users[:10]:
            rows = original.execute("select rank, item_id, score from shop.recommend(%s, k => 12)", [user]).fetchall()
            assert rows
            again = connection.execute("select rank, item_id, score from store.recommend(%s, k => 12)", [user])
            assert again.fetchall() == rows
        # Everything that a version is but for what this database gave it.
        for query in (
            "select to_jsonb(v) - array['version_id', 'version', 'state', 'created_at', 'activated_at', 'origin']"
            " from vae.versions v where version_id = %s",
            "select method, split, slice, metric, k, value, lower, upper, user_count from vae.metrics"
            " where version_id = %s",
            "select name, chunk, dtype, shape, data from vae_private.tensors where version_id = %s order by 1, 2",
            "select item_index, item_key from vae_private.items where version_id = %s order by 1",
        ):
            theirs = original.execute(query, [1]).fetchall()
            assert theirs
            assert connection.execute(query, [2]).fetchall() == theirs, query


def test_an_imported_version_remembers_its_first_origin(
    source: tuple[str, Path], connection: Connection, tmp_path: Path
) -> None:
    make_shop(connection, "shop")
    with psycopg.connect(connection.info.dsn) as importing:
        import_version(importing, source[1])
    path = tmp_path / "again"
    with psycopg.connect(connection.info.dsn) as exporting:
        export_version(exporting, "shop", path)
    origin = read_file(path)[0]["origin"]
    assert origin["database"] == connection.info.dbname
    assert origin["origin"]["database"] == "transfer_source"
    assert origin["trained_at"] == origin["origin"]["created_at"] < origin["created_at"]


def test_an_imported_version_looks_ahead_as_where_it_was_trained(
    source: tuple[str, Path], connection: Connection, tmp_path: Path
) -> None:
    make_shop(connection, "shop")
    trained_at = "2025-01-02T03:04:05+00:00"

    def earlier(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        document["origin"]["trained_at"] = trained_at

    with psycopg.connect(connection.info.dsn) as importing:
        import_version(importing, rewritten(source[1], tmp_path / "earlier", earlier))
    versions = "select created_at = %s::timestamptz from vae_private.{}"
    assert connection.execute(versions.format("published_versions"), [trained_at]).fetchall() == [(True,)]
    connection.execute("select * from vae.activate('shop', 1, force => true)")
    assert connection.execute(versions.format("scoring_versions"), [trained_at]).fetchall() == [(True,)]


def test_a_file_whose_bytes_changed_is_refused(source: tuple[str, Path], tmp_path: Path) -> None:
    whole = source[1].read_bytes()
    read_file(source[1])
    generator = random.Random(1)
    damaged = tmp_path / "damaged"
    header = int.from_bytes(whole[:8], "little")
    places = {0, 8, header + 7, len(whole) - 1}
    places |= {generator.randrange(header + 8) for _ in range(150)}
    places |= {generator.randrange(header + 8, len(whole)) for _ in range(100)}
    for place in sorted(places):
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        damaged.write_bytes(changed)
        with pytest.raises(PgvaeError) as caught:
            read_file(damaged)
        assert caught.value.hint, place


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.2, 0.5, 0.999])
def test_half_a_file_is_refused(source: tuple[str, Path], tmp_path: Path, share: float) -> None:
    whole = source[1].read_bytes()
    half = tmp_path / "half"
    half.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(PgvaeError, match="is no whole safetensors file") as caught:
        read_file(half)
    assert "nothing was imported" in str(caught.value.hint)


def test_what_does_not_fit_the_model_is_refused(
    source: tuple[str, Path], connection: Connection, tmp_path: Path, run_cli: RunCli
) -> None:
    _, path = source
    done = run_cli("import", str(path), dsn=connection.info.dsn)
    assert done.returncode == 1
    assert 'error: model "shop" does not exist [SQLSTATE VA001]' in done.stderr
    Shop(item_type="text").make(connection)
    Shop(item_type="text").create_model(connection)
    with pytest.raises(PgvaeError, match=r"keys of items differ: bigint in .*, text in model shop"):
        import_version(connection, path)
    Shop(schema="words", user_type="text").make(connection)
    Shop(schema="words", user_type="text").create_model(connection, "members")
    with pytest.raises(PgvaeError, match=r"keys of users differ: bigint in .*, text in model members"):
        import_version(connection, path, model="members")
    connection.execute("drop table events cascade")
    make_shop(connection, "short", max_history=50)
    with pytest.raises(PgvaeError, match="reads 500 events of a user, model short 50"):
        import_version(connection, path, model="short")
    assert count(connection) == (0,)


def test_what_another_release_or_program_wrote_is_refused(
    source: tuple[str, Path], connection: Connection, tmp_path: Path
) -> None:
    _, path = source
    make_shop(connection, "shop")
    target = tmp_path / "other"

    def refused(change: Callable[[dict[str, Any], dict[str, Any]], None], message: str) -> None:
        with pytest.raises(PgvaeError, match=message), connection.transaction():
            import_version(connection, rewritten(path, target, change))
        assert count(connection) == (0,)

    refused(lambda d, t: d["version"].update(format=99), "has tensor format 99, this pgvae scores format")
    refused(lambda d, t: d["version"].update(mood="good"), r"holds vae.versions.mood, which this release does not know")
    refused(lambda d, t: d["rows"].update({"public.events": []}), "holds rows of public.events, which is no part")
    refused(
        lambda d, t: d["version"].update(created_by="me"), "gives the version a created_by, which only the database"
    )
    refused(lambda d, t: t.pop("catalogue"), "names 0 items, its weights are of 12")
    refused(lambda d, t: t.pop("mean_bias"), "do not fit together: tensor 'mean_bias' is missing")
    refused(lambda d, t: t.update(mean_bias=t["mean_bias"][1:]), "tensor 'mean_bias' is missing or has the wrong shape")
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    _, tensors = read_file(path)
    for other, message in (
        (metadata | {"format": "pgvae version 2"}, "is of the format 'pgvae version 2', this pgvae reads"),
        ({"format": "pt"}, "was not written by pgvae export"),
        (None, "was not written by pgvae export"),
    ):
        save_file(tensors, target, metadata=other)
        with pytest.raises(PgvaeError, match=message):
            read_file(target)
    for other in (tensors | {"more": tensors["mean_bias"]}, {k: t for k, t in tensors.items() if k != "mean_bias"}):
        save_file(other, target, metadata=metadata)
        with pytest.raises(PgvaeError, match="was altered: it holds other tensors than it says"):
            read_file(target)
    with pytest.raises(PgvaeError, match="does not exist"):
        read_file(tmp_path / "nothing")


def test_an_export_leaves_a_file_that_is_there_alone(source: tuple[str, Path], tmp_path: Path) -> None:
    dsn, _ = source
    path = tmp_path / "mine"
    path.write_text("mine")
    with psycopg.connect(dsn) as connection:
        with pytest.raises(PgvaeError, match="exists already"):
            export_version(connection, "shop", path)
        assert path.read_text() == "mine"
    with psycopg.connect(dsn) as connection:
        export_version(connection, "shop", path, overwrite=True)
        assert read_file(path)[0]["model"]["name"] == "shop"
    with psycopg.connect(dsn) as connection, pytest.raises(PgvaeError, match="cannot write"):
        export_version(connection, "shop", tmp_path / "no" / "folder")
    with psycopg.connect(dsn) as connection, pytest.raises(PgvaeError, match="has no version 9"):
        export_version(connection, "shop", tmp_path / "x", version=9)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine"]


def test_an_operator_exports_and_a_reader_does_not(source: tuple[str, Path], role: str, tmp_path: Path) -> None:
    dsn, _ = source
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            sql.SQL("grant vae_reader to {0}; grant usage on schema shop to {0}").format(sql.Identifier(role))
        )
        with psycopg.connect(as_role(dsn, role)) as reader, pytest.raises(psycopg.errors.InsufficientPrivilege):
            export_version(reader, "shop", tmp_path / "x")
        admin.execute(sql.SQL("grant vae_operator to {}").format(sql.Identifier(role)))
        with psycopg.connect(as_role(dsn, role)) as operator:
            assert export_version(operator, "shop", tmp_path / "x").version == 1
        with psycopg.connect(as_role(dsn, role)) as operator, pytest.raises(psycopg.errors.InsufficientPrivilege):
            import_version(operator, tmp_path / "x")
        admin.execute(sql.SQL("revoke usage on schema shop from {}").format(sql.Identifier(role)))
        with psycopg.connect(as_role(dsn, role)) as operator, pytest.raises(PgvaeError, match="may not be read"):
            export_version(operator, "shop", tmp_path / "y")
        admin.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))
