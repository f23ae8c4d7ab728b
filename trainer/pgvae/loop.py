"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.swa_utils import AveragedModel

from pgvae.batches import Batch, Batches
from pgvae.checkpoints import Checkpoints, State
from pgvae.config import FUTURE_SHARES, TrainingConfig
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.item_graph import Convolution, convolution
from pgvae.model import PER_ITEM, AttentionVae, kl_divergence, to_device
from pgvae.ranking import Holdout, some_users
from pgvae.rows import CHOOSING, Epoch
from pgvae.shortcut import UNORDERED_WAYS, WAYS, shortcuts
from pgvae.softmax import SampledSoftmax
from pgvae.validation import (
    DEFAULT_SHORTCUT,
    NO_SHORTCUT,
    RECENCIES,
    ShortcutChoice,
    choose_recency,
    choose_shortcut,
    fading,
    ndcg,
    with_links,
)

# After so many steps a future_share is chosen: on all data that was tried the better one led from then on.
_CHOOSING_STEPS = 200
# After each epoch so many users of the validation part are ranked.
_VALIDATION_USERS = 5000
# So many similar items an item leans on where the data has no order. Where it has one, links of what came before what
# say as much as this does.
_GRAPH_NEIGHBOURS = 4
# Parameters that all users share move by this share of the learning rate.
_SHARED_RATE = 0.1
# Share of the past epochs in the averaged network, after the first few. 0.7 is a mean over the last three or so.
_AVERAGE_DECAY = 0.7
# A loss that is so many times one nat more than that of the first epoch will not come down again.
_EXPLODED = 100.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A trained network's weights, by the names of pgvae_runtime.forward.SHAPES, and its learning curve.

    `future_share` is what it was trained with, None where nothing could be chosen or was given, and `recency` is how
    fast events fade in the encoder. `shortcut_ndcg` holds the validation part's NDCG of each shortcut that was tried,
    where one was to be chosen.
    """

    weights: dict[str, NDArray[Any]]
    best_epoch: int
    curve: list[Epoch]
    shortcut: ShortcutChoice
    future_share: float | None = None
    recency: float = 0.0
    shortcut_ndcg: dict[ShortcutChoice, float] = field(default_factory=dict)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Lets PyTorch refuse what would not give the same result again, and after it what the process had before."""
    before = torch.get_deterministic_debug_mode()
    # use_deterministic_algorithms does the same, and imports PyTorch's compiler for two seconds.
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@_deterministic()
def fit(
    dataset: Dataset,
    config: TrainingConfig,
    *,
    max_history: int,
    phase: str,
    epochs: int | None = None,
    recency: float | None = None,
    shortcut: ShortcutChoice = DEFAULT_SHORTCUT,
    validation: Holdout | None = None,
    checkpoints: Checkpoints | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Fit:
    """Trains on all users of a dataset, from the last checkpoint of the same training where there is one.

    With a validation holdout, trains with the `future_share` that ranks better there, unless one is given, and keeps
    the epoch that ranks best, then the recency of events that does, unless one is given, and then the shortcut.

    Loss per user: λ · (-sum over items of target weight · log π) + (1 - λ) · KL(q(z | x) || N(0, I)), where 1 - λ
    rises from 0 to `kl_weight` (Liang et al. 2018, section 2.2.2; docs/model.md). PgvaeError where it is not finite.
    """
    epochs = epochs or config.epochs
    if validation is not None:
        validation = some_users(validation, _VALIDATION_USERS, config.seed)
    leaning = config.graph_neighbours
    if leaning is None:
        leaning = 0 if dataset.has_order else _GRAPH_NEIGHBOURS
    graph = convolution(dataset, leaning, config.seed) if leaning else None
    if validation and config.future_share is None and dataset.has_order:
        run = _better_run(dataset, config, graph, validation, max_history, epochs, on_epoch)
        run.curve = [replace(epoch, phase=phase) for epoch in run.curve]
        config = run.config
    else:
        run = _Run(dataset, config, graph, max_history)
    # Found by all that decides the result: a training of fewer epochs has not the best one of more.
    names = {"phase": phase, "max_history": max_history, "epochs": epochs}
    checkpoint = checkpoints.of(dataset, config, validation, **names) if checkpoints else None
    if checkpoint and (saved := checkpoint.load()):
        try:
            run.restore(saved)
        # A file that is no state of this training: it begins at its beginning.
        except Exception:
            run = _Run(dataset, config, graph, max_history)
    for epoch in run.curve:
        on_epoch(epoch)
    while run.goes_on(epochs, validation):
        run.train_epoch(phase, validation)
        if checkpoint and checkpoint.is_due:
            checkpoint.save(run.state())
        on_epoch(run.curve[-1])
    has_order = dataset.has_order and "order" not in config.without
    recencies = RECENCIES if has_order else (0.0,)
    if "encoder_attention" in config.without:
        recency = 0.0
    elif recency is None and validation:
        recency = choose_recency(validation, run.best_weights, recencies, max_history, run.best_ndcg)
    recency = recency or 0.0
    weights = fading(run.best_weights, recency)
    shortcut_ndcg: dict[ShortcutChoice, float] = {}
    if "shortcut" in config.without or not config.neighbours:
        ways, shortcut = {}, NO_SHORTCUT
    elif validation:
        ways = shortcuts(dataset, config.neighbours, config.seed, WAYS if has_order else UNORDERED_WAYS)
        shortcut, shortcut_ndcg = choose_shortcut(validation, weights, ways, recencies, dataset, config, max_history)
    else:
        ways = shortcuts(dataset, config.neighbours, config.seed, [shortcut.way] if shortcut.way else [])
    return Fit(
        weights=with_links(weights, ways, shortcut),
        best_epoch=run.best_epoch,
        curve=run.curve,
        shortcut=shortcut,
        future_share=config.future_share,
        recency=recency,
        shortcut_ndcg=shortcut_ndcg,
    )


def _better_run(
    dataset: Dataset,
    config: TrainingConfig,
    graph: Convolution | None,
    validation: Holdout,
    max_history: int,
    epochs: int,
    on_epoch: Callable[[Epoch], None],
) -> _Run:
    """Gives the training with the one of FUTURE_SHARES that leads after a few hundred steps, so far.

    It is by far the better one where tastes and assortments change, and by far the worse one where they do not.
    One that diverges is none; PgvaeError where both do.
    """
    runs: list[_Run] = []
    for share in FUTURE_SHARES:
        run = _Run(dataset, replace(config, future_share=share), graph, max_history)
        while run.goes_on(min(epochs, -(-_CHOOSING_STEPS // run.batches.steps)), validation):
            try:
                run.train_epoch(CHOOSING, validation)
            except PgvaeError:
                if share == FUTURE_SHARES[-1] and not runs:
                    raise
                break
            on_epoch(replace(run.curve[-1], future_share=share))
        else:
            runs.append(run)
    # Of equal ones the first.
    return max(runs, key=lambda run: run.best_ndcg)


class _Run:
    """All that changes while a network is trained."""

    def __init__(self, dataset: Dataset, config: TrainingConfig, graph: Convolution | None, max_history: int) -> None:
        self.config = config
        self.max_history = max_history
        self.device = choose_device(config)
        torch.manual_seed(config.seed)
        self.network = AttentionVae(dataset, config, graph).to(self.device)
        # What is ranked and published: epochs differ by chance more than by what they learned (Izmailov et al. 2018).
        self.averaged = AveragedModel(self.network, multi_avg_fn=_average)
        self.batches = Batches(dataset, config, max_history=max_history)
        self.optimizer = torch.optim.Adam(_parameter_groups(self.network, config), fused=True)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.use_bfloat16 = chooses_bfloat16(config, self.device)
        self.curve: list[Epoch] = []
        self.best_weights: dict[str, NDArray[np.float32]] = {}
        self.best_epoch = 0
        self.best_ndcg = -1.0

    def goes_on(self, epochs: int, validation: Holdout | None) -> bool:
        """Tells whether another epoch is wanted."""
        is_patient = validation is None or len(self.curve) - self.best_epoch < self.config.patience
        return len(self.curve) < epochs and is_patient

    def train_epoch(self, phase: str, validation: Holdout | None) -> None:
        """Trains for an epoch, ranks the validation part, and keeps the weights where they are the best so far."""
        begun = time.perf_counter()
        number = len(self.curve) + 1
        try:
            loss, reconstruction, kl = self.pass_over_users()
        except torch.cuda.OutOfMemoryError as error:
            raise _out_of_memory(error, self.config) from error
        weights = self.published_weights()
        # A last step that is too wide leaves no loss to tell of it.
        exploded = self.curve and loss > _EXPLODED * (1.0 + self.curve[0].loss)
        if exploded or not np.isfinite(loss) or not all(np.isfinite(tensor).all() for tensor in weights.values()):
            raise _diverged(number, loss, self.config)
        ranked = ndcg(validation, with_links(weights, {}, NO_SHORTCUT), self.max_history) if validation else None
        self.curve.append(
            Epoch(
                phase=phase,
                epoch=number,
                loss=loss,
                reconstruction=reconstruction,
                kl=kl,
                validation_ndcg=ranked,
                seconds=time.perf_counter() - begun,
            )
        )
        if ranked is None or ranked > self.best_ndcg:
            self.best_weights, self.best_epoch, self.best_ndcg = weights, number, ranked or 0.0

    def pass_over_users(self) -> tuple[float, float, float]:
        """Gives the loss, reconstruction and KL divergence of an epoch, means per user in nats."""
        step = len(self.curve) * self.batches.steps
        anneal_steps = max(1, round(self.config.anneal_epochs * self.batches.steps))
        # Added up on the device: reading a loss after every step would wait for it.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in self.batches.epoch():
            beta = self.config.kl_weight * min(1.0, step / anneal_steps)
            reconstruction, kl = _losses(self.network, batch, self.generator, use_bfloat16=self.use_bfloat16)
            loss = (1.0 - beta) * reconstruction + beta * kl
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            sums += batch.tokens.user_count * torch.stack((loss, reconstruction, kl)).detach()
            step += 1
        self.averaged.update_parameters(self.network)
        loss, reconstruction, kl = (sums / self.batches.user_count).tolist()
        return loss, reconstruction, kl

    def published_weights(self) -> dict[str, NDArray[np.float32]]:
        """Gives the averaged network's weights."""
        network = self.averaged.module
        assert isinstance(network, AttentionVae)
        return network.weights()

    def state(self) -> State:
        """Gives what a checkpoint holds."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "batches": self.batches.state(),
            "curve": [asdict(epoch) for epoch in self.curve],
            "best_weights": {name: torch.from_numpy(array) for name, array in self.best_weights.items()},
            "best_epoch": self.best_epoch,
            "best_ndcg": self.best_ndcg,
        }

    def restore(self, state: State) -> None:
        """Goes back to a state: what follows is the same as if nothing had been interrupted."""
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.batches.restore(state["batches"])
        self.curve = [Epoch(**epoch) for epoch in state["curve"]]
        self.best_weights = {name: tensor.numpy() for name, tensor in state["best_weights"].items()}
        self.best_epoch, self.best_ndcg = state["best_epoch"], state["best_ndcg"]


Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


@torch.no_grad()
def _average(averaged: Tensors, current: Tensors, count: torch.Tensor | int) -> None:
    """Moves the averaged parameters towards the current ones, in place: the plain mean of the first few epochs, then an
    exponential one.
    """
    decay = min(_AVERAGE_DECAY, int(count) / (int(count) + 1))
    torch._foreach_lerp_(averaged, current, 1.0 - decay)


def _diverged(number: int, loss: float, config: TrainingConfig) -> PgvaeError:
    good = f"; or stop before: --epochs {number - 1}" if number > 1 else ""
    return PgvaeError(
        f"the training diverged in epoch {number}: its loss is {loss:.4g}",
        hint=f"train again with a lower --learning-rate than {config.learning_rate}{good}",
    )


def _out_of_memory(error: Exception, config: TrainingConfig) -> PgvaeError:
    return PgvaeError(
        f"the GPU has too little free memory for this training: {str(error).splitlines()[0]}",
        hint=f"train again with a smaller --batch-size than {config.batch_size}, with fewer --negatives than"
        f" {config.negatives}, or with --device cpu",
    )


def _parameter_groups(network: AttentionVae, config: TrainingConfig) -> list[dict[str, object]]:
    """Gives the parameters with their step widths: what is learned per item moves faster than what all users share."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if name in PER_ITEM], "lr": config.learning_rate},
        {"params": [p for name, p in named if name not in PER_ITEM], "lr": config.learning_rate * _SHARED_RATE},
    ]


def _losses(
    network: AttentionVae, batch: Batch, generator: torch.Generator, *, use_bfloat16: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the reconstruction loss and the KL divergence of a batch, means over its users, in nats."""
    device = generator.device
    mean, log_variance = network.encode(batch.tokens, alone=batch.alone_tokens)
    noise = torch.randn(mean.shape, generator=generator, device=device)
    direction = network.decode_direction(mean + torch.exp(0.5 * log_variance) * noise)
    items = network.item_directions(batch.candidates, alone=batch.alone_candidates)
    candidates, log_multiplicity, rows, columns, weight = (
        to_device(array, device)
        for array in (
            batch.candidates,
            batch.log_multiplicity,
            batch.target_row,
            batch.target_column,
            batch.target_weight,
        )
    )
    # A drawn wrong answer stands for the many that were not drawn (Jean et al. 2015, section 3.1).
    bias = network.output_bias[candidates] + log_multiplicity
    loss = SampledSoftmax.apply(  # type: ignore[no-untyped-call]
        direction / network.temperature, items, bias, rows, columns, weight, use_bfloat16
    )
    reconstruction = loss / batch.tokens.user_count
    return reconstruction, kl_divergence(mean, log_variance).mean()


def choose_device(config: TrainingConfig) -> torch.device:
    """Gives the device to train on: a GPU where there is one, unless the configuration says otherwise."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PgvaeError("device is cuda, but PyTorch sees no GPU", hint="train with --device cpu, or auto")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def chooses_bfloat16(config: TrainingConfig, device: torch.device) -> bool:
    """Tells whether the product with the catalogue is computed in bfloat16: where the hardware multiplies it faster."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if device.type == "cuda":
        # is_bf16_supported() says yes to GPUs before Ampere, too, which only emulate it.
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported: bool = torch.cpu._is_amx_tile_supported()
    return supported
