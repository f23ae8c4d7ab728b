"""Installs pgvae into a database, upgrades it, and removes it again: one transaction each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from pgvae import __version__, doctor, resources
from pgvae.connection import connect
from pgvae.errors import PgvaeError
from pgvae.external.mode import is_external
from pgvae.external.stubs import without_python
from pgvae.schema import PUBLIC
from pgvae_runtime import forward

# Two installations into one database wait for each other. The number is the ASCII of "pgvae".
_LOCK = 0x7067766165
# While an installation waits for a session that holds a table, whoever wants to score waits behind it.
_LOCK_TIMEOUT = "10s"
# Those of vae.refresh. Before any other, or an upgrade and a refresh would wait for each other.
_REFRESH_LOCKS = """
select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('pgvae refresh'), m.model_id)
from vae.models m
order by m.model_id
"""
# All that is remade, before any of it. Who scores holds some and is about to lock others: where both would wait for
# each other the installation lets go, sooner than PostgreSQL would call it a deadlock and end either, and tries again.
_RELATION_LOCKS = """
do $$
declare
    relation record;
    patience constant text := pg_catalog.current_setting('lock_timeout');
    last_try constant timestamptz := pg_catalog.clock_timestamp() + patience::interval;
begin
    loop
        begin
            perform pg_catalog.set_config('lock_timeout', '500ms', true);
            for relation in
                select c.oid::regclass as name, c.relkind
                from pg_catalog.pg_class c
                join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                where (n.nspname in ('vae', 'vae_private') and c.relkind in ('r', 'v'))
                    or (n.nspname in (select m.name from vae.models m) and c.relkind = 'v')
                -- First what everybody begins with, so that nobody new comes in while those who are at it finish.
                order by case
                    when c.relname in ('scoring_versions', 'published_versions') then 1
                    when n.nspname = 'vae' and c.relkind = 'v' then 2
                    when n.nspname = 'vae' and c.relname in ('models', 'versions') then 3
                    else 4 end, c.oid desc
            loop
                -- lock table would lock what a view reads, the shop's tables too.
                execute pg_catalog.format(
                    case relation.relkind when 'v' then 'alter view %s reset (check_option)'
                        else 'lock table %s in access exclusive mode' end, relation.name);
            end loop;
            exit;
        exception when lock_not_available or deadlock_detected then
            if pg_catalog.clock_timestamp() > last_try then
                raise;
            end if;
        end;
        perform pg_catalog.pg_sleep(0.02);
    end loop;
    perform pg_catalog.set_config('lock_timeout', patience, true);
end $$;
"""


_FOREIGN_SCHEMA = """
select pg_catalog.to_regnamespace('vae') is not null and pg_catalog.to_regclass('vae_private.installation') is null
"""

# What a dump without data leaves of pgvae: its schemas, and those of models, whose names vae.models no longer tells.
_LEFT = """
select pg_catalog.quote_ident(n.nspname)
from pg_catalog.pg_namespace n
where n.nspname in ('vae', 'vae_private', 'vae_optuna') or exists (
    select
    from pg_catalog.pg_class c
    join pg_catalog.pg_rewrite r on r.ev_class = c.oid
    join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_rewrite'::regclass and d.objid = r.oid
    join pg_catalog.pg_proc p on d.refclassid = 'pg_catalog.pg_proc'::regclass and p.oid = d.refobjid
    where c.relnamespace = n.oid and c.relkind = 'm' and c.relname = 'recommendations_materialized'
        and p.pronamespace = 'vae_private'::regnamespace)
