"""Searches hyper-parameters on the validation part of a model's events; the study is kept in the same PostgreSQL.

The newest part of the events, on which `pgvae train` measures, is cut off before the first trial.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import optuna
import psycopg
import torch
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState
from psycopg import sql
from sqlalchemy.exc import DBAPIError

from pgvae.config import TrainingConfig
from pgvae.connection import connect
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.loop import fit
from pgvae.ranking import Holdout
from pgvae.rows import CHOOSING, Epoch
from pgvae.splits import measurable
from pgvae.train import Listener, read_checked

SCHEMA = "vae_optuna"
# Owns the schema, so that whoever may train may also take part in a study that another role began.
_OWNER = "vae_trainer"
# Two first workers must not both create Optuna's tables. The number is the ASCII of "pgtune".
_LOCK = 0x706774756E65
_ATTRIBUTE = "pgvae"
_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A field of TrainingConfig and the range that is searched; whole numbers where `step` is given."""

    name: str
    low: float
    high: float
    step: int | None = None
    log: bool = False

    def suggest(self, trial: Trial) -> Any:
        """Gives the value that a trial shall try, in three digits: what is printed is what was tried."""
        if self.step is not None:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=self.step)
        return float(f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.3g}")

    def contains(self, value: object) -> bool:
        """Says whether a trial could have got this value."""
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.step is None or (value - self.low) % self.step == 0


SPACE = (
    Parameter(name="hidden", low=32, high=512, step=32),
    Parameter(name="latent", low=32, high=512, step=32),
    Parameter(name="batch_size", low=64, high=1024, step=64),
    Parameter(name="learning_rate", low=1e-3, high=2e-2, log=True),
    Parameter(name="kl_weight", low=1e-3, high=0.5, log=True),
    Parameter(name="token_dropout", low=0.0, high=0.9),
    Parameter(name="temperature", low=0.05, high=0.5, log=True),
    Parameter(name="future_share", low=0.0, high=1.0),
    Parameter(name="graph_neighbours", low=0, high=8, step=4),
)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How long and how broadly to search.

    `trials` counts what the study holds in the end, earlier runs and other machines included; `timeout` in seconds
    ends the search early. A worker says each `heartbeat` seconds that it lives; a trial that was silent for `grace`
    seconds is given up, and tried once more.
    """

    trials: int = 30
    timeout: float | None = None
    workers: int = 1
    study: str | None = None
    heartbeat: int = 10
    grace: int = 60

    def __post_init__(self) -> None:
        for name in ("trials", "workers", "heartbeat", "grace"):
            if getattr(self, name) < 1:
                raise PgvaeError(f"{name} is {getattr(self, name)}", hint="give 1 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise PgvaeError(f"timeout is {self.timeout}", hint="give a number of seconds greater than 0")
        if self.study is not None and not self.study.strip():
            raise PgvaeError("the name of the study is empty", hint="leave --study out to use the model's name")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One trial: its state in Optuna's words, lower-case; `value` is the best validation NDCG@20 so far."""

    number: int
    state: str
    value: float | None
    epoch: int
    config: TrainingConfig
    is_default: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a study holds; `default` and `best` are complete trials, None where there is none yet."""

    study: str
    model: str
    trials: list[Tried]

    @property
    def best(self) -> Tried | None:
        """The complete trial that ranks best on the validation part; of equals the earliest."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return max(complete, key=lambda trial: trial.value or 0.0, default=None)

    @property
    def default(self) -> Tried | None:
        """The trial of the configuration that `pgvae train` uses by itself."""
        return next((trial for trial in self.trials if trial.is_default and trial.state == "complete"), None)

    def count(self, *states: str) -> int:
        """Gives the number of trials in one of these states."""
        return sum(trial.state in states for trial in self.trials)

    def command(self) -> str | None:
        """Gives the command line that trains with the best configuration."""
        return train_command(self.model, self.best.config) if self.best else None


def train_command(model: str, config: TrainingConfig) -> str:
    """Gives the `pgvae train` command line of a configuration: what differs from the defaults."""
    default = asdict(TrainingConfig())
    options = [
        f"--{name.replace('_', '-')}={each}"
        for name, value in asdict(config).items()
        if value != default[name]
        # An option that takes several values is repeated.
        for each in (value if isinstance(value, tuple) else (value,))
    ]
    return shlex.join(["pgvae", "train", model, *options])


