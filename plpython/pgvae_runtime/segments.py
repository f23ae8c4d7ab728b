"""Segments: which centroid of a version a user is nearest to, by the direction of the mean of q(z | x)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import blas, forward, limits, runs
from .errors import NO_SEGMENTS, ScoringError, corrupt_weights
from .forward import Array, Weights
from .history import MAX_EVENTS, read_histories, read_history
from .store import Version, execute
from .tokens import History

# A tensor [S, Z] of a version that has segments, its rows of length 1.
CENTROIDS = "segment_centroids"
# Users of a batch.
_USERS = 512
# What an event takes beside its embedding, which is there three times.
_BYTES_OF_AN_EVENT = 200

# (user_key, segment, segment_name, similarity, is_cold_start, model_version)
Row = tuple[str, int | None, str | None, float | None, bool, int]


def directions(weights: Weights, history: History, *, max_history: int) -> tuple[Array, Array]:
    """Gives the direction of the mean of q(z | x) of each user, [U, Z], of length 1, and who is known at all, [U].

    A user without known events and features has the direction of an empty history, which says nothing.
    """
    z = forward.encode(weights, history.tokens(max_history))
    known = history.counts > 0
    if history.features is not None:
        known = known | (history.features.counts() > 0)
    return z / np.maximum(np.sqrt((z * z).sum(axis=1, keepdims=True)), np.float32(1e-12)), known


def segment_one(plpy: Any, version: Version, user_key: str) -> Row:
    """Gives the segment of one user, with the rights of the caller; ScoringError for a version without segments."""
    if CENTROIDS not in version.weights:
        raise ScoringError(
            f"version {version.version} of model {version.model} has no segments",
            sqlstate=NO_SEGMENTS,
            hint=f"train one that has: pgvae train {version.model}, without --segments 0",
        )
    return _rows(version, _names(plpy, version), [user_key], read_history(plpy, version, user_key))[0]


def segment_all(plpy: Any, version: Version) -> Iterator[Row]:
    """Gives the segment of each user, for a materialized view; no row, and a notice, for a version without segments."""
    if CENTROIDS not in version.weights:
        plpy.notice(f"version {version.version} of model {version.model} has no segments: user_segments is empty")
        runs.record(version, "user_segments", 0)
        return
    names = _names(plpy, version)
    done = 0
    needed = _BYTES_OF_AN_EVENT + 3 * 4 * version.weights["item_embedding"].shape[1]
    sizes = ((2 * events * needed, events) for events in (MAX_EVENTS // part for part in (1, 4, 16)))
    events = limits.first_that_fits(limits.max_memory(plpy), sizes)
    with blas.threads(limits.max_threads(plpy)):
        for users, history in read_histories(plpy, version, _USERS, max_events=events):
            yield from _rows(version, names, users, history.distinct())
            done += len(users)
            runs.report_progress(plpy, f"pgvae {version.model}: {done} users in segments")
    runs.record(version, "user_segments", done)


def _rows(version: Version, names: list[tuple[int, str]], users: list[str], history: History) -> list[Row]:
    own, known = directions(version.weights, history, max_history=version.max_history)
    cosines = own @ version.weights[CENTROIDS].T
    places = cosines.argmax(axis=1)
    return [
        (
            user,
            *((*names[place], similarity) if is_known else (None, None, None)),
            count == 0,
            version.version,
        )
        for user, place, similarity, is_known, count in zip(
            users,
            places.tolist(),
            cosines[np.arange(len(places)), places].tolist(),
            known.tolist(),
            history.counts.tolist(),
            strict=True,
        )
    ]


def _names(plpy: Any, version: Version) -> list[tuple[int, str]]:
    """Gives number and name of each segment, in the order of the centroids."""
    rows = execute(
        plpy,
        "select s.segment, s.name from vae.segments s where s.version_id = $1 order by s.place",
        ["bigint"],
        [version.version_id],
    )
    if len(rows) != len(version.weights[CENTROIDS]):
        raise corrupt_weights(
            f"version {version.version} of model {version.model} has {len(version.weights[CENTROIDS])} segments and"
            f" {len(rows)} names"
        )
    return [(row["segment"], row["name"]) for row in rows]
