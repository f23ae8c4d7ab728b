"""Rows of vae.metrics, vae.epochs and vae.curves, as a training writes them and a report reads them."""

from __future__ import annotations

from dataclasses import dataclass

# The slice of all users.
ALL = "all"
# Of other metrics more is better.
LOWER_IS_BETTER = frozenset({"log_loss", "brier", "calibration_error"})
# More of these is neither better nor worse: a broad choice is not better by itself, nor is a narrow one.
DESCRIPTIVE = frozenset({"coverage", "novelty"})


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean over the users of a test part, with its 95 % bootstrap interval where there is one.

    The metric ndcg_lead of a baseline is pgvae's ndcg less its own: pgvae beats it where the interval is above 0.
    """

    method: str
    split: str
    slice: str = ALL
    metric: str
    k: int
    value: float
    lower: float | None
    upper: float | None
    user_count: int


# The phase of epochs that only choose a setting; they are shown, and not kept.
CHOOSING = "choose"


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the users gave; losses are means per user, in nats.

    `future_share` is the one that is tried, while one is chosen.
    """

    phase: str
    epoch: int
    loss: float
    reconstruction: float
    kl: float
    validation_ndcg: float | None
    seconds: float
    future_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A point of a picture, what was predicted against what happened; positions count from 1 in a curve and method."""

    curve: str
    method: str
    position: int
    x: float
    y: float
    weight: float
    label: str | None = None
    lower: float | None = None
    upper: float | None = None
