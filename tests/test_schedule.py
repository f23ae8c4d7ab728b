"""Refreshes and trainings on a schedule: a real pg_cron, exit statuses, units of systemd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from conftest import FAST, _pg_config, as_role, create_database
from pgvae.cli import app, register_commands
from pgvae.cli.refresh import run_refresh
from pgvae.install import install, uninstall
from pgvae.server import Server, find_bindir
from shop import QUICK, Shop, refusal
from test_lifecycle import measured
from variants import publish_network

Connection = psycopg.Connection[Any]
RunCli = Callable[..., subprocess.CompletedProcess[str]]

NIGHTLY = "night_shift"


@pytest.fixture(scope="module")
def cron(scratch: Path) -> Iterator[Server]:
    """A server with pg_cron and a model, on which a role of an operator has scheduled a refresh every minute."""
    if not (_pg_config(find_bindir(), "--sharedir") / "extension" / "pg_cron.control").exists():
        pytest.skip("pg_cron is not installed: apt-get install postgresql-15-cron")
    home = scratch / "cron"
    settings = {"shared_preload_libraries": "pg_cron", "cron.database_name": "nightly", "cron.host": str(home / "run")}
    server = Server(home, settings=FAST | settings)
    server.up()
    try:
        create_database(server, "nightly")
        dsn = server.dsn("nightly")
        install(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            Shop().make(connection)
            Shop().create_model(connection)
            publish_network(dsn, "shop", QUICK, 1)
            connection.execute("select * from vae.activate('shop', 1)")
            connection.execute(f"create role {NIGHTLY} login in role vae_operator")
            connection.execute(f"grant usage on schema shop to {NIGHTLY}")
            refused = refusal(connection, "select vae.schedule('shop', '* * * * *')")
            assert refused.message_primary == "pg_cron is not installed in this database"
            assert refused.message_hint == "a superuser can: create extension pg_cron"
            connection.execute("create extension pg_cron")
        with psycopg.connect(as_role(dsn, NIGHTLY), autocommit=True) as operator:
            refused = refusal(operator, "select vae.schedule('shop', '* * * * *')")
            assert refused.message_primary == "permission denied for pg_cron"
            assert refused.message_hint == f"its owner can allow it: grant usage on schema cron to {NIGHTLY}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"grant usage on schema cron to {NIGHTLY}")
            connection.execute("select cron.schedule('long', '* * * * *', 'select pg_sleep(300)')")
        with psycopg.connect(as_role(dsn, NIGHTLY), autocommit=True) as operator:
            job = operator.execute("select vae.schedule('shop', '* * * * *')").fetchone()
            assert operator.execute(
                "select model, job_id, schedule, command, runs_as, is_active from vae.schedules"
            ).fetchall() == [("shop", job[0], "* * * * *", "call vae.refresh('shop')", NIGHTLY, True)]  # type: ignore[index]
        yield server
        # It sleeps on, and a shutdown would wait for pg_cron to notice.
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where query ~ '^select pg_sleep'"
            )
    finally:
        server.remove()


@pytest.fixture
def nightly(cron: Server) -> Iterator[Connection]:
    """A superuser's connection to the database with pg_cron."""
    with psycopg.connect(cron.dsn("nightly"), autocommit=True) as connection:
        yield connection


# While the minute comes


def test_a_schedule_that_is_none_is_refused(cron: Server, nightly: Connection) -> None:
    for schedule, sqlstate in (("at night", None), ("61 * * * *", None), (None, "22004")):
        refused = refusal(nightly, "select vae.schedule('shop', %s)", [schedule])
        assert sqlstate is None or refused.sqlstate == sqlstate
        assert str(schedule).replace("None", "null") in str(refused.message_primary)
    assert refusal(nightly, "select vae.schedule('shopp')").sqlstate == "VA001"
    assert nightly.execute("select count(*) from vae.schedules").fetchone() == (1,)


