"""What the database says of pgvae: comments, declarations, the schema that installs and uninstalls leave."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from conftest import FAST
from pgvae import resources
from pgvae.errors import PgvaeError
from pgvae.install import install, uninstall
from pgvae.schema import PRIVATE, PUBLIC, metadata
from pgvae.server import Server
from shop import Shop

# A model with every object that a model can have.
MODEL = "shop"


def make_model(connection: psycopg.Connection) -> None:
    """Makes a model of all tables: events, users and items."""
    Shop().make(connection)
    connection.execute("create table users (user_id bigint primary key)")
    connection.execute("create table items (item_id bigint primary key)")
    Shop().create_model(connection, MODEL, users="users", items="items")


@pytest.fixture(scope="module")
def described(shared: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a model of all tables, to look at."""
    make_model(shared)
    return shared


@pytest.fixture
def with_model(connection: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database with a model of all tables."""
    make_model(connection)
    return connection


@pytest.fixture(scope="module")
def lonely_server(scratch: Path) -> Iterator[Server]:
    """A server on which pgvae was never installed, so that its roles are made and removed."""
    lonely = Server(scratch / "lonely", settings=FAST)
    lonely.up()
    yield lonely
    lonely.remove()


def rows(connection: psycopg.Connection, query: str) -> list[str]:
    return [str(row[0]) for row in connection.execute(query).fetchall()]


def dump(server: Server, dsn: str) -> str:
    """Gives the schema of a database as pg_dump writes it, without the key that differs from run to run."""
    command = [server.bindir / "pg_dump", "--schema-only", "--dbname", dsn]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "".join(line for line in text.splitlines(keepends=True) if not re.match(r"\\(un)?restrict ", line))


def roles(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        return rows(
            connection,
            "select concat_ws(' ', r.rolname, r.rolcanlogin, m.roleid::regrole) from pg_roles r"
            " left join pg_auth_members m on m.member = r.oid order by 1",
        )


# Declarations

_ROUTINES = """
select p.oid::regprocedure::text
from pg_proc p
where p.pronamespace = any (array['vae', 'vae_private', 'shop']::regnamespace[])
"""


def test_there_are_routines_to_check(described: psycopg.Connection) -> None:
    found = rows(described, _ROUTINES)
    assert "shop.recommend(bigint,integer,jsonb)" in found
    assert "vae.refresh(text,text[],boolean)" in found
    assert len(found) > 35


def test_every_routine_has_a_comment(described: psycopg.Connection) -> None:
    assert rows(described, _ROUTINES + " and obj_description(p.oid, 'pg_proc') is null") == []


def test_every_routine_pins_its_search_path_but_those_that_commit(described: psycopg.Connection) -> None:
    unpinned = rows(
        described,
        _ROUTINES + " and not coalesce(p.proconfig, '{}') @> array['search_path=pg_catalog, pg_temp']",
    )
    assert sorted(unpinned) == [
        "vae.refresh(text,text[],boolean)",
        "vae_private.commit_refresh()",
        "vae_private.refresh_staged(text,text,text)",
    ]


def test_no_routine_can_be_executed_by_everybody(described: psycopg.Connection) -> None:
    open_to_all = _ROUTINES + (
        " and exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0)"
    )
    assert rows(described, open_to_all) == []


def test_immutable_functions_read_no_tables_clock_or_settings(described: psycopg.Connection) -> None:
    bodies = described.execute(
        "select p.proname, p.prosrc from pg_proc p where p.provolatile = 'i'"
        " and p.pronamespace = any (array['vae', 'vae_private', 'shop']::regnamespace[])"
    ).fetchall()
    assert bodies
    reads = re.compile(r"\b(from|join)\s+(vae|shop|pg_)|plpy|current_setting|\bnow\(|::timestamp|::date|::reg", re.I)
    # What stands in a comment or a literal is not what the function does.
    assert [name for name, body in bodies if reads.search(re.sub(r"--.*|'[^']*'", "", body))] == []


def test_what_is_security_definer_is_known(described: psycopg.Connection) -> None:
    assert sorted(rows(described, _ROUTINES + " and p.prosecdef")) == [
        "vae_private.clear_staged(text)",
        "vae_private.log_activation()",
        "vae_private.log_drop()",
        "vae_private.refresh_view(integer,text,text)",
        "vae_private.staged_rows_of(integer,text)",
        "vae_private.staged_run(integer,text)",
    ]


def test_every_function_in_sql_states_all_its_properties() -> None:
    wanted = {
        "volatility": r"\b(immutable|stable|volatile)\b",
        "null behaviour": r"\b(strict|called on null input)\b",
        "parallel safety": r"\bparallel (safe|restricted|unsafe)\b",
        "security": r"\bsecurity (invoker|definer)\b",
    }
    count = 0
    for path in resources.sql_files():
        text = path.read_text(encoding="utf-8")
        for header in re.findall(r"create or replace function (.*?)\bas (?:\$|%L)", text, re.DOTALL):
            count += 1
            missing = [name for name, pattern in wanted.items() if not re.search(pattern, header)]
            assert not missing, f"{path.name}: {header.split('(')[0]} does not state {missing}"
    assert count == sum(path.read_text().count("create or replace function") for path in resources.sql_files())


def test_what_the_database_says_reaches_a_client_of_any_encoding() -> None:
    """A hint that a client's encoding lacks a character of takes the whole error along."""
    for path in resources.sql_files():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.isascii() or line.strip().startswith(("--", "#")), f"{path.name}: {line}"
    for name, source in resources.runtime_modules().items():
        tree = ast.parse(source)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        told = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in told:
                assert node.value.isascii(), f"{name}: {node.value}"


def test_every_relation_and_column_has_a_comment(described: psycopg.Connection) -> None:
    relations = (
        "select c.oid::regclass from pg_class c where c.relkind in ('r', 'p', 'v', 'm', 'f')"
        " and c.relnamespace = any (array['vae', 'vae_private', 'shop']::regnamespace[])"
    )
    assert {"vae.models", "shop.refresh_events", "shop.recommendations"} <= set(rows(described, relations))
    assert rows(described, relations + " and obj_description(c.oid, 'pg_class') is null") == []
    internal = rows(described, relations + " and obj_description(c.oid, 'pg_class') like 'Internal: %'")
    helpers = "select format('shop.%I', o.object) from vae_private.model_objects(1) o where not o.is_public"
    assert set(internal) == set(rows(described, helpers))
    # What the views of vae_private give is described where the tables beneath are.
    columns = rows(
        described,
        "select format('%s.%I', c.oid::regclass, a.attname) from pg_class c join pg_attribute a on a.attrelid = c.oid"
        " where c.relkind in ('r', 'p', 'v', 'm', 'f') and a.attnum > 0 and not a.attisdropped"
        " and c.relnamespace = any (array['vae', 'vae_private', 'shop']::regnamespace[])"
        " and not (c.relkind = 'v' and c.relnamespace = 'vae_private'::regnamespace)"
        " and col_description(c.oid, a.attnum) is null",
    )
    assert columns == []


def test_every_schema_has_a_comment(described: psycopg.Connection) -> None:
    uncommented = (
        "select nspname from pg_namespace where nspname in ('vae', 'vae_private', 'shop')"
        " and obj_description(oid, 'pg_namespace') is null"
    )
    assert rows(described, uncommented) == []


# Installing and removing


def test_the_migrations_add_up_to_the_metadata(database: str) -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database), poolclass=NullPool)
    options = {
        "include_schemas": True,
        "include_name": lambda name, kind, parents: kind != "schema" or name in (PUBLIC, PRIVATE),
        "version_table_schema": PUBLIC,
        "compare_type": True,
        "compare_server_default": True,
    }
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_a_second_install_changes_nothing(server: Server, database: str, with_model: psycopg.Connection) -> None:
    before = dump(server, database)
    assert "shop.recommendations" in before
    installed = install(database)
    assert (installed.models, installed.warnings) == (1, [])
    assert dump(server, database) == before


