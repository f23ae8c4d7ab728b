"""Refreshing a model's prediction views: one after the other, each logged, none taking another along."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from conftest import as_role
from shop import QUICK, Shop, refusal, train
from variants import publish_network

Connection = psycopg.Connection[Any]

# Prediction views beside recommendations, as later releases add them: one that works, one that fails, one that its
# version cannot fill.
_MORE = """
create table public.switch (works boolean);
insert into public.switch values (true);
create materialized view shop.numbers_materialized as
    select n, 1 / (select case when works then 1 else 0 end from public.switch) as one
    from generate_series(1, 5) n with no data;
create unique index on shop.numbers_materialized (n);
create view shop.numbers as select * from shop.numbers_materialized;
create materialized view shop.empty_materialized as select 1 as n where false with no data;
create view shop.empty as select * from shop.empty_materialized;
"""


@pytest.fixture
def more(trained: Connection) -> Connection:
    """A trained database whose model has three prediction views."""
    trained.execute(_MORE)
    objects, definition = trained.execute(
        "select prosrc, pg_get_functiondef(oid) from pg_proc where oid = 'vae_private.model_objects'::regproc"
    ).fetchall()[0]
    changed = definition.replace(
        ") as o (step, kind",
        ", (900, 'materialized view', 'numbers_materialized', false, 'a'), (901, 'view', 'numbers', true, 'a'),"
        " (902, 'materialized view', 'empty_materialized', false, 'b'), (903, 'view', 'empty', true, 'b')"
        ") as o (step, kind",
    )
    assert objects and changed != definition
    trained.execute(changed.encode())
    trained.execute("select vae.rebuild_model('shop')")
    return trained


def log(connection: Connection, after: int = 0) -> list[Any]:
    query = "select view, state, row_count, error from vae.refreshes where refresh_id > %s order by refresh_id"
    return connection.execute(query, [after]).fetchall()


def last(connection: Connection) -> int:
    found = connection.execute("select coalesce(max(refresh_id), 0) from vae.refreshes").fetchone()
    assert found
    return int(found[0])


def test_all_views_are_refreshed_in_their_order_or_those_that_are_named(more: Connection) -> None:
    before = last(more)
    more.execute("call vae.refresh('shop')")
    users = len(Shop().users)
    views = [view for view, *_ in log(more, before)]
    assert views[:2] == ["churn", "recommendations"]
    assert views[-2:] == ["numbers", "empty"]
    assert log(more, before)[1] == ("recommendations", "succeeded", users, None)
    assert log(more, before)[-2:] == [("numbers", "succeeded", 0, None), ("empty", "succeeded", 0, None)]
    assert more.execute("select count(*) from shop.numbers").fetchone() == (5,)
    before = last(more)
    more.execute("call vae.refresh('shop', array['empty', 'recommendations'])")
    assert [view for view, *_ in log(more, before)] == ["recommendations", "empty"]
    phases = more.execute("select distinct phase, state from vae.refreshes").fetchall()
    assert phases == [(None, "succeeded")]


def test_the_seconds_of_a_view_are_its_own(more: Connection) -> None:
    before = last(more)
    more.execute("call vae.refresh('shop')")
    starts = more.execute(
        "select started_at >= lag(finished_at) over (order by refresh_id) from vae.refreshes where refresh_id > %s",
        [before],
    ).fetchall()
    assert len(starts) > 2
    assert {(True,)} == set(starts[1:])
    summed = more.execute(
        "select sum(seconds) <= extract(epoch from max(finished_at) - min(started_at)) from vae.refreshes"
        " where refresh_id > %s",
        [before],
    ).fetchone()
    assert summed == (True,)


def test_all_views_count_the_events_until_the_call(more: Connection) -> None:
    before = last(more)
    more.execute("call vae.refresh('shop')")
    moments = more.execute(
        "select count(distinct r.events_until), bool_and(r.events_until < r.started_at),"
        " bool_and(r.events_until = f.refreshed_at)"
        " from vae.refreshes r join vae.freshness f on f.prediction = r.view where r.refresh_id > %s",
        [before],
    ).fetchone()
    assert moments == (1, True, True)


# Activates version 2 when the third view has its turn.
_ACTIVATE_MEANWHILE = """
create function public.activate_meanwhile() returns trigger language plpgsql as $$
begin
    perform * from vae.activate('shop', 2, force => true);
    return new;
