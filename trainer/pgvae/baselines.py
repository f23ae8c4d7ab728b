"""Methods that a model must be measured against, each fitted on a dataset of any events, which count alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from pgvae.dataset import Dataset
from pgvae.item_graph import (
    heaviest,
    heaviest_products,
    incidence,
    inverse_root,
    normalised,
    regressions,
    similar_items,
)
from pgvae.ranking import Holdout, Scorer, per_user_metrics, some_users
from pgvae_runtime.tokens import SECONDS_PER_DAY, History

RANK = 256
# Of the graph filter's item-item graph: the whole of it with 7000 items, 500 for each of 100 000.
EDGES = 50_000_000
# Of the sparse EASE: the work grows with the items and with the square of the neighbours.
_EASE_NEIGHBOURS = 200
_EASE_EDGES = 8_000_000
# Above this many items a dense item × item matrix and its inverse take too much memory and time.
EXACT_ITEMS = 6000
# Settings are compared on at most this many users of the validation part.
_CHOOSING_USERS = 5000
_CHOOSING_K = 20


def popularity(dataset: Dataset) -> Scorer:
    """Gives everybody the items with the most users, scored by their share of the (user, item) pairs."""
    return _same_for_all(dataset.popularity())


def recency(dataset: Dataset, *, half_life: float = 30.0) -> Scorer:
    """Gives everybody what was in demand lately: target events count half as much every `half_life` days."""
    return _recency(dataset, [half_life])[0]


def item_knn(dataset: Dataset, *, neighbours: float = 50) -> Scorer:
    """Gives the items whose neighbours the user has: shrunk cosine of the items' users (Sarwar et al. 2001).

    The similarity of two items is c_ij / (sqrt(n_i n_j) + 3); an item's score is the sum over those of its most similar
    items that are in the history.
    """
    return _item_knn(dataset, [neighbours])[0]


def ease(dataset: Dataset, *, l2: float = 100.0) -> Scorer:
    """Gives the linear item-item model with a zero diagonal that reconstructs the histories best (Steck 2019).

    Exact up to 6000 items. Beyond, each item is regressed on its 200 most similar ones at most, as in the sparse
    approximation of Steck (2019, "Markov Random Fields for Collaborative Filtering").
    """
    return _ease(dataset, [l2])[0]


def graph_filter(dataset: Dataset, *, alpha: float = 0.3) -> Scorer:
    """Gives GF-CF: neighbours in the normalised graph, plus alpha times its 256 lowest frequencies (Shen et al. 2021).

    Where the item-item graph may have more than 50 million edges, each item keeps the heaviest ones only.
    """
    return _graph_filter(dataset, [alpha])[0]


def sequential_rules(dataset: Dataset, *, steps: float = 10) -> Scorer:
    """Gives what followed the items of the user's last moment: by 1 / d, d moments later, `steps` at most.

    Kamehkhosh et al. 2017. Each item keeps the 500 heaviest rules or more, as many as the edges of the graph filter.
    """
    return _sequential_rules(dataset, [steps])[0]


class Choice(NamedTuple):
    """A method with the value of its setting that ranked best on the validation part."""

    scorer: Scorer
    value: float


def choose(name: str, dataset: Dataset, validation: Holdout, seed: int = 1) -> Choice:
    """Fits a baseline of CHOICES with the setting of its list that has the highest NDCG@20 on the validation part."""
    _, values, make = CHOICES[name]
    few = some_users(validation, _CHOOSING_USERS, seed)
    scorers = make(dataset, values)
    ndcg = [per_user_metrics(few, scorer, _CHOOSING_K)["ndcg"].mean() for scorer in scorers]
    best = int(np.argmax(ndcg))
    return Choice(scorer=scorers[best], value=values[best])


def truncated_svd(matrix: sparse.csr_array, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gives the largest singular values [R] and their right vectors [I, R] of a sparse matrix [U, I].

    Randomised subspace iteration (Halko et al. 2011, algorithm 4.4), four rounds; R is at most the smaller side.
    """
    rank = min(rank, *matrix.shape)
    width = min(rank + 32, *matrix.shape)
    basis = np.random.default_rng(1).standard_normal((matrix.shape[1], width), dtype=np.float32)
    for _ in range(4):
        basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    projected = matrix @ basis
    values, vectors = np.linalg.eigh((projected.T @ projected).astype(np.float64))
    order = np.argsort(-values)[:rank]
    largest: NDArray[np.float32] = np.sqrt(np.maximum(values[order], 0.0)).astype(np.float32)
    right: NDArray[np.float32] = basis @ vectors[:, order].astype(np.float32)
    return largest, right


def _recency(dataset: Dataset, half_lives: Sequence[float]) -> list[Scorer]:
    chosen = np.isin(dataset.event_type, dataset.targets)
    age = (dataset.occurred_at.max(initial=-np.inf) - dataset.occurred_at[chosen]) / SECONDS_PER_DAY
    scorers = []
    for half_life in half_lives:
        counts = np.bincount(dataset.item[chosen], weights=0.5 ** (age / half_life), minlength=len(dataset.item_keys))
        scorers.append(_same_for_all((counts / max(counts.sum(), 1e-300)).astype(np.float32)))
    return scorers