def test_a_job_needs_a_role_that_logs_in_and_may_refresh(cron: Server, nightly: Connection) -> None:
    nightly.execute("create role group_role in role vae_operator")
    nightly.execute("grant usage on schema cron, shop to group_role")
    nightly.execute("create role stranger login in role vae_operator")
    nightly.execute("grant usage on schema cron to stranger")
    with psycopg.connect(as_role(nightly.info.dsn, "stranger"), autocommit=True) as stranger:
        refused = refusal(stranger, "select vae.schedule('shop')")
        assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for model shop")
        assert stranger.execute("select * from vae.schedules").fetchall() == []
        assert stranger.execute("select vae.unschedule('shop')").fetchone() == (False,)
    nightly.execute("set role group_role")
    refused = refusal(nightly, "select vae.schedule('shop')")
    assert refused.sqlstate == "28000"
    assert refused.message_primary == "role group_role cannot log in, so pg_cron cannot run a job as it"


def test_who_may_not_use_pg_cron_sees_no_schedules_and_drops_models(nightly: Connection) -> None:
    nightly.execute("create role day_shift login in role vae_trainer")
    nightly.execute("grant create on database nightly to day_shift")
    Shop(events="day_events").make(nightly)
    nightly.execute("grant select on day_events to day_shift")
    with psycopg.connect(as_role(nightly.info.dsn, "day_shift"), autocommit=True) as trainer:
        Shop(events="day_events").create_model(trainer, "day")
        assert trainer.execute("select * from vae.schedules").fetchall() == []
        trainer.execute("select vae.drop_model('day')")
        # Who bypasses row security sees the jobs of others, which stay.
        nightly.execute("grant usage on schema cron to day_shift; alter role day_shift bypassrls")
        Shop(events="day_events").create_model(trainer, "day")
        nightly.execute("select vae.schedule('day')")
        trainer.execute("select vae.drop_model('day')")
    assert nightly.execute("select name from vae.models").fetchall() == [("shop",)]
    assert nightly.execute("select vae.unschedule('day')").fetchone() == (True,)


def test_scheduling_again_changes_the_time_and_unscheduling_removes_it(nightly: Connection) -> None:
    first = nightly.execute("select vae.schedule('shop')").fetchone()
    assert nightly.execute("select vae.schedule('shop', '0 4 * * 1')").fetchone() == first
    schedules = "select schedule from vae.schedules where runs_as = 'postgres'"
    assert nightly.execute(schedules).fetchall() == [("0 4 * * 1",)]
    nightly.execute("select cron.schedule('by hand', '0 5 * * *', $$call vae.refresh('shop')$$)")
    assert nightly.execute("select model, job_name from vae.schedules where schedule = '0 5 * * *'").fetchall() == [
        ("shop", "by hand")
    ]
    # A superuser sees, and here removes, the jobs of all roles: this one's is put back.
    with psycopg.connect(as_role(nightly.info.dsn, NIGHTLY), autocommit=True) as operator:
        assert nightly.execute("select vae.unschedule('shop')").fetchone() == (True,)
        assert nightly.execute("select vae.unschedule('shop')").fetchone() == (False,)
        operator.execute("select vae.schedule('shop', '* * * * *')")
    assert nightly.execute("select job_name, runs_as from vae.schedules order by 1").fetchall() == [
        ("by hand", "postgres"),
        ("pgvae refresh shop", NIGHTLY),
    ]


def test_a_server_without_pg_cron_says_what_to_do(shared_trained: Connection) -> None:
    refused = refusal(shared_trained, "select vae.schedule('shop')")
    assert (refused.sqlstate, refused.message_primary) == ("42704", "this server does not run pg_cron")
    assert "shared_preload_libraries" in str(refused.message_hint)
    assert "pgvae refresh" in str(refused.message_hint)
    assert refusal(shared_trained, "select vae.unschedule('shop')").sqlstate == "42704"
    assert shared_trained.execute("select * from vae.schedules").fetchall() == []


