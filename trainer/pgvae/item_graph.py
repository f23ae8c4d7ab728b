"""Sparse products of items with items: what convolution, shortcut and baselines are made of. No item × item matrix is
held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

from pgvae.dataset import Dataset
from pgvae_runtime.ragged import pieces, places

# Of the cosine: two users in common shall not make two rare items twins.
_SHRINKAGE = 3.0
# Entries of a block of an item × item product.
_BLOCK = 16_000_000
# Of a user with more items a random part: 5000 items are 25 million pairs.
_MAX_USER_ITEMS = 1000
# How much the rows of others weigh in an item's, beside 1 for its own, as long as it has few users, and at how many
# users half as much.
_MOST_WEIGHT = 2.0
_WELL_KNOWN = 50.0


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """What the rows of items lean on: row i becomes its own plus the sum over k of weight[i, k] · row item[i, k].

    `item` and `weight` are [I, K]; an item with fewer than K neighbours has weights of 0.
    """

    item: NDArray[np.int64]
    weight: NDArray[np.float32]


def convolution(dataset: Dataset, neighbours: int, seed: int) -> Convolution:
    """Gives the graph convolution of a catalogue: each item's most similar ones, by their shares of the
    similarity, times 2 / (1 + n / 50) for an item with n users.

    A light graph convolution (He et al. 2020, LightGCN, eq. 3) on the item-item graph, fading as an item gets known.
    """
    user, item, _ = bounded_events(dataset, seed)
    matrix = incidence(user, item, dataset.user_count, len(dataset.item_keys))
    near = similar_items(matrix, neighbours)
    counts = np.diff(near.indptr)
    row = np.repeat(np.arange(len(counts)), counts)
    place = places(counts)
    others = np.zeros((len(counts), neighbours), dtype=np.int64)
    weight = np.zeros((len(counts), neighbours), dtype=np.float32)
    others[row, place] = near.indices
    weight[row, place] = near.data
    users = np.asarray(matrix.sum(axis=0)).ravel()
    weight *= (_MOST_WEIGHT / (1.0 + users / _WELL_KNOWN) / np.maximum(weight.sum(axis=1), 1e-9))[:, None]
    return Convolution(item=others, weight=weight)


def bounded_events(dataset: Dataset, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Gives user, item and moment of the events, of a user with too many items those on a random part of them."""
    user, item, moment = dataset.user, dataset.item, dataset.moments
    pairs = dataset.pairs()
    owner = pairs // len(dataset.item_keys)
    counts = np.bincount(owner)
    if counts.max(initial=0) <= _MAX_USER_ITEMS:
        return user, item, moment
    order = np.lexsort((np.random.default_rng(seed).random(len(pairs)), owner))
    place = places(counts)
    kept = np.isin(user * len(dataset.item_keys) + item, pairs[order[place < _MAX_USER_ITEMS]])
    return user[kept], item[kept], moment[kept]


