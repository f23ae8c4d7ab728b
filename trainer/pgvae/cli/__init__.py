"""The `pgvae` command. Each module of this package holds one subject and registers its commands on `app`."""

from __future__ import annotations

import sys
from typing import Annotated

import psycopg
import typer
from rich.markup import escape

from pgvae.console import err
from pgvae.errors import PgvaeError

app = typer.Typer(
    name="pgvae",
    help="Train a behaviour model on the shop events in PostgreSQL and score users from plain SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn", envvar="PGVAE_DSN", help="Connection string; without it, the embedded server.", show_default=False
    ),
]


def main() -> None:
    """Runs the command line; a failure the user can mend ends in a message, a hint and exit status 1."""
    # Imported here: each module registers itself on `app`.
    from pgvae.cli import database, demo, evaluate, load, refresh, report, server, simulate, train, tune, versions  # noqa: F401

    try:
        app()
    except PgvaeError as error:
        _fail(error.message, error.hint)
    except psycopg.Error as error:
        if error.sqlstate is None or isinstance(error, psycopg.errors.AdminShutdown | psycopg.errors.CrashShutdown):
            reason = (error.diag.message_primary or str(error)).splitlines()[0]
            _fail(
                f"the connection to the server was lost: {reason}",
                "nothing half-done was kept; once the server takes connections, run the command again",
            )
        message = error.diag.message_primary or str(error)
        detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
        _fail(f"{message}{detail} [SQLSTATE {error.sqlstate}]", error.diag.message_hint)
    except KeyboardInterrupt:
        err.print("interrupted; nothing half-done was kept")
        sys.exit(130)


def _fail(message: str, hint: str | None) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if hint:
        err.print(f"[bold]hint:[/] {escape(hint)}", highlight=False, soft_wrap=True)
    sys.exit(1)
