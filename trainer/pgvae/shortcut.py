"""The linear item-item shortcut: the items that go with an item, found without training.

S = D_I^-1/2 R^T D_U^-1 R D_I^-1/2, the normalised co-occurrence whose largest eigenvectors are the low frequencies
of a graph filter (Shen et al. 2021, GF-CF, eq. 7), of which each item keeps its heaviest links.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pgvae.dataset import Dataset

# Entries of a block of rows of the product, which is never held whole.
_BLOCK = 16_000_000
# Of a user with more items a random part: 5000 items are 25 million pairs.
_MAX_USER_ITEMS = 1000


def shortcut(dataset: Dataset, neighbours: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Gives the items that each item is linked with and the weights, both [I, W], W <= neighbours.

    Weights are scaled so that an item's heaviest link weighs 1 in the mean. An item with fewer links is filled up with
    links to itself of weight 0.
    """
    items = len(dataset.item_keys)
    matrix = _incidence(dataset, seed)
    user_degree = np.maximum(np.asarray(matrix.sum(axis=1)).ravel(), 1.0)
    item_degree = np.maximum(np.asarray(matrix.sum(axis=0)).ravel(), 1.0)
    graph = sparse.csr_array(
        sparse.diags_array(user_degree**-0.5) @ matrix @ sparse.diags_array(item_degree**-0.5), dtype=np.float32
    )
    width = min(neighbours, items)
    near = np.repeat(np.arange(items, dtype=np.int32)[:, None], width, axis=1)
    weight = np.zeros((items, width), dtype=np.float32)
    transposed = sparse.csr_array(graph.T)
    rows = max(1, _BLOCK // items)
    for begin in range(0, items, rows):
        block = sparse.csr_array(transposed[begin : begin + rows] @ graph)
        for row in range(block.shape[0]):
            first, last = block.indptr[row], block.indptr[row + 1]
            columns, values = block.indices[first:last], block.data[first:last]
            if len(values) > width:
                heaviest = np.argpartition(values, -width)[-width:]
                columns, values = columns[heaviest], values[heaviest]
            near[begin + row, : len(values)] = columns
            weight[begin + row, : len(values)] = values
    heaviest = weight.max(axis=1, initial=0.0)
    return near, weight / max(float(heaviest[heaviest > 0].mean()) if heaviest.any() else 1.0, 1e-12)


def _incidence(dataset: Dataset, seed: int) -> sparse.csr_array:
    """Gives which user had an event on which item, [U, I]; repeated events count once."""
    items = len(dataset.item_keys)
    pairs = np.unique(dataset.user * items + dataset.item)
    user, item = pairs // items, pairs % items
    counts = np.bincount(user, minlength=dataset.user_count)
    if counts.max(initial=0) > _MAX_USER_ITEMS:
        order = np.lexsort((np.random.default_rng(seed).random(len(pairs)), user))
        place = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = order[place < _MAX_USER_ITEMS]
        user, item = user[kept], item[kept]
    ones = np.ones(len(user), dtype=np.float32)
    return sparse.csr_array((ones, (user, item)), shape=(dataset.user_count, items))
