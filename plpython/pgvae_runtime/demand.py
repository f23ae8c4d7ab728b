"""Expected demand of items: a log-linear function of what was sold, viewed and put into carts before (docs/demand.md).

The trainer fits a `Head` with the same features that the database computes for it when it is asked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the interval between `low` and `high`.
COVERAGE = 0.8
# What is older than so many horizons does not count.
HORIZONS_READ = 26
# (what, half-life in horizons): exponentially smoothed levels per horizon.
_LEVELS = (
    *((what, half_life) for what in ("units", "buyers", "root_units", "views") for half_life in (0.25, 1.0, 4.0)),
    ("days", 1.0),
    ("days", 4.0),
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
MOST_LOG = 30.0
# A scale of nothing has no multiples.
_LEAST_SCALE = 1e-6


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

    @property
    def root_units(self) -> NDArray[np.float64]:
        """The square roots of the units, [N]: one large order speaks less loudly than many small ones."""
        roots: NDArray[np.float64] = np.sqrt(self.units)
        return roots

    @property
    def days(self) -> NDArray[np.float64]:
        """One for each row, [N]: on how many days something happened."""
        return np.ones(len(self.day))

    def before(self, days: int, width: float = math.inf) -> ItemDays:
        """Gives what was known so many days earlier, of the `width` days before that."""
        chosen = (self.day >= days) & (self.day < days + width)
        columns = {name: getattr(self, name)[chosen] for name in ("item", "units", "buyers", "views", "carts")}
        return ItemDays(item_count=self.item_count, day=self.day[chosen] - days, **columns)

    def total(self, what: str, first: float, last: float) -> NDArray[np.float64]:
        """Gives the sum of each item, [I], over the days from `first` back to before `last`."""
        chosen = (self.day >= first) & (self.day < last)
        return self._sum(self.item[chosen], getattr(self, what)[chosen])

    def level(self, what: str, half_life: float) -> NDArray[np.float64]:
        """Gives the exponentially smoothed amount per day of each item, [I] (Brown 1959); half-life in days."""
        decay = 0.5 ** (1.0 / half_life)
        # A power per day, not per row.
        weight = (1.0 - decay) * decay ** np.arange(self.day.max(initial=-1) + 1)
        return self._sum(self.item, getattr(self, what) * weight[self.day])

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
    """How far demand strays: a scale for each item, and multiples of it by the level of what is expected.

    The scale is exp(intercept + Σ coefficients · features), the expected absolute deviation. At the K levels
    `expected`, ascending, the 10 % and the 90 % quantile of the deviation and its root mean square stand as multiples
    of the scale; between the levels they are interpolated over the logarithm.
    """

    intercept: float
    coefficients: list[float]
    expected: list[float]
    low: list[float]
    high: list[float]
    deviation: list[float]


@dataclass(frozen=True, kw_only=True)
class Equation:
    """Expected demand: share · exp(intercept + Σ coefficients · features) + (1 - share) · smoothing.

    Smoothing is the exponentially smoothed level with a half-life of so many days, times the horizon. `shock` is by how
    much the sum over all items was off, as a share of it (root mean square): what no single item's interval tells.
    """

    intercept: float
    coefficients: list[float]
    share: float
    half_life: float
    shock: float
    interval: Interval


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
        units, buyers = (
            expected_demand(equation, matrix, self.horizon * days.level(what, equation.half_life))
            for what, equation in (("units", self.units), ("buyers", self.buyers))
        )
        return (
            bounded(units, self.units.interval, matrix, is_whole=self.is_whole),
            bounded(buyers, self.buyers.interval, matrix, is_whole=True),
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


def log_linear(intercept: float, coefficients: list[float], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives exp(intercept + Σ coefficients · features) of each row of features, [I, F]."""
    value: NDArray[np.float64] = np.exp(np.minimum(intercept + matrix @ np.array(coefficients), MOST_LOG))
    return value


def deviation_scale(intercept: float, coefficients: list[float], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives the scale of each item's interval, [I], from its features, [I, F]."""
    return np.maximum(log_linear(intercept, coefficients, matrix), _LEAST_SCALE)


def expected_demand(
    equation: Equation, matrix: NDArray[np.float64], smoothed: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Gives the expected demand of items, [I], from their features, [I, F], and their smoothed demand, [I]."""
    linear = log_linear(equation.intercept, equation.coefficients, matrix)
    return equation.share * linear + (1.0 - equation.share) * smoothed


def bounded(
    expected: NDArray[np.float64], interval: Interval, matrix: NDArray[np.float64], *, is_whole: bool
) -> Forecast:
    """Gives expected demand, [I], with its interval; whole bounds where demand comes in whole units."""
    scale = deviation_scale(interval.intercept, interval.coefficients, matrix)
    place = np.log(np.maximum(expected, 1e-9))
    knots = np.log(interval.expected)
    low, high, deviation = (
        scale * np.interp(place, knots, multiples) for multiples in (interval.low, interval.high, interval.deviation)
    )
    low, high = np.maximum(expected + low, 0.0), np.maximum(expected + high, 0.0)
    nearest = expected
    if is_whole:
        low, high, nearest = np.rint(low), np.rint(high), np.rint(expected)
    # A few large orders can raise the mean above the 90 % quantile.
    return Forecast(
        expected=expected, low=np.minimum(low, nearest), high=np.maximum(high, nearest), deviation=deviation
    )
