"""The `pgvae` command. Each module of this package holds one subject and registers its commands on `app`."""

from __future__ import annotations

import sys
from typing import Annotated

import psycopg
import typer

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
    typer.Option("--dsn", envvar="PGVAE_DSN", help="Connection string; without it, the embedded server.", show_default=False),
]


def main() -> None:
    """Runs the command line; a failure the user can mend ends in a message, a hint and exit status 1."""
    # Imported here: each module registers itself on `app`.
    from pgvae.cli import server  # noqa: F401

    try:
        app()
    except PgvaeError as error:
        err.print(f"[bold red]error:[/] {error.message}", highlight=False, markup=True)
        if error.hint:
            err.print(f"[bold]hint:[/] {error.hint}", highlight=False)
        sys.exit(1)
    except psycopg.Error as error:
        err.print(f"[bold red]error:[/] {error.diag.message_primary or error}", highlight=False)
        if error.diag.message_hint:
            err.print(f"[bold]hint:[/] {error.diag.message_hint}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; nothing half-done was kept")
        sys.exit(130)
