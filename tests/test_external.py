"""Databases without PL/Python: installed without it, scored from outside, with the same rows as inside."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from conftest import as_role, create_database, drop_database
from pages import DOCS, Runner, blocks
from pgvae.cli.refresh import run_refresh
from pgvae.errors import PgvaeError
from pgvae.external import run
from pgvae.external.plpy import Error, Plpy, SPIError
from pgvae.external.stubs import VIEWS, without_python
from pgvae.install import install, uninstall
from pgvae.resources import sql_files
from pgvae.server import Server
from pgvae_runtime import api
from shop import SMALL, Shop, train, train_and_activate
from test_outcomes import HORIZON, SHOP

RunCli = Callable[..., subprocess.CompletedProcess[str]]

# Everything but when it was scored, and by which code: the first column, which is the view's key, names the row.
CONTENT = "select to_jsonb(r) - 'scored_at' - 'context' from shop.{} r order by {}"
KEYS = {"offer_responses": "user_id", "related_items": "item_id", "demand": "item_id"}
ROUTINES = """
select p.oid::regprocedure::text, pg_get_function_result(p.oid), p.provolatile, p.proisstrict, p.prosecdef,
    p.proparallel, p.proconfig::text, p.proacl::text, obj_description(p.oid)
from pg_proc p
where p.pronamespace in ('vae'::regnamespace, 'vae_private'::regnamespace)
order by 1
"""


def content(connection: psycopg.Connection, *views: str) -> dict[str, Any]:
    found = {}
    for view in views or VIEWS:
        key, relation = KEYS.get(view, "user_id"), f"{view}_materialized"
        rows = connection.execute(sql.SQL(CONTENT).format(sql.Identifier(relation), sql.Identifier(key)))
        found[view] = [row[0] for row in rows]
    return found


def are_close(left: Any, right: Any) -> bool:
    """Says whether both hold the same, as far as NumPy in the server and here round alike."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(are_close(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(are_close, left, right))
    return math.isclose(left, right, rel_tol=1e-4) if isinstance(left, float) else bool(left == right)


def log(connection: psycopg.Connection) -> dict[str, tuple[Any, ...]]:
    rows = connection.execute(
        "select distinct on (view) view, state, mode, row_count, version, error from vae.refreshes"
        " order by view, refresh_id desc"
    )
    return {view: tuple(others) for view, *others in rows}


@pytest.fixture(scope="module")
def external_template(server: Server, trained_template: str) -> Iterator[str]:
    """The name of a database with a trained shop that has lost PL/Python."""
    name = "pgvae_external_template"
    create_database(server, name, trained_template)
    install(server.dsn(name), external=True)
    with psycopg.connect(server.dsn(name), autocommit=True) as connection:
        connection.execute("drop extension plpython3u")
    yield name
    drop_database(server, name)


