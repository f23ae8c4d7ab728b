"""Methods that a model must be measured against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pgvae.dataset import Dataset
from pgvae.ranking import Scorer
from pgvae_runtime.tokens import History


def popularity(dataset: Dataset) -> Scorer:
    """Gives everybody the items with the most users."""
    shares = dataset.popularity()

    def score(history: History) -> NDArray[np.float32]:
        return np.repeat(shares[None, :], len(history.counts), axis=0)

    return score


def item_cooccurrence(dataset: Dataset) -> Scorer:
    """Gives the items that go with the user's: cosine of the items' user sets (Sarwar et al. 2001)."""
    incidence = _incidence(dataset.user, dataset.item, dataset.user_count, len(dataset.item_keys))
    norms = np.sqrt(np.asarray(incidence.sum(axis=0)).ravel())
    scaled = incidence @ sparse.diags_array(1.0 / np.maximum(norms, 1.0)).astype(np.float32)
    similarity = (scaled.T @ scaled).tocsr()
    similarity.setdiag(0)

    def score(history: History) -> NDArray[np.float32]:
        baskets = _incidence(history.users(), history.item, len(history.counts), len(dataset.item_keys))
        scores: NDArray[np.float32] = (baskets @ similarity).toarray()
        return scores

    return score


def _incidence(user: NDArray[np.int64], item: NDArray[np.int64], users: int, items: int) -> sparse.csr_array:
    matrix = sparse.csr_array((np.ones(len(user), dtype=np.float32), (user, item)), shape=(users, items))
    # Repeated events on one item count once.
    matrix.data[:] = 1.0
    return matrix
