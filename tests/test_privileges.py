"""Who may do what: the rights of each role on each object, and what real logins can and cannot do with them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from conftest import as_role
from pgvae.errors import PgvaeError
from pgvae.install import install
from pgvae.server import Server
from shop import Shop, refusal, train, train_and_activate

GOLDEN = Path(__file__).parent / "golden" / "privileges.txt"
USER, OTHER = Shop().users[:2]

Login = Callable[[str], psycopg.Connection]


@pytest.fixture(scope="session")
def people(server: Server, template: str) -> dict[str, str]:
    """Login roles, one a role of pgvae; their rights on objects go with each test's database."""
    names = {kind: f"the_{kind}" for kind in ("reader", "scorer", "operator", "trainer")}
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        for kind, name in names.items():
            admin.execute(
                sql.SQL("create role {} login in role {}").format(*map(sql.Identifier, (name, f"vae_{kind}")))
            )
    return names


@pytest.fixture
def login(people: dict[str, str], trained_database: str) -> Iterator[Login]:
    """Opens connections to `trained_database` as one of the people: login('scorer')."""
    opened = []

    def connect(kind: str) -> psycopg.Connection:
        opened.append(psycopg.connect(as_role(trained_database, people[kind]), autocommit=True))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def state(connection: psycopg.Connection) -> list[Any]:
    """What a refused act must leave as it was: the catalogue's rows, weights, functions and views."""
    tables = ("vae.models", "vae.versions", "vae.metrics", "vae.activations", "vae.event_types", "vae_private.tensors")
    counts = " union all ".join(
        f"select md5(string_agg(t::text, '|' order by t::text)) from {name} t" for name in tables
    )
    definitions = (
        " union all select md5(string_agg(pg_get_functiondef(p.oid), '|' order by p.oid)) from pg_proc p"
        " where p.pronamespace = any (array['vae', 'vae_private', 'shop']::regnamespace[])"
        " union all select md5(string_agg(pg_get_viewdef(c.oid), '|' order by c.oid)) from pg_class c"
        " where c.relkind in ('v', 'm') and c.relnamespace = any (array['vae', 'vae_private', 'shop']::regnamespace[])"
    )
    return connection.execute(counts + definitions).fetchall()


# The golden file

_RIGHTS = """
with schemas as (
    select oid, nspname from pg_namespace where nspname in ('vae', 'vae_private', 'shop')
), rights (kind, object, acl) as (
    select 'schema', s.nspname::text, coalesce(n.nspacl, acldefault('n', n.nspowner))
    from schemas s join pg_namespace n on n.oid = s.oid
    union all
    select case c.relkind when 'r' then 'table' when 'v' then 'view' when 'm' then 'materialized view' end,
        format('%I.%I', s.nspname, c.relname), coalesce(c.relacl, acldefault('r', c.relowner))
    from schemas s join pg_class c on c.relnamespace = s.oid where c.relkind in ('r', 'v', 'm')
    union all
    select 'column', format('%I.%I.%I', s.nspname, c.relname, a.attname), a.attacl
    from schemas s join pg_class c on c.relnamespace = s.oid join pg_attribute a on a.attrelid = c.oid
    where a.attacl is not null
    union all
    select case p.prokind when 'p' then 'procedure' else 'function' end,
        p.oid::regprocedure::text || case when p.prosecdef then ' (security definer)' else '' end,
        coalesce(p.proacl, acldefault('f', p.proowner))
    from schemas s join pg_proc p on p.pronamespace = s.oid
    union all
    select 'policy', format('%I.%I %s', s.nspname, c.relname, p.polname),
        array(select makeaclitem(r, 0, 'USAGE', false) from unnest(p.polroles) r)
    from schemas s join pg_class c on c.relnamespace = s.oid join pg_policy p on p.polrelid = c.oid
)
select r.kind, r.object, coalesce(g.name, 'public'), string_agg(lower(a.privilege_type), ', ' order by a.privilege_type)
from rights r
left join aclexplode(r.acl) a on a.grantee <> (select relowner from pg_class where oid = 'vae.models'::regclass)
left join pg_roles g2 on g2.oid = a.grantee
cross join lateral (select case when a.grantee is null then '-' else g2.rolname::text end) as g (name)
group by r.kind, r.object, g.name
order by array_position(array['schema', 'table', 'column', 'policy', 'view', 'materialized view', 'function'], r.kind),
    r.object, 3
"""


def rights(connection: psycopg.Connection) -> str:
    """Gives every right of the roles of pgvae and of everybody, a line an object; owners may do all."""
    lines = ["# Rights on each object; '-' is nobody but the owner. Each role has the rights of the one before it:"]
    lines.append(
        "# vae_reader, vae_scorer, vae_operator, vae_trainer. A policy's roles are those whom it lets through."
    )
    lines.append("# Rewrite with: pytest tests/test_privileges.py --update-golden")
    granted: dict[str, list[str]] = {}
    for kind, name, role, privileges in connection.execute(_RIGHTS).fetchall():
        right = "applies" if kind == "policy" else privileges
        granted.setdefault(f"{kind} {name}", []).append("-" if role == "-" else f"{role} {right}")
    lines += [f"{name}: {'; '.join(roles)}" for name, roles in granted.items()]
    return "\n".join(lines) + "\n"


