"""Hyper-parameters of a training: one frozen object, saved with the version."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pgvae.errors import PgvaeError

# What can be left out of the model, to see what it earns.
MODEL_PARTS = (
    "encoder_attention",
    "decoder_attention",
    "hidden_layers",
    "event_types",
    "age",
    "order",
    "features",
    "shortcut",
)
# What `future_share` may be where the validation part chooses; the first one where there is none.
FUTURE_SHARES = (0.5, 1.0)
PRECISIONS = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training can be told. `docs/model.md` explains each name by its formula.

    `latent` is the width of embeddings, z and the items' directions, `hidden` that of the hidden layers; `temperature`
    divides the cosines, None for 10 / ln(items)^2, at most 0.5; `kl_weight` is the final 1 - λ, reached after
    `anneal_epochs`; `token_dropout` is the share of a history that the encoder does not see, `future_share` the share
    of the users of a step for whom it sees what came before a moment and must guess what came after, None for the one
    of FUTURE_SHARES that ranks the validation part better; `negatives` is how many items are drawn as wrong answers per
    step, beside the right ones of the whole batch; `neighbours` is how many items an item is linked with in the
    shortcut; `graph_neighbours` how many similar items an item's rows lean on in training, None for 4 where the data
    has no order and 0 where it has one; `patience` is how many epochs without a better validation NDCG end the
    training; `segments` is the number of segments of users, 0 for none, None for the one that fits the data; `without`
    names MODEL_PARTS to leave out.
    """

    latent: int = 256
    hidden: int = 256
    temperature: float | None = None
    epochs: int = 60
    patience: int = 6
    batch_size: int = 512
    learning_rate: float = 4e-3
    kl_weight: float = 0.02
    anneal_epochs: float = 5.0
    token_dropout: float = 0.5
    future_share: float | None = None
    negatives: int = 4096
    neighbours: int = 64
    graph_neighbours: int | None = None
    segments: int | None = None
    without: tuple[str, ...] = ()
    device: str = "auto"
    precision: str = "auto"
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("latent", "hidden", "epochs", "patience", "batch_size", "negatives"):
            if getattr(self, name) < 1:
                raise PgvaeError(f"{name} is {getattr(self, name)}", hint="give 1 or more")
        if self.neighbours < 0:
            raise PgvaeError(f"neighbours is {self.neighbours}", hint="give 0 or more; 0 leaves the shortcut out")
        if self.graph_neighbours is not None and self.graph_neighbours < 0:
            raise PgvaeError(
                f"graph_neighbours is {self.graph_neighbours}", hint="give 0 or more; 0 leaves the convolution out"
            )
        if self.segments is not None and not 0 <= self.segments <= 100:
            raise PgvaeError(f"segments is {self.segments}", hint="give 1 to 100, or 0 for none")
        for name in ("kl_weight", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise PgvaeError(f"{name} is {getattr(self, name)}", hint="give 0 or more, and less than 1")
        if self.future_share is not None and not 0 <= self.future_share <= 1:
            raise PgvaeError(f"future_share is {self.future_share}", hint="give 0 to 1")
        if not 0 <= self.anneal_epochs < float("inf"):
            raise PgvaeError(f"anneal_epochs is {self.anneal_epochs}", hint="give 0 or more, as 5")
        if self.temperature is not None and not 0.01 <= self.temperature <= 10:
            raise PgvaeError(
                f"temperature is {self.temperature}", hint="give 0.01 to 10, as 0.1; without one the catalogue decides"
            )
        if not 0 < self.learning_rate < 1:
            raise PgvaeError(
                f"learning_rate is {self.learning_rate}", hint="give more than 0 and less than 1, as 0.004"
            )
        if not 0 <= self.seed < 2**63:
            raise PgvaeError(f"seed is {self.seed}", hint="give 0 or more, and less than 2 to the power of 63")
        for name, known in (("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise PgvaeError(f"{name} is {getattr(self, name)!r}", hint=f"give one of {', '.join(known)}")
        if unknown := [part for part in self.without if part not in MODEL_PARTS]:
            raise PgvaeError(f"without names {unknown[0]!r}", hint=f"parts are {', '.join(MODEL_PARTS)}")

    def temperature_for(self, items: int) -> float:
        """Gives the temperature for a catalogue of so many items.

        The more items, the higher an item must be able to rise above the others: 0.19 was best of a few values on
        validation parts with 1 500 items, 0.1 with 41 000.
        """
        return self.temperature or min(0.5, 10.0 / math.log(max(items, 2)) ** 2)
