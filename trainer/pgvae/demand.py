"""Fits the forecast of demand on older windows, its interval on a later one, and measures it on the newest horizon.

docs/demand.md has the formulas; the features are those of pgvae_runtime.demand, which the database computes again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pgvae.binary_copy import copy_rows
from pgvae.bootstrap import interval, resampled_means
from pgvae.dataset import Dataset
from pgvae.outcome_windows import HORIZONS_NEEDED, later_or_shorter
from pgvae.regression import fit_poisson, standardising
from pgvae.rows import CurvePoint, Metric
from pgvae_runtime.demand import (
    COVERAGE,
    HORIZONS_READ,
    MOST_LOG,
    Equation,
    Forecast,
    Head,
    Interval,
    ItemDays,
    bounded,
    deviation_scale,
    expected_demand,
    features,
    log_linear,
)
from pgvae_runtime.tokens import SECONDS_PER_DAY

SPLIT = "horizon"
OWN = "pgvae"
METHODS = (OWN, "exponential_smoothing", "last_period")
# Windows overlap: they begin a quarter of a horizon apart, and reach so many horizons back.
_STEPS = 4
_HORIZONS_FITTED = 6
# So many of the newest horizons are forecast, each from what was known before it, to measure.
_HORIZONS_MEASURED = 3
# Of more rows a part is drawn by chance.
_MOST_ROWS = 300_000
# Of the coefficients of standardised features, relative to the loss per unit sold.
_RIDGE = 1e-3
# The logarithm of next to nothing: of items that never sell.
_NOTHING = -30.0
# A level of the interval stands for so many forecasts at least, and there are so many levels at most.
_ROWS_PER_LEVEL = 100
_LEVELS = 6
_HALF_LIVES = (0.25, 0.5, 1.0, 2.0, 4.0)
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
# Items of the picture of expected against actual demand.
_PICTURED = 150


@dataclass(frozen=True, kw_only=True)
class Sales:
    """What happened to the items of a data set, and how often users bought them.

    `days` count back from the newest event; `bought_item` and `bought_day` [N] are those of each (user, item) and day.
    """

    horizon: int
    days: ItemDays
    bought_user: NDArray[np.int64]
    bought_item: NDArray[np.int64]
    bought_day: NDArray[np.int64]
    item_keys: list[str]

    @property
    def span(self) -> int:
        """The days from the oldest sale to the newest event."""
        return int(self.days.day[self.days.units > 0].max(initial=-1)) + 1

    @property
    def is_enough(self) -> bool:
        """Whether there are days enough to fit and to measure a forecast."""
        return self.span >= HORIZONS_NEEDED * self.horizon

    def units(self, until: int) -> NDArray[np.float64]:
        """Gives the units of each item, [I], sold in the horizon that ended so many days ago."""
        return self.days.total("units", until, until + self.horizon)

    def buyers(self, until: int) -> NDArray[np.float64]:
        """Gives the different users of each item, [I], who bought it in the horizon that ended so many days ago."""
        chosen = (self.bought_day >= until) & (self.bought_day < until + self.horizon)
        items = self.days.item_count
        pairs = np.unique(self.bought_user[chosen] * items + self.bought_item[chosen])
        return np.bincount(pairs % items, minlength=items).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class DemandFit:
    """A forecast, fitted to the newest event, and how the same procedure did without the newest horizon.

    `head` is None where the events span too few days; `missing` then says so.
    """

    head: Head | None
    metrics: list[Metric]
    curve: list[CurvePoint]
    missing: str = ""


def read_sales(connection: psycopg.Connection, model: str, dataset: Dataset) -> Sales:
    """Gives what happened to the items of a data set, in the transaction that read it."""
    row = connection.execute(
        "select (options ->> 'horizon_days')::integer from vae.models where name = %s", [model]
    ).fetchone()
    assert row is not None  # The data set was read from this model, in the same transaction.
    horizon = int(row[0])
    query = sql.SQL(
        "select i.item_index, d.day, d.units, d.buyers, d.views, d.carts"
        " from {function}({as_of}, {since}, {types}) d join pgvae_items i on i.item_key = d.item_id::text"
    ).format(
        function=sql.Identifier(model, "all_item_days"),
        as_of=sql.Literal(dataset.window()[1]),
        since=sql.SQL("'-infinity'"),
        types=sql.Literal([dataset.event_types[number] for number in dataset.targets]),
    )
    columns = {"item": "i4", "day": "i4", "units": "f8", "buyers": "i4", "views": "i4", "carts": "i4"}
    rows = copy_rows(connection, query, columns)
    return sales_of(
        dataset,
        ItemDays(
            item_count=len(dataset.item_keys),
            item=rows["item"].astype(np.int64),
            day=rows["day"].astype(np.int64),
            **{name: rows[name].astype(np.float64) for name in ("units", "buyers", "views", "carts")},
        ),
        horizon,
    )


def sales_of(dataset: Dataset, days: ItemDays, horizon: int) -> Sales:
    """Gives the sales of a data set whose items' days are known."""
    chosen = np.isin(dataset.event_type, dataset.targets)
    return Sales(
        horizon=horizon,
        days=days,
        bought_user=dataset.user[chosen],
        bought_item=dataset.item[chosen],
        bought_day=((dataset.occurred_at.max() - dataset.occurred_at[chosen]) // SECONDS_PER_DAY).astype(np.int64),
        item_keys=dataset.item_keys,
    )


def fit_demand(sales: Sales, *, seed: int) -> DemandFit:
    """Fits a forecast of units and of buyers, measured on the newest horizons by what was known before each."""
    if not sales.is_enough:
        return DemandFit(
            head=None,
            metrics=[],
            curve=[],
            missing=f"the sales span {sales.span} days, a forecast of {sales.horizon} days needs"
            f" {HORIZONS_NEEDED * sales.horizon}: {later_or_shorter(sales.span)}",
        )
    fitter = _Fitter(sales, seed)
    tests = [fitter.test(number * sales.horizon) for number in range(1, _HORIZONS_MEASURED + 1)
             if sales.span >= (number - 1 + HORIZONS_NEEDED) * sales.horizon]  # fmt: skip
    return DemandFit(head=fitter.head(until=0), metrics=_metrics(tests, seed), curve=_curve(sales, tests[0]))


class _Moment:
    """What was known of the items so many days ago, of those that something had happened to, and what came after."""

    def __init__(self, sales: Sales, days_ago: int) -> None:
        self._sales = sales
        self._days_ago = days_ago
        self.known = sales.days.before(days_ago).known
        # The database reads no more.
        self.days = sales.days.before(days_ago, HORIZONS_READ * sales.horizon)
        self.matrix = features(self.days, sales.horizon)[self.known]
        self._after: dict[str, NDArray[np.float64]] = {}

    def smoothed(self, what: str, half_life: float) -> NDArray[np.float64]:
        """Gives the exponentially smoothed demand of a horizon."""
        level: NDArray[np.float64] = self._sales.horizon * self.days.level(what, half_life)[self.known]
        return level

    def last_period(self, what: str) -> NDArray[np.float64]:
        """Gives the demand of the horizon before."""
        return self._demand(what, self._days_ago)

    def happened(self, what: str) -> NDArray[np.float64]:
        """Gives the demand of the horizon after."""
        if what not in self._after:
            self._after[what] = self._demand(what, self._days_ago - self._sales.horizon)
        return self._after[what]

    def _demand(self, what: str, until: int) -> NDArray[np.float64]:
        demand: NDArray[np.float64] = getattr(self._sales, what)(until)[self.known]
        return demand


@dataclass(frozen=True, kw_only=True)
class _Test:
    """What was forecast at a moment, by each method, and what happened; `items` [N] are the rows' items."""

    items: NDArray[np.int64]
    happened: dict[str, NDArray[np.float64]]
    forecasts: dict[str, dict[str, Forecast]]


class _Fitter:
    """Fits forecasts of the same sales as of different days."""

    def __init__(self, sales: Sales, seed: int) -> None:
        self._sales = sales
        self._seed = seed
        self._is_whole = bool(np.all(sales.days.units == np.rint(sales.days.units)))
        self._known: dict[int, _Moment] = {}

    def head(self, until: int) -> Head:
        """Gives the forecast that could be fitted so many days ago."""
        return Head(
            horizon=self._sales.horizon,
            is_whole=self._is_whole,
            units=self._equation("units", until),
            buyers=self._equation("buyers", until),
        )

    def test(self, days_ago: int) -> _Test:
        """Gives what could be forecast so many days ago, and what happened in the horizon after."""
        now = self._moment(days_ago)
        head = self.head(until=days_ago)
        forecasts: dict[str, dict[str, Forecast]] = {}
        for what, equation in (("units", head.units), ("buyers", head.buyers)):
            is_whole = self._is_whole or what == "buyers"
            expected = expected_demand(equation, now.matrix, now.smoothed(what, equation.half_life))
            forecasts[what] = {OWN: bounded(expected, equation.interval, now.matrix, is_whole=is_whole)}
            calibration = self._calibration(days_ago)
            days = self._half_life(what, calibration)
            expected_by = {
                "last_period": [moment.last_period(what) for moment in (now, *calibration)],
                "exponential_smoothing": [moment.smoothed(what, days) for moment in (now, *calibration)],
            }
            happened = np.concatenate([moment.happened(what) for moment in calibration])
            for method, (first, *before) in expected_by.items():
                forecasts[what][method] = _baseline(first, np.concatenate(before), happened, is_whole=is_whole)
        return _Test(
            items=np.flatnonzero(now.known),
            happened={what: now.happened(what) for what in forecasts},
            forecasts=forecasts,
        )

    def _moment(self, days_ago: int) -> _Moment:
        if days_ago not in self._known:
            self._known[days_ago] = _Moment(self._sales, days_ago)
        return self._known[days_ago]

    def _calibration(self, until: int) -> list[_Moment]:
        """Gives when the horizons began that an interval is fitted on: within two horizons where there is room."""
        horizon = self._sales.horizon
        width = horizon if self._sales.span - until >= 7 * horizon else 0
        return [self._moment(each) for each in range(until + horizon, until + horizon + width + 1, self._step)]

    @property
    def _step(self) -> int:
        return max(1, self._sales.horizon // _STEPS)

    def _equation(self, what: str, until: int) -> Equation:
        horizon = self._sales.horizon
        calibration = self._calibration(until)
        # No day of the calibration is among those that the mean is fitted on.
        first = until + (3 if len(calibration) > 1 else 2) * horizon
        last = min(self._sales.span - horizon, first + _HORIZONS_FITTED * horizon)
        fitting = [self._moment(each) for each in range(first, last + 1, self._step)]
        intercept, coefficients = self._regression(fitting, [moment.happened(what) for moment in fitting])
        errors = [np.abs(m.happened(what) - log_linear(intercept, coefficients, m.matrix)) for m in fitting]
        scale = self._regression(fitting, errors)
        half_life = self._half_life(what, calibration)
        happened = np.concatenate([moment.happened(what) for moment in calibration])
        smoothed = np.concatenate([moment.smoothed(what, half_life) for moment in calibration])
        matrix = np.concatenate([moment.matrix for moment in calibration])
        linear = log_linear(intercept, coefficients, matrix)
        share = min(_SHARES, key=lambda s: float(np.abs(happened - s * linear - (1.0 - s) * smoothed).sum()))
        expected = share * linear + (1.0 - share) * smoothed
        ends = np.cumsum([len(moment.matrix) for moment in calibration])[:-1]
        totals = [(h.sum(), e.sum()) for h, e in zip(np.split(happened, ends), np.split(expected, ends), strict=True)]
        shock = np.sqrt(np.mean([(h / max(e, 1e-9) - 1.0) ** 2 for h, e in totals]))
        return Equation(
            intercept=intercept,
            coefficients=coefficients,
            share=share,
            half_life=half_life,
            shock=float(shock),
            interval=fit_interval(expected, happened, matrix, *scale),
        )

    def _regression(self, moments: list[_Moment], y: list[NDArray[np.float64]]) -> tuple[float, list[float]]:
        matrix, target = np.concatenate([moment.matrix for moment in moments]), np.concatenate(y)
        if len(target) > _MOST_ROWS:
            drawn = np.random.default_rng(self._seed).choice(len(target), _MOST_ROWS, replace=False)
            matrix, target = matrix[drawn], target[drawn]
        return fit_log_linear(matrix, target)

    def _half_life(self, what: str, moments: list[_Moment]) -> float:
        """Gives the half-life in days by which exponential smoothing erred least."""

        def error(days: float) -> float:
            return sum(float(np.abs(m.happened(what) - m.smoothed(what, days)).sum()) for m in moments)

        return min((share * self._sales.horizon for share in _HALF_LIVES), key=error)


def _baseline(
    expected: NDArray[np.float64], before: NDArray[np.float64], happened: NDArray[np.float64], *, is_whole: bool
) -> Forecast:
    """Gives a baseline's forecast; the interval fitted as pgvae's, with what is expected as the scale."""
    found = fit_interval(before, happened, np.log(before + 0.5)[:, None], 0.0, [1.0])
    return bounded(expected, found, np.log(expected + 0.5)[:, None], is_whole=is_whole)


def fit_log_linear(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, list[float]]:
    """Gives intercept and coefficients, [F], of log-linear Poisson regression with a ridge penalty.

    Minimises mean(exp(η) - y·η) / mean(y) + ridge · |β|², η = intercept + x·β of standardised x, [N, F]. With demand of
    any dispersion it estimates the mean (quasi-likelihood, Wedderburn 1974).
    """
    if not y.any():
        return _NOTHING, [0.0] * x.shape[1]
    mean, scale = standardising(x)
    fitted = fit_poisson((x - mean) / scale, y, np.full(x.shape[1], 2.0 * _RIDGE), most=MOST_LOG)
    coefficients = fitted[:-1] / scale
    return float(fitted[-1] - coefficients @ mean), coefficients.tolist()


def fit_interval(
    expected: NDArray[np.float64],
    happened: NDArray[np.float64],
    matrix: NDArray[np.float64],
    intercept: float,
    coefficients: list[float],
) -> Interval:
    """Gives how far what happened strayed from what was expected, [N] each, by the level of what was expected.

    Split conformal with a scale for each row (Papadopoulos et al. 2002; Lei et al. 2018), level by level. Its guarantee
    is for rows that nothing was chosen on; the half-life and the share of the regression are chosen on these, and their
    windows overlap. Choosing on older rows makes the forecast worse by more than the interval gains (docs/demand.md).
    """
    scale = deviation_scale(intercept, coefficients, matrix)
    order = np.argsort(expected, kind="stable")
    levels: dict[float, list[NDArray[np.int64]]] = {}
    for part in np.array_split(order, max(1, min(_LEVELS, len(order) // _ROWS_PER_LEVEL))):
        # Parts of one level, as of items of which nothing is expected, are one.
        levels.setdefault(max(float(np.median(expected[part])), 1e-9), []).append(part)
    knots = []
    for level, own in sorted(levels.items()):
        part = np.concatenate(own)
        strayed = (happened[part] - expected[part]) / scale[part]
        knots.append((level, *conformal_bounds(strayed), float(np.sqrt(np.mean(strayed**2)))))
    expected_, low_, high_, deviation = (list(column) for column in zip(*knots, strict=True))
    return Interval(
        intercept=intercept,
        coefficients=coefficients,
        expected=expected_,
        low=low_,
        high=high_,
        deviation=deviation,
    )


def conformal_bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    """Gives bounds between which one more value like the n given lies in COVERAGE of the cases at least.

    With equal shares beyond both: the order statistics of n + 1, not of n (Lei et al. 2018). Of fewer than nine values
    the least and the greatest, which hold less.
    """
    ordered = np.sort(values)
    # A share such as 0.1 is not quite one in binary.
    beyond = max(1, int((len(ordered) + 1) * (1.0 - COVERAGE) / 2.0 + 1e-9))
    return float(ordered[beyond - 1]), float(ordered[-beyond])


def _metrics(tests: list[_Test], seed: int) -> list[Metric]:
    """Gives WAPE, mean pinball loss of the two bounds, and coverage, with intervals by resampling items.

    Where no known item is sold there is no WAPE; resamples of which nothing was sold are left out of its interval.
    """
    found = []
    edge = (1.0 - COVERAGE) / 2.0
    items = np.concatenate([test.items for test in tests])
    for prefix, what in (("demand", "units"), ("demand_buyers", "buyers")):
        happened = np.concatenate([test.happened[what] for test in tests])
        for method in METHODS:
            expected, low, high = (
                np.concatenate([getattr(test.forecasts[what][method], name) for test in tests])
                for name in ("expected", "low", "high")
            )
            pinball = (pinball_loss(happened, low, edge) + pinball_loss(happened, high, 1.0 - edge)) / 2.0
            inside = (happened >= low) & (happened <= high)
            columns = np.column_stack((np.abs(happened - expected), happened, pinball, inside))
            means = np.vstack((columns.mean(axis=0), resampled_means(columns, items, seed)))
            figures = {"pinball": means[:, 2], "coverage": means[:, 3]}
            if happened.any():
                sold = means[:, 1] > 0
                figures["wape"] = means[sold, 0] / means[sold, 1]
            for name, values in figures.items():
                lower, upper = interval(values[1:, None])[:, 0].tolist()
                found.append(
                    Metric(
                        method=method,
                        split=SPLIT,
                        metric=f"{prefix}_{name}",
                        k=0,
                        value=float(values[0]),
                        lower=lower,
                        upper=upper,
                        user_count=len(np.unique(items)),
                    )
                )
    return found


def pinball_loss(happened: NDArray[np.float64], bound: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """Gives the loss of each bound, [N], which is least on average for the true quantile (Koenker and Bassett 1978)."""
    over = happened - bound
    loss: NDArray[np.float64] = np.maximum(quantile * over, (quantile - 1.0) * over)
    return loss


def _curve(sales: Sales, test: _Test) -> list[CurvePoint]:
    """Gives expected and actual units of items of every level, the most expected first."""
    forecast, happened = test.forecasts["units"][OWN], test.happened["units"]
    order = np.argsort(-forecast.expected, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(_PICTURED, len(order))).astype(np.int64))]
    return [
        CurvePoint(
            curve="demand",
            method=OWN,
            position=position,
            label=sales.item_keys[test.items[row]],
            x=float(forecast.expected[row]),
            y=float(happened[row]),
            lower=float(forecast.low[row]),
            upper=float(forecast.high[row]),
            weight=1.0,
        )
        for position, row in enumerate(chosen.tolist(), start=1)
    ]
