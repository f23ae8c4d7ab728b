"""Why everybody's best item is recommended, for a materialized view, and an explanation in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, limits, runs
from .batch import look
from .errors import NOT_READY, ScoringError
from .explain import Groups, explain_item, latest, leave_one_out, log_popularity, own_bytes
from .history import item_type, read_histories, read_history
from .literals import array_element
from .ragged import places
from .store import Version, execute
from .tokens import History
from .workers import AHEAD, map_in_order

# (user key, item key, sentence, version), and between them of each part, as array literals: its kind, the key of the
# item, the event type, seconds since 1970, events, contribution, share
Row = tuple[str, str, str, str, str, str, str, str, str, str, int]
# User keys, histories, and the number of each one's best item, -1 without.
_Batch = tuple[list[str], History, NDArray[np.int64]]
# Users of a batch, and items of the history that are named for each.
_USERS = 256
# Events of a batch, and fewer where memory is short; what a row takes that waits to be stored; the threads' stacks, the
# catalogue's keys and what is read from the events at one time.
_EVENTS = (16_384, 4096, 1024)
_BYTES_OF_A_ROW = 4096
_FIXED_BYTES = 34 << 20
_MOST_PARTS = 5
# Items that the sentence names.
_IN_WORDS = 2

_DEEDS = {
    "purchase": "bought {}",
    "view": "viewed {}",
    "add_to_cart": "put {} into the cart",
    "review": "reviewed {}",
    "share": "shared {}",
    "search": "searched for {}",
}
_BEST = """
select r.user_id::text as user_key, r.item_ids[1]::text as item_key, r.model_version
from {schema}.stored_recommendations r
where r.user_id = any ($1::{key_type}[]) and r.item_ids[1] is not null
"""
_IS_READY = "select c.relispopulated as is_ready from pg_catalog.pg_class c where c.oid = pg_catalog.to_regclass($1)"
_TITLES = "select t.item_id::text as item_key, t.title from {schema}.item_titles($1::{key_type}[]) t"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of a user's logit that speaks for the item; without `item`: the features, or the popularity."""

    kind: str
    contribution: float
    item: int | None = None
    event_type: str | None = None
    at: float | None = None
    events: int | None = None
    share: float | None = None


def because(plpy: Any, version: Version, user_key: str, item: int) -> str:
    """Gives the sentence that says why an item is recommended to a user, with the rights of the caller."""
    history = read_history(plpy, version, user_key)
    rows = explain_item(version.weights, history, item, max_history=version.max_history, by_item=True)
    names = _type_names(version)
    parts = [
        _Part(kind=row.part, contribution=row.contribution, item=row.item, event_type=names[row.event_type])
        for row in rows
        if row.item is not None and row.event_type is not None and row.contribution > 0
    ][:_IN_WORDS]
    if not parts:
        parts = [
            _Part(kind=row.part, contribution=row.contribution)
            for row in rows
            if row.part == "features" and row.contribution > 0
        ]
    keys = version.item_keys.of_items(part.item for part in parts if part.item is not None)
    return _sentence(parts, keys, _titles(plpy, version, keys.values()))


def explanations_of_all(plpy: Any, version: Version) -> Iterator[Row]:
    """Gives a row per user who has a recommendation: what of the history, or else, speaks for the first of them."""
    relation = f"{plpy.quote_ident(version.model)}.recommendations_materialized"
    if not execute(plpy, _IS_READY, ["text"], [relation])[0]["is_ready"]:
        raise _refresh_first(version, f"model {version.model} has no recommendations yet")
    keys = version.item_keys.all()
    numbers = {key: number for number, key in enumerate(keys)}

    threads, events = _sizes(limits.max_memory(plpy), limits.max_threads(plpy), version)

    def read() -> Iterator[_Batch]:
        for users, history in read_histories(plpy, version, _USERS, keys=keys, max_events=events):
            best = _best_items(plpy, version, users)
            target = [numbers[best[user]] if user in best else -1 for user in users]
            yield users, history, np.array(target, dtype=np.int64)

    def explain(batch: _Batch) -> tuple[_Batch, list[list[_Part]]]:
        return batch, _parts(version, batch[1].distinct(), batch[2])

    done = 0
    with blas.one_thread(), closing(map_in_order([explain] * threads, read(), lambda: look(plpy))) as batches:
        for (users, _, target), parts in batches:
            named = {part.item: keys[part.item] for own in parts for part in own[:_IN_WORDS] if part.item is not None}
            titles = _titles(plpy, version, named.values())
            for user, item, own in zip(users, target.tolist(), parts, strict=True):
                if own:
                    yield user, keys[item], _sentence(own, named, titles), *_literals(own, keys), version.version
                    done += 1
            runs.report_progress(plpy, f"pgvae {version.model}: {done} recommendations explained")
    runs.record(version, "explanations", done)


def _sizes(limit: int, most: int, version: Version) -> tuple[int, int]:
    """Gives how many threads, `most` at most, and events of a batch, fit into so many bytes; ScoringError for none."""

    def needed(threads: int, events: int) -> int:
        waiting = events * 64 + _USERS * _BYTES_OF_A_ROW
        return _FIXED_BYTES + threads * own_bytes(version.weights, events) + (AHEAD * threads + 1) * waiting

    sizes = ((threads, events) for threads in range(most, 0, -1) for events in _EVENTS)
    return limits.first_that_fits(limit, ((needed(*size), size) for size in sizes))