order by n.nspname like 'vae%' desc, n.nspname
"""


# Models whose owner's rights the role lacks that installs.
_FOREIGN_OWNERS = """
select m.name, quote_ident(pg_catalog.pg_get_userbyid(n.nspowner)), quote_ident(current_user)
from vae.models m
join pg_catalog.pg_namespace n on n.nspname = m.name
where not pg_catalog.pg_has_role(n.nspowner, 'usage')
order by m.name
"""

_OUTDATED = """
select m.name, v.format = :format
from vae.models m
join vae.versions v using (model_id)
where v.state = 'active' and v.code_digest <> :digest
order by m.name
"""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What stands in a database after `install`.

    `warnings` names the models that could not be rebuilt, `outdated` those whose active version other code trained, and
    `silent` those of them whose weights this code cannot read.
    """

    release: str
    digest: str
    models: int
    warnings: list[str]
    outdated: list[str]
    silent: list[str]


def install(dsn: str | None = None, *, external: bool | None = None) -> Installation:
    """Brings a database to this release: tables by Alembic, then functions, views and the runtime's code.

    `external`: without PL/Python, scored from outside; None: as it is installed, or with PL/Python. All of it is one
    transaction, and running it again changes nothing. PgvaeError where the server lacks what pgvae needs; the database
    is then as it was.
    """
    with connect(dsn, autocommit=True) as connection:
        if external is None:
            external = is_external(connection)
        check_server(connection, external=external)
    warnings: list[str] = []

    def opened() -> psycopg.Connection:
        connection = connect(dsn)
        connection.add_notice_handler(
            lambda notice: warnings.append(f"{notice.message_primary}; {notice.message_hint or ''}")
        )
        return connection

    engine = create_engine("postgresql+psycopg://", creator=opened, poolclass=NullPool)
    try:
        with engine.begin() as sqlalchemy_connection:
            return _install(sqlalchemy_connection, warnings, external=external)
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
            raise PgvaeError(
                "another session holds pgvae's tables in an open transaction, or refreshes a model:"
                f" {_LOCK_TIMEOUT} were not enough",
                hint="find it: select pid, usename, state, query from pg_stat_activity"
                " where xact_start < now() - interval '10 s'; nothing was changed, run pgvae install again",
            ) from None
        # What PostgreSQL said, without SQLAlchemy's frame around it.
        raise (error.orig or error) from None


