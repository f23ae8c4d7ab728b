"""The linear item-item shortcut: what each item of a history says for other items, beside the autoencoder.

Several ways to weigh the links are made, and the validation part chooses. Whichever it is, an item that can be
recommended is linked from `neighbours` others: chosen per recommended item, rare ones keep theirs. An item speaks for
four times as many at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pgvae.dataset import Dataset
from pgvae.item_graph import (
    bounded_events,
    heaviest,
    heaviest_products,
    incidence,
    normalised,
    regressions,
    similar_items,
    successions,
)
from pgvae_runtime.tokens import recency_of_orders

_COOCCURRENCE = "cooccurrence"
# The ways by regression, and their penalties.
_REGRESSIONS = {"regression_30": 30.0, "regression_100": 100.0, "regression_500": 500.0}
# The ways by what came before what: what an item counts that came 0, 1, … moments before another one.
_NEAR = 1.0 / (1.0 + np.arange(1, 11, dtype=np.float32))
_SUCCESSIONS = {
    "transitions": np.concatenate(([0.0], _NEAR), dtype=np.float32),
    "baskets": np.concatenate(([1.0], 0.3 * _NEAR), dtype=np.float32),
}
UNORDERED_WAYS = (_COOCCURRENCE, *_REGRESSIONS)
WAYS = (*UNORDERED_WAYS, *_SUCCESSIONS)
# Links from an item, at most, in multiples of the links to one.
_MOST_LINKS = 4


@dataclass(frozen=True, kw_only=True)
class Links:
    """L weighted links: item i speaks for item[start[i]:start[i + 1]]; `start` is [I + 1], `item` and `weight` [L].

    The weights are scaled so that the heaviest link of an item weighs 1 in the mean. `recency` [O] is what the items of
    a history weigh by the order of their latest event.
    """

    start: NDArray[np.int32]
    item: NDArray[np.int32]
    weight: NDArray[np.float32]
    recency: NDArray[np.float32] = field(default_factory=partial(recency_of_orders, 0.0))

    def fading(self, exponent: float) -> Links:
        """Gives the same links with items that fade by (1 + moments after them)^-exponent."""
        return replace(self, recency=recency_of_orders(exponent))

    def tensors(self, scale: float = 1.0) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
        """Gives the tensors of pgvae_runtime.forward.SHAPES, the weights times `scale`."""
        return {
            "shortcut_start": self.start,
            "shortcut_item": self.item,
            "shortcut_weight": self.weight * np.float32(scale),
            "shortcut_recency": self.recency,
        }

    @staticmethod
    def none(items: int) -> Links:
        """Gives no link between so many items."""
        return Links(start=np.zeros(items + 1, np.int32), item=np.zeros(0, np.int32), weight=np.zeros(0, np.float32))


def shortcuts(dataset: Dataset, neighbours: int, seed: int, ways: Sequence[str] = WAYS) -> dict[str, Links]:
    """Gives the links of these ways, by their names.

    cooccurrence: D_I^-1/2 R^T D_U^-1 R D_I^-1/2, the normalised item-item graph (Shen et al. 2021, GF-CF, eq. 7).
    regression: each item regressed on its most similar ones, with an L2 penalty (as EASE, Steck 2019, restricted to a
    sparse graph), for each of three penalties. transitions: what came up to ten moments before a user's first event on
    an item. baskets: what came at the same moment, and, for less, before.
    """
    user, item, moment = bounded_events(dataset, seed)
    items = len(dataset.item_keys)
    matrix = incidence(user, item, dataset.user_count, items)
    found = {}
    if _COOCCURRENCE in ways:
        found[_COOCCURRENCE] = heaviest_products(normalised(matrix), neighbours)
    l2s = [l2 for way, l2 in _REGRESSIONS.items() if way in ways]
    if l2s:
        solved = regressions(matrix, similar_items(matrix, neighbours), l2s)
        found |= dict(zip([way for way in _REGRESSIONS if way in ways], solved, strict=True))
    for way in [way for way in _SUCCESSIONS if way in ways]:
        found[way] = successions(user, item, moment, items, neighbours, _SUCCESSIONS[way])
    # Row j of each holds what other items say for item j. A best seller speaks for thousands: without a bound on that
    # too, its links would cost more than the whole catalogue's product.
    most = _MOST_LINKS * neighbours
    return {name: _links(heaviest(sparse.csr_array(weights.T), most)) for name, weights in found.items()}


def _links(matrix: sparse.csr_array) -> Links:
    matrix.sum_duplicates()
    largest = np.asarray(abs(matrix).max(axis=1).todense()).ravel() if matrix.nnz else np.zeros(0)
    unit = float(largest[largest > 0].mean()) if (largest > 0).any() else 1.0
    return Links(
        start=matrix.indptr.astype(np.int32),
        item=matrix.indices.astype(np.int32),
        weight=(matrix.data / unit).astype(np.float32),
    )
