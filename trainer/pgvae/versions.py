"""Reads a published version back: its lineage, what was measured of it, and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.rows import class_row, dict_row

from pgvae.errors import PgvaeError
from pgvae.rows import CurvePoint, Epoch, Metric
from pgvae_runtime.features import NO_FEATURES, FeaturePipeline
from pgvae_runtime.tensors import Assembler


@dataclass(frozen=True, kw_only=True)
class PublishedVersion:
    """A row of vae.versions, with those of vae.metrics, vae.epochs and vae.curves that belong to it."""

    model: str
    max_history: int
    horizon_days: int
    version_id: int
    version: int
    state: str
    created_at: datetime
    created_by: str
    activated_at: datetime | None
    window_start: datetime | None
    window_end: datetime | None
    event_count: int
    user_count: int
    item_count: int
    seed: int
    format: int
    code_digest: str
    trainer_version: str
    config: dict[str, Any]
    durations: dict[str, float]
    quality: list[dict[str, Any]]
    features: dict[str, Any] | None
    metrics: list[Metric]
    passes: list[Epoch]
    points: Sequence[CurvePoint] = ()
    has_uplift: bool = False
    no_uplift: str | None = None

    @property
    def event_types(self) -> list[str]:
        """The standard names of the event types, in the order of their embedding."""
        return [str(entry["event_type"]) for entry in self.config.get("event_types", [])]

    @property
    def targets(self) -> list[str]:
        """The event types that the version predicts."""
        return [str(entry["event_type"]) for entry in self.config.get("event_types", []) if entry["is_target"]]

    def pipeline(self, source: str) -> FeaturePipeline:
        """Gives the feature pipeline of `users` or `items`."""
        given = (self.features or {}).get(source)
        return FeaturePipeline.from_json(given) if given else NO_FEATURES


def read_version(connection: psycopg.Connection, model: str, version: int | None = None) -> PublishedVersion:
    """Gives a version of a model: the active one, else the newest, where no number is given."""
    return _read(connection, find_version(connection, model, version))


def find_version(
    connection: psycopg.Connection, model: str, version: int | None = None, *, prefers_active: bool = True
) -> int:
    """Gives the version_id of a version: where no number is given that of the active one, or else of the newest."""
    # Not by vae_private.model_id, which readers may not call.
    known = connection.execute("select model_id from vae.models where name = %s", [model]).fetchone()
    if known is None:
        names = [row[0] for row in connection.execute("select name from vae.models order by name").fetchall()]
        raise PgvaeError(f'model "{model}" does not exist', hint=f"there are: {', '.join(names) or 'none'}")
    model_id = known[0]
    row = connection.execute(
        "select version_id from vae.versions"
        " where model_id = %(model_id)s and state <> 'loading'"
        " and (%(version)s::integer is null or version = %(version)s)"
        " order by state = 'active' and %(prefers_active)s desc, version desc limit 1",
        {"model_id": model_id, "version": version, "prefers_active": prefers_active},
    ).fetchone()
    if row is None:
        numbers = connection.execute(
            "select version from vae.versions where model_id = %s and state <> 'loading' order by version", [model_id]
        ).fetchall()
        which = "no version yet" if version is None else f"no version {version}"
        there = ", ".join(str(number) for (number,) in numbers)
        hint = f"there are: {there}" if there else f"train one with: pgvae train {model}"
        raise PgvaeError(f"model {model} has {which}", hint=hint)
    found: int = row[0]
    return found


def _read(connection: psycopg.Connection, version_id: int) -> PublishedVersion:
    with connection.cursor(row_factory=class_row(Metric)) as cursor:
        metrics = cursor.execute(
            "select method, split, slice, metric, k, value, lower, upper, user_count from vae.metrics"
            " where version_id = %s order by split, slice, metric, k, method",
            [version_id],
        ).fetchall()
    with connection.cursor(row_factory=class_row(Epoch)) as cursor:
        passes = cursor.execute(
            "select phase, epoch, loss, reconstruction, kl, validation_ndcg, seconds from vae.epochs"
            " where version_id = %s order by phase, epoch",
            [version_id],
        ).fetchall()
    with connection.cursor(row_factory=class_row(CurvePoint)) as cursor:
        points = cursor.execute(
            "select curve, method, position, label, x, y, lower, upper, weight from vae.curves"
            " where version_id = %s order by curve, method, position",
            [version_id],
        ).fetchall()
    columns = (
        "version_id, version, state, created_at, created_by, activated_at, window_start, window_end, event_count,"
        " user_count, item_count, seed, format, code_digest, trainer_version, config, durations, quality, features,"
        " has_uplift, no_uplift"
    )
    query = sql.SQL(
        "select m.name as model, (m.options ->> 'max_history')::integer as max_history,"
        # The option may have changed since the training.
        " coalesce(v.demand ->> 'horizon', m.options ->> 'horizon_days')::integer as horizon_days, {columns}"
        " from vae.versions v join vae.models m using (model_id) where v.version_id = %s"
    ).format(columns=sql.SQL(", ").join(sql.Identifier("v", name) for name in columns.split(", ")))
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(query, [version_id]).fetchone()
    assert found is not None  # The version was found a moment ago, in the same transaction.
    return PublishedVersion(**found, metrics=metrics, passes=passes, points=points)


def readable(connection: psycopg.Connection, relation: str) -> sql.Identifier:
    """Gives the view of vae_private on the tensors, items or golden_users of all versions, where the role may read it,
    else that on those of active versions.
    """
    row = connection.execute(
        "select pg_catalog.has_table_privilege(pg_catalog.format('vae_private.published_%%s', %s::text), 'select')",
        [relation],
    ).fetchone()
    return sql.Identifier("vae_private", f"{'published' if row and row[0] else 'scoring'}_{relation}")


def read_weights(connection: psycopg.Connection, version_id: int) -> dict[str, NDArray[Any]]:
    """Gives the tensors of a version by name, their digests checked; none where the role may not read them."""
    assemblers: dict[str, Assembler] = {}
    query = sql.SQL(
        "select name, chunk, dtype, shape, sha256, data from {} where version_id = %s order by name, chunk"
    ).format(readable(connection, "tensors"))
    with connection.cursor(binary=True) as cursor:
        for name, chunk, dtype, shape, sha256, data in cursor.stream(query, [version_id]):
            if name not in assemblers:
                assemblers[name] = Assembler(name, dtype, shape)
            assemblers[name].add(chunk, sha256, data)
    return {name: np.asarray(assembler.finish()) for name, assembler in assemblers.items()}