def test_rights_are_those_of_the_golden_file(connection: psycopg.Connection, request: pytest.FixtureRequest) -> None:
    Shop().make(connection)
    connection.execute("create table users (user_id bigint)")
    connection.execute("alter table events add exposed boolean")
    Shop().create_model(connection, users="users", exposure_column="exposed")
    found = rights(connection)
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()


def test_each_role_has_the_rights_of_the_one_before(connection: psycopg.Connection) -> None:
    members = connection.execute(
        "select m.member::regrole::text, m.roleid::regrole::text from pg_auth_members m"
        " where m.member::regrole::text like 'vae%' order by 1"
    ).fetchall()
    assert members == [("vae_operator", "vae_scorer"), ("vae_scorer", "vae_reader"), ("vae_trainer", "vae_operator")]
    assert connection.execute(
        "select bool_or(rolcanlogin or rolsuper or rolcreaterole or rolcreatedb or rolbypassrls)"
        " from pg_roles where rolname like 'vae%'"
    ).fetchone() == (False,)


# Readers


def test_a_reader_reads_predictions_only_with_usage_of_the_models_schema(
    trained: psycopg.Connection, login: Login
) -> None:
    reader = login("reader")
    assert reader.execute("select name from vae.models").fetchall() == [("shop",)]
    refused = refusal(reader, "select * from shop.recommendations")
    assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for schema shop")
    trained.execute("grant usage on schema shop to the_reader")
    assert reader.execute("select count(*) from shop.recommendations").fetchone() != (0,)
    for query in (
        "select * from shop.recommend(1)",
        "select shop.score(1, 2)",
        "select shop.embedding(1)",
        "select * from shop.history(1)",
        "select * from shop.clean_events",
        "select * from vae_private.scoring_tensors",
        "call vae.refresh('shop')",
        "select * from vae.activate('shop', 1)",
    ):
        assert refusal(reader, query).sqlstate == "42501", query


# Scorers


def test_a_scorer_reads_the_shops_events_with_rights_of_its_own(trained: psycopg.Connection, login: Login) -> None:
    scorer = login("scorer")
    trained.execute("grant usage on schema shop to the_scorer")
    for query in ("select * from shop.recommend(%s)", "select * from shop.history(%s)", "select shop.embedding(%s)"):
        refused = refusal(scorer, query, [USER])
        assert refused.sqlstate == "42501"
        assert str(refused.message_primary).removeprefix("pgvae: ") == "permission denied for table events", query
    trained.execute("grant select on events to the_scorer")
    mine = scorer.execute("select * from shop.recommend(%s)", [USER]).fetchall()
    assert mine == trained.execute("select * from shop.recommend(%s)", [USER]).fetchall()
    assert len(mine) > 3


def test_row_security_of_the_events_decides_what_is_scored(trained: psycopg.Connection, login: Login) -> None:
    scorer = login("scorer")
    trained.execute("grant usage on schema shop to the_scorer")
    trained.execute("grant select on events to the_scorer")
    trained.execute("alter table events enable row level security")
    trained.execute(f"create policy own on events to the_scorer using (user_id = {USER})")

    def first(connection: psycopg.Connection, user: int) -> Any:
        return connection.execute("select * from shop.recommend(%s, k => 1)", [user]).fetchall()

    assert scorer.execute("select count(*) from shop.history(%s)", [USER]).fetchone() != (0,)
    assert scorer.execute("select count(*) from shop.history(%s)", [OTHER]).fetchone() == (0,)
    assert first(scorer, USER) == first(trained, USER)
    (hidden,), (seen,) = first(scorer, OTHER), first(trained, OTHER)
    assert (hidden[3], seen[3]) == (True, False), "without events a user is a cold start"
    assert scorer.execute("select shop.embedding(%s)", [OTHER]).fetchone() == (None,)


def test_a_scorer_without_usage_is_refused_though_the_session_holds_the_weights(
    trained: psycopg.Connection, login: Login
) -> None:
    live = "select * from vae_private.recommend((select model_id from vae.models), %s, 5, null)"
    trained.execute("grant select on events to the_scorer")
    trained.execute("grant usage on schema shop to the_scorer")
    scorer = login("scorer")
    assert len(scorer.execute(live, [str(USER)]).fetchall()) == 5
    trained.execute("revoke usage on schema shop from the_scorer")
    # The role's own session, a superuser's session that became the role, and a definer's function around it.
    trained.execute(live, [str(USER)])
    trained.execute("set role the_scorer")
    for connection in (scorer, trained):
        refused = refusal(connection, live, [str(USER)])
        assert refused.sqlstate == "42501"
        assert refused.message_primary == "pgvae: permission denied for model shop"
        assert refused.message_hint == "its owner can allow it: grant usage on schema shop to the_scorer"
        assert refusal(connection, "select * from shop.recommend(%s)", [USER]).sqlstate == "42501"
        assert connection.execute("select count(*) from vae_private.scoring_tensors").fetchone() == (0,)
        assert connection.execute("select count(*) from vae_private.scoring_items").fetchone() == (0,)
    trained.execute("reset role")
    assert len(trained.execute(live, [str(USER)]).fetchall()) == 5