def incidence(user: NDArray[np.int64], item: NDArray[np.int64], users: int, items: int) -> sparse.csr_array:
    """Gives which user had an event on which item, [U, I]; repeated events count once."""
    matrix = sparse.csr_array((np.ones(len(user), dtype=np.float32), (user, item)), shape=(users, items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def similar_items(plain: sparse.csr_array, neighbours: int) -> sparse.csr_array:
    """Gives the shrunk cosine of each item with the items that are most similar to it, itself left out, [I, I]."""
    users = np.asarray(plain.sum(axis=0)).ravel()

    def cosine(rows: NDArray[np.int64], columns: NDArray[np.int64], together: NDArray[np.float32]) -> None:
        together /= np.sqrt(users[rows] * users[columns]) + np.float32(_SHRINKAGE)
        together[rows == columns] = 0.0

    return heaviest_products(plain, neighbours, cosine)


def successions(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    moment: NDArray[np.int64],
    items: int,
    neighbours: int,
    lags: NDArray[np.float32],
) -> sparse.csr_array:
    """Gives how often other items came shortly before a user's first event on an item, [I, I]: row j holds what speaks
    for item j, its `neighbours` largest entries.

    Events are in the order of user and `moment`, numbers from 0 that no two users share. An item that came d moments
    before counts lags[d]; the sum is divided by the root of the two items' users, as in `similar_items` (the
    transitions of Choi et al. 2021, SLIT, counted and not solved for).
    """
    begins = np.append(True, moment[1:] != moment[:-1])
    held = incidence(moment, item, int(moment[-1]) + 1, items)
    # How many moments of the user came before the event's.
    earlier = moment - moment[begins][np.searchsorted(user[begins], user)]
    first = np.unique(user * items + item, return_index=True)[1]
    first = first[np.argsort(item[first], kind="stable")]
    start = np.searchsorted(item[first], np.arange(items + 1))
    users = np.diff(start).astype(np.float32)
    # What is looked at before the first events on an item can be more than its row of the product.
    work = np.cumsum(np.maximum(np.diff(start) * len(lags), items))
    blocks = []
    for begin, end in pieces(work, _BLOCK):
        event = first[start[begin] : start[end]]
        counts = np.minimum(earlier[event], len(lags) - 1) + 1
        own = np.repeat(event, counts)
        lag = places(counts)
        own, lag = own[lags[lag] > 0], lag[lags[lag] > 0]
        before = sparse.csr_array(
            (lags[lag], (item[own] - begin, moment[own] - lag)), shape=(end - begin, held.shape[0])
        )
        block = sparse.csr_array(before @ held)
        row = np.repeat(np.arange(begin, end), np.diff(block.indptr))
        block.data /= np.sqrt(users[row] * users[block.indices]) + np.float32(_SHRINKAGE)
        block.data[row == block.indices] = 0.0
        blocks.append(heaviest(block, neighbours))
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def heaviest_products(
    matrix: sparse.csr_array,
    neighbours: int,
    change: Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], None] | None = None,
) -> sparse.csr_array:
    """Gives the item-item product of a matrix [U, I], [I, I], of which each row keeps its largest entries.

    `change` alters entries, given their rows and columns, in place before the choice. The product is made in blocks of
    rows: it is never held whole.
    """
    items = matrix.shape[1]
    transposed = sparse.csr_array(matrix.T)
    rows = max(1, _BLOCK // items)
    blocks = []
    for begin in range(0, items, rows):
        block = sparse.csr_array(transposed[begin : begin + rows] @ matrix)
        if change is not None:
            row = np.repeat(np.arange(begin, begin + block.shape[0]), np.diff(block.indptr))
            change(row, block.indices, block.data)
        blocks.append(heaviest(block, neighbours))
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def heaviest(matrix: sparse.csr_array, count: int) -> sparse.csr_array:
    """Gives the matrix with the `count` entries of each row whose absolute values are the largest."""
    matrix = matrix.copy()
    for start, end in pairwise(matrix.indptr):
        if end - start > count:
            values = matrix.data[start:end]
            values[np.argpartition(np.abs(values), -count)[:-count]] = 0.0
    matrix.eliminate_zeros()
    return matrix


def regressions(plain: sparse.csr_array, near: sparse.csr_array, l2s: Sequence[float]) -> list[sparse.csr_array]:
    """Gives, for each penalty, the weights with which an item's neighbours foretell it, [I, I], where `near` has links.

    Row j solves min |x_j - X_N w|^2 + l2 |w|^2 over the neighbours N of item j: EASE (Steck 2019) on a sparse graph.
    """
    by_item = sparse.csc_array(plain)
    weights = np.zeros((len(l2s), near.nnz), dtype=np.float32)
    # Two threads of OpenBLAS would wait for each other in each of these small systems, on a busy machine for 70 ms.
    with threadpool_limits(1, user_api="blas"):
        for item, (begin, end) in enumerate(pairwise(near.indptr)):
            if begin == end:
                continue
            columns = by_item[:, np.append(near.indices[begin:end], item)]
            gram = (columns.T @ columns).toarray().astype(np.float64)
            for number, l2 in enumerate(l2s):
                system = gram[:-1, :-1] + l2 * np.eye(end - begin)
                weights[number, begin:end] = np.linalg.solve(system, gram[:-1, -1])
    return [sparse.csr_array((own, near.indices, near.indptr), shape=near.shape) for own in weights]


def normalised(plain: sparse.csr_array) -> sparse.csr_array:
    """Gives D_U^-1/2 R D_I^-1/2 of a matrix R, [U, I], with D its sums: a factor of the normalised item-item graph."""
    users, items = (sparse.diags_array(inverse_root(np.asarray(plain.sum(axis=axis)).ravel())) for axis in (1, 0))
    return sparse.csr_array(users @ plain @ items)


def inverse_root(degree: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives degree^-1/2, and 0 for 0."""
    scale: NDArray[np.float32] = np.where(degree > 0, 1.0 / np.sqrt(np.maximum(degree, 1.0)), 0.0).astype(np.float32)
    return scale