def _install(connection: Connection, warnings: list[str], *, external: bool) -> Installation:
    connection.execute(text("select pg_catalog.pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    # Without NOTICEs of the kind "already exists, skipping": running it again is quiet.
    connection.execute(text("set local client_min_messages = warning"))
    # Of a schema in the path that others write to, a function whose arguments fit better would become part of a view.
    connection.execute(text("set local search_path = pg_catalog, pg_temp"))
    connection.execute(text(f"set local lock_timeout = '{_LOCK_TIMEOUT}'"))
    if connection.execute(text(_FOREIGN_SCHEMA)).scalar_one():
        raise PgvaeError("the database has a schema vae that is not pgvae's", hint="rename it: pgvae needs that name")
    connection.execute(text("create schema if not exists vae"))
    config = Config()
    config.set_main_option("script_location", str(resources.directory("migrations")))
    config.attributes["connection"] = connection
    _check_revision(connection, config)
    if connection.execute(text("select pg_catalog.to_regclass('vae.models') is not null")).scalar_one():
        _check_owners(connection)
        connection.execute(text(_REFRESH_LOCKS))
        connection.execution_options(no_parameters=True).exec_driver_sql(_RELATION_LOCKS)
    command.upgrade(config, "head")
    _prepare_language(connection, external=external)
    for path in resources.sql_files():
        _apply(connection, path, external=external)
    models: int = connection.execute(text("select vae_private.build_all_models()")).scalar_one()
    digest = resources.runtime_digest()
    connection.execute(
        text("update vae_private.installation set release = :release, runtime_digest = :digest, installed_at = now()"),
        {"release": __version__, "digest": digest},
    )
    outdated = connection.execute(text(_OUTDATED), {"digest": digest, "format": forward.FORMAT}).all()
    return Installation(
        release=__version__,
        digest=digest,
        models=models,
        warnings=warnings,
        outdated=[name for name, _ in outdated],
        silent=[name for name, is_readable in outdated if not is_readable],
    )


def _check_revision(connection: Connection, config: Config) -> None:
    """Refuses a database whose tables a newer release made, or that came without their rows."""
    context = MigrationContext.configure(connection, opts={"version_table_schema": PUBLIC})
    heads = set(context.get_current_heads())
    if not heads and connection.execute(text("select pg_catalog.to_regclass('vae_private.installation')")).scalar():
        schemas = ", ".join(connection.execute(text(_LEFT)).scalars())
        raise PgvaeError(
            "the database holds pgvae's tables without their rows, as after a restore of a dump with --schema-only",
            hint="restore with the data of the schemas vae and vae_private; or begin anew, without models:"
            f" drop schema {schemas} cascade, then pgvae install",
        )
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    unknown = heads - known
    if unknown:
        release = connection.execute(text("select release from vae_private.installation")).scalar()
        raise PgvaeError(
            f"the database holds pgvae {release}, which is newer than this pgvae, {__version__}"
            f" (its tables are of revision {', '.join(sorted(unknown))})",
            hint="upgrade this one: pip install --upgrade pgvae; there is no way back to an older release",
        )


def _check_owners(connection: Connection) -> None:
    """Refuses, where no superuser installs, models that it could not remake."""
    foreign = connection.execute(text(_FOREIGN_OWNERS)).all()
    if foreign:
        owners = ", ".join(sorted({owner for _, owner, _ in foreign}))
        raise PgvaeError(
            f"model {foreign[0][0]} belongs to {foreign[0][1]}, of which {foreign[0][2]} is no member",
            hint=f"grant {owners} to {foreign[0][2]}; an upgrade remakes a model's views as their owner",
        )


def _prepare_language(connection: Connection, *, external: bool) -> None:
    exists = "select exists (select from pg_catalog.pg_extension where extname = 'plpython3u')"
    created = not external and not connection.execute(text(exists)).scalar_one()
    if created:
        connection.execute(text("create extension plpython3u"))
    connection.execute(
        text("insert into vae_private.installation (created_extension) values (:created) on conflict do nothing"),
        {"created": created},
    )
    connection.execute(
        text(
            "update vae_private.installation"
            " set is_external = :external, created_extension = created_extension or :created"
        ),
        {"external": external, "created": created},
    )


def _apply(connection: Connection, path: Path, *, external: bool) -> None:
    # PL/Python indents every line of a body, so each module must stand on one line: repr() sees to that.
    sources = "{" + ", ".join(f"{name!r}: {source!r}" for name, source in resources.runtime_modules().items()) + "}"
    script = path.read_text(encoding="utf-8")
    if external:
        script = without_python(script)
    script = script.replace("@RUNTIME@", resources.runtime_digest()).replace("@SOURCES@", sources)
    # Function bodies hold colons and percent signs, which must not be taken for parameters.
    connection.execution_options(no_parameters=True).exec_driver_sql(script)


def check_server(connection: psycopg.Connection, *, external: bool) -> None:
    """Refuses a server that cannot hold pgvae, with the remedy."""
    facts = doctor.read_facts(connection)
    if facts.standby:
        raise PgvaeError("the server is a standby, which is read-only", hint="install on its primary")
    checks = [doctor.check_version(facts)]
    if not external:
        if not facts.superuser:
            raise PgvaeError(
                f"role {facts.role} is not a superuser",
                hint="only a superuser may create functions in plpython3u: install as one, such as postgres;"
                f" {doctor.WITHOUT_PYTHON}",
            )
        checks.append(doctor.check_language(facts))
        if not doctor.failed(checks):
            checks += doctor.check_inside(connection, facts)
    for check in checks:
        if check.status == "fail":
            raise PgvaeError(f"{check.name}: {check.found}", hint=check.remedy)


def is_installed(connection: psycopg.Connection) -> bool:
    """Says whether the database of the connection holds pgvae."""
    row = connection.execute("select pg_catalog.to_regclass('vae.models') is not null").fetchone()
    return bool(row and row[0])


# Objects outside pgvae's schemas that use something inside: dropping pgvae would take them, or columns of them, along.
_DEPENDENTS = """
select distinct pg_catalog.regexp_replace(
    pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid), '^rule _RETURN on ', '')
from pg_catalog.pg_depend d
left join pg_catalog.pg_class c on d.refclassid = 'pg_catalog.pg_class'::regclass and c.oid = d.refobjid
left join pg_catalog.pg_proc p on d.refclassid = 'pg_catalog.pg_proc'::regclass and p.oid = d.refobjid
left join pg_catalog.pg_type t on d.refclassid = 'pg_catalog.pg_type'::regclass and t.oid = d.refobjid
left join pg_catalog.pg_type own on d.classid = 'pg_catalog.pg_type'::regclass and own.oid = d.objid
join pg_catalog.pg_namespace n on n.oid = coalesce(c.relnamespace, p.pronamespace, t.typnamespace)
left join pg_catalog.pg_namespace home on home.oid = own.typnamespace
cross join lateral pg_catalog.pg_identify_object_as_address(d.classid, d.objid, d.objsubid) a
where n.nspname = any (%(schemas)s)
    -- The first part of an address is its schema, but for types, which are written in one part.
    and coalesce(home.nspname, a.object_names[1]) <> all (%(schemas)s::text[] || array['pg_toast', 'pg_catalog'])
"""


def uninstall(dsn: str | None = None) -> list[str]:
    """Removes what `install` and vae.create_model made, in one transaction; gives what was left, with the reason.

    PgvaeError where somebody's views use pgvae's objects, or where a model's schema holds objects of others.
    """
    with connect(dsn) as connection:
        if not is_installed(connection):
            raise PgvaeError("pgvae is not installed in this database", hint="check --dsn or PGVAE_DSN")
        connection.execute("select pg_catalog.pg_advisory_xact_lock(%s)", [_LOCK])
        connection.execute("set local client_min_messages = warning")
        models = [row[0] for row in connection.execute("select name from vae.models").fetchall()]
        schemas = ["vae", "vae_private", "vae_optuna", *models]
        if dependents := [row[0] for row in connection.execute(_DEPENDENTS, {"schemas": schemas}).fetchall()]:
            raise PgvaeError(f"other objects use pgvae: {', '.join(dependents)}", hint="drop them first")
        for model in models:
            _drop_model(connection, model)
        row = connection.execute("select created_extension, created_roles from vae_private.installation").fetchone()
        created_extension, created_roles = row if row else (False, [])
        connection.execute("drop schema vae, vae_private cascade")
        # Made by the first `pgvae tune`.
        connection.execute("drop schema if exists vae_optuna cascade")
        left = _drop_if_unused(connection, "extension", ["plpython3u"] if created_extension else [])
        return left + _drop_if_unused(connection, "role", created_roles)


def _drop_model(connection: psycopg.Connection, model: str) -> None:
    try:
        connection.execute("select vae.drop_model(%s)", [model])
    except psycopg.errors.DependentObjectsStillExist as error:
        raise PgvaeError(
            f"other objects use model {model}: {error.diag.message_detail}", hint="drop or move them first"
        ) from error


def _drop_if_unused(connection: psycopg.Connection, kind: str, names: list[str]) -> list[str]:
    left = []
    for name in reversed(names):
        try:
            with connection.transaction():
                connection.execute(sql.SQL("drop {} if exists {}").format(sql.SQL(kind), sql.Identifier(name)))
        except psycopg.errors.DependentObjectsStillExist as error:
            left.append(f"{kind} {name} is in use elsewhere: {error.diag.message_detail or error}")
        except psycopg.errors.InsufficientPrivilege as error:
            # As after a restore by another role than the one that created it.
            left.append(f"{kind} {name} is another role's: {error.diag.message_primary}")
    return left
