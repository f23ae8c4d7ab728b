"""`pgvae evaluate`: from a published version's configuration to figures beside baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import psycopg

from pgvae.comparison import Comparison, K, Listener, compare
from pgvae.config import TrainingConfig
from pgvae.connection import connect
from pgvae.errors import PgvaeError
from pgvae.publish import replace_metrics
from pgvae.train import Listener as TrainListener
from pgvae.train import read_checked
from pgvae.versions import find_version


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What was measured of a version, and written to vae.metrics."""

    version: int
    comparison: Comparison


def evaluate_version(
    dsn: str | None,
    model: str,
    *,
    version: int | None = None,
    split: str = "temporal",
    folds: int = 1,
    ks: Sequence[int] = (K,),
    listener: Listener | None = None,
) -> Evaluated:
    """Trains with the configuration of a version, the newest by default, on a split of today's events, and measures.

    The version's weights stay as they are; its metrics of the same split are replaced, all of them, since those of
    other events would say something else. So lists of K are measured whatever else is asked for: by these
    vae.activate compares versions. No connection is open while it trains. PgvaeError where there is no such version,
    or too few users for the split.
    """
    with connect(dsn) as connection:
        version_id = find_version(connection, model, version, prefers_active=False)
        row = connection.execute(
            "select version, config from vae.versions where version_id = %s", [version_id]
        ).fetchone()
        assert row
        number, config = row[0], config_of(row[1])
    listener = listener or Listener()
    listener.on_read()
    with connect(dsn) as connection:
        # Whether the gate lets the events pass was asked before the version was published.
        definition, dataset = read_checked(connection, model, True, TrainListener())
    comparison = compare(
        dataset,
        config,
        max_history=definition.max_history,
        split=split,
        folds=folds,
        ks=sorted({K, *ks}),
        listener=listener,
    )
    try:
        with connect(dsn) as connection:
            replace_metrics(connection, version_id, comparison.metrics)
    except psycopg.errors.ForeignKeyViolation as error:
        raise PgvaeError(
            f"version {number} of model {model} was dropped while it was evaluated",
            hint=f"train it again: pgvae train {model}",
        ) from error
    return Evaluated(version=number, comparison=comparison)


def config_of(stored: dict[str, Any]) -> TrainingConfig:
    """Gives the configuration that a version was trained with, from vae.versions.config, which holds more than it."""
    names = {field.name for field in fields(TrainingConfig)}
    # JSON has lists where the configuration has tuples.
    own: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if name in names
    }
    # Versions that were trained before had 0 where now there is none.
    return TrainingConfig(**own | {"temperature": own.get("temperature") or None})
