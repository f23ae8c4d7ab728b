"""`pgvae train`: from a model's events to a published version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psycopg

from pgvae import doctor
from pgvae.checkpoints import Checkpoints, default_folder
from pgvae.comparison import Evaluation, evaluate
from pgvae.config import TrainingConfig
from pgvae.connection import connect, keep_open
from pgvae.dataset import Dataset, ModelDefinition, read_dataset, read_definition
from pgvae.demand import DemandFit, fit_demand, read_sales
from pgvae.errors import PgvaeError
from pgvae.external.mode import is_external
from pgvae.external.run import verify_outside
from pgvae.loop import Fit, fit
from pgvae.outcome_windows import Weights, newest_moment, too_little
from pgvae.outcomes import OutcomeFit, fit_outcomes
from pgvae.publish import check_publishable, publish
from pgvae.rows import Epoch, Metric
from pgvae.segments import find_segments, read_previous
from pgvae.trials import Assignments, read_assignments
from pgvae.uplift import NO_COLUMN, UpliftFit, fit_uplift
from pgvae.validation import DEFAULT_SHORTCUT

# Passes over the data where no validation could choose their number.
_UNVALIDATED_EPOCHS = 12


@dataclass(frozen=True, kw_only=True)
class Listener:
    """What a training tells while it runs; each part may be left out."""

    on_phase: Callable[[str], None] = lambda phase: None
    on_quality: Callable[[ModelDefinition], None] = lambda definition: None
    on_data: Callable[[Dataset], None] = lambda dataset: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A published version and what was measured of it; `metrics` is empty where the events cannot be split."""

    version: int
    metrics: list[Metric]
    demand: DemandFit
    outcomes: OutcomeFit
    uplift: UpliftFit
    durations: dict[str, float]


def train(
    dsn: str | None,
    model: str,
    config: TrainingConfig | None = None,
    *,
    force: bool = False,
    checkpoints: Path | None = None,
    listener: Listener | None = None,
) -> Training:
    """Trains a model on its cleaned events and publishes the result as a version in the state ready.

    The network is first trained without the newest events, or without a share of each user's items, and measured on
    them, then trained again on all events for as many epochs as were best; beside it the forecast of demand and the
    heads of outcomes are fitted, and the users are divided into segments. No connection is open meanwhile, so a long
    training holds back no vacuum. PgvaeError where the quality gate fails and `force` is not given; nothing is then
    published. A training that was interrupted goes on from its checkpoint in the folder `checkpoints`.
    """
    config = config or TrainingConfig()
    kept = Checkpoints(checkpoints or default_folder())
    listener = listener or Listener()
    durations: dict[str, float] = {}
    with connect(dsn) as connection:
        check_publishable(connection, model)
        with _timed("read", durations, listener):
            definition, dataset = read_checked(connection, model, force, listener)
            sales = read_sales(connection, model, dataset)
            assignments = read_assignments(connection, model)
    with _timed("demand", durations, listener):
        demand = fit_demand(sales, seed=config.seed)
    with _timed("evaluate", durations, listener):
        evaluation = evaluate(
            dataset, config, max_history=definition.max_history, checkpoints=kept, on_epoch=listener.on_epoch
        )
    if evaluation.fit:
        config = replace(config, future_share=evaluation.fit.future_share)
    with _timed("train", durations, listener):
        final = fit(
            dataset,
            config,
            max_history=definition.max_history,
            phase="publish",
            epochs=evaluation.fit.best_epoch if evaluation.fit else min(config.epochs, _UNVALIDATED_EPOCHS),
            recency=evaluation.fit.recency if evaluation.fit else 0.0,
            shortcut=evaluation.fit.shortcut if evaluation.fit else DEFAULT_SHORTCUT,
            checkpoints=kept,
            on_epoch=listener.on_epoch,
        )
    with _timed("segments", durations, listener):
        with connect(dsn) as connection:
            previous = read_previous(connection, model)
        segments = find_segments(dataset, final.weights, config, max_history=definition.max_history, previous=previous)
    earlier = _Earlier(
        dataset=dataset,
        config=config,
        max_history=definition.max_history,
        evaluation=evaluation,
        final=final,
        checkpoints=kept,
    )
    with _timed("outcomes", durations, listener):
        outcomes = _fit_outcomes(earlier, sales.horizon)
    uplift = UpliftFit(missing=NO_COLUMN)
    if assignments is not None:
        with _timed("uplift", durations, listener):
            uplift = _fit_uplift(earlier, assignments, outcomes, sales.horizon)
    with _timed("publish", {}, listener), connect(dsn) as connection:
        version = publish(
            connection,
            definition=definition,
            dataset=dataset,
            config=config,
            fit=final,
            curve=(evaluation.fit.curve if evaluation.fit else []) + final.curve,
            metrics=evaluation.metrics + demand.metrics + outcomes.metrics + uplift.metrics,
            durations=durations,
            curves=[*demand.curve, *outcomes.curves, *uplift.curves],
            demand=demand.head,
            segments=segments,
            outcomes=outcomes.tensors | uplift.tensors,
            no_uplift=uplift.missing,
        )
    kept.remove()
    with connect(dsn, autocommit=True) as connection:
        if is_external(connection):
            verify_outside(connection, model, version)
    return Training(
        version=version,
        metrics=evaluation.metrics,
        demand=demand,
        outcomes=outcomes,
        uplift=uplift,
        durations=durations,
    )


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """Networks that have not learned from the newest events, as heads are measured and fitted with."""

    dataset: Dataset
    config: TrainingConfig
    max_history: int
    evaluation: Evaluation
    final: Fit
    checkpoints: Checkpoints

    def network(self, until: float, phase: str) -> tuple[Weights, float]:
        """Gives the weights of one that has learned from events before a moment only, and when those events end.

        That of the evaluation, or one that is trained for it, for as many epochs as the published one.
        """
        known = self.evaluation
        if known.fit is not None and known.learned_until < until:
            # A moment later: what happened at the very last one was learned, too, and in a shop of dates that is a
            # whole day.
            return known.fit.weights, float(np.nextafter(known.learned_until, np.inf))
        trained = fit(
            self.dataset.between(-np.inf, until),
            self.config,
            max_history=self.max_history,
            phase=phase,
            epochs=self.final.best_epoch,
            recency=self.final.recency,
            shortcut=self.final.shortcut,
            checkpoints=self.checkpoints,
        )
        return trained.weights, until


