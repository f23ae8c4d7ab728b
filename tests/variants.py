"""Databases that differ from what a release installs and a training publishes: other code, other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from pgvae import resources
from pgvae.config import TrainingConfig
from pgvae.connection import connect
from pgvae.dataset import Dataset, read_dataset, read_definition
from pgvae.install import install
from pgvae.item_graph import Convolution
from pgvae.loop import Fit
from pgvae.model import AttentionVae
from pgvae.publish import publish
from pgvae.shortcut import Links
from pgvae.transfer import _digest, read_file
from pgvae.validation import NO_SHORTCUT
from pgvae_runtime.features import NO_FEATURES, FeatureBag, FeatureColumn, FeaturePipeline
from pgvae_runtime.tokens import ORDER_BUCKETS, History


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
    """Gives a network in which no gate, embedding or bias is zero, as a fresh or a briefly trained one has them.

    But for those of parts that the configuration leaves out. Its items lean on others that need not be similar to them.
    """
    drawn = np.random.default_rng(seed)
    size = (len(dataset.item_keys), 3)
    graph = Convolution(item=drawn.integers(0, size[0], size), weight=drawn.random(size, dtype=np.float32))
    network = AttentionVae(dataset, config, graph)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter.shape[-1], 1) ** -0.5)
        recency = network.get_buffer("gate_recency")
        recency.copy_(0.1 + torch.rand(recency.shape, generator=generator))
    return network.eval()


def random_links(dataset: Dataset, seed: int) -> Links:
    """Gives a shortcut of seven random links an item; item 0 has as many more, some to one item more than once."""
    generator = np.random.default_rng(seed)
    items = len(dataset.item_keys)
    owner = np.sort(np.append(generator.integers(0, items, 7 * items), np.zeros(2 * items, dtype=int)))
    return Links(
        start=np.searchsorted(owner, np.arange(items + 1)).astype(np.int32),
        item=generator.integers(0, items, len(owner)).astype(np.int32),
        weight=generator.normal(0, 0.5, len(owner)).astype(np.float32),
        recency=0.1 + generator.random(ORDER_BUCKETS, dtype=np.float32),
    )


def dataset_of(events: list[tuple[int, int, int, float]], users: int, items: int) -> Dataset:
    """Gives events of user, item, event type and time as a dataset."""
    columns = np.array(sorted(events, key=lambda event: (event[0], event[3], event[1], event[2]))).T
    return Dataset(
        user=columns[0].astype(np.int64),
        item=columns[1].astype(np.int64),
        event_type=columns[2].astype(np.int64),
        occurred_at=columns[3],
        weight=np.array([1.0, 4.0], dtype=np.float32)[columns[2].astype(np.int64)],
        item_keys=[str(item) for item in range(items)],
        event_types=["view", "purchase"],
        user_count=users,
    )


def with_features(dataset: Dataset, seed: int, *, cold_items: int = 0) -> Dataset:
    """Gives a dataset whose users and items have 0 to 3 of some feature tokens each, and that many items more, without
    events.
    """
    generator = np.random.default_rng(seed)

    def bag(count: int, size: int) -> FeatureBag:
        return FeatureBag.of([sorted({*generator.integers(0, size, n % 4).tolist()}) for n in range(count)])

    items = len(dataset.item_keys) + cold_items
    return replace(
        dataset,
        item_keys=[*dataset.item_keys, *(f"cold {item}" for item in range(cold_items))],
        user_pipeline=_pipeline(7),
        item_pipeline=_pipeline(9),
        user_features=bag(dataset.user_count, 7),
        item_features=bag(items, 9),
    )


def _pipeline(size: int) -> FeaturePipeline:
    edges = tuple(float(edge) for edge in range(1, size))
    return FeaturePipeline(columns=(FeatureColumn(name="x", kind="number", first=0, edges=edges),))


def publish_network(
    dsn: str, model: str, config: TrainingConfig, seed: int
) -> tuple[int, AttentionVae, Dataset, Links]:
    """Publishes a random network and shortcut as a version of a model; gives its number, these, and the data."""
    with connect(dsn) as connection:
        definition, dataset = read_definition(connection, model), read_dataset(connection, model)
        network = random_network(dataset, config, seed)
        links = random_links(dataset, seed)
        version = publish(
            connection,
            definition=definition,
            dataset=dataset,
            config=config,
            fit=Fit(weights=network.weights() | links.tensors(), best_epoch=1, curve=[], shortcut=NO_SHORTCUT),
            curve=[],
            metrics=[],
            durations={},
        )
    return version, network, dataset, links


def torch_scores(network: AttentionVae, links: Links, history: History, max_history: int) -> NDArray[np.float32]:
    """Gives PyTorch's scores, [U, I]: the softmax of the decoder at z = mean and of the shortcut, as a dense matrix."""
    tokens = history.tokens(max_history)
    cold = ~network.trained_items
    items = np.arange(len(cold))
    with torch.no_grad():
        # An item without events in training is known by its features alone.
        pooled = network.pool(tokens, alone=cold[tokens.item])
        direction = network.decode_direction(network.posterior(pooled)[0])
        logits = direction @ network.item_directions(items, alone=cold).T / network.temperature
        bias = network.output_bias.masked_fill(torch.from_numpy(cold), 0.0)
        if cold.any():
            bias[cold] = float(np.median(network.output_bias[~cold].numpy()))
        dense = torch.zeros(len(cold), len(cold), dtype=torch.float64)
        owner = torch.from_numpy(np.repeat(items, np.diff(links.start)))
        linked, weight = torch.from_numpy(links.item.astype(np.int64)), torch.from_numpy(links.weight).double()
        dense.index_put_((owner, linked), weight, accumulate=True)
        held = torch.zeros(tokens.user_count, len(cold), dtype=torch.float64)
        # An item counts once, by its latest event, and a user with more items no more than one with fewer.
        for user, item, order in zip(tokens.users().tolist(), tokens.item.tolist(), tokens.order.tolist(), strict=True):
            held[user, item] = float(links.recency[order])
        held /= held.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        return torch.softmax(logits + bias + held @ dense, dim=1).float().numpy()


