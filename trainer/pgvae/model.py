"""The network: an attention-gated variational autoencoder over behaviour sequences.

Notation and formulas: docs/model.md. The parameters carry the names under which the runtime knows them
(pgvae_runtime.forward.SHAPES), and `forward` mirrors pgvae_runtime.forward line by line.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pgvae.config import TrainingConfig
from pgvae_runtime.tokens import AGE_BUCKETS, Tokens


class AttentionVae(nn.Module):
    """The model of Liang et al. (2018) on tokens, with a gate per token and a gate per latent dimension."""

    def __init__(self, *, item_popularity: NDArray[np.float32], event_types: int, config: TrainingConfig) -> None:
        super().__init__()
        items, d, h, z = len(item_popularity), config.embedding, config.hidden, config.latent
        self.item_embedding = nn.Parameter(torch.randn(items, d) * d**-0.5)
        self.event_type_embedding = nn.Parameter(torch.zeros(event_types, d))
        self.age_embedding = nn.Parameter(torch.zeros(AGE_BUCKETS, d))
        # Zero: at the start every token counts the same, as in a model without attention.
        self.encoder_gate_weight = nn.Parameter(torch.zeros(d))
        self.encoder_gate_bias = nn.Parameter(torch.zeros(1))
        self.encoder_weight = _xavier(h, d)
        self.encoder_bias = nn.Parameter(torch.zeros(h))
        self.mean_weight = _xavier(z, h)
        self.mean_bias = nn.Parameter(torch.zeros(z))
        self.log_variance_weight = _xavier(z, h)
        self.log_variance_bias = nn.Parameter(torch.full((z,), -2.0))
        self.decoder_gate_weight = nn.Parameter(torch.zeros(z, z))
        self.decoder_gate_bias = nn.Parameter(torch.zeros(z))
        self.decoder_weight = _xavier(h, z)
        self.decoder_bias = nn.Parameter(torch.zeros(h))
        self.output_weight = nn.Parameter(torch.randn(items, h) * h**-0.5)
        # The logarithm of the popularity: the likelihood starts at the best guess that knows no user.
        popularity = torch.from_numpy(item_popularity)
        self.output_bias = nn.Parameter(torch.log(popularity.clamp_min(1e-9)))
        self.register_buffer("item_popularity", popularity)

    def forward(self, tokens: Tokens, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Gives the logits [U, I] of a sampled z, and the mean and log variance [U, Z] of q(z | x)."""
        mean, log_variance = self.encode(tokens)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decode(z), mean, log_variance

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Gives the mean and the log variance of q(z | x) of each user, both [U, Z]."""
        device = self.item_embedding.device
        user = torch.from_numpy(np.repeat(np.arange(tokens.user_count), np.diff(tokens.start))).to(device)
        embedded = (
            self.item_embedding[torch.from_numpy(tokens.item).to(device)]
            + self.event_type_embedding[torch.from_numpy(tokens.event_type).to(device)]
            + self.age_embedding[torch.from_numpy(tokens.age).to(device)]
        )
        gates = torch.sigmoid(embedded @ self.encoder_gate_weight + self.encoder_gate_bias)
        zeros = embedded.new_zeros((tokens.user_count, embedded.shape[1]))
        sums = zeros.index_add(0, user, gates[:, None] * embedded)
        squares = embedded.new_zeros(tokens.user_count).index_add(0, user, gates * gates)
        pooled = sums / torch.sqrt(squares.clamp_min(1e-24))[:, None]
        hidden = torch.tanh(pooled @ self.encoder_weight.T + self.encoder_bias)
        mean = hidden @ self.mean_weight.T + self.mean_bias
        log_variance = hidden @ self.log_variance_weight.T + self.log_variance_bias
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Gives the logits [U, I] of the multinomial over the catalogue."""
        gate = torch.sigmoid(z @ self.decoder_gate_weight.T + self.decoder_gate_bias)
        hidden = torch.tanh((gate * z) @ self.decoder_weight.T + self.decoder_bias)
        return hidden @ self.output_weight.T + self.output_bias

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Gives the tensors that the runtime scores with, by name."""
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.state_dict().items()}


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Gives KL(q(z | x) || N(0, I)) of each user in nats, [U] (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=1)


def _xavier(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))
