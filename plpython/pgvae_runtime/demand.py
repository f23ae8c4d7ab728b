"""Expected demand of items: a log-linear function of what was sold, viewed and put into carts before (docs/demand.md).

The trainer fits a `Head` with the same features that the database computes for it when it is asked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the interval between `low` and `high`.
COVERAGE = 0.8
# What is older than so many horizons counts nothing.
HORIZONS_READ = 26
# (what, half-life in horizons): exponentially smoothed levels per horizon.
_LEVELS = (
    *(("units", half_life) for half_life in (0.25, 1.0, 4.0)),
    *(("buyers", half_life) for half_life in (0.25, 1.0, 4.0)),
    *(("views", half_life) for half_life in (0.25, 1.0, 4.0)),
    ("carts", 1.0),
)
# (what, width in horizons): sums of the latest days.
_SUMS = (("units", 0.25), ("units", 1.0), ("units", 4.0))
FEATURES = (
    *(f"log level of {what}, half-life {half_life:g}" for what, half_life in _LEVELS),
    *(f"log {what} of the last {width:g}" for what, width in _SUMS),
)
# Added before the logarithm: the demand of an item that sold nothing is small, not nothing.
_FLOOR = 0.3
# exp of more is no demand of anything.
_MOST = 30.0


@dataclass(frozen=True, kw_only=True)
class ItemDays:
    """N days of I items on which something happened.

    `item` [N] counts from 0, `day` [N] counts back from a moment: 0 are the 24 hours before it. `units`, `buyers`,
    `views` and `carts` [N] are what happened; a user counts once a day in the last three.
    """

    item_count: int
    item: NDArray[np.int64]
    day: NDArray[np.int64]
    units: NDArray[np.float64]
    buyers: NDArray[np.float64]
    views: NDArray[np.float64]
    carts: NDArray[np.float64]

    def before(self, days: int) -> ItemDays:
        """Gives what was known so many days earlier."""
        chosen = self.day >= days
        columns = {name: getattr(self, name)[chosen] for name in ("item", "units", "buyers", "views", "carts")}
        return ItemDays(item_count=self.item_count, day=self.day[chosen] - days, **columns)

    def total(self, what: str, first: float, last: float) -> NDArray[np.float64]:
        """Gives the sum of each item, [I], over the days from `first` back to before `last`."""
        chosen = (self.day >= first) & (self.day < last)
        return self._sum(self.item[chosen], getattr(self, what)[chosen])

    def level(self, what: str, half_life: float) -> NDArray[np.float64]:
        """Gives the exponentially smoothed amount per day of each item, [I] (Brown 1959); half-life in days."""
        decay = 0.5 ** (1.0 / half_life)
        level: NDArray[np.float64] = (1.0 - decay) * self._sum(self.item, getattr(self, what) * decay**self.day)
        return level

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which items something ever happened to, [I]."""
        return np.bincount(self.item, minlength=self.item_count) > 0

    def _sum(self, item: NDArray[np.int64], amount: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(item, weights=amount, minlength=self.item_count).astype(np.float64)


def features(days: ItemDays, horizon: int) -> NDArray[np.float64]:
    """Gives the FEATURES of each item, [I, F]."""
    columns = [horizon * days.level(what, half_life * horizon) for what, half_life in _LEVELS]
    columns += [days.total(what, 0, width * horizon) for what, width in _SUMS]
    matrix: NDArray[np.float64] = np.log(np.column_stack(columns) + _FLOOR)
    return matrix


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How far demand strays, by its expected level.

    At the K levels `expected`, ascending: the 10 % and the 90 % quantile and the standard deviation, each as a multiple
    of what was expected. Between the levels they are interpolated over the logarithm.
    """

    expected: list[float]
    low: list[float]
    high: list[float]
    deviation: list[float]

    def at(self, expected: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Gives lower bound, upper bound and standard deviation of each expected demand, [I] each."""
        place = np.log(np.maximum(expected, 1e-9))
        knots = np.log(self.expected)
        low, high, deviation = (expected * np.interp(place, knots, m) for m in (self.low, self.high, self.deviation))
        return low, high, deviation


@dataclass(frozen=True, kw_only=True)
class Equation:
    """Expected demand: share · exp(intercept + Σ coefficients · features) + (1 - share) · smoothing.

    Smoothing is the exponentially smoothed level with a half-life of so many days, times the horizon.
    """

    intercept: float
    coefficients: list[float]
    share: float
    half_life: float
    interval: Interval

    def expected(self, days: ItemDays, what: str, horizon: int, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Gives the expected demand of each item, [I]; `matrix` are its features."""
        linear = np.exp(np.minimum(self.intercept + matrix @ np.array(self.coefficients), _MOST))
        smoothed = horizon * days.level(what, self.half_life)
        demand: NDArray[np.float64] = self.share * linear + (1.0 - self.share) * smoothed
        return demand


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Demand of I items in a horizon, [I] each: `low` to `high` holds what happens in COVERAGE of the cases."""

    expected: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    deviation: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a version forecasts demand with, for a horizon of so many days; `is_whole`: units come whole."""

    horizon: int
    is_whole: bool
    units: Equation
    buyers: Equation

    def forecast(self, days: ItemDays) -> tuple[Forecast, Forecast]:
        """Gives the units and the buyers of the horizon after the moment from which the days count."""
        matrix = features(days, self.horizon)
        return (
            _forecast(self.units, days, "units", self.horizon, matrix, is_whole=self.is_whole),
            _forecast(self.buyers, days, "buyers", self.horizon, matrix, is_whole=True),
        )

    def to_json(self) -> dict[str, Any]:
        """Gives the head as vae.versions.demand keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Head:
        """Gives the head of a version; the inverse of `to_json`."""
        units, buyers = (
            Equation(**{**document[what], "interval": Interval(**document[what]["interval"])})
            for what in ("units", "buyers")
        )
        return cls(horizon=document["horizon"], is_whole=document["is_whole"], units=units, buyers=buyers)


def _forecast(
    equation: Equation, days: ItemDays, what: str, horizon: int, matrix: NDArray[np.float64], *, is_whole: bool
) -> Forecast:
    expected = equation.expected(days, what, horizon, matrix)
    return bounded(expected, equation.interval, is_whole=is_whole)


def bounded(expected: NDArray[np.float64], interval: Interval, *, is_whole: bool) -> Forecast:
    """Gives expected demand with its interval; whole bounds where demand comes in whole units."""
    low, high, deviation = interval.at(expected)
    if is_whole:
        low, high = np.rint(low), np.rint(high)
    # A few large orders can raise the mean above the 90 % quantile.
    nearest = np.rint(expected) if is_whole else expected
    return Forecast(
        expected=expected, low=np.minimum(low, nearest), high=np.maximum(high, nearest), deviation=deviation
    )
