"""`pgvae tune`: better hyper-parameters for a model."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pgvae.cli import Dsn, app
from pgvae.cli.train import show, train_with_display
from pgvae.config import TrainingConfig
from pgvae.console import err, out

if TYPE_CHECKING:
    from pgvae.tune import Outcome, Tried

_DEFAULTS = TrainingConfig()
_SHOWN_TRIALS = 10


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    trials: Annotated[int, typer.Option(help="Trials that the study shall hold, earlier runs included.")] = 30,
    timeout: Annotated[
        float | None, typer.Option(help="End the search after this many seconds, once the defaults are tried.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Trials at the same time, each in a process of its own.")] = 1,
    study: Annotated[str | None, typer.Option(help="Name of the study; by default that of the model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search and of every training.")] = _DEFAULTS.seed,
    epochs: Annotated[int, typer.Option(help="Most passes over the users in a trial.")] = _DEFAULTS.epochs,
    train: Annotated[bool, typer.Option("--train", help="Train with the best configuration and publish it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Search although a check of the quality gate fails.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search for hyper-parameters that rank better than the defaults.

    Each trial trains on the older 80 % of the events and is judged by NDCG@20 on the next 10 %. The newest 10 %, on
    which `pgvae train` measures, is not used, so that what it measures stays honest. The first trial is the default
    configuration: the best one found is never worse on the validation part.

    The study is kept in the schema vae_optuna of the same database. Run the same command again to go on after an
    interruption, and on other machines at the same time to share the work. It needs the role vae_trainer.
    """
    # Imported here: torch and optuna take seconds to import, which `pgvae --help` should not pay.
    from pgvae.tune import Search
    from pgvae.tune import tune as run

    search = Search(trials=trials, timeout=timeout, workers=workers, study=study)
    config = TrainingConfig(seed=seed, epochs=epochs)
    with Live(console=err, refresh_per_second=4, transient=False) as live:
        told: set[int] = set()

        def tell(outcome: Outcome) -> None:
            if err.is_terminal:
                live.update(_display(outcome, trials))
            else:
                _log(outcome, told)

        outcome = run(
            dsn,
            model,
            search,
            config,
            force=force,
            on_warning=lambda message: live.console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False),
            on_progress=tell,
        )
    if as_json:
        out.print_json(json.dumps(_as_json(outcome)))
    else:
        _show(outcome)
    if train and outcome.best:
        result = train_with_display(dsn, model, outcome.best.config, force=force)
        if not as_json:
            show(model, result)


def _score(tried: Tried | None) -> str:
    return "–" if tried is None or tried.value is None else f"{tried.value:.4f}"


def _display(outcome: Outcome, wanted: int) -> Group:
    """Shows the latest trials and, beneath, how far the search is and the best so far."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("trial", "state", "passes", "NDCG@20", "differs from the default in"):
        table.add_column(heading, justify="right" if heading in ("trial", "passes", "NDCG@20") else "left")
    for tried in outcome.trials[-_SHOWN_TRIALS:]:
        style = "bold green" if tried is outcome.best else "dim" if tried.state in ("pruned", "fail") else ""
        table.add_row(str(tried.number), tried.state, str(tried.epoch), _score(tried), _difference(tried), style=style)
    return Group(table, Text(_summary(outcome, wanted)))


def _difference(tried: Tried) -> str:
    default = asdict(_DEFAULTS) | {"seed": tried.config.seed, "epochs": tried.config.epochs}
    changed = [f"{name} {value:g}" for name, value in asdict(tried.config).items() if value != default[name]]
    told = "(the default)" if tried.is_default else ", ".join(changed)
    return escape(told + (f" – {tried.note}" if tried.note else ""))


def _summary(outcome: Outcome, wanted: int) -> str:
    done = outcome.count("complete", "pruned")
    return (
        f"{done} of {wanted} trials done, {outcome.count('pruned')} of them stopped early,"
        f" {outcome.count('running')} running; best {_score(outcome.best)}, default {_score(outcome.default)}"
    )


def _log(outcome: Outcome, told: set[int]) -> None:
    """Prints a line per trial that ended since the last call, for logs."""
    for tried in outcome.trials:
        if tried.state in ("complete", "pruned", "fail") and tried.number not in told:
            told.add(tried.number)
            line = f"trial {tried.number}: {tried.state}, NDCG@20 {_score(tried)}, {tried.epoch} passes"
            err.print(f"{line}, best {_score(outcome.best)}", highlight=False, markup=False)


def _show(outcome: Outcome) -> None:
    if not outcome.best:
        out.print(f"study {outcome.study} holds no complete trial yet; run the command again to go on", markup=False)
        return
    out.print(
        f"study {outcome.study}: {outcome.count('complete')} trials complete, {outcome.count('pruned')} stopped early",
        highlight=False,
        markup=False,
    )
    best = f"best: NDCG@20 {_score(outcome.best)} on the validation part"
    if outcome.best.is_default:
        out.print(f"nothing tried beats the default configuration, NDCG@20 {_score(outcome.default)}", highlight=False)
    elif outcome.default is None:
        # Its loss exploded.
        out.print(f"{best}; the default configuration gave none", highlight=False)
    else:
        gain = (outcome.best.value or 0.0) / max(outcome.default.value or 0.0, 1e-12) - 1
        out.print(f"{best}, the default {_score(outcome.default)} ({gain:+.1%})", highlight=False)
    out.print(f"next: {outcome.command()}", highlight=False, markup=False, soft_wrap=True)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    def trial(tried: Tried | None) -> dict[str, Any] | None:
        if tried is None:
            return None
        return {
            "number": tried.number,
            "state": tried.state,
            "validation_ndcg": tried.value,
            "passes": tried.epoch,
            "config": asdict(tried.config),
            "note": tried.note or None,
        }

    command = outcome.command()
    return {
        "study": outcome.study,
        "model": outcome.model,
        "best": trial(outcome.best),
        "default": trial(outcome.default),
        "command": shlex.split(command) if command else None,
        "trials": [trial(tried) for tried in outcome.trials],
    }