def _best_items(plpy: Any, version: Version, users: Sequence[str]) -> dict[str, str]:
    """Gives the key of each user's first recommendation, if any; ScoringError where another version made it."""
    query = _BEST.format(schema=plpy.quote_ident(version.model), key_type=version.user_id_type)
    found = {}
    for row in execute(plpy, query, ["text[]"], [list(users)]):
        if row["model_version"] != version.version:
            raise _refresh_first(
                version,
                f"the recommendations of model {version.model} are of version {row['model_version']}, the active one is"
                f" {version.version}",
            )
        found[row["user_key"]] = row["item_key"]
    return found


def _refresh_first(version: Version, message: str) -> ScoringError:
    return ScoringError(message, sqlstate=NOT_READY, hint=f"refresh them first: call vae.refresh('{version.model}')")


def _parts(version: Version, history: History, target: NDArray[np.int64]) -> list[list[_Part]]:
    """Gives what speaks for one item of each user, the strongest first; nothing where `target` [U] is negative."""
    weights = version.weights
    tokens, at = latest(history, version.max_history)
    groups = Groups.by_item(tokens, len(weights["item_embedding"]))
    found = leave_one_out(weights, tokens, at, groups, np.maximum(target, 0))
    users = len(target)
    speaks_for = np.maximum(found.of_group, 0.0)
    share = speaks_for / np.maximum(np.bincount(groups.user, weights=speaks_for, minlength=users), 1e-30)[groups.user]
    order = np.lexsort((-found.of_group, groups.user))
    counts = np.bincount(groups.user, minlength=users)
    place = places(counts)
    order = order[(place < _MOST_PARTS) & (found.of_group[order] > 0) & (target[groups.user[order]] >= 0)]
    names = _type_names(version)
    parts: list[list[_Part]] = [[] for _ in range(users)]
    last = groups.last[order]
    for user, contribution, item, event_type, time, events, part in zip(
        groups.user[order].tolist(),
        found.of_group[order].tolist(),
        tokens.item[last].tolist(),
        tokens.event_type[last].tolist(),
        at[last].tolist(),
        groups.size[order].tolist(),
        share[order].tolist(),
        strict=True,
    ):
        parts[user].append(
            _Part(
                kind="item",
                contribution=contribution,
                item=item,
                event_type=names[event_type],
                at=time,
                events=events,
                share=part,
            )
        )
    features = tokens.features.counts() if tokens.features is not None else np.zeros(users, dtype=np.int64)
    for user in np.flatnonzero(target >= 0).tolist():
        if parts[user]:
            continue
        if found.of_features[user] > 0:
            parts[user] = [_Part(kind="features", contribution=float(found.of_features[user]))]
            continue
        is_known = counts[user] > 0 or features[user] > 0
        item = int(target[user])
        popularity = float(weights["output_bias"][item]) if is_known else log_popularity(weights, item)
        parts[user] = [_Part(kind="popularity", contribution=popularity)]
    return parts


def _sentence(parts: Sequence[_Part], keys: Mapping[int, str], titles: Mapping[str, str]) -> str:
    """Says what speaks most for an item: up to two items of the history, by their titles or else keys."""
    names: dict[str, list[str]] = {}
    for part in parts[:_IN_WORDS]:
        if part.item is not None and part.event_type is not None:
            key = keys[part.item]
            names.setdefault(_DEEDS.get(part.event_type, "came across {}"), []).append(titles.get(key) or key)
    if names:
        return "because you " + " and ".join(deed.format(" and ".join(items)) for deed, items in names.items())
    if any(part.kind == "features" for part in parts):
        return "because of what is known about you"
    return "because it is popular"


def _literals(parts: Sequence[_Part], keys: Sequence[str]) -> tuple[str, str, str, str, str, str, str]:
    return (
        _array([part.kind for part in parts]),
        _array([None if part.item is None else array_element(keys[part.item]) for part in parts]),
        _array([part.event_type for part in parts]),
        _array([None if part.at is None else repr(part.at) for part in parts]),
        _array([None if part.events is None else str(part.events) for part in parts]),
        _array([f"{part.contribution:.9g}" if math.isfinite(part.contribution) else None for part in parts]),
        _array([None if part.share is None else f"{part.share:.9g}" for part in parts]),
    )


def _array(elements: Sequence[str | None]) -> str:
    return "{" + ",".join("NULL" if element is None else element for element in elements) + "}"


def _type_names(version: Version) -> dict[int, str]:
    return {index: name for name, index in version.event_types.items()}


def _titles(plpy: Any, version: Version, keys: Iterable[str]) -> dict[str, str]:
    """Gives the titles of items that have one, by key, with the rights of the caller."""
    query = _TITLES.format(schema=plpy.quote_ident(version.model), key_type=item_type(plpy, version))
    return {row["item_key"]: row["title"] for row in execute(plpy, query, ["text[]"], [list(keys)])}
