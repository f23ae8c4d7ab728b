"""Hyper-parameters of a training: one frozen object, saved with the version."""

from __future__ import annotations

from dataclasses import dataclass

from pgvae.errors import PgvaeError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training can be told. `docs/model.md` explains each name by its formula.

    `latent`, `hidden` and `embedding` are widths; `kl_weight` is the final 1 - λ, reached after `anneal_epochs`;
    `token_dropout` is the share of a history that the encoder does not see; `patience` is how many epochs without
    a better validation NDCG end the training.
    """

    embedding: int = 128
    hidden: int = 256
    latent: int = 128
    epochs: int = 60
    patience: int = 6
    batch_size: int = 256
    learning_rate: float = 2e-3
    kl_weight: float = 0.2
    anneal_epochs: float = 5.0
    token_dropout: float = 0.5
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("embedding", "hidden", "latent", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise PgvaeError(f"{name} is {getattr(self, name)}", hint="give 1 or more")
        for name, below in (("kl_weight", 1.0), ("token_dropout", 1.0)):
            if not 0 <= getattr(self, name) < below:
                raise PgvaeError(f"{name} is {getattr(self, name)}", hint=f"give 0 or more, and less than {below:g}")
        if not 0 < self.learning_rate < 1:
            raise PgvaeError(
                f"learning_rate is {self.learning_rate}", hint="give more than 0 and less than 1, as 0.002"
            )
        if not 0 <= self.seed < 2**63:
            raise PgvaeError(f"seed is {self.seed}", hint="give 0 or more, and less than 2 to the power of 63")
