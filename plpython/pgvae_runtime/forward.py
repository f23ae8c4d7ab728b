"""The scorer: the same mathematics as the trainer's network, on any array module.

Every function takes the array module `xp` (numpy or cupy) first and computes in float32. Shapes: U users,
N tokens, I items, D embedding width, H hidden width, Z latent width. Formulas: docs/model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .tokens import Tokens

# An array of `xp`: NumPy's type cannot name CuPy's.
Array = Any
Weights = Mapping[str, Array]

FORMAT = 1
SHAPES: Mapping[str, str] = {
    "item_embedding": "ID",
    "event_type_embedding": "TD",
    "age_embedding": "AD",
    "encoder_gate_weight": "D",
    "encoder_gate_bias": "1",
    "encoder_weight": "HD",
    "encoder_bias": "H",
    "mean_weight": "ZH",
    "mean_bias": "Z",
    "log_variance_weight": "ZH",
    "log_variance_bias": "Z",
    "decoder_gate_weight": "ZZ",
    "decoder_gate_bias": "Z",
    "decoder_weight": "HZ",
    "decoder_bias": "H",
    "output_weight": "IH",
    "output_bias": "I",
    "item_popularity": "I",
}


def sigmoid(xp: Any, x: Array) -> Array:
    """Gives 1 / (1 + exp(-x)), written with tanh, which does not overflow."""
    return 0.5 * (1.0 + xp.tanh(0.5 * x))


def embed(xp: Any, weights: Weights, tokens: Tokens) -> Array:
    """Gives the token embeddings h_i = item + event type + age, shape [N, D]."""
    return (
        weights["item_embedding"][xp.asarray(tokens.item)]
        + weights["event_type_embedding"][xp.asarray(tokens.event_type)]
        + weights["age_embedding"][xp.asarray(tokens.age)]
    )


def encoder_gates(xp: Any, weights: Weights, embedded: Array) -> Array:
    """Gives the attention gate a_i = sigmoid(W_a h_i + b_a) of each token, shape [N]."""
    return sigmoid(xp, embedded @ weights["encoder_gate_weight"] + weights["encoder_gate_bias"])


def sum_by_user(xp: Any, tokens: Tokens, values: Array) -> Array:
    """Gives the sum over each user's tokens, shape [U, ...], of values of shape [N, ...]; 0 for a user without tokens.

    CuPy's add.reduceat is no way to do this: it takes differences of one running sum over all tokens, which in float32
    was off by 5e-3 for a batch of 4096 users.
    """
    sums = xp.zeros((tokens.user_count, *values.shape[1:]), dtype=xp.float32)
    filled = tokens.start[1:] > tokens.start[:-1]
    if xp is np:
        # Twice as fast as add.at; it would give a user without tokens its neighbour's first token.
        if filled.any():
            sums[filled] = np.add.reduceat(values, tokens.start[:-1][filled], axis=0)
    else:
        xp.add.at(sums, xp.asarray(np.repeat(np.arange(tokens.user_count), np.diff(tokens.start))), values)
    return sums


def encode(xp: Any, weights: Weights, tokens: Tokens) -> Array:
    """Gives the mean of q(z | x) of each user, shape [U, Z]; a user without tokens gets that of an empty history."""
    embedded = embed(xp, weights, tokens)
    gates = encoder_gates(xp, weights, embedded)
    sums = sum_by_user(xp, tokens, gates[:, None] * embedded)
    norms = xp.sqrt(sum_by_user(xp, tokens, gates * gates))
    pooled = sums / xp.maximum(norms, xp.float32(1e-12))[:, None]
    hidden = xp.tanh(pooled @ weights["encoder_weight"].T + weights["encoder_bias"])
    return hidden @ weights["mean_weight"].T + weights["mean_bias"]


def decode_hidden(xp: Any, weights: Weights, z: Array) -> Array:
    """Gives the decoder's hidden layer, shape [U, H], from the gated latent b * z, b = sigmoid(W_b z + b_b)."""
    gate = sigmoid(xp, z @ weights["decoder_gate_weight"].T + weights["decoder_gate_bias"])
    return xp.tanh((gate * z) @ weights["decoder_weight"].T + weights["decoder_bias"])


def decode(xp: Any, weights: Weights, z: Array, out: Array | None = None) -> Array:
    """Gives the logits of the multinomial over the catalogue, shape [U, I], into `out` if it is given."""
    hidden = decode_hidden(xp, weights, z)
    logits = xp.matmul(hidden, weights["output_weight"].T, out=out)
    logits += weights["output_bias"]
    return logits


def softmax(xp: Any, logits: Array) -> Array:
    """Turns logits, shape [U, I], into the probabilities of each row, in place.

    The peak is taken off first: subtracting log sum exp from large logits in float32 would leave sums of 1.0003.
    """
    logits -= logits.max(axis=1, keepdims=True)
    xp.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


# Columns of a group in top_k: fewer make more maxima to partition, more make more candidates.
_GROUP = 16


def top_k(xp: Any, scores: Array, k: int) -> tuple[Array, Array]:
    """Gives the columns and values of the k largest entries of each row, largest first, both of shape [U, k].

    Equal values come in the order of their columns. The k largest entries lie in the k groups of columns with the
    largest maxima, so only these groups are partitioned: a third to a sixth of the time of all of 20 000 columns.
    """
    items = scores.shape[1]
    k = min(k, items)
    columns = _candidates(xp, scores, k)
    if k < columns.shape[1]:
        values = xp.take_along_axis(scores, columns, axis=1)
        best = xp.argpartition(values, columns.shape[1] - k, axis=1)[:, -k:]
        columns = xp.take_along_axis(columns, best, axis=1)
    columns = xp.sort(columns, axis=1)
    values = xp.take_along_axis(scores, columns, axis=1)
    order = xp.argsort(-values, axis=1, kind="stable")
    return xp.take_along_axis(columns, order, axis=1), xp.take_along_axis(values, order, axis=1)


def _candidates(xp: Any, scores: Array, k: int) -> Array:
    """Gives columns among which are those of the k largest entries of each row, [U, at least k]."""
    users, items = scores.shape
    groups = items // _GROUP
    if groups <= 2 * k:
        return xp.broadcast_to(xp.arange(items), scores.shape)
    # Group g holds the columns g, g + groups, g + 2 groups …: the maxima are then taken over long runs of memory.
    maxima = scores[:, : groups * _GROUP].reshape(users, _GROUP, groups).max(axis=1)
    best = xp.argpartition(maxima, groups - k, axis=1)[:, -k:]
    within = (best[:, None, :] + (xp.arange(_GROUP) * groups)[None, :, None]).reshape(users, -1)
    rest = xp.broadcast_to(xp.arange(groups * _GROUP, items), (users, items - groups * _GROUP))
    return xp.concatenate((within, rest), axis=1)
