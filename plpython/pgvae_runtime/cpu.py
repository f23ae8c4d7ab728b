"""Scores many users on the CPU: what scoring.py specifies, arranged for the caches.

A tile of users × items is small enough to stay in the cache from the matrix product to its best items. Where the time
goes and what was tried: docs/scoring.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas
from .forward import decode_direction, linked_items, mean_of_features, mean_of_latent, softmax, top_k
from .ragged import pieces, places, ranges, starts
from .scoring import seen_columns, unknown_users
from .store import Version
from .tokens import History, Tokens

Floats = NDArray[np.float32]
# Best items [U, k], their scores [U, k] (-1 behind the last one), and which users are cold starts [U].
Scored = tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]

# Logits of a tile. A third of the third-level cache of a server's core and more costs nothing that was measured.
_TILE_BYTES = 10 * 1024 * 1024
_MAX_TILE = 256
# Columns at most that are finished before the next ones: 100 000 users take 12.4 s of one core with so many, 13.0 with
# 2048, and 13.3 with all 20 000 at once.
_PANEL = 5120
# Columns of a group at most, whose maximum is kept, in powers of two: the threshold needs four times k groups at least.
_MAX_GROUP, _GROUPS_FOR_EACH = 16, 4
# Panels are so many columns or a multiple: maxima of groups can then be halved a few times.
_GRANULE = 4 * _MAX_GROUP
# Links are kept in segments of so many: one of them is gathered as one cache line.
_SEGMENT = 16
# Segments that are added at once, 16 * 20 bytes each.
_SEGMENTS_AT_ONCE = 8192
# Links that are put into segments at once, some 80 bytes each meanwhile.
_LINKS_AT_ONCE = 262_144
# What a link and an event need while they are at work, in arrays of eight bytes an element.
_BYTES_OF_A_LINK, _BYTES_OF_AN_EVENT = 80, 200
# Tokens whose embeddings are gathered at once, and then added up by one dense product with their gates.
_TOKENS_AT_ONCE = 256
# Exponentials are taken of the logits as they are, unless their sum falls out of this range, or one of the best is
# smaller than what float32 holds to its full precision.
_SMALLEST_SUM, _LARGEST_SUM, _SMALLEST = 1e-20, 1e30, np.finfo(np.float32).tiny


@dataclass(frozen=True, kw_only=True)
class _Links:
    """The shortcut in S segments: item i of the catalogue owns start[i] to start[i + 1] of `item`, `weight` [S, 16].

    A segment's empty places have weight 0 and the item number I, a column that is no item.
    """

    start: NDArray[np.int64]
    item: NDArray[np.int32]
    weight: Floats

    @staticmethod
    def of(weights: dict[str, Any]) -> _Links | None:
        linked, weight = weights["shortcut_item"], weights["shortcut_weight"]
        items = len(weights["item_popularity"])
        if not len(linked):
            return None
        # The catalogue may be larger than what is ranked.
        given = weights["shortcut_start"].astype(np.int64)
        start = starts(-(-np.diff(given) // _SEGMENT))
        padded_item = np.full((int(start[-1]), _SEGMENT), items, dtype=np.int32)
        padded_weight = np.zeros((int(start[-1]), _SEGMENT), dtype=np.float32)
        for first, last in pieces(given[1:], _LINKS_AT_ONCE):
            own = slice(given[first], given[last])
            owner = np.repeat(np.arange(first, last), np.diff(given[first : last + 1]))
            # Links of one item must lead to different items to be added at once: of the same, the first has the sum.
            cells = owner * items + linked[own]
            _, first_of, place_of = np.unique(cells, return_index=True, return_inverse=True)
            total = np.bincount(place_of, weights=weight[own], minlength=len(first_of))
            place = np.arange(len(owner)) + start[owner] * _SEGMENT + given[first] - given[owner]
            padded_item.reshape(-1)[place[first_of]] = linked[own][first_of]
            padded_weight.reshape(-1)[place[first_of]] = total
        return _Links(start=start, item=padded_item, weight=padded_weight)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a tile is: so many users, and panels of so many columns, of which each `group` have their maximum kept."""

    users: int
    panels: int
    panel: int
    group: int

    @staticmethod
    def of(items: int, k: int) -> _Shape:
        # At least one column more than items: the links' empty places.
        panels = -(-(items + 1) // _PANEL)
        panel = -(-(items + 1) // (panels * _GRANULE)) * _GRANULE
        return _Shape(
            users=max(1, min(_MAX_TILE, _TILE_BYTES // (4 * panels * panel))),
            panels=panels,
            panel=panel,
            group=1 << min(_MAX_GROUP.bit_length(), max(1, (items // (_GROUPS_FOR_EACH * k)).bit_length())) - 1,
        )

    @property
    def columns(self) -> int:
        """The columns of a tile."""
        return self.panels * self.panel

    @property
    def groups(self) -> int:
        """The number of groups of a tile."""
        return self.columns // self.group

    @property
    def stride(self) -> int:
        """The places between two users; a power of two would let all rows compete for the same few cache sets."""
        return self.columns + _SEGMENT

    def columns_of_groups(self) -> NDArray[np.int64]:
        """Gives the columns of each group, [groups, group]: those of a panel that are so far apart as it has groups."""
        return np.arange(self.columns).reshape(self.panels, self.group, -1).transpose(0, 2, 1).reshape(self.groups, -1)


def shared_bytes(version: Version) -> int:
    """Gives the bytes at most that a scorer and its forks share, beyond the version's own weights."""
    weights = version.weights
    # The gates of items and the links in segments; a choice of the items has weights of its own.
    segments = int((-(-np.diff(weights["shortcut_start"]) // _SEGMENT)).sum())
    own = ("output_weight", "shortcut_item", "shortcut_weight") if version.ranked is not None else ()
    return (
        sum(int(weights[name].nbytes) for name in own)
        + 4 * len(weights["item_embedding"])
        + segments * _SEGMENT * 8
        + _LINKS_AT_ONCE * _BYTES_OF_A_LINK
    )


def own_bytes(version: Version, k: int, users: int, events: int) -> int:
    """Gives the bytes at most that one scorer needs for itself, for batches of so many users and events."""
    shape = _Shape.of(version.item_count, k)
    # The maxima twice, and what is looked through of the groups that reach the threshold.
    tile = shape.users * (4 * shape.stride + 4 * blas.COLUMNS_AT_ONCE + 9 * shape.groups + 32 * shape.group * k)
    links = _SEGMENTS_AT_ONCE * _SEGMENT * _BYTES_OF_A_LINK // 4
    width = sum(int(version.weights[name].shape[-1]) for name in ("item_embedding", "output_weight"))
    return tile + links + users * (16 * width + 40 * k) + events * _BYTES_OF_AN_EVENT


class CpuScorer:
    """Gives the best items of users, as scoring.py and top_k do.

    A thread needs a scorer of its own: `fork` gives another one, which shares what is only read.
    """

    def __init__(self, version: Version, k: int) -> None:
        weights = version.weights
        self._version = version
        self._weights = weights
        self._items = version.item_count
        self._k = min(k, self._items)
        self._links = _Links.of(weights)
        gate = weights["encoder_gate_weight"]
        # The gate of a token is a sum of numbers of its parts, so it needs no embedding of the token.
        self._gates = {
            "item": weights["item_embedding"] @ gate + weights["encoder_gate_bias"],
            "event_type": weights["event_type_embedding"] @ gate + weights["event_type_gate"],
            "age": weights["age_embedding"] @ gate + weights["age_gate"],
            "order": weights["order_embedding"] @ gate + weights["order_gate"],
        }
        self._shape = _Shape.of(self._items, self._k)
        self._columns_of_groups = self._shape.columns_of_groups()
        popularity = weights["item_popularity"]
        order = np.argsort(-popularity, kind="stable")[: self._k]
        self._popular = order, popularity[order]
        self._make_buffers()

    def fork(self) -> CpuScorer:
        """Gives a scorer with buffers of its own."""
        other = object.__new__(CpuScorer)
        vars(other).update(vars(self))
        other._make_buffers()
        return other

    def _make_buffers(self) -> None:
        shape = self._shape
        self._logits = np.empty((shape.users, shape.stride), dtype=np.float32)
        self._spare = np.empty((shape.users, blas.COLUMNS_AT_ONCE), dtype=np.float32)
        self._maxima = np.empty((shape.users, shape.groups), dtype=np.float32)

    def __call__(self, history: History) -> Scored:
        """Gives the best items of these users, whose events do not repeat (History.distinct)."""
        direction, links = self._encode(history)
        users = len(history.counts)
        items = np.empty((users, self._k), dtype=np.int64)
        scores = np.empty((users, self._k), dtype=np.float32)
        # What was bought twice is left out once.
        seen_user, seen_item = seen_columns(history, self._version.targets, self._version.columns)
        seen_user, seen_item = np.divmod(np.unique(seen_user * self._items + seen_item), self._items)
        for first, last in self._tiles(users):
            seen = slice(*np.searchsorted(seen_user, (first, last)))
            own = seen_user[seen] - first, seen_item[seen]
            items[first:last], scores[first:last], is_sure = self._best(
                direction[first:last], self._without_product(links, first, last), *own
            )
            for user in (first + np.flatnonzero(~is_sure)).tolist():
                items[user], scores[user] = self._best_of_one(
                    direction[user], self._without_product(links, user, user + 1), seen_item[seen_user == user]
                )
        unknown = unknown_users(history)
        items[unknown], scores[unknown] = self._popular
        return items, scores, history.counts == 0

    def of_pairs(self, history: History, user: NDArray[np.int64], item: NDArray[np.int64]) -> Floats:
        """Gives the scores of P pairs of a user and an item's column, [P], the users in rising order.

        Their events do not repeat.
        """
        direction, links = self._encode(history)
        scores = np.empty(len(user), dtype=np.float32)
        for first, last in self._tiles(len(history.counts)):
            pairs = slice(*np.searchsorted(user, (first, last)))
            own, column = user[pairs] - first, item[pairs]
            logits = self._without_product(links, first, last)
            with np.errstate(over="ignore", invalid="ignore"):
                total = self._exponentials(direction[first:last], logits)
                found = logits[own, column]
                scores[pairs] = found / total[own]
            is_sure = (total > _SMALLEST_SUM) & (total < _LARGEST_SUM)
            is_sure[own[found < _SMALLEST]] = False
            for unsure in (first + np.flatnonzero(~is_sure)).tolist():
                pairs = slice(*np.searchsorted(user, (unsure, unsure + 1)))
                whole = self._scores_of_one(direction[unsure], self._without_product(links, unsure, unsure + 1))
                scores[pairs] = whole[0, item[pairs]]
        is_unknown = unknown_users(history)[user]
        scores[is_unknown] = self._weights["item_popularity"][item[is_unknown]]
        return scores

    def _encode(self, history: History) -> tuple[Floats, Any]:
        """Gives the directions of U users, [U, Z], and what of the shortcut is theirs."""
        tokens = history.tokens(self._version.max_history)
        direction = decode_direction(self._weights, mean_of_latent(self._weights, self._pool(tokens)))
        return direction, linked_items(self._weights, tokens) if self._links is not None else None

    def _tiles(self, users: int) -> Iterator[tuple[int, int]]:
        """Gives the first user of each tile, and the one behind its last."""
        for first in range(0, users, self._shape.users):
            yield first, min(first + self._shape.users, users)

    def _pool(self, tokens: Tokens) -> Floats:
        """Gives forward.pool without an embedding of each token: the parts that take few values are counted first."""
        weights = self._weights
        users, width = tokens.user_count, weights["item_embedding"].shape[1]
        gates = self._gates["item"][tokens.item]
        for name in ("event_type", "age", "order"):
            gates += self._gates[name][getattr(tokens, name)]
        gates = 0.5 * (1.0 + np.tanh(0.5 * gates)) * weights["gate_recency"][tokens.order]
        user = tokens.users()
        pooled = np.zeros((users, width), dtype=np.float32)
        for first, last in pieces(tokens.start[1:], _TOKENS_AT_ONCE):
            begin, end = tokens.start[first], tokens.start[last]
            own = np.zeros((last - first, end - begin), dtype=np.float32)
            own[user[begin:end] - first, np.arange(end - begin)] = gates[begin:end]
            np.matmul(own, weights["item_embedding"].take(tokens.item[begin:end], axis=0), out=pooled[first:last])
        for name in ("event_type", "age", "order"):
            embedding = weights[f"{name}_embedding"]
            cells = user * len(embedding) + getattr(tokens, name)
            sums = np.bincount(cells, weights=gates, minlength=users * len(embedding)).astype(np.float32)
            pooled += sums.reshape(users, -1) @ embedding
        norms = np.sqrt(np.bincount(user, weights=gates * gates, minlength=users)).astype(np.float32)
        pooled /= np.maximum(norms, np.float32(1e-12))[:, None]
        if tokens.features is not None:
            pooled += mean_of_features(weights["user_feature_embedding"], tokens.features)
        pooled *= np.float32(np.sqrt(width))
        return pooled

    def _without_product(self, links: Any, first: int, last: int) -> Floats:
        """Gives the logits of the users first to last, as far as they are bias and shortcut, in the tile's buffer."""
        logits = self._logits[: last - first]
        logits[:, : self._items] = self._weights["output_bias"]
        logits[:, self._items :] = -np.inf
        if links is not None:
            self._add_links(logits, links, first, last)
        return logits

    def _add_links(self, logits: Floats, links: Any, first: int, last: int) -> None:
        """Adds the shortcut to the logits of a tile.

        The n-th items of the users of a tile are added at once: no two of these links meet in one cell, so adding by
        index loses nothing.
        """
        assert self._links is not None
        user, item, share = links
        own = slice(*np.searchsorted(user, (first, last)))
        user, item, share = user[own] - first, item[own], share[own]
        count = np.bincount(user, minlength=last - first)
        place = places(count)
        order = np.argsort(place, kind="stable")
        user, item, share, place = user[order], item[order], share[order], place[order]
        segments = self._links.start[item + 1] - self._links.start[item]
        end = starts(segments)
        cells = logits.reshape(-1)
        for begin, finish in pieces(end[1:], _SEGMENTS_AT_ONCE):
            total = int(end[finish] - end[begin])
            if not total:
                continue
            pair = np.repeat(np.arange(begin, finish), segments[begin:finish])
            segment = ranges(self._links.start[item[begin:finish]], segments[begin:finish])
            cell = self._links.item.take(segment, axis=0) + (user[pair] * self._shape.stride)[:, None]
            weight = self._links.weight.take(segment, axis=0)
            weight *= share[pair][:, None]
            # Within such a piece, one place after the other.
            changes = np.flatnonzero(np.diff(place[pair])) + 1
            for left, right in pairwise((0, *changes.tolist(), total)):
                cells[cell[left:right]] += weight[left:right]

    def _best(
        self, direction: Floats, logits: Floats, seen_user: NDArray[np.int64], seen_item: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
        """Gives the best items of a tile that are not seen, their shares, and for which users these are sure.

        `logits` lack the matrix product; afterwards they are their own exponentials.
        """
        users = len(logits)
        # No maximum may be that of a seen item; but their probability counts.
        seen = logits[seen_user, seen_item] + np.einsum(
            "nz,nz->n", direction[seen_user], self._weights["output_weight"][seen_item]
        )
        logits[seen_user, seen_item] = -np.inf
        with np.errstate(over="ignore", invalid="ignore"):
            total = self._exponentials(direction, logits)
            total += np.bincount(seen_user, weights=np.exp(seen), minlength=users)
            best, values, count = self._largest(logits)
            values /= total[:, None]
        values[np.arange(self._k) >= count[:, None]] = -1.0
        left = self._items - np.bincount(seen_user, minlength=users)
        is_sure = (total > _SMALLEST_SUM) & (total < _LARGEST_SUM) & (count >= np.minimum(left, self._k))
        return best, values, is_sure

    def _best_of_one(
        self, direction: Floats, logits: Floats, seen_item: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Floats]:
        """Gives the same of one user by forward.softmax, which no size of the logits troubles."""
        scores = self._scores_of_one(direction, logits)
        scores[0, seen_item] = -1.0
        best, values = top_k(scores, self._k)
        return best[0], values[0]

    def _scores_of_one(self, direction: Floats, logits: Floats) -> Floats:
        """Gives the scores of one user, [1, I]."""
        whole = logits[:, : self._items] + direction @ self._weights["output_weight"].T
        scores: Floats = softmax(whole)
        return scores

    def _exponentials(self, direction: Floats, logits: Floats) -> NDArray[np.float64]:
        """Adds the matrix product to the logits, exponentiates them, keeps the maxima of groups, and gives sums, [U].

        Nothing is taken off the logits first, as it would cost a pass to find their peak: a sum may overflow or vanish.
        """
        users, panel = len(logits), self._shape.panel
        total = np.zeros(users)
        ones = np.ones(panel, dtype=np.float32)
        add_product = blas.product_into(direction, self._weights["output_weight"], logits, self._spare[:users])
        maxima = self._maxima[:users].reshape(users, self._shape.panels, -1)
        for number in range(self._shape.panels):
            first = number * panel
            own = logits[:, first : first + panel]
            add_product(first, min(first + panel, self._items))
            np.exp(own, out=own)
            # Off by 4e-7 at most, where a sum is by 1e-7 and takes twice as long.
            total += own @ ones
            np.maximum.reduce(own.reshape(users, self._shape.group, -1), axis=1, out=maxima[:, number])
        return total

    def _largest(self, exponentials: Floats) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
        """Gives the columns of the k largest of each row, largest first, they themselves, and how many there are, [U].

        Numbers below _SMALLEST are none of them.
        """
        users = len(exponentials)
        threshold = self._threshold(users)
        group = np.flatnonzero(self._maxima[:users] >= threshold[:, None])
        user, group = np.divmod(group, self._shape.groups)
        cell = self._columns_of_groups.take(group, axis=0)
        cell += (user * self._shape.stride)[:, None]
        found = exponentials.reshape(-1)[cell]
        reaches = found >= threshold[user][:, None]
        cell, value = cell[reaches], found[reaches]
        user = cell // self._shape.stride
        item = cell - user * self._shape.stride
        count = np.bincount(user, minlength=users)
        # One number that sorts by falling value and then by rising item: the bits of a positive float rise with it.
        keys = np.full((users, max(int(count.max(initial=0)), self._k)), np.uint64(2**64 - 1))
        keys[user, places(count)] = ((~value.view(np.uint32)).astype(np.uint64) << np.uint64(32)) | item.astype(
            np.uint64
        )
        keys.sort(axis=1)
        keys = keys[:, : self._k]
        best = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        values = (~(keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
        best[np.arange(self._k) >= count[:, None]] = 0
        return best, values, count

    def _threshold(self, users: int) -> Floats:
        """Gives a number that at least k of each user's row of the tile reach, [U]: k groups have such a maximum."""
        maxima = self._maxima[:users]
        while maxima.shape[1] % 2 == 0 and maxima.shape[1] >= 2 * _GROUPS_FOR_EACH * self._k:
            half = maxima.shape[1] // 2
            maxima = np.maximum(maxima[:, :half], maxima[:, half:])
        place = maxima.shape[1] - self._k
        return np.maximum(np.partition(maxima, place, axis=1)[:, place], _SMALLEST)
