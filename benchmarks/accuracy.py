"""How well pgvae ranks on public data sets, beside our own runs of other methods and beside published figures.

    python -m benchmarks.accuracy --split DIR     a folder with train.txt and test.txt (.xz or not)
    python -m benchmarks.accuracy --all           all of ../shared/data
    python -m benchmarks.accuracy --all --ablation    pgvae without each of its parts
    python -m benchmarks.accuracy --split DIR --tune 20    pgvae also with hyper-parameters searched for this data

Every method trains on the same part, chooses its settings by the same validation part, trains again on all that is not
the test, and ranks all items for all users of the test, once. pgvae runs with its defaults through the trainer's own
loop, and is scored by the runtime that the database runs. Each method runs in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import mult_vae
from benchmarks.report import RESULTS, machine, peak_mb
from benchmarks.splits import Task, read_task
from benchmarks.tuning import tuned
from pgvae import baselines
from pgvae.bootstrap import interval, resampled_means
from pgvae.config import MODEL_PARTS, TrainingConfig
from pgvae.console import err, out
from pgvae.loop import fit
from pgvae.ranking import per_user_metrics, scorer
from pgvae.rows import CHOOSING, Epoch

DATA = Path(__file__).parents[2] / "shared" / "data"
METHODS = ("popularity", "item_knn", "ease", "graph_filter", "sequential_rules", "mult_vae", "pgvae")
MAX_HISTORY = 500
_METRICS = ("recall", "ndcg", "hit_rate")
# pgvae without each of its parts: what is changed in its configuration.
_ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"without {part}": {"without": (part,)} for part in MODEL_PARTS},
    "without graph_convolution": {"graph_neighbours": 0},
    "without λ schedule": {"anneal_epochs": 0.0},
    "without KL term": {"kl_weight": 0.0},
}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A metric of a method: its mean over the users of the test, with the 95 % bootstrap interval where measured."""

    method: str
    metric: str
    k: int
    value: float
    lower: float | None = None
    upper: float | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    source: str = "measured"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long Mult-VAE is trained at most, in seconds, and how many trials pgvae's search has; 0 for no search."""

    mult_vae_seconds: float
    trials: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a method's process gives back."""

    per_user: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    seconds: float
    peak_mb: float
    facts: dict[str, Any]


@app.command()
def main(
    split: Annotated[list[Path] | None, typer.Option(help="Folder of a data set; may be repeated.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All data sets of ../shared/data.")] = False,
    methods: Annotated[
        str, typer.Option(help="Which methods (or, with --ablation, parts), with commas between; all unless given.")
    ] = "",
    ablation: Annotated[bool, typer.Option("--ablation", help="pgvae without each of its parts instead.")] = False,
    mult_vae_seconds: Annotated[
        float, typer.Option(help="Most seconds of training Mult-VAE before its settings are fixed.")
    ] = 600.0,
    tune: Annotated[
        int, typer.Option(help="Also search hyper-parameters of pgvae for each data set, in so many trials.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of every random number.")] = 1,
) -> None:
    """Measure accuracy on fixed splits; writes benchmarks/results/accuracy-<split>.json."""
    folders = [*(split or []), *(sorted(path for path in DATA.iterdir() if path.is_dir()) if all_ else [])]
    if not folders:
        raise typer.BadParameter("give --split DIR or --all")
    if ablation and tune:
        raise typer.BadParameter("--ablation leaves parts out of the defaults: measure --tune in a run of its own")
    known = [name.removeprefix("without ") for name in _ABLATIONS] if ablation else METHODS
    chosen = methods.split(",") if methods else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    names = ["pgvae", *(f"without {part}" for part in chosen)] if ablation else chosen
    if tune:
        names = [*names, "pgvae_tuned"]
    effort = Effort(mult_vae_seconds=mult_vae_seconds, trials=tune)
    for folder in folders:
        _run(folder, names, "ablation" if ablation else "accuracy", seed, effort)


