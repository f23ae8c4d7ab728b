"""Which server a command talks to: the `--dsn` option, else PGVAE_DSN, else the embedded server."""

from __future__ import annotations

import os

import psycopg

from pgvae.errors import PgvaeError


def resolve_dsn(dsn: str | None) -> str:
    """Gives the connection string to use; PgvaeError where there is none."""
    if found := dsn or os.environ.get("PGVAE_DSN"):
        return found
    from pgvae.server import Server

    return Server.default().dsn()


def connect(dsn: str | None, *, autocommit: bool = False) -> psycopg.Connection:
    """Opens a connection whose application name is pgvae; PgvaeError where the server cannot be reached."""
    target = resolve_dsn(dsn)
    try:
        # UTF8 whatever the environment or the role says: pgvae's own texts hold characters that others lack.
        connection = psycopg.connect(
            target, autocommit=autocommit, fallback_application_name="pgvae", client_encoding="UTF8"
        )
    except psycopg.OperationalError as error:
        raise PgvaeError(
            f"cannot connect: {str(error).strip()}",
            hint="check --dsn or PGVAE_DSN, or start the embedded server with: pgvae up",
        ) from error
    except psycopg.ProgrammingError as error:
        raise PgvaeError(
            f"the connection string is none: {str(error).strip()}",
            hint="check --dsn or PGVAE_DSN, as in: host=localhost dbname=shop user=ana, or postgresql://ana@localhost/shop",
        ) from error
    # Whatever the default of the role or the database: what waits for a lock must see what the other session left.
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    if not str(connection.info.parameter_status("DateStyle")).startswith("ISO"):
        # Psycopg reads times in no other form, and a role or a database may have another one.
        with connection.transaction():
            connection.execute("set datestyle = 'ISO'")
    return connection


def keep_open(connection: psycopg.Connection) -> None:
    """Lets the transaction wait for what is computed in its midst, whatever idle_in_transaction_session_timeout says.

    That ends transactions that somebody forgot; this one ends with the program.
    """
    connection.execute("set local idle_in_transaction_session_timeout = 0")