def _item_knn(dataset: Dataset, sizes: Sequence[float]) -> list[Scorer]:
    plain = _of_dataset(dataset)
    return [_linear(sparse.csr_array(similar_items(plain, int(size)).T)) for size in sizes]


def _graph_filter(dataset: Dataset, alphas: Sequence[float]) -> list[Scorer]:
    plain = _of_dataset(dataset)
    item_degree = np.asarray(plain.sum(axis=0)).ravel()
    graph = normalised(plain)
    near = sparse.csr_array(heaviest_products(graph, EDGES // max(1, len(item_degree))).T)
    _, low = truncated_svd(graph, RANK)
    into = inverse_root(item_degree)[:, None] * low
    back = (low * np.sqrt(item_degree)[:, None]).T

    def make(alpha: float) -> Scorer:
        def score(history: History) -> NDArray[np.float32]:
            histories = _of_history(history, len(dataset.item_keys))
            scores: NDArray[np.float32] = (histories @ near).toarray()
            if alpha:
                scores += np.float32(alpha) * ((histories @ into) @ back)
            return scores

        return score

    return [make(alpha) for alpha in alphas]


def _ease(dataset: Dataset, l2s: Sequence[float]) -> list[Scorer]:
    plain = _of_dataset(dataset)
    if plain.shape[1] > EXACT_ITEMS:
        return _sparse_ease(plain, l2s)
    gram = (plain.T @ plain).toarray()
    diagonal = np.diag_indices(len(gram))
    scorers = []
    for l2 in l2s:
        inverse = np.array(gram, dtype=np.float64)
        inverse[diagonal] += l2
        inverse = linalg.inv(inverse, overwrite_a=True, check_finite=False)
        weights = (-inverse / np.diag(inverse)).astype(np.float32)
        weights[diagonal] = 0.0
        scorers.append(_linear(weights))
    return scorers


def _sparse_ease(plain: sparse.csr_array, l2s: Sequence[float]) -> list[Scorer]:
    near = similar_items(plain, min(_EASE_NEIGHBOURS, max(1, _EASE_EDGES // plain.shape[1])))
    # Row j holds what the neighbours of item j say for it; a history is multiplied by the transpose.
    return [_linear(sparse.csr_array(weights.T)) for weights in regressions(plain, near, l2s)]


def _sequential_rules(dataset: Dataset, steps: Sequence[float]) -> list[Scorer]:
    moments, items = dataset.moments, len(dataset.item_keys)
    user = dataset.user[np.unique(moments, return_index=True)[1]]
    held = incidence(moments, dataset.item, len(user), items)
    rules = sparse.csr_array((items, items), dtype=np.float32)
    scorers = {}
    for lag in range(1, int(max(steps)) + 1):
        later = np.flatnonzero(user[lag:] == user[:-lag]) + lag
        rules = rules + sparse.csr_array(held[later - lag].T @ held[later]) / np.float32(lag)
        rules = heaviest(sparse.csr_array(rules), EDGES // items)
        scorers[lag] = _after_the_last(rules)
    return [scorers[int(each)] for each in steps]


def _after_the_last(rules: sparse.csr_array) -> Scorer:
    items = rules.shape[0]

    def score(history: History) -> NDArray[np.float32]:
        tokens = history.tokens(int(history.counts.max(initial=1)))
        last = tokens.order == 0
        scores = incidence(tokens.users()[last], tokens.item[last], tokens.user_count, items) @ rules
        dense: NDArray[np.float32] = scores.toarray()
        return dense

    return score


# Name: the setting, what is tried, and what fits the method with each of these values.
CHOICES: dict[str, tuple[str, tuple[float, ...], Callable[[Dataset, Sequence[float]], list[Scorer]]]] = {
    "recency": ("half_life", (3.0, 10.0, 30.0, 100.0), _recency),
    "item_knn": ("neighbours", (20, 50, 200, 1000), _item_knn),
    "ease": ("l2", (30.0, 100.0, 300.0, 1000.0), _ease),
    "graph_filter": ("alpha", (0.0, 0.1, 0.3, 0.5, 1.0), _graph_filter),
    "sequential_rules": ("steps", (1, 3, 10), _sequential_rules),
}


def _same_for_all(shares: NDArray[np.float32]) -> Scorer:
    def score(history: History) -> NDArray[np.float32]:
        return np.repeat(shares[None, :], len(history.counts), axis=0)

    return score


def _linear(weights: NDArray[np.float32] | sparse.csr_array) -> Scorer:
    """Gives the scores x B of histories x, with B [I, I] dense or sparse."""
    items = weights.shape[0]

    def score(history: History) -> NDArray[np.float32]:
        scores = _of_history(history, items) @ weights
        dense: NDArray[np.float32] = scores.toarray() if sparse.issparse(scores) else scores
        return dense

    return score


def _of_dataset(dataset: Dataset) -> sparse.csr_array:
    return incidence(dataset.user, dataset.item, dataset.user_count, len(dataset.item_keys))


def _of_history(history: History, items: int) -> sparse.csr_array:
    return incidence(history.users(), history.item, len(history.counts), items)
