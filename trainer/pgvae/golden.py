"""Golden users: histories that are stored with a version, and the scores that the network gives them.

A database replays them with vae.verify. The scores come from PyTorch in double precision, so what is compared is the
runtime's arithmetic on that server with the trained network itself, not with another run of the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.model import AttentionVae
from pgvae_runtime.features import NO_FEATURES, FeatureBag
from pgvae_runtime.tokens import History

_USERS = 32
_K = 20
# A history that is cut shows whether it is cut at the same event.
_LONGEST = 2
_FEW = 5


@dataclass(frozen=True, kw_only=True)
class GoldenUser:
    """A row of vae_private.golden_users: a history as rows of the tensors, its feature tokens, and its best items."""

    items: list[int]
    event_types: list[int]
    occurred_at: list[float]
    features: list[int]
    top_items: list[int]
    top_scores: list[float]


def golden_users(
    dataset: Dataset, config: TrainingConfig, weights: dict[str, NDArray[Any]], *, max_history: int
) -> list[GoldenUser]:
    """Gives made-up users, from one without events to one with more than are read, and their best items.

    No history is a person's: each event takes its item and type from one event of the shop and its time from another,
    each feature token comes from any user. Lengths are those of real histories.
    """
    generator = np.random.default_rng(config.seed)
    history = _made_up(dataset, max_history, generator)
    scores = _scores(dataset, config, weights, history, max_history)
    user, item = history.seen(dataset.targets)
    scores[user, item] = -1.0
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_K]
    start = np.concatenate(([0], np.cumsum(history.counts)))
    users = []
    for number, columns in enumerate(best):
        own = slice(start[number], start[number + 1])
        columns = columns[scores[number, columns] >= 0]
        bag = history.features
        users.append(
            GoldenUser(
                items=history.item[own].tolist(),
                event_types=history.event_type[own].tolist(),
                occurred_at=history.occurred_at[own].tolist(),
                features=bag.token[bag.start[number] : bag.start[number + 1]].tolist() if bag else [],
                top_items=columns.tolist(),
                top_scores=scores[number, columns].tolist(),
            )
        )
    return users


def _made_up(dataset: Dataset, max_history: int, generator: np.random.Generator) -> History:
    lengths = np.quantile(np.bincount(dataset.user), np.linspace(0, 1, _USERS - 3)).astype(np.int64)
    # Nobody's history, one event, and one more event than is read.
    counts = np.minimum(np.concatenate(([0, 1], lengths, [max_history + 1])), _LONGEST * max_history)
    total = int(counts.sum())
    what, when = generator.integers(0, len(dataset.item), (2, total))
    # So many different items could be all that a shop has, and would leave nothing to recommend.
    what[-max_history - 1 :] = generator.choice(what[:_FEW], max_history + 1)
    features = None
    if dataset.user_pipeline.size and len(dataset.user_features.token):
        bag = dataset.user_features
        sizes = generator.choice(bag.counts(), len(counts))
        features = FeatureBag.of([np.unique(generator.choice(bag.token, size)).tolist() for size in sizes])
    return History(
        counts=counts,
        item=dataset.item[what],
        event_type=dataset.event_type[what],
        occurred_at=dataset.occurred_at[when],
        features=features,
    )


@torch.no_grad()
def _scores(
    dataset: Dataset,
    config: TrainingConfig,
    weights: dict[str, NDArray[Any]],
    history: History,
    max_history: int,
) -> NDArray[np.float64]:
    """Gives the softmax over the catalogue of the decoder at z = mean and of the shortcut, [U, I], in float64."""
    # The features of items are in the items' own rows already.
    network = AttentionVae(
        replace(dataset, item_pipeline=NO_FEATURES, item_features=FeatureBag.empty(0)), config
    ).double()
    own = network.state_dict()
    network.load_state_dict({name: torch.from_numpy(weights[name]) for name in own if name in weights}, strict=False)
    tokens = history.tokens(max_history)
    direction = network.decode_direction(network.posterior(network.pool(tokens))[0])
    items = len(dataset.item_keys)
    # A heavy shortcut divides the decoder's logits: the length of the rows says by what, and not the temperature alone.
    # The rows of items of which nothing is known, as of cold ones without features, are zero.
    lengths = np.linalg.norm(weights["output_weight"].astype(np.float64), axis=1)
    length = float(lengths[lengths > 0].mean())
    logits = direction @ network.item_directions(np.arange(items)).T * length + network.output_bias
    start, linked = weights["shortcut_start"], torch.from_numpy(weights["shortcut_item"].astype(np.int64))
    weight, recency = (torch.from_numpy(weights[f"shortcut_{name}"]).double() for name in ("weight", "recency"))
    for user in range(tokens.user_count):
        events = slice(int(tokens.start[user]), int(tokens.start[user + 1]))
        # The latest event of an item is the last of its tokens.
        orders = dict(zip(tokens.item[events].tolist(), tokens.order[events].tolist(), strict=True))
        norm = sum(recency[order] ** 2 for order in orders.values()) ** 0.5
        for item, order in orders.items():
            links = slice(int(start[item]), int(start[item + 1]))
            logits[user].index_add_(0, linked[links], weight[links] * recency[order] / norm)
    scores: NDArray[np.float64] = torch.softmax(logits, dim=1).numpy()
    unknown = history.counts == 0
    if history.features is not None:
        unknown &= history.features.counts() == 0
    scores[unknown] = weights["item_popularity"]
    return scores
