"""Databases that differ from what a release installs and a training publishes: other code, other weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgvae import resources
from pgvae.config import TrainingConfig
from pgvae.connection import connect
from pgvae.dataset import Dataset, read_dataset, read_definition
from pgvae.install import install
from pgvae.model import AttentionVae
from pgvae.publish import publish
from pgvae.training import Fit


def install_variant(dsn: str, module: str, *changes: tuple[str, str]) -> str:
    """Installs this release with lines of one of the runtime's modules replaced; gives the digest of that code."""
    modules = resources.runtime_modules()
    for old, new in changes:
        assert modules[module].count(old) == 1
        modules[module] = modules[module].replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "runtime_modules", lambda: modules)
        return install(dsn).digest


def random_network(dataset: Dataset, config: TrainingConfig, seed: int) -> AttentionVae:
    """Gives a network in which no gate, embedding or bias is zero, as a fresh or a briefly trained one has them."""
    network = AttentionVae(item_popularity=dataset.popularity(), event_types=len(dataset.event_types), config=config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return network.eval()


def publish_network(dsn: str, model: str, config: TrainingConfig, seed: int) -> tuple[int, AttentionVae, Dataset]:
    """Publishes a random network as a version of a model; gives its number, the network and the model's data."""
    with connect(dsn) as connection:
        definition, dataset = read_definition(connection, model), read_dataset(connection, model)
        network = random_network(dataset, config, seed)
        version = publish(
            connection,
            definition=definition,
            dataset=dataset,
            config=config,
            fit=Fit(weights=network.weights(), best_epoch=1, curve=[]),
            curve=[],
            metrics=[],
            durations={},
        )
    return version, network, dataset


def torch_scores(network: AttentionVae, dataset: Dataset, users: list[int], max_history: int) -> np.ndarray:
    """Gives PyTorch's scores, [U, I], of users of a dataset by number: the probabilities at z = mean."""
    tokens = dataset.history(np.array(users)).tokens(max_history)
    with torch.no_grad():
        return torch.softmax(network.decode(network.encode(tokens)[0]), dim=1).numpy()
