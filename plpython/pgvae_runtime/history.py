"""Reads users' events from PostgreSQL into arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UNDEFINED_COLUMN, ScoringError
from .features import FeatureBag, feature_bag
from .store import Version, execute
from .tokens import History

# `{schema}` is the model's name as plpy.quote_ident gives it; everything else is a parameter.
# An item or event type that the version does not know is left out.
_ONE_USER = """
select i.item_index, h.event_type, extract(epoch from h.occurred_at)::float8 as occurred_at
from {schema}.history($1::{key_type}) h
join vae_private.scoring_items i on i.version_id = $2 and i.item_key = h.item_id::text
where h.event_type = any ($3)
"""
_ALL_USERS = """
select e.user_id::text as user_key,
    array_agg(i.item_index) filter (where i.item_index is not null) as items,
    array_agg(array_position($2, e.event_type) - 1) filter (where i.item_index is not null) as event_types,
    array_agg(extract(epoch from e.occurred_at)::float8) filter (where i.item_index is not null) as times
from {schema}.refresh_events e
left join vae_private.scoring_items i
    on i.version_id = $1 and i.item_key = e.item_id::text and e.event_type = any ($2){only}
group by e.user_id
"""
_ONE_USERS_FEATURES = "select f.features::text as document from {schema}.features($1::{key_type}) f"
# One pass over the users' table for all of them; without features none.
_ALL_USERS_FEATURES = """
select h.*, f.documents
from ({histories}) h
left join (
    select u.user_id::text as user_key, array_agg(u.features::text) as documents
    from {schema}.user_features u{only}
    group by u.user_id
) f using (user_key)
"""


def read_history(plpy: Any, version: Version, user_key: str) -> History:
    """Gives the events of one user, those of a minute ago included, with the rights of the caller."""
    query = _ONE_USER.format(schema=plpy.quote_ident(version.model), key_type=version.user_id_type)
    rows = execute(plpy, query, ["text", "bigint", "text[]"], [user_key, version.version_id, list(version.event_types)])
    return History(
        counts=np.array([len(rows)]),
        item=np.array([row["item_index"] for row in rows], dtype=np.int64),
        event_type=np.array([version.event_types[row["event_type"]] for row in rows], dtype=np.int64),
        occurred_at=np.array([row["occurred_at"] for row in rows], dtype=np.float64),
        features=_read_features(plpy, version, user_key),
    )


def _read_features(plpy: Any, version: Version, user_key: str) -> FeatureBag | None:
    """Gives the feature tokens of one user, with the rights of the caller; None where the version knows none."""
    if not version.user_pipeline.size:
        return None
    query = _ONE_USERS_FEATURES.format(schema=plpy.quote_ident(version.model), key_type=version.user_id_type)
    try:
        rows = execute(plpy, query, ["text"], [user_key])
    except plpy.SPIError as error:
        if error.sqlstate != UNDEFINED_COLUMN:
            raise
        raise ScoringError(
            f"a feature of model {version.model} is gone: {error}",
            sqlstate=UNDEFINED_COLUMN,
            hint=f"rename the column back, or choose others: select vae.set_features('{version.model}', …)",
        ) from None
    return feature_bag(version.user_pipeline, [[row["document"] for row in rows]])


def read_histories(
    plpy: Any, version: Version, batch_size: int, chosen: Sequence[str] | None = None
) -> Iterator[tuple[list[str], History]]:
    """Gives (user keys, events) of all users, or of those with the chosen keys, `batch_size` users at a time.

    Some may have no known events.
    """
    schema = plpy.quote_ident(version.model)
    # Compared in the key's own type, so that an index of the shop is used.
    only = "" if chosen is None else f"\nwhere {{alias}}.user_id = any ($3::{version.user_id_type}[])"
    query = _ALL_USERS.format(schema=schema, only=only.format(alias="e"))
    pipeline = version.user_pipeline
    if pipeline.size:
        query = _ALL_USERS_FEATURES.format(schema=schema, histories=query, only=only.format(alias="u"))
    parameters = [version.version_id, list(version.event_types), *([list(chosen)] if chosen is not None else [])]
    plan = plpy.prepare(query, ["bigint", "text[]", "text[]"][: len(parameters)])
    cursor = plpy.cursor(plan, parameters)
    while rows := cursor.fetch(batch_size):
        counts = np.array([len(row["items"] or ()) for row in rows], dtype=np.int64)
        yield (
            [row["user_key"] for row in rows],
            History(
                counts=counts,
                item=_joined(rows, "items", np.int64),
                event_type=_joined(rows, "event_types", np.int64),
                occurred_at=_joined(rows, "times", np.float64),
                features=feature_bag(pipeline, (row["documents"] or () for row in rows)) if pipeline.size else None,
            ),
        )


def _joined(rows: Any, column: str, dtype: type) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(row[column] or () for row in rows), dtype)


def item_keys(plpy: Any, version: Version) -> list[str]:
    """Gives the key of each item of the catalogue, in the order of the tensors' rows."""
    rows = execute(
        plpy,
        "select i.item_key from vae_private.scoring_items i where i.version_id = $1 order by i.item_index",
        ["bigint"],
        [version.version_id],
    )
    return [row["item_key"] for row in rows]


def item_index(plpy: Any, version: Version, item_key: str) -> int | None:
    """Gives the row of an item in the tensors; None for an item outside the catalogue."""
    rows = execute(
        plpy,
        "select i.item_index from vae_private.scoring_items i where i.version_id = $1 and i.item_key = $2",
        ["bigint", "text"],
        [version.version_id, item_key],
    )
    return rows[0]["item_index"] if rows else None