def test_a_schema_that_somebody_else_called_cron_is_not_pg_crons(trained: Connection, role: str) -> None:
    dsn = trained.info.dsn
    trained.execute(f"grant vae_trainer to {role}; grant create on database {trained.info.dbname} to {role}")
    with psycopg.connect(as_role(dsn, role), autocommit=True) as trainer:
        trainer.execute(
            "create schema cron;"
            f"create function cron.rise() returns bigint language plpgsql as $$ begin alter role {role} superuser;"
            " return 1; end $$;"
            "create view cron.job as select cron.rise() as jobid, 'pgvae refresh shop'::name as jobname,"
            " '* * * * *'::text as schedule, 'call vae.refresh(''shop'')'::text as command, 'nobody'::text as username,"
            " true as active, current_database()::text as database;"
            "create view cron.job_run_details as select 1::bigint as jobid, 1::bigint as runid, now() as start_time,"
            " now() as end_time, ''::text as status, ''::text as return_message;"
            "create function cron.unschedule(bigint) returns boolean language sql as 'select cron.rise() = 1';"
            "create function cron.schedule(text, text, text) returns bigint language sql as 'select cron.rise()';"
            "grant usage on schema cron to public; grant select on all tables in schema cron to public"
        )
        assert trained.execute("select * from vae.schedules").fetchall() == []
        for call in ("vae.schedule('shop')", "vae.unschedule('shop')"):
            assert refusal(trained, f"select {call}").sqlstate == "42704"
        trained.execute("select vae.drop_model('shop')")
        uninstall(dsn)
        trained.execute(f"drop owned by {role} cascade")
    assert trained.execute("select rolsuper from pg_roles where rolname = %s", [role]).fetchone() == (False,)


def test_nothing_is_called_that_is_not_pg_crons_own(nightly: Connection) -> None:
    nightly.execute("alter extension pg_cron drop function cron.unschedule(bigint)")
    try:
        assert nightly.execute("select * from vae.schedules").fetchall() == []
        refused = refusal(nightly, "select vae.unschedule('shop')")
        assert (refused.sqlstate, refused.message_primary) == ("42704", "this pg_cron lacks what pgvae calls")
    finally:
        nightly.execute("alter extension pg_cron add function cron.unschedule(bigint)")


def test_pg_cron_in_another_database_is_named(cron: Server, nightly: Connection) -> None:
    create_database(cron, "elsewhere")
    install(cron.dsn("elsewhere"))
    with psycopg.connect(cron.dsn("elsewhere"), autocommit=True) as connection:
        Shop().make(connection)
        Shop().create_model(connection)
        refused = refusal(connection, "select vae.schedule('shop')")
    assert refused.message_primary == "pg_cron is in the database nightly, not in this one"
    line = re.search(r"select cron\.schedule_in_database\(.*?\)(?=;)", str(refused.message_hint))
    assert line
    nightly.execute(line[0].replace("...", "shop").replace("'call vae.refresh(shop)'", "$$call vae.refresh('shop')$$"))
    # A job is replaced by another of its name: it says which model of which database.
    jobs = nightly.execute("select database, jobname from cron.job where database = 'elsewhere'").fetchall()
    assert jobs == [("elsewhere", "pgvae refresh shop in elsewhere")]


# With dbt


def test_a_table_that_dbt_built_anew_takes_a_rebuild(trained: Connection) -> None:
    """What dbt-postgres does to a table in each run, as docs/scheduling.md says."""
    live = "select rank, item_id from shop.recommend((select min(user_id) from shop.recommendations), k => 3)"
    before = trained.execute(live).fetchall()
    trained.execute(
        "create table events__dbt_tmp as select * from events;"
        " alter table events rename to events__dbt_backup;"
        " alter table events__dbt_tmp rename to events;"
        " drop table events__dbt_backup cascade"
    )
    assert len(before) == 3
    assert trained.execute(live).fetchall() == before
    assert refusal(trained, "call vae.refresh('shop')").sqlstate == "42P01"
    trained.execute("select vae.rebuild_model('shop')")
    trained.execute("call vae.refresh('shop')")
    views = "select status from vae.health_checks where model = 'shop' and check_name in ('views', 'last refresh')"
    assert trained.execute(views).fetchall() == [("ok",), ("ok",)]


# From a terminal


