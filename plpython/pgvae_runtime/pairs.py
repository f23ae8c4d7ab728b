"""Scores many pairs of user and item at once: each user's history is read and encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, limits, runs
from .batch import Batch, score_on_cpu
from .cpu import CpuScorer
from .errors import INVALID_PARAMETER, ScoringError
from .history import read_chosen
from .ragged import ranges
from .scoring import score_users
from .session import check_flat
from .store import Version
from .tokens import History

# (user key, item key, score)
Row = tuple[str | None, str | None, float | None]

# A scorer for many users takes some 0.1 s to make: with 20 000 items it pays from one or two hundred users on.
_FEW = 128


def score_pairs(
    plpy: Any, version: Version, user_keys: Sequence[str | None], item_keys: Sequence[str | None]
) -> Iterator[Row]:
    """Gives (user key, item key, score) of each pair, a user's pairs one after the other.

    The score is what `score` gives; None where a key is null or the item outside the catalogue. ScoringError where the
    lists differ in length, or hold lists.
    """
    check_flat("user_ids", user_keys)
    check_flat("item_ids", item_keys)
    if len(user_keys) != len(item_keys):
        raise ScoringError(
            f"item_ids has {len(item_keys)} elements, user_ids has {len(user_keys)}",
            sqlstate=INVALID_PARAMETER,
            hint="the arrays belong together: make them with array_agg over the same rows in the same order",
        )
    return _scored(plpy, version, user_keys, item_keys)


def _scored(
    plpy: Any, version: Version, user_keys: Sequence[str | None], item_keys: Sequence[str | None]
) -> Iterator[Row]:
    users = list(dict.fromkeys(key for key in user_keys if key is not None))
    pairs = _Pairs(users, user_keys, _items(version, item_keys))
    done = 0
    for pair in pairs.without_user.tolist():
        yield user_keys[pair], item_keys[pair], None
    for own, scores in _in_batches(plpy, version, users, pairs):
        for pair, score in zip(own.tolist(), scores.tolist(), strict=True):
            # No score is below 0: an item outside the catalogue.
            yield user_keys[pair], item_keys[pair], score if score >= 0 else None
        done += len(own)
        runs.report_progress(plpy, f"pgvae {version.model}: {done} pairs scored")


def _items(version: Version, item_keys: Sequence[str | None]) -> NDArray[np.int64]:
    """Gives the row of each item in the tensors, [P]; -1 outside the catalogue."""
    index = version.item_keys.items({key for key in item_keys if key is not None})
    return np.fromiter((-1 if key is None else index.get(key, -1) for key in item_keys), np.int64, count=len(item_keys))


class _Pairs:
    """P pairs of user and item, found by user."""

    def __init__(self, users: Sequence[str], user_keys: Sequence[str | None], item: NDArray[np.int64]) -> None:
        self._number: dict[str | None, int] = {key: number for number, key in enumerate(users)}
        user = np.fromiter((self._number.get(key, -1) for key in user_keys), np.int64, count=len(user_keys))
        self._order = np.argsort(user, kind="stable")
        self._start = np.searchsorted(user[self._order], np.arange(len(users) + 1))
        self._item = item
        self.without_user = self._order[: self._start[0]]
        # Of a user in the mean.
        self.of_each = -(-len(user) // max(1, len(users)))

    def of(self, users: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Gives the numbers of these users' pairs, each one's user (a number in `users`), and each one's item."""
        number = np.array([self._number[key] for key in users], dtype=np.int64)
        first, count = self._start[number], self._start[number + 1] - self._start[number]
        user = np.repeat(np.arange(len(users)), count)
        pair = self._order[ranges(first, count)]
        return pair, user, self._item[pair]


def _in_batches(
    plpy: Any, version: Version, users: list[str], pairs: _Pairs
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Gives the numbers of pairs and their scores, -1 outside the catalogue."""

    read = partial(read_chosen, plpy, version, users)

    def of_few(history: History, user: NDArray[np.int64], item: NDArray[np.int64]) -> NDArray[np.float32]:
        scores, _ = score_users(version.weights, history, max_history=version.max_history)
        found: NDArray[np.float32] = scores[user, item]
        return found

    with blas.one_thread():
        if len(users) <= _FEW:
            # Logits, scores and what the softmax makes of them.
            size = limits.users_at_once(plpy, 4 * 4 * version.item_count, _FEW)
            yield from (_scores(pairs, batch, of_few) for batch in read(size))
        else:

            def score(scorer: CpuScorer, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
                return _scores(pairs, batch, scorer.of_pairs)

            with closing(score_on_cpu(plpy, version, read, score, numbers=pairs.of_each)) as scored:
                yield from scored


def _scores(
    pairs: _Pairs,
    batch: Batch,
    of_pairs: Callable[[History, NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Gives the numbers of a batch's pairs and their scores, of those outside the catalogue -1."""
    own, user, item = pairs.of(batch[0])
    known = item >= 0
    scores = np.full(len(own), -1, dtype=np.float32)
    scores[known] = of_pairs(batch[1].distinct(), user[known], item[known])
    return own, scores
