"""Fits the feature pipelines: which columns of users and items give tokens, and which values each token stands for."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from pgvae_runtime.features import FeatureColumn, FeaturePipeline, Row, as_number, decode, entries
from pgvae_runtime.tokens import SECONDS_PER_DAY

# Rows in which a category, tag or word must occur. Of users more: a version shows its categories to its readers. A
# number or time of fewer users is rounded.
MIN_ROWS = {"users": 5, "items": 3}
# Rows that a pipeline is fitted on; of more, every second, every third and so on.
_MAX_ROWS = 200_000
_BINS = 16
# What is left of a number of fewer users, in digits; of a time, the day.
_DIGITS = 3
_MAX_CATEGORIES = 1000
_MAX_WORDS = 5000
_MAX_TOKENS = 20_000
# A longer text is no category.
_MAX_LENGTH = 200
# What stands in more rows than this share tells little.
_MAX_WORD_SHARE = 0.5
_DECIMAL = re.compile(r"-?[0-9]+([.,][0-9]+)?")

# Rows of one key, as JSON.
Documents = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A row of vae.feature_columns: a column of users or items, and whether the model reads it."""

    source: str
    column_name: str
    is_used: bool
    kind: str | None
    reason: str | None


def read_columns(connection: psycopg.Connection, model: str) -> list[Column]:
    """Gives the columns of the model's users and items."""
    with connection.cursor(row_factory=class_row(Column)) as cursor:
        return cursor.execute("select * from vae.feature_columns(%s)", [model]).fetchall()


def read_documents(connection: psycopg.Connection, query: sql.Composed) -> Iterator[tuple[Any, list[str]]]:
    """Gives (first column, all its second columns) of a query of two columns, number or text and text, in its order."""
    with connection.cursor() as cursor, cursor.copy(sql.SQL("copy ({}) to stdout").format(query)) as copy:
        for key, rows in groupby(copy.rows(), key=itemgetter(0)):
            yield key, [row[1] for row in rows]


def fit_pipeline(columns: Iterable[Column], documents: Iterable[Documents], *, source: str) -> FeaturePipeline:
    """Gives the pipeline of the columns of one source, users or items, from the rows that are trained on."""
    found = list(chain.from_iterable(documents))
    rows = [decode(document) for document in found[:: 1 + len(found) // _MAX_ROWS]]
    kept: list[FeatureColumn] = []
    left_out: list[tuple[str, str]] = []
    for column in columns:
        if column.source != source:
            continue
        size = kept[-1].first + kept[-1].size if kept else 0
        fitted = _fit(column, rows, source) if column.is_used else str(column.reason)
        if isinstance(fitted, FeatureColumn) and size + fitted.size > _MAX_TOKENS:
            fitted = f"has {fitted.size} categories or words, and with the columns before it more than {_MAX_TOKENS}"
        if isinstance(fitted, FeatureColumn):
            kept.append(replace(fitted, first=size))
        else:
            left_out.append((column.column_name, fitted))
    return FeaturePipeline(columns=tuple(kept), left_out=tuple(left_out))


def _fit(column: Column, rows: list[Row], source: str) -> FeatureColumn | str:
    """Gives the column's tokens, or the reason why it has none."""
    values = [row[column.column_name] for row in rows if row.get(column.column_name) is not None]
    if not values:
        return "has no values"
    if column.kind in ("number", "time"):
        return _fit_number(column.column_name, column.kind, values, len(rows), source)
    kind = "category" if column.kind == "text" else str(column.kind)
    if column.kind == "text" and 2 * len(set(values)) > len(values):
        if sum(len(value.split()) for value in values) < 2 * len(values):
            if _are_decimals(values):
                return "is text, though its values are numbers: give a view that casts it"
            return f"looks like an identifier: {len(set(values))} different values in {len(values)} rows"
        if source == "users":
            return "is free text about a person"
        kind = "words"
    counts = Counter(chain.from_iterable(set(entries(kind, value)) for value in values))
    frequent = {
        entry: count for entry, count in counts.items() if count >= MIN_ROWS[source] and len(entry) <= _MAX_LENGTH
    }
    if not frequent:
        if kind == "category" and 2 * len(counts) > len(values):
            return f"looks like an identifier: {len(counts)} different values in {len(values)} rows"
        if any(count >= MIN_ROWS[source] for count in counts.values()):
            return f"has values of more than {_MAX_LENGTH} characters"
        return f"has no value that occurs in {MIN_ROWS[source]} rows"
    if kind == "words":
        frequent = {word: count for word, count in frequent.items() if count <= _MAX_WORD_SHARE * len(rows)}
    elif max(frequent.values()) == len(rows) and len(counts) == 1:
        return "has one value only"
    limit = _MAX_WORDS if kind == "words" else _MAX_CATEGORIES
    vocabulary = sorted(sorted(frequent, key=lambda entry: (-frequent[entry], entry))[:limit])
    if not vocabulary:
        return "has no word that occurs often, but not in most rows"
    return FeatureColumn(name=column.column_name, kind=kind, first=0, vocabulary=tuple(vocabulary))


def _are_decimals(values: list[str]) -> bool:
    """Says whether texts are numbers, most of them with decimals: prices, say, and not article numbers."""
    found = [_DECIMAL.fullmatch(value.strip()) for value in values]
    return all(found) and 2 * sum(1 for match in found if match and match[1]) > len(found)


def _fit_number(name: str, kind: str, values: list[Any], row_count: int, source: str) -> FeatureColumn | str:
    numbers = [number for number in map(as_number, values) if number is not None]
    if not numbers:
        return "has no finite values"
    if source == "users":
        numbers = _coarsened(numbers, kind)
    edges = _edges(numbers)
    # Where only some rows have the one value, its token says which.
    if not edges and len(numbers) == row_count:
        return "has one value only"
    return FeatureColumn(name=name, kind=kind, first=0, edges=tuple(edges))


def _coarsened(numbers: list[float], kind: str) -> list[float]:
    """Gives each number rounded down: to what enough users share, else to a whole day of UTC or to three digits.

    A number is at or above an edge made of these exactly where it was before it was rounded.
    """
    shared = sorted(value for value, count in Counter(numbers).items() if count >= MIN_ROWS["users"])
    floors = [-math.inf, *shared]
    return [max(_floor(value, kind), floors[bisect_right(shared, value)]) for value in numbers]


def _floor(value: float, kind: str) -> float:
    if kind == "time":
        return value // SECONDS_PER_DAY * SECONDS_PER_DAY
    exact = Decimal(repr(value))
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1), rounding=ROUND_FLOOR))


def _edges(numbers: list[float]) -> list[float]:
    """Gives where bins of about equal numbers begin, but for the first; a value that fills a bin has one of its own."""
    share = len(numbers) / _BINS
    edges: list[float] = []
    filled = 0
    for value, count in sorted(Counter(numbers).items()):
        if filled and (filled >= share or count >= share):
            edges.append(value)
            filled = 0
        filled += count
    return edges
