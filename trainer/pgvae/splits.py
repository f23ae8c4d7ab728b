"""Ways to divide events into what methods learn from, what chooses their settings, and what they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae.ranking import Holdout, item_shares, make_holdout

# Without folds, validation and test are a tenth each.
_PARTS = 10
# Of a held-out user's items every fifth is to be found, the others are the history (Liang et al. 2018, section 4).
_FOLD_IN_PARTS = 5
# With fewer users than this, a metric says nothing.
MIN_USERS = 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """Events to learn from, a holdout that chooses settings, and a holdout that is touched once."""

    train: Dataset
    validation: Holdout
    test: Holdout

    @property
    def is_measurable(self) -> bool:
        """Whether both holdouts have enough users."""
        return min(len(self.validation.users), len(self.test.users)) >= MIN_USERS


def temporal(dataset: Dataset, *, folds: int = 1, seed: int = 1) -> Iterator[Split]:
    """Gives splits by time: the oldest events train, the next window validates, the one after it tests.

    One fold: 80 %, 10 % and the newest 10 % of the events. More folds: rolling origins, whose tests are the newest
    windows side by side, of 10 % each or, with more than five folds, half of the events altogether.
    """
    width = min(1 / _PARTS, 0.5 / folds)
    for fold in range(folds):
        test_from = 1 - width * (folds - fold)
        cuts = np.quantile(dataset.occurred_at, [test_from - width, test_from, min(1.0, test_from + width)])
        end = np.inf if fold == folds - 1 else cuts[2]
        train = dataset.between(-np.inf, cuts[0])
        yield Split(
            train=train,
            validation=make_holdout(train, dataset.between(cuts[0], cuts[1])),
            test=make_holdout(dataset.between(-np.inf, cuts[1]), dataset.between(cuts[1], end)),
        )


def random(dataset: Dataset, *, folds: int = 1, seed: int = 1) -> Iterator[Split]:
    """Gives splits of each user's items by chance: a tenth tests, a tenth validates.

    Of a held-out (user, item) pair no event of any type is left in the histories, so no item of a history is to be
    found, and none is ranked. With K folds every pair is in the test of one of them.
    """
    generator = np.random.default_rng(seed)
    pairs, part = deal_out(dataset, _PARTS if folds == 1 else folds, generator)
    for fold in range(folds):
        rest, test = hold_out(dataset, pairs[part == fold])
        rest_pairs, rest_part = deal_out(rest, _PARTS - 1, generator)
        train, validation = hold_out(rest, rest_pairs[rest_part == 0])
        yield Split(train=train, validation=_unseen(train, validation), test=_unseen(rest, test))


def strong(dataset: Dataset, *, folds: int = 1, seed: int = 1) -> Iterator[Split]:
    """Gives splits by user (strong generalisation, Marlin 2004; Liang et al. 2018): who is tested is never trained on.

    A tenth of the users tests, a tenth validates: of each one's items a fifth, by chance, is to be found from the
    others. With K folds every user is in the test of one of them.
    """
    generator = np.random.default_rng(seed)
    users = generator.permutation(np.unique(dataset.user))
    parts = np.array_split(users, _PARTS if folds == 1 else folds)
    for fold in range(folds):
        rest = np.concatenate([part for number, part in enumerate(parts) if number != fold])
        validating, training = np.split(rest, [max(1, len(users) // _PARTS)])
        train = _of_users(dataset, training)
        yield Split(
            train=train,
            validation=_fold_in(_of_users(dataset, validating), train, generator),
            test=_fold_in(_of_users(dataset, parts[fold]), train, generator),
        )


SPLITS: dict[str, Callable[..., Iterator[Split]]] = {"temporal": temporal, "random": random, "strong": strong}


def measurable(dataset: Dataset, *, seed: int) -> tuple[str, Split] | None:
    """Gives a split and its name: by time, or by chance where time leaves too few users; None where both do."""
    for name in ("temporal", "random"):
        split = next(SPLITS[name](dataset, seed=seed))
        if split.is_measurable:
            return name, split
    return None


def deal_out(
    dataset: Dataset, count: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Gives the pairs with a target event, and the part of each, from 0: each user's pairs are dealt out in turn."""
    pairs = dataset.pairs(dataset.targets)
    user = pairs // len(dataset.item_keys)
    order = np.lexsort((generator.random(len(pairs)), user))
    # The users start at a random part, so that those with few items leave no part short.
    offset = generator.integers(0, count, dataset.user_count)
    turn = np.arange(len(pairs)) - np.searchsorted(user, user)
    return pairs[order], (turn + offset[user]) % count


def hold_out(dataset: Dataset, pairs: NDArray[np.int64]) -> tuple[Dataset, Dataset]:
    """Gives the events on all other (user, item) pairs, and those on these."""
    chosen = np.isin(dataset.user * len(dataset.item_keys) + dataset.item, pairs)
    return dataset.of(~chosen), dataset.of(chosen)


def _fold_in(dataset: Dataset, learned: Dataset, generator: np.random.Generator) -> Holdout:
    pairs, part = deal_out(dataset, _FOLD_IN_PARTS, generator)
    before, after = hold_out(dataset, pairs[part == 0])
    return _unseen(before, after, item_share=item_shares(learned))


def _unseen(before: Dataset, after: Dataset, item_share: NDArray[np.float64] | None = None) -> Holdout:
    """Gives the holdout of pairs of which `before` has no event, so that no item of a history can be the answer.

    Whoever ranked those that were only viewed high, as a shop should, would be wrong each time.
    """
    return make_holdout(before, after, item_share=item_share, seen=range(len(before.event_types)))


def _of_users(dataset: Dataset, users: NDArray[np.int64]) -> Dataset:
    return dataset.of(np.isin(dataset.user, users))
