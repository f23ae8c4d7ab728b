"""What a step learns from: the part of some histories that the encoder sees, what it must guess, and wrong answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.config import FUTURE_SHARES, TrainingConfig
from pgvae.dataset import Dataset
from pgvae_runtime.tokens import Tokens

# Of items with features so many are known by the features alone in a step, so that these learn to stand for an item
# that nobody had an event on yet.
_FEATURES_ALONE = 0.1

# With few users the batches get smaller: an epoch of three steps would learn next to nothing.
_MIN_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class Batch:
    """U users with N visible tokens, T targets and C candidates.

    `candidates` [C] are items, ascending, each target among them; candidate j stands for exp(log_multiplicity[j])
    items. Target t is the candidate `target_column[t]` for user `target_row[t]`, with the weight `target_weight[t]` in
    (0, 1].
    `alone_tokens` [N] and `alone_candidates` [C] say which are known by their features alone; None: no item has any.
    """

    tokens: Tokens
    candidates: NDArray[np.int64]
    log_multiplicity: NDArray[np.float32]
    target_row: NDArray[np.int64]
    target_column: NDArray[np.int64]
    target_weight: NDArray[np.float32]
    alone_tokens: NDArray[np.bool_] | None
    alone_candidates: NDArray[np.bool_] | None


class Batches:
    """Draws the batches of an epoch; the same seed gives the same batches."""

    def __init__(self, dataset: Dataset, config: TrainingConfig, *, max_history: int) -> None:
        self._dataset = dataset
        self._config = config
        self._max_history = max_history
        self._future_share = FUTURE_SHARES[0] if config.future_share is None else config.future_share
        self._random = np.random.default_rng(config.seed)
        self._users = np.unique(dataset.user)
        self._weight = dataset.weight / max(float(dataset.weight.max(initial=0.0)), 1e-9)
        # Items without an event are nobody's answer, and no wrong one either.
        self._items = np.flatnonzero(dataset.trained_items)
        counts = dataset.item_features.counts()
        self._has_features = counts > 0 if counts.any() and "features" not in config.without else None

    @property
    def user_count(self) -> int:
        """The users of an epoch."""
        return len(self._users)

    @property
    def steps(self) -> int:
        """The batches of an epoch."""
        return max(-(-len(self._users) // self._config.batch_size), min(_MIN_STEPS, len(self._users)))

    def state(self) -> dict[str, Any]:
        """Gives the state of the random numbers."""
        return dict(self._random.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state of the random numbers."""
        self._random.bit_generator.state = state

    def epoch(self) -> Iterator[Batch]:
        """Gives every user once."""
        for users in np.array_split(self._random.permutation(self._users), self.steps):
            yield self._batch(users)

    def _batch(self, users: NDArray[np.int64]) -> Batch:
        rows, counts = self._dataset.rows_of(users)
        row = np.repeat(np.arange(len(users)), counts)
        visible, wanted = self._hide(self._dataset.occurred_at[rows], row, counts)
        target_row, target_item, target_weight = self._targets(row[wanted], rows[wanted])
        candidates, log_multiplicity = self._candidates(target_item)
        seen = np.bincount(row[visible], minlength=len(users))
        tokens = self._dataset.history_of(users, rows[visible], seen).tokens(self._max_history)
        return Batch(
            tokens=tokens,
            candidates=candidates,
            log_multiplicity=log_multiplicity,
            target_row=target_row,
            target_column=np.searchsorted(candidates, target_item),
            target_weight=target_weight,
            alone_tokens=self._alone(tokens.item),
            alone_candidates=self._alone(candidates),
        )

    def _hide(
        self, at: NDArray[np.float64], row: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Gives which of the events of U users, in the order of time, the encoder sees, and which are targets.

        Either a random part is seen and all are targets (Liang et al. 2018, section 2.3), or what came before a moment
        is seen and what came from then on are targets, where a user has events at different times.
        """
        users = len(counts)
        random = self._random.random(len(row)) >= self._config.token_dropout
        begin = np.cumsum(counts) - counts
        cut = at[begin + (self._random.random(users) * counts).astype(np.int64)]
        by_time = (self._random.random(users) < self._future_share) & (at[begin + counts - 1] > at[begin])
        past = at < cut[row]
        return np.where(by_time[row], past, random), ~(by_time[row] & past)

    def _targets(
        self, row: NDArray[np.int64], events: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Gives (user, item, weight) of what must be guessed: of each pair the heaviest event's weight."""
        item, weight = self._dataset.item[events], self._weight[events]
        # Sorted by pair and weight, the last of each pair is its heaviest.
        order = np.lexsort((weight, item, row))
        row, item, weight = row[order], item[order], weight[order]
        last = np.append((row[1:] != row[:-1]) | (item[1:] != item[:-1]), True)[: len(row)] & (weight > 0)
        return row[last], item[last], weight[last]

    def _candidates(self, targets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Gives the items among which the targets must be found, and the logarithm of how many each stands for.

        The targets of the whole batch stand for themselves; of the other items some are drawn, and stand for all.
        """
        negatives = self._config.negatives
        if len(self._items) <= 2 * negatives:
            return self._items, np.zeros(len(self._items), dtype=np.float32)
        right = np.unique(targets)
        others = np.setdiff1d(self._random.choice(self._items, negatives), right)
        candidates = np.concatenate((right, others))
        multiplicity = np.ones(len(candidates))
        multiplicity[len(right) :] = (len(self._items) - len(right)) / max(1, len(others))
        order = np.argsort(candidates)
        return candidates[order], np.log(multiplicity[order]).astype(np.float32)

    def _alone(self, items: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        if self._has_features is None:
            return None
        drawn: NDArray[np.bool_] = (self._random.random(len(items)) < _FEATURES_ALONE) & self._has_features[items]
        return drawn