def test_a_refresh_tells_in_json_what_it_did(trained: Connection, run_cli: RunCli) -> None:
    dsn = trained.info.dsn
    done = run_cli("refresh", "shop", "--json", "--view", "recommendations", dsn=dsn)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["status"]) == ("shop", "succeeded")
    (view,) = document["views"]
    assert (view["view"], view["state"], view["version"], view["error"]) == ("recommendations", "succeeded", 1, None)
    # As a refresh that is under way holds it.
    with psycopg.connect(dsn) as other:
        other.execute("select pg_advisory_xact_lock(hashtext('pgvae refresh'), 1)")
        done = run_cli("refresh", "shop", "--json", dsn=dsn)
    assert done.returncode == 3
    assert json.loads(done.stdout)["status"] == "busy"
    assert done.stderr == "model shop is being refreshed or changed by another session\n"
    # Not busy but failed, though the state is the same: somebody holds a view for longer than the role waits.
    with psycopg.connect(dsn) as other, psycopg.connect(dsn, options="-c lock_timeout=50", autocommit=True) as mine:
        other.execute("comment on materialized view shop.churn_materialized is 'held'")
        document, failure = run_refresh(mine, "shop", ["churn"])
    assert (document["status"], document["error"]["sqlstate"]) == ("failed", "55P03")
    assert failure is not None
    trained.execute("drop table events cascade")
    done = run_cli("refresh", "shop", "--json", "--full", dsn=dsn)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["status"], document["error"]["sqlstate"]) == ("failed", "42P01")
    assert "error: " in done.stderr
    assert "hint: " in done.stderr


def run_here(*arguments: str) -> Any:
    """As run_cli, but without a process that imports torch again."""
    return CliRunner().invoke(app, arguments)


def test_a_retrained_version_that_is_worse_does_not_go_live(trained: Connection) -> None:
    register_commands()
    dsn = f"--dsn={trained.info.dsn}"
    done = run_here("retrain", "shop", "--activate", "--refresh", "--json", dsn)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["version"], document["configuration_of"], document["activated"]) == (2, 1, True)
    assert (document["previous_version"], document["refresh"]["status"], document["refusal"]) == (1, "succeeded", None)
    assert {gate["gate"]: gate["status"] for gate in document["gates"]} == {
        "code": "pass",
        "parity": "pass",
        "popularity": "skip",
        "active version": "skip",
    }
    configs = trained.execute("select config - 'shortcut' - 'recency' from vae.versions order by version").fetchall()
    assert configs[0] == configs[1]
    assert trained.execute("select distinct model_version from shop.recommendations").fetchall() == [(2,)]
    done = run_here("retrain", "shop", "--refresh", dsn)
    assert (done.exit_code, "without --activate" in done.stderr) == (2, True)
    # The shop is too small for a split, so both get their figures by hand: the new one through a trigger.
    measured(trained, 2, 0.5, noise=0.01)
    trained.execute(
        "create function worse() returns trigger language plpgsql as $$ begin"
        " insert into vae.metrics (version_id, method, split, slice, metric, k, value, lower, upper, user_count)"
        " values (new.version_id, 'pgvae', 'temporal', 'all', 'ndcg', 20, 0.3, 0.29, 0.31, 100);"
        " return null; end $$;"
        "create trigger worse after insert on vae.versions for each row execute function worse()"
    )
    done = run_here("retrain", "shop", "--activate", "--refresh", "--keep", "1", "--json", dsn)
    assert done.exit_code == 3, done.stderr
    document = json.loads(done.stdout)
    assert (document["version"], document["activated"], document["removed_versions"]) == (3, False, [])
    worse = "version 3 of model shop ranks worse than the active version 2: NDCG@20 0.3000"
    assert document["refusal"].startswith(worse)
    assert (document["refresh"], document["gates"][-1]["status"]) == (None, "fail")
    assert f"not activated: {worse}" in done.stderr
    assert "hint: " in done.stderr
    states = trained.execute("select version, state from vae.versions order by version").fetchall()
    assert states == [(1, "retired"), (2, "active"), (3, "ready")]
    done = run_here("train", "shop", "--epochs=1", "--hidden=8", "--latent=4", "--activate", dsn)
    assert done.exit_code == 3
    assert "version 4 of model shop stays ready" in done.stderr


