"""The scorer: the same mathematics as the trainer's network, and the specification of cpu.py and gpu.py.

Every function computes in float32. Shapes: U users, N tokens, I items, Z latent width, H hidden width, F user features,
L links of the shortcut, J = I + 1. Formulas: docs/model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .features import FeatureBag
from .ragged import pieces, ranges
from .tokens import Tokens

Array = NDArray[Any]
Weights = Mapping[str, Array]

FORMAT = 3
SHAPES: Mapping[str, str] = {
    "item_embedding": "IZ",
    "event_type_embedding": "TZ",
    "age_embedding": "AZ",
    "order_embedding": "OZ",
    "user_feature_embedding": "FZ",
    "encoder_gate_weight": "Z",
    "encoder_gate_bias": "1",
    "event_type_gate": "T",
    "age_gate": "A",
    "order_gate": "O",
    "gate_recency": "O",
    "encoder_weight": "HZ",
    "encoder_bias": "H",
    "mean_weight": "ZH",
    "mean_bias": "Z",
    "log_variance_weight": "ZH",
    "log_variance_bias": "Z",
    "decoder_gate_weight": "ZZ",
    "decoder_gate_bias": "Z",
    "decoder_weight": "HZ",
    "decoder_bias": "H",
    "decoder_output_weight": "ZH",
    "output_weight": "IZ",
    "output_bias": "I",
    "item_popularity": "I",
    "shortcut_start": "J",
    "shortcut_item": "L",
    "shortcut_weight": "L",
    "shortcut_recency": "O",
}
# All others are float32.
INTEGERS = frozenset({"shortcut_start", "shortcut_item"})

_TINY = np.float32(1e-12)


def sigmoid(x: Array) -> Array:
    """Gives 1 / (1 + exp(-x)), written with tanh, which does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def embed(weights: Weights, tokens: Tokens) -> Array:
    """Gives the token embeddings h_i = item + event type + age + order, shape [N, Z]."""
    return (
        weights["item_embedding"][tokens.item]
        + weights["event_type_embedding"][tokens.event_type]
        + weights["age_embedding"][tokens.age]
        + weights["order_embedding"][tokens.order]
    )


def encoder_gates(weights: Weights, tokens: Tokens, embedded: Array) -> Array:
    """Gives the attention gate a_i = recency · sigmoid(W_a h_i + b_a + type + age + order) of each token, shape [N]."""
    gates: Array = weights["gate_recency"][tokens.order] * sigmoid(
        embedded @ weights["encoder_gate_weight"]
        + weights["encoder_gate_bias"]
        + weights["event_type_gate"][tokens.event_type]
        + weights["age_gate"][tokens.age]
        + weights["order_gate"][tokens.order],
    )
    return gates


def sum_rows(start: Any, values: Array) -> Array:
    """Gives the sum of the rows start[u] to start[u + 1] of `values` [N, ...], [U, ...]; 0 where there is none."""
    sums = np.zeros((len(start) - 1, *values.shape[1:]), dtype=np.float32)
    filled = start[1:] > start[:-1]
    # Twice as fast as add.at; it would give a user without tokens its neighbour's first token.
    if filled.any():
        sums[filled] = np.add.reduceat(values, start[:-1][filled], axis=0)
    return sums


def mean_of_features(embedding: Array, features: FeatureBag) -> Array:
    """Gives the mean embedding of each one's feature tokens, shape [U, Z]; 0 for who has none."""
    sums = sum_rows(features.start, embedding[features.token])
    return sums / np.maximum(features.counts(), 1).astype(np.float32)[:, None]


def pool(weights: Weights, tokens: Tokens) -> Array:
    """Gives the pooled history of each user, [U, Z]: sqrt(Z) (sum a_i h_i / sqrt(sum a_i^2) + mean of features).

    The factor sqrt(Z) gives a sum of random directions the length of a draw from the prior N(0, I).
    """
    embedded = embed(weights, tokens)
    gates = encoder_gates(weights, tokens, embedded)
    norms = np.maximum(np.sqrt(sum_rows(tokens.start, gates * gates)), _TINY)
    pooled = sum_rows(tokens.start, gates[:, None] * embedded) / norms[:, None]
    if tokens.features is not None:
        pooled += mean_of_features(weights["user_feature_embedding"], tokens.features)
    pooled *= np.float32(np.sqrt(pooled.shape[1]))
    return pooled


def mean_of_latent(weights: Weights, pooled: Array) -> Array:
    """Gives the mean of q(z | x), shape [U, Z]: the pooled history and what the hidden layer adds to it."""
    hidden = np.tanh(pooled @ weights["encoder_weight"].T + weights["encoder_bias"])
    mean: Array = pooled + hidden @ weights["mean_weight"].T + weights["mean_bias"]
    return mean


def encode(weights: Weights, tokens: Tokens) -> Array:
    """Gives the mean of q(z | x) of each user, shape [U, Z]; a user without tokens gets that of an empty history."""
    return mean_of_latent(weights, pool(weights, tokens))


