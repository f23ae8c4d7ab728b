"""Replays a version's golden users on this machine and compares with what the trainer's network gave them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, device, forward
from .cpu import CpuScorer, Scored
from .device import Gpu
from .errors import ScoringError
from .features import FeatureBag
from .gpu_costs import ENDLESS
from .scoring import mask_seen, score_users
from .store import Version, active_version, execute, load_version
from .tokens import History

# PyTorch, NumPy and CuPy agree to this relative difference of a score.
BOUND = 1e-5
# A smaller probability has no full precision in float32 any more.
_LEAST = 1e-30


@dataclass(frozen=True, kw_only=True)
class GoldenUsers:
    """Histories and their best items and scores, best first; `top_items` and `top_scores` are a list per user."""

    history: History
    top_items: list[list[int]]
    top_scores: list[list[float]]

    @property
    def longest(self) -> int:
        """How many items the longest list has."""
        return max(map(len, self.top_items), default=1)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far scores are from the golden ones: the largest relative difference, and which users' best items agree."""

    largest: float
    agrees: NDArray[np.bool_]


def verify(plpy: Any, model_id: int, version_id: int) -> list[dict[str, Any]]:
    """Gives a row for the CPU, and one for the GPU where one is used: whether a version passed, and what differed.

    The active version is checked with the weights that live calls use, the shared map included; another one with
    weights read for the occasion, their checksums checked. A version that cannot be scored fails, with the error as its
    detail. A GPU that breaks is told of with a NOTICE and has no row: in a refresh the CPU would score.
    """
    golden = _read_golden(plpy, version_id)
    # As if the work were endless: whatever device a refresh could choose is checked.
    gpu = device.choose(plpy, ENDLESS, golden.longest)
    if not golden.top_items:
        return [_row(None, golden) | {"detail": "the version has no golden users"}]
    try:
        version = _version(plpy, model_id, version_id)
    except ScoringError as error:
        return [_row(None, golden) | {"detail": error.message}]
    try:
        rows = [_row(None, golden) | _judged(_on_cpu(version, golden))]
    # Weights that do not fit the golden histories.
    except Exception as error:
        return [_row(None, golden) | {"detail": f"scoring failed: {type(error).__name__}: {error}"}]
    if gpu is not None:
        try:
            rows.append(_row(gpu, golden) | _judged(_on_gpu(gpu, version, golden)))
        except Exception as error:
            plpy.notice(f"the GPU failed ({device.reason(error)}); the CPU scores")
    return rows


def _row(gpu: Gpu | None, golden: GoldenUsers) -> dict[str, Any]:
    """Gives the row of a device on which nothing was compared."""
    module = gpu.cupy if gpu else np
    return {
        "device": "cuda" if gpu else "cpu",
        "passed": False,
        "golden_users": len(golden.top_items),
        "max_difference": None,
        "top_k_agreement": None,
        "numpy_version": f"{module.__name__} {module.__version__}",
        "blas": _name(gpu) if gpu else blas.library_name(),
        "detail": None,
    }


def _judged(found: Difference) -> dict[str, Any]:
    passed = bool(found.largest <= BOUND and found.agrees.all())
    return {
        "passed": passed,
        "max_difference": found.largest,
        "top_k_agreement": float(found.agrees.mean()),
        "detail": None
        if passed
        else f"the largest relative difference of a score is {found.largest:.2g}, {BOUND:.0e} is allowed;"
        f" {int((~found.agrees).sum())} of {len(found.agrees)} golden users got other items",
    }


def compare(golden: GoldenUsers, ranked: tuple[NDArray[Any], NDArray[np.float64]]) -> Difference:
    """Compares the best items of the golden users, [U, k], and the scores of all items, [U, I], with the golden ones.

    Two rankings agree where they differ only among equal scores: the item at each rank has the golden score of that
    rank.
    """
    best, found = ranked
    largest = 0.0
    agrees = np.zeros(len(golden.top_items), dtype=bool)
    for user, (items, wanted) in enumerate(zip(golden.top_items, golden.top_scores, strict=True)):
        expected = np.array(wanted)
        known = dict(zip(items, wanted, strict=True))
        largest = max(largest, _relative(found[user, items], expected).max(initial=0.0))
        ranked_scores = np.array([known.get(item, found[user, item]) for item in best[user, : len(items)].tolist()])
        agrees[user] = len(ranked_scores) == len(expected) and bool((_relative(ranked_scores, expected) <= BOUND).all())
    return Difference(largest=float(largest), agrees=agrees)


def _on_cpu(version: Version, golden: GoldenUsers) -> Difference:
    """Compares by what live calls and what refreshes score with, and gives the worse of the two."""
    history, k = golden.history, golden.longest
    scores, _ = score_users(version.weights, history, max_history=version.max_history)
    mask_seen(scores, history, version.targets)
    live = compare(golden, (forward.top_k(scores, k)[0], scores.astype(np.float64)))
    stored = compare(golden, _best_of(CpuScorer(version, k), version, history))
    return Difference(largest=max(live.largest, stored.largest), agrees=live.agrees & stored.agrees)


def _on_gpu(gpu: Gpu, version: Version, golden: GoldenUsers) -> Difference:
    from .gpu import GpuScorer

    scorer = GpuScorer(gpu.cupy, version, golden.longest, memory=gpu.memory, precision=gpu.precision)
    try:
        return compare(golden, _best_of(scorer, version, golden.history))
    finally:
        scorer.close()


def _best_of(
    scorer: Callable[[History], Scored], version: Version, history: History
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Gives the ranking of a scorer that tells only the best items' scores; the others have the last one's at most."""
    best, values, _ = scorer(history)
    scores = np.repeat(values[:, -1:].astype(np.float64), version.item_count, axis=1)
    # Behind the last item a score is -1.
    users, places = np.nonzero(values >= 0)
    scores[users, best[users, places]] = values[users, places]
    return best, scores


def _relative(found: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    difference: NDArray[np.float64] = np.abs(found - expected) / np.maximum(np.abs(expected), _LEAST)
    # A score that is no number differs from every other.
    return np.where(np.isfinite(difference), difference, np.inf)


def _version(plpy: Any, model_id: int, version_id: int) -> Version:
    rows = execute(
        plpy,
        "select v.state from vae_private.published_versions v where v.version_id = $1",
        ["bigint"],
        [version_id],
    )
    if rows and rows[0]["state"] == "active":
        return active_version(plpy, model_id)
    return load_version(plpy, version_id)


def _read_golden(plpy: Any, version_id: int) -> GoldenUsers:
    rows = execute(
        plpy,
        "select g.items, g.event_types, g.occurred_at, g.features, g.top_items, g.top_scores"
        " from vae_private.published_golden_users g where g.version_id = $1 order by g.number",
        ["bigint"],
        [version_id],
    )

    def joined(column: str, dtype: type) -> NDArray[Any]:
        return np.array([value for row in rows for value in row[column]], dtype=dtype)

    features = FeatureBag.of([row["features"] for row in rows])
    return GoldenUsers(
        history=History(
            counts=np.array([len(row["items"]) for row in rows], dtype=np.int64),
            item=joined("items", np.int64),
            event_type=joined("event_types", np.int64),
            occurred_at=joined("occurred_at", np.float64),
            features=features if len(features.token) else None,
        ),
        top_items=[row["top_items"] for row in rows],
        top_scores=[row["top_scores"] for row in rows],
    )


def _name(gpu: Gpu) -> str:
    name: str = gpu.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return name