def _fit_outcomes(earlier: _Earlier, horizon: int) -> OutcomeFit:
    """Gives the heads of outcomes, with a network that has not learned from the newest horizon."""
    dataset, seed = earlier.dataset, earlier.config.seed
    if why := too_little(dataset, horizon, seed):
        return OutcomeFit(tensors={}, metrics=[], curves=[], missing=why)
    weights, end = earlier.network(newest_moment(dataset, horizon), "outcomes")
    return fit_outcomes(
        dataset, earlier=weights, earlier_end=end, horizon=horizon, max_history=earlier.max_history, seed=seed
    )


def _fit_uplift(earlier: _Earlier, assignments: Assignments, outcomes: OutcomeFit, horizon: int) -> UpliftFit:
    """Gives the head of uplift, with a network that has not learned from the experiment."""
    if not outcomes.tensors:
        return UpliftFit(missing=f"there are no probabilities of purchases to rest it on: {outcomes.missing}")
    return fit_uplift(
        earlier.dataset,
        assignments,
        lambda until: earlier.network(until, "uplift")[0],
        horizon=horizon,
        max_history=earlier.max_history,
        seed=earlier.config.seed,
    )


def read_checked(
    connection: psycopg.Connection, model: str, force: bool, listener: Listener
) -> tuple[ModelDefinition, Dataset]:
    """Gives a model and its cleaned events, of one moment; PgvaeError where the quality gate fails and not `force`."""
    # One snapshot for the gate and for the data, so that what was checked is what is trained on.
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    # As in the functions of pgvae: no function that somebody else defined in the role's own path shall run in here.
    connection.execute("set local search_path = pg_catalog, pg_temp")
    keep_open(connection)
    doctor.check_code(connection)
    definition = read_definition(connection, model)
    listener.on_quality(definition)
    if definition.failed_checks and not force:
        names = ", ".join(f"{check['check_name']}: {check['remedy']}" for check in definition.failed_checks)
        raise PgvaeError(
            f"the quality gate of model {model} failed: {names}",
            hint=f"see what vae.check_events says of it; to train all the same: pgvae train {model} --force",
        )
    dataset = read_dataset(connection, model)
    listener.on_data(dataset)
    return definition, dataset


@contextmanager
def _timed(phase: str, durations: dict[str, float], listener: Listener) -> Iterator[None]:
    listener.on_phase(phase)
    begun = time.perf_counter()
    yield
    durations[phase] = round(time.perf_counter() - begun, 3)
