"""Histories that no table holds: an anonymous visitor's session, a hypothetical user's, a cart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import INVALID_PARAMETER, ScoringError
from .features import FeatureBag, feature_bag
from .history import item_type, not_in_catalogue
from .store import Version, execute
from .tokens import History

_MEMBERS = ("item_id", "event_type", "occurred_at")
_SHAPE = 'an array of objects, as in \'[{"item_id": 7, "event_type": "view", "occurred_at": "2025-01-31 10:00+00"}]\''
# What an event without a type is: a visitor looks.
_DEFAULT_TYPES = ("view", "add_to_cart", "purchase")
# What words mean whose events are left out.
_IGNORE = "ignore"
# What to do where PostgreSQL cannot read a key or a time: the classes of its errors of data.
_DATA_EXCEPTION = "22"

# Spelled as the catalogue spells it.
_KEYS = """
select e.item_id::text as item_key
from unnest($1::{key_type}[]) with ordinality as e (item_id, place)
order by e.place
"""
_TIMES = """
select extract(epoch from e.occurred_at)::float8 as at
from unnest($1::timestamptz[]) with ordinality as e (occurred_at, place)
order by e.place
"""


@dataclass(frozen=True, kw_only=True)
class GivenEvent:
    """An event as a caller gave it; `name` is what an error calls it. `at` is in seconds since 1970, `time` as text."""

    name: str
    item_key: str
    event_type: str | None = None
    time: str | None = None
    at: float | None = None


def events_from_json(document: str) -> list[GivenEvent]:
    """Gives the events of a JSON array of objects; ScoringError names the first element of another shape."""
    given = json.loads(document)
    if not isinstance(given, list):
        raise _wrong("events", given, f"give {_SHAPE}")
    return [_event_from_json(f"events[{place}]", element) for place, element in enumerate(given)]


def _event_from_json(name: str, element: Any) -> GivenEvent:
    if not isinstance(element, dict):
        raise _wrong(name, element, f"give {_SHAPE}")
    for member in element:
        if member not in _MEMBERS:
            raise ScoringError(
                f"{name} has the unknown member {member!r}",
                sqlstate=INVALID_PARAMETER,
                hint=f"an event has {', '.join(_MEMBERS)}; only item_id is needed",
            )
    item = element.get("item_id")
    if item is None:
        raise ScoringError(f"{name} has no item_id", sqlstate=INVALID_PARAMETER, hint=f"give {_SHAPE}")
    if isinstance(item, bool) or not isinstance(item, str | int):
        raise _wrong(f"{name}.item_id", item, "give the key of an item, a number or a text")
    for member in ("event_type", "occurred_at"):
        if not isinstance(element.get(member), str | None):
            raise _wrong(f"{name}.{member}", element[member], f"give a text: {_SHAPE}")
    return GivenEvent(
        name=name, item_key=str(item), event_type=element.get("event_type"), time=element.get("occurred_at")
    )


def _wrong(name: str, value: Any, hint: str) -> ScoringError:
    return ScoringError(f"{name} is {json.dumps(value)[:100]}", sqlstate=INVALID_PARAMETER, hint=hint)


def events_from_arrays(
    item_keys: Sequence[str | None], event_types: Sequence[str | None] | None, times: Sequence[float | None] | None
) -> list[GivenEvent]:
    """Gives the events of parallel arrays; ScoringError where their lengths differ, or an item is null."""
    check_flat("item_ids", item_keys)
    for name, other in (("event_types", event_types), ("occurred_ats", times)):
        check_flat(name, other or ())
        if other is not None and len(other) != len(item_keys):
            raise ScoringError(
                f"{name} has {len(other)} elements, item_ids has {len(item_keys)}",
                sqlstate=INVALID_PARAMETER,
                hint="the arrays belong together: make them with array_agg over the same rows in the same order",
            )
    events = []
    for place, key in enumerate(item_keys):
        if key is None:
            raise null_in_array("item_ids", place)
        events.append(
            GivenEvent(
                name=f"item_ids[{place + 1}]",
                item_key=key,
                event_type=event_types[place] if event_types else None,
                at=times[place] if times else None,
            )
        )
    return events


def check_flat(name: str, elements: Sequence[Any]) -> None:
    """Refuses an array of several dimensions, whose elements PL/Python gives as lists."""
    if any(isinstance(element, list) for element in elements):
        raise ScoringError(
            f"{name} has more than one dimension",
            sqlstate=INVALID_PARAMETER,
            hint="give an array of one dimension, as array_agg makes it of single values: array[1, 2]",
        )


def null_in_array(name: str, place: int) -> ScoringError:
    """Gives the refusal of an array of items whose element at `place`, from 0, is null."""
    return ScoringError(
        f"{name}[{place + 1}] is null", sqlstate=INVALID_PARAMETER, hint="leave it out, as array_remove does"
    )


def split_features(options: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """Gives the option `features`, the columns of a user, and the other options as JSON."""
    given = json.loads(options) if options else None
    if not isinstance(given, dict) or "features" not in given:
        return None, options
    features = given.pop("features")
    if not isinstance(features, dict | None):
        raise _wrong(
            "option 'features'", features, """give an object of columns: {"features": {"country": "France"}}"""
        )
    return features, json.dumps(given)


def read_session(
    plpy: Any, version: Version, events: Sequence[GivenEvent], features: Mapping[str, Any] | None
) -> History:
    """Gives given events as the history of one user, the same as if the table held them.

    An event without a time happens now, after those before it in the list. Items outside the catalogue, and standard
    event types that the version does not know, do not count, as in a history; a NOTICE names such items.
    """
    indexes = _known_items(plpy, version, events)
    types = _event_types(plpy, version, events)
    times = _times(plpy, events)
    rows = sorted(
        {
            (item, types[place], times[place])
            for place, item in enumerate(indexes)
            if item is not None and types[place] is not None
        }
    )
    item, event_type, occurred_at = zip(*rows, strict=True) if rows else ((), (), ())
    return History(
        counts=np.array([len(rows)]),
        item=np.array(item, dtype=np.int64),
        event_type=np.array(event_type, dtype=np.int64),
        occurred_at=np.array(occurred_at, dtype=np.float64),
        features=_features(version, features),
    )


def _known_items(plpy: Any, version: Version, events: Sequence[GivenEvent]) -> list[int | None]:
    """Gives the row of each event's item in the tensors, None outside the catalogue, where a NOTICE names it."""
    key_type = item_type(plpy, version)
    query = _KEYS.format(key_type=key_type)

    def read(some: Sequence[str]) -> list[str]:
        return [row["item_key"] for row in execute(plpy, query, ["text[]"], [list(some)])]

    names, keys = [event.name for event in events], [event.item_key for event in events]
    spelled = _read_each(plpy, read, names, keys, f"give keys of the type {key_type}")
    indexes = version.item_keys.items(set(spelled))
    if unknown := [key for key in spelled if key not in indexes]:
        plpy.notice(f"{not_in_catalogue(version, unknown)}: left out")
    return [indexes.get(key) for key in spelled]


