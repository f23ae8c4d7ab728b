"""Scores outside of a database that has no PL/Python, and hands the rows to the refresh that stores them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

import psycopg
from psycopg import sql

from pgvae import doctor
from pgvae.connection import keep_open
from pgvae.console import err
from pgvae.errors import PgvaeError
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
select m.name, m.model_id, pg_catalog.pg_get_userbyid(n.nspowner), (m.options ->> 'recommendations')::integer,
    v.version_id, v.version
from vae.models m
left join pg_catalog.pg_namespace n on n.nspname = m.name
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
insert into vae_private.staged_runs
    (token, model_id, view, version_id, row_count, events_until, left_out, error, hint, error_state)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_STAGE_ROWS = "copy vae_private.staged_rows (token, model_id, view, cells) from stdin"


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    model_id: int
    owner: str | None
    recommendations: int
    version_id: int | None
    version: int | None

    @staticmethod
    def read(connection: psycopg.Connection, model: str) -> _Model:
        row = connection.execute(_MODEL, [model]).fetchone()
        assert row is not None
        names = ("name", "model_id", "owner", "recommendations", "version_id", "version")
        return _Model(**dict(zip(names, row, strict=True)))


def refresh(connection: psycopg.Connection, model: str, views: Sequence[str] | None) -> None:
    """Scores here with the active version, and refreshes the prediction views of a model, or those named.

    Needs an autocommit connection, and the rights of the model's owner, with which the shop is read. A view that
    cannot be scored is logged as failed and holds its last good content; the others are refreshed, and then
    psycopg.Error is raised.
    """
    found = _Model.read(connection, model)
    # Before hours of scoring, rather than behind them.
    row = connection.execute(
        "select vae_private.prediction_views(%s, %s), vae_private.check_refresh(%s)",
        [found.model_id, views, found.model_id],
    ).fetchone()
    assert row is not None
    if failures := _refresh_all(connection, model, row[0]):
        raise failures[0]


def _refresh_all(connection: psycopg.Connection, model: str, views: Sequence[str]) -> list[psycopg.Error]:
    """Refreshes one view after the other, since explanations read the recommendations; gives what failed."""
    store.forget()
    token = secrets.token_hex(16)
    for restarts_left in range(_RESTARTS, -1, -1):
        failures = []
        scoring = _Model.read(connection, model)
        for view in views:
            with _staged(connection, token):
                _score(connection, _Model.read(connection, model), view, token)
                try:
                    connection.execute("call vae_private.refresh_staged(%s, %s, %s)", [model, view, token])
                except psycopg.errors.QueryCanceled:
                    raise
                except psycopg.Error as error:
                    if connection.broken:
                        raise
                    failures.append(error)
        if not restarts_left or _Model.read(connection, model) == scoring:
            break
        err.print(f"model {model} or its active version was changed meanwhile: its views are refreshed again")
    return failures


def verify_outside(connection: psycopg.Connection, model: str, version: int | None) -> list[tuple[Any, ...]]:
    """Gives the rows of vae.verify for a version, None: the active one, whose golden users are replayed here.

    Needs an autocommit connection, and the rights of an operator.
    """
    store.forget()
    token = secrets.token_hex(16)
    try:
        with _staged(connection, token), _reading(connection, "verify") as plpy:
            found = _Model.read(connection, model)
            if number := version or found.version:
                row = connection.execute(
                    "select vae_private.version_id(%s, %s, %s)", [found.model_id, model, number]
                ).fetchone()
                assert row is not None
                rows = [list(each.values()) for each in api.verify(plpy, found.model_id, row[0])]
                verified = replace(found, version_id=row[0])
                _stage_rows(connection, token, found.model_id, "verify", rows)
                _stage_run(connection, token, verified, "verify", rows=len(rows), moment=_now(connection))
            connection.execute("select pg_catalog.set_config('vae.staged', %s, true)", [token])
            return connection.execute(VERIFY, [model, version]).fetchall()
    except Error as error:
        raise PgvaeError(str(error), hint=error.hint) from error


def _score(connection: psycopg.Connection, model: _Model, view: str, token: str) -> None:
    """Puts the rows of a prediction view where the refresh finds them, or why there are none."""
    if model.version_id is None or model.owner is None:
        # The refresh says so.
        return
    arguments = {"recommendations": [model.recommendations], "related_items": [_RELATED_ITEMS]}.get(view, [])
    try:
        with _reading(connection, VIEWS[view]) as plpy, err.status(f"scoring {view}") as status:
            connection.execute("select vae_private.lock_refresh(%s, %s)", [model.model_id, model.name])
            _act_as(connection, model.owner)
            moment = _now(connection)
            rows = iter(getattr(api, VIEWS[view])(plpy, model.model_id, *arguments))
            count = 0
            while batch := list(islice(rows, _BATCH)):
                _stage_rows(connection, token, model.model_id, view, batch)
                count += len(batch)
                status.update(f"scoring {view}: {count} rows")
            run = runs.take(model.model_id, view)
            assert run is not None
            _stage_run(connection, token, model, view, rows=run.row_count, moment=moment, left_out=run.left_out)
    except psycopg.errors.LockNotAvailable:
        raise
    except (Error, psycopg.Error) as error:
        if connection.broken:
            raise
        _stage_run(connection, token, model, view, moment=_now(connection), error=error)


@contextmanager
def _reading(connection: psycopg.Connection, function: str) -> Iterator[Plpy]:
    """Opens a transaction that sees one moment, with the settings of the function."""
    with connection.transaction():
        connection.execute("set transaction isolation level repeatable read")
        # Times and scores come as texts.
        connection.execute("set local extra_float_digits = 1")
        keep_open(connection)
        doctor.check_code(connection)
        connection.execute(_SETTINGS, [function])
        yield Plpy(connection, lambda message: err.print(message, highlight=False, markup=False))


def _act_as(connection: psycopg.Connection, owner: str) -> None:
    """Takes on the role of the model's owner, with whose rights a refresh reads."""
    try:
        connection.execute(sql.SQL("set local role {}").format(sql.Identifier(owner)))
    except psycopg.errors.InsufficientPrivilege as error:
        refusal = Error(f"role {connection.info.user} may not read as {owner}, the owner of the model")
        refusal.sqlstate = "42501"
        refusal.hint = f"refresh as {owner}, or as a member of it: grant {owner} to {connection.info.user}"
        raise refusal from error