end;
$$;
create trigger activate_meanwhile after insert on vae.refreshes
for each row when (new.view = 'explanations') execute function public.activate_meanwhile();
"""


def test_a_version_that_is_activated_meanwhile_computes_all_views(trained: Connection) -> None:
    notices: list[str] = []
    trained.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    publish_network(trained.info.dsn, "shop", QUICK, 7)
    trained.execute(_ACTIVATE_MEANWHILE)
    before = last(trained)
    trained.execute("call vae.refresh('shop')")
    assert "another version of model shop became active meanwhile: its views are refreshed again" in notices
    rows = log(trained, before)
    assert [view for view, *_ in rows].count("recommendations") == 2
    versions = trained.execute("select distinct model_version, last_state from vae.freshness").fetchall()
    # Some views have nothing to hold, and no version.
    assert {(2, "succeeded")} <= set(versions) <= {(2, "succeeded"), (None, "succeeded")}


@pytest.mark.parametrize(
    ("views", "value"), [("array['numbers', 'sales']", "sales"), ("array[null]", "null"), ("'{}'", "empty")]
)
def test_views_that_there_are_not_are_refused_by_name(more: Connection, views: str, value: str) -> None:
    before = last(more)
    refused = refusal(more, f"call vae.refresh('shop', {views})")
    assert (refused.sqlstate, refused.message_primary) == ("22023", f"views is {value}")
    assert "recommendations" in str(refused.message_hint)
    assert "numbers" in str(refused.message_hint)
    assert last(more) == before


def test_no_operator_of_somebody_else_runs_in_a_refresh(more: Connection) -> None:
    """As where everybody may create in public: it would run with the rights of whoever refreshes."""
    more.execute(
        "create function public.append(text[], text) returns text[] language plpgsql as"
        " 'begin raise exception ''foreign code''; end';"
        " create operator public.|| (leftarg = text[], rightarg = text, function = public.append)"
    )
    more.execute("update public.switch set works = false")
    refused = refusal(more, "call vae.refresh('shop', array['numbers'])")
    assert refused.message_primary == "refresh of shop.numbers failed: division by zero"


def test_a_view_that_fails_keeps_its_content_and_no_other_from_its_own(more: Connection) -> None:
    more.execute("call vae.refresh('shop')")
    more.execute("update public.switch set works = false")
    before = last(more)
    refused = refusal(more, "call vae.refresh('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("22012", "refresh of shop.numbers failed: division by zero")
    assert refused.message_hint == "the view keeps its last good content"
    states = {view: (state, error) for view, state, _, error in log(more, before)}
    assert states.pop("numbers") == ("failed", "division by zero")
    assert set(states.values()) == {("succeeded", None)}
    assert "recommendations" in states and "empty" in states
    assert more.execute("select count(*), min(one) from shop.numbers").fetchone() == (5, 1)
    # Two that fail are both named; the rest is refreshed.
    more.execute("set vae.device = 'x'")
    before = last(more)
    refused = refusal(more, "call vae.refresh('shop', array['recommendations', 'numbers', 'empty'], full => true)")
    assert refused.message_primary == (
        "refresh of 2 of the 3 views of model shop failed:"
        " recommendations: vae.device is 'x'; numbers: division by zero"
    )
    assert [(view, state) for view, state, *_ in log(more, before)] == [
        ("recommendations", "failed"), ("numbers", "failed"), ("empty", "succeeded"),
    ]  # fmt: skip
    more.execute("reset vae.device")
    more.execute("update public.switch set works = true")
    more.execute("call vae.refresh('shop')")
    assert more.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)


def test_one_session_has_all_views_and_another_one_is_refused_whatever_the_moment(
    more: Connection, trained_database: str
) -> None:
    """Three sessions try again and again; whoever is at it ends well, or is told of the other one."""
    before = last(more)
    outcomes = []

    def other() -> None:
        with psycopg.connect(trained_database, autocommit=True) as session:
            for _ in range(20):
                try:
                    session.execute("call vae.refresh('shop')")
                    outcomes.append("done")
                except psycopg.errors.LockNotAvailable as error:
                    outcomes.append(str(error.diag.message_primary))

    with ThreadPoolExecutor(3) as threads:
        for running in [threads.submit(other) for _ in range(3)]:
            running.result(120)
    assert set(outcomes) <= {
        "done",
        "model shop is being refreshed or changed by another session",
        "another session began to refresh model shop at the same moment",
    }
    succeeded = [row for row in log(more, before) if row[1] == "succeeded"]
    assert len([view for view, *_ in succeeded if view == "empty"]) >= outcomes.count("done") > 0
    failed = {error for _, state, _, error in log(more, before) if state == "failed"}
    assert failed <= {"the session ended before the refresh did"}


def test_a_model_that_is_dropped_while_it_refreshes_does_not_exist(more: Connection, trained_database: str) -> None:
    def wait_until_it_waits(query: str) -> None:
        asked = "select count(*) from pg_stat_activity where query = %s and wait_event_type = 'Lock'"
        end = time.monotonic() + 60
        while more.execute(asked, [query]).fetchone() != (1,):
            assert time.monotonic() < end, query
            time.sleep(0.05)

    def run(query: str) -> str | None:
        with psycopg.connect(trained_database, autocommit=True) as session:
            try:
                session.execute(query.encode())
            except psycopg.Error as error:
                return f"{error.sqlstate} {error.diag.message_primary}"
        return None

    refresh, drop = "call vae.refresh('shop')", "select vae.drop_model('shop')"
    with ThreadPoolExecutor(2) as threads:
        with psycopg.connect(trained_database) as holder:
            holder.execute("lock table events")
            refreshing = threads.submit(run, refresh)
            wait_until_it_waits(refresh)
            dropping = threads.submit(run, drop)
            wait_until_it_waits(drop)
        assert dropping.result(60) is None
        assert refreshing.result(60) == 'VA001 model "shop" does not exist'
    assert more.execute("select count(*) from vae.refreshes").fetchone() == (0,)
    assert more.execute("select vae_private.start_refresh(-1, 'churn', 'full')").fetchone() == (None,)


def test_a_change_during_a_refresh_locks_nobody_out_and_two_changes_keep_both(
    trained: Connection, trained_database: str
) -> None:
    def wait_for(query: str, event: str) -> None:
        end = time.monotonic() + 60
        asked = "select count(*) from pg_stat_activity where query = %s and wait_event = %s"
        while trained.execute(asked, [query, event]).fetchone() != (1,):
            assert time.monotonic() < end, query
            time.sleep(0.05)

    def run(query: str) -> None:
        with psycopg.connect(trained_database, autocommit=True) as session:
            session.execute(query.encode())

    trained.execute("call vae.refresh('shop')")
    before = last(trained)
    refresh = "call vae.refresh('shop', full => true)"
    changes = (
        """select vae.set_options('shop', '{"recommendations": 7}')""",
        """select vae.set_options('shop', '{"min_events": 77}')""",
        "select vae.set_features('shop', item_features => '{}')",
        "select vae.set_exposure('shop', null)",
        "select vae.rebuild_model('shop')",
    )
    with ThreadPoolExecutor(1 + len(changes)) as threads:
        with psycopg.connect(trained_database) as holder:
            holder.execute("lock table events")
            running = [threads.submit(run, refresh)]
            wait_for(refresh, "relation")
            for change in changes:
                running.append(threads.submit(run, change))
                wait_for(change, "advisory")
            # None of them holds a lock that a reader would wait for.
            trained.execute("set lock_timeout = '1s'")
            for view in ("recommendations", "churn", "segments", "demand", "related_items"):
                trained.execute(sql.SQL("select count(*) from {}").format(sql.Identifier("shop", view)))
        for each in running:
            each.result(60)
    assert {state for _, state, *_ in log(trained, before)} == {"succeeded"}
    stored = trained.execute(
        "select options ->> 'recommendations', options ->> 'min_events', item_features from vae.models"
    )
    assert stored.fetchall() == [("7", "77", [])]


@pytest.fixture(scope="module")
def whole(shared: Connection) -> Connection:
    """A database with a model that has all views there can be, untrained."""
    Shop().make(shared)
    shared.execute(
        "alter table events add offered boolean;"
        " create table users as select distinct user_id, 'a' as country from events;"
        " create table items as select distinct item_id, 'a' as category from events"
    )
    Shop().create_model(shared, users="users", items="items", exposure_column="offered")
    return shared


@pytest.mark.parametrize(
    ("change", "above", "beneath"),
    [
        ("rebuild_model('shop')", "recommendations", "stored_recommendations"),
        # vae.check_freshness.
        ("rebuild_model('shop')", "refresh_digests", "stored_digests"),
        ("drop_model('shop')", "refresh_digests", "stored_digests"),
        # A training.
        ("rebuild_model('shop')", "clean_events", "user_features"),
        ("drop_model('shop')", "clean_events", "user_features"),
        ("rebuild_model('shop')", "user_features", "item_features"),
        ("rebuild_model('shop')", "item_features", "clean_assignments"),
        ("set_exposure('shop', null)", "item_features", "clean_assignments"),
        # vae.check_drift, and what asks by category.
        ("rebuild_model('shop')", "refresh_events", "item_features"),
        ("rebuild_model('shop')", "item_features", "demand"),
    ],
)
def test_a_change_waits_for_readers_without_a_deadlock(
    whole: Connection, change: str, above: str, beneath: str
) -> None:
    with (
        ThreadPoolExecutor(1) as threads,
        psycopg.connect(whole.info.dsn) as changer,
        psycopg.connect(whole.info.dsn) as reader,
    ):
        # Prepared, a query has locked the one view, as it does a moment before it locks the next.
        reader.execute(sql.SQL("prepare one as select from {}").format(sql.Identifier("shop", above)))
        changing = threads.submit(changer.execute, f"select vae.{change}".encode())
        waits = "select count(*) from pg_locks where relation = %s::regclass and not granted"
        while not changing.done() and reader.execute(waits, [f"shop.{above}"]).fetchone() == (0,):
            time.sleep(0.01)
        reader.execute(sql.SQL("prepare other as select from {}").format(sql.Identifier("shop", beneath)))
        reader.rollback()
        changing.result(60)
        changer.rollback()


def test_settings_of_a_role_that_change_how_names_and_null_are_written(trained: Connection) -> None:
    # Of a user who is known by an item outside the catalogue alone, nothing of the history speaks for an item.
    trained.execute("insert into events values (99, 99, 'view', now())")
    dsn = make_conninfo(trained.info.dsn, options="-c quote_all_identifiers=on -c array_nulls=off")
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute("select vae.rebuild_model('shop')")
        session.execute("call vae.refresh('shop')")
        query = "select item_id is not null, part, event_item_id from shop.explanations where user_id = 99"
        assert session.execute(query).fetchall() == [(True, "popularity", None)]
        # It compares functions by the names of their arguments' types.
        views = "select status, detail from vae.health_checks where check_name = 'views'"
        assert session.execute(views).fetchall() == [("ok", None)]
        Shop(events="visits", user_type="text", item_type="uuid").make(session)
        Shop(events="visits").create_model(session, "other")
    assert train(dsn, force=True) == 2


def test_a_refresh_by_a_session_that_reads_backslashes_as_escapes_warns_of_nothing(trained: Connection) -> None:
    warnings: list[Any] = []
    trained.add_notice_handler(lambda notice: warnings.append(notice.message_primary))
    trained.execute("set standard_conforming_strings = off")
    trained.execute("call vae.refresh('shop', views => array['user_segments'])")
    assert warnings == []


def test_an_index_that_somebody_drops_comes_back_with_a_rebuild(trained: Connection) -> None:
    """Without its unique index a view cannot be refreshed beside its readers."""
    query = "select indexname, indexdef from pg_indexes where schemaname = 'shop' order by 1"
    before = trained.execute(query).fetchall()
    for name, _ in before:
        trained.execute(sql.SQL("drop index {}").format(sql.Identifier("shop", name)))
    trained.execute("select vae.rebuild_model('shop')")
    assert trained.execute(query).fetchall() == before
    trained.execute("call vae.refresh('shop')")


def test_writers_of_events_fail_no_refresh_of_a_session_that_is_serializable(trained: Connection) -> None:
    # The levels of the transactions in which it writes its log: those in which it reads the events.
    trained.execute(
        "create table levels (level text);"
        " create function note_level() returns trigger language plpgsql as"
        " 'begin insert into public.levels values (current_setting(''transaction_isolation'')); return null; end';"
        " create trigger note_level after insert or update on vae.refreshes for each row execute function note_level()"
    )
    trained.execute("set default_transaction_isolation = 'serializable'")
    trained.execute("call vae.refresh('shop', full => true)")
    trained.execute("call vae.refresh('shop')")
    assert trained.execute("select level, count(*) > 20 from levels group by level").fetchall() == [
        ("read committed", True)
    ]
    assert trained.execute("show transaction_isolation").fetchone() == ("serializable",)


def test_a_model_whose_owner_holds_no_role_of_pgvae_any_more(trained: Connection, role: str) -> None:
    # As after "reassign owned".
    for kind, name in trained.execute(
        "select case relkind when 'm' then 'materialized view' else 'view' end, oid::regclass::text"
        " from pg_class where relnamespace = 'shop'::regnamespace and relkind in ('v', 'm')"
        " union all select 'function', oid::regprocedure::text from pg_proc where pronamespace = 'shop'::regnamespace"
        " union all select 'schema', 'shop'"
    ).fetchall():
        trained.execute(f"alter {kind} {name} owner to {role}".encode())
    trained.execute(f"grant select on events to {role}".encode())
    for act, needed in (
        ("call vae.refresh('shop')", "vae_operator"),
        ("select vae.rebuild_model('shop')", "vae_trainer"),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            trained.execute(act.encode())
        refused = caught.value.diag
        missing = f"the owner of model shop, {role}, does not hold the rights of {needed}"
        assert missing in str(refused.message_primary)
        assert str(refused.message_hint).startswith(f"grant vae_trainer to {role}")
    # A monitor sees it.
    assert missing[:-11] in str(
        trained.execute("select detail from vae.health_checks where check_name = 'last refresh'").fetchone()
    )
    trained.execute(f"grant vae_trainer to {role}".encode())
    trained.execute("select vae.rebuild_model('shop')")
    name = trained.info.dbname
    trained.execute(f"revoke temporary on database {name} from public".encode())
    refused = refusal(trained, "call vae.refresh('shop')")
    assert f"the owner of model shop, {role}, may not create temporary tables" in str(refused.message_primary)
    assert str(refused.message_hint).startswith(f"grant temporary on database {name} to {role}; ")
    trained.execute(f"grant temporary on database {name} to public".encode())
    trained.execute("call vae.refresh('shop')")
    trained.execute(f"reassign owned by {role} to current_user; drop owned by {role}".encode())


def test_a_rebuild_keeps_readers_waiting_only_so_long(trained: Connection) -> None:
    with psycopg.connect(trained.info.dsn) as dumping:
        dumping.execute("select from shop.recommendations limit 0")
        trained.execute("set lock_timeout = '300ms'")
        for change in ("vae.rebuild_model('shop')", """vae.set_options('shop', '{"min_events": 7}')"""):
            refused = refusal(trained, f"select {change}")
            assert refused.sqlstate == "55P03"
            assert refused.message_primary == "the views of model shop are in use by a transaction that stays open"
            assert "pg_stat_activity" in str(refused.message_hint)
    trained.execute("reset lock_timeout")
    with trained.transaction():
        trained.execute("select vae.rebuild_model('shop')")
        assert trained.execute("show lock_timeout").fetchone() == ("0",)


def test_a_rebuild_of_a_serializable_session_loses_no_change_that_it_waited_for(trained: Connection) -> None:
    """Its snapshot is older than the lock: it would make the views of the options of before."""
    defined = "select pg_get_viewdef('shop.clean_events'::regclass) like '%2021-02-03%'"
    with psycopg.connect(trained.info.dsn) as changing, ThreadPoolExecutor(1) as threads:
        changing.execute("""select vae.set_options('shop', '{"earliest": "2021-02-03"}')""")
        trained.execute("set default_transaction_isolation = 'serializable'")
        waiting = threads.submit(trained.execute, "select vae.rebuild_model('shop')")
        locks = "select exists (select from pg_locks where locktype = 'advisory' and not granted)"
        while not waiting.done() and changing.execute(locks).fetchone() == (False,):
            time.sleep(0.01)
        changing.commit()
        with pytest.raises(psycopg.errors.SerializationFailure):
            waiting.result(60)
        assert changing.execute(defined).fetchone() == (True,)
        changing.rollback()
        trained.execute("select vae.rebuild_model('shop')")
        assert trained.execute(defined).fetchone() == (True,)


def test_an_operator_refreshes_views_that_it_does_not_own(
    more: Connection, server: Any, role: str, run_cli: Callable[..., Any], trained_database: str
) -> None:
    more.execute(f"grant vae_operator to {role}".encode())
    more.execute(f"grant usage on schema shop to {role}".encode())
    done = run_cli(
        "refresh", "shop", "--view", "numbers", "--view", "recommendations", dsn=as_role(trained_database, role)
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"shop.recommendations: {len(Shop().users)} rows scored by version 1 in ")
    assert lines[1].startswith("shop.numbers: nothing to score in ")
    more.execute("update public.switch set works = false")
    failed = run_cli("refresh", "shop", dsn=as_role(trained_database, role))
    assert failed.returncode == 1
    assert "refresh of shop.numbers failed: division by zero" in failed.stderr
    assert "shop.recommendations: " in failed.stdout
    assert "shop.numbers" not in failed.stdout
    more.execute(f"drop owned by {role}".encode())


def test_tables_that_nobody_analysed_are_joined_as_wholes(trained: Connection) -> None:
    """As those of a restored dump: without statistics the planner expects one event, and joins the rest one by one."""
    plans: list[str] = []
    trained.add_notice_handler(lambda notice: plans.append(str(notice.message_primary)))
    trained.execute("load 'auto_explain'")
    for name, value in (("min_duration", "0"), ("nested_statements", "on"), ("level", "notice")):
        trained.execute(f"set auto_explain.log_{name} = {value}")
    for full in (False, True):
        trained.execute("call vae.refresh('shop', full => %s)", [full])
    trained.execute("select * from vae.check_freshness('shop')")
    readers = [plan for plan in plans if re.search(r"e\.user_id::text as user_key|shop\.refresh_digests d", plan)]
    assert len(readers) >= 4
    assert [plan for plan in readers if "Nested Loop" in plan] == []
