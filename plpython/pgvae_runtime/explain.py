"""Which past events an item's score comes from, in two ways that share the rows.

By deletion: the logit less the logit of the same history without an event, everything else computed anew, as
`recommend_for` would. It is what would really happen, and does not add up: what events do together is the remainder.

By relevance: the logit as a sum over events, exact. Gates, tanh(u) / u and norms are held as they are in this history,
so that the network is a linear map of its tokens (the z-rule of Bach et al. 2015; gradient times input with tanh(u) / u
in place of the derivative, Ancona et al. 2018). The shortcut is such a sum by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import forward
from .forward import Weights
from .ragged import pieces, ranges, starts
from .tokens import History, Tokens, age_bucket, order_bucket

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

# Groups that are left out one by one, and tokens of what they leave: computed at once.
_GROUPS_AT_ONCE = 512
_TOKENS_AT_ONCE = 16_384
# Links that are looked at at once.
_LINKS_AT_ONCE = 131_072


@dataclass(frozen=True, kw_only=True)
class Row:
    """A part of an item's logit: an event, all events of an item, the features, the popularity, or the remainder."""

    part: str
    contribution: float
    relevance: float
    item: int | None = None
    event_type: int | None = None
    at: float | None = None
    gate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The N tokens of U users in G groups, each of one user and one item, users one after the other.

    `of` [N] is the group of each token; `size`, `user` and `last` [G] are the number of a group's tokens, whose they
    are, and the latest of them.
    """

    of: Integers
    size: Integers
    user: Integers
    last: Integers

    @staticmethod
    def by_event(tokens: Tokens) -> Groups:
        """Makes a group of each token."""
        return Groups._of(tokens, np.arange(len(tokens.item)))

    @staticmethod
    def by_item(tokens: Tokens, items: int) -> Groups:
        """Makes a group of all tokens of a user and an item; `items` is the size of the catalogue."""
        pairs = tokens.users() * items + tokens.item
        return Groups._of(tokens, np.unique(pairs, return_inverse=True)[1])

    @staticmethod
    def _of(tokens: Tokens, group: Integers) -> Groups:
        size = np.bincount(group)
        last = np.zeros(len(size), dtype=np.int64)
        np.maximum.at(last, group, np.arange(len(group)))
        return Groups(of=group, size=size, user=tokens.users()[last], last=last)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What U users' logits of an item each lose when one part is left out.

    `logit` [U] lacks the item's bias, `of_group` [G] is what it loses without a group of tokens, `of_features` [U]
    without the user's features; `shortcut_of` [N] is each token's part of the shortcut.
    """

    logit: Doubles
    of_group: Doubles
    of_features: Doubles
    shortcut_of: Doubles


def latest(history: History, max_history: int) -> tuple[Tokens, Doubles]:
    """Gives the tokens of a history whose events are all different, and when they happened, [N]."""
    order = history.order()
    end = np.cumsum(history.counts)
    order = order[np.repeat(end, history.counts) - np.arange(len(order)) <= max_history]
    at = history.occurred_at[order]
    kept = History(
        counts=np.minimum(history.counts, max_history),
        item=history.item[order],
        event_type=history.event_type[order],
        occurred_at=at,
        features=history.features,
        is_ordered=True,
    )
    return kept.tokens(max_history), at


def own_bytes(weights: Weights, tokens: int) -> int:
    """Gives how much memory `leave_one_out` takes at most of that many tokens, in bytes, cautiously."""
    hidden, width = weights["encoder_weight"].shape
    row = 4 * (width + 1)
    moved = _TOKENS_AT_ONCE * (128 + 2 * row)
    return int(tokens * (256 + 4 * row) + moved + _GROUPS_AT_ONCE * 24 * max(hidden, width) + _LINKS_AT_ONCE * 40)