@contextmanager
def _staged(connection: psycopg.Connection, token: str) -> Iterator[None]:
    """Leaves nothing of what was staged, however it ends."""
    try:
        yield
    finally:
        if not connection.broken:
            _clear(connection, token)


def _clear(connection: psycopg.Connection, token: str) -> None:
    """Removes the rows of the token, and those of refreshes that were killed."""
    with connection.transaction():
        # Where a role's default is another, two that clear what a third one left would fail each other.
        connection.execute("set transaction isolation level read committed")
        connection.execute(
            "select vae_private.clear_staged(%s), pg_catalog.set_config('vae.staged', '', false)", [token]
        )


def _stage_rows(
    connection: psycopg.Connection, token: str, model_id: int, view: str, rows: Iterable[Sequence[Any]]
) -> None:
    with connection.cursor() as cursor, cursor.copy(_STAGE_ROWS) as copy:
        copy.set_types(["text", "int4", "text", "text[]"])
        for row in rows:
            copy.write_row((token, model_id, view, [_as_text(value) for value in row]))


def _stage_run(
    connection: psycopg.Connection,
    token: str,
    model: _Model,
    view: str,
    *,
    moment: datetime,
    rows: int = 0,
    left_out: str | None = None,
    error: Error | psycopg.Error | None = None,
) -> None:
    said: tuple[str | None, str | None, str | None] = (None, None, None)
    if error is not None:
        hint = error.hint if isinstance(error, Error) else error.diag.message_hint
        message = str(error) if isinstance(error, Error) else error.diag.message_primary or str(error)
        said = (message, hint, error.sqlstate)
    values = [token, model.model_id, view, model.version_id, rows, moment, left_out, *said]
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
