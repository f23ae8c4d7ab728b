"""`pgvae up`, `down`, `psql`, `status` and `doctor`: the server itself."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Annotated, Any

import psycopg
import typer
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rich.markup import escape
from rich.table import Table

from pgvae import doctor as doctors
from pgvae.cli import Dsn, app
from pgvae.connection import connect, resolve_dsn
from pgvae.console import err, out
from pgvae.errors import PgvaeError
from pgvae.server import Server, Status


@app.command()
def up(
    port: Annotated[
        int | None,
        typer.Option(
            help="Listen on this port of localhost too, with a password; 0 closes it again.", show_default=False
        ),
    ] = None,
) -> None:
    """Start the embedded PostgreSQL server.

    The first time, this makes a private cluster in a directory of your own (PGVAE_HOME; /var/lib/pgvae for root) with
    a database named pgvae. It listens on a Unix socket that only you can reach, and leaves other servers alone.

    Not needed where you have a server: give its connection string as PGVAE_DSN.
    """
    server = Server.default()
    if not server.data.exists():
        err.print(f"making a PostgreSQL cluster in {server.home}", highlight=False)
    server.up(port)
    status = server.status()
    out.print(f"PostgreSQL {_short(status.version)} is up, in {status.home}", highlight=False, soft_wrap=True)
    out.print(f"  DSN           {status.dsn}", highlight=False, markup=False, soft_wrap=True)
    if status.port:
        out.print(f"  TCP           localhost:{status.port}, user postgres", highlight=False, soft_wrap=True)
        out.print(f"  its password  {status.home / 'password'}", highlight=False, soft_wrap=True)
    out.print("  next          pgvae install, pgvae psql, pgvae status; pgvae down stops it", highlight=False)


@app.command()
def down(
    remove: Annotated[bool, typer.Option("--remove", help="Delete the cluster with all of its databases too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
) -> None:
    """Stop the embedded PostgreSQL server; its data stays unless you say --remove."""
    server = Server.default()
    if remove:
        if not server.status().exists:
            out.print(f"there is no embedded server in {server.home}", highlight=False)
            return
        if not yes:
            typer.confirm(f"delete the cluster in {server.home} with every database in it?", abort=True)
        server.remove()
        out.print(f"the embedded server in {server.home} is removed", highlight=False)
    elif server.down():
        out.print(f"the embedded server is down; its data stays in {server.home}", highlight=False)
    else:
        out.print("the embedded server was not running", highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context, dsn: Dsn = None) -> None:
    """Open psql on the database; further arguments go to psql.

    For example: pgvae psql -c 'select * from vae.models'
    """
    target: dict[str, Any] = conninfo_to_dict(resolve_dsn(dsn))
    program = shutil.which("psql")
    if program is None:
        raise PgvaeError("psql is not installed", hint="on Debian and Ubuntu: sudo apt install postgresql-client")
    # The arguments of a process can be read by every user of the machine, its environment cannot.
    if password := target.pop("password", None):
        os.environ["PGPASSWORD"] = str(password)
    os.execv(program, [program, "--dbname", make_conninfo(**target), *context.args])


@app.command()
def status(dsn: Dsn = None) -> None:
    """Show the embedded server, the database in use, and its models with their active versions."""
    try:
        embedded = Server.default().status()
    except PgvaeError as error:
        # With a server of one's own the embedded one need not be within reach.
        if not dsn:
            raise
        out.print(f"embedded server: {error.message}", highlight=False, markup=False, soft_wrap=True)
    else:
        _show_embedded(embedded)
        if not dsn and not embedded.running:
            return
    with connect(dsn, autocommit=True) as connection:
        _show_database(connection)


def _show_embedded(embedded: Status) -> None:
    if embedded.running:
        out.print(f"embedded server: up, PostgreSQL {_short(embedded.version)}", highlight=False)
        out.print(f"  home  {embedded.home}", highlight=False, soft_wrap=True)
        out.print(f"  DSN   {embedded.dsn}", highlight=False, markup=False, soft_wrap=True)
        if embedded.port:
            out.print(f"  TCP   localhost:{embedded.port}", highlight=False)
        out.print(f"  log   {embedded.log}", highlight=False, soft_wrap=True)
    elif embedded.exists:
        out.print(f"embedded server: down, its data is in {embedded.home}; start it with: pgvae up", highlight=False)
    else:
        out.print("embedded server: none; make one with: pgvae up", highlight=False)


@app.command()
def doctor(
    dsn: Dsn = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for a machine.")] = False,
) -> None:
    """Check what a server needs for pgvae, and name the command that mends each missing piece.

    Changes nothing. The exit status is 1 where something required is missing.
    """
    with connect(dsn, autocommit=True) as connection:
        checks = doctors.diagnose(connection)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        _show_checks(checks)
    if doctors.failed(checks):
        raise typer.Exit(1)


def _show_checks(checks: list[doctors.Check]) -> None:
    colours = {"ok": "green", "info": "blue", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "status", "found"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        colour = colours[check.status]
        table.add_row(check.name, f"[{colour}]{check.status}[/]", escape(check.found))
    out.print(table)
    # Below the table and unwrapped, so that a command can be copied.
    for check in checks:
        if check.remedy:
            out.print(f"{check.name} → {check.remedy}", highlight=False, markup=False, soft_wrap=True)
    if doctors.failed(checks):
        err.print("[bold red]pgvae cannot work here yet[/]: mend what failed, then run pgvae doctor again")


def _show_database(connection: psycopg.Connection) -> None:
    info = connection.info
    version = _short(info.parameter_status("server_version"))
    out.print(
        f"database: {info.dbname} on {info.host}, as {info.user}, PostgreSQL {version}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    facts = doctors.read_facts(connection)
    if not facts.pgvae_installed:
        out.print("  pgvae is not installed in it; install it with: pgvae install", highlight=False)
        return
    try:
        rows = connection.execute(
            """
            select m.name, v.version, v.state, v.created_at, v.user_count, v.item_count, v.event_count
            from vae.models as m
            left join vae.versions as v on v.model_id = m.model_id and v.state = 'active'
            order by m.name
            """
        ).fetchall()
    except (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.UndefinedTable,
        psycopg.errors.UndefinedColumn,
    ) as error:
        out.print(f"  pgvae is installed; its models cannot be read: {error.diag.message_primary}", highlight=False)
        return
    if not rows:
        out.print("  pgvae is installed; no model yet: select * from vae.create_model(…)", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "active version", "published", "users", "items", "events"):
        table.add_column(heading)
    for name, version, state, created_at, users, items, events in rows:
        if state is None:
            table.add_row(escape(name), "none", f"train one with: pgvae train {escape(name)}", "", "", "")
        else:
            table.add_row(
                escape(name), str(version), f"{created_at:%Y-%m-%d %H:%M}", f"{users:,}", f"{items:,}", f"{events:,}"
            )
    out.print(table)


def _short(version: str | None) -> str:
    return (version or "?").split()[0]
