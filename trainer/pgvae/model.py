"""The network: an attention-gated variational autoencoder over behaviour sequences.

Notation and formulas: docs/model.md. The parameters carry the names under which the runtime knows them
(pgvae_runtime.forward.SHAPES), and the methods mirror the functions of pgvae_runtime.forward line by line.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag

from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.item_graph import Convolution
from pgvae_runtime.features import FeatureBag
from pgvae_runtime.tokens import AGE_BUCKETS, ORDER_BUCKETS, Tokens, recency_of_orders

PER_ITEM = ("item_embedding", "output_weight", "output_bias", "item_feature_embedding", "item_feature_output")
# The parameters that stay at their neutral start where a part of the model is left out (TrainingConfig.without).
_PARAMETERS = {
    "encoder_attention": ("encoder_gate_weight", "encoder_gate_bias", "event_type_gate", "age_gate", "order_gate"),
    "decoder_attention": ("decoder_gate_weight", "decoder_gate_bias"),
    "hidden_layers": ("mean_weight", "mean_bias", "decoder_output_weight"),
    "event_types": ("event_type_embedding", "event_type_gate"),
    "age": ("age_embedding", "age_gate"),
    "order": ("order_embedding", "order_gate"),
    "features": ("user_feature_embedding", "item_feature_embedding", "item_feature_output"),
    "shortcut": (),
}


class AttentionVae(nn.Module):
    """The model of Liang et al. (2018) on tokens, with a gate per token and a gate per latent dimension.

    It starts as a linear autoencoder: every gate is 1/2 and the hidden layers add nothing. With a convolution the rows
    of items lean on those of their neighbours; `weights` has them added up.
    """

    def __init__(self, dataset: Dataset, config: TrainingConfig, convolution: Convolution | None = None) -> None:
        super().__init__()
        items, h, z = len(dataset.item_keys), config.hidden, config.latent
        self.temperature = config.temperature_for(items)
        self.item_embedding = _normal(items, z)
        self.event_type_embedding = _zeros(len(dataset.event_types), z)
        self.age_embedding = _zeros(AGE_BUCKETS, z)
        self.order_embedding = _zeros(ORDER_BUCKETS, z)
        self.user_feature_embedding = _zeros(dataset.user_pipeline.size, z)
        self.item_feature_embedding = _zeros(dataset.item_pipeline.size, z)
        self.encoder_gate_weight = _zeros(z)
        self.encoder_gate_bias = _zeros(1)
        self.event_type_gate = _zeros(len(dataset.event_types))
        self.age_gate = _zeros(AGE_BUCKETS)
        self.order_gate = _zeros(ORDER_BUCKETS)
        # None in training; pgvae.loop chooses it for scoring.
        self.register_buffer("gate_recency", torch.from_numpy(recency_of_orders(0.0)))
        self.encoder_weight = _xavier(h, z)
        self.encoder_bias = _zeros(h)
        self.mean_weight = _zeros(z, h)
        self.mean_bias = _zeros(z)
        self.log_variance_weight = _zeros(z, h)
        # A seventh of the prior's standard deviation: the first steps learn from a z that is hardly blurred.
        self.log_variance_bias = nn.Parameter(torch.full((z,), -4.0))
        self.decoder_gate_weight = _zeros(z, z)
        self.decoder_gate_bias = _zeros(z)
        self.decoder_weight = _xavier(h, z)
        self.decoder_bias = _zeros(h)
        self.decoder_output_weight = _zeros(z, h)
        self.output_weight = _normal(items, z)
        self.item_feature_output = _zeros(dataset.item_pipeline.size, z)
        self.output_bias = _zeros(items)
        self.item_popularity = dataset.popularity()
        self.trained_items = dataset.trained_items
        self.item_features = dataset.item_features if dataset.item_pipeline.size else None
        self.convolution = convolution
        for part in config.without:
            for name in _PARAMETERS[part]:
                self.get_parameter(name).requires_grad_(False)

    def embed(self, tokens: Tokens, *, alone: NDArray[np.bool_] | None = None) -> Tensor:
        """Gives the token embeddings, [N, Z]; `alone` [N] says which items are known by their features alone."""
        embedded = self._rows(self.item_embedding, tokens.item)
        if self.item_features is not None:
            embedded = self._kept(embedded, alone) + self._features(
                self.item_feature_embedding, self.item_features.take(tokens.item)
            )
        return (
            embedded
            + embedding(self._tensor(tokens.event_type), self.event_type_embedding)
            + embedding(self._tensor(tokens.age), self.age_embedding)
            + embedding(self._tensor(tokens.order), self.order_embedding)
        )

    def pool(self, tokens: Tokens, *, alone: NDArray[np.bool_] | None = None) -> Tensor:
        """Gives the pooled history of each user, [U, Z]."""
        embedded = self.embed(tokens, alone=alone)
        order = self._tensor(tokens.order)
        gates = self.get_buffer("gate_recency")[order] * torch.sigmoid(
            embedded @ self.encoder_gate_weight
            + self.encoder_gate_bias
            + self.event_type_gate[self._tensor(tokens.event_type)]
            + self.age_gate[self._tensor(tokens.age)]
            + self.order_gate[order]
        )
        user = self._tensor(tokens.users())
        squares = gates.new_zeros(tokens.user_count).index_add(0, user, gates * gates)
        sums = embedded.new_zeros((tokens.user_count, embedded.shape[1]))
        pooled = sums.index_add(0, user, gates[:, None] * embedded) / squares.clamp_min(1e-24).sqrt()[:, None]
        if tokens.features is not None:
            pooled = pooled + self._features(self.user_feature_embedding, tokens.features)
        return pooled * float(np.sqrt(pooled.shape[1]))

    def encode(self, tokens: Tokens, *, alone: NDArray[np.bool_] | None = None) -> tuple[Tensor, Tensor]:
        """Gives the mean and the log variance of q(z | x) of each user, both [U, Z]."""
        return self.posterior(self.pool(tokens, alone=alone))

    def posterior(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the mean and the log variance of q(z | x) from the pooled histories, both [U, Z]."""
        hidden = torch.tanh(pooled @ self.encoder_weight.T + self.encoder_bias)
        mean = pooled + hidden @ self.mean_weight.T + self.mean_bias
        return mean, hidden @ self.log_variance_weight.T + self.log_variance_bias

    def decode_direction(self, z: Tensor) -> Tensor:
        """Gives the decoder's direction r / |r| of each user, [U, Z]."""
        gated = torch.sigmoid(z @ self.decoder_gate_weight.T + self.decoder_gate_bias) * z
        hidden = torch.tanh(gated @ self.decoder_weight.T + self.decoder_bias)
        return _unit(gated + hidden @ self.decoder_output_weight.T)

    def item_directions(self, items: NDArray[np.int64], *, alone: NDArray[np.bool_] | None = None) -> Tensor:
        """Gives the directions of these items, [n, Z], of length 1."""
        output = self._rows(self.output_weight, items)
        if self.item_features is not None:
            output = self._kept(output, alone) + self._features(
                self.item_feature_output, self.item_features.take(items)
            )
        return _unit(output)

    @torch.no_grad()
    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Gives the tensors that the runtime scores with, by name, without the shortcut.

        What an item's neighbours and features say is added to its own rows, so that scoring known items costs nothing
        extra.
        """
        named = {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.named_parameters()}
        items = np.arange(len(self.item_embedding))
        trained = self.trained_items
        # The rows of an item without events were never trained.
        cold = ~trained
        item_embedding = self._kept(self._rows(self.item_embedding, items), cold)
        if self.item_features is not None:
            item_embedding = item_embedding + self._features(self.item_feature_embedding, self.item_features)
        named["item_embedding"] = item_embedding.cpu().numpy()
        named["output_weight"] = (self.item_directions(items, alone=cold) / self.temperature).cpu().numpy()
        if not trained.all():
            named["output_bias"][~trained] = np.median(named["output_bias"][trained])
        named["item_popularity"] = self.item_popularity
        named["gate_recency"] = self.get_buffer("gate_recency").cpu().numpy().copy()
        del named["item_feature_embedding"], named["item_feature_output"]
        return named

    def _rows(self, rows: Tensor, items: NDArray[np.int64]) -> Tensor:
        """Gives the rows of these items, [n, Z], with what their neighbours' rows add."""
        own = embedding(self._tensor(items), rows)
        if self.convolution is None:
            return own
        near, weight = (self._tensor(array[items]) for array in (self.convolution.item, self.convolution.weight))
        return own + embedding_bag(near, rows, per_sample_weights=weight, mode="sum")

    def _features(self, rows: Tensor, features: FeatureBag) -> Tensor:
        counts = features.counts()
        owner = self._tensor(np.repeat(np.arange(len(counts)), counts))
        sums = rows.new_zeros((len(counts), rows.shape[1]))
        sums = sums.index_add(0, owner, embedding(self._tensor(features.token), rows))
        return sums / self._tensor(np.maximum(counts, 1).astype(np.float32))[:, None]

    def _kept(self, rows: Tensor, dropped: NDArray[np.bool_] | None) -> Tensor:
        return rows if dropped is None else rows.masked_fill(self._tensor(dropped)[:, None], 0.0)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self.item_embedding.device)


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Gives the array as a tensor of the device; on a GPU it may still be on its way.

    From pinned memory: a copy from other memory would wait until the GPU has done all that was asked of it before.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Gives KL(q(z | x) || N(0, I)) of each user in nats, [U] (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()


def _normal(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def _xavier(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))