def network_of_active_version(
    connection: psycopg.Connection[Any], model: str = "shop"
) -> tuple[AttentionVae, Links, Dataset]:
    """Gives the active version of a model as a PyTorch network and a shortcut, from the raw bytes of its tensors.

    The features of items are in the items' own rows already, and the temperature in their directions' length.
    """
    parts: dict[str, tuple[str, list[int], bytes]] = {}
    for name, dtype, shape, data in connection.execute(
        "select t.name, t.dtype, t.shape, t.data from vae_private.scoring_tensors t"
        " join vae.versions v using (version_id) join vae.models m using (model_id)"
        " where v.state = 'active' and m.name = %s order by t.name, t.chunk",
        [model],
    ).fetchall():
        parts[name] = (dtype, shape, parts.get(name, ("", [], b""))[2] + data)
    weights = {name: np.frombuffer(data, dtype).reshape(shape).copy() for name, (dtype, shape, data) in parts.items()}
    dataset = replace(read_dataset(connection, model), item_pipeline=NO_FEATURES)
    latent, hidden = weights["mean_weight"].shape
    links = Links(**{name: weights.pop(f"shortcut_{name}") for name in ("start", "item", "weight", "recency")})
    length = np.linalg.norm(weights["output_weight"], axis=1)
    config = TrainingConfig(hidden=hidden, latent=latent, temperature=1 / float(length.mean()))
    np.testing.assert_allclose(length, length.mean(), rtol=1e-5)
    network = AttentionVae(dataset, config)
    # Beside the network's own there are the tensors of segments and outcomes.
    own = weights.keys() & network.state_dict().keys()
    network.load_state_dict(
        {name: torch.tensor(weights[name]) for name in own}
        | {name: torch.zeros(0, latent) for name in ("item_feature_embedding", "item_feature_output")}
    )
    # The rows of the cold items are filled, too.
    network.trained_items = np.ones(len(dataset.item_keys), dtype=bool)
    return network.eval(), links, dataset


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Writes an export with another document and other tensors, and with the right checksums, as a forger would."""
    document, tensors = read_file(path)
    change(document, tensors)
    document["sha256"] = {name: _digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps(document, sort_keys=True)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    metadata |= {"document": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(tensors, target, metadata=metadata)
    return target
