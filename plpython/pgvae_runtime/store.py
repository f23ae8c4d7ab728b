"""The active version of a model, read from PostgreSQL with the caller's rights and kept for the session."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import behaviour, mapping, outcomes, uplift
from .errors import (
    INCOMPATIBLE_VERSION,
    INSUFFICIENT_PRIVILEGE,
    NO_ACTIVE_VERSION,
    UNDEFINED_SCHEMA,
    UNKNOWN_MODEL,
    ScoringError,
    corrupt_weights,
)
from .features import NO_FEATURES, FeaturePipeline
from .forward import FORMAT, INTEGERS, SHAPES
from .item_keys import ItemKeys
from .tensors import Assembler
from .tokens import AGE_BUCKETS, ORDER_BUCKETS

# A session that scores with many models keeps the weights of the last few, not of all.
_KEPT_VERSIONS = 4


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a model, ready to score.

    `weights` maps the names of forward.SHAPES to arrays; `event_types` gives the row of each standard event type
    in the event type embedding; `targets` the rows of those that count as the event that is predicted;
    `weights` may hold those of outcomes.SHAPES and of uplift.SHAPES too. `user_pipeline` makes the feature tokens of
    users; `ranked` are the items of the catalogue that the C columns of the scores stand for, ascending, None: all.
    """

    version_id: int
    version: int
    model_id: int
    model: str
    user_id_type: str
    weights: dict[str, Any]
    event_types: dict[str, int]
    targets: tuple[int, ...]
    max_history: int
    user_count: int
    user_pipeline: FeaturePipeline = NO_FEATURES
    # Of a version that scores: of others nobody asks.
    item_keys: ItemKeys = field(default_factory=ItemKeys.none)
    # In seconds since 1970: when it was published, and its newest event.
    created_at: float = 0.0
    window_end: float = 0.0
    # Of a version that filters.restricted made.
    ranked: NDArray[np.int64] | None = None

    @property
    def item_count(self) -> int:
        """The number of items that the version ranks: columns of the scores."""
        return len(self.weights["item_popularity"])

    @property
    def catalogue_size(self) -> int:
        """The number of items that the version knows: rows of the tensors."""
        return len(self.weights["item_embedding"])

    @cached_property
    def columns(self) -> NDArray[np.int64] | None:
        """In which column of the scores each item of the catalogue stands, -1: in none; None: item i in column i."""
        if self.ranked is None:
            return None
        columns = np.full(self.catalogue_size, -1, dtype=np.int64)
        columns[self.ranked] = np.arange(len(self.ranked))
        return columns


# What tells one version's weights and items from another's, without reading them: the chunks' own digests, and when it
# was published.
_DIGEST = """
select d.oid::bigint as database, coalesce((
    select encode(sha256(string_agg(
        convert_to(format('%s %s %s %s ', t.name, t.chunk, t.dtype, t.shape), 'UTF8') || t.sha256, ''
        order by t.name, t.chunk) || int8send((1e6 * extract(epoch from v.created_at))::bigint)), 'hex')
    from vae_private.scoring_tensors t
    join vae_private.scoring_versions v using (version_id)
    where t.version_id = $1
    group by v.created_at
), 'none') as digest
from pg_catalog.pg_database d
where d.datname = pg_catalog.current_database()
"""

# `{views}` is scoring: active versions, for whoever scores; or published: all of them, for operators.
_VERSION = """
select v.version, v.name, v.user_id_type, v.format, v.config::text as config, v.max_history,
    v.user_count, v.model_id, v.features::text as features, extract(epoch from v.created_at)::float8 as created_at,
    extract(epoch from v.window_end)::float8 as window_end
from vae_private.{views}_versions v
where v.version_id = $1
"""
_TENSORS = """
select t.name, t.chunk, t.dtype, t.shape, t.sha256, t.data
from vae_private.{views}_tensors t
where t.version_id = $1
order by t.name, t.chunk
"""
_ITEM_KEYS = """
select coalesce(array_agg(i.item_key order by i.item_index), '{}') as keys
from vae_private.scoring_items i
where i.version_id = $1
"""

_versions: OrderedDict[int, Version] = OrderedDict()
_plans: dict[str, Any] = {}