def test_a_model_that_does_not_exist_is_told_before_anything_is_read(shared_trained: Connection) -> None:
    register_commands()
    for command in ("train", "retrain", "evaluate", "tune", "report"):
        done = run_here(command, "nope", f"--dsn={shared_trained.info.dsn}")
        assert done.exit_code == 1
        assert done.stderr.startswith('error: model "nope" does not exist'), command
        assert done.stderr.splitlines()[1:] == ["hint: there are: shop"]


def test_an_interrupt_ends_a_command_with_a_message(
    monkeypatch: pytest.MonkeyPatch, shared_trained: Connection
) -> None:
    register_commands()

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pgvae.cli.refresh.run_refresh", interrupted)
    done = run_here("refresh", "shop", f"--dsn={shared_trained.info.dsn}")
    assert (done.exit_code, done.stderr) == (130, "interrupted; nothing half-done was kept\n")


# The units of the page


def test_the_units_of_systemd_are_valid(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    page = (Path(__file__).parents[1] / "docs" / "scheduling.md").read_text(encoding="utf-8")
    units = re.findall(r"^# /etc/systemd/system/(\S+)\n(.*?)(?=^# /etc|^```)", page, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in units} == {
        f"pgvae-{what}.{kind}" for what in ("refresh", "retrain") for kind in ("service", "timer")
    }
    for name, text in units:
        # The program of the page is not there.
        (tmp_path / name).write_text(text.replace("/opt/pgvae/bin/pgvae", "/bin/true"))
    done = subprocess.run(
        [program, "verify", "--man=no", *sorted(map(str, tmp_path.glob("*.timer")))],
        capture_output=True,
        text=True,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "pgvae" in line]
    assert complaints == []


def test_dropping_a_model_removes_its_schedules(nightly: Connection) -> None:
    shop = Shop(events="more_events")
    shop.make(nightly)
    shop.create_model(nightly, "gone")
    nightly.execute("select vae.schedule('gone')")
    nightly.execute("select cron.schedule('hourly', '0 * * * *', $$call vae.refresh('gone', views => '{churn}')$$)")
    before = nightly.execute("select count(*) from vae.schedules where model <> 'gone'").fetchone()
    nightly.execute("select vae.drop_model('gone')")
    assert nightly.execute("select count(*) from vae.schedules where model = 'gone'").fetchone() == (0,)
    assert nightly.execute("select count(*) from vae.schedules").fetchone() == before
    # Dropped by somebody who could not see it, a job is left to whoever scheduled it.
    nightly.execute("select cron.schedule('pgvae refresh gone', '0 4 * * *', $$call vae.refresh('gone')$$)")
    assert nightly.execute("select vae.unschedule('gone')").fetchone() == (True,)
    assert refusal(nightly, "select vae.schedule('gone')").sqlstate == "VA001"


# After the minute


def test_the_job_has_run_as_the_operator_beside_a_long_one(nightly: Connection) -> None:
    deadline = time.monotonic() + 100
    query = (
        "select r.state, r.version, r.row_count, r.started_by from vae.refreshes r where view = 'recommendations'"
        " order by refresh_id limit 1"
    )
    while time.monotonic() < deadline:
        found = nightly.execute(query).fetchone()
        if found and found[0] != "running":
            break
        time.sleep(0.5)
    assert found == ("succeeded", 1, 30, NIGHTLY)
    # It did not wait for the job that sleeps, which is still at it.
    assert nightly.execute(
        "select d.status from cron.job_run_details d join cron.job j using (jobid) where jobname = 'long'"
    ).fetchone() == ("running",)
    assert nightly.execute("select count(*) > 0 from shop.recommendations").fetchone() == (True,)
    while time.monotonic() < deadline:
        run = nightly.execute(
            "select last_status, last_message, last_finished_at is not null from vae.schedules"
            " where runs_as = %s and last_started_at is not null",
            [NIGHTLY],
        ).fetchone()
        if run and run[2]:
            break
        time.sleep(0.5)
    assert run == ("succeeded", "CALL", True)
