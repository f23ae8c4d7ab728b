"""Which past events an item's score comes from, in two ways that share the rows.

By deletion: the logit less the logit of the same history without an event, everything else computed anew, as
`recommend_for` would. It is what would really happen, and does not add up: what events do together is the remainder.

By relevance: the logit as a sum over events, exact. Gates, tanh(u) / u and norms are held as they are in this history,
so that the network is a linear map of its tokens (the z-rule of Bach et al. 2015; gradient times input with tanh(u) / u
in place of the derivative, Ancona et al. 2018). The shortcut is such a sum by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import forward
from .features import FeatureBag
from .forward import Weights
from .tokens import History, Tokens, age_bucket, order_bucket

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


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


def explain_item(weights: Weights, history: History, target: int, *, max_history: int, by_item: bool) -> list[Row]:
    """Gives the parts of an item's logit for one user, events first, by contribution; each column adds up to the logit.

    Of a user of whom nothing is known there is one row, the logarithm of the item's share of the popularity.
    """
    order = np.lexsort((history.event_type, history.item, history.occurred_at))[-max_history:]
    at = history.occurred_at[order]
    latest = History(
        counts=np.array([len(order)]),
        item=history.item[order],
        event_type=history.event_type[order],
        occurred_at=at,
        features=history.features,
    )
    tokens = latest.tokens(max_history)
    features = tokens.features if tokens.features is not None and tokens.features.counts()[0] else None
    if not len(at) and features is None:
        popularity = float(weights["item_popularity"][target])
        value = float(np.log(popularity)) if popularity > 0 else float("nan")
        return [Row(part="popularity", contribution=value, relevance=value)]
    group = np.unique(tokens.item, return_inverse=True)[1] if by_item else np.arange(len(at))
    groups = int(group.max(initial=-1)) + 1

    # Variant 0 is the whole history, variant 1 + g is without group g, the last one without the features.
    keep = np.ones((groups + 2, len(at)), dtype=bool)
    keep[1 + group, np.arange(len(at))] = False
    sums, norms = _sums_without(weights, tokens, at, keep, group)
    own = _feature_mean(weights, features)
    pooled = sums / norms[:, None]
    pooled[:-1] += own
    pooled *= np.float32(np.sqrt(pooled.shape[1]))
    direction = forward.decode_direction(np, weights, forward.mean_of_latent(np, weights, pooled))
    with_features = np.full(len(keep), features is not None)
    with_features[-1] = False
    # A direction has length 1 also where nothing is known, and then means nothing.
    known = with_features | (np.count_nonzero(keep, axis=1) > 0)
    cosine = np.where(known, direction @ weights["output_weight"][target], 0.0)
    shortcut, shortcut_of = _shortcut(weights, tokens.item, keep, target)
    logits = cosine + shortcut
    relevance, of_features = _relevance(weights, tokens, pooled[0], float(norms[0]), own, target)

    bias = float(weights["output_bias"][target])
    gates = _gates(weights, tokens)
    rows = []
    for number in range(groups):
        chosen = np.flatnonzero(group == number)
        last = int(chosen[-1])
        rows.append(
            Row(
                part="item" if by_item else "event",
                contribution=float(logits[0] - logits[1 + number]),
                relevance=float(relevance[chosen].sum() + shortcut_of[chosen].sum()),
                item=int(tokens.item[last]),
                event_type=int(tokens.event_type[last]),
                at=float(at[last]),
                gate=float(gates[chosen].mean()),
            )
        )
    rows.sort(key=lambda row: -row.contribution)
    if features is not None:
        rows.append(Row(part="features", contribution=float(logits[0] - logits[-1]), relevance=of_features))
    rows.append(Row(part="popularity", contribution=bias, relevance=bias))
    total = float(logits[0]) + bias
    rows.append(
        Row(
            part="remainder",
            contribution=total - sum(row.contribution for row in rows),
            relevance=total - sum(row.relevance for row in rows),
        )
    )
    return rows


def _gates(weights: Weights, tokens: Tokens) -> Floats:
    gates: Floats = forward.encoder_gates(np, weights, tokens, forward.embed(np, weights, tokens))
    return gates


def _feature_mean(weights: Weights, features: FeatureBag | None) -> Floats:
    width = weights["item_embedding"].shape[1]
    if features is None:
        return np.zeros(width, dtype=np.float32)
    mean: Floats = forward.mean_of_features(np, weights["user_feature_embedding"], features)[0]
    return mean


def _sums_without(
    weights: Weights, tokens: Tokens, at: NDArray[np.float64], keep: NDArray[np.bool_], group: Integers
) -> tuple[Floats, Floats]:
    """Gives sum a_i h_i, [V, Z], and sqrt(sum a_i^2), [V], of each variant of a history.

    Without an event others can be of another age or order. Only those are embedded anew: of 500 variants of 500 events
    that is a few thousand tokens, not a quarter of a million.
    """
    variants = len(keep)
    embedded = forward.embed(np, weights, tokens)
    gates = forward.encoder_gates(np, weights, tokens, embedded)
    values = np.concatenate((gates[:, None] * embedded, (gates * gates)[:, None]), axis=1)
    by_group = np.argsort(group, kind="stable")
    removed = np.zeros((variants, values.shape[1]), dtype=np.float32)
    removed[1:-1] = forward.sum_rows(np, np.searchsorted(group[by_group], np.arange(variants - 1)), values[by_group])
    sums = values.sum(axis=0) - removed

    variant, token = np.nonzero(keep)
    counts = keep.sum(axis=1)
    time = at[token]
    moment = np.cumsum(np.diff(time, prepend=-np.inf) != 0) if len(time) else np.zeros(0, dtype=np.int64)
    last = np.repeat(np.cumsum(counts) - 1, counts)
    age, order = age_bucket(time[last] - time), order_bucket(moment[last] - moment)
    other = np.flatnonzero((age != tokens.age[token]) | (order != tokens.order[token]))
    moved = Tokens(
        start=np.array([0, len(other)]),
        item=tokens.item[token[other]],
        event_type=tokens.event_type[token[other]],
        age=age[other],
        order=order[other],
    )
    embedded = forward.embed(np, weights, moved)
    gates = forward.encoder_gates(np, weights, moved, embedded)
    anew = np.concatenate((gates[:, None] * embedded, (gates * gates)[:, None]), axis=1)
    start = np.searchsorted(variant[other], np.arange(variants + 1))
    sums += forward.sum_rows(np, start, anew - values[token[other]])
    sums[counts == 0] = 0.0
    return sums[:, :-1], np.sqrt(np.maximum(sums[:, -1], 1e-12))


def _shortcut(
    weights: Weights, item: Integers, keep: NDArray[np.bool_], target: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gives the shortcut's part of each variant's logit, [V], and of the whole history's by token, [N]."""
    links = np.flatnonzero(weights["shortcut_item"] == target)
    owner = np.searchsorted(weights["shortcut_start"], links, side="right") - 1
    column = np.bincount(owner, weights=weights["shortcut_weight"][links], minlength=len(weights["shortcut_start"]) - 1)
    different, place, times = np.unique(item, return_inverse=True, return_counts=True)
    present = np.zeros((len(keep), len(different)), dtype=bool)
    variant, token = np.nonzero(keep)
    present[variant, place[token]] = True
    counts = np.maximum(present.sum(axis=1), 1)
    by_token = (column[different] / times)[place] / np.sqrt(counts[0])
    return (present @ column[different]) / np.sqrt(counts), by_token