def leave_one_out(weights: Weights, tokens: Tokens, at: Doubles, groups: Groups, target: Integers) -> Attribution:
    """Gives what the logits of one item each, `target` [U], lose without each group of tokens; `at` [N] is in seconds.

    Without an event others can be of another age or order. Only those are embedded anew: of 500 histories of 500 events
    that is a few thousand tokens, not a quarter of a million. Memory is bounded by the tokens, whatever their groups.
    """
    users = tokens.user_count
    embedded = forward.embed(weights, tokens)
    values = _gated(weights, tokens, embedded)
    totals = forward.sum_rows(tokens.start, values)
    removed = _sums(values, groups)
    features = tokens.features
    own = np.zeros((users, embedded.shape[1]), dtype=np.float32)
    has_features = np.zeros(users, dtype=bool)
    if features is not None:
        own, has_features = (
            forward.mean_of_features(weights["user_feature_embedding"], features),
            features.counts() > 0,
        )
    counts = np.diff(tokens.start)
    linked = _linked(weights, tokens, target)
    without = np.zeros(len(groups.size))

    whole = _cosine(weights, totals, own, has_features | (counts > 0), target)
    for first, last in _blocks(counts[groups.user]):
        user = groups.user[first:last]
        left_over = _left_over(tokens, at, groups, first, last)
        sums = totals[user] - removed[first:last] + _moved(weights, tokens, values, left_over)
        left = counts[user] - groups.size[first:last]
        sums[left == 0] = 0.0
        without[first:last] = _cosine(weights, sums, own[user], has_features[user] | (left > 0), target[user])
        without[first:last] += _shortcut_of(weights, linked, left_over, groups.last[first:last])
    bare = whole
    if has_features.any():
        bare = np.where(has_features, _cosine(weights, totals, np.zeros_like(own), counts > 0, target), whole)
    logit = whole + linked.whole
    return Attribution(
        logit=logit, of_group=logit[groups.user] - without, of_features=whole - bare, shortcut_of=linked.by_token
    )


def explain_item(weights: Weights, history: History, target: int, *, max_history: int, by_item: bool) -> list[Row]:
    """Gives the parts of an item's logit for one user, events first, by contribution; each column adds up to the logit.

    Of a user of whom nothing is known there is one row, the logarithm of the item's share of the popularity.
    """
    tokens, at = latest(history, max_history)
    features = tokens.features if tokens.features is not None and tokens.features.counts()[0] else None
    if not len(at) and features is None:
        value = log_popularity(weights, target)
        return [Row(part="popularity", contribution=value, relevance=value)]
    groups = Groups.by_item(tokens, len(weights["item_embedding"])) if by_item else Groups.by_event(tokens)
    found = leave_one_out(weights, tokens, at, groups, np.array([target]))
    relevance, of_features = _relevance(weights, tokens, target)
    parts = relevance + found.shortcut_of
    gates = forward.encoder_gates(weights, tokens, forward.embed(weights, tokens))
    bias = float(weights["output_bias"][target])
    count = len(groups.size)
    rows = [
        Row(
            part="item" if by_item else "event",
            contribution=loss,
            relevance=relevant,
            item=item,
            event_type=kind,
            at=time,
            gate=gate,
        )
        for loss, relevant, gate, item, kind, time in zip(
            found.of_group.tolist(),
            np.bincount(groups.of, weights=parts, minlength=count).tolist(),
            (np.bincount(groups.of, weights=gates, minlength=count) / groups.size).tolist(),
            tokens.item[groups.last].tolist(),
            tokens.event_type[groups.last].tolist(),
            at[groups.last].tolist(),
            strict=True,
        )
    ]
    rows.sort(key=lambda row: -row.contribution)
    if features is not None:
        rows.append(Row(part="features", contribution=float(found.of_features[0]), relevance=of_features))
    rows.append(Row(part="popularity", contribution=bias, relevance=bias))
    total = float(found.logit[0]) + bias
    rows.append(
        Row(
            part="remainder",
            contribution=total - sum(row.contribution for row in rows),
            relevance=total - sum(row.relevance for row in rows),
        )
    )
    return rows


def log_popularity(weights: Weights, item: int) -> float:
    """Gives the logarithm of an item's share of the popularity, nan where it has none."""
    popularity = float(weights["item_popularity"][item])
    return float(np.log(popularity)) if popularity > 0 else float("nan")


def _gated(weights: Weights, tokens: Tokens, embedded: Floats) -> Floats:
    """Gives a_i h_i and a_i^2 of each token, [N, Z + 1]."""
    gates = forward.encoder_gates(weights, tokens, embedded)
    return np.concatenate((gates[:, None] * embedded, (gates * gates)[:, None]), axis=1)


