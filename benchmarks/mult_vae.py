"""Mult-VAE as published (Liang et al. 2018), the plain peer: full softmax, dense input, one hidden layer of 600."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pgvae.dataset import Dataset
from pgvae.item_graph import incidence
from pgvae.ranking import Holdout, Scorer, per_user_metrics, some_users
from pgvae_runtime.tokens import History

HIDDEN, LATENT, BATCH, RATE = 600, 200, 500, 1e-3
# The weight of the KL term rises to 0.2 (section 4.3) over so many epochs.
KL_WEIGHT, ANNEAL_EPOCHS = 0.2, 20
EPOCHS, PATIENCE = 100, 10


class MultVae(nn.Module):
    """I → 600 → 200 → 600 → I with tanh, input L2-normalised with dropout 0.5."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(items, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, items))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.normal_(module.bias, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the logits and the KL divergence of each user."""
        mean, log_variance = self.encoder(nn.functional.dropout(nn.functional.normalize(x), 0.5, self.training)).chunk(
            2, dim=1
        )
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance) if self.training else mean
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        return self.decoder(z), kl


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained Mult-VAE: the epoch that ranked best, seconds per epoch, and (seconds so far, NDCG) after each."""

    scorer: Scorer
    best_epoch: int
    epoch_seconds: float
    curve: list[tuple[float, float]]


def fit(
    dataset: Dataset,
    *,
    validation: Holdout | None,
    epochs: int = EPOCHS,
    seconds: float = float("inf"),
    seed: int = 1,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Trains for so many epochs, or, with a validation part, until it has not got better for ten, or time is over."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    items = len(dataset.item_keys)
    matrix = incidence(dataset.user, dataset.item, dataset.user_count, items)
    users = np.unique(dataset.user)
    network = MultVae(items).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    if validation is not None:
        validation = some_users(validation, 5000, seed)
    steps = -(-len(users) // BATCH)
    best, best_ndcg, best_epoch, step, spent = network.state_dict(), -1.0, epochs, 0, 0.0
    curve: list[tuple[float, float]] = []
    for epoch in range(1, epochs + 1):
        begun = time.perf_counter()
        network.train()
        for batch in np.array_split(generator.permutation(users), steps):
            x = torch.from_numpy(matrix[batch].toarray()).to(device)
            logits, kl = network(x)
            beta = KL_WEIGHT * min(1.0, step / (ANNEAL_EPOCHS * steps))
            loss = (beta * kl - (torch.log_softmax(logits, dim=1) * x).sum(dim=1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        # Waits for a GPU.
        loss.item()
        spent += time.perf_counter() - begun
        if validation is None:
            best = network.state_dict()
            continue
        ndcg = float(per_user_metrics(validation, _scorer(network, items), 20)["ndcg"].mean())
        curve.append((spent, ndcg))
        say(f"Mult-VAE epoch {epoch}: NDCG@20 {ndcg:.4f}, {spent / epoch:.1f} s an epoch")
        if ndcg > best_ndcg:
            best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            best_ndcg, best_epoch = ndcg, epoch
        elif epoch - best_epoch >= PATIENCE:
            break
        if spent > seconds:
            break
    network.load_state_dict(best)
    network.cpu()
    return Trained(
        scorer=_scorer(network, items), best_epoch=best_epoch, epoch_seconds=spent * steps / max(1, step), curve=curve
    )


def _scorer(network: MultVae, items: int) -> Scorer:
    def score(history: History) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        network.eval()
        x = incidence(history.users(), history.item, len(history.counts), items).toarray()
        with torch.no_grad():
            return network(torch.from_numpy(x).to(next(network.parameters()).device))[0].cpu().numpy()

    return score