def test_an_upgrade_takes_away_what_an_earlier_release_gave(
    server: Server, database: str, with_model: psycopg.Connection
) -> None:
    before = dump(server, database)
    with_model.execute(
        "grant usage on schema vae_private to vae_reader;"
        " grant all on all tables in schema vae, vae_private to vae_scorer;"
        " grant execute on all routines in schema vae, vae_private"
        " to vae_reader, vae_scorer, vae_operator, vae_trainer, public;"
        " create function vae_private.scheduled_jobs() returns table ("
        " model text, job_id bigint, job_name text, schedule text, command text, runs_as text, is_active boolean,"
        " last_started_at timestamptz, last_finished_at timestamptz, last_status text, last_message text)"
        " language sql as 'select * from vae_private.cron_jobs(false)';"
        " create or replace view vae.schedules as select s.* from vae_private.scheduled_jobs() s"
    )
    assert install(database).warnings == []
    assert dump(server, database) == before


def test_a_model_whose_table_is_gone_stops_no_upgrade(database: str, with_model: psycopg.Connection) -> None:
    Shop(events="other_events").make(with_model)
    Shop(events="other_events").create_model(with_model, "other")
    with_model.execute("drop table events cascade")
    installed = install(database)
    assert installed.models == 1
    assert len(installed.warnings) == 1
    assert "model shop is not rebuilt" in installed.warnings[0]
    assert "vae.rebuild_model('shop')" in installed.warnings[0]
    assert rows(with_model, "select count(*) from other.clean_events") == ["372"]
    Shop().make(with_model)
    assert install(database).models == 2
    assert rows(with_model, "select 'shop.clean_events'::regclass") == ["shop.clean_events"]


