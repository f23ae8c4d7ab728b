"""Putting a published version into service, unless a gate refuses it."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

# SQLSTATEs with which a gate of vae.activate refuses: other code, popularity, parity, the active version.
GATES = ("VA003", "VA008", "VA009", "VA010")


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What became of a version that should go live; `refusal` is the message of the gate that refused it."""

    previous: int | None = None
    refusal: str | None = None
    hint: str | None = None


def try_to_activate(connection: psycopg.Connection, model: str, version: int) -> Activation:
    """Activates a version unless a gate refuses it, and commits; every other error is raised."""
    try:
        with connection.transaction():
            row = connection.execute("select * from vae.activate(%s, %s)", [model, version]).fetchone()
    except psycopg.Error as error:
        if error.sqlstate not in GATES:
            raise
        return Activation(refusal=error.diag.message_primary, hint=error.diag.message_hint)
    return Activation(previous=row[1] if row else None)
