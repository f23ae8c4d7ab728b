"""Reads what happened to items from PostgreSQL, and forecasts their demand with the active version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import runs
from .demand import HORIZONS_READ, Forecast, Head, ItemDays
from .errors import NO_DEMAND, UNKNOWN_ITEM, ScoringError
from .store import active_version_id, execute

# (item key; units: expected, low, high; buyers: the same; units of the last period, horizon, version, moment, two
# standard deviations)
Row = tuple[str, Any, Any, Any, Any, Any, Any, float, int, int, str, Any, Any]

_HEAD = """
select v.name, v.version, v.model_id, v.version_id, v.config::text as config, v.demand::text as demand,
    vae_private.looks_ahead_from(v.created_at, v.window_end, (v.demand ->> 'horizon')::integer)::text as as_of,
    statement_timestamp()::text as scored_at, v.item_id_type
from vae_private.scoring_versions v
where v.version_id = $1
"""
_COLUMNS = """
array_agg(d.day) as day, array_agg(d.units) as units, array_agg(d.buyers) as buyers, array_agg(d.views) as views,
array_agg(d.carts) as carts
"""
_SPAN = "$1::timestamptz, $1::timestamptz - make_interval(days => $2), $3::text[]"
_SPAN_TYPES = ["text", "integer", "text[]"]
_ONE_ITEM = """
select {columns} from {schema}.item_days($4::{key_type}, {span}) d having count(*) > 0
"""
_ALL_ITEMS = """
select d.item_id::text as item_key, {columns}
from {schema}.all_item_days({span}) d
group by d.item_id
"""
# Items at once: what each did in up to 26 horizons becomes Python objects.
_BATCH = 100
# More say nothing, and these do no harm to a sum: of a million items it is off by half a unit at most.
_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """The forecast of a model's active version: its head, and the moment from which it looks ahead."""

    model: str
    model_id: int
    version: int
    version_id: int
    item_id_type: str
    head: Head
    targets: list[str]
    as_of: str
    scored_at: str


def forecaster(plpy: Any, model_id: int) -> Forecaster:
    """Gives the active version's forecast of demand; ScoringError where there is none."""
    row = execute(plpy, _HEAD, ["bigint"], [active_version_id(plpy, model_id)])[0]
    if row["demand"] is None:
        raise ScoringError(
            f"version {row['version']} of model {row['name']} forecasts no demand: its events span fewer than four"
            " horizons",
            sqlstate=NO_DEMAND,
            hint=f"train again once there are more: pgvae train {row['name']}; or first make the"
            f""" horizon shorter: select vae.set_options('{row["name"]}', '{{"horizon_days": 7}}')""",
        )
    return Forecaster(
        model=row["name"],
        model_id=row["model_id"],
        version=row["version"],
        version_id=row["version_id"],
        item_id_type=row["item_id_type"],
        head=Head.from_json(json.loads(row["demand"])),
        targets=[entry["event_type"] for entry in json.loads(row["config"])["event_types"] if entry["is_target"]],
        as_of=row["as_of"],
        scored_at=row["scored_at"],
    )


def demand_of_item(plpy: Any, found: Forecaster, item_key: str) -> Row:
    """Gives the forecast of one item, with the rights of the caller: of nothing known, empty where nothing happened."""
    query = _ONE_ITEM.format(
        columns=_COLUMNS, schema=plpy.quote_ident(found.model), key_type=found.item_id_type, span=_SPAN
    )
    rows = execute(plpy, query, [*_SPAN_TYPES, "text"], [*_span(found), item_key])
    if rows:
        (row,) = _forecast(found, [item_key], rows)
        return row
    known = execute(
        plpy,
        "select from vae_private.scoring_items i where i.version_id = $1 and i.item_key = $2",
        ["bigint", "text"],
        [found.version_id, item_key],
    )
    if not len(known):
        raise ScoringError(
            f"nothing happened to item {item_key}, which version {found.version} of model {found.model} does not know",
            sqlstate=UNKNOWN_ITEM,
            hint="is the key right? A new item is forecast from its first event on; for many, read the view demand",
        )
    return (item_key, *(None,) * 6, 0.0, found.head.horizon, found.version, found.scored_at, None, None)


def demand_of_all(plpy: Any, found: Forecaster) -> Iterator[Row]:
    """Gives the forecast of each item that something happened to."""
    query = _ALL_ITEMS.format(columns=_COLUMNS, schema=plpy.quote_ident(found.model), span=_SPAN)
    plan = plpy.prepare(query, _SPAN_TYPES)
    cursor = plpy.cursor(plan, _span(found))
    done = 0
    while rows := cursor.fetch(_BATCH):
        yield from _forecast(found, [row["item_key"] for row in rows], rows)
        done += len(rows)
    runs.record(found, "demand", done)


def _span(found: Forecaster) -> list[Any]:
    return [found.as_of, HORIZONS_READ * found.head.horizon, found.targets]


def _forecast(found: Forecaster, item_keys: list[str], rows: Any) -> Iterator[Row]:
    counts = [len(row["day"]) for row in rows]
    columns = {
        name: np.array([value for row in rows for value in row[name]], dtype=np.float64)
        for name in ("units", "buyers", "views", "carts")
    }
    days = ItemDays(
        item_count=len(item_keys),
        item=np.repeat(np.arange(len(item_keys)), counts),
        day=np.array([day for row in rows for day in row["day"]], dtype=np.int64),
        **columns,
    )
    units, buyers = found.head.forecast(days)
    last = np.round(days.total("units", 0, found.head.horizon), _DECIMALS).tolist()
    for key, own, other, before in zip(item_keys, _numbers(units), _numbers(buyers), last, strict=True):
        yield (
            key, *own[:3], *other[:3], before, found.head.horizon, found.version, found.scored_at, own[3], other[3]
        )  # fmt: skip


def _numbers(forecast: Forecast) -> list[list[float]]:
    columns = np.column_stack((forecast.expected, forecast.low, forecast.high, forecast.deviation))
    numbers: list[list[float]] = np.round(columns, _DECIMALS).tolist()
    return numbers