def execute(plpy: Any, query: str, types: list[str], values: list[Any]) -> Any:
    """Runs a query through a plan that the session keeps."""
    plan = _plans.get(query)
    if plan is None:
        plan = _plans[query] = plpy.prepare(query, types)
    return plpy.execute(plan, values)


def active_version_id(plpy: Any, model_id: int) -> int:
    """Gives the number in this database of the active version that the calling query's snapshot sees.

    The view that is read shows a version only to those who may use its model, so the right is checked on every
    call, also where the weights are already in memory. ScoringError where there is nothing to score with.
    """
    rows = execute(
        plpy,
        "select version_id from vae_private.scoring_versions where model_id = $1",
        ["integer"],
        [model_id],
    )
    if not rows:
        raise _explain_absence(plpy, model_id)
    version_id: int = rows[0]["version_id"]
    return version_id


def active_version(plpy: Any, model_id: int) -> Version:
    """Gives the active version with its weights, from memory where this session has loaded it before."""
    version_id = active_version_id(plpy, model_id)
    version = _versions.get(version_id)
    if version is None:
        version = _versions[version_id] = _load(plpy, version_id)
        while len(_versions) > _KEPT_VERSIONS:
            _versions.popitem(last=False)
    _versions.move_to_end(version_id)
    return version


def forget() -> None:
    """Forgets all versions: for a process that is no session of one database."""
    _versions.clear()


def _explain_absence(plpy: Any, model_id: int) -> ScoringError:
    rows = execute(
        plpy,
        "select m.name, n.oid is not null as has_schema,"
        " coalesce(pg_catalog.has_schema_privilege(n.oid, 'usage'), false) as may_use, current_user as caller"
        " from vae.models m left join pg_catalog.pg_namespace n on n.nspname = m.name where m.model_id = $1",
        ["integer"],
        [model_id],
    )
    if not rows:
        return ScoringError(
            f"model number {model_id} does not exist", sqlstate=UNKNOWN_MODEL, hint="see: select name from vae.models"
        )
    name = rows[0]["name"]
    if rows[0]["has_schema"] and not rows[0]["may_use"]:
        return ScoringError(
            f"permission denied for model {name}",
            sqlstate=INSUFFICIENT_PRIVILEGE,
            hint=f"its owner can allow it: grant usage on schema {name} to {plpy.quote_ident(rows[0]['caller'])}",
        )
    if not rows[0]["has_schema"]:
        return ScoringError(
            f"schema {name} of model {name} is gone",
            sqlstate=UNDEFINED_SCHEMA,
            hint=f"if it was renamed: alter schema ... rename to {name}; else: select vae.drop_model('{name}')",
        )
    return ScoringError(
        f"model {name} has no active version",
        sqlstate=NO_ACTIVE_VERSION,
        hint=execute(plpy, "select vae_private.activation_hint($1, $2) as hint", ["integer", "text"], [model_id, name])[
            0
        ]["hint"],
    )


def load_version(plpy: Any, version_id: int) -> Version:
    """Gives a published version, active or not, with weights read for this call alone; for operators.

    ScoringError where its weights are damaged, or of a format that this runtime does not know.
    """
    return _load(plpy, version_id, views="published")


def _load(plpy: Any, version_id: int, views: str = "scoring") -> Version:
    row = execute(plpy, _VERSION.format(views=views), ["bigint"], [version_id])[0]
    if row["format"] != FORMAT:
        raise ScoringError(
            f"version {row['version']} of model {row['name']} has tensor format {row['format']},"
            f" this database's runtime scores format {FORMAT}",
            sqlstate=INCOMPATIBLE_VERSION,
            hint=f"train again with: pgvae train {row['name']}",
        )
    # Imported here: a session's first call pays for every import.
    import json

    types = json.loads(row["config"])["event_types"]
    features = json.loads(row["features"])
    user_pipeline = FeaturePipeline.from_json(features["users"]) if features else NO_FEATURES
    if views == "scoring":
        item_keys, weights = ItemKeys.parted(_load_arrays(plpy, version_id))
    else:
        item_keys, weights = ItemKeys.none(), _read_weights(plpy, version_id, views)
    check_shapes(weights, types=len(types), features=user_pipeline.size)
    if views == "scoring" and len(item_keys) != len(weights["item_embedding"]):
        raise corrupt_weights(f"{len(item_keys)} items have a key, {len(weights['item_embedding'])} have weights")
    return Version(
        version_id=version_id,
        version=row["version"],
        model_id=row["model_id"],
        model=row["name"],
        user_id_type=row["user_id_type"],
        weights=weights,
        event_types={entry["event_type"]: index for index, entry in enumerate(types)},
        targets=tuple(index for index, entry in enumerate(types) if entry["is_target"]),
        max_history=row["max_history"],
        user_count=row["user_count"],
        user_pipeline=user_pipeline,
        item_keys=item_keys,
        created_at=row["created_at"],
        window_end=row["window_end"],
    )


