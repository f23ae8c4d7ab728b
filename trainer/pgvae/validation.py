"""What the validation part chooses once a network is trained: how fast events fade, and the shortcut beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.ranking import (
    Holdout,
    best_items,
    histories,
    hits_of,
    leave_out,
    list_metrics,
    per_user_metrics,
    scorer,
)
from pgvae.shortcut import UNORDERED_WAYS, WAYS, Links, shortcuts
from pgvae_runtime import forward
from pgvae_runtime.tokens import History, recency_of_orders

VALIDATION_K = 20
# How fast events fade, in gates and in links: (1 + moments after it)^-exponent.
RECENCIES = (0.0, 0.5, 1.0)
# How much the shortcut's links weigh beside the decoder's logits.
SHORTCUT_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
# From there on the decoder's logits are divided instead: float32 has no e^-104, and items without a share would tie.
_MOST_SCALE = 16.0
# Links of what came before what must be better without this share of the events, too.
_NEWEST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class ShortcutChoice:
    """One of the ways of pgvae.shortcut, how much it weighs beside the decoder, and how fast items fade in it; no way,
    no shortcut.
    """

    way: str | None
    scale: float
    recency: float = 0.0


NO_SHORTCUT = ShortcutChoice(way=None, scale=0.0)
# Where nothing can be validated.
DEFAULT_SHORTCUT = ShortcutChoice(way="cooccurrence", scale=4.0)

Weights = dict[str, NDArray[Any]]
# Links by the name of their way.
Ways = Mapping[str, Links]


def ndcg(validation: Holdout, weights: Weights, max_history: int) -> float:
    """Gives the mean NDCG@20 of these weights."""
    return float(per_user_metrics(validation, scorer(weights, max_history), VALIDATION_K)["ndcg"].mean())


def choose_recency(
    validation: Holdout, weights: Weights, recencies: Sequence[float], max_history: int, flat: float
) -> float:
    """Gives how fast events shall fade in the encoder, the shortcut left out; of equal ones the first.

    `flat` is the NDCG where none fades, which the first of the recencies says.
    """
    alone = with_links(weights, {}, NO_SHORTCUT)
    ndcgs = {0.0: flat} | {each: ndcg(validation, fading(alone, each), max_history) for each in recencies[1:]}
    return max(ndcgs, key=ndcgs.__getitem__)


def fading(weights: Weights, recency: float) -> Weights:
    """Gives the weights with gates that fade as fast as that."""
    return weights | {"gate_recency": recency_of_orders(recency)}


def choose_shortcut(
    validation: Holdout,
    weights: Weights,
    ways: Ways,
    recencies: Sequence[float],
    dataset: Dataset,
    config: TrainingConfig,
    max_history: int,
) -> tuple[ShortcutChoice, dict[ShortcutChoice, float]]:
    """Gives the best shortcut beside these weights, and the NDCG of each that was tried; `ways` are of the dataset."""
    ndcgs = shortcut_ndcgs(validation, weights, ways, max_history)
    # Which way is best hardly depends on the recency: the others are spared.
    best_ways = (_best(ndcgs, UNORDERED_WAYS).way, _best(ndcgs, WAYS).way)
    few = {way: links for way, links in ways.items() if way in best_ways}
    for recency in recencies[1:]:
        ndcgs |= shortcut_ndcgs(validation, weights, few, max_history, recency)
    plain, best = _best(ndcgs, UNORDERED_WAYS), _best(ndcgs, WAYS)
    if best != plain and not _lasts(dataset, config, validation, weights, max_history, best, plain):
        best = plain
    return best, ndcgs


def shortcut_ndcgs(
    validation: Holdout, weights: Weights, ways: Ways, max_history: int, recency: float = 0.0
) -> dict[ShortcutChoice, float]:
    """Gives the mean NDCG@20 of these weights without a shortcut and with each way in each scale.

    Logits and links are linear: both are computed once per user, and added up for each choice.
    """
    choices = [ShortcutChoice(way=way, scale=scale, recency=recency) for way in ways for scale in SHORTCUT_SCALES]
    hits = {choice: np.zeros((len(validation.users), VALIDATION_K), dtype=bool) for choice in (NO_SHORTCUT, *choices)}

    def rank(choice: ShortcutChoice, part: slice, history: History, scores: NDArray[np.float32]) -> None:
        leave_out(validation, history, scores)
        hits[choice][part] = hits_of(best_items(scores, VALIDATION_K), *validation.truth(part))

    for part, history in histories(validation):
        tokens = history.tokens(max_history)
        logits = forward.decode(weights, forward.encode(weights, tokens))
        rank(NO_SHORTCUT, part, history, logits.copy())
        for way, links in ways.items():
            sums = np.zeros_like(logits)
            forward.add_shortcut(links.fading(recency).tensors(), tokens, sums)
            for scale in SHORTCUT_SCALES:
                choice = ShortcutChoice(way=way, scale=scale, recency=recency)
                rank(choice, part, history, logits + np.float32(scale) * sums)
    counts = np.diff(validation.truth_start)
    return {choice: float(list_metrics(found, counts, VALIDATION_K)["ndcg"].mean()) for choice, found in hits.items()}


def with_links(weights: Weights, ways: Ways, choice: ShortcutChoice) -> Weights:
    """Gives the weights with links that weigh `choice.scale` times as much beside the decoder's logits.

    Above 16 it is the logits that are divided, which ranks alike.
    """
    links = ways[choice.way] if choice.way else Links.none(len(weights["output_weight"]))
    share = min(1.0, _MOST_SCALE / max(choice.scale, 1.0))
    decoder = {name: weights[name] * np.float32(share) for name in ("output_weight", "output_bias")}
    return weights | (decoder if share < 1.0 else {}) | links.fading(choice.recency).tensors(choice.scale * share)


def _best(ndcgs: dict[ShortcutChoice, float], ways: Sequence[str]) -> ShortcutChoice:
    """Gives the best choice among these ways and none; of equal ones the first: none, then the lighter one."""
    return max((choice for choice in ndcgs if choice.way is None or choice.way in ways), key=ndcgs.__getitem__)


def _lasts(
    dataset: Dataset,
    config: TrainingConfig,
    validation: Holdout,
    weights: Weights,
    max_history: int,
    choice: ShortcutChoice,
    plain: ShortcutChoice,
) -> bool:
    """Tells whether one choice of a shortcut is better than another with links that lack the newest events, too.

    What came before what changes with the assortment: a lead that fresh links alone have is gone after some weeks.
    """
    older = dataset.between(-np.inf, float(np.quantile(dataset.occurred_at, 1.0 - _NEWEST_SHARE)))
    if not len(older.user):
        return True
    ways = shortcuts(older, config.neighbours, config.seed, [each.way for each in (choice, plain) if each.way])
    lead, flat = (ndcg(validation, with_links(weights, ways, each), max_history) for each in (choice, plain))
    return lead > flat