def test_a_scorer_changes_neither_code_nor_weights_nor_views(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant usage on schema shop to the_scorer")
    trained.execute("grant select on events to the_scorer")
    before = state(trained)
    scorer = login("scorer")
    for query in (
        "select * from vae_private.tensors",
        "select * from vae_private.items",
        "select * from vae_private.installation",
        "update vae_private.tensors set data = ''",
        "delete from vae_private.tensors",
        "truncate vae_private.tensors",
        "insert into vae_private.items values (1, 99, 'x')",
        "update vae_private.scoring_tensors set data = ''",
        "update vae.versions set state = 'retired'",
        "delete from vae.models",
        "insert into vae.metrics values (1, 'pgvae', 'temporal', 'ndcg', 20, 1, 1, 1, 1)",
        "create or replace function vae_private.load_runtime(wanted text) returns void language sql as 'select'",
        "create function vae_private.mine() returns void language sql as 'select'",
        "create function vae_private.mine() returns void language plpython3u as 'pass'",
        "alter function vae_private.load_runtime(text) owner to the_scorer",
        "drop function vae_private.recommend(integer, text, integer, jsonb)",
        "create or replace view shop.recommendations as select 1",
        "create or replace function shop.score(user_id bigint, item_id bigint) returns real language sql as 'select 1'",
        "create table shop.mine ()",
        "drop view shop.recommendations",
        "refresh materialized view shop.recommendations_materialized",
        "select * from shop.clean_events",
        "select * from vae_private.refresh_view(1, 'recommendations', 'full')",
        "call vae.refresh('shop')",
        "select * from vae.activate('shop', 1, true)",
        "select * from vae.rollback('shop')",
        "select * from vae.check_events('shop')",
        "select vae.drop_model('shop')",
        "select vae_private.build_model(1)",
    ):
        assert refusal(scorer, query).sqlstate == "42501", query
    assert state(trained) == before


# Operators


def test_an_operator_refreshes_activates_and_rolls_back_but_does_not_train(
    trained: psycopg.Connection, login: Login, trained_database: str
) -> None:
    assert train(trained_database) == 2
    trained.execute("grant usage on schema shop to the_operator")
    trained.execute("grant select on events to the_operator")
    operator = login("operator")
    assert len(operator.execute("select * from vae.check_events('shop')").fetchall()) > 10
    assert operator.execute("select * from vae.activate('shop', 2, force => true)").fetchall() == [(2, 1)]
    operator.execute("call vae.refresh('shop')")
    assert operator.execute("select distinct model_version from shop.recommendations").fetchall() == [(2,)]
    assert operator.execute("select * from vae.rollback('shop', reason => 'a drill')").fetchall() == [(1, 2)]
    last = operator.execute(
        "select action, activated_by, reason from vae.activations order by activation_id desc limit 1"
    )
    assert last.fetchall() == [("rollback", "the_operator", "a drill")]
    before = state(trained)
    with pytest.raises(PgvaeError, match="role the_operator may not publish versions"):
        train(operator.info.dsn)
    for query in (
        "select vae.drop_model('shop')",
        "select * from vae.create_model('other', 'events')",
        "select vae.set_event_type('shop', 'look', 'view')",
        "select vae.rebuild_model('shop')",
        "insert into vae.versions (model_id, version) select model_id, 9 from vae.models",
        "insert into vae_private.tensors select 1, 'x', 0, '<f4', '{1}', '', ''",
        "update vae.versions set code_digest = ''",
        "update vae.activations set reason = ''",
        "delete from vae.activations",
        "drop materialized view shop.recommendations_materialized",
    ):
        assert refusal(operator, query).sqlstate == "42501", query
    assert state(trained) == before


def test_nobody_but_the_owner_reads_beneath_the_views(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant usage on schema shop to the_reader, the_trainer")
    trained.execute("grant select on events to the_trainer")
    trained.execute("call vae.refresh('shop')")
    # Gone at an incremental refresh: the key and the old row stay beneath the views.
    trained.execute("delete from events where user_id = %s", [USER])
    trained.execute("call vae.refresh('shop')")
    newest = "select mode from vae.refreshes where view = 'recommendations' order by refresh_id desc limit 1"
    assert trained.execute(newest).fetchall() == [("incremental",)]
    beneath = [
        name
        for (name,) in trained.execute(
            "select c.relname from pg_class c where c.relkind = 'm' and c.relnamespace = 'shop'::regnamespace"
        ).fetchall()
    ]
    assert len(beneath) == 8
    beneath.append("stored_recommendations")
    trainer = login("trainer")
    for name in beneath:
        assert refusal(trainer, f"select * from shop.{name}").sqlstate == "42501", name
    views = trained.execute(
        "select c.relname, exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'user_id')"
        " from pg_class c where c.relkind = 'v' and c.relnamespace = 'shop'::regnamespace and c.relname <> all (%s)",
        [beneath],
    ).fetchall()
    assert len(views) > 10
    for name, has_users in views:
        column = "user_id" if has_users else "null"
        assert (USER,) not in trainer.execute(f"select {column} from shop.{name}").fetchall(), name
    fresh = trainer.execute(
        "select user_count, stale_users, is_exact from vae.check_freshness('shop') where prediction = 'recommendations'"
    )
    assert fresh.fetchall() == [(len(Shop().users) - 1, 0, True)]
    # What is revoked on a view stands nowhere else.
    reader = login("reader")
    assert reader.execute("select count(*) > 0 from shop.explanations").fetchone() == (True,)
    trained.execute("revoke select on shop.explanations from vae_reader")
    for name in ("explanations", "explanations_materialized", "recommendations_materialized", "stored_digests"):
        assert refusal(reader, f"select * from shop.{name}").sqlstate == "42501", name


def test_the_command_line_says_which_right_is_missing(
    trained: psycopg.Connection, people: dict[str, str], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    everything = "grant usage on schema shop, public to {0}; grant select on events to {0}"
    trained.execute(sql.SQL(everything).format(sql.Identifier(people["operator"])))
    trainer = (
        "the role vae_trainer, usage on the model's schema, select on the shop's tables, and temporary on the database"
    )
    for who, arguments, hint in (
        ("reader", ["refresh", "shop"], "pgvae refresh needs the role vae_operator and usage on the model's schema"),
        ("reader", ["evaluate", "shop"], f"pgvae evaluate needs {trainer}"),
        ("trainer", ["train", "shop"], "its owner can allow it: grant usage on schema shop to the_trainer"),
        # Who could train, and not publish, is told at once.
        ("operator", ["train", "shop"], "a superuser can allow it: grant vae_trainer to the_operator"),
    ):
        done = run_cli(*arguments, dsn=as_role(trained.info.dsn, people[who]))
        assert (done.returncode, "epoch" in done.stderr) == (1, False)
        assert f"hint: {hint}\n" in done.stderr
    # The command is the one that runs, whatever its options are called.
    trained.execute("create table public.export (user_id bigint, item_id bigint, occurred_at timestamptz)")
    options = ["--dsn", as_role(trained.info.dsn, people["reader"]), "--table", "export"]
    events = "user_id,item_id,occurred_at\n1,2,2024-01-01\n"
    done = run_cli("load", "events", *options, "--append", "--yes", "-", dsn="host=/nowhere", input=events)
    assert done.stderr.endswith(
        "error: permission denied for table export [SQLSTATE 42501]\n"
        "hint: pgvae load needs to own the table, or with --append the right to insert into it\n"
    )


def test_a_database_without_pgvae_is_called_so(
    empty_database: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for arguments in (["train", "shop"], ["refresh", "shop", "--json"], ["prune", "shop"], ["report", "shop"]):
        done = run_cli(*arguments, dsn=empty_database)
        assert done.returncode == 1
        assert "hint: pgvae is not installed in this database: run pgvae install, or check --dsn" in done.stderr
        if "--json" in arguments:
            assert json.loads(done.stdout)["error"]["sqlstate"] == "3F000"


def test_an_operator_acts_only_on_models_whose_schema_it_may_use(trained: psycopg.Connection, login: Login) -> None:
    before = state(trained)
    log = trained.execute("select * from vae.refreshes").fetchall()
    operator = login("operator")
    for query in (
        "call vae.refresh('shop')",
        "select * from vae.activate('shop', 1, true)",
        "select * from vae.rollback('shop')",
        "select * from vae.check_events('shop')",
    ):
        refused = refusal(operator, query)
        assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for model shop"), query
        assert refused.message_hint == "its owner can allow it: grant usage on schema shop to the_operator"
    for query in (
        "select * from vae_private.refresh_view(1, 'recommendations', 'full')",
        "select * from vae_private.start_refresh(1, 'recommendations', 'full')",
        "select * from vae_private.switch_version(1, 1, 'activate', true, null, null)",
        "insert into vae.activations (model_id, version, action, forced) values (1, 1, 'activate', true)",
        "insert into vae.refreshes (model_id, view) values (1, 'recommendations')",
    ):
        if "switch_version" in query:
            # It changes what row security lets it see: nothing.
            operator.execute(query)
        else:
            assert refusal(operator, query).sqlstate == "42501", query
    assert operator.execute("update vae.versions set state = 'retired'").rowcount == 0
    assert operator.execute("update vae.refreshes set error = 'mine'").rowcount == 0
    assert state(trained) == before
    assert trained.execute("select * from vae.refreshes").fetchall() == log


def test_an_operator_cannot_open_a_published_version_again(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant usage on schema shop to the_operator")
    refused = refusal(login("operator"), "update vae.versions set state = 'loading'")
    assert refused.sqlstate == "VA006"
    assert refused.message_hint


# Trainers


def test_a_trainer_defines_trains_and_drops_models_without_being_superuser(
    trained: psycopg.Connection, login: Login
) -> None:
    trained.execute("create schema sales")
    trained.execute("create table sales.events as select * from events")
    trained.execute("grant usage on schema sales to the_trainer")
    trainer = login("trainer")
    shop = Shop(schema="sales")
    refused = refusal(trainer, "select * from vae.create_model('mine', 'sales.events')")
    assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for sales.events")
    assert refused.message_hint == "its owner can allow it: grant select on sales.events to the_trainer"
    trained.execute("grant select on sales.events to the_trainer")
    assert refusal(trainer, "select * from vae.create_model('mine', 'sales.events')").sqlstate == "42501"
    trained.execute(f"grant create on database {trained.info.dbname} to the_trainer")
    shop.create_model(trainer, "mine")
    trainer.execute("select vae.set_event_type('mine', 'look', 'view')")
    assert train_and_activate(trainer.info.dsn, "mine") == 1
    trainer.execute("call vae.refresh('mine')")
    trainer.execute("call vae.refresh('mine')")
    assert len(trainer.execute("select * from mine.recommend(%s)", [USER]).fetchall()) > 3
    assert trainer.execute("select count(*) from mine.recommendations").fetchone() != (0,)
    trainer.execute("select vae.rebuild_model('mine')")
    trainer.execute("select vae.drop_model('mine')")
    assert trained.execute("select name from vae.models").fetchall() == [("shop",)]
    assert trained.execute("select to_regnamespace('mine')").fetchone() == (None,)
    assert trained.execute("select count(distinct version_id) from vae_private.tensors").fetchone() == (1,)


def test_a_model_whose_owner_leaves_goes_on_as_somebody_elses(
    trained: psycopg.Connection, login: Login, role: str
) -> None:
    trained.execute(f"grant vae_trainer to {role}; grant create on database {trained.info.dbname} to {role}")
    trained.execute(f"grant select on events to {role}")
    with psycopg.connect(as_role(trained.info.dsn, role), autocommit=True) as leaving:
        Shop().create_model(leaving, "mine")
        leaving.execute("grant usage on schema mine to the_reader, the_scorer, the_operator")
        train_and_activate(leaving.info.dsn, "mine")
        leaving.execute("call vae.refresh('mine')")
    trained.execute("grant select on events to the_scorer")
    trained.execute(f"reassign owned by {role} to the_trainer")
    operator, trainer, reader, scorer = map(login, ("operator", "trainer", "reader", "scorer"))
    for full in ("false", "true"):
        refused = refusal(operator, f"call vae.refresh('mine', full => {full})")
        assert refused.sqlstate == "42501"
        assert "grant select on public.events to the_trainer" in str(refused.message_hint)
    trained.execute("grant select on events to the_trainer")
    trained.execute(f"drop owned by {role}")
    operator.execute("call vae.refresh('mine', full => true)")
    assert reader.execute("select count(*) > 0 from mine.recommendations").fetchone() == (True,)
    assert scorer.execute("select count(*) > 0 from mine.recommend(%s)", [USER]).fetchone() == (True,)
    trainer.execute("select vae.rebuild_model('mine')")
    assert train_and_activate(trainer.info.dsn, "mine") == 2
    assert install(trained.info.dsn).warnings == []
    operator.execute("call vae.refresh('mine')")
    owners = trained.execute(
        "select distinct o::regrole::text from (select relowner from pg_class where relnamespace = 'mine'::regnamespace"
        " union all select proowner from pg_proc where pronamespace = 'mine'::regnamespace) t (o)"
    )
    assert owners.fetchall() == [("the_trainer",)]
    # Nothing is left that would keep the role: the fixture drops it.
    trainer.execute("select vae.drop_model('mine')")


def test_what_a_superuser_remakes_belongs_to_the_owner(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant select on events to the_trainer")
    trained.execute(f"grant create on database {trained.info.dbname} to the_trainer")
    trainer = login("trainer")
    Shop().create_model(trainer, "mine")
    train_and_activate(trainer.info.dsn, "mine")
    trainer.execute("call vae.refresh('mine')")
    trained.execute("drop view mine.outlier_users cascade")
    trained.execute("drop materialized view mine.recommendations_materialized cascade")
    trained.execute("select vae.rebuild_model('mine')")
    assert trained.execute("select current_user::text").fetchone() == (trained.info.user,)
    owners = (
        "select distinct pg_get_userbyid(relowner) from pg_class where relnamespace = 'mine'::regnamespace"
        " union select pg_get_userbyid(proowner) from pg_proc where pronamespace = 'mine'::regnamespace"
    )
    assert trained.execute(owners).fetchall() == [("the_trainer",)]
    trained.execute("call vae.refresh('mine')")
    trainer.execute("select vae.rebuild_model('mine')")
    trainer.execute("select vae.drop_model('mine')")


def test_a_trainer_does_not_touch_the_models_of_others(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant select on events to the_trainer")
    trainer = login("trainer")
    refused = refusal(trainer, "select * from vae.create_model('mine', 'events')")
    assert (
        refused.message_hint == f"its owner can allow it: grant create on database {trained.info.dbname} to the_trainer"
    )
    trained.execute(f"grant create on database {trained.info.dbname} to the_trainer")
    before = state(trained)
    assert refusal(trainer, "select vae.drop_model('shop')").message_primary == "permission denied for model shop"
    assert refusal(trainer, "select vae.set_event_type('shop', 'x', 'view')").sqlstate == "42501"
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for model shop"):
        train(trainer.info.dsn)
    assert trainer.execute("delete from vae.models").rowcount == 0
    assert state(trained) == before
    # Usage lets it train and activate, not drop.
    trained.execute("grant usage on schema shop to the_trainer")
    owner = trained.info.user
    for query in (
        "select vae.drop_model('shop')",
        "select vae.rebuild_model('shop')",
        "select vae.set_features('shop', user_features => '{}')",
        "select vae.set_exposure('shop', null)",
        "select vae.set_options('shop', '{}')",
        "select vae.set_event_type('shop', 'look', 'view')",
    ):
        refused = refusal(trainer, query)
        assert (refused.sqlstate, refused.message_primary) == ("42501", f"model shop belongs to {owner}"), query
        assert refused.message_hint == f"act as its owner: set role {owner}"
    assert trainer.execute("delete from vae.models").rowcount == 0
    assert trainer.execute("update vae.event_types set event_type = 'purchase'").rowcount == 0
    assert trainer.execute("delete from vae.event_types").rowcount == 0
    assert trainer.execute("delete from vae.versions").rowcount == 0
    assert refusal(trainer, "delete from vae_private.tensors").sqlstate == "42501"
    assert state(trained) == before


# What only the owner of a model's schema writes, though others may use it.
OWNED = {"models", "event_types", "candidates"}


def test_row_security_holds_for_every_table_whatever_a_role_may_write_there(
    trained: psycopg.Connection, login: Login
) -> None:
    trained.execute("select from vae.set_candidates('shop', 'all', 'events')")
    trained.execute("select vae.create_offer('shop', 'sale', array[%s])", [Shop().items[0]])
    trained.execute(
        "select from vae.verify('shop'); select from vae.check_drift('shop');"
        " insert into vae.metrics (version_id, method, split, metric, k, value, user_count)"
        " select version_id, 'pgvae', 'temporal', 'ndcg', 20, 0.1, 9 from vae.versions;"
        " insert into vae.curves (version_id, curve, method, position, x, y, weight)"
        " select version_id, 'churn_bands', 'pgvae', 1, 0.1, 0.1, 9 from vae.versions"
    )
    trainer = login("trainer")
    columns = dict(
        trained.execute(
            "select c.relname, string_agg(quote_ident(a.attname), ', ' order by a.attnum)"
            " from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped"
            " where c.relnamespace = 'vae'::regnamespace and c.relrowsecurity"
            " and a.attidentity = '' and has_column_privilege('the_trainer', c.oid, a.attnum, 'insert') group by 1"
        ).fetchall()
    )
    updated = {
        "models": "options",
        "versions": "retired_at",
        "event_types": "weight",
        "refreshes": "error",
        "candidates": "item_id_column",
    }
    assert OWNED | {"versions", "metrics", "segments", "offers", "refreshes", "observations"} < columns.keys()

    def written() -> set[str]:
        """Gives what the trainer can write about the model of somebody else."""
        found = set()
        for name, own in columns.items():
            for act, query in {
                "insert": f"insert into vae.{name} ({own}) select {own} from vae.{name} limit 1",
                "update": f"update vae.{name} set {updated.get(name, own.split(', ')[0])} = default",
                "delete": f"delete from vae.{name}",
            }.items():
                with trainer.transaction(force_rollback=True):
                    try:
                        if trainer.execute(query.encode()).rowcount:
                            found.add(f"{act} {name}")
                    # Of what a role may not do at all the golden file tells.
                    except psycopg.errors.InsufficientPrivilege:
                        pass
                    # Row security let it through.
                    except psycopg.errors.IntegrityError:
                        found.add(f"{act} {name}")
        return found

    assert written() == set()
    trained.execute("grant usage on schema shop to the_trainer")
    assert written() == {
        *(f"insert {name}" for name in columns.keys() - OWNED),
        *("update versions", "update refreshes"),
        *(f"delete {name}" for name in ("metrics", "curves", "refreshes", "observations", "verifications", "offers")),
    }


_FORGED = (
    "insert into vae.models (name, events_schema, events_table, user_id_column, item_id_column, occurred_at_column,"
    " user_id_type, item_id_type, occurred_at_type, options) values (%s, 'public', 'events', 'user_id', 'item_id',"
    " 'occurred_at', %s, 'bigint', %s, vae_private.default_options() || %s)"
)


@pytest.mark.parametrize(
    ("name", "user_type", "time_type", "sqlstate"),
    [
        ("public", "bigint", "timestamptz", "42501"),
        ("shop2", "bigint", "timestamptz", "42501"),
        ("mine", "bigint) returns int language sql as 'select 1'; create table bad (); --", "timestamptz", "23514"),
        ("mine", "bigint", "timestamptz; create table bad (); --", "23514"),
    ],
)
def test_a_trainer_cannot_forge_a_model_that_others_would_build(
    trained: psycopg.Connection, login: Login, name: str, user_type: str, time_type: str, sqlstate: str
) -> None:
    trained.execute("create schema mine authorization the_trainer")
    refused = refusal(login("trainer"), _FORGED, [name, user_type, time_type, "{}"])
    assert refused.sqlstate == sqlstate


def test_options_that_are_no_numbers_reach_no_statement(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("create schema mine authorization the_trainer")
    trained.execute("grant select on events to the_trainer")
    trainer = login("trainer")
    forged = '{"recommendations": "1) r with no data; create table public.bad (); --"}'
    trainer.execute(_FORGED, ["mine", "bigint", "timestamptz", forged])
    refused = refusal(trained, "select vae.rebuild_model('mine')")
    assert refused.sqlstate == "22P02"
    assert trained.execute("select to_regclass('public.bad')").fetchone() == (None,)


def test_no_code_of_a_models_owner_runs_with_more_rights_in_a_refresh(
    trained: psycopg.Connection, login: Login
) -> None:
    """The owner of a model puts a view in place of its predictions, with a type whose cast runs a function."""
    trained.execute(f"grant create on database {trained.info.dbname} to the_trainer")
    trained.execute("grant select on events to the_trainer")
    trainer = login("trainer")
    Shop().create_model(trainer, "mine")
    train_and_activate(trainer.info.dsn, "mine")
    trainer.execute(
        """
        drop view mine.explanations;
        drop materialized view mine.explanations_materialized;
        drop view mine.recommendations, mine.stored_digests, mine.stored_recommendations;
        drop materialized view mine.recommendations_materialized, mine.recommendations_changed;
        create table mine.ran_as (role text);
        create type mine.number as (value integer);
        create function mine.run(n mine.number) returns integer language plpgsql as $$
        begin insert into mine.ran_as values (current_user); return 1; end $$;
        create cast (mine.number as integer) with function mine.run(mine.number) as implicit;
        create materialized view mine.recommendations_materialized as
            select 1::bigint as user_id, row(1)::mine.number as model_version;
        create unique index on mine.recommendations_materialized (user_id);
        create materialized view mine.recommendations_changed as
            select 1::bigint as user_id, (row(1)::mine.number)::integer as model_version;
        create unique index on mine.recommendations_changed (user_id);
        create view mine.stored_digests as select user_id, 1::bigint as digest from mine.recommendations_changed;
        truncate mine.ran_as;
        """
    )
    trained.execute("call vae.refresh('mine', views => '{recommendations}', full => true)")
    trained.execute("call vae.refresh('mine', views => '{recommendations}')")
    # What the owner's materialized view calls runs as its owner, as in any refresh of it.
    assert trained.execute("select distinct role from mine.ran_as").fetchall() == [("the_trainer",)]


def test_a_schema_exchanged_during_a_refresh_runs_nothing_with_more_rights(
    trained: psycopg.Connection, login: Login
) -> None:
    """The owner's own view of events puts another schema in the model's place while a superuser refreshes it."""
    trained.execute(f"grant create on database {trained.info.dbname} to the_trainer")
    trained.execute("grant select on events to the_trainer")
    trainer = login("trainer")
    trainer.execute(
        """
        create schema trap;
        create table trap.ran_as (role text);
        create table trap.armed ();
        create function trap.run() returns integer language plpgsql as $$
        begin insert into trap.ran_as values (current_user); return 1; end $$;
        create function trap.swap() returns boolean language plpgsql as $$
        begin
            if to_regclass('trap.armed') is not null and to_regnamespace('mine_real') is null then
                alter schema mine rename to mine_real;
                create schema mine;
                create view mine.refresh_events as select * from mine_real.refresh_events;
                create view mine.digested_events as select * from mine_real.digested_events;
                create view mine.refresh_digests as select * from mine_real.refresh_digests;
                create view mine.stored_recommendations as select * from mine_real.stored_recommendations;
                create view mine.recommendations_materialized as select trap.run() as model_version;
                create materialized view mine.recommendations_changed as select trap.run() as n with no data;
            end if;
            return true;
        end $$;
        alter table trap.armed rename to disarmed;
        create view trap.events as select e.* from public.events e where trap.swap();
        """
    )
    Shop(schema="trap").create_model(trainer, "mine")
    train_and_activate(trainer.info.dsn, "mine")
    trainer.execute("alter table trap.disarmed rename to armed")
    trained.execute("call vae.refresh('mine', array['recommendations'])")
    assert trained.execute("select to_regnamespace('mine_real') is not null").fetchone() == (True,)
    assert trained.execute("select distinct role from trap.ran_as").fetchall() == [("the_trainer",)]


def test_no_function_of_somebody_else_becomes_part_of_an_installation_or_a_training(
    connection: psycopg.Connection,
) -> None:
    """As where everybody may create in public, which was the rule before PostgreSQL 15."""
    connection.execute(
        "create function public.regexp_replace(name, text, text) returns text language sql as"
        " 'select current_user::text'"
    )
    install(connection.info.dsn)
    used = connection.execute(
        "select r.ev_class::regclass from pg_depend d join pg_rewrite r on r.oid = d.objid"
        " where d.refclassid = 'pg_proc'::regclass and d.refobjid = 'public.regexp_replace'::regproc"
    )
    assert used.fetchall() == []
    # Nor of a training.
    connection.execute(
        "create function public.array_position(text[], text) returns integer language sql as 'select 1 / 0'"
    )
    Shop().make(connection)
    Shop().create_model(connection)
    assert train(connection.info.dsn) == 1


def test_the_log_of_activations_tells_who_and_misses_none(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant usage on schema shop to the_operator")
    train(trained.info.dsn)
    operator = login("operator")
    trainer = login("trainer")
    trained.execute("grant usage on schema shop to the_trainer")
    for forged in (
        "insert into vae.activations (model_id, version, action, forced) values (1, 2147483647, 'activate', false)",
        "update vae.activations set forced = false",
        "delete from vae.activations",
    ):
        assert refusal(operator, forged).sqlstate == "42501"
        assert refusal(trainer, forged).sqlstate == "42501"
    # Nor by way of a trigger of one's own with the function that may.
    trained.execute("create schema trainers authorization the_trainer")
    trainer.execute("create table trainers.versions (like vae.versions)")
    forged = (
        "create trigger t after insert on trainers.versions for each row execute function vae_private.log_activation()"
    )
    assert refusal(trainer, forged).sqlstate == "42501"
    forged = "insert into vae.refreshes (model_id, view, started_by) values (1, 'recommendations', 'x')"
    assert refusal(operator, forged).sqlstate == "42501"
    operator.execute("update vae.versions set state = 'retired' where state = 'active'")
    operator.execute("update vae.versions set state = 'active' where version = 2")
    last = "select version, activated_by, forced, reason from vae.activations order by activation_id desc limit 1"
    assert trained.execute(last).fetchone() == (2, "the_operator", True, "set without vae.activate")
    operator.execute("select * from vae.activate('shop', 1, force => true, reason => 'better')")
    assert trained.execute(last).fetchone() == (1, "the_operator", True, "better")
    # Who it is stays true, whatever the state is set by, and after set role.
    told = '{"activated_by": "x", "forced": false}'
    operator.execute("select set_config('vae.activation', %s, false)", [told])
    operator.execute("update vae.versions set state = 'retired' where state = 'active'")
    operator.execute("update vae.versions set state = 'active' where version = 2")
    assert trained.execute(last).fetchone() == (2, "the_operator", False, None)
    trained.execute("set role the_operator; select * from vae.activate('shop', 1, force => true); reset role")
    assert trained.execute(last).fetchone() == (1, "the_operator", True, None)
    trained.execute("alter schema shop owner to the_trainer")
    trainer.execute("select * from vae.drop_version('shop', 2)")
    last = "select version, activated_by, action from vae.activations order by activation_id desc limit 1"
    assert trained.execute(last).fetchone() == (2, "the_trainer", "drop")


def test_a_trainer_cannot_publish_a_version_that_nobody_wrote(trained: psycopg.Connection, login: Login) -> None:
    trained.execute("grant usage on schema shop to the_trainer")
    forged = (
        "insert into vae.versions (model_id, version, state, event_count, user_count, item_count, seed, format,"
        " code_digest, trainer_version, config, durations, quality)"
        " values (1, 9, 'ready', 1, 1, 1, 1, 1, '', '', '{}', '{}', '{}')"
    )
    assert refusal(login("trainer"), forged).sqlstate == "42501"


# Code


def test_only_a_superuser_changes_the_runtime_even_where_another_owns_it(
    trained: psycopg.Connection, login: Login
) -> None:
    trained.execute("grant usage on schema shop to the_trainer")
    trained.execute("grant select on events to the_trainer")
    trained.execute("grant create on schema vae_private to the_trainer")
    trained.execute("alter function vae_private.load_runtime(text) owner to the_trainer")
    trained.execute("alter function vae_private.recommend(integer, text, integer, jsonb) owner to the_trainer")
    before = trained.execute("select prosrc from pg_proc where proname = 'load_runtime'").fetchall()
    trainer = login("trainer")
    refused = refusal(
        trainer,
        "create or replace function vae_private.load_runtime(wanted text) returns void language plpython3u as 'pass'",
    )
    assert (refused.sqlstate, refused.message_primary) == ("42501", "permission denied for language plpython3u")
    assert refusal(trainer, "do language plpython3u $$ plpy.notice('mine') $$").sqlstate == "42501"
    assert refusal(trainer, "update pg_proc set prosrc = 'pass' where proname = 'load_runtime'").sqlstate == "42501"
    assert trained.execute("select prosrc from pg_proc where proname = 'load_runtime'").fetchall() == before
    assert len(trainer.execute("select * from shop.recommend(%s)", [USER]).fetchall()) > 3