def _load_arrays(plpy: Any, version_id: int) -> dict[str, Any]:
    """Gives the tensors of a version and its items' keys, from the map that sessions share where it can be had."""
    # PL/Python's own module says nothing of it: sessions of a server share them.
    if not getattr(plpy, "shares_weights", True):
        return _read_weights(plpy, version_id) | ItemKeys.arrays_of(_read_keys(plpy, version_id))
    row = execute(plpy, _DIGEST, ["bigint"], [version_id])[0]
    path = mapping.file_of(row["database"], version_id, row["digest"])
    if (shared := mapping.read_map(path, row["digest"])) is not None:
        return shared
    arrays = _read_weights(plpy, version_id) | ItemKeys.arrays_of(_read_keys(plpy, version_id))
    try:
        mapping.write_map(path, row["digest"], arrays)
        mapping.remove_maps(row["database"], keep=_active_version_ids(plpy))
    except OSError as error:
        plpy.notice(f"the weights cannot be shared between sessions, this one holds a copy of its own: {error}")
    return mapping.read_map(path, row["digest"]) or arrays


def _read_keys(plpy: Any, version_id: int) -> list[str]:
    keys: list[str] = execute(plpy, _ITEM_KEYS, ["bigint"], [version_id])[0]["keys"]
    return keys


def _active_version_ids(plpy: Any) -> list[int]:
    rows = execute(plpy, "select v.version_id from vae.versions v where v.state = 'active'", [], [])
    return [row["version_id"] for row in rows]


def _read_weights(plpy: Any, version_id: int, views: str = "scoring") -> dict[str, Any]:
    plan = plpy.prepare(_TENSORS.format(views=views), ["bigint"])
    assemblers: dict[str, Assembler] = {}
    cursor = plpy.cursor(plan, [version_id])
    while rows := cursor.fetch(1):
        row = rows[0]
        if row["name"] not in assemblers:
            assemblers[row["name"]] = Assembler(row["name"], row["dtype"], row["shape"])
        assemblers[row["name"]].add(row["chunk"], row["sha256"], row["data"])
    cursor.close()
    return {name: assembler.finish() for name, assembler in assemblers.items()}


def check_shapes(weights: dict[str, Any], *, types: int, features: int = 0) -> None:
    """Refuses weights whose tensors are missing or do not fit together."""
    sizes = {"T": types, "A": AGE_BUCKETS, "O": ORDER_BUCKETS, "F": features, "1": 1, "3": 3, "4": 4}
    sizes["B"] = behaviour.count(types)
    expected = {**SHAPES, **(outcomes.SHAPES if outcomes.has_heads(weights) else {})}
    expected |= uplift.SHAPES if uplift.has_uplift(weights) else {}
    for name, letters in expected.items():
        shape = weights[name].shape if name in weights else None
        fits = (
            shape is not None
            and len(shape) == len(letters)
            and weights[name].dtype == ("<i4" if name in INTEGERS else "<f4")
            and all(sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True))
        )
        if not fits:
            raise corrupt_weights(f"tensor {name!r} is missing or has the wrong shape: {shape}")
    centroids = weights.get("segment_centroids")
    if centroids is not None and (centroids.dtype != "<f4" or centroids.shape != (len(centroids), sizes["Z"])):
        raise corrupt_weights(f"tensor 'segment_centroids' has the wrong shape: {centroids.shape}")
    start, linked = weights["shortcut_start"], weights["shortcut_item"]
    items = len(weights["item_popularity"])
    in_order = len(start) == items + 1 and start[0] == 0 and start[-1] == len(linked) and (np.diff(start) >= 0).all()
    if not in_order or (linked.size and not 0 <= linked.min() <= linked.max() < items):
        raise corrupt_weights(f"the shortcut's links do not fit {items} items")
