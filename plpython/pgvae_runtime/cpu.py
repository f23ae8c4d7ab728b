"""Scores many users on the CPU: what scoring.py specifies, arranged for the caches.

A tile of users × items is small enough to stay in the cache from the matrix product to its best items. Where the time
goes and what was tried: docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas
from .forward import decode_direction, mean_of_features, mean_of_latent
from .scoring import seen_columns
from .store import Version
from .tokens import History, Tokens, pieces, starts

Floats = NDArray[np.float32]
# Best items [U, k], their scores [U, k] (-1 behind the last one), and which users are cold starts [U].
Scored = tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]

# Logits of a tile. A third of the third-level cache of a server's core and more costs nothing that was measured.
_TILE_BYTES = 10 * 1024 * 1024
_MAX_TILE = 256
# Columns of a tile that are finished one after the other, while they are in the second-level cache.
_PANEL = 1024
# Columns are halved at most so often while a panel is in the cache: the threshold needs four times k groups at least.
_HALVINGS, _GROUPS_FOR_EACH = 4, 4
# Links are kept in segments of so many: one of them is gathered as one cache line.
_SEGMENT = 16
# Segments that are added at once, 16 * 20 bytes each.
_SEGMENTS_AT_ONCE = 16_384
# Links that are put into segments at once, some 80 bytes each meanwhile.
_LINKS_AT_ONCE = 262_144
# What a link and an event need while they are at work, in arrays of eight bytes an element.
_BYTES_OF_A_LINK, _BYTES_OF_AN_EVENT = 80, 200
# Tokens whose embeddings are gathered at once, and then added up by one dense product with their gates.
_TOKENS_AT_ONCE = 256
_LOWEST = np.finfo(np.float32).min
# The sum of exponentials is taken of the logits as they are, unless it falls out of this range.
_SMALLEST_SUM, _LARGEST_SUM = 1e-20, 1e30


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
    """What a tile is: so many users, and columns in groups of 2 ** halvings within a panel, whose maxima are kept."""

    users: int
    columns: int
    halvings: int

    @staticmethod
    def of(items: int, k: int) -> _Shape:
        # Whole panels, and at least one column more than items: the links' empty places.
        columns = -(-(items + 1) // _PANEL) * _PANEL
        return _Shape(
            users=max(1, min(_MAX_TILE, _TILE_BYTES // (4 * columns))),
            columns=columns,
            halvings=min(_HALVINGS, max(0, (items // (_GROUPS_FOR_EACH * k)).bit_length() - 1)),
        )

    @property
    def groups(self) -> int:
        """The number of groups of a tile."""
        return self.columns >> self.halvings

    @property
    def stride(self) -> int:
        """The places between two users; a power of two would let all rows compete for the same few cache sets."""
        return self.columns + _SEGMENT


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
    # Where the logits reach the threshold is a byte each; where they do, and the maxima and half of them, is some more.
    tile = shape.users * (6 * shape.stride + 4 * _PANEL + 8 * shape.groups)
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
        self._panel = np.empty((shape.users, _PANEL), dtype=np.float32)
        self._maxima = np.empty((shape.users, shape.groups), dtype=np.float32)

    def __call__(self, history: History) -> Scored:
        """Gives the best items of these users, whose events may repeat."""
        history = history.distinct()
        tokens = history.tokens(self._version.max_history)
        direction = decode_direction(np, self._weights, mean_of_latent(np, self._weights, self._pool(tokens)))
        users = tokens.user_count
        items = np.empty((users, self._k), dtype=np.int64)
        scores = np.empty((users, self._k), dtype=np.float32)
        links = self._links_of(tokens) if self._links is not None else None
        # What was bought twice is left out once.
        seen_user, seen_item = seen_columns(history, self._version.targets, self._version.columns)
        seen_user, seen_item = np.divmod(np.unique(seen_user * self._items + seen_item), self._items)
        for first in range(0, users, self._shape.users):
            last = min(first + self._shape.users, users)
            logits = self._logits[: last - first]
            logits[:, : self._items] = self._weights["output_bias"]
            logits[:, self._items :] = -np.inf
            if links is not None:
                self._add_links(logits, links, first, last)
            seen = slice(*np.searchsorted(seen_user, (first, last)))
            items[first:last], scores[first:last] = self._best(
                direction[first:last], logits, seen_user[seen] - first, seen_item[seen]
            )
        cold = history.counts == 0
        unknown = cold if history.features is None else cold & (history.features.counts() == 0)
        items[unknown], scores[unknown] = self._popular
        return items, scores, cold

    def _pool(self, tokens: Tokens) -> Floats:
        """Gives forward.pool without an embedding of each token: the parts that take few values are counted first."""
        weights = self._weights
        users, width = tokens.user_count, weights["item_embedding"].shape[1]
        gates = self._gates["item"][tokens.item]
        for name in ("event_type", "age", "order"):
            gates += self._gates[name][getattr(tokens, name)]
        gates = 0.5 * (1.0 + np.tanh(0.5 * gates))
        user = np.repeat(np.arange(users), np.diff(tokens.start))
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
            pooled += mean_of_features(np, weights["user_feature_embedding"], tokens.features)
        pooled *= np.float32(np.sqrt(width))
        return pooled

    def _links_of(self, tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """Gives the user, item and share of each different (user, item) pair."""
        user = np.repeat(np.arange(tokens.user_count), np.diff(tokens.start))
        known = len(self._weights["item_embedding"])
        user, item = np.divmod(np.unique(user * known + tokens.item), known)
        count = np.bincount(user, minlength=tokens.user_count)
        share = (np.maximum(count, 1) ** -0.5).astype(np.float32)
        return user, item, share

    def _add_links(self, logits: Floats, links: Any, first: int, last: int) -> None:
        """Adds the shortcut to the logits of a tile.

        The n-th items of the users of a tile are added at once: no two of these links meet in one cell, so adding by
        index loses nothing.
        """
        assert self._links is not None
        user, item, share = links
        own = slice(*np.searchsorted(user, (first, last)))
        user, item = user[own] - first, item[own]
        share = share[first:last]
        count = np.bincount(user, minlength=last - first)
        place = np.arange(len(user)) - np.repeat(starts(count)[:-1], count)
        order = np.argsort(place, kind="stable")
        user, item, place = user[order], item[order], place[order]
        segments = self._links.start[item + 1] - self._links.start[item]
        end = starts(segments)
        # Cut after each place, and within a place where it would be too much at once.
        cuts = np.append(np.flatnonzero(np.diff(place, prepend=-1)), len(place))
        cells = logits.reshape(-1)
        for begin, finish in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            total = int(end[finish] - end[begin])
            if not total:
                continue
            own_segments = segments[begin:finish]
            segment = np.arange(total) + np.repeat(
                self._links.start[item[begin:finish]] - (end[begin:finish] - end[begin]), own_segments
            )
            row = np.repeat(user[begin:finish], own_segments)
            cell = self._links.item.take(segment, axis=0) + (row * self._shape.stride)[:, None]
            weight = self._links.weight.take(segment, axis=0) * share[row][:, None]
            cells[cell] += weight

    def _best(
        self, direction: Floats, logits: Floats, seen_user: NDArray[np.int64], seen_item: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Floats]:
        """Gives the best items of a tile that are not seen, and their shares; `logits` lack the matrix product."""
        users = len(logits)
        # No maximum may be that of a seen item; but their probability counts.
        seen = logits[seen_user, seen_item] + np.einsum(
            "nz,nz->n", direction[seen_user], self._weights["output_weight"][seen_item]
        )
        logits[seen_user, seen_item] = -np.inf
        with np.errstate(over="ignore"):
            total = self._multiply(direction, logits)
            total += np.bincount(seen_user, weights=np.exp(seen), minlength=users)
        shift = np.zeros(users, dtype=np.float32)
        for row in np.flatnonzero(~((total > _SMALLEST_SUM) & (total < _LARGEST_SUM))).tolist():
            whole = np.append(logits[row, : self._items], seen[seen_user == row])
            shift[row] = whole.max()
            total[row] = np.exp(whole - shift[row]).sum()
        cell = np.flatnonzero(logits >= self._threshold(users)[:, None])
        user = cell // self._shape.stride
        value = logits.reshape(-1)[cell]
        item = cell - user * self._shape.stride
        count = np.bincount(user, minlength=users)
        # One number that sorts by falling value and then by rising item: the bits of a float, made to rise with it.
        bits = value.view(np.uint32)
        rising = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
        keys = np.full((users, max(int(count.max(initial=0)), self._k)), np.uint64(2**64 - 1))
        keys[user, np.arange(len(cell)) - np.repeat(starts(count)[:-1], count)] = (
            (~rising).astype(np.uint64) << np.uint64(32)
        ) | item.astype(np.uint64)
        keys.sort(axis=1)
        keys = keys[:, : self._k]
        is_left = keys == np.uint64(2**64 - 1)
        best = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        best[is_left] = 0
        values = np.take_along_axis(logits, best, axis=1) - shift[:, None]
        np.exp(values, out=values)
        values /= total[:, None]
        values[is_left] = -1.0
        return best, values

    def _threshold(self, users: int) -> Floats:
        """Gives a number that at least k logits of each user of the tile reach, [U]: k groups have such a maximum."""
        maxima = self._maxima[:users]
        while maxima.shape[1] % 2 == 0 and maxima.shape[1] >= 2 * _GROUPS_FOR_EACH * self._k:
            half = maxima.shape[1] // 2
            maxima = np.maximum(maxima[:, :half], maxima[:, half:])
        place = maxima.shape[1] - self._k
        return np.maximum(np.partition(maxima, place, axis=1)[:, place], _LOWEST)

    def _multiply(self, direction: Floats, logits: Floats) -> NDArray[np.float64]:
        """Adds the matrix product to the logits, writes the maxima of groups of columns, and gives sum exp(logit), [U].

        Nothing is taken off the logits first, as it would cost a pass to find their peak: a sum may overflow or vanish.
        """
        users = len(logits)
        total = np.zeros(users)
        ones = np.ones(_PANEL, dtype=np.float32)
        panel = self._panel[:users]
        add_product = blas.product_into(direction, self._weights["output_weight"], logits, panel)
        maxima = self._maxima[:users].reshape(users, -1, _PANEL >> self._shape.halvings)
        for number, first in enumerate(range(0, self._shape.columns, _PANEL)):
            own = logits[:, first : first + _PANEL]
            if first < self._items:
                add_product(first, min(first + _PANEL, self._items))
            np.exp(own, out=panel)
            # As exact as a pairwise sum: a panel at a time, and then in double precision.
            total += panel @ ones
            groups = own
            for _ in range(self._shape.halvings):
                half = groups.shape[1] // 2
                groups = np.maximum(groups[:, :half], groups[:, half:])
            maxima[:, number] = groups
        return total
