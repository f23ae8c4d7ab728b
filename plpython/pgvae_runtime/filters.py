"""What a call may recommend: candidate sets, caps for diversity and a least score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import forward
from .errors import INSUFFICIENT_PRIVILEGE, INVALID_PARAMETER, QUERY_CANCELED, UNDEFINED_COLUMN, ScoringError
from .forward import Array
from .store import Version, execute


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The options of a call that leave something out.

    `exclude_seen` leaves out what the user bought; `candidates` is the name of a candidate set, None for the whole
    catalogue; `at_most` maps a column of the items' table to how many items of one value a list may hold; `min_score`
    is the least score.
    """

    exclude_seen: bool = True
    candidates: str | None = None
    at_most: Mapping[str, int] | None = None
    min_score: float = 0.0


# A set by its name, or the one of the refreshes.
_CANDIDATES = """
select c.name, c.relation_schema, c.relation_table, c.item_id_column, m.item_id_type
from vae.candidates c
join vae.models m using (model_id)
where c.model_id = $1 and case when $2 is null then c.for_refresh else c.name = $2 end
"""
_NAMES = """
select coalesce(string_agg(c.name, ', ' order by c.name), 'none') as names
from vae.candidates c
where c.model_id = $1
"""
# Compared in the shop's own type: a column that became another type is an error, not a set that matches nothing.
_ITEMS = """
select count(*)::bigint as named,
    array_agg(i.item_index order by i.item_index) filter (where i.item_index is not null) as items
from (select distinct c.{column} as item_id from {relation} c where c.{column} is not null) c
left join vae_private.scoring_items i on i.version_id = $1 and i.item_key::{key_type} = c.item_id
"""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The items of a candidate set that a version knows: `items` are their rows in the tensors, ascending."""

    name: str
    items: NDArray[np.int64]


def read_candidates(plpy: Any, version: Version, name: str | None) -> Candidates | None:
    """Gives a candidate set of the model by its name; with None the one of the refreshes, or None where there is none.

    Read at the moment of the call with the rights of the caller, so grants and row security of the relation hold.
    ScoringError names a set that does not exist or whose relation cannot be read.
    """
    rows = execute(plpy, _CANDIDATES, ["integer", "text"], [version.model_id, name])
    if not rows:
        if name is None:
            return None
        names = execute(plpy, _NAMES, ["integer"], [version.model_id])[0]["names"]
        raise ScoringError(
            f"candidates {name!r} of model {version.model} do not exist",
            sqlstate=INVALID_PARAMETER,
            hint=f"there are: {names}; vae.set_candidates defines others",
        )
    row = rows[0]
    relation = f"{plpy.quote_ident(row['relation_schema'])}.{plpy.quote_ident(row['relation_table'])}"
    column = plpy.quote_ident(row["item_id_column"])
    query = _ITEMS.format(relation=relation, column=column, key_type=row["item_id_type"])
    try:
        found = execute(plpy, query, ["bigint"], [version.version_id])[0]
    except plpy.SPIError as error:
        if error.sqlstate == QUERY_CANCELED:
            raise
        hint = f"define it anew with vae.set_candidates, of a relation whose items are {row['item_id_type']}"
        if error.sqlstate == INSUFFICIENT_PRIVILEGE:
            hint = f"the owner of {relation} can allow it with a grant of select"
        raise ScoringError(
            f"candidates {row['name']!r} of model {version.model} cannot be read from {relation}: {error}",
            sqlstate=error.sqlstate,
            hint=hint,
        ) from None
    items = np.array(found["items"] or [], dtype=np.int64)
    if not len(items):
        why = f"name {found['named']} items, none of which version {version.version} knows"
        message = f"candidates {row['name']!r} of model {version.model} {why if found['named'] else 'are empty'}"
        if name is None:
            raise ScoringError(
                message,
                sqlstate=INVALID_PARAMETER,
                hint=f"fill {relation}, or let the refresh rank the whole catalogue:"
                f" select vae.drop_candidates('{version.model}', '{row['name']}')",
            )
        plpy.notice(message)
    return Candidates(name=row["name"], items=items)


def restricted(version: Version, candidates: Candidates) -> Version:
    """Gives the version as one that ranks only the C candidates: its scores have the shape [U, C], and it multiplies
    with C rows of output_weight. Histories go on counting items of the whole catalogue.
    """
    items, weights = candidates.items, version.weights
    whole = replace(version, ranked=items)
    assert whole.columns is not None
    linked = whole.columns[weights["shortcut_item"]]
    kept = linked >= 0
    before = np.concatenate(([0], np.cumsum(kept)))
    popularity = weights["item_popularity"][items]
    return replace(
        whole,
        weights={
            **weights,
            "output_weight": weights["output_weight"][items],
            "output_bias": weights["output_bias"][items],
            "item_popularity": popularity / max(popularity.sum(), np.float32(1e-30)),
            "shortcut_start": before[weights["shortcut_start"]].astype(np.int32),
            "shortcut_item": linked[kept].astype(np.int32),
            "shortcut_weight": weights["shortcut_weight"][kept],
        },
    )


def keep_candidates(scores: Array, candidates: Candidates) -> None:
    """Makes scores of the whole catalogue, [U, I], those that `restricted` gives, in place; -1 for all other items."""
    kept = scores[:, candidates.items]
    kept /= np.maximum(kept.sum(axis=1, keepdims=True), np.float32(1e-30))
    scores[:] = -1.0
    scores[:, candidates.items] = kept


def best_items(plpy: Any, version: Version, scores: Array, k: int, filters: Filters) -> list[tuple[int, float]]:
    """Gives (item, score) of the k best items of one user, [1, I], best first; items of a score below 0 are left out.

    Where a cap holds, the ranking is walked from its top, and an item is left out if the list has as many of its value
    already. An item without a value, or that is not in the table of items, counts towards no cap.
    """
    caps = filters.at_most or {}
    # In the scores' own precision: the least score may be one that a query showed.
    least = float(np.float32(filters.min_score))
    depth = 4 * k if caps else k
    while True:
        items, values = forward.top_k(scores, depth)
        ranked = [
            (item, value) for item, value in zip(items[0].tolist(), values[0].tolist(), strict=True) if value >= least
        ]
        chosen = _capped(plpy, version, ranked, caps)
        if len(chosen) >= k or len(ranked) < depth:
            return chosen[:k]
        depth *= 4


def _capped(
    plpy: Any, version: Version, ranked: list[tuple[int, float]], caps: Mapping[str, int]
) -> list[tuple[int, float]]:
    """Gives what is left of a ranking where an item is left out if a cap was reached above it."""
    values = {column: _values_of(plpy, version, column, [item for item, _ in ranked]) for column in caps}
    taken: Counter[tuple[str, str]] = Counter()
    kept = []
    for item, score in ranked:
        own = [(column, values[column][item]) for column in caps if item in values[column]]
        if all(taken[column, value] < caps[column] for column, value in own):
            taken.update(own)
            kept.append((item, score))
    return kept


_COLUMNS = """
select m.items_schema, m.items_table, m.items_key_column, m.item_id_type,
    case when m.items_table is not null then array(
        select a.attname::text
        from pg_catalog.pg_attribute a
        where a.attrelid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', m.items_schema, m.items_table))
            and a.attnum > 0 and not a.attisdropped
        order by a.attnum
    ) end as columns
