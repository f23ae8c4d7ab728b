"""Writes a trained network into PostgreSQL as an immutable version, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psycopg
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from pgvae import __version__, resources
from pgvae.config import TrainingConfig
from pgvae.connection import keep_open
from pgvae.dataset import Dataset, ModelDefinition
from pgvae.errors import PgvaeError
from pgvae.golden import GoldenUser, golden_users
from pgvae.loop import Fit
from pgvae.rows import CurvePoint, Epoch, Metric
from pgvae.segments import NO_SEGMENTS, Segments
from pgvae.uplift import NO_COLUMN
from pgvae_runtime import forward
from pgvae_runtime.demand import Head
from pgvae_runtime.tensors import to_chunks


def check_publishable(connection: psycopg.Connection, model: str) -> None:
    """Refuses, before anything is read, a role that could not publish the result, and a model that does not exist."""
    with connection.transaction():
        found = connection.execute(
            "select quote_ident(current_user), has_any_column_privilege('vae.versions', 'insert')"
        ).fetchone()
        assert found
        role, may_publish = found
        if not may_publish:
            raise PgvaeError(
                f"role {role} may not publish versions", hint=f"a superuser can allow it: grant vae_trainer to {role}"
            )
        connection.execute("select vae_private.model_id(%s)", [model])


def publish(
    connection: psycopg.Connection,
    *,
    definition: ModelDefinition,
    dataset: Dataset,
    config: TrainingConfig,
    fit: Fit,
    curve: list[Epoch],
    metrics: list[Metric],
    durations: dict[str, float],
    curves: Sequence[CurvePoint] = (),
    demand: Head | None = None,
    segments: Segments = NO_SEGMENTS,
    outcomes: Mapping[str, NDArray[Any]] | None = None,
    no_uplift: str = NO_COLUMN,
) -> int:
    """Gives the number of the new version, in the state ready; `no_uplift` says why it claims none, "" where it does.

    All rows are written in the connection's transaction, which the caller commits: until then nobody sees any of
    them, and a lost connection or a full disk leaves none.
    """
    keep_open(connection)
    try:
        version_id, version = _insert_version(
            connection, definition, dataset, config, fit, durations, demand, no_uplift
        )
    except psycopg.errors.ForeignKeyViolation as error:
        raise PgvaeError(
            f"model {definition.name} was dropped while it was trained", hint="create it again with vae.create_model"
        ) from error
    with connection.cursor() as cursor:
        tensors = {name: fit.weights[name] for name in forward.SHAPES} | segments.tensors() | dict(outcomes or {})
        write_tensors(cursor, version_id, tensors)
        write_catalogue(cursor, version_id, dataset.item_keys)
        golden = golden_users(dataset, config, fit.weights, max_history=definition.max_history)
        insert_golden_users(cursor, version_id, golden)
        _insert_segments(cursor, version_id, segments)
        _insert_metrics(cursor, version_id, metrics)
        _insert_curves(cursor, version_id, curves)
        cursor.executemany(
            "insert into vae.epochs"
            " (version_id, phase, epoch, loss, reconstruction, kl, validation_ndcg, seconds)"
            " values (%(version_id)s, %(phase)s, %(epoch)s, %(loss)s, %(reconstruction)s, %(kl)s,"
            " %(validation_ndcg)s, %(seconds)s)",
            [{"version_id": version_id, **asdict(epoch)} for epoch in curve],
        )
    connection.execute("select vae_private.finish_version(%s)", [version_id])
    return version


def write_tensors(cursor: psycopg.Cursor, version_id: int, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes the weights of a version that is loading, by COPY."""
    with cursor.copy(
        "copy vae_private.tensors (version_id, name, chunk, dtype, shape, sha256, data) from stdin (format binary)"
    ) as copy:
        copy.set_types(["int8", "text", "int4", "text", "int4[]", "bytea", "bytea"])
        for name, tensor in tensors.items():
            for chunk, dtype, shape, sha256, data in to_chunks(tensor):
                copy.write_row((version_id, name, chunk, dtype, shape, sha256, data))


def write_catalogue(cursor: psycopg.Cursor, version_id: int, item_keys: Sequence[str]) -> None:
    """Writes the keys of the items of a version that is loading, in the order of the tensors' rows."""
    with cursor.copy("copy vae_private.items (version_id, item_index, item_key) from stdin") as copy:
        for index, key in enumerate(item_keys):
            copy.write_row((version_id, index, key))