def decode_direction(weights: Weights, z: Array) -> Array:
    """Gives the decoder's direction r / |r|, shape [U, Z]: r = b * z + what the hidden layer adds to it, and
    b = sigmoid(W_b z + b_b) is the gate of each latent dimension.
    """
    gated = sigmoid(z @ weights["decoder_gate_weight"].T + weights["decoder_gate_bias"]) * z
    hidden = np.tanh(gated @ weights["decoder_weight"].T + weights["decoder_bias"])
    r = gated + hidden @ weights["decoder_output_weight"].T
    direction: Array = r / np.maximum(np.sqrt((r * r).sum(axis=1, keepdims=True)), _TINY)
    return direction


def decode(weights: Weights, z: Array) -> Array:
    """Gives the decoder's logits of the multinomial over the catalogue, shape [U, I].

    The rows of output_weight are the items' directions over the temperature: a logit is cos(r, o_j) / tau + b_j.
    """
    logits = decode_direction(weights, z) @ weights["output_weight"].T
    logits += weights["output_bias"]
    return logits


def linked_items(weights: Weights, tokens: Tokens) -> tuple[Array, Array, Array]:
    """Gives user, item and w_i / sqrt(sum w_i^2) of each different item of the histories, users in order."""
    latest = tokens.latest_of_items()
    user, item = tokens.users()[latest], tokens.item[latest]
    recency = weights["shortcut_recency"][tokens.order[latest]]
    norms = np.sqrt(np.bincount(user, weights=recency * recency, minlength=tokens.user_count)).astype(np.float32)
    return user, item, recency / np.maximum(norms, _TINY)[user]


# Sums, and links that are added up, of a block: 8 MB of float64, and 50 bytes a link.
_SHORTCUT_BLOCK = 1_000_000


def add_shortcut(weights: Weights, tokens: Tokens, logits: Array) -> None:
    """Adds to the logits, [U, I], in place, the sum of w_i S[i, j] over the different items i of a history, over
    sqrt(sum w_i^2), with the recency w_i of the latest event of an item.

    An item counts once: three purchases of it do not foretell three times as much. Item i's links are shortcut_start[i]
    to shortcut_start[i + 1].
    """
    start, linked, weight = weights["shortcut_start"], weights["shortcut_item"], weights["shortcut_weight"]
    if not len(linked) or not len(tokens.item):
        return
    # The catalogue may be larger than what is ranked.
    items = logits.shape[1]
    user, item, share = linked_items(weights, tokens)
    counts = start[item + 1] - start[item]
    # Blocks of items, not of users: a best seller can have a link to every item.
    work = np.cumsum(counts + items * np.diff(user, prepend=user[0] - 1))
    for first, last in pieces(work, _SHORTCUT_BLOCK):
        # The place of each link's item.
        place = np.repeat(np.arange(last - first), counts[first:last])
        link = ranges(start[item[first:last]], counts[first:last])
        users = slice(int(user[first]), int(user[last - 1]) + 1)
        row = user[first:last] - user[first]
        sums = np.bincount(
            row[place] * items + linked[link],
            weights=share[first:last][place] * weight[link],
            minlength=(users.stop - users.start) * items,
        )
        logits[users] += sums.reshape(users.stop - users.start, items).astype(np.float32)


def softmax(logits: Array) -> Array:
    """Turns logits, shape [U, I], into the probabilities of each row, in place.

    The peak is taken off first: subtracting log sum exp from large logits in float32 would leave sums of 1.0003.
    """
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


# Columns of a group in top_k: fewer make more maxima to partition, more make more candidates.
_GROUP = 16


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """Gives the columns and values of the k largest entries of each row, largest first, both of shape [U, k].

    Of equal values the first columns count, and come first. The k largest entries lie in the k groups of columns with
    the largest maxima, so only these groups are partitioned: a third to a sixth of the time of all of 20 000 columns.
    """
    k = min(k, scores.shape[1])
    columns = _candidates(scores, k)
    if k < columns.shape[1]:
        values = np.take_along_axis(scores, columns, axis=1)
        best = np.argpartition(values, columns.shape[1] - k, axis=1)[:, -k:]
        columns = np.take_along_axis(columns, best, axis=1)
    columns = np.sort(columns, axis=1)
    least = np.take_along_axis(scores, columns, axis=1).min(axis=1, keepdims=True)
    # Of columns that share the k-th largest value, those that a partition takes are any.
    for row in np.flatnonzero((scores >= least).sum(axis=1) > k).tolist():
        above, equal = np.flatnonzero(scores[row] > least[row]), np.flatnonzero(scores[row] == least[row])
        columns[row] = np.sort(np.concatenate((above, equal[: k - len(above)])))
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1), np.take_along_axis(values, order, axis=1)


def _candidates(scores: Array, k: int) -> Array:
    """Gives columns among which are those of the k largest entries of each row, [U, at least k]."""
    users, items = scores.shape
    groups = items // _GROUP
    if groups <= 2 * k:
        return np.broadcast_to(np.arange(items), scores.shape)
    # Group g holds the columns g, g + groups, g + 2 groups …: the maxima are then taken over long runs of memory.
    maxima = scores[:, : groups * _GROUP].reshape(users, _GROUP, groups).max(axis=1)
    best = np.argpartition(maxima, groups - k, axis=1)[:, -k:]
    within = (best[:, None, :] + (np.arange(_GROUP) * groups)[None, :, None]).reshape(users, -1)
    rest = np.broadcast_to(np.arange(groups * _GROUP, items), (users, items - groups * _GROUP))
    return np.concatenate((within, rest), axis=1)
