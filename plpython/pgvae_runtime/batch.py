"""Scores all users of a model in bounded batches, for a materialized view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import forward, runs
from .device import Gpu
from .history import item_keys, read_histories
from .scoring import mask_seen, score_users
from .store import Version
from .tokens import History

# The scores of a batch take at most the first (batch size × items × 4 bytes), the embeddings of its tokens a few times
# the second (batch size × history × width × 4 bytes).
_SCORES_BYTES = 64 * 1024 * 1024
_TOKENS_BYTES = 256 * 1024 * 1024
_MAX_BATCH = 4096

# Best items [U, k], their scores [U, k], and which users are cold starts [U].
Scored = tuple[Any, Any, Any]


def recommend_all(
    plpy: Any, gpu: Gpu | None, version: Version, k: int, chosen: Sequence[str] | None = None
) -> Iterator[tuple[str, str, str, bool, int]]:
    """Gives (user_key, item_keys, scores, is_cold_start, model_version) of each user, the lists as array literals.

    `chosen` are the keys of the users to score; None scores all.

    One row per user with two array literals is the fastest way into a table that SQL can unpack. Without a GPU, and
    from where one fails on the way, the CPU scores.
    """
    keys = item_keys(plpy, version)
    ranked = range(len(keys)) if version.ranked is None else version.ranked.tolist()
    literals = [array_element(keys[item]) for item in ranked]
    done = 0
    for users, (items, values, flags) in _scored(plpy, gpu, version, k, chosen):
        for user, row_items, row_values, is_cold in zip(
            users, items.tolist(), values.tolist(), flags.tolist(), strict=True
        ):
            # Seen items have the score -1 and stand at the end of the row.
            kept = len(row_values) - sum(1 for value in reversed(row_values) if value < 0)
            yield (
                user,
                "{" + ",".join([literals[item] for item in row_items[:kept]]) + "}",
                "{" + ",".join([f"{value:.9g}" for value in row_values[:kept]]) + "}",
                is_cold,
                version.version,
            )
        done += len(users)
        report_progress(plpy, f"pgvae {version.model}: {done} users scored")
    runs.record(version, "recommendations", done)


def _scored(
    plpy: Any, gpu: Gpu | None, version: Version, k: int, chosen: Sequence[str] | None
) -> Iterator[tuple[list[str], Scored]]:
    """Gives the keys of some users and their best items, until all users are through."""
    size = batch_size(version)
    if gpu is None:
        score = _scorer(version, size, k)
        for users, history in read_histories(plpy, version, size, chosen):
            yield users, score(history)
        return
    # Imported here: a session that uses no GPU does not pay for it.
    from .gpu import MAX_USERS, GpuScorer, score_ahead

    used = gpu

    def on_gpu() -> GpuScorer:
        return GpuScorer(used.cupy, version, k, memory=used.memory, precision=used.precision)

    histories = read_histories(plpy, version, MAX_USERS, chosen)
    yield from score_ahead(plpy, histories, on_gpu, lambda: _scorer(version, size, k), size)


def _scorer(version: Version, size: int, k: int) -> Callable[[History], Scored]:
    """Gives a function from the events of up to `size` users to their best items, these items' scores, and which users
    are cold starts.
    """
    buffer = np.empty((size, version.item_count), dtype=np.float32)

    def score(history: History) -> Scored:
        out = buffer[: len(history.counts)]
        scores, cold = score_users(np, version.weights, history, max_history=version.max_history, out=out)
        mask_seen(np, scores, history, version.targets, version.columns)
        items, values = forward.top_k(np, scores, k)
        return items, values, cold

    return score


def batch_size(version: Version) -> int:
    """Gives how many users are scored at once, so that a batch stays within its memory."""
    width: int = version.weights["item_embedding"].shape[1]
    return max(
        1,
        min(
            _MAX_BATCH,
            _SCORES_BYTES // (4 * version.item_count),
            _TOKENS_BYTES // (4 * width * version.max_history),
        ),
    )


def array_element(text: str) -> str:
    """Gives a text as an element of a PostgreSQL array literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def report_progress(plpy: Any, message: str) -> None:
    """Shows a message as the session's application name in pg_stat_activity.

    The query is also where a cancel or a statement timeout takes effect: they do not interrupt Python.
    """
    plpy.execute("select pg_catalog.set_config('application_name', " + plpy.quote_literal(message[:63]) + ", true)")