from vae.models m
where m.model_id = $1
"""
# Of a key with several rows any one counts.
_VALUES = """
select distinct on (item_key) t.{key}::{key_type}::text as item_key, t.{column}::text as value
from {relation} t
where t.{key} = any ($1::{key_type}[]) and t.{column} is not null
order by item_key, value
"""


def _values_of(plpy: Any, version: Version, column: str, items: list[int]) -> Mapping[int, str]:
    """Gives what a column of the items' table says of these items, with the rights of the caller."""
    row = execute(plpy, _COLUMNS, ["integer"], [version.model_id])[0]
    if row["items_table"] is None:
        raise ScoringError(
            f"option 'at_most' names {column!r}, but model {version.model} has no table of items",
            sqlstate=INVALID_PARAMETER,
            hint=f"its owner can name one: select vae.set_tables('{version.model}', items => 'public.items')",
        )
    if column not in row["columns"]:
        raise ScoringError(
            f"option 'at_most' names {column!r}, which {row['items_schema']}.{row['items_table']} does not have",
            sqlstate=UNDEFINED_COLUMN,
            hint=f"there are: {', '.join(row['columns']) or 'none'}",
        )
    query = _VALUES.format(
        column=plpy.quote_ident(column),
        relation=f"{plpy.quote_ident(row['items_schema'])}.{plpy.quote_ident(row['items_table'])}",
        key=plpy.quote_ident(row["items_key_column"]),
        key_type=row["item_id_type"],
    )
    keys = version.item_keys.of_items(items)
    values = {row["item_key"]: row["value"] for row in execute(plpy, query, ["text[]"], [list(keys.values())])}
    return {item: values[key] for item, key in keys.items() if key in values}