def _sums(values: Floats, groups: Groups) -> Floats:
    """Gives the sum of the rows of each group, [G, ...]; most groups have one, and are taken as they are."""
    sums = values[groups.last]
    several = groups.size > 1
    if several.any():
        own = np.flatnonzero(several[groups.of])
        own = own[np.argsort(groups.of[own], kind="stable")]
        sums[several] = forward.sum_rows(starts(groups.size[several]), values[own])
    return sums


def _cosine(weights: Weights, sums: Floats, own: Floats, known: NDArray[np.bool_], target: Integers) -> Doubles:
    """Gives the network's part of the logits of one item each, [V], from sum a_i h_i and sum a_i^2, [V, Z + 1].

    A direction has length 1 also where nothing is known, and then means nothing.
    """
    pooled = sums[:, :-1] / np.sqrt(np.maximum(sums[:, -1:], 1e-12)) + own
    pooled *= np.float32(np.sqrt(pooled.shape[1]))
    direction = forward.decode_direction(weights, forward.mean_of_latent(weights, pooled))
    cosine = np.einsum("vz,vz->v", direction, weights["output_weight"][target])
    return np.where(known, cosine, 0.0).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class _LeftOver:
    """The M tokens that are left without each of V groups, one group after the other, with the age and the order that
    they then have: token[m] is left without group[m].
    """

    count: int
    group: Integers
    token: Integers
    age: Integers
    order: Integers


def _left_over(tokens: Tokens, at: Doubles, groups: Groups, first: int, last: int) -> _LeftOver:
    """Gives what is left without each of the groups from `first` to `last`."""
    variants = last - first
    user = groups.user[first:last]
    counts = np.diff(tokens.start)[user]
    variant = np.repeat(np.arange(variants), counts)
    token = ranges(tokens.start[user], counts)
    kept = groups.of[token] != first + variant
    variant, token = variant[kept], token[kept]
    counts = counts - groups.size[first:last]
    time = at[token]
    moment = np.cumsum(np.diff(time, prepend=-np.inf) != 0)
    end = np.repeat(np.cumsum(counts) - 1, counts)
    return _LeftOver(
        count=variants,
        group=variant,
        token=token,
        age=age_bucket(time[end] - time),
        order=order_bucket(moment[end] - moment),
    )


def _moved(weights: Weights, tokens: Tokens, values: Floats, left: _LeftOver) -> Floats:
    """Gives by how much the sums change without each group since other tokens are of another age or order,
    [V, Z + 1].
    """
    other = np.flatnonzero((left.age != tokens.age[left.token]) | (left.order != tokens.order[left.token]))
    token = left.token[other]
    moved = Tokens(
        start=np.array([0, len(other)]),
        item=tokens.item[token],
        event_type=tokens.event_type[token],
        age=left.age[other],
        order=left.order[other],
    )
    anew = _gated(weights, moved, forward.embed(weights, moved))
    start = np.searchsorted(left.group[other], np.arange(left.count + 1))
    sums: Floats = forward.sum_rows(start, anew - values[token])
    return sums


@dataclass(frozen=True, kw_only=True)
class _Linked:
    """What the shortcut makes of N tokens: `link` [N] is the weight of the item's link to the target, `next` [N] the
    user's next token of the same item, -1 where there is none; `whole` [U] is its part of the logits, `by_token` [N]
    that of each token.
    """

    link: Doubles
    next: Integers
    whole: Doubles
    by_token: Doubles


def _linked(weights: Weights, tokens: Tokens, target: Integers) -> _Linked:
    known = len(weights["shortcut_start"]) - 1
    user = tokens.users()
    pairs, place, times = np.unique(user * known + tokens.item, return_inverse=True, return_counts=True)
    owner, item = np.divmod(pairs, known)
    link = _links(weights, item, target[owner])[place]
    following = np.full(len(place), -1)
    order = np.argsort(place, kind="stable")
    again = place[order[1:]] == place[order[:-1]]
    following[order[:-1][again]] = order[1:][again]
    # An item counts by its latest event, and what it adds is its events' in equal parts.
    recency = np.where(following < 0, weights["shortcut_recency"][tokens.order].astype(np.float64), 0.0)
    added: Doubles = recency * link / _norms(user, recency, tokens.user_count)[user]
    of_item: Doubles = np.bincount(place, weights=added, minlength=len(times)) / times
    return _Linked(
        link=link,
        next=following,
        whole=np.bincount(user, weights=added, minlength=tokens.user_count).astype(np.float64),
        by_token=of_item[place],
    )


