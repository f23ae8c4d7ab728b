"""Scores outside of a database that has no PL/Python, and hands the rows to the refresh that stores them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

import psycopg
from psycopg import sql

from pgvae.console import err
from pgvae.external.plpy import Error, Plpy
from pgvae.external.stubs import VIEWS
from pgvae_runtime import api, runs, store

# As sql/057_related.sql has it.
_RELATED_ITEMS = 20
# Rows that are sent at once.
_BATCH = 1000
# How often all begins anew because another version became active meanwhile, as in vae.refresh.
_RESTARTS = 3

_MODEL = """
select m.model_id, pg_catalog.pg_get_userbyid(n.nspowner), (m.options ->> 'recommendations')::integer,
    v.version_id, v.version
from vae.models m
join pg_catalog.pg_namespace n on n.nspname = m.name
left join vae.versions v on v.model_id = m.model_id and v.state = 'active'
where m.model_id = vae_private.model_id(%s)
"""
# The function that stands for the scoring says with which settings it reads the shop's tables.
_SETTINGS = """
select pg_catalog.set_config(split_part(s, '=', 1), substr(s, strpos(s, '=') + 1), true)
from pg_catalog.pg_proc p
join pg_catalog.pg_namespace n on n.oid = p.pronamespace
cross join unnest(p.proconfig) s
where n.nspname = 'vae_private' and p.proname = %s
"""
VERIFY = (
    "select v.model_version, v.device, v.passed, v.golden_users, v.max_difference, v.detail from vae.verify(%s, %s) v"
)
_STAGE_RUN = """
insert into vae_private.staged_runs (model_id, view, version_id, row_count, events_until, left_out, error, hint)
values (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_STAGE_ROWS = "copy vae_private.staged_rows (model_id, view, cells) from stdin"


@dataclass(frozen=True, kw_only=True)
class _Model:
    model_id: int
    owner: str
    recommendations: int
    version_id: int | None
    version: int | None

    @staticmethod
    def read(connection: psycopg.Connection, model: str) -> _Model:
        row = connection.execute(_MODEL, [model]).fetchone()
        assert row is not None
        names = ("model_id", "owner", "recommendations", "version_id", "version")
        return _Model(**dict(zip(names, row, strict=True)))


def refresh(connection: psycopg.Connection, model: str, views: Sequence[str] | None) -> None:
    """Scores here with the active version, and refreshes the prediction views of a model, or those named.

    Needs an autocommit connection, and the rights of the model's owner, with which the shop is read. A view that
    cannot be scored is logged as failed and holds its last good content; the others are refreshed, and then
    psycopg.Error is raised.
    """
    found = _Model.read(connection, model)
    row = connection.execute(
        "select pg_catalog.pg_try_advisory_lock(pg_catalog.hashtext('pgvae refresh'), %s),"
        " vae_private.prediction_views(%s, %s)",
        [found.model_id, found.model_id, views],
    ).fetchone()
    assert row is not None
    if not row[0]:
        # It says who holds the lock.
        connection.execute("call vae.refresh(%s, %s, true)", [model, views])
    try:
        failures = _refresh_all(connection, model, row[1])
    finally:
        if not connection.broken:
            connection.execute(
                "select pg_catalog.pg_advisory_unlock(pg_catalog.hashtext('pgvae refresh'), %s)", [found.model_id]
            )
    if failures:
        raise failures[0]


def _refresh_all(connection: psycopg.Connection, model: str, views: Sequence[str]) -> list[psycopg.Error]:
    """Refreshes one view after the other, since explanations read the recommendations; gives what failed."""
    for _ in range(_RESTARTS + 1):
        failures = []
        scoring = _Model.read(connection, model)
        for view in views:
            try:
                with _staged(connection):
                    _score(connection, _Model.read(connection, model), view)
                    connection.execute("call vae.refresh(%s, %s, true)", [model, [view]])
            except psycopg.errors.QueryCanceled:
                raise
            except psycopg.Error as error:
                if connection.broken:
                    raise
                failures.append(error)
        if _Model.read(connection, model) == scoring:
            break
        err.print(f"another version of model {model} became active meanwhile: its views are refreshed again")
    return failures


def verify_outside(connection: psycopg.Connection, model: str, version: int | None) -> list[tuple[Any, ...]]:
    """Gives the rows of vae.verify for a version, None: the active one, whose golden users are replayed here.

    Needs an autocommit connection, and the rights of an operator.
    """
    found = _Model.read(connection, model)
    with _staged(connection):
        if number := version or found.version:
            with _reading(connection, "verify") as plpy:
                row = connection.execute(
                    "select vae_private.version_id(%s, %s, %s)", [found.model_id, model, number]
                ).fetchone()
                assert row is not None
                rows = [list(each.values()) for each in api.verify(plpy, found.model_id, row[0])]
                _stage_rows(connection, found.model_id, "verify", rows)
                verified = replace(found, version_id=row[0])
                _stage_run(connection, verified, "verify", rows=len(rows), moment=_now(connection))
        return connection.execute(VERIFY, [model, version]).fetchall()


def _score(connection: psycopg.Connection, model: _Model, view: str) -> None:
    """Puts the rows of a prediction view where the refresh finds them, or why there are none."""
    if model.version_id is None:
        # The refresh says so.
        return
    arguments = {"recommendations": [model.recommendations], "related_items": [_RELATED_ITEMS]}.get(view, [])
    try:
        with _reading(connection, VIEWS[view], model.owner) as plpy, err.status(f"scoring {view}") as status:
            moment = _now(connection)
            rows = iter(getattr(api, VIEWS[view])(plpy, model.model_id, *arguments))
            count = 0
            while batch := list(islice(rows, _BATCH)):
                _stage_rows(connection, model.model_id, view, batch)
                count += len(batch)
                status.update(f"scoring {view}: {count} rows")
            run = runs.take(model.model_id, view)
            assert run is not None
            _stage_run(connection, model, view, rows=run.row_count, moment=moment, left_out=run.left_out)
    except psycopg.errors.QueryCanceled:
        raise
    except (Error, psycopg.Error) as error:
        if connection.broken:
            raise
        hint = error.hint if isinstance(error, Error) else error.diag.message_hint
        _stage_run(connection, model, view, moment=_now(connection), error=str(error), hint=hint)


@contextmanager
def _reading(connection: psycopg.Connection, function: str, role: str | None = None) -> Iterator[Plpy]:
    """Opens a transaction that sees one moment, with the settings of the function and the rights of the role."""
    store.forget()
    with connection.transaction():
        connection.execute("set transaction isolation level repeatable read")
        connection.execute(_SETTINGS, [function])
        if role is not None:
            _act_as(connection, role)
        yield Plpy(connection, lambda message: err.print(message, highlight=False, markup=False))


def _act_as(connection: psycopg.Connection, owner: str) -> None:
    """Takes on the role of the model's owner, with whose rights a refresh reads."""
    try:
        connection.execute(sql.SQL("set local role {}").format(sql.Identifier(owner)))
    except psycopg.errors.InsufficientPrivilege as error:
        refusal = Error(f"role {connection.info.user} may not read as {owner}, the owner of the model")
        refusal.hint = f"refresh as {owner}, or as a member of it: grant {owner} to {connection.info.user}"
        raise refusal from error


@contextmanager
def _staged(connection: psycopg.Connection) -> Iterator[None]:
    """Leaves nothing of what was staged, however it ends."""
    connection.execute("select vae_private.clear_staged()")
    try:
        yield
    finally:
        if not connection.broken:
            connection.execute("select vae_private.clear_staged()")


def _stage_rows(connection: psycopg.Connection, model_id: int, view: str, rows: Iterable[Sequence[Any]]) -> None:
    with connection.cursor() as cursor, cursor.copy(_STAGE_ROWS) as copy:
        copy.set_types(["int4", "text", "text[]"])
        for row in rows:
            copy.write_row((model_id, view, [_as_text(value) for value in row]))


def _stage_run(
    connection: psycopg.Connection,
    model: _Model,
    view: str,
    *,
    moment: datetime,
    rows: int = 0,
    left_out: str | None = None,
    error: str | None = None,
    hint: str | None = None,
) -> None:
    values = [model.model_id, view, model.version_id, rows, moment, left_out, error, hint]
    connection.execute(_STAGE_RUN, values)


def _now(connection: psycopg.Connection) -> datetime:
    row = connection.execute("select pg_catalog.now()").fetchone()
    assert row is not None
    moment: datetime = row[0]
    return moment


def _as_text(value: Any) -> str | None:
    """Gives a value as PL/Python hands it to PostgreSQL."""
    if value is None:
        return None
    return float.__repr__(value) if isinstance(value, float) else str(value)
