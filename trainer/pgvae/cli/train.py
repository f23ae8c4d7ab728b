"""`pgvae train`: from a model's events to a published version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import TaskID

from pgvae.activation import Activation, try_to_activate
from pgvae.cli import NOT_DONE, Dsn, app
from pgvae.cli.metrics import PARTS, demand_verdict, lists_table, outcomes_verdict, uplift_verdict, verdicts
from pgvae.config import MODEL_PARTS, TrainingConfig
from pgvae.connection import connect
from pgvae.console import err, out, progress_with_detail
from pgvae.rows import CHOOSING

if TYPE_CHECKING:
    from pgvae.dataset import Dataset, ModelDefinition
    from pgvae.rows import Epoch
    from pgvae.train import Listener, Training

_DEFAULTS = TrainingConfig()
_PHASES = {
    "read": "reading events",
    "demand": "forecasting demand",
    "evaluate": "training without the newest events, to measure",
    "train": "training on all events, to publish",
    "segments": "dividing users into segments",
    "outcomes": "fitting who will buy what",
    "uplift": "fitting whom an offer makes buy",
    "publish": "publishing",
}


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    activate: Annotated[bool, typer.Option("--activate", help="Activate the version once it is published.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train although a check of the quality gate fails.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random number.")] = _DEFAULTS.seed,
    epochs: Annotated[int, typer.Option(help="Most passes over the users.")] = _DEFAULTS.epochs,
    patience: Annotated[
        int, typer.Option(help="Stop after this many passes without a better validation NDCG.")
    ] = _DEFAULTS.patience,
    batch_size: Annotated[int, typer.Option(help="Users per step.")] = _DEFAULTS.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Step width of Adam.")] = _DEFAULTS.learning_rate,
    hidden: Annotated[int, typer.Option(help="Width of the hidden layers.")] = _DEFAULTS.hidden,
    latent: Annotated[int, typer.Option(help="Width of embeddings and latent space.")] = _DEFAULTS.latent,
    kl_weight: Annotated[
        float, typer.Option(help="Weight of the KL term, 1 - λ, once annealed.")
    ] = _DEFAULTS.kl_weight,
    token_dropout: Annotated[
        float, typer.Option(help="Share of a history that is hidden from the encoder.")
    ] = _DEFAULTS.token_dropout,
    future_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the users of whom what came after a moment is guessed from what came before; by default 0.5"
            " or 1, whichever ranks the validation part better after 200 steps."
        ),
    ] = _DEFAULTS.future_share,
    temperature: Annotated[
        float | None, typer.Option(help="What the cosines are divided by; by default 10 / ln²(items), at most 0.5.")
    ] = _DEFAULTS.temperature,
    negatives: Annotated[
        int, typer.Option(help="Wrong answers drawn per step; a catalogue of up to twice as many is used whole.")
    ] = _DEFAULTS.negatives,
    neighbours: Annotated[
        int, typer.Option(help="Items that the shortcut links an item with; 0: no shortcut.")
    ] = _DEFAULTS.neighbours,
    graph_neighbours: Annotated[
        int | None,
        typer.Option(
            help="Similar items that an item's embedding leans on in training; by default 4 where 5 % or fewer of the"
            " users with several events have them at different times, else 0."
        ),
    ] = _DEFAULTS.graph_neighbours,
    segments: Annotated[
        int | None,
        typer.Option(help="Segments to divide the users into; 0: none; by default as many as fit the data."),
    ] = _DEFAULTS.segments,
    without: Annotated[
        list[str] | None,
        typer.Option(help=f"Part of the model to leave out, may be repeated: {', '.join(MODEL_PARTS)}."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _DEFAULTS.device,
    precision: Annotated[
        str, typer.Option(help="Of the product with the catalogue: auto, float32 or bfloat16.")
    ] = _DEFAULTS.precision,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder from which an interrupted training goes on; by default in the user's cache."),
    ] = None,
) -> None:
    """Train a model on its events and publish the result as a new version.

    Reads the cleaned events (select * from MODEL.clean_events), trains on the older 80 %, chooses the number of passes
    on the next 10 % and measures on the newest 10 %, beside popularity and item kNN; events that time cannot divide are
    divided by chance. Then trains on all events and writes weights, lineage and metrics in one transaction. The new
    version scores once it is activated. More figures, and more baselines: pgvae evaluate MODEL.

    Refuses when the quality gate fails: select * from vae.check_events('MODEL'). Exits with 0 when all went well, with
    3 when --activate was given but a gate of vae.activate refused the published version, with 1 after an error.
    """
    config = TrainingConfig(
        seed=seed,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        hidden=hidden,
        latent=latent,
        kl_weight=kl_weight,
        token_dropout=token_dropout,
        future_share=future_share,
        temperature=temperature,
        negatives=negatives,
        neighbours=neighbours,
        graph_neighbours=graph_neighbours,
        segments=segments,
        without=tuple(without or ()),
        device=device,
        precision=precision,
    )
    result = train_with_display(dsn, model, config, force=force, checkpoints=checkpoints)
    show(model, result)
    if activate:
        with connect(dsn) as connection:
            activation = try_to_activate(connection, model, result.version)
        if activation.refusal is not None:
            report_refusal(model, result.version, activation)
            raise typer.Exit(NOT_DONE)
        out.print(f"version {result.version} is active; now: pgvae refresh {model}", highlight=False)
    else:
        hint = f"select * from vae.activate('{model}', {result.version})"  # noqa: S608  # shown, never run
        out.print(f"next: {hint}", highlight=False)


def train_with_display(
    dsn: str | None, model: str, config: TrainingConfig, *, force: bool, checkpoints: Path | None = None
) -> Training:
    """Trains and publishes, with its progress shown."""
    # Imported here: torch takes seconds to import, which `pgvae --help` should not pay.
    from pgvae.train import train as run

    with _Display(config) as display:
        return run(dsn, model, config, force=force, checkpoints=checkpoints, listener=display.listener())


def report_refusal(model: str, version: int, activation: Activation) -> None:
    """Says on standard error that a version was not activated, and why."""
    err.print(
        f"[bold yellow]not activated:[/] {escape(str(activation.refusal))}; version {version} of model {model} stays"
        " ready",
        highlight=False,
        soft_wrap=True,
    )
    if activation.hint:
        err.print(f"[bold]hint:[/] {escape(activation.hint)}", highlight=False, soft_wrap=True)


def show(model: str, result: Training) -> None:
    """Prints what was published and how it ranks."""
    from pgvae.uplift import NO_COLUMN

    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in result.durations.items())
    out.print(f"published version {result.version} of model {model} ({seconds})", highlight=False)
    if result.metrics:
        users, split = result.metrics[0].user_count, result.metrics[0].split
        out.print(lists_table(result.metrics, f"on {PARTS[split]}, {users} users, all items ranked"))
        for line in verdicts(result.metrics):
            out.print(line, highlight=False)
    else:
        out.print("its ranking is not measured: too few users have something new to find")
    out.print(demand_verdict(result.demand), highlight=False)
    out.print(outcomes_verdict(result.outcomes), highlight=False)
    if result.uplift.missing != NO_COLUMN:
        out.print(uplift_verdict(result.uplift), highlight=False)


class _Display:
    """Shows a training while it runs: a bar on a terminal, a line per epoch in a log."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._progress = progress_with_detail()
        self._task: TaskID | None = None

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def listener(self) -> Listener:
        from pgvae.train import Listener

        return Listener(on_phase=self._phase, on_quality=self._quality, on_data=self._data, on_epoch=self._epoch)

    def _phase(self, phase: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
        self._task = self._progress.add_task(_PHASES[phase], total=None, detail="")
        if not err.is_terminal:
            err.print(_PHASES[phase], highlight=False)

    def _quality(self, definition: ModelDefinition) -> None:
        for check in definition.quality:
            if check["status"] != "pass":
                line = f"{check['status']}: {check['check_name']}, {check['row_count']} rows; {check['remedy']}"
                self._progress.console.print(escape(line), highlight=False, soft_wrap=True)

    def _data(self, dataset: Dataset) -> None:
        begin, end = dataset.window()
        self._progress.console.print(
            f"{len(dataset.user)} events of {dataset.user_count} users on {dataset.trained_items.sum()} items,"
            f" {begin:%Y-%m-%d} to {end:%Y-%m-%d}",
            highlight=False,
        )
        for source, pipeline in (("users", dataset.user_pipeline), ("items", dataset.item_pipeline)):
            used = ", ".join(column.name for column in pipeline.columns)
            others = ", ".join(f"{name} {reason}" for name, reason in pipeline.left_out)
            cold = len(dataset.item_keys) - dataset.trained_items.sum() if source == "items" else 0
            if used or others:
                line = f"features of {source}: {used or 'none'}"
                line += f"; known by them alone: {cold} items" if cold else ""
                line += f"; left out: {others}" if others else ""
                self._progress.console.print(escape(line), highlight=False, soft_wrap=True)

    def _epoch(self, epoch: Epoch) -> None:
        ranking = "" if epoch.validation_ndcg is None else f"  validation NDCG@20 {epoch.validation_ndcg:.4f}"
        what = f"trying --future-share {epoch.future_share:g}, epoch" if epoch.phase == CHOOSING else "epoch"
        detail = f"{what} {epoch.epoch}  loss {epoch.loss:.2f}  KL {epoch.kl:.2f}{ranking}"
        if self._task is not None:
            self._progress.update(self._task, total=self._config.epochs, completed=epoch.epoch, detail=detail)
        if not err.is_terminal:
            err.print(f"  {detail}  {epoch.seconds:.1f} s", highlight=False)
