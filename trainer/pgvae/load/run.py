"""Runs a load: one transaction, COPY, and the rejected rows beside the table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import psycopg
from psycopg import sql

from pgvae.connection import connect
from pgvae.errors import PgvaeError
from pgvae.load.plan import ColumnPlan, Plan
from pgvae.load.sources import Batch, Source, raw_line
from pgvae.load.types import Bad, converter

Mode = Literal["create", "append", "replace"]
# More rejected rows than this are counted, not kept.
_KEPT_REJECTS = 100_000
# Distinct values of a column whose conversion is remembered.
_REMEMBERED = 200_000

_CREATE_REJECTS = """
create table if not exists {} (
    load_id bigint not null,
    file text not null,
    line_number bigint not null,
    reason text not null,
    raw_line text not null,
    loaded_at timestamptz not null default now()
)
"""


@dataclass(kw_only=True)
class LoadSummary:
    """What a load did; `reasons` counts the rejected rows by column and reason, with one example each."""

    rows: int = 0
    rejected: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


class _Column(dict[str, str]):
    """The texts of a column and their form for COPY, converted once per distinct text."""

    def __init__(self, convert: Callable[[str], str]) -> None:
        super().__init__()
        self._convert = convert
        self.has_bad = False

    def __missing__(self, text: str) -> str:
        if len(self) >= _REMEMBERED:
            self.clear()
        converted = self[text] = self._convert(text)
        self.has_bad = self.has_bad or isinstance(converted, Bad)
        return converted


@dataclass(frozen=True, kw_only=True)
class _Reject:
    file: str
    line: int
    reason: str
    raw: str


def load(
    dsn: str | None,
    plan: Plan,
    sources: Iterator[Source],
    *,
    schema: str,
    table: str,
    mode: Mode,
    max_rejects: float,
    index: bool,
    on_progress: Callable[[Source, int], None] = lambda source, rows: None,
) -> LoadSummary:
    """Loads the sources, the first of which the plan was made for, into a table.

    All of it is one transaction: whatever happens, the table is either as before or complete. PgvaeError where the
    table is in the way, lacks a column, or more than the share `max_rejects` of the rows is rejected.
    """
    begun = time.perf_counter()
    summary = LoadSummary()
    rejects: list[_Reject] = []
    target = sql.Identifier(schema, table)
    with connect(dsn) as connection:
        created = _prepare(connection, plan, schema, table, mode)
        types = [column.sql_type for column in plan.columns] if created else _types_of(connection, schema, table, plan)
        columns = [
            _Column(converter(sql_type, column.dialect, decimal_commas=column.decimal_commas))
            for sql_type, column in zip(types, plan.columns, strict=True)
        ]
        copy_sql = sql.SQL("copy {} ({}) from stdin").format(
            target, sql.SQL(", ").join(sql.Identifier(column.name) for column in plan.columns)
        )
        with connection.cursor() as cursor, cursor.copy(copy_sql) as copy:
            for number, source in enumerate(sources):
                if source.header != plan.header:
                    raise PgvaeError(
                        f"the columns of {source.name} differ: {', '.join(source.header)}",
                        hint=f"the first file has {', '.join(plan.header)}: load it on its own with --append",
                    )
                for batch in chain(plan.sampled, source.batches) if number == 0 else source.batches:
                    good, bad = _convert(batch, plan.columns, columns, source.name)
                    if good:
                        copy.write("\n".join(map("\t".join, good)) + "\n")
                    summary.rows += len(good)
                    _count(summary, rejects, bad)
                    on_progress(source, summary.rows)
        _refuse_too_many(summary, max_rejects)
        _keep_rejects(connection, schema, table, rejects)
        if created:
            _finish(connection, plan, target, index)
        connection.execute(sql.SQL("analyze {}").format(target))
    summary.seconds = time.perf_counter() - begun
    return summary


def _convert(
    batch: Batch, plans: Sequence[ColumnPlan], columns: Sequence[_Column], file: str
) -> tuple[list[tuple[str, ...]], list[_Reject]]:
    """Gives the rows as COPY takes them, and those that have a bad value."""
    bad = [_Reject(file=file, line=line, reason=reason, raw=raw) for line, reason, raw in batch.broken]
    if not batch.rows:
        return [], bad
    converted = [
        list(map(column.__getitem__, texts))
        for column, texts in zip(columns, zip(*batch.rows, strict=True), strict=True)
    ]
    rows = list(zip(*converted, strict=True))
    suspects = [position for position, column in enumerate(columns) if column.has_bad]
    if not suspects:
        return rows, bad
    wrong: dict[int, str] = {}
    for position in suspects:
        for number, text in enumerate(converted[position]):
            if isinstance(text, Bad):
                wrong.setdefault(number, f"{plans[position].name}: {text}")
    bad += [
        _Reject(file=file, line=batch.lines[number], reason=reason, raw=raw_line(batch.rows[number], batch.delimiter))
        for number, reason in wrong.items()
    ]
    return [row for number, row in enumerate(rows) if number not in wrong], bad


def _count(summary: LoadSummary, rejects: list[_Reject], bad: list[_Reject]) -> None:
    summary.rejected += len(bad)
    for reject in bad:
        if len(rejects) < _KEPT_REJECTS:
            rejects.append(reject)
        column, _, reason = reject.reason.partition(": ")
        # "quantity: 'x' is no bigint" counts under "quantity is no bigint".
        summary.reasons[f"{column} {reason[reason.rfind(chr(39)) + 1 :].strip() or reason}".strip()] += 1


def _refuse_too_many(summary: LoadSummary, max_rejects: float) -> None:
    total = summary.rows + summary.rejected
    if summary.rejected > max_rejects * total:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in summary.reasons.most_common(5))
        raise PgvaeError(
            f"{summary.rejected} of {total} rows are rejected: {reasons}",
            hint="nothing was loaded; mend the file, give another type as in --type item_id=text, or allow more"
            " with --max-rejects 0.5",
        )


def _prepare(connection: psycopg.Connection, plan: Plan, schema: str, table: str, mode: Mode) -> bool:
    """Makes the table ready; says whether it was created. The caller's transaction holds it all."""
    target = sql.Identifier(schema, table)
    exists = connection.execute(
        "select c.relkind in ('r', 'p') from pg_catalog.pg_class c"
        " join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = %s and c.relname = %s",
        [schema, table],
    ).fetchone()
    if exists and not exists[0]:
        raise PgvaeError(f"{schema}.{table} is not a table", hint="name another one with --table")
    if exists and mode == "create":
        raise PgvaeError(
            f"table {schema}.{table} exists already", hint="add to it with --append, or exchange it with --replace"
        )
    if exists and mode == "append":
        return False
    if exists and _same_columns(connection, plan, schema, table):
        # Emptied, not dropped: views and models that read it stay.
        connection.execute(sql.SQL("truncate {}").format(target))
        return False
    if exists:
        try:
            connection.execute(sql.SQL("drop table {}").format(target))
        except psycopg.errors.DependentObjectsStillExist as error:
            raise PgvaeError(
                f"table {schema}.{table} has other columns and is in use: {error.diag.message_detail}",
                hint="load into another table with --table, or drop first what uses it",
            ) from error
    _create(connection, plan, schema, target)
    return True


