"""Reads the rows of a query as an array of NumPy, by COPY in PostgreSQL's binary format: no object for each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

_HEADER = 19
# libpq hands over row by row; joined by the thousand they cost little.
_ROWS_AT_ONCE = 65_536


def copy_rows(connection: psycopg.Connection, query: sql.Composed, columns: Mapping[str, str]) -> NDArray[Any]:
    """Gives the rows of a query as an array with these columns, name and type such as i4 or f8; none may be null."""
    return np.concatenate(list(_blocks(connection, query, columns)))


def _blocks(connection: psycopg.Connection, query: sql.Composed, columns: Mapping[str, str]) -> Iterator[NDArray[Any]]:
    row = _row(columns)
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("copy ({}) to stdout (format binary)").format(query)) as copy,
    ):
        # The header comes with the first row, the trailer last, shorter than a row.
        blocks = iter(copy)
        skip = _HEADER
        while block := b"".join(islice(blocks, _ROWS_AT_ONCE)):
            yield np.frombuffer(block, dtype=row, count=(len(block) - skip) // row.itemsize, offset=skip)
            skip = 0


def _row(columns: Mapping[str, str]) -> np.dtype[Any]:
    """Gives a row as COPY writes it: a count of fields, then each field's length and its bytes, all big-endian."""
    fields = chain.from_iterable(((f"length of {name}", ">i4"), (name, f">{kind}")) for name, kind in columns.items())
    return np.dtype([("fields", ">i2"), *fields])
