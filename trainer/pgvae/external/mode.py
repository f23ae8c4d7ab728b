"""Whether a database is scored from outside."""

from __future__ import annotations

import psycopg


def is_external(connection: psycopg.Connection) -> bool:
    """Says whether the database has no PL/Python; what a role may not see, or is not there, is none of it."""
    try:
        with connection.transaction():
            row = connection.execute("select is_external from vae_private.installation").fetchone()
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
        return False
    return bool(row and row[0])