def insert_golden_users(cursor: psycopg.Cursor, version_id: int, golden: Sequence[GoldenUser]) -> None:
    """Writes the golden users of a version that is loading."""
    cursor.executemany(
        "insert into vae_private.golden_users"
        " (version_id, number, items, event_types, occurred_at, features, top_items, top_scores)"
        " values (%(version_id)s, %(number)s, %(items)s, %(event_types)s, %(occurred_at)s, %(features)s, %(top_items)s,"
        " %(top_scores)s)",
        [{"version_id": version_id, "number": number, **asdict(user)} for number, user in enumerate(golden)],
    )


def replace_metrics(connection: psycopg.Connection, version_id: int, metrics: list[Metric]) -> None:
    """Writes the metrics of a published version, in place of those it has of the same splits."""
    with connection.cursor() as cursor:
        # Of two evaluations that end at once the later one would not see, and not replace, what the other has written.
        cursor.execute(
            "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('pgvae metrics'), %s::integer)", [version_id]
        )
        cursor.execute(
            "delete from vae.metrics where version_id = %s and split = any (%s)",
            [version_id, list({metric.split for metric in metrics})],
        )
        _insert_metrics(cursor, version_id, metrics)


def _insert_segments(cursor: psycopg.Cursor, version_id: int, segments: Segments) -> None:
    cursor.executemany(
        "insert into vae.segments"
        " (version_id, segment, place, name, share, mean_events, top_categories, similarity, overlap)"
        " values (%(version_id)s, %(segment)s, %(place)s, %(name)s, %(share)s, %(mean_events)s, %(top_categories)s,"
        " %(similarity)s, %(overlap)s)",
        [{"version_id": version_id, "place": place, **asdict(row)} for place, row in enumerate(segments.rows)],
    )


def _insert_metrics(cursor: psycopg.Cursor, version_id: int, metrics: list[Metric]) -> None:
    cursor.executemany(
        "insert into vae.metrics (version_id, method, split, slice, metric, k, value, lower, upper, user_count)"
        " values (%(version_id)s, %(method)s, %(split)s, %(slice)s, %(metric)s, %(k)s, %(value)s, %(lower)s,"
        " %(upper)s, %(user_count)s)",
        [{"version_id": version_id, **asdict(metric)} for metric in metrics],
    )


def _insert_curves(cursor: psycopg.Cursor, version_id: int, curves: Sequence[CurvePoint]) -> None:
    cursor.executemany(
        "insert into vae.curves (version_id, curve, method, position, label, x, y, lower, upper, weight)"
        " values (%(version_id)s, %(curve)s, %(method)s, %(position)s, %(label)s, %(x)s, %(y)s, %(lower)s, %(upper)s,"
        " %(weight)s)",
        [{"version_id": version_id, **asdict(point)} for point in curves],
    )


def _insert_version(
    connection: psycopg.Connection,
    definition: ModelDefinition,
    dataset: Dataset,
    config: TrainingConfig,
    fit: Fit,
    durations: dict[str, float],
    demand: Head | None,
    no_uplift: str,
) -> tuple[int, int]:
    event_types = [
        {"event_type": name, "is_target": index in dataset.targets} for index, name in enumerate(dataset.event_types)
    ]
    chosen = {"recency": fit.recency, "shortcut": asdict(fit.shortcut)}
    window_start, window_end = dataset.window()
    row = connection.execute(
        "insert into vae.versions (model_id, version, window_start, window_end, event_count, user_count, item_count,"
        " seed, format, code_digest, trainer_version, config, durations, quality, features, demand,"
        " has_uplift, no_uplift)"
        " values (%(model_id)s, vae_private.next_version(%(model_id)s), %(window_start)s, %(window_end)s,"
        " %(event_count)s, %(user_count)s, %(item_count)s, %(seed)s, %(format)s, %(code_digest)s,"
        " %(trainer_version)s, %(config)s, %(durations)s, %(quality)s, %(features)s, %(demand)s,"
        " %(has_uplift)s, %(no_uplift)s)"
        " returning version_id, version",
        {
            "model_id": definition.model_id,
            "window_start": window_start,
            "window_end": window_end,
            "event_count": len(dataset.user),
            "user_count": dataset.user_count,
            "item_count": len(dataset.item_keys),
            "seed": config.seed,
            "format": forward.FORMAT,
            "code_digest": resources.runtime_digest(),
            "trainer_version": __version__,
            "config": Jsonb({**asdict(config), "event_types": event_types, **chosen}),
            "durations": Jsonb(durations),
            "quality": Jsonb(definition.quality),
            "features": Jsonb({"users": dataset.user_pipeline.to_json(), "items": dataset.item_pipeline.to_json()}),
            "demand": Jsonb(demand.to_json()) if demand else None,
            "has_uplift": not no_uplift,
            "no_uplift": no_uplift or None,
        },
    ).fetchone()
    assert row is not None  # insert … returning gives a row or raises.
    return row
