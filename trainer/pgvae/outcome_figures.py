"""What the heads of a version are worth on the newest horizon, beside baselines (docs/outcomes.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pgvae.bootstrap import interval, resampled_means
from pgvae.outcome_windows import Floats, Seen, Setting, Weights, Window, in_half, log_loss, score_parts
from pgvae.regression import fit_logistic, standardising
from pgvae.rows import CurvePoint, Metric
from pgvae_runtime import forward
from pgvae_runtime.behaviour import names
from pgvae_runtime.outcomes import Outlook, item_probability, outlook, risk_band, sigmoid
from pgvae_runtime.tokens import SECONDS_PER_DAY

SPLIT = "horizon"
_RIDGE = 1e-4
_BANDS = 10
# Items for which users are ranked as for an offer, and the buyers that an item must have had.
_OFFERS = 100
_OFFER_BUYERS = 5
_TOP = 0.1
_LIST = 10


def measure(honest: Sequence[Seen], weights: Weights, setting: Setting) -> tuple[list[Metric], list[CurvePoint]]:
    """Gives the figures of heads that were fitted without the newest window, on it, beside baselines."""
    checked, truth = honest[0], honest[0].window.has_bought
    dataset = setting.dataset
    found = outlook(
        weights,
        checked.window.history,
        checked.window.as_of,
        targets=dataset.targets,
        types=len(dataset.event_types),
    )
    purchase = {
        "pgvae": found.purchase,
        "rfm": _rfm(honest, setting),
        "base_rate": np.full(len(truth), honest[1].window.has_bought.mean()),
    }
    metrics, curves = [], []
    losses = np.column_stack([log_loss(p, truth) for p in purchase.values()])
    # How much lower than that of pgvae, user by user.
    losses = np.column_stack((losses, losses[:, 1:] - losses[:, :1]))
    lower, upper = interval(resampled_means(losses, checked.window.users, setting.seed))
    for column, (method, p) in enumerate(purchase.items()):
        values = {"churn_auc": area_under_curve(p, truth), "churn_ece": calibration_error(p, truth)}
        values["churn_brier"] = float(((p - truth) ** 2).mean())
        metrics += [_metric(method, name, value, len(truth)) for name, value in values.items()]
        own = [("churn_log_loss", column)]
        if column:
            own.append(("churn_log_loss_lead", len(purchase) + column - 1))
        metrics += [
            _metric(method, name, float(losses[:, at].mean()), len(truth), float(lower[at]), float(upper[at]))
            for name, at in own
        ]
        if method != "base_rate":
            curves += calibration_curve("churn_calibration", method, 1.0 - p, 1.0 - truth)
    curves += band_curve(1.0 - found.purchase, 1.0 - truth)
    counts = checked.window.purchases.astype(np.float64)
    latest = np.bincount(
        np.repeat(np.arange(len(truth)), checked.window.history.counts),
        weights=np.isin(checked.window.history.event_type, dataset.targets)
        & (checked.window.history.occurred_at >= checked.window.moment - setting.horizon * SECONDS_PER_DAY),
        minlength=len(truth),
    )
    for method, expected in {"pgvae": found.expected, "last_period": latest}.items():
        error = float(np.abs(expected - counts).sum() / max(counts.sum(), 1.0))
        metrics.append(_metric(method, "purchases_wape", error, len(truth)))
        metrics.append(_metric(method, "purchases_bias", float(expected.sum() / max(counts.sum(), 1.0)), len(truth)))
    of_items, item_curves = _measure_items(checked, found, weights, setting)
    return metrics + of_items, curves + item_curves


def _metric(
    method: str, name: str, value: float, users: int, lower: float | None = None, upper: float | None = None, k: int = 0
) -> Metric:
    return Metric(method=method, split=SPLIT, metric=name, k=k, value=value, lower=lower, upper=upper, user_count=users)


def _rfm(honest: Sequence[Seen], setting: Setting) -> Floats:
    """Gives what a logistic regression on recency, frequency and amount foretells, on the same windows."""
    columns = [
        names(setting.dataset.event_types).index(name)
        for name in ("log days since the last purchase", "log days with purchases", "log purchases")
    ]
    x = np.concatenate([seen.behaviour[:, columns] for seen in honest[2:]])
    y = np.concatenate([seen.window.has_bought for seen in honest[2:]])
    mean, scale = standardising(x)
    fitted = fit_logistic((x - mean) / scale, y, np.full(len(columns), _RIDGE))
    later, newest = (
        ((seen.behaviour[:, columns] - mean) / scale) @ fitted[:-1] + fitted[-1] for seen in (honest[1], honest[0])
    )
    slope, intercept = fit_logistic(later[:, None], honest[1].window.has_bought, np.array([1e-6]))
    return sigmoid(slope * newest + intercept)


def _measure_items(
    checked: Seen, found: Outlook, weights: Weights, setting: Setting
) -> tuple[list[Metric], list[CurvePoint]]:
    """Gives how well the probabilities of items foretell what is bought, of the half of the users that fitted nothing.

    response_lift: among all pairs of user and item, how much more often than on average those of the best tenth were
    purchases. audience_lift: the same among the users of one item, a mean over the items with the most buyers.
    """
    half = np.flatnonzero(in_half(checked.window.users, 1))
    window = checked.window.of(half)
    buyers = np.bincount(window.bought_item, minlength=len(setting.dataset.item_keys))
    offers = np.argsort(-buyers, kind="stable")[:_OFFERS]
    offers = offers[buyers[offers] >= _OFFER_BUYERS]
    pairs = _read_pairs(window, found.of(half), offers, weights, setting)
    metrics, curves = _calibration_of_items(pairs, len(window.users))
    popularity = setting.dataset.between(-np.inf, window.moment).popularity()
    lifts, lift_curves = _response_lifts(pairs, popularity, len(window.users))
    if len(offers):
        orders = {
            "pgvae": pairs.to_offers.T,
            # The users who bought most: what a shop without a model would mail to.
            "rfm": np.broadcast_to(_rfm_order(checked, setting)[half], pairs.to_offers.T.shape),
            "random": np.random.default_rng(setting.seed).random(pairs.to_offers.T.shape),
        }
        lifts += _audience_lifts(orders, window, offers)
    return metrics + lifts, curves + lift_curves


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """What was foretold of pairs of user and item, and what happened.

    `bins` [B, 3] holds how many pairs have a probability of each bin, the lowest first, the sum of these and the
    purchases; all pairs of a large shop would not fit into memory. `items` [I, 2] are the pairs and purchases of each
    item, `listed` and `listed_truth` the probabilities and the purchases of the best items of each user, `to_offers`
    [U, O] the probabilities of the offers.
    """

    bins: Floats
    items: Floats
    listed: Floats
    listed_truth: Floats
    to_offers: Floats


def _read_pairs(
    window: Window, found: Outlook, offers: NDArray[np.int64], weights: Weights, setting: Setting
) -> _Pairs:
    """Scores all items for the users of a window, in batches."""
    edges = np.linspace(np.log(1e-9), 0.0, 2001)
    bins = np.zeros((len(edges) + 1, 3))
    items = np.zeros((len(setting.dataset.item_keys), 2))
    to_offers = np.empty((len(window.users), len(offers)))
    listed, listed_truth = [], []
    for users, _, scores in score_parts(window.history, np.arange(len(window.users)), weights, setting):
        own = slice(int(users[0]), int(users[-1]) + 1)
        p = item_probability(weights, found.of(np.arange(own.start, own.stop)), scores)
        begin, end = np.searchsorted(window.bought_user, [own.start, own.stop])
        truth = np.zeros(p.shape, dtype=bool)
        truth[window.bought_user[begin:end] - own.start, window.bought_item[begin:end]] = True
        to_offers[own] = p[:, offers]
        place = np.searchsorted(edges, np.log(np.maximum(p, 1e-30)).ravel())
        for column, amount in enumerate((None, p.ravel(), truth.ravel())):
            bins[:, column] += np.bincount(place, weights=amount, minlength=len(bins))
        items += np.column_stack((np.full(len(items), len(users)), truth.sum(axis=0)))
        best = forward.top_k(scores, _LIST)[0]
        listed.append(np.take_along_axis(p, best, axis=1).ravel())
        listed_truth.append(np.take_along_axis(truth, best, axis=1).ravel().astype(np.float64))
    return _Pairs(
        bins=bins,
        items=items,
        listed=np.concatenate(listed),
        listed_truth=np.concatenate(listed_truth),
        to_offers=to_offers,
    )


def _calibration_of_items(pairs: _Pairs, users: int) -> tuple[list[Metric], list[CurvePoint]]:
    """Gives whether as much is bought as is foretold: of the best items of each user, and of all pairs."""
    expected, bought = pairs.bins[:, 1], pairs.bins[:, 2]
    error = float(np.abs(_merged(expected) - _merged(bought)).sum() / max(2.0 * bought.sum(), 1.0))
    bias = float(expected.sum() / max(bought.sum(), 1.0))
    metrics = [
        _metric("pgvae", "response_ece", calibration_error(pairs.listed, pairs.listed_truth), users, k=_LIST),
        _metric("pgvae", "response_calibration_error", error, users),
        _metric("pgvae", "response_bias", bias, users),
    ]
    return metrics, calibration_curve("response_calibration", "pgvae", pairs.listed, pairs.listed_truth)


def _response_lifts(
    pairs: _Pairs, popularity: NDArray[np.float32], users: int
) -> tuple[list[Metric], list[CurvePoint]]:
    """Gives how many purchases lie among the best of all pairs, by probability and by the popularity of the item."""
    by_popularity = pairs.items[np.argsort(-popularity, kind="stable")]
    groups = {
        "pgvae": (pairs.bins[::-1, 0], pairs.bins[::-1, 2]),
        "popularity": (by_popularity[:, 0], by_popularity[:, 1]),
    }
    metrics = [_metric(method, "response_lift", _pooled_lift(*own), users) for method, own in groups.items()]
    metrics.append(_metric("random", "response_lift", 1.0, users))
    total = pairs.bins[:, 0].sum()
    return metrics, [point for method, own in groups.items() for point in _lift_curve(method, *own, total)]


def _audience_lifts(orders: dict[str, Floats], window: Window, offers: NDArray[np.int64]) -> list[Metric]:
    """Gives the mean lift over the offers, of the orders [O, U] in which each way would choose users."""
    users = np.arange(len(window.users))
    truth = [np.isin(users, window.bought_user[window.bought_item == item]) for item in offers]
    return [
        _metric(
            method,
            "audience_lift",
            float(np.mean([top_lift(row, own) for row, own in zip(order, truth, strict=True)])),
            len(users),
        )
        for method, order in orders.items()
    ]


def _rfm_order(checked: Seen, setting: Setting) -> Floats:
    columns = names(setting.dataset.event_types)
    frequency = checked.behaviour[:, columns.index("log days with purchases")]
    order: Floats = frequency - 1e-3 * checked.behaviour[:, columns.index("log days since the last purchase")]
    return order


def _merged(sums: Floats) -> Floats:
    """Gives the sums of every hundred bins together."""
    merged: Floats = np.add.reduceat(sums, np.arange(0, len(sums), 100))
    return merged


def _pooled_lift(pairs: Floats, bought: Floats) -> float:
    """Gives the lift of the first tenth of the pairs; groups come best first, and within one all are equal."""
    return float(np.interp(_TOP, _from_nothing(pairs), _from_nothing(bought)) / _TOP)


def _from_nothing(amounts: Floats) -> Floats:
    """Gives the share of all that lies in the first groups, from none of these to all."""
    shares: Floats = np.cumsum(np.append(0.0, amounts)) / max(amounts.sum(), 1.0)
    return shares


def top_lift(order: Floats, truth: NDArray[np.bool_]) -> float:
    """Gives how many times more of the truth than of all lies in the best tenth; ties are shared out."""
    count = max(1, round(_TOP * len(order)))
    least = np.partition(order, len(order) - count)[len(order) - count]
    above, at = order > least, order == least
    hits = truth[above].sum() + truth[at].mean() * (count - above.sum())
    return float(hits / max(truth.sum(), 1) / (count / len(order)))


def _lift_curve(method: str, pairs: Floats, bought: Floats, total: float) -> list[CurvePoint]:
    """Gives the share of purchases that lies in the best so many hundredths of all pairs."""
    along, share = _from_nothing(pairs), _from_nothing(bought)
    return [
        CurvePoint(
            curve="response_lift",
            method=method,
            position=position,
            x=float(x),
            y=float(np.interp(x, along, share)),
            weight=float(total * x),
        )
        for position, x in enumerate(np.linspace(0.05, 1.0, 20), start=1)
    ]


def calibration_curve(curve: str, method: str, p: Floats, truth: Floats) -> list[CurvePoint]:
    """Gives the mean probability and how often it happened, of ten equally large bands."""
    order = np.argsort(p, kind="stable")
    # Which of equal probabilities stands in which band says nothing: what happened is shared out among them.
    _, place, count = np.unique(p, return_inverse=True, return_counts=True)
    happened = (np.bincount(place, weights=truth) / count)[place]
    return [
        CurvePoint(
            curve=curve,
            method=method,
            position=position,
            x=float(p[band].mean()),
            y=float(happened[band].mean()),
            weight=float(len(band)),
        )
        for position, band in enumerate(np.array_split(order, min(_BANDS, len(order))), start=1)
    ]


def band_curve(churn: Floats, truth: Floats) -> list[CurvePoint]:
    """Gives the mean probability of no purchase and how often none came, of each band of risk that has users."""
    band = np.array([risk_band(p) for p in churn.tolist()])
    return [
        CurvePoint(
            curve="churn_bands",
            method="pgvae",
            position=position,
            x=float(churn[own].mean()),
            y=float(truth[own].mean()),
            weight=float(np.count_nonzero(own)),
            label=name,
        )
        for position, name in enumerate(("low", "medium", "high"), start=1)
        if (own := band == name).any()
    ]


def calibration_error(p: Floats, truth: Floats) -> float:
    """Gives the expected calibration error: the mean difference of what was foretold and what happened, of ten
    equally large bands of the probability (Naeini et al. 2015).
    """
    points = calibration_curve("", "", p, truth)
    return sum(point.weight * abs(point.x - point.y) for point in points) / len(p)


def area_under_curve(p: Floats, truth: Floats) -> float:
    """Gives the share of the (buyer, other) pairs that p puts in the right order; ties count half."""
    # Mann and Whitney 1947: from the ranks, without a pair.
    buyers = truth.sum()
    return float((rankdata(p)[truth > 0].sum() - buyers * (buyers + 1) / 2) / (buyers * (len(p) - buyers)))