def _times(plpy: Any, events: Sequence[GivenEvent]) -> list[float]:
    """Gives the time of each event in seconds since 1970."""
    given = [event for event in events if event.time is not None]

    def read(texts: Sequence[str]) -> list[float]:
        return [row["at"] for row in execute(plpy, _TIMES, ["text[]"], [list(texts)])]

    names, texts = [f"{event.name}.occurred_at" for event in given], [str(event.time) for event in given]
    read_times = dict(
        zip(map(id, given), _read_each(plpy, read, names, texts, 'give a time, as "2025-01-31 10:00+00"'), strict=True)
    )
    now = execute(plpy, "select extract(epoch from statement_timestamp())::float8 as at", [], [])[0]["at"]
    times = []
    for place, event in enumerate(events):
        at = event.at if event.time is None else read_times[id(event)]
        if at is not None and not math.isfinite(at):
            raise ScoringError(
                f"occurred_at of {event.name} is {'-' if at < 0 else ''}infinity",
                sqlstate=INVALID_PARAMETER,
                hint='give a time, as "2025-01-31 10:00+00"',
            )
        # A moment for each: their order counts.
        times.append(now + 0.001 * place if at is None else at)
    return times


def _read_each(
    plpy: Any, read: Callable[[Sequence[str]], list[Any]], names: Sequence[str], texts: Sequence[str], hint: str
) -> list[Any]:
    """Reads all texts at once; where PostgreSQL refuses, one by one, so that the error can name the culprit."""
    try:
        return read(texts)
    except plpy.SPIError as error:
        if not str(error.sqlstate).startswith(_DATA_EXCEPTION):
            raise
    for name, text in zip(names, texts, strict=True):
        try:
            read([text])
        except plpy.SPIError:
            raise _wrong(name, text, hint) from None
    raise AssertionError("each element can be read, but not all of them")


def _event_types(plpy: Any, version: Version, events: Sequence[GivenEvent]) -> Sequence[int | None]:
    """Gives the row of each event's type in its embedding; None for a standard type that the version does not know."""
    default = default_type(version, *_DEFAULT_TYPES)
    if all(event.event_type is None for event in events):
        return [default] * len(events)
    rows = execute(
        plpy,
        "select t.name, t.event_type from vae.event_types t where t.model_id = $1 order by t.weight desc, t.name",
        ["integer"],
        [version.model_id],
    )
    # What the shop's words may mean, but for `ignore`, which is no type of an event.
    standard = {row["event_type"]: row["event_type"] for row in rows if row["event_type"] != _IGNORE}
    standard |= {name: name for name in version.event_types}
    meanings = standard | {row["name"]: row["event_type"] for row in rows}
    types: list[int | None] = []
    for event in events:
        if event.event_type is None:
            types.append(default)
        elif event.event_type not in meanings:
            raise _wrong(f"event_type of {event.name}", event.event_type, f"known types: {', '.join(standard)}")
        else:
            types.append(version.event_types.get(meanings[event.event_type]))
    return types


def default_type(version: Version, *preferred: str) -> int:
    """Gives the row of the first of these standard event types that the version knows, else of any that it knows."""
    return next((version.event_types[name] for name in preferred if name in version.event_types), 0)


def _features(version: Version, given: Mapping[str, Any] | None) -> FeatureBag | None:
    """Gives the feature tokens of a user with these columns; ScoringError names a column that the version never saw."""
    pipeline = version.user_pipeline
    known = [column.name for column in pipeline.columns]
    for name in given or ():
        if name not in known and name not in dict(pipeline.left_out):
            raise ScoringError(
                f"feature {name!r} is unknown",
                sqlstate=INVALID_PARAMETER,
                hint=f"version {version.version} knows of users: {', '.join(known) or 'no features'}",
            )
    if not pipeline.size:
        return None
    return feature_bag(pipeline, [[json.dumps(given)] if given else []])
