"""What a user will do within the horizon: probabilities of a purchase, of each item, and the number of purchases.

Linear heads on what the user did and on the model's shares of the items (docs/outcomes.md). Shapes: U users, I items,
B numbers of pgvae_runtime.behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .behaviour import behaviour
from .tokens import SECONDS_PER_DAY, History

# Tensors of a version that has heads; one without has none of them.
SHAPES: Mapping[str, str] = {
    "outcome_horizon": "1",
    "behaviour_mean": "B",
    "purchase_behaviour": "B",
    "purchase_bias": "1",
    "amount_behaviour": "B",
    "amount_bias": "1",
    "item_slope": "1",
    "item_amount": "1",
    "item_bias": "1",
}
# exp of more is no number of purchases.
MOST_LOG = 12.0
# So often that the probability is 1; beyond, SQL's exp would refuse to give next to nothing.
_MOST_RATE = 6.0
# Probability of no purchase within the horizon, from which on a risk is medium and high.
MEDIUM_RISK, HIGH_RISK = 0.5, 0.8


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What U users will do within the horizon, [U] each; nan for a user without events.

    `purchase` is the probability of any purchase, `amount` the expected number of purchases given that there is one,
    `item_offset` what the probability of an item depends on beside its score, see `item_probability`. `behaviour`
    [U, B] is what the heads have read.
    """

    purchase: NDArray[np.float64]
    amount: NDArray[np.float64]
    item_offset: NDArray[np.float64]
    behaviour: NDArray[np.float64]

    def of(self, rows: NDArray[np.int64]) -> Outlook:
        """Gives that of some of the users."""
        return Outlook(
            purchase=self.purchase[rows],
            amount=self.amount[rows],
            item_offset=self.item_offset[rows],
            behaviour=self.behaviour[rows],
        )

    @property
    def expected(self) -> NDArray[np.float64]:
        """The expected number of purchases of each user, [U]."""
        return self.purchase * self.amount


def has_heads(weights: Mapping[str, Any]) -> bool:
    """Tells whether a version's tensors hold the heads."""
    return "outcome_horizon" in weights


def horizon_of(weights: Mapping[str, Any]) -> int:
    """Gives the horizon of a version's heads, in days."""
    return int(weights["outcome_horizon"][0])


def moments(
    history: History, *, now: float, created_at: float, window_end: float, horizon: float
) -> NDArray[np.float64]:
    """Gives the moment from which the horizon of each user begins, [U]; all times in seconds since 1970.

    It is now. But a version that was made of old events, as of an archive, speaks of the time after these: after the
    newest one that it has learned from, or the user's own last event where that is later. Old is what is old for the
    forecast of demand, see vae_private.looks_ahead_from.
    """
    if created_at - window_end <= max(horizon / 4.0, 2.0) * SECONDS_PER_DAY:
        return np.full(len(history.counts), now)
    last = np.full(len(history.counts), window_end)
    np.maximum.at(last, history.users(), history.occurred_at)
    return last


def outlook(
    weights: Mapping[str, Any],
    history: History,
    as_of: NDArray[np.float64],
    *,
    targets: Sequence[int],
    types: int,
) -> Outlook:
    """Gives what U users will do after the moments `as_of` [U], in seconds since 1970.

    P(purchase) = sigmoid(w · (x - mean) + b) for the behaviour x, and the number of purchases given that there is one
    is 1 + exp(u · (x - mean) + c).
    """
    x = behaviour(history, as_of, horizon=horizon_of(weights), targets=targets, types=types)
    centred = x - weights["behaviour_mean"]
    logit = centred @ weights["purchase_behaviour"] + weights["purchase_bias"][0]
    log_more = np.minimum(centred @ weights["amount_behaviour"] + weights["amount_bias"][0], MOST_LOG)
    amount = 1.0 + np.exp(log_more)
    unknown = history.counts == 0
    columns = (sigmoid(logit), amount, weights["item_bias"][0] + weights["item_amount"][0] * np.log(amount))
    purchase, amount, offset = (np.where(unknown, np.nan, column) for column in columns)
    return Outlook(purchase=purchase, amount=amount, item_offset=offset, behaviour=x)


def item_rates(weights: Mapping[str, Any], found: Outlook, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Gives exp(offset + slope · ln score) for scores [U, …]: how often a buyer buys the item, on average."""
    shape = (-1, *(1,) * (scores.ndim - 1))
    with np.errstate(divide="ignore"):
        exponent = found.item_offset.reshape(shape) + weights["item_slope"][0] * np.log(scores, dtype=np.float64)
    rates: NDArray[np.float64] = np.exp(np.minimum(exponent, _MOST_RATE))
    return rates


def item_probability(
    weights: Mapping[str, Any], found: Outlook, scores: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Gives P(the user buys the item within the horizon) for scores [U, …], the shares that scoring gives.

    P = P(purchase) · (1 - exp(-exp(offset + slope · ln score))): whoever buys draws so many items by their shares. It
    grows with the score, and is never above P(purchase).
    """
    purchase = found.purchase.reshape((-1, *(1,) * (scores.ndim - 1)))
    probability: NDArray[np.float64] = purchase * -np.expm1(-item_rates(weights, found, scores))
    return probability


def any_probability(
    weights: Mapping[str, Any], found: Outlook, scores: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Gives P(the user buys at least one of the items within the horizon), [U], for the scores of some items, [U, N].

    Rates add up: P = P(purchase) · (1 - exp(-sum of the items' rates)).
    """
    probability: NDArray[np.float64] = found.purchase * -np.expm1(-item_rates(weights, found, scores).sum(axis=1))
    return probability


def risk_band(churn: float) -> str:
    """Gives low, medium or high for a probability of no purchase within the horizon."""
    return "high" if churn >= HIGH_RISK else "medium" if churn >= MEDIUM_RISK else "low"


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives 1 / (1 + exp(-x)), written with tanh, which does not overflow."""
    result: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * x))
    return result
