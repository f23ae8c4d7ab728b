"""Carries a version from one database to another as one file: safetensors, with all the rest as JSON in its header.

The header holds a document (lineage, metrics, golden users, the sha256 of each tensor) and the sha256 of the document,
so every byte that means something is checked. The catalogue of items is a tensor of bytes, a JSON array of keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pgvae import __version__
from pgvae.errors import PgvaeError
from pgvae.files import write_file
from pgvae.publish import write_catalogue, write_tensors
from pgvae.versions import read_version, read_weights, readable
from pgvae_runtime import forward
from pgvae_runtime.errors import ScoringError
from pgvae_runtime.features import NO_FEATURES, FeaturePipeline
from pgvae_runtime.store import check_shapes

_FORMAT = "pgvae version 1"
_CATALOGUE = "catalogue"
# What a database gives a version itself.
_OWN_COLUMNS = ("version_id", "model_id", "version", "state", "created_at", "created_by", "activated_at", "retired_at")
_CHILDREN = ("vae.metrics", "vae.curves", "vae.segments", "vae.epochs", "vae_private.golden_users")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    version: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was read, and the number that it has in this database."""

    model: str
    version: int
    origin: dict[str, Any]


def export_version(
    connection: psycopg.Connection, model: str, path: Path, *, version: int | None = None, overwrite: bool = False
) -> Exported:
    """Writes a version, the active one by default, to a file that appears whole or not at all.

    PgvaeError where the file exists and `overwrite` is not given, or where the role may not read the weights.
    """
    if path.exists() and not overwrite:
        raise PgvaeError(f"{path} exists already", hint="choose another name, or give --overwrite")
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    found = read_version(connection, model, version)
    tensors: dict[str, NDArray[Any]] = dict(read_weights(connection, found.version_id))
    if not tensors:
        raise PgvaeError(
            f"the weights of version {found.version} of model {model} may not be read by this role",
            hint="export as a member of vae_operator with usage on the model's schema",
        )
    keys = _rows(connection, "vae_private.items", found.version_id, "item_key", "item_index")
    tensors[_CATALOGUE] = np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8)
    document = _describe(connection, found.version_id)
    document["sha256"] = {name: _digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps(document, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    content = save(tensors, metadata={"format": _FORMAT, "document": text, "sha256": digest})
    write_file(path, content, hint="choose another folder")
    return Exported(version=found.version, bytes=len(content), sha256=digest)


def import_version(connection: psycopg.Connection, path: Path, *, model: str | None = None) -> Imported:
    """Writes the version of a file into a model, by default that of the same name, in the state ready.

    All of it is in the connection's transaction, which the caller commits. PgvaeError where the file is not whole, was
    altered, or does not fit the model: other types of keys, another tensor format, another length of history.
    """
    document, tensors = read_file(path)
    name = model or document["model"]["name"]
    target = _target(connection, name)
    for what in ("user_id_type", "item_id_type"):
        theirs, ours = document["model"][what], target[what]
        if theirs != ours:
            raise PgvaeError(
                f"keys of {what.partition('_')[0]}s differ: {theirs} in {path}, {ours} in model {name}",
                hint="a version fits a shop with the same keys: import it into another model with --model",
            )
    if document["model"]["max_history"] != target["max_history"]:
        raise PgvaeError(
            f"the version reads {document['model']['max_history']} events of a user, model {name}"
            f" {target['max_history']}",
            hint="its scores would differ: create the model with the same option max_history",
        )
    origin = document["origin"] | {
        "imported_from": str(path.name),
        "sha256": hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest(),
    }
    values = document["version"] | {"origin": origin}
    row = connection.execute("select vae_private.next_version(%s)", [target["model_id"]]).fetchone()
    assert row is not None
    values |= {"model_id": target["model_id"], "version": row[0]}
    inserted = _insert(connection, "vae.versions", [values], path, returning="version_id")
    assert inserted is not None
    with connection.cursor() as cursor:
        write_tensors(cursor, inserted, {name: tensor for name, tensor in tensors.items() if name != _CATALOGUE})
        write_catalogue(cursor, inserted, _keys(tensors))
    for table, rows in document["rows"].items():
        _insert(connection, table, [row | {"version_id": inserted} for row in rows], path)
    connection.execute("select vae_private.finish_version(%s)", [inserted])
    return Imported(model=name, version=values["version"], origin=origin)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Gives the document and the tensors of an exported file; PgvaeError where anything is not as it was written."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    except FileNotFoundError:
        raise PgvaeError(f"{path} does not exist", hint="name a file that pgvae export wrote") from None
    # The library's own error, one of the system's, and a dtype that numpy does not have.
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        raise PgvaeError(f"{path} is no whole safetensors file: {error}", hint=_EXPORT_AGAIN) from error
    form = metadata.get("format", "")
    if form != _FORMAT and form.startswith("pgvae version "):
        raise PgvaeError(
            f"{path} is of the format {form!r}, this pgvae reads {_FORMAT!r}", hint="install the release that wrote it"
        )
    if form != _FORMAT or set(metadata) != {"format", "document", "sha256"}:
        raise PgvaeError(f"{path} was not written by pgvae export, or was altered", hint=_EXPORT_AGAIN)
    if hashlib.sha256(metadata["document"].encode()).hexdigest() != metadata["sha256"]:
        raise PgvaeError(f"{path} was altered: the checksum of its description does not match", hint=_EXPORT_AGAIN)
    document: dict[str, Any] = json.loads(metadata["document"])
    if set(tensors) != set(document["sha256"]):
        raise PgvaeError(f"{path} was altered: it holds other tensors than it says", hint=_EXPORT_AGAIN)
    for name, digest in document["sha256"].items():
        if _digest(tensors[name]) != digest:
            raise PgvaeError(f"{path} was altered: the checksum of tensor {name!r} does not match", hint=_EXPORT_AGAIN)
    if unknown := sorted(set(document["rows"]) - set(_CHILDREN)):
        raise PgvaeError(f"{path} holds rows of {unknown[0]}, which is no part of a version", hint=_EXPORT_AGAIN)
    version = document["version"]
    if forged := sorted(set(version) & {*_OWN_COLUMNS, "origin"}):
        raise PgvaeError(
            f"{path} gives the version a {forged[0]}, which only the database gives it", hint=_EXPORT_AGAIN
        )
    if version["format"] != forward.FORMAT:
        raise PgvaeError(
            f"the version of {path} has tensor format {version['format']}, this pgvae scores format {forward.FORMAT}",
            hint=f"train again; or use the pgvae release that made it, {version['trainer_version']}",
        )
    features = (version.get("features") or {}).get("users")
    pipeline = FeaturePipeline.from_json(features) if features else NO_FEATURES
    try:
        check_shapes(tensors, types=len(version["config"]["event_types"]), features=pipeline.size)
    except ScoringError as error:
        raise PgvaeError(f"the weights of {path} do not fit together: {error.message}", hint=_EXPORT_AGAIN) from error
    keys, items = _keys(tensors), len(tensors["item_embedding"])
    if len(keys) != items:
        raise PgvaeError(f"{path} names {len(keys)} items, its weights are of {items}", hint=_EXPORT_AGAIN)
    return document, tensors


def _keys(tensors: Mapping[str, NDArray[Any]]) -> list[str]:
    """Gives the keys of the items in the order of the tensors' rows; none without a catalogue."""
    keys: list[str] = json.loads(tensors[_CATALOGUE].tobytes()) if _CATALOGUE in tensors else []
    return keys


_EXPORT_AGAIN = "copy it again from where it was exported, or export again; nothing was imported"


def _describe(connection: psycopg.Connection, version_id: int) -> dict[str, Any]:
    """Gives the document of a version, without the digests of its tensors."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            "select to_jsonb(v) as version, m.name, m.user_id_type, m.item_id_type,"
            " (m.options ->> 'max_history')::integer as max_history, pg_catalog.current_database() as database,"
            " current_user as role from vae.versions v join vae.models m using (model_id) where v.version_id = %s",
            [version_id],
        ).fetchone()
    assert row is not None
    version = row["version"]
    before = version.get("origin") or {}
    origin = {
        "database": row["database"],
        "model": row["name"],
        "version": version["version"],
        "created_at": version["created_at"],
        "trained_at": before.get("trained_at", version["created_at"]),
        "created_by": version["created_by"],
        "exported_at": datetime.now(UTC).isoformat(),
        "exported_by": row["role"],
        "exported_with": __version__,
    }
    if before:
        origin["origin"] = before
    return {
        "model": {name: row[name] for name in ("name", "user_id_type", "item_id_type", "max_history")},
        "version": {name: value for name, value in version.items() if name not in (*_OWN_COLUMNS, "origin")},
        "origin": origin,
        "rows": {table: _children(connection, table, version_id) for table in _CHILDREN},
    }


def _children(connection: psycopg.Connection, table: str, version_id: int) -> list[dict[str, Any]]:
    rows = _rows(connection, table, version_id, "to_jsonb(t)")
    return [{name: value for name, value in row.items() if name != "version_id"} for row in rows]


def _rows(connection: psycopg.Connection, table: str, version_id: int, expression: str, order: str = "1") -> list[Any]:
    schema, name = table.split(".")
    relation = readable(connection, name) if schema == "vae_private" else sql.Identifier(schema, name)
    query = sql.SQL("select {} from {} t where t.version_id = %s order by {}").format(
        sql.SQL(expression), relation, sql.SQL(order)
    )
    return [row[0] for row in connection.execute(query, [version_id]).fetchall()]


def _target(connection: psycopg.Connection, model: str) -> dict[str, Any]:
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            "select model_id, user_id_type, item_id_type, (options ->> 'max_history')::integer as max_history"
            " from vae.models where model_id = vae_private.model_id(%s)",
            [model],
        ).fetchone()
    assert row is not None  # vae_private.model_id raises for an unknown model.
    return row


def _insert(
    connection: psycopg.Connection,
    table: str,
    rows: list[dict[str, Any]],
    path: Path,
    *,
    returning: str | None = None,
) -> int | None:
    """Writes rows given as JSON; gives a column of the last one. PgvaeError where this release has no such column."""
    relation = sql.Identifier(*table.split("."))
    known = {
        row[0]
        for row in connection.execute(
            "select attname from pg_catalog.pg_attribute where attrelid = pg_catalog.to_regclass(%s) and attnum > 0"
            " and not attisdropped",
            [table],
        ).fetchall()
    }
    columns = sorted({name for row in rows for name in row})
    if unknown := [name for name in columns if name not in known]:
        raise PgvaeError(
            f"{path} holds {table}.{unknown[0]}, which this release does not know",
            hint="upgrade this database: pip install --upgrade pgvae, then pgvae install",
        )
    if not rows:
        return None
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    query = sql.SQL(
        "insert into {table} ({names}) select {names} from jsonb_populate_recordset(null::{table}, %s)"
    ).format(table=relation, names=names)
    if returning is None:
        connection.execute(query, [Jsonb(rows)])
        return None
    row = connection.execute(
        query + sql.SQL(" returning {}").format(sql.Identifier(returning)), [Jsonb(rows)]
    ).fetchone()
    assert row is not None
    return int(row[0])


def _digest(tensor: NDArray[Any]) -> str:
    """Gives the sha256 of a tensor's type, shape and bytes."""
    head = f"{tensor.dtype.str} {list(tensor.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(tensor).tobytes()).hexdigest()
