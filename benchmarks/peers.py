"""Other ways to the same lists, measured beside a refresh: outside the database, a row at a time, in plain SQL."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psycopg
import torch
from numpy.typing import NDArray
from psycopg import sql

from pgvae.versions import read_weights
from pgvae_runtime import forward
from pgvae_runtime.tokens import History

_COPY_OUT = """
copy (select e.user_id::int8, e.item_id::int8, extract(epoch from e.occurred_at)::float8 from shop.clean_events e)
to stdout (format binary)
"""
_EVENT = np.dtype(
    [("columns", ">i2"), ("a", ">i4"), ("user", ">i8"), ("b", ">i4"), ("item", ">i8"), ("c", ">i4"), ("at", ">f8")]
)
_HEADER, _TRAILER = 19, 2
_BATCH = 1024
_SAMPLE = """
select count(*) from generate_series(1, %s) u, shop.recommend(u, %s) r
"""
_INNER_PRODUCTS = """
select u.user_id, i.item_id
from user_vectors u
cross join lateral (
    select i.item_id, (select sum(a * b) from unnest(u.vector, i.vector) v (a, b)) as product
    from item_vectors i
    order by product desc
    limit %s
) i
where u.user_id <= %s
"""
_NEAREST = """
select u.user_id, i.item_id
from user_vectors u
cross join lateral (select i.item_id from item_points i order by i.point <#> u.vector::vector limit %s) i
where u.user_id <= %s
"""


def outside(connection: psycopg.Connection, k: int, max_history: int) -> float:
    """Gives the seconds of the pipeline outside: binary COPY out, PyTorch with topk on all cores, binary COPY in.

    Loading the weights does not count. The shortcut is added by NumPy: a product of sparse tensors took three times as
    long. The lists are stored as pgvae stores them, an array a user, with their index.
    """
    weights, keys = _weights(connection)
    output = torch.from_numpy(weights["output_weight"].copy()).T
    bias = torch.from_numpy(weights["output_bias"].copy())
    connection.execute("drop table if exists outside")
    connection.execute("create table outside (user_id bigint, item_ids bigint[], scores real[])")
    begun = time.perf_counter()
    users, histories = _read(connection, keys)
    with connection.cursor() as cursor, cursor.copy("copy outside from stdin (format binary)") as copy:
        copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
        for first in range(0, len(users), _BATCH):
            history = histories(first, min(first + _BATCH, len(users)))
            tokens = history.tokens(max_history)
            direction = forward.decode_direction(weights, forward.encode(weights, tokens))
            logits = torch.addmm(bias, torch.from_numpy(direction), output)
            forward.add_shortcut(weights, tokens, logits.numpy())
            scores = torch.softmax(logits, dim=1)
            seen_user, seen_item = history.seen((0,))
            scores[torch.from_numpy(seen_user), torch.from_numpy(seen_item)] = -1.0
            best, item = torch.topk(scores, k, dim=1)
            copy.write(_rows(users[first : first + _BATCH], keys[item.numpy()], best.numpy()))
        copy.write(b"\xff\xff")
    connection.execute("create unique index on outside (user_id)")
    return time.perf_counter() - begun


def _weights(connection: psycopg.Connection) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    version_id = connection.execute("select version_id from vae.versions where state = 'active'").fetchone()
    assert version_id is not None
    keys = connection.execute(
        "select item_key::int8 from vae_private.items where version_id = %s order by item_index", version_id
    ).fetchall()
    return read_weights(connection, version_id[0]), np.array([key for (key,) in keys])


def _read(connection: psycopg.Connection, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
    with connection.cursor() as cursor, cursor.copy(_COPY_OUT) as copy:
        content = b"".join(bytes(block) for block in copy)
    events = np.frombuffer(content[_HEADER:-_TRAILER], dtype=_EVENT)
    user, at = events["user"].astype(np.int64), events["at"].astype(np.float64)
    order = np.lexsort((at, user))
    known = np.argsort(keys)
    item = known[np.searchsorted(keys[known], events["item"].astype(np.int64)[order])]
    users, start = np.unique(user[order], return_index=True)
    start, at = np.append(start, len(user)), at[order]

    def histories(first: int, last: int) -> History:
        own = slice(start[first], start[last])
        return History(
            counts=np.diff(start[first : last + 1]),
            item=item[own],
            event_type=np.zeros(own.stop - own.start, dtype=np.int64),
            occurred_at=at[own],
        )

    return users, histories


def _rows(users: NDArray[np.int64], items: NDArray[np.int64], scores: NDArray[np.float32]) -> bytes:
    """Gives rows of user, item_ids and scores in PostgreSQL's binary format for COPY."""
    k = items.shape[1]
    array = [
        ("size", ">i4"),
        ("dimensions", ">i4"),
        ("nulls", ">i4"),
        ("type", ">i4"),
        ("length", ">i4"),
        ("low", ">i4"),
    ]
    item = np.dtype([("size", ">i4"), ("value", ">i8")])
    score = np.dtype([("size", ">i4"), ("value", ">f4")])
    row = np.dtype(
        [
            ("columns", ">i2"),
            ("a", ">i4"),
            ("user", ">i8"),
            ("i", array),
            ("items", item, (k,)),
            ("s", array),
            ("scores", score, (k,)),
        ]
    )
    made = np.zeros(len(users), dtype=row)
    made["columns"], made["a"], made["user"] = 3, 8, users
    for name, element, oid in (("i", item, 20), ("s", score, 700)):
        header = made[name]
        header["size"] = 20 + k * element.itemsize
        header["dimensions"], header["type"], header["length"], header["low"] = 1, oid, k, 1
    made["items"]["size"], made["items"]["value"] = 8, items
    made["scores"]["size"], made["scores"]["value"] = 4, scores
    return made.tobytes()


def row_by_row(connection: psycopg.Connection, k: int, users: int) -> float:
    """Gives the seconds for one user of a PL/Python function that is called for each of some users."""
    connection.execute(_SAMPLE, [5, k])
    begun = time.perf_counter()
    connection.execute(_SAMPLE, [users, k])
    return (time.perf_counter() - begun) / users


def exact_search(connection: psycopg.Connection, k: int, users: int) -> dict[str, float]:
    """Gives the seconds for one user of an exact search by inner product of stored vectors: no shortcut, no mask.

    In plain SQL over arrays, and in pgvector where the server has it.
    """
    weights, keys = _weights(connection)
    connection.execute("drop table if exists user_vectors, item_vectors")
    connection.execute("create table user_vectors (user_id bigint, vector real[])")
    connection.execute("create table item_vectors (item_id bigint, vector real[])")
    with connection.cursor() as cursor:
        with cursor.copy("copy item_vectors from stdin") as copy:
            for key, vector in zip(keys.tolist(), weights["output_weight"].tolist(), strict=True):
                copy.write_row((key, vector))
        cursor.execute(
            "insert into user_vectors select u, (select array_agg(random()::real) from generate_series(1, %s))"
            " from generate_series(1, %s) u",
            [weights["output_weight"].shape[1], users],
        )
    seconds = {"inner products in plain SQL": _timed(connection, _INNER_PRODUCTS, k, users)}
    if connection.execute("select from pg_available_extensions where name = 'vector'").fetchone():
        width = sql.Literal(weights["output_weight"].shape[1])
        connection.execute("create extension if not exists vector")
        connection.execute(
            sql.SQL("create table item_points as select item_id, vector::vector({}) as point from item_vectors").format(
                width
            )
        )
        seconds["exact search by pgvector"] = _timed(connection, _NEAREST, k, users)
    return seconds


def _timed(connection: psycopg.Connection, query: str, k: int, users: int) -> float:
    begun = time.perf_counter()
    connection.execute(query.encode(), [k, users]).fetchall()
    return (time.perf_counter() - begun) / users