def test_two_installations_at_once_whatever_the_database_has_as_its_isolation(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"alter database {name} set default_transaction_isolation = 'serializable'".encode())
    # A snapshot from before the lock would see half of what the first one made.
    with ThreadPoolExecutor(2) as threads:
        assert [done.models for done in threads.map(install, [empty_database] * 2)] == [0, 0]


def test_uninstall_leaves_what_was_there_before(lonely_server: Server) -> None:
    dsn = lonely_server.dsn("postgres")
    with psycopg.connect(dsn, autocommit=True) as connection:
        Shop().make(connection)
    before, roles_before = dump(lonely_server, dsn), roles(dsn)
    install(dsn)
    assert "vae_trainer f vae_operator" in roles(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        Shop().create_model(connection, MODEL)
    assert dump(lonely_server, dsn) != before
    assert uninstall(dsn) == []
    assert dump(lonely_server, dsn) == before
    assert roles(dsn) == roles_before


def test_uninstall_keeps_an_extension_that_was_there_before(lonely_server: Server) -> None:
    dsn = lonely_server.dsn("template1")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create extension plpython3u")
        install(dsn)
        assert uninstall(dsn) == []
        assert rows(connection, "select extname from pg_extension where extname = 'plpython3u'") == ["plpython3u"]
        connection.execute("drop extension plpython3u")


def test_uninstall_names_what_is_used_elsewhere(lonely_server: Server) -> None:
    dsn = lonely_server.dsn("postgres")
    install(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table of_the_shop ()")
        connection.execute("grant select on of_the_shop to vae_reader")
        connection.execute("create function of_the_shop() returns void language plpython3u as 'pass'")
        left = uninstall(dsn)
        assert [line.split(" is in use")[0] for line in left] == ["extension plpython3u", "role vae_reader"]
        assert "function of_the_shop()" in left[0]
        assert "table of_the_shop" in left[1]
        connection.execute("drop table of_the_shop")
        connection.execute("drop extension plpython3u cascade")
        connection.execute("drop role vae_reader")


def test_uninstall_refuses_where_a_view_uses_a_prediction(server: Server, database: str, with_model: object) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create view best as select * from shop.recommendations where rank = 1")
        connection.execute("create materialized view models as select * from vae.models")
        before = dump(server, database)
        with pytest.raises(PgvaeError, match="materialized view models, view best") as caught:
            uninstall(database)
        assert caught.value.hint == "drop them first"
        assert dump(server, database) == before
        with pytest.raises(psycopg.errors.DependentObjectsStillExist, match=r"shop\.recommendations"):
            connection.execute("select vae.drop_model('shop')")
        assert dump(server, database) == before


@pytest.mark.parametrize(
    ("query", "named"),
    [
        (
            "create function latest() returns setof vae.versions language sql as 'select * from vae.versions'",
            "latest()",
        ),
        ("create table notes (version_id bigint references vae.versions)", "on table notes"),
        ("create table snapshots (model vae.models, taken_at date)", "column model of table snapshots"),
        ("create table kept (kinds vae.event_types[])", "column kinds of table kept"),
    ],
)
def test_uninstall_refuses_where_it_would_take_something_of_others_along(
    server: Server, database: str, connection: psycopg.Connection, query: str, named: str
) -> None:
    connection.execute(query)
    before = dump(server, database)
    with pytest.raises(PgvaeError, match="other objects use pgvae") as caught:
        uninstall(database)
    assert named in caught.value.message
    assert dump(server, database) == before


def test_a_schema_of_that_name_that_is_not_pgvaes_is_left_alone(server: Server, empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create schema vae; create table vae.mine ()")
    before = dump(server, empty_database)
    with pytest.raises(PgvaeError, match="schema vae that is not pgvae's"):
        install(empty_database)
    assert dump(server, empty_database) == before


def test_uninstall_refuses_where_a_models_schema_holds_other_objects(
    server: Server, database: str, with_model: psycopg.Connection
) -> None:
    with_model.execute("create table shop.notes ()")
    before = dump(server, database)
    with pytest.raises(PgvaeError, match=r"table shop\.notes"):
        uninstall(database)
    assert dump(server, database) == before


def test_uninstall_says_where_there_is_nothing_to_remove(empty_database: str) -> None:
    with pytest.raises(PgvaeError, match="not installed"):
        uninstall(empty_database)