@pytest.fixture
def external(server: Server, external_template: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection, as superuser, to a fresh clone of that database."""
    create_database(server, "external", external_template)
    with psycopg.connect(server.dsn("external"), autocommit=True) as opened:
        yield opened
    drop_database(server, "external")


def test_scored_outside_the_rows_are_those_of_a_refresh_inside(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        SHOP.make(connection)
        connection.execute("create table users as select distinct user_id from events union all select 500::bigint")
        connection.execute("create table items as select distinct item_id, 'x' || item_id % 3 as category from events")
        SHOP.create_model(connection, options=SMALL | {"horizon_days": HORIZON}, users="users", items="items")
        train_and_activate(database)
        connection.execute("select vae.create_offer('shop', 'sale', array(select item_id from items limit 2))")
        connection.execute("call vae.refresh('shop')")
        inside = content(connection)
        logged = log(connection)
        assert all(inside.values())
    install(database, external=True)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("delete from vae.refreshes")
        document, failure = run_refresh(connection, "shop")
        assert failure is None
        assert are_close(content(connection), inside)
        assert log(connection) == logged
        assert {view["view"] for view in document["views"]} == set(VIEWS)
        assert connection.execute("select count(*) from vae_private.staged_rows").fetchone() == (0,)


def test_what_a_version_does_not_say_leaves_a_view_empty(external: psycopg.Connection) -> None:
    external.execute("delete from vae.refreshes")
    _, failure = run_refresh(external, "shop", ["churn"])
    assert failure is None
    assert log(external)["churn"] == ("succeeded", "full", 0, 1, None)


def test_the_page_runs_without_plpython_and_without_a_superuser(
    server_without_plpython: Server, run_cli: RunCli, folder: Path, psql_folder: Path
) -> None:
    create_database(server_without_plpython, "managed")
    with psycopg.connect(server_without_plpython.dsn("postgres"), autocommit=True) as admin:
        admin.execute("create role service login createrole")
        admin.execute("alter database managed owner to service")
    dsn = as_role(server_without_plpython.dsn("managed"), "service")
    refused = run_cli("install", dsn=dsn)
    assert refused.returncode == 1
    assert "pgvae install --external" in refused.stderr
    runner = Runner(dsn=dsn, bindir=psql_folder, folder=folder)
    install, *others = (block for block in blocks(DOCS / "external.md") if block.marked("not run") is None)
    runner.run(install)
    with psycopg.connect(dsn, autocommit=True) as connection:
        Shop().make(connection)
        Shop().create_model(connection)
    for block in others:
        runner.run(block)
    # An upgrade leaves it as it is.
    assert run_cli("install", dsn=dsn).returncode == 0
    assert run_cli("doctor", dsn=dsn).returncode == 0
    verified = run_cli("verify", "shop", dsn=dsn)
    assert verified.stdout.startswith("version 1 of model shop on cpu: the scores of ")
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert connection.execute("select count(distinct user_id) from shop.recommendations").fetchone() == (30,)
        for query in ("select shop.embedding(1)", "select * from shop.churn(1)", "select * from shop.related(1)"):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="has no PL/Python") as refusal:
                connection.execute(query)
            assert "pgvae refresh shop" in str(refusal.value.diag.message_hint)
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="pg_cron cannot refresh"):
            connection.execute("select vae.schedule('shop', '15 3 * * *')")
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="has no PL/Python"):
            connection.execute("call vae.refresh('shop', array['user_segments'])")
        assert connection.execute("select count(*) from shop.user_segments").fetchone() == (30,)
    check_owners(server_without_plpython, run_cli, dsn)
    assert run_cli("uninstall", "--yes", dsn=dsn).returncode == 0
    drop_database(server_without_plpython, "managed")
    with psycopg.connect(server_without_plpython.dsn("postgres"), autocommit=True) as admin:
        admin.execute("drop role ana, service")


def check_owners(server: Server, run_cli: RunCli, dsn: str) -> None:
    """Models are of roles whose rights pgvae's owner has: nobody else may refresh and remake their views."""
    with psycopg.connect(server.dsn("managed"), autocommit=True) as admin:
        admin.execute("create role ana login; grant create on database managed to ana; grant vae_trainer to ana")
        admin.execute("grant usage on schema public to ana; grant select on events to ana")
    made = "select from vae.create_model('anas', events => 'public.events')"
    with psycopg.connect(as_role(server.dsn("managed"), "ana"), autocommit=True) as ana:
        with pytest.raises(
            psycopg.errors.InsufficientPrivilege, match="role service, which installed pgvae"
        ) as refusal:
            ana.execute(made)
        assert "grant ana to service" in str(refusal.value.diag.message_hint)
        with psycopg.connect(dsn, autocommit=True) as service:
            service.execute("grant ana to service")
            ana.execute(made)
            service.execute("revoke ana from service")
        refused = run_cli("install", dsn=dsn)
        assert "model anas belongs to ana, of which service is no member" in refused.stderr
        assert "grant ana to service" in refused.stderr
        ana.execute("select vae.drop_model('anas')")
    with psycopg.connect(server.dsn("managed"), autocommit=True) as admin:
        admin.execute("drop owned by ana")


def test_each_function_has_the_same_arguments_results_and_rights_without_python(database: str) -> None:
    scripts = [path.read_text() for path in sql_files()]
    assert not any("plpython3u\n" in without_python(script) for script in scripts)
    # What a refresh inside asks for stands in the view's definition.
    assert sum(f"vae_private.related_all(%s, {run._RELATED_ITEMS})" in script for script in scripts) == 1
    with psycopg.connect(database, autocommit=True) as connection:
        inside = connection.execute(ROUTINES).fetchall()
        install(database, external=True)
        assert connection.execute(ROUTINES).fetchall() == inside
        languages = (
            "select distinct l.lanname from pg_proc p join pg_language l on l.oid = p.prolang"
            " where p.pronamespace in ('vae'::regnamespace, 'vae_private'::regnamespace)"
        )
        assert set(connection.execute(languages)) == {("sql",), ("plpgsql",)}


def test_back_to_plpython(external: psycopg.Connection) -> None:
    user = Shop().users[0]
    install(external.info.dsn, external=False)
    assert len(external.execute("select * from shop.recommend(%s, 3)", [user]).fetchall()) == 3
    external.execute("call vae.refresh('shop')")


def test_a_view_that_cannot_be_scored_is_logged_and_keeps_its_content(external: psycopg.Connection) -> None:
    before = content(external, "recommendations")
    external.execute("set vae.max_memory = '1MB'")
    _, failure = run_refresh(external, "shop")
    assert failure is not None
    assert "vae.max_memory is 1MB, and this needs" in str(failure)
    assert "raise it: set vae.max_memory" in str(failure.diag.message_hint)
    logged = log(external)
    assert logged["recommendations"][0] == "failed"
    assert "vae.max_memory is 1MB" in logged["recommendations"][4]
    assert logged["churn"][0] == "succeeded"
    assert content(external, "recommendations") == before


def test_who_is_not_the_owner_is_told_whose_rights_it_takes(external: psycopg.Connection, role: str) -> None:
    external.execute(
        sql.SQL("grant vae_operator to {0}; grant usage on schema shop to {0}").format(sql.Identifier(role))
    )
    with psycopg.connect(as_role(external.info.dsn, role), autocommit=True) as operator:
        document, _ = run_refresh(operator, "shop", ["churn"])
    assert f"role {role} may not read as postgres" in document["error"]["message"]
    assert document["error"]["hint"].startswith(f"refresh as postgres, or as a member of it: grant postgres to {role}")
    external.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))


