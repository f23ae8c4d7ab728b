"""Reads users' events from PostgreSQL into arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UNDEFINED_COLUMN, UNKNOWN_ITEM, ScoringError
from .features import FeatureBag, FeaturePipeline, feature_bag
from .store import Version, execute
from .tokens import History

# Events of a batch: so many that it pays, so few that what users did for years fits into the memory.
MAX_EVENTS = 131_072
# Users, and about how many events, that are fetched at one time: 32 bytes an event, 80 where its item is a text.
_FETCHED_USERS, _FETCHED_EVENTS = 64, 16_384

# `{schema}` is the model's name as plpy.quote_ident gives it; everything else is a parameter.
# An event type that the version does not know is left out.
_ONE_USER = """
select h.item_id::text as item_key, h.event_type, extract(epoch from h.occurred_at)::float8 as occurred_at
from {schema}.history($1::{key_type}) h
where h.event_type = any ($2)
"""
# No join with the catalogue, whose size the planner cannot know beneath the views: it sorted all events by item for it.
# Numbers come in PostgreSQL's binary form, an object for each user in place of one for each event.
_ALL_USERS = """
select e.user_id::text as user_key,
    {items} as items,{digest}
    pg_catalog.array_send(array_agg(coalesce(pg_catalog.array_position($1, e.event_type) - 1, -1))
        filter (where e.item_id is not null)) as event_types,
    pg_catalog.array_send(array_agg(e.occurred_at) filter (where e.item_id is not null)) as times
from {schema}.{view} e{only}
group by e.user_id
"""
# As <model>.refresh_digests gives it.
_DIGEST = "\n    (sum(e.digest) % 9223372036854775783)::bigint as digest,"
_INTEGERS = "pg_catalog.array_send(array_agg(e.item_id::bigint) filter (where e.item_id is not null))"
_TEXTS = "array_agg(e.item_id::text) filter (where e.item_id is not null)"
# Of such an array: number of dimensions, flags, type, length and lower bound of the one dimension; then its elements.
_ARRAY_HEADER = 20
_INTEGER, _BIGINT = (np.dtype([("length", ">i4"), ("value", kind)]) for kind in (">i4", ">i8"))
# Of a timestamptz: it counts microseconds since 2000.
_MICROSECONDS_TO_2000 = 946_684_800_000_000
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


def read_history(plpy: Any, version: Version, user_key: str, *, all_items: bool = False) -> History:
    """Gives the events of one user, those of a minute ago included, with the rights of the caller.

    Events on items that the version does not know are left out, or have numbers behind its catalogue (`all_items`).
    """
    query = _ONE_USER.format(schema=plpy.quote_ident(version.model), key_type=version.user_id_type)
    events = execute(plpy, query, ["text", "text[]"], [user_key, list(version.event_types)])
    indexes = version.item_keys.items({row["item_key"] for row in events})
    if all_items:
        unknown = sorted({row["item_key"] for row in events} - indexes.keys())
        indexes |= {key: version.catalogue_size + place for place, key in enumerate(unknown)}
    rows = [row for row in events if row["item_key"] in indexes]
    return History(
        counts=np.array([len(rows)]),
        item=np.array([indexes[row["item_key"]] for row in rows], dtype=np.int64),
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
            hint=f"rename the column back, or choose others: select vae.set_features('{version.model}', ...)",
        ) from None
    return feature_bag(version.user_pipeline, [[row["document"] for row in rows]])


def read_histories(
    plpy: Any,
    version: Version,
    batch_size: int,
    keys: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
    max_events: int = MAX_EVENTS,
    digests: dict[str, int] | None = None,
    *,
    all_items: bool = False,
) -> Iterator[tuple[list[str], History]]:
    """Gives (user keys, events) of all users, or of those with the chosen keys, in batches.

    A batch is complete with `batch_size` users, or with those in whom it came to `max_events` events or more. Some may
    have no known events. The events are those of the table, where one may stand twice: History.distinct has each once.
    `keys` are the item keys of the version, if the caller has them. The digests of users are put into `digests`.
    `all_items` as of read_history.
    """
    schema = plpy.quote_ident(version.model)
    # Compared in the key's own type, so that an index of the shop is used.
    only = "" if chosen is None else f"\nwhere {{alias}}.user_id = any ($2::{version.user_id_type}[])"
    items = _INTEGERS if item_type(plpy, version) in ("integer", "bigint") else _TEXTS
    # The view without digests asks for no right to the columns of features.
    view, digest = ("refresh_events", "") if digests is None else ("digested_events", _DIGEST)
    query = _ALL_USERS.format(schema=schema, view=view, items=items, digest=digest, only=only.format(alias="e"))
    pipeline = version.user_pipeline
    if pipeline.size:
        query = _ALL_USERS_FEATURES.format(schema=schema, histories=query, only=only.format(alias="u"))
    numbers = _ItemNumbers(version.item_keys.all() if keys is None else keys, version.catalogue_size)
    parameters = [list(version.event_types), *([list(chosen)] if chosen is not None else [])]
    plan = plpy.prepare(query, ["text[]", "text[]"][: len(parameters)])
    cursor = plpy.cursor(plan, parameters)
    users: list[str] = []
    parts: list[History] = []
    size = 4
    while rows := cursor.fetch(min(size, batch_size - len(users))):
        users += [row["user_key"] for row in rows]
        if digests is not None:
            digests.update((row["user_key"], row["digest"]) for row in rows)
        parts.append(_history_of(rows, numbers, pipeline, all_items))
        # As many as the last ones let expect, but growing slowly: the next one may have done more.
        fitting = _FETCHED_EVENTS * len(rows) // max(1, len(parts[-1].item))
        size = max(1, min(2 * size, fitting, _FETCHED_USERS))
        if len(users) == batch_size or sum(len(part.item) for part in parts) >= max_events:
            yield users, History.joined(parts)
            users, parts = [], []
    if users:
        yield users, History.joined(parts)


def read_chosen(
    plpy: Any,
    version: Version,
    users: Sequence[str],
    batch_size: int,
    max_events: int = MAX_EVENTS,
    *,
    all_items: bool = False,
) -> Iterator[tuple[list[str], History]]:
    """Gives (user keys, events) of these users, each of them once, as read_histories does; last those of whom nothing
    is known, in no table.
    """
    unread = dict.fromkeys(users)
    for keys, history in read_histories(
        plpy, version, batch_size, chosen=users, max_events=max_events, all_items=all_items
    ):
        for key in keys:
            del unread[key]
        yield keys, history
    unknown = list(unread)
    for first in range(0, len(unknown), batch_size):
        keys = unknown[first : first + batch_size]
        yield keys, _nothing_of(version, len(keys))


def _nothing_of(version: Version, users: int) -> History:
    none = np.zeros(0, dtype=np.int64)
    features = FeatureBag.empty(users) if version.user_pipeline.size else None
    counts, times = np.zeros(users, dtype=np.int64), np.zeros(0)
    return History(counts=counts, item=none, event_type=none, occurred_at=times, features=features)


def _history_of(rows: Any, numbers: _ItemNumbers, pipeline: FeaturePipeline, all_items: bool) -> History:
    event_type = _elements(rows, "event_types", _INTEGER).astype(np.int64)
    item = numbers.of(rows, all_items)
    # An item or event type that the version does not know is left out.
    known = (item >= 0) & (event_type >= 0)
    sizes = [
        (len(row["event_types"]) - _ARRAY_HEADER) // _INTEGER.itemsize if row["event_types"] else 0 for row in rows
    ]
    user = np.repeat(np.arange(len(rows)), sizes)
    return History(
        counts=np.bincount(user[known], minlength=len(rows)),
        item=item[known],
        event_type=event_type[known],
        # As date_part('epoch', …) gives it.
        occurred_at=(_elements(rows, "times", _BIGINT)[known] + _MICROSECONDS_TO_2000) / 1e6,
        features=feature_bag(pipeline, (row["documents"] or () for row in rows)) if pipeline.size else None,
    )


def _elements(rows: Any, column: str, kind: np.dtype[Any]) -> NDArray[Any]:
    """Gives the elements of all rows' arrays of numbers, each as array_send writes it, or None."""
    return np.frombuffer(b"".join([row[column][_ARRAY_HEADER:] for row in rows if row[column]]), kind)["value"]