def _shortcut_of(weights: Weights, linked: _Linked, left: _LeftOver, last: Integers) -> Doubles:
    """Gives the shortcut's part of the logits of what is left without each group, [V], whose last tokens are `last`."""
    # Where an item's latest event is gone, the one before it is the latest.
    gone = np.where(linked.next[last] < 0, last, len(linked.next))
    following = linked.next[left.token]
    recency = weights["shortcut_recency"].astype(np.float64)[left.order]
    recency[(following >= 0) & (following != gone[left.group])] = 0.0
    sums = np.bincount(left.group, weights=recency * linked.link[left.token], minlength=left.count)
    return sums / _norms(left.group, recency, left.count)


def _norms(owner: Integers, values: Doubles, count: int) -> Doubles:
    """Gives the length of each owner's vector of values, [count], and a little more than 0 where it has none."""
    return np.maximum(np.sqrt(np.bincount(owner, weights=values * values, minlength=count)), 1e-12)


def _links(weights: Weights, item: Integers, target: Integers) -> Doubles:
    """Gives the weights of the links from items to other items, [P]; 0 where there is none."""
    start = weights["shortcut_start"].astype(np.int64)
    counts = start[item + 1] - start[item]
    found = np.zeros(len(item))
    ends = np.cumsum(counts)
    for first, last in pieces(ends, _LINKS_AT_ONCE):
        own = np.repeat(np.arange(first, last), counts[first:last])
        link = np.arange(len(own)) + (start[item] - (ends - counts))[own] + (ends - counts)[first]
        is_right = weights["shortcut_item"][link] == target[own]
        found += np.bincount(own[is_right], weights=weights["shortcut_weight"][link[is_right]], minlength=len(item))
    return found


def _relevance(weights: Weights, tokens: Tokens, target: int) -> tuple[Floats, float]:
    """Gives the network's part of an item's logit by token, [N], and by the features, as a linear map of both."""
    embedded = forward.embed(weights, tokens)
    gates = forward.encoder_gates(weights, tokens, embedded)
    own = np.zeros(embedded.shape[1], dtype=np.float32)
    if tokens.features is not None:
        own = forward.mean_of_features(weights["user_feature_embedding"], tokens.features)[0]
    pooled = forward.pool(weights, tokens)[0]
    u1 = weights["encoder_weight"] @ pooled + weights["encoder_bias"]
    z = pooled + weights["mean_weight"] @ np.tanh(u1) + weights["mean_bias"]
    gate = forward.sigmoid(weights["decoder_gate_weight"] @ z + weights["decoder_gate_bias"])
    u2 = weights["decoder_weight"] @ (gate * z) + weights["decoder_bias"]
    r = gate * z + weights["decoder_output_weight"] @ np.tanh(u2)
    back = weights["output_weight"][target] / max(float(np.sqrt(r @ r)), 1e-12)
    back = back + weights["decoder_weight"].T @ (_slope(u2) * (weights["decoder_output_weight"].T @ back))
    back = gate * back
    back = back + weights["encoder_weight"].T @ (_slope(u1) * (weights["mean_weight"].T @ back))
    back = back * np.float32(np.sqrt(len(pooled)))
    norm = max(float(np.sqrt(gates @ gates)), 1e-12)
    return gates * (embedded @ back) / norm, float(own @ back)


def _slope(u: Floats) -> Floats:
    """Gives tanh(u) / u, 1 at 0."""
    small = np.abs(u) < 1e-4
    return np.where(small, np.float32(1.0), np.tanh(u) / np.where(small, np.float32(1.0), u))


def _blocks(sizes: Integers) -> Iterator[tuple[int, int]]:
    """Cuts groups into blocks of bounded numbers of groups, and of tokens of theirs."""
    for first, last in pieces(np.cumsum(sizes), _TOKENS_AT_ONCE):
        for begin in range(first, last, _GROUPS_AT_ONCE):
            yield begin, min(begin + _GROUPS_AT_ONCE, last)
