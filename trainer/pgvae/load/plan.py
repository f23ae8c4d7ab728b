"""Decides, from the header and a sample, which column goes where with which type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from pgvae.errors import PgvaeError
from pgvae.load.columns import Kind, snake_case, squashed
from pgvae.load.sources import BATCH_ROWS, Batch, Source
from pgvae.load.types import (
    GUESS,
    DateOrder,
    Dialect,
    as_proved_by,
    converter,
    has_decimal_commas,
    infer,
    infer_time,
    proved_order,
)

SAMPLE_ROWS = 6 * BATCH_ROWS
_TIMES = ("timestamptz", "timestamp", "date")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the caller says of the files: columns by name, types by column, how texts are read."""

    mapping: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    dialect: Dialect = field(default_factory=Dialect)


@dataclass(frozen=True, kw_only=True)
class ColumnPlan:
    """One column: its header in the file, its name and type in the table, and what the sample showed.

    `dialect` is that of the load, with the order of this column's short dates where one is known.
    """

    source: str
    name: str
    sql_type: str
    standard: bool
    nulls: int
    examples: Sequence[str]
    remark: str | None
    decimal_commas: bool
    dialect: Dialect


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All columns in the order of the header, and the batches already read for the sample."""

    kind: Kind
    columns: Sequence[ColumnPlan]
    sampled: Sequence[Batch]
    sample_rows: int

    @property
    def header(self) -> list[str]:
        """The headers that a further file must have."""
        return [column.source for column in self.columns]


def make_plan(kind: Kind, source: Source, options: LoadOptions) -> Plan:
    """Gives the plan for a source; PgvaeError names the column that is missing, unknown or there twice."""
    headers = source.header
    if doubles := [name for name, count in Counter(headers).items() if count > 1]:
        raise PgvaeError(f"header {doubles[0]!r} is there twice in {source.name}", hint="rename one of the columns")
    names = _names(kind, source, options.mapping)
    for name, sql_type in options.types.items():
        if name not in names.values():
            raise PgvaeError(
                f"--type names the unknown column {name!r}", hint=f"there are: {', '.join(names.values())}"
            )
        converter(sql_type, options.dialect)
    sampled = list(islice(source.batches, SAMPLE_ROWS // BATCH_ROWS))
    rows = [row for batch in sampled for row in batch.rows]
    if not rows and not any(batch.broken for batch in sampled):
        raise PgvaeError(f"file {source.name} has a header and no rows", hint="is it the right file?")
    dialect = options.dialect
    columns = []
    for position, header in enumerate(headers):
        values = [row[position] for row in rows]
        is_time = names[header] == "occurred_at" and "occurred_at" in kind.required
        guessed, remark = (infer_time if is_time else infer)(values, dialect)
        if names[header] in ("user_id", "item_id") and guessed not in ("bigint", "uuid"):
            # A key that looks like a number, a date or a truth stays as it is written: 1.1 and 1.10 may be two items.
            guessed, remark = "text", remark if guessed == "text" else None
        sql_type = options.types.get(names[header], guessed)
        # What no value tells is null: another column may.
        order = dialect.date_order or (proved_order(values) if sql_type in _TIMES else None)
        columns.append(
            ColumnPlan(
                source=header,
                name=names[header],
                sql_type=sql_type,
                standard=names[header] in kind.synonyms,
                nulls=sum(1 for value in values if value in dialect.nulls),
                examples=list(dict.fromkeys(value for value in values[:200] if value not in dialect.nulls))[:3],
                remark=None if names[header] in options.types else remark,
                decimal_commas=has_decimal_commas([value for value in values if value not in dialect.nulls]),
                dialect=replace(dialect, date_order=order),
            )
        )
    return Plan(kind=kind, columns=_with_proved_order(columns), sampled=sampled, sample_rows=len(rows))


def _with_proved_order(columns: Sequence[ColumnPlan]) -> list[ColumnPlan]:
    """Gives the columns with the one order that others prove for those whose short dates could be of both.

    Where others prove different orders, each of those has its own, and the rest are left to the guess.
    """
    proved: dict[DateOrder, str] = {}
    for column in columns:
        if column.dialect.date_order and column.sql_type in _TIMES:
            proved.setdefault(column.dialect.date_order, column.source)
    if len(proved) != 1:
        return list(columns)
    ((order, source),) = proved.items()
    return [
        replace(
            column,
            dialect=replace(column.dialect, date_order=order),
            remark=as_proved_by(order, source) if column.remark == GUESS else column.remark,
        )
        for column in columns
    ]


def _names(kind: Kind, source: Source, mapping: Mapping[str, str]) -> dict[str, str]:
    """Gives the table's column of each header: mapped by the caller, known by a synonym, or in snake_case."""
    names: dict[str, str] = {}
    for target, header in mapping.items():
        if header not in source.header:
            raise PgvaeError(
                f"--map names the unknown column {header!r}", hint=f"{source.name} has: {', '.join(source.header)}"
            )
        names[header] = target
    taken = set(names.values())
    for target, synonyms in kind.synonyms.items():
        if target in taken:
            continue
        # A more usual name wins over the order of the columns.
        for synonym in synonyms:
            found = [header for header in source.header if squashed(header) == synonym and header not in names]
            if found:
                names[found[0]] = target
                taken.add(target)
                break
    for missing in kind.required:
        if missing not in taken:
            raise PgvaeError(
                f"no column of {source.name} is known to be {missing}",
                hint=f"name it, as in --map {missing}=COLUMN; there are: {', '.join(source.header)}",
            )
    for header in source.header:
        if header not in names:
            name = snake_case(header)
            while name in taken:
                name += "_"
            names[header] = name
            taken.add(name)
    if toolong := [name for name in names.values() if len(name.encode()) > 63]:
        raise PgvaeError(f"column name {toolong[0]!r} is too long", hint="shorten it with --map SHORT=COLUMN")
    return names