def _relevance(
    weights: Weights, tokens: Tokens, pooled: Floats, norm: float, own: Floats, target: int
) -> tuple[Floats, float]:
    """Gives the encoder's part of an item's logit by token, [N], and by the features, as a linear map of both."""
    u1 = weights["encoder_weight"] @ pooled + weights["encoder_bias"]
    z = pooled + weights["mean_weight"] @ np.tanh(u1) + weights["mean_bias"]
    gate = forward.sigmoid(np, weights["decoder_gate_weight"] @ z + weights["decoder_gate_bias"])
    u2 = weights["decoder_weight"] @ (gate * z) + weights["decoder_bias"]
    r = gate * z + weights["decoder_output_weight"] @ np.tanh(u2)
    back = weights["output_weight"][target] / max(float(np.sqrt(r @ r)), 1e-12)
    back = back + weights["decoder_weight"].T @ (_slope(u2) * (weights["decoder_output_weight"].T @ back))
    back = gate * back
    back = back + weights["encoder_weight"].T @ (_slope(u1) * (weights["mean_weight"].T @ back))
    back = back * np.float32(np.sqrt(len(pooled)))
    embedded = forward.embed(np, weights, tokens)
    gates = forward.encoder_gates(np, weights, tokens, embedded)
    return gates * (embedded @ back) / norm, float(own @ back)


def _slope(u: Floats) -> Floats:
    """Gives tanh(u) / u, 1 at 0."""
    small = np.abs(u) < 1e-4
    return np.where(small, np.float32(1.0), np.tanh(u) / np.where(small, np.float32(1.0), u))