def test_rows_of_a_version_that_is_no_longer_active_are_not_stored(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = train(external.info.dsn)
    score, scored = run._score, []

    def score_and_activate(connection: psycopg.Connection, model: Any, view: str, token: str) -> None:
        score(connection, model, view, token)
        scored.append((view, model.version))
        if len(scored) == 2:
            connection.execute("select * from vae.activate('shop', %s)", [second])

    monkeypatch.setattr(run, "_score", score_and_activate)
    _, failure = run_refresh(external, "shop", ["user_segments", "recommendations"])
    assert failure is None
    views = ("recommendations", "user_segments")
    assert scored == [(view, version) for version in (1, second) for view in views]
    for view in views:
        versions = sql.SQL("select distinct model_version from shop.{}").format(sql.Identifier(view))
        assert external.execute(versions).fetchall() == [(second,)]


def test_rows_that_a_killed_refresh_left_are_removed_and_never_read(external: psycopg.Connection) -> None:
    with psycopg.connect(external.info.dsn, autocommit=True) as killed:
        killed.execute(
            "insert into vae_private.staged_runs (token, model_id, view, version_id, row_count, events_until)"
            " select 'a', model_id, 'churn', version_id, 1, now() from vae.versions where state = 'active'"
        )
        killed.execute(
            "insert into vae_private.staged_rows (token, model_id, view, cells)"
            " select 'a', model_id, 'churn', '{}' from vae.models"
        )
        # Nor in a session of the same number, which comes again.
        for session in (external, killed):
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                session.execute("call vae.refresh('shop', array['churn'])")
        _, failure = run_refresh(external, "shop", ["churn"])
        assert failure is None
        # It may still be at work.
        assert external.execute("select count(*) from vae_private.staged_rows").fetchone() == (1,)
        pid = killed.info.backend_pid
    while external.execute("select from pg_stat_activity where pid = %s", [pid]).fetchall():
        time.sleep(0.05)
    run_refresh(external, "shop", ["churn"])
    assert external.execute("select count(*) from vae_private.staged_rows").fetchone() == (0,)


def test_each_transaction_may_be_in_another_session_as_behind_a_pooler(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, locks = run._score, "select count(*) from pg_locks where locktype = 'advisory'"
    with psycopg.connect(external.info.dsn, autocommit=True) as other:
        monkeypatch.setattr(run, "_score", lambda connection, *rest: score(other, *rest))
        document, failure = run_refresh(external, "shop")
        assert failure is None
        assert {view["row_count"] for view in document["views"] if view["view"] == "recommendations"} == {30}
        assert external.execute(locks).fetchone() == (0,)


def test_a_second_refresh_is_told_at_once_that_the_model_is_busy(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    churn_all = api.churn_all

    def scoring(plpy: Plpy, model_id: int) -> Any:
        with psycopg.connect(external.info.dsn, autocommit=True) as second:
            found.append(run_refresh(second, "shop")[0])
        return churn_all(plpy, model_id)

    monkeypatch.setattr(api, "churn_all", scoring)
    _, failure = run_refresh(external, "shop", ["churn"])
    assert failure is None
    (document,) = found
    assert (document["status"], document["views"]) == ("busy", [])
    assert "is being refreshed or changed by another session" in document["error"]["message"]


def test_a_connection_that_is_lost_while_it_scores_is_told_as_such(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "churn_all", lambda plpy, _: plpy.execute("select pg_terminate_backend(pg_backend_pid())"))
    with psycopg.connect(external.info.dsn, autocommit=True) as lost:
        document, failure = run_refresh(lost, "shop")
    assert isinstance(failure, psycopg.errors.AdminShutdown)
    assert document["status"] == "failed"


def test_who_cancels_a_query_while_it_scores_means_all_of_it(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    external.execute("delete from vae.refreshes")
    cancel = "select pg_cancel_backend(pg_backend_pid()), pg_sleep(10)"
    monkeypatch.setattr(api, "churn_all", lambda plpy, _: plpy.execute(cancel))
    _, failure = run_refresh(external, "shop")
    assert isinstance(failure, psycopg.errors.QueryCanceled)
    assert [(view, row[0]) for view, row in log(external).items()] == [("churn", "failed")]
    assert external.execute("select count(*) from vae_private.staged_runs").fetchone() == (0,)


def test_a_session_that_scores_is_not_ended_as_an_idle_one(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    churn_all = api.churn_all

    def slow(plpy: Plpy, model_id: int) -> Any:
        time.sleep(0.5)
        return churn_all(plpy, model_id)

    monkeypatch.setattr(api, "churn_all", slow)
    external.execute("set idle_in_transaction_session_timeout = 200")
    assert run_refresh(external, "shop", ["churn"])[1] is None


def test_other_code_than_the_database_holds_scores_nothing(external: psycopg.Connection) -> None:
    external.execute("delete from vae.refreshes")
    external.execute("update vae_private.installation set runtime_digest = 'newer'")
    for call in (lambda: run_refresh(external, "shop"), lambda: run.verify_outside(external, "shop", None)):
        with pytest.raises(PgvaeError, match=r"the database holds the code of pgvae \S+ \(newer\)"):
            call()
    assert log(external) == {}


def test_sql_goes_by_the_log_of_verifications_and_adds_nothing_to_it(external: psycopg.Connection) -> None:
    external.execute("delete from vae.verifications")
    found = external.execute("select passed, detail from vae.verify('shop')").fetchall()
    assert found == [(False, "not verified with the code that scores; in a terminal: pgvae verify shop --version 1")]
    gates = "select status from vae.check_activation('shop', 1) where gate = 'parity'"
    assert external.execute(gates).fetchone() == ("fail",)
    assert external.execute("select count(*) from vae.verifications").fetchone() == (0,)
    external.execute("select * from vae.activate('shop', 1, force => true)")
    assert [row[1:3] for row in run.verify_outside(external, "shop", None)] == [("cpu", True)]
    assert external.execute(gates).fetchone() == ("pass",)
    assert external.execute("select count(*) from vae.verifications").fetchone() == (1,)


def test_an_owner_who_may_not_read_the_events_is_told_the_grant(external: psycopg.Connection, role: str) -> None:
    name = sql.Identifier(role)
    external.execute(sql.SQL("grant vae_trainer to {0}; grant all on schema public to {0}").format(name))
    external.execute(sql.SQL("alter schema shop owner to {}").format(name))
    relations = external.execute(
        "select oid::regclass::text from pg_class where relnamespace = 'shop'::regnamespace and relkind in ('v', 'm')"
    )
    for (relation,) in relations.fetchall():
        external.execute(sql.SQL("alter table {} owner to {}").format(sql.SQL(relation), name))
    document, _ = run_refresh(external, "shop", ["recommendations"])
    assert document["error"]["sqlstate"] == "42501"
    assert f"grant select on public.events to {role}" in document["error"]["hint"], document["error"]
    external.execute(sql.SQL("reassign owned by {0} to postgres; drop owned by {0}").format(name))


def test_a_version_that_cannot_be_verified_is_an_error_with_a_hint(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> list[dict[str, Any]]:
        refusal = Error("weights are damaged")
        refusal.hint = "train again"
        raise refusal

    monkeypatch.setattr(api, "verify", refuse)
    with pytest.raises(PgvaeError, match="weights are damaged") as error:
        run.verify_outside(external, "shop", None)
    assert error.value.hint == "train again"


def test_a_model_of_which_nothing_stands_is_refused_before_it_scores(
    external: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_score", lambda *_: pytest.fail("it scored"))
    external.execute("drop schema shop cascade")
    document, _ = run_refresh(external, "shop")
    assert document["status"] == "failed"


def test_uninstall_where_the_extension_is_gone_already(external: psycopg.Connection) -> None:
    external.execute("update vae_private.installation set created_extension = true")
    uninstall(external.info.dsn)
    assert external.execute("select to_regnamespace('vae')").fetchone() == (None,)


VALUES = """
select 1::smallint as a, 2::integer as b, 3::bigint as c, 1.5::float8 as d, 1.5::float4 as e, 1.25::numeric as f,
    'x'::text as g, 'y'::name as h, true as i, '\\xff00'::bytea as j, array['a', null] as k, array[1, 2] as l,
    '{"a": [1]}'::jsonb as m, '{"a":1}'::json as n, timestamptz '2024-01-01 00:00+00' as o, date '2024-01-01' as p,
    interval '1 day' as q, '7f0e0f0c-0000-4000-8000-000000000000'::uuid as r, null::text as s, 'infinity'::date as t,
    array[timestamptz '2024-01-01 00:00+00'] as u, array[1.5::real] as v, 'NaN'::float8 as w
"""


def test_values_are_those_that_plpython_gives(connection: psycopg.Connection) -> None:
    connection.execute(
        "do language plpython3u $$ plpy.execute('set pgvae.found = ' +"
        f" plpy.quote_literal(repr(sorted(plpy.execute({VALUES!r})[0].items())))) $$"
    )
    row = connection.execute("select current_setting('pgvae.found')").fetchone()
    assert row is not None
    with connection.transaction():
        assert repr(sorted(Plpy(connection, print).execute(VALUES)[0].items())) == row[0]


def test_an_error_of_a_query_takes_back_that_query_alone(connection: psycopg.Connection) -> None:
    with connection.transaction():
        plpy = Plpy(connection, print)
        plpy.execute("create temporary table kept as select 1 as one")
        with pytest.raises(SPIError, match="division by zero") as refusal:
            plpy.execute(plpy.prepare("select 1 / $1", ["integer"]), [0])
        assert refusal.value.sqlstate == "22012"
        with pytest.raises(SPIError, match="does not exist"):
            plpy.cursor(plpy.prepare("select * from nowhere"))
        cursor = plpy.cursor(plpy.prepare("select n from generate_series(1, $1) n", ["integer"]), [3])
        assert [cursor.fetch(2), cursor.fetch(2), cursor.fetch(2)] == [[{"n": 1}, {"n": 2}], [{"n": 3}], []]
        assert plpy.execute("select one from kept") == [{"one": 1}]