class _ItemNumbers:
    """The rows of items in the tensors by their keys: integers, or texts."""

    def __init__(self, keys: Sequence[str], catalogue_size: int) -> None:
        self._keys = keys
        self._catalogue_size = catalogue_size

    @cached_property
    def _of_texts(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self._keys)}

    @cached_property
    def _of_integers(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        integers = np.array(self._keys, dtype=np.int64)
        order = np.argsort(integers)
        return integers[order], order

    def of(self, rows: Any, all_items: bool) -> NDArray[np.int64]:
        """Gives the number of the item of each event of these rows, [N].

        Items outside the catalogue have -1 or, with `all_items`, numbers behind it, alike for alike ones of these rows.
        """
        arrays = [row["items"] for row in rows if row["items"]]
        if not arrays or not isinstance(arrays[0], bytes):
            given: Any = list(chain.from_iterable(arrays))
            found = np.fromiter((self._of_texts.get(key, -1) for key in given), np.int64, count=len(given))
        else:
            known, numbers = self._of_integers
            given = _elements(rows, "items", _BIGINT).astype(np.int64)
            found = np.full(len(given), -1)
            if len(known):
                place = np.minimum(np.searchsorted(known, given), len(known) - 1)
                found = np.where(known[place] == given, numbers[place], -1)
        if all_items and len(others := np.flatnonzero(found < 0)):
            _, place = np.unique([given[event] for event in others.tolist()], return_inverse=True)
            found[others] = self._catalogue_size + place
        return found


def item_type(plpy: Any, version: Version) -> str:
    """Gives the type of the shop's item keys."""
    rows = execute(
        plpy, "select m.item_id_type from vae.models m where m.model_id = $1", ["integer"], [version.model_id]
    )
    found: str = rows[0]["item_id_type"]
    return found


def unknown_items(version: Version, keys: Sequence[str]) -> ScoringError:
    """Gives the refusal of items outside the catalogue."""
    hint = (
        "it holds the items that had an event, or features, when the version was trained;"
        f" for newer ones: pgvae train {version.model}"
    )
    if any(key.startswith("{") and key.endswith("}") for key in keys):
        hint = "that is a list which the driver sent without a type: cast it, as in %s::text[]"
    return ScoringError(not_in_catalogue(version, keys), sqlstate=UNKNOWN_ITEM, hint=hint)


def not_in_catalogue(version: Version, keys: Sequence[str]) -> str:
    """Gives "item 7 is not in the catalogue of …", at most five items by name."""
    different = list(dict.fromkeys(keys))
    names = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
    subject = f"items {names} are" if len(different) > 1 else f"item {names} is"
    return f"{subject} not in the catalogue of version {version.version} of model {version.model}"