def tune(
    dsn: str | None,
    model: str,
    search: Search | None = None,
    config: TrainingConfig | None = None,
    *,
    force: bool = False,
    listener: Listener | None = None,
    on_warning: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Searches until the study holds enough trials, in processes of its own, and gives what it holds.

    `config` is the first trial, and gives what is not searched. Running it again, also elsewhere at the same time,
    goes on with the same study. PgvaeError where the quality gate fails, the events are too few, or the study was
    begun for something else.
    """
    search, config, listener = search or Search(), config or TrainingConfig(), listener or Listener()
    begun = time.time()
    with connect(dsn) as connection:
        definition, dataset = read_checked(connection, model, force, listener)
    with _reported():
        study, train, validation = _open(dsn, model, search, config, dataset, on_warning)
        task = _Task(
            dsn=dsn,
            model=model,
            search=search,
            study=study.study_name,
            config=config,
            train=train,
            validation=validation,
            max_history=definition.max_history,
            deadline=begun + search.timeout if search.timeout else None,
        )
        _supervise(task, study, on_progress, on_warning)
        outcome = read_outcome(study, model, config)
    on_progress(outcome)
    return outcome


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker is given: the events before the test part, and no others."""

    dsn: str | None
    model: str
    search: Search
    study: str
    config: TrainingConfig
    train: Dataset
    validation: Holdout
    max_history: int
    deadline: float | None

    def is_late(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline


class _Stopped(Exception):
    """The time is over, or the process that started this worker is gone."""


# The study


def _open(
    dsn: str | None,
    model: str,
    search: Search,
    config: TrainingConfig,
    dataset: Dataset,
    on_warning: Callable[[str], None],
) -> tuple[optuna.Study, Dataset, Holdout]:
    """Gives the study, made where it is new, and the parts of the events that it learns from and judges by.

    A study keeps to the events that there were when it began, so that its trials can be compared.
    """
    name = search.study or model
    terms = {"model": model, "config": asdict(config), "space": [asdict(parameter) for parameter in SPACE]}
    # As it comes back from the table: lists for tuples.
    terms = json.loads(json.dumps(terms))
    with connect(dsn, autocommit=True) as connection:
        connection.execute("select pg_catalog.pg_advisory_lock(%s)", [_LOCK])
        _create_schema(connection)
        storage = _storage(dsn, search)
        known = {summary.study_name: summary.user_attrs for summary in optuna.get_all_study_summaries(storage)}
        kept = known.get(name, {}).get(_ATTRIBUTE)
        until = kept["until"] if kept else float(dataset.occurred_at.max())
        dataset = dataset.between(-np.inf, np.nextafter(until, np.inf))
        if kept:
            _check_terms(name, kept, terms)
            if kept["events"] != len(dataset.user):
                on_warning(
                    f"study {name} began with {kept['events']} events, of the same time there are now"
                    f" {len(dataset.user)}: its earlier trials saw other data"
                )
        found = measurable(dataset, seed=config.seed)
        if found is None:
            raise PgvaeError(
                f"model {model} has too few users to tell a better configuration from a worse one",
                hint="train with the defaults: pgvae train " + shlex.quote(model),
            )
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        if not kept:
            study.set_user_attr(_ATTRIBUTE, {**terms, "until": until, "events": len(dataset.user)})
        tried = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.WAITING)
        if not any(trial.user_attrs.get("default") for trial in study.get_trials(deepcopy=False, states=tried)):
            study.enqueue_trial(_searched(config), user_attrs={"default": True})
    split = found[1]
    return study, split.train, split.validation


def _create_schema(connection: psycopg.Connection) -> None:
    exists = connection.execute("select pg_catalog.to_regnamespace(%s) is not null", [SCHEMA]).fetchone()
    if exists and exists[0]:
        return
    names = {"schema": sql.Identifier(SCHEMA), "owner": sql.Identifier(_OWNER)}
    try:
        connection.execute(sql.SQL("create schema {schema} authorization {owner}").format(**names))
    except psycopg.errors.InsufficientPrivilege as error:
        raise PgvaeError(
            f"no schema {SCHEMA} for the studies: {error.diag.message_primary}",
            hint=f"the owner of the database makes it once: create schema {SCHEMA} authorization {_OWNER};"
            f" who is no superuser must be a member of that role: grant {_OWNER} to {connection.info.user}",
        ) from error
    connection.execute(
        sql.SQL("comment on schema {schema} is 'Studies of pgvae tune, in the tables of Optuna.'").format(**names)
    )


def _storage(dsn: str | None, search: Search) -> optuna.storages.RDBStorage:
    def opened() -> psycopg.Connection:
        connection = connect(dsn, autocommit=True)
        try:
            connection.execute(sql.SQL("set role {}").format(sql.Identifier(_OWNER)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise PgvaeError(
                f"{connection.info.user} may not tune: it is no member of the role {_OWNER}",
                hint=f"a superuser can allow it: grant {_OWNER} to {connection.info.user}",
            ) from error
        connection.execute(sql.SQL("set search_path = {}").format(sql.Identifier(SCHEMA)))
        connection.autocommit = False
        return connection

    # Optuna logs every trial, and warns of its own heartbeat.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.storages.RDBStorage(
            "postgresql+psycopg://",
            engine_kwargs={"creator": opened, "pool_pre_ping": True},
            heartbeat_interval=search.heartbeat,
            grace_period=search.grace,
            heartbeat_stale_trial_callback=_try_again,
        )


def _try_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Puts the trial of a worker that died back into the queue, once."""
    if not trial.user_attrs.get("again"):
        again = {"again": True, "default": bool(trial.user_attrs.get("default"))}
        study.enqueue_trial(trial.params, user_attrs=again)


def _check_terms(name: str, kept: dict[str, Any], terms: dict[str, Any]) -> None:
    for what, shown in (("model", "model"), ("config", "configuration"), ("space", "search space")):
        if kept[what] != terms[what]:
            told = ""
            if what == "model":
                told = f": {kept[what]}, not {terms[what]}"
            elif what == "config":
                then, now = kept[what], terms[what]
                names = [name for name in now if then.get(name) != now[name]]
                told = ": " + ", ".join(f"{name} {then.get(name)}, not {now[name]}" for name in names)
            raise PgvaeError(
                f"study {name} was begun with another {shown}{told}", hint="give the search another name with --study"
            )


def _searched(config: TrainingConfig) -> dict[str, Any]:
    """Gives those values of a configuration that a trial could have got; the sampler learns from them."""
    values = {parameter.name: getattr(config, parameter.name) for parameter in SPACE}
    return {parameter.name: values[parameter.name] for parameter in SPACE if parameter.contains(values[parameter.name])}


def read_outcome(study: optuna.Study, model: str, config: TrainingConfig) -> Outcome:
    """Gives the trials of a study as they stand."""
    trials = [
        Tried(
            number=trial.number,
            state=trial.state.name.lower(),
            value=trial.value if trial.value is not None else max(trial.intermediate_values.values(), default=None),
            epoch=max(trial.intermediate_values, default=0),
            config=replace(config, **trial.user_attrs.get("values", {})),
            is_default=bool(trial.user_attrs.get("default")),
            note=str(trial.user_attrs.get("note", "")),
        )
        for trial in study.get_trials(deepcopy=False)
    ]
    return Outcome(study=study.study_name, model=model, trials=trials)


# Workers


def _supervise(
    task: _Task, study: optuna.Study, on_progress: Callable[[Outcome], None], on_warning: Callable[[str], None]
) -> None:
    """Runs the workers and tells of the study meanwhile; PgvaeError where all of them died before the end."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(task.search.workers)]
    # The task goes through a pipe, so that starting takes no time: all import at once, and Ctrl-C is soon heeded.
    workers = [context.Process(target=_work_on_what_comes, args=(read,), daemon=True) for read, _ in pipes]
    try:
        for worker, (read, _) in zip(workers, pipes, strict=True):
            with _ignored_interrupts():
                worker.start()
            read.close()
        for _, write in pipes:
            # Of a worker that died already is told below.
            with suppress(BrokenPipeError):
                write.send(task)
        while workers:
            workers[0].join(_POLL_SECONDS)
            on_progress(read_outcome(study, task.model, task.config))
            for worker in [worker for worker in workers if worker.exitcode is not None]:
                workers.remove(worker)
                if worker.exitcode:
                    how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"status {worker.exitcode}"
                    on_warning(f"a worker ended with {how}")
        if _unfinished(task, study):
            raise PgvaeError(
                "no worker is left, and the search is not finished",
                hint="what was tried is kept; run the command again to go on, with fewer --workers if memory ran out",
            )
    finally:
        started = [worker for worker in workers if worker.pid]
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.join(_FAREWELL_SECONDS)


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Lets processes that are started within ignore Ctrl-C: they would print where in their imports it met them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unfinished(task: _Task, study: optuna.Study) -> bool:
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return len(finished) < task.search.trials and not task.is_late()


def _work_on_what_comes(tasks: Connection) -> None:
    """Does the task that comes through a pipe; the body of a worker."""
    # An interrupted trial is noted as failed: the next run need not wait a minute to see that it is dead.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _work(tasks.recv())
    # Who started this one ends it, or is gone. At once: to leave tidily takes the interpreter seconds.
    except (KeyboardInterrupt, EOFError):
        os._exit(130)


def _work(task: _Task) -> None:
    """Runs trials until the study holds enough of them."""
    torch.set_num_threads(max(1, torch.get_num_threads() // task.search.workers))
    try:
        with _reported():
            study = optuna.load_study(study_name=task.study, storage=_storage(task.dsn, task.search), pruner=pruner())
            while _wait_for_turn(task, study):
                study.optimize(lambda trial: _objective(task, study, trial), n_trials=1, catch=(_Stopped,))
    except PgvaeError as error:
        raise SystemExit(f"worker: {error.message}") from None


def _wait_for_turn(task: _Task, study: optuna.Study) -> bool:
    """Says whether another trial is wanted; waits while those that run elsewhere may still be the last ones."""
    while not _is_orphan():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        finished = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        default = {trial.state for trial in trials if trial.user_attrs.get("default")}
        # The default configuration is tried however little time there is: what is found must not be worse than it.
        if TrialState.WAITING in default:
            return True
        if finished >= task.search.trials or task.is_late():
            if TrialState.RUNNING not in default:
                return False
        elif finished + running < task.search.trials:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _is_orphan() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _objective(task: _Task, study: optuna.Study, trial: Trial) -> float:
    """Trains one configuration without the test part and gives its best NDCG@20 on the validation part."""
    # Seeded by the number: no two workers draw the same values, and a search that goes on repeats none.
    study.sampler = optuna.samplers.TPESampler(seed=(task.config.seed + trial.number) % 2**32, multivariate=False)
    is_default = bool(trial.user_attrs.get("default"))
    known = _searched(task.config)
    values = {p.name: p.suggest(trial) for p in SPACE if p.name in known or not is_default}
    trial.set_user_attr("values", values)

    def on_epoch(epoch: Epoch) -> None:
        if _is_orphan():
            raise _Stopped
        if epoch.phase == CHOOSING:
            # What trains before the trial's own first epoch.
            what = f"choosing --future-share, epoch {epoch.epoch}, NDCG@20 {epoch.validation_ndcg:.4f}"
            trial.set_user_attr("note", what)
            return
        if epoch.epoch == 1:
            trial.set_user_attr("note", "")
        if task.is_late() and not is_default:
            raise _Stopped

    return train_trial(
        trial,
        replace(task.config, **values),
        task.train,
        task.validation,
        max_history=task.max_history,
        may_prune=not is_default,
        on_epoch=on_epoch,
    )


def pruner() -> optuna.pruners.BasePruner:
    """Gives what ends trials that lag behind."""
    # A median of fewer than five says little, and annealing moves the first passes.
    return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)


def train_trial(
    trial: Trial,
    config: TrainingConfig,
    train: Dataset,
    validation: Holdout,
    *,
    max_history: int,
    may_prune: bool = True,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> float:
    """Trains a configuration, tells the trial of each epoch, and gives the best NDCG@20 on the validation part.

    `optuna.TrialPruned` where it lags behind or diverges; `on_epoch` may raise what ends it otherwise.
    """
    best = 0.0

    def told(epoch: Epoch) -> None:
        nonlocal best
        # Epochs that only choose a setting are not the trial's own.
        if epoch.phase != CHOOSING:
            assert epoch.validation_ndcg is not None
            best = max(best, epoch.validation_ndcg)
            trial.report(best, epoch.epoch)
        on_epoch(epoch)
        if epoch.phase != CHOOSING and may_prune and trial.should_prune():
            raise optuna.TrialPruned

    try:
        fit(
            train,
            # Epochs are ranked without shortcut and recency, so none need be chosen.
            replace(config, neighbours=0),
            max_history=max_history,
            phase="tune",
            recency=0.0,
            validation=validation,
            on_epoch=told,
        )
    except PgvaeError as error:
        # Such as a loss that is no number any more: the sampler shall keep away from it.
        trial.set_user_attr("note", error.message)
        raise optuna.TrialPruned from error
    return best


@contextmanager
def _reported() -> Iterator[None]:
    """Turns what SQLAlchemy and Optuna raise of a lost connection or an old study into a PgvaeError."""
    try:
        yield
    except (DBAPIError, StorageInternalError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error.__cause__ or error
        raise PgvaeError(
            f"the study cannot be read or written: {str(cause).strip().splitlines()[0]}",
            hint="finished trials are kept; once the server takes connections, run the command again to go on",
        ) from error
    except RuntimeError as error:
        if "table schema" not in str(error):
            raise
        raise PgvaeError(
            f"the studies in schema {SCHEMA} were written by another release of Optuna",
            hint=f"install that release, or give the studies up: drop schema {SCHEMA} cascade",
        ) from error
