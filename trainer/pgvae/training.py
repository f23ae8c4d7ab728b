"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.model import AttentionVae, kl_divergence
from pgvae.ranking import Holdout, Scorer, per_user_metrics
from pgvae_runtime.scoring import score_users
from pgvae_runtime.tokens import History, Tokens

VALIDATION_K = 20


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the users gave; losses are means per user, in nats."""

    phase: str
    epoch: int
    loss: float
    reconstruction: float
    kl: float
    validation_ndcg: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A trained network's weights, by the names of pgvae_runtime.forward.SHAPES, and its learning curve."""

    weights: dict[str, NDArray[np.float32]]
    best_epoch: int
    curve: list[Epoch]


def fit(
    dataset: Dataset,
    config: TrainingConfig,
    *,
    max_history: int,
    phase: str,
    epochs: int | None = None,
    validation: Holdout | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Fit:
    """Trains on all users of a dataset; with a validation holdout, keeps the epoch that ranks best there.

    Loss per user: λ · (-sum over items of target weight · log π) + (1 - λ) · KL(q(z | x) || N(0, I)), where 1 - λ
    rises from 0 to `kl_weight` (Liang et al. 2018, eq. 8; docs/model.md). PgvaeError where it stops being finite.
    """
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(config.seed)
    shuffler = np.random.default_rng(config.seed)
    users = np.unique(dataset.user)
    targets = _targets(dataset)
    network = AttentionVae(item_popularity=dataset.popularity(), event_types=len(dataset.event_types), config=config)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    total = epochs or config.epochs
    steps_per_epoch = -(-len(users) // config.batch_size)
    anneal_steps = max(1, round(config.anneal_epochs * steps_per_epoch))
    best = Fit(weights={}, best_epoch=0, curve=[])
    best_ndcg = -1.0
    curve: list[Epoch] = []
    step = 0
    for number in range(1, total + 1):
        begun = time.perf_counter()
        network.train()
        sums = np.zeros(3)
        for batch in np.array_split(shuffler.permutation(users), steps_per_epoch):
            beta = config.kl_weight * min(1.0, step / anneal_steps)
            tokens = _drop(dataset.history(batch).tokens(max_history), config.token_dropout, shuffler)
            logits, mean, log_variance = network(tokens, generator)
            target = torch.from_numpy(targets[batch].toarray())
            reconstruction = -(target * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
            kl = kl_divergence(mean, log_variance).mean()
            loss = (1.0 - beta) * reconstruction + beta * kl
            if not torch.isfinite(loss):
                raise _diverged(f"the loss is {loss.item()} in epoch {number}", config)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sums += len(batch) * np.array([loss.item(), reconstruction.item(), kl.item()])
            step += 1
        weights = network.weights()
        # A last step that is too wide leaves no loss to tell of it.
        if not all(np.isfinite(tensor).all() for tensor in weights.values()):
            raise _diverged(f"weights are not finite after epoch {number}", config)
        ndcg = None
        if validation is not None:
            metrics = per_user_metrics(validation, scorer(weights, max_history), VALIDATION_K)
            ndcg = float(metrics["ndcg"].mean())
        losses = (sums / len(users)).tolist()
        curve.append(
            Epoch(
                phase=phase,
                epoch=number,
                loss=losses[0],
                reconstruction=losses[1],
                kl=losses[2],
                validation_ndcg=ndcg,
                seconds=time.perf_counter() - begun,
            )
        )
        on_epoch(curve[-1])
        if ndcg is None or ndcg > best_ndcg:
            best = Fit(weights=weights, best_epoch=number, curve=curve)
            best_ndcg = ndcg or 0.0
        elif number - best.best_epoch >= config.patience:
            break
    return best


def _diverged(what: str, config: TrainingConfig) -> PgvaeError:
    return PgvaeError(what, hint=f"train again with a lower --learning-rate than {config.learning_rate}")


def scorer(weights: dict[str, NDArray[np.float32]], max_history: int) -> Scorer:
    """Gives the runtime's own scores for these weights: what is evaluated is what the database will compute."""

    def score(history: History) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = score_users(np, weights, history, max_history=max_history)[0]
        return scores

    return score


def _targets(dataset: Dataset) -> sparse.csr_array:
    """Gives what the network must reconstruct, [U, I]: of each pair the heaviest event's weight, at most 1."""
    shape = (dataset.user_count, len(dataset.item_keys))
    pair = dataset.user * shape[1] + dataset.item
    # Sorted by pair and weight, the last of each pair is its heaviest.
    order = np.lexsort((dataset.weight, pair))
    last = np.append(pair[order][1:] != pair[order][:-1], True)
    chosen = order[last]
    weight = dataset.weight[chosen] / max(float(dataset.weight.max(initial=0.0)), 1e-9)
    return sparse.csr_array((weight, (dataset.user[chosen], dataset.item[chosen])), shape=shape)


def _drop(tokens: Tokens, share: float, generator: np.random.Generator) -> Tokens:
    """Gives the tokens without a random share of them: what the network must guess (Liang et al. 2018, section 2.3)."""
    kept = generator.random(len(tokens.item)) >= share
    start = np.concatenate(([0], np.cumsum(kept)))[tokens.start]
    return Tokens(start=start, item=tokens.item[kept], event_type=tokens.event_type[kept], age=tokens.age[kept])