def _run(folder: Path, names: list[str], kind: str, seed: int, effort: Effort) -> None:
    results: dict[str, Measured] = {}
    task = read_task(folder)
    for name in names:
        if name == "sequential_rules" and not task.whole.has_order:
            continue
        err.print(f"{folder.name}: {name}")
        # A process of its own: its peak of memory is the method's.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(_measure, (folder, name, seed, effort))
    rows = _rows(task, results, seed)
    leads = _leads(results, seed)
    if kind == "accuracy":
        rows += [
            Row(method=method, metric=metric, k=task.k, value=value, source="published")
            for method, metric, value in task.published
        ]
    out.print(_table(f"{kind}-{task.name}: {task.protocol}; {len(task.test.users)} users, all items ranked", rows))
    for lead in leads:
        out.print(
            f"pgvae less {lead['method']}, NDCG@{task.k}: {lead['value']:+.4f} ({lead['lower']:+.4f} to"
            f" {lead['upper']:+.4f})",
            highlight=False,
        )
    content = {
        "name": f"{kind}-{task.name}",
        "machine": machine(),
        "protocol": task.protocol,
        "users": task.whole.user_count,
        "items": len(task.whole.item_keys),
        "events": len(task.whole.user),
        "test_users": len(task.test.users),
        "seed": seed,
        "torch_threads": torch.get_num_threads(),
        "config": asdict(TrainingConfig(seed=seed)),
        "facts": {name: measured.facts for name, measured in results.items()},
        "rows": [asdict(row) for row in rows],
        "ndcg_leads": leads,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{kind}-{task.name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    err.print(f"written: benchmarks/results/{path.name}")


def _measure(folder: Path, name: str, seed: int, effort: Effort) -> Measured:
    task = read_task(folder)
    base = peak_mb()
    begun = time.perf_counter()
    score, facts = _fit(task, name, seed, effort)
    seconds = time.perf_counter() - begun
    measured = per_user_metrics(task.test, score, task.k)
    facts["ranking_seconds"] = round(time.perf_counter() - begun - seconds, 1)
    facts["peak_mb_before"] = round(base)
    return Measured(
        per_user={metric: measured[metric] for metric in _METRICS}, seconds=seconds, peak_mb=peak_mb(), facts=facts
    )


def _fit(task: Task, name: str, seed: int, effort: Effort) -> tuple[Any, dict[str, Any]]:
    if name == "popularity":
        return baselines.popularity(task.whole), {}
    if name in baselines.CHOICES:
        setting, _, make = baselines.CHOICES[name]
        chosen = baselines.choose(name, task.part, task.validation, seed).value
        return make(task.whole, [chosen])[0], {setting: chosen}
    if name == "mult_vae":
        found = mult_vae.fit(
            task.part, validation=task.validation, seconds=effort.mult_vae_seconds, seed=seed, say=err.print
        )
        again = mult_vae.fit(task.whole, validation=None, epochs=found.best_epoch, seed=seed)
        return again.scorer, {
            "epochs": found.best_epoch,
            "epochs_tried": len(found.curve),
            "epoch_seconds": round(found.epoch_seconds, 2),
            "seconds_to_95_percent": _to_95_percent(found.curve),
        }
    config = replace(TrainingConfig(seed=seed), **_ABLATIONS.get(name, {}))
    search: dict[str, Any] = {}
    if name == "pgvae_tuned":
        config, search = tuned(task, config, effort.trials, max_history=MAX_HISTORY, say=err.print)
    selected = fit(
        task.part, config, max_history=MAX_HISTORY, phase="evaluate", validation=task.validation, on_epoch=_say
    )
    final = fit(
        task.whole,
        replace(config, future_share=selected.future_share),
        max_history=MAX_HISTORY,
        phase="publish",
        epochs=selected.best_epoch,
        recency=selected.recency,
        shortcut=selected.shortcut,
    )
    curve = [
        (sum(epoch.seconds for epoch in selected.curve[: number + 1]), epoch.validation_ndcg or 0.0)
        for number, epoch in enumerate(selected.curve)
    ]
    return scorer(final.weights, MAX_HISTORY), {
        **search,
        "epochs": selected.best_epoch,
        "epochs_tried": len(selected.curve),
        "shortcut": asdict(selected.shortcut),
        "future_share": selected.future_share,
        "recency": selected.recency,
        "validation_ndcg": {
            f"{choice.way} × {choice.scale:g}, recency {choice.recency:g}" if choice.way else "none": round(ndcg, 5)
            for choice, ndcg in selected.shortcut_ndcg.items()
        },
        "epoch_seconds": round(float(np.mean([epoch.seconds for epoch in final.curve])), 2),
        "seconds_to_95_percent": _to_95_percent(curve),
        "weights_mb": round(sum(tensor.nbytes for tensor in final.weights.values()) / 2**20, 1),
    }


def _say(epoch: Epoch) -> None:
    what = "choosing" if epoch.phase == CHOOSING else "epoch"
    err.print(f"pgvae {what} {epoch.epoch}: NDCG@20 {epoch.validation_ndcg or 0:.4f}, {epoch.seconds:.1f} s")


def _to_95_percent(curve: list[tuple[float, float]]) -> float | None:
    """Gives after how many seconds of training the validation NDCG reached 95 % of its best."""
    best = max((ndcg for _, ndcg in curve), default=0.0)
    return next((round(seconds, 1) for seconds, ndcg in curve if ndcg >= 0.95 * best), None)


def _rows(task: Task, results: dict[str, Measured], seed: int) -> list[Row]:
    rows = []
    for name, measured in results.items():
        matrix = np.column_stack([measured.per_user[metric] for metric in _METRICS])
        lower, upper = interval(resampled_means(matrix, np.arange(len(matrix)), seed))
        rows += [
            Row(
                method=name,
                metric=metric,
                k=task.k,
                value=round(float(matrix[:, column].mean()), 5),
                lower=round(float(lower[column]), 5),
                upper=round(float(upper[column]), 5),
                seconds=round(measured.seconds, 1),
                peak_mb=round(measured.peak_mb),
            )
            for column, metric in enumerate(_METRICS)
        ]
    return rows


def _leads(results: dict[str, Measured], seed: int) -> list[dict[str, Any]]:
    """Gives pgvae's NDCG less that of each other method, with the interval of the difference (same users drawn)."""
    others = [name for name in results if name != "pgvae"]
    if "pgvae" not in results or not others:
        return []
    own = results["pgvae"].per_user["ndcg"]
    matrix = np.column_stack([own - results[name].per_user["ndcg"] for name in others])
    lower, upper = interval(resampled_means(matrix, np.arange(len(matrix)), seed))
    return [
        {
            "method": name,
            "value": round(float(matrix[:, column].mean()), 5),
            "lower": round(float(lower[column]), 5),
            "upper": round(float(upper[column]), 5),
        }
        for column, name in enumerate(others)
    ]


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for header in ("method", "source", *(f"{metric}@{rows[0].k}" for metric in _METRICS), "seconds", "peak MB"):
        table.add_column(header, justify="left" if header in ("method", "source") else "right")
    for method, source in dict.fromkeys((row.method, row.source) for row in rows):
        own = {row.metric: row for row in rows if (row.method, row.source) == (method, source)}
        first = next(iter(own.values()))
        table.add_row(
            method,
            source,
            *(_cell(own.get(metric)) for metric in _METRICS),
            "" if first.seconds is None else f"{first.seconds:.0f}",
            "" if first.peak_mb is None else f"{first.peak_mb:.0f}",
        )
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.value:.4f}" if row.lower is None else f"{row.value:.4f} ({row.lower:.4f}–{row.upper:.4f})"


if __name__ == "__main__":
    app()
