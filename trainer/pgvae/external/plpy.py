"""What PL/Python's module `plpy` gives the runtime, over a connection of psycopg."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

# PL/Python gives numbers, truth values, bytes and arrays of them as Python's own, and all else as texts.
_AS_TEXTS = ("json", "jsonb", "timestamptz", "timestamp", "date", "time", "timetz", "interval", "uuid")

Row = dict[str, Any]


class Error(Exception):
    """An error that the runtime raises for PostgreSQL: the message, and `sqlstate`, `detail` and `hint` beside it."""

    sqlstate: str | None = None
    detail: str | None = None
    hint: str | None = None


class SPIError(Error):
    """An error of a query; `spidata` holds its detail and hint after the place of the first member."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(error.diag.message_primary or str(error).strip())
        self.sqlstate = error.sqlstate
        self.spidata = (None, error.diag.message_detail, error.diag.message_hint)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A query whose parameters are cast to their types."""

    query: str


class Cursor:
    """A cursor on the server, which is fetched from in pieces."""

    def __init__(self, cursor: psycopg.RawServerCursor[Row]) -> None:
        self._cursor = cursor

    def fetch(self, rows: int) -> list[Row]:
        """Gives the next rows, so many at most; none at the end."""
        with _raising(self._cursor.connection):
            return self._cursor.fetchmany(rows)

    def close(self) -> None:
        """Gives back what the server holds for it."""
        self._cursor.close()


class Plpy:
    """Stands for `plpy`, within the transaction that is open on the connection, which it uses alone."""

    Error = Error
    SPIError = SPIError
    # Those of a server do so through files beside its data, which are not here.
    shares_weights = False

    def __init__(self, connection: psycopg.Connection, notice: Callable[[str], None]) -> None:
        self._connection = connection
        self._notice = notice
        self._names = count()

    def prepare(self, query: str, types: Sequence[str] = ()) -> Plan:
        """Gives a plan for `execute` and `cursor`, whose parameters $1, $2 … have these types."""
        return Plan(query=re.sub(r"\$(\d+)", lambda found: f"{found[0]}::{types[int(found[1]) - 1]}", query))

    def execute(self, query: str | Plan, values: Sequence[Any] = ()) -> list[Row]:
        """Gives the rows of a query. An error takes back what it did, and nothing else."""
        text = query.query if isinstance(query, Plan) else query
        with (
            _raising(self._connection),
            self._connection.transaction(),
            psycopg.RawCursor(self._connection, row_factory=dict_row) as cursor,
        ):
            _read_as_texts(cursor)
            cursor.execute(text.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def cursor(self, plan: Plan, values: Sequence[Any] = ()) -> Cursor:
        """Gives a cursor for the rows of a query."""
        cursor = psycopg.RawServerCursor(self._connection, f"pgvae_{next(self._names)}", row_factory=dict_row)
        _read_as_texts(cursor)
        with _raising(self._connection), self._connection.transaction():
            cursor.execute(plan.query.encode(), values or None)
        return Cursor(cursor)

    def notice(self, message: str, hint: str | None = None) -> None:
        """Shows a message."""
        self._notice(f"{message}; {hint}" if hint else message)

    def quote_ident(self, name: str) -> str:
        """Gives a name as SQL."""
        return sql.Identifier(name).as_string(self._connection)

    def quote_literal(self, text: str) -> str:
        """Gives a text as SQL."""
        return sql.Literal(text).as_string(self._connection)


@contextmanager
def _raising(connection: psycopg.Connection) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        # That the connection is lost is no error of a query.
        if connection.broken:
            raise
        raise SPIError(error) from error


def _read_as_texts(cursor: psycopg.Cursor[Row]) -> None:
    for name in _AS_TEXTS:
        cursor.adapters.register_loader(name, TextLoader)
