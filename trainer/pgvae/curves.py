"""Points of the pictures about a version: what it predicted against what happened (vae.curves)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A row of vae.curves; positions count from 1 within a curve and method."""

    curve: str
    method: str
    position: int
    x: float
    y: float
    weight: float
    label: str | None = None
    lower: float | None = None
    upper: float | None = None
