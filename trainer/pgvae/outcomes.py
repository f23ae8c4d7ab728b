"""Fits the heads of a version (docs/outcomes.md): who will buy within the horizon, how much, and which items.

A window is a moment t: what the heads read is the history before t, the truth is what happened in the horizon after.
Windows stand side by side, back from the newest event. The newest one checks, the one before it calibrates, all older
ones fit; then everything is fitted again for the version, the newest window calibrating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae.outcome_figures import measure
from pgvae.outcome_windows import (
    Floats,
    Seen,
    Setting,
    Weights,
    as_seen,
    in_half,
    log_loss,
    read_window,
    score_parts,
    too_little,
    windows,
)
from pgvae.regression import fit_cloglog, fit_logistic, fit_platt, fit_poisson, standardising
from pgvae.rows import CurvePoint, Metric
from pgvae_runtime import forward
from pgvae_runtime.outcomes import MOST_LOG, sigmoid

# Penalties of the coefficients, per row and of standardised numbers.
_RIDGES = (1e-4, 1e-3, 1e-2)
_AMOUNT_RIDGE = 1e-2
# Whatever the window says, a higher score keeps the higher probability.
_LEAST_SLOPE = 0.05
# Of a buyer's items that were not bought, the best and so many others, which stand for all others.
_BEST_ITEMS = 256
_OTHER_ITEMS = 256
_MOST_BUYERS = 2_000


@dataclass(frozen=True, kw_only=True)
class OutcomeFit:
    """Heads as tensors, by the names of pgvae_runtime.outcomes.SHAPES, and how the same procedure did a horizon ago.

    `tensors` is empty where there is too little to learn from; `missing` then says why.
    """

    tensors: dict[str, NDArray[Any]]
    metrics: list[Metric]
    curves: list[CurvePoint]
    missing: str = ""


def fit_outcomes(
    dataset: Dataset, *, earlier: Weights, earlier_end: float, horizon: int, max_history: int, seed: int
) -> OutcomeFit:
    """Gives the heads of a version, and how good the same procedure was without the newest horizon, on it.

    `earlier` are weights of a network that learned from the events before `earlier_end` only. They are measured, and
    the odds of items are fitted with them: a network's shares of items that it has learned from are too sure of
    themselves. ValueError where that network learned from the newest horizon.
    """
    if why := too_little(dataset, horizon, seed):
        return OutcomeFit(tensors={}, metrics=[], curves=[], missing=why)
    setting = Setting(dataset=dataset, horizon=horizon, max_history=max_history, seed=seed)
    seen = [as_seen(window, setting) for window in windows(dataset, horizon, seed)]
    newest = seen[0].window
    if earlier_end > newest.moment:
        raise ValueError("the earlier network has learned from the newest horizon")
    checked = _fit(seen[2:], seen[1], setting)
    # Where the network has learned from the beginning of that horizon, one that begins later. It overlaps the newest,
    # so that one half of the users fits and the other half checks.
    later = max(seen[1].window.moment, earlier_end)
    of_items = as_seen(read_window(dataset, later, horizon, seed), setting)
    if why := _too_few_buyers({0: of_items, 1: seen[0]}):
        return OutcomeFit(tensors={}, metrics=[], curves=[], missing=why)
    checked |= _fit_items(of_items, earlier, checked, setting, half=0)
    metrics, curves = measure(seen, {**earlier, **checked}, setting)
    return OutcomeFit(tensors=_heads(seen, earlier, setting), metrics=metrics, curves=curves)


def _too_few_buyers(seen: Mapping[int, Seen]) -> str:
    """Says where the odds of items can be neither fitted nor checked: in a window of whose half nobody bought."""
    for half, own in seen.items():
        window = own.window
        if not window.purchases[in_half(window.users, half)].any():
            begin = datetime.fromtimestamp(window.moment, UTC)
            return (
                f"nobody in one half of the users bought in the horizon from {begin:%Y-%m-%d} on, so that nothing tells"
                " who buys which item"
            )
    return ""


def fit_heads(setting: Setting, earlier: Weights, earlier_end: float) -> dict[str, NDArray[Any]]:
    """Gives the heads that fit_outcomes gives, unmeasured."""
    seen = [as_seen(window, setting) for window in windows(setting.dataset, setting.horizon, setting.seed)]
    if earlier_end > seen[0].window.moment:
        raise ValueError("the earlier network has learned from the newest horizon")
    return _heads(seen, earlier, setting)


def _heads(seen: Sequence[Seen], earlier: Weights, setting: Setting) -> dict[str, NDArray[Any]]:
    tensors = _fit(seen[1:], seen[0], setting)
    tensors |= _fit_items(seen[0], earlier, tensors, setting)
    return {name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}


def _fit(fitting: Sequence[Seen], calibrating: Seen, setting: Setting) -> dict[str, NDArray[Any]]:
    """Gives the heads of any purchase and of the number of purchases.

    The ridge is the one with which the calibrating window is foretold best.
    """
    x = np.concatenate([seen.behaviour for seen in fitting])
    y = np.concatenate([seen.window.has_bought for seen in fitting])
    mean, scale = standardising(x)
    standard = (x - mean) / scale
    truth = calibrating.window.has_bought
    candidates = []
    for ridge in _RIDGES:
        fitted = fit_logistic(standard, y, np.full(x.shape[1], ridge))
        logit = (calibrating.behaviour - mean) @ (fitted[:-1] / scale) + fitted[-1]
        # On a later window.
        slope, intercept = fit_platt(logit, truth, least=_LEAST_SLOPE)
        loss = float(log_loss(sigmoid(slope * logit + intercept), truth).mean())
        candidates.append((loss, slope * fitted[:-1] / scale, slope * fitted[-1] + intercept))
    _, own, bias = min(candidates, key=lambda candidate: candidate[0])
    buyers = y > 0
    more = np.concatenate([seen.window.purchases for seen in fitting])[buyers] - 1.0
    amount = fit_poisson(standard[buyers], more, np.full(x.shape[1], _AMOUNT_RIDGE), most=MOST_LOG)
    expected = _amount(calibrating.behaviour, mean, amount[:-1] / scale, amount[-1])[truth > 0]
    happened = calibrating.window.purchases[truth > 0]
    # As many more than one as there were in the calibrating window.
    shift = np.log(max((happened - 1.0).sum(), 1e-3) / max((expected - 1.0).sum(), 1e-3))
    return {
        "outcome_horizon": np.array([setting.horizon]),
        "behaviour_mean": mean,
        "purchase_behaviour": own,
        "purchase_bias": np.array([bias]),
        "amount_behaviour": amount[:-1] / scale,
        "amount_bias": np.array([amount[-1] + shift]),
    }


def _amount(x: Floats, mean: Floats, weight: Floats, bias: float) -> Floats:
    amount: Floats = 1.0 + np.exp(np.minimum((x - mean) @ weight + bias, 12.0))
    return amount


def _fit_items(
    seen: Seen,
    weights: Weights,
    tensors: Mapping[str, NDArray[Any]],
    setting: Setting,
    *,
    half: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Gives the head of items, fitted to what the buyers of a window bought and left.

    P(item | purchase) = 1 - exp(-exp(bias + amount · ln m + slope · ln s)) for the user's m, the expected number of
    purchases, and s, the item's share.
    """
    random = np.random.default_rng(setting.seed)
    window = seen.window
    buyers = np.flatnonzero((window.purchases > 0) & in_half(window.users, half))
    if len(buyers) > _MOST_BUYERS:
        buyers = np.sort(random.choice(buyers, _MOST_BUYERS, replace=False))
    amounts = np.log(
        _amount(seen.behaviour, tensors["behaviour_mean"], tensors["amount_behaviour"], tensors["amount_bias"][0])
    )
    log_share, amount, bought, count = [], [], [], []
    for users, _, scores in score_parts(window.history, buyers, weights, setting):
        items = scores.shape[1]
        truth = np.zeros(scores.shape, dtype=bool)
        own = np.isin(window.bought_user, users)
        truth[np.searchsorted(users, window.bought_user[own]), window.bought_item[own]] = True
        stands_for = np.zeros(scores.shape, dtype=np.float64)
        best = forward.top_k(scores, min(_BEST_ITEMS, items))[0]
        rest = max(0, items - best.shape[1])
        if rest:
            # An item may be drawn more than once; it then stands for so many times as many.
            others = random.integers(0, items, (len(users), _OTHER_ITEMS))
            np.add.at(stands_for, (np.arange(len(users))[:, None], others), items / _OTHER_ITEMS)
        np.put_along_axis(stands_for, best, 1.0, axis=1)
        stands_for[truth] = 1.0
        row, item = np.nonzero((stands_for > 0) & (scores > 0))
        log_share.append(np.log(scores[row, item], dtype=np.float64))
        amount.append(amounts[users][row])
        bought.append(truth[row, item])
        count.append(stands_for[row, item])
    matrix = np.column_stack((np.concatenate(log_share), np.concatenate(amount), np.ones(sum(map(len, bought)))))
    slope, of_amount, bias = fit_cloglog(matrix, np.concatenate(bought), np.concatenate(count), least=_LEAST_SLOPE)
    return {"item_slope": np.array([slope]), "item_amount": np.array([of_amount]), "item_bias": np.array([bias])}
