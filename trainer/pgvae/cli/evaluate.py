"""`pgvae evaluate`: how good a version's configuration is, on held-out events, beside baselines."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID

from pgvae.cli import Dsn, app
from pgvae.cli.metrics import PARTS, lists_table, slices_table, verdicts
from pgvae.console import err, out, progress_with_detail
from pgvae.rows import DESCRIPTIVE

if TYPE_CHECKING:
    from pgvae.comparison import Listener
    from pgvae.evaluate import Evaluated
    from pgvae.rows import Epoch


class SplitName(StrEnum):
    """What is held out."""

    temporal = "temporal"
    random = "random"
    strong = "strong"


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    split: Annotated[
        SplitName,
        typer.Option(
            help="What is held out: the newest events (temporal), a tenth of each user's items by chance (random), or"
            " users who are never trained on (strong)."
        ),
    ] = SplitName.temporal,
    folds: Annotated[
        int,
        typer.Option(
            min=1,
            max=20,
            help="Measure that many times, each time on another part: of the items, of the users, or on windows that"
            " move forward in time. Intervals are of all folds together.",
        ),
    ] = 1,
    k: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Length of the lists that are shown, 20 without it; may be given several times. Lists of 20 are"
            " measured in any case: vae.activate compares versions by them.",
        ),
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Version whose configuration is measured; without it, the newest one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document instead.")] = False,
) -> None:
    """Measure a version's configuration on held-out events, beside six baselines.

    Trains with the configuration of the version on a part of today's events, chooses the number of passes, and each
    baseline's setting, on a second part, and measures all of them on a third: every user, every item ranked, nothing
    sampled. What each user already bought is left out of the lists, and of random and strong splits all of the user's
    history. Each figure has a 95 % interval, by resampling users. pgvae "beats" a baseline where the interval of the
    difference, user by user, is above zero.

    The version's own weights are neither used nor changed. The figures are written to vae.metrics, in place of those
    that the version has of the same split; vae.activate refuses a version that is worse than popularity.

    Exit status: 0 measured, 1 could not be measured (the message says why), 2 a wrong option.
    """
    # Imported here: torch takes seconds to import, which `pgvae --help` should not pay.
    from pgvae.comparison import K
    from pgvae.evaluate import evaluate_version

    ks = sorted(set(k or [K]))
    with _Display() as display:
        result = evaluate_version(
            dsn, model, version=version, split=split.value, folds=folds, ks=ks, listener=display.listener()
        )
    if as_json:
        out.print_json(data={"model": model, "version": result.version, **asdict(result.comparison)})
    else:
        show(model, result, split.value, ks)


def show(model: str, result: Evaluated, split: str, ks: list[int]) -> None:
    """Prints what was measured."""
    from pgvae.baselines import CHOICES

    # Lists of 20 are measured always, and shown where they are asked for.
    metrics = [m for m in result.comparison.metrics if m.k in (0, *ks)]
    name, users = metrics[0].split, metrics[0].user_count
    part = PARTS[split] if name == split else f"the {name} split"
    out.print(f"version {result.version} of model {model}, measured on {part}, {users} users, all items ranked")
    for length in ks:
        of_length = [m for m in metrics if m.k == length and m.metric not in DESCRIPTIVE]
        out.print(lists_table(of_length, f"lists of {length}"))
    out.print(lists_table([m for m in metrics if m.metric in DESCRIPTIVE], "variety of the lists"))
    out.print(lists_table([m for m in metrics if not m.k], "scores of all items"))
    slices = slices_table(metrics, ks[-1])
    if slices is not None:
        out.print(slices)
    for line in verdicts([m for m in metrics if m.k == ks[-1]]):
        out.print(line, highlight=False)
    names = {"pgvae": "epochs"} | {method: setting for method, (setting, _, _) in CHOICES.items()}
    chosen = [f"{method} {names[method]} {_values(values)}" for method, values in result.comparison.settings.items()]
    out.print(f"chosen on the validation part: {', '.join(chosen)}", highlight=False, soft_wrap=True)


def _values(values: list[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


class _Display:
    """Shows a bar on a terminal; a line per step in a log."""

    def __init__(self) -> None:
        self._progress = progress_with_detail()
        self._task: TaskID | None = None

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def listener(self) -> Listener:
        from pgvae.comparison import Listener

        return Listener(on_read=self._read, on_step=self._step, on_epoch=self._epoch)

    def _read(self) -> None:
        self._task = self._progress.add_task("reading events", total=None, detail="")

    def _step(self, step: str, number: int, steps: int) -> None:
        assert self._task is not None  # A step comes after the reading.
        self._progress.update(self._task, description=f"measuring {step}", total=steps, completed=number, detail="")
        if not err.is_terminal:
            err.print(f"{number + 1} of {steps}: {step}", highlight=False)

    def _epoch(self, epoch: Epoch) -> None:
        if self._task is not None:
            detail = f"epoch {epoch.epoch}  validation NDCG@20 {epoch.validation_ndcg:.4f}"
            self._progress.update(self._task, detail=detail)
