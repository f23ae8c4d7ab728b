"""Scores all users of a model in bounded batches, for a materialized view."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import device, forward
from .history import item_keys, read_histories
from .scoring import mask_seen, score_users
from .store import Version

# The scores of a batch take at most this much memory: batch size × items × 4 bytes.
_SCORES_BYTES = 64 * 1024 * 1024
_MAX_BATCH = 4096


def recommend_all(plpy: Any, xp: Any, version: Version, k: int) -> Iterator[tuple[str, str, str, bool, int]]:
    """Gives (user_key, item_keys, scores, is_cold_start, model_version) of each user, the lists as array literals.

    One row per user with two array literals is the fastest way into a table that SQL can unpack.
    """
    size = max(1, min(_MAX_BATCH, _SCORES_BYTES // (4 * version.item_count)))
    weights = device.to_device(xp, version.weights)
    scores = xp.empty((size, version.item_count), dtype=xp.float32)
    literals = [array_element(key) for key in item_keys(plpy, version)]
    done = 0
    for users, history in read_histories(plpy, version, size):
        batch, cold = score_users(xp, weights, history, max_history=version.max_history, out=scores[: len(users)])
        mask_seen(xp, batch, history, version.targets)
        items, values = (device.to_host(xp, array) for array in forward.top_k(xp, batch, k))
        flags = device.to_host(xp, cold).tolist()
        for user, row_items, row_values, is_cold in zip(users, items.tolist(), values.tolist(), flags, strict=True):
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


def estimated_flops(user_count: float, version: Version) -> float:
    """Gives the floating-point operations of the product with the catalogue for that many users."""
    hidden: int = version.weights["output_weight"].shape[1]
    return 2.0 * user_count * version.item_count * hidden


def array_element(text: str) -> str:
    """Gives a text as an element of a PostgreSQL array literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def report_progress(plpy: Any, message: str) -> None:
    """Shows a message as the session's application name in pg_stat_activity.

    The query is also where a cancel or a statement timeout takes effect: they do not interrupt Python.
    """
    plpy.execute("select pg_catalog.set_config('application_name', " + plpy.quote_literal(message[:63]) + ", true)")
