"""What an offer changes: P(buy | exposed) - P(buy | withheld) of a user and an item (docs/outcomes.md).

One logistic regression of whoever was exposed by chance and whoever was not, an S-learner with interactions (Künzel et
al. 2019); on the logit scale both terms are linear in what scoring knows anyway. Shapes: U users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outcomes import sigmoid

# Tensors of a version that claims uplift; one that claims none has none of them.
SHAPES: Mapping[str, str] = {"uplift_response": "4", "uplift_effect": "4", "uplift_low": "3", "uplift_high": "3"}
_LEAST = 1e-12


def has_uplift(weights: Mapping[str, Any]) -> bool:
    """Tells whether a version's tensors hold the head of uplift."""
    return "uplift_effect" in weights


def inputs_of(
    response: NDArray[np.float64], purchase: NDArray[np.float64], has_bought: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Gives what the head reads, [U, 3]: the logits of P(item) and P(any purchase), and whether the item was bought."""
    columns = [_logit(response), _logit(purchase), has_bought.astype(np.float64)]
    return np.column_stack(columns)


def uplift_of(weights: Mapping[str, Any], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives P(buy | exposed) - P(buy | withheld), [U], for inputs [U, 3]; nan for who has no probabilities.

    logit P = r · (x, 1) + exposed · e · (x, 1). An x that the experiment did not see counts as the nearest that it did.
    """
    x = np.clip(inputs, weights["uplift_low"], weights["uplift_high"])
    response, effect = (
        x @ weights[name][:-1].astype(np.float64) + weights[name][-1] for name in ("uplift_response", "uplift_effect")
    )
    uplift: NDArray[np.float64] = sigmoid(response + effect) - sigmoid(response)
    return uplift


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(p, _LEAST, 1.0 - _LEAST)
    logit: NDArray[np.float64] = np.log(p) - np.log1p(-p)
    return logit