def _create(connection: psycopg.Connection, plan: Plan, schema: str, target: sql.Identifier) -> None:
    columns = [sql.SQL("{} {}").format(sql.Identifier(c.name), sql.SQL(c.sql_type)) for c in plan.columns]
    try:
        # `if not exists` would ask for the right to create schemas also where there is nothing to create.
        if not connection.execute("select 1 from pg_catalog.pg_namespace where nspname = %s", [schema]).fetchone():
            connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
        connection.execute(sql.SQL("create table {} ({})").format(target, sql.SQL(", ").join(columns)))
    except psycopg.errors.InsufficientPrivilege as error:
        raise PgvaeError(
            f"{error.diag.message_primary}: the table cannot be created",
            hint=f"grant create on schema {schema}, or name a schema of your own, as in --table mine.events",
        ) from error


def _existing(connection: psycopg.Connection, schema: str, table: str) -> dict[str, str]:
    rows = connection.execute(
        "select a.attname, pg_catalog.btrim(pg_catalog.format_type(a.atttypid, null), '\"')"
        " from pg_catalog.pg_attribute a join pg_catalog.pg_class c on c.oid = a.attrelid"
        " join pg_catalog.pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relname = %s and a.attnum > 0 and not a.attisdropped",
        [schema, table],
    ).fetchall()
    short: dict[str, str] = {
        "timestamp with time zone": "timestamptz",
        "timestamp without time zone": "timestamp",
        "character varying": "varchar",
    }
    return {str(name): short.get(str(sql_type), str(sql_type)) for name, sql_type in rows}


def _same_columns(connection: psycopg.Connection, plan: Plan, schema: str, table: str) -> bool:
    return _existing(connection, schema, table) == {column.name: column.sql_type for column in plan.columns}


def _types_of(connection: psycopg.Connection, schema: str, table: str, plan: Plan) -> list[str]:
    existing = _existing(connection, schema, table)
    if missing := [column.name for column in plan.columns if column.name not in existing]:
        raise PgvaeError(
            f"table {schema}.{table} has no column {missing[0]!r}",
            hint=f"map the file's columns to the table's with --map; there are: {', '.join(existing)}",
        )
    return [existing[column.name] for column in plan.columns]


def _keep_rejects(connection: psycopg.Connection, schema: str, table: str, rejects: list[_Reject]) -> None:
    if not rejects:
        return
    target = sql.Identifier(schema, f"{table[:55]}_rejects")
    connection.execute(sql.SQL(_CREATE_REJECTS).format(target))
    connection.execute(
        sql.SQL("comment on table {} is {}").format(
            target, sql.Literal(f"Rows of files that could not be loaded into {table}, with the reason.")
        )
    )
    row = connection.execute(sql.SQL("select coalesce(max(load_id), 0) + 1 from {}").format(target)).fetchone()
    load_id = row[0] if row else 1
    statement = sql.SQL("copy {} (load_id, file, line_number, reason, raw_line) from stdin").format(target)
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for reject in rejects:
            copy.write_row((load_id, reject.file, reject.line, reject.reason, reject.raw))


def _finish(connection: psycopg.Connection, plan: Plan, target: sql.Identifier, index: bool) -> None:
    """Comments a new table, and gives events the indexes by which live calls find those of a user and of an item."""
    connection.execute(
        sql.SQL("comment on table {} is {}").format(
            target, sql.Literal(f"The shop's {plan.kind.name}, loaded by pgvae.")
        )
    )
    for column in plan.columns:
        comment = plan.kind.comments.get(column.name) or f"Column {column.source} of the file."
        connection.execute(
            sql.SQL("comment on column {}.{} is {}").format(target, sql.Identifier(column.name), sql.Literal(comment))
        )
    if index and plan.kind.name == "events":
        connection.execute(sql.SQL("create index on {} (user_id, occurred_at)").format(target))
        connection.execute(sql.SQL("create index on {} (item_id, occurred_at)").format(target))
