"""From columns of the users' and items' tables to feature tokens: the one definition that training and scoring share.

A row reaches Python as the JSON that the views user_features and item_features and the function features of a model
give: {column: text, number, or array of texts}. What stands for "nothing" there (null, NaN, an infinity, a missing
column, a value of another type than the pipeline was fitted on) gives no token.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ragged import ranges, starts

# Of a longer array or text only the beginning counts.
_MAX_TAGS = 100
_MAX_WORDS = 200
_WORD = re.compile(r"\w{2,40}")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FeatureBag:
    """Feature tokens of n users or items: number i owns token[start[i]:start[i + 1]], ascending, each once."""

    start: NDArray[np.int64]
    token: NDArray[np.int64]

    @staticmethod
    def empty(n: int) -> FeatureBag:
        """Gives the bag of n users or items without any token."""
        return FeatureBag(start=np.zeros(n + 1, dtype=np.int64), token=np.zeros(0, dtype=np.int64))

    @staticmethod
    def of(tokens: Sequence[Sequence[int]]) -> FeatureBag:
        """Gives the bag that holds these lists of tokens."""
        start = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.cumsum([len(own) for own in tokens], out=start[1:])
        return FeatureBag(start=start, token=np.fromiter(chain.from_iterable(tokens), np.int64, count=start[-1]))

    def __len__(self) -> int:
        return len(self.start) - 1

    def counts(self) -> NDArray[np.int64]:
        """Gives the number of tokens of each user or item, shape [n]."""
        return np.diff(self.start)

    def take(self, numbers: NDArray[np.int64]) -> FeatureBag:
        """Gives the bag of the users or items with these numbers, in this order."""
        counts = self.counts()[numbers]
        return FeatureBag(start=starts(counts), token=self.token[ranges(self.start[numbers], counts)])

    def followed_by(self, other: FeatureBag) -> FeatureBag:
        """Gives the bag of these users or items, then of the others."""
        return FeatureBag(
            start=np.concatenate((self.start, self.start[-1] + other.start[1:])),
            token=np.concatenate((self.token, other.token)),
        )


@dataclass(frozen=True, kw_only=True)
class FeatureColumn:
    """One column's tokens, numbered from `first`.

    `kind` category and tags: one per entry of `vocabulary`, compared as text; words: one per word of `vocabulary`;
    number and time (seconds since 1970): one per bin, a bin begins at each of `edges`, and one lies before the first.
    """

    name: str
    kind: str
    first: int
    vocabulary: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """The number of tokens of the column."""
        return len(self.edges) + 1 if self.kind in ("number", "time") else len(self.vocabulary)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {entry: self.first + number for number, entry in enumerate(self.vocabulary)}

    def tokens(self, row: Row) -> Iterable[int]:
        """Gives the tokens of the column in a row, in any order."""
        if self.kind in ("number", "time"):
            number = as_number(row.get(self.name))
            return () if number is None else (self.first + bisect_right(self.edges, number),)
        known = self._numbers
        return [known[entry] for entry in entries(self.kind, row.get(self.name)) if entry in known]


@dataclass(frozen=True, kw_only=True)
class FeaturePipeline:
    """How rows of a table become feature tokens 0 to `size` - 1; saved with a version, as JSON.

    `left_out` holds (column, reason) of the columns that give no token.
    """

    columns: tuple[FeatureColumn, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        """The number F of different tokens; 0 for a pipeline that gives none."""
        return sum(column.size for column in self.columns)

    def to_json(self) -> dict[str, Any]:
        """Gives the pipeline as an object of JSON."""
        return {
            "columns": [
                {
                    "name": column.name,
                    "kind": column.kind,
                    "vocabulary": list(column.vocabulary),
                    "edges": list(column.edges),
                }
                for column in self.columns
            ],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }

    @staticmethod
    def from_json(given: dict[str, Any]) -> FeaturePipeline:
        """Gives the pipeline that `to_json` wrote."""
        columns: list[FeatureColumn] = []
        for column in given["columns"]:
            columns.append(
                FeatureColumn(
                    name=column["name"],
                    kind=column["kind"],
                    first=columns[-1].first + columns[-1].size if columns else 0,
                    vocabulary=tuple(column["vocabulary"]),
                    edges=tuple(map(float, column["edges"])),
                )
            )
        left_out = tuple((column["name"], column["reason"]) for column in given["left_out"])
        return FeaturePipeline(columns=tuple(columns), left_out=left_out)


NO_FEATURES = FeaturePipeline()


def feature_bag(pipeline: FeaturePipeline, documents: Iterable[Sequence[str]]) -> FeatureBag:
    """Gives the feature tokens of n users or items, each given by the JSON of its rows.

    A key should have one row; of several the tokens are put together, whichever row comes first.
    """
    tokens = []
    for rows in documents:
        own: set[int] = set()
        for document in rows:
            row = decode(document)
            for column in pipeline.columns:
                own.update(column.tokens(row))
        tokens.append(sorted(own))
    return FeatureBag.of(tokens)


def decode(document: str) -> Row:
    """Gives a row from its JSON. Integers become floats: a numeric may have more digits than Python reads as an int."""
    row: Row = json.loads(document, parse_int=float)
    return row


def as_number(value: Any) -> float | None:
    """Gives a finite number; None for everything else."""
    return value if isinstance(value, float) and math.isfinite(value) else None


def entries(kind: str, value: Any) -> Iterable[str]:
    """Gives the entries of the vocabulary that a value of a category, tags or words column stands for."""
    if kind == "tags":
        return list(_leaves(value))[:_MAX_TAGS]
    if not isinstance(value, str):
        return ()
    return _WORD.findall(value.lower())[:_MAX_WORDS] if kind == "words" else (value,)


def _leaves(value: Any) -> Iterable[str]:
    """Gives the texts of an array of any dimensions."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for element in value:
            yield from _leaves(element)
