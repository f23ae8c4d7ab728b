"""The search for hyper-parameters: honest about the test part, resumable, shared between workers, hard to kill."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql
from typer.main import get_group

from command import processes, start_server
from conftest import as_role, create_database, drop_database
from pgvae import loop, validation
from pgvae import tune as tuning
from pgvae.cli import app
from pgvae.cli.train import train
from pgvae.cli.tune import _difference, _show
from pgvae.config import FUTURE_SHARES, TrainingConfig
from pgvae.dataset import Dataset, ModelDefinition
from pgvae.errors import PgvaeError
from pgvae.install import uninstall
from pgvae.rows import CHOOSING, Epoch
from pgvae.server import Server
from pgvae.simulate import SimulationConfig, simulate
from pgvae.train import read_checked
from pgvae.tune import SPACE, Outcome, Search, Tried, train_command, tune
from shop import Shop, create_model

RunCli = Callable[..., subprocess.CompletedProcess[str]]
QUICK = TrainingConfig(epochs=2)
# So long that a trial is surely running when it is killed.
LONG = TrainingConfig(epochs=10_000, patience=10_000)


@pytest.fixture(scope="module")
def shop_template(server: Server, template: str) -> str:
    """The name of a database with a simulated shop and the model `shop`, large enough to be split by time."""
    name = "tune_template"
    create_database(server, name, template)
    simulate(server.dsn(name), SimulationConfig(schema="web", users=300, items=300, until=date(2025, 1, 1)))
    with psycopg.connect(server.dsn(name)) as connection:
        create_model(connection, events="web.events", options={"min_events": 100, "min_users": 20, "min_items": 5})
    return name


@pytest.fixture
def shop(server: Server, shop_template: str) -> Iterator[str]:
    """The DSN of a fresh database with that shop."""
    name = f"{shop_template}_copy"
    create_database(server, name, shop_template)
    yield server.dsn(name)
    drop_database(server, name)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the only worker run in this process, where a test can look at it."""
    monkeypatch.setattr(tuning, "_supervise", lambda task, *others: tuning._work(task))


def rows(dsn: str, query: str) -> list[Any]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query.encode()).fetchall()


def wait_for(dsn: str, question: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if rows(dsn, question) == [(True,)]:
                return
        except psycopg.errors.UndefinedTable:
            pass
        assert time.monotonic() < deadline, f"waited in vain for: {question}"
        time.sleep(0.05)


def tried(outcome: Outcome) -> list[tuple[Any, ...]]:
    return [(trial.state, trial.value, asdict(trial.config)) for trial in outcome.trials]


# The space


def test_every_searched_name_is_a_field_and_an_option_of_train() -> None:
    options = inspect.signature(train).parameters
    names = {field.name for field in fields(TrainingConfig)}
    for parameter in SPACE:
        assert parameter.name in names
        assert parameter.name in options
        assert parameter.low < parameter.high


def test_every_corner_of_the_space_is_a_configuration() -> None:
    for end in ("low", "high"):
        TrainingConfig(**{parameter.name: getattr(parameter, end) for parameter in SPACE})


def test_the_command_line_names_what_differs_and_is_understood() -> None:
    config = replace(TrainingConfig(), learning_rate=0.00123, seed=7)
    assert train_command("my shop", config) == "pgvae train 'my shop' --learning-rate=0.00123 --seed=7"
    assert train_command("shop", TrainingConfig()) == "pgvae train shop"
    config = replace(config, without=("age", "order"), segments=0, future_share=0.5)
    _, name, *arguments = shlex.split(train_command("shop", config))
    understood = get_group(app).commands[name].make_context(name, arguments).params
    understood["without"] = tuple(understood["without"])
    # Not every setting is an option.
    assert understood == understood | {name: value for name, value in asdict(config).items() if name in understood}


def test_where_the_default_gives_no_figure_the_best_is_told_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    default = Tried(number=0, state="pruned", value=None, epoch=0, config=TrainingConfig(), is_default=True)
    best = Tried(
        number=1, state="complete", value=0.1, epoch=2, config=TrainingConfig(learning_rate=0.001), is_default=False
    )
    _show(Outcome(study="shop", model="shop", trials=[default, best]))
    told = capsys.readouterr().out
    assert "best: NDCG@20 0.1000 on the validation part; the default configuration gave none" in told
    assert "next: pgvae train shop --learning-rate=0.001" in told


# The search


@pytest.mark.usefixtures("in_process")
def test_the_first_trial_is_the_default_and_the_best_is_not_worse(shop: str) -> None:
    outcome = tune(shop, "shop", Search(trials=3), QUICK)
    first = outcome.trials[0]
    assert (first.is_default, first.state, first.config) == (True, "complete", QUICK)
    assert [trial.is_default for trial in outcome.trials] == [True, False, False]
    assert outcome.best is not None and outcome.best.value is not None and first.value is not None
    assert outcome.best.value >= first.value
    assert outcome.best.value == max(trial.value or 0 for trial in outcome.trials)
    others = [trial.config for trial in outcome.trials[1:]]
    assert others[0] != others[1]
    assert {config.epochs for config in others} == {2}


@pytest.mark.usefixtures("in_process")
def test_a_value_is_the_best_validation_ndcg_of_the_same_training(shop: str) -> None:
    from pgvae.loop import fit
    from pgvae.splits import measurable
    from pgvae.train import Listener

    outcome = tune(shop, "shop", Search(trials=2), QUICK)
    with psycopg.connect(shop) as connection:
        definition, dataset = read_checked(connection, "shop", False, Listener())
    found = measurable(dataset, seed=QUICK.seed)
    assert found
    for trial in outcome.trials:
        again = fit(
            found[1].train,
            trial.config,
            max_history=definition.max_history,
            phase="evaluate",
            validation=found[1].validation,
        )
        assert trial.value == pytest.approx(max(epoch.validation_ndcg or 0 for epoch in again.curve))


@pytest.mark.usefixtures("in_process")
def test_a_trial_ranks_the_validation_part_once_an_epoch(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    real = validation.ndcg

    def counted(*arguments: Any) -> float:
        ranked.append(0)
        return real(*arguments)

    for module in (loop, validation):
        monkeypatch.setattr(module, "ndcg", counted)
    tune(shop, "shop", Search(trials=1), replace(QUICK, future_share=0.5))
    assert len(ranked) == QUICK.epochs


@pytest.mark.usefixtures("in_process")
def test_the_test_part_has_no_influence(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other items in the newest tenth of the events the search is the same; in the tenth before it is not."""

    def shuffled(begin: float, end: float) -> Callable[..., tuple[ModelDefinition, Dataset]]:
        def read(*arguments: Any) -> tuple[ModelDefinition, Dataset]:
            definition, dataset = read_checked(*arguments)
            low, high = np.quantile(dataset.occurred_at, [begin, end])
            part = np.flatnonzero((dataset.occurred_at >= low) & (dataset.occurred_at <= high))
            item = dataset.item.copy()
            item[part] = item[np.random.default_rng(1).permutation(part)]
            assert (item != dataset.item).sum() > len(part) / 2
            return definition, replace(dataset, item=item)

        return read

    search = Search(trials=3)
    plain = tune(shop, "shop", replace(search, study="plain"), QUICK)
    monkeypatch.setattr(tuning, "read_checked", shuffled(0.9, 1.0))
    assert tried(tune(shop, "shop", replace(search, study="test"), QUICK)) == tried(plain)
    monkeypatch.setattr(tuning, "read_checked", shuffled(0.8, 0.9))
    assert tried(tune(shop, "shop", replace(search, study="validation"), QUICK)) != tried(plain)


@pytest.mark.usefixtures("in_process")
def test_another_seed_tries_other_values(shop: str) -> None:
    one, two = (
        tune(shop, "shop", Search(trials=2, study=f"seed {seed}"), replace(QUICK, seed=seed)) for seed in (1, 2)
    )
    assert one.trials[1].config.learning_rate != two.trials[1].config.learning_rate


@pytest.mark.usefixtures("in_process")
def test_a_training_that_fails_is_set_aside_with_its_reason(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuning.fit

    def fit(dataset: Dataset, config: TrainingConfig, **arguments: Any) -> Any:
        if config.learning_rate != QUICK.learning_rate:
            raise PgvaeError("the loss is nan in epoch 1")
        return real(dataset, config, **arguments)

    monkeypatch.setattr(tuning, "fit", fit)
    outcome = tune(shop, "shop", Search(trials=3), QUICK)
    assert [trial.state for trial in outcome.trials] == ["complete", "pruned", "pruned"]
    assert outcome.trials[1].note == "the loss is nan in epoch 1"
    assert outcome.best is outcome.default


@pytest.mark.usefixtures("in_process")
def test_a_trial_that_chooses_its_share_says_how_far_it_is(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []
    real = tuning.fit

    def fit(*arguments: Any, on_epoch: Callable[[Epoch], None], **named: Any) -> Any:
        def watched(epoch: Epoch) -> None:
            on_epoch(epoch)
            ((note,),) = rows(shop, "select value_json from vae_optuna.trial_user_attributes where key = 'note'")
            trial = Tried(
                number=0, state="running", value=None, epoch=0, config=QUICK, is_default=True, note=json.loads(note)
            )
            shown.append((epoch.phase, _difference(trial)))

        return real(*arguments, on_epoch=watched, **named)

    monkeypatch.setattr(tuning, "fit", fit)
    outcome = tune(shop, "shop", Search(trials=1), QUICK)
    chosen = [told for phase, told in shown if phase == CHOOSING]
    assert [told.split(", NDCG")[0] for told in chosen] == [
        f"(the default) – choosing --future-share, epoch {epoch}" for epoch in (1, 2, 1, 2)
    ]
    assert {told for phase, told in shown if phase != CHOOSING} == {"(the default)"}
    assert outcome.trials[0].note == ""


@pytest.mark.usefixtures("in_process")
def test_a_trial_far_behind_is_stopped_early(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(dataset: Dataset, config: TrainingConfig, *, on_epoch: Callable[[Epoch], None], **arguments: Any) -> None:
        number = len(seen)
        seen.append(0)
        for epoch in range(1, 11):
            seen[-1] = epoch
            # The seventh is far behind the six before.
            ndcg = (0.5 if number < 6 else 0.01) + epoch / 1000
            on_epoch(
                Epoch(
                    phase="tune",
                    epoch=epoch,
                    loss=1.0,
                    reconstruction=1.0,
                    kl=0.0,
                    validation_ndcg=ndcg,
                    seconds=0.0,
                )
            )

    seen: list[int] = []
    monkeypatch.setattr(tuning, "fit", fit)
    outcome = tune(shop, "shop", Search(trials=7), QUICK)
    assert outcome.trials[6].state == "pruned"
    assert seen[:6] == [10] * 6
    assert seen[6] < 10
    assert outcome.trials[6].epoch == seen[6]


# Going on


@pytest.mark.usefixtures("in_process")
def test_a_search_goes_on_where_it_ended(shop: str) -> None:
    whole = tune(shop, "shop", Search(trials=4, study="whole"), QUICK)
    part = tune(shop, "shop", Search(trials=2, study="parts"), QUICK)
    assert tried(part) == tried(whole)[:2]
    both = tune(shop, "shop", Search(trials=4, study="parts"), QUICK)
    assert tried(both) == tried(whole)
    assert tried(tune(shop, "shop", Search(trials=4, study="parts"), QUICK)) == tried(whole)


@pytest.mark.usefixtures("in_process")
def test_a_study_keeps_to_the_events_it_began_with(shop: str) -> None:
    warnings: list[str] = []
    before = tune(shop, "shop", Search(trials=2), QUICK, on_warning=warnings.append)
    with psycopg.connect(shop) as connection:
        connection.execute(
            "insert into web.events (event_id, user_id, item_id, event_type, occurred_at)"
            " select event_id + 1000000, user_id, item_id, event_type, occurred_at + interval '10 days' from web.events"
            " where occurred_at > timestamptz '2024-12-25'"
        )
    after = tune(shop, "shop", Search(trials=3), QUICK, on_warning=warnings.append)
    assert warnings == []
    assert tried(after)[:2] == tried(before)
    with psycopg.connect(shop) as connection:
        connection.execute("delete from web.events where user_id = (select min(user_id) from web.events)")
    tune(shop, "shop", Search(trials=4), QUICK, on_warning=warnings.append)
    assert len(warnings) == 1 and "its earlier trials saw other data" in warnings[0]


@pytest.mark.usefixtures("in_process")
def test_the_default_is_tried_whatever_the_time(shop: str) -> None:
    outcome = tune(shop, "shop", Search(trials=50, timeout=0.001), QUICK)
    assert [(trial.state, trial.is_default) for trial in outcome.trials] == [("complete", True)]
    assert outcome.best is outcome.default


def test_two_workers_share_a_study(shop: str) -> None:
    # So long that the second worker has time to start.
    slow = replace(QUICK, epochs=6, patience=6)
    outcome = tune(shop, "shop", Search(trials=5, workers=2), slow)
    assert 5 <= outcome.count("complete", "pruned") <= 6
    assert len({trial.config.learning_rate for trial in outcome.trials}) == len(outcome.trials)
    together = (
        "select count(*) > 0 from vae_optuna.trials a join vae_optuna.trials b on a.trial_id < b.trial_id"
        " and a.datetime_start < b.datetime_complete and b.datetime_start < a.datetime_complete"
    )
    assert rows(shop, together) == [(True,)]


def test_the_same_command_twice_at_once_shares_a_study(shop: str, run_cli: RunCli) -> None:
    command = ("tune", "shop", "--trials=4", "--epochs=2", "--json")
    with ThreadPoolExecutor() as pool:
        for done in list(pool.map(lambda _: run_cli(*command, dsn=shop), range(2))):
            assert done.returncode == 0, done.stderr
    assert rows(shop, "select count(*) from vae_optuna.studies") == [(1,)]
    assert rows(shop, "select count(*) between 4 and 5 from vae_optuna.trials where state <> 'FAIL'") == [(True,)]
    default = "select count(*) from vae_optuna.trial_user_attributes where key = 'default'"
    assert rows(shop, default) == [(1,)]


# Kills

RUNNING = (
    "select count(*) > 0 from vae_optuna.trials t join vae_optuna.trial_intermediate_values v using (trial_id)"
    " where t.state = 'RUNNING'"
)
QUIET = Search(trials=1, heartbeat=1, grace=3)


def start(dsn: str) -> Any:
    """Starts a search whose first trial does not end, and waits until it runs."""
    start_server()
    process = processes.Process(target=tune, args=(dsn, "shop", QUIET, LONG))
    process.start()
    wait_for(dsn, RUNNING)
    return process


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    # Python's own helper for shared resources is a child as well.
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until_alone(dsn: str) -> None:
    wait_for(
        dsn,
        "select count(*) = 0 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        " and backend_type = 'client backend'",
    )


@pytest.mark.usefixtures("in_process")
def test_the_trial_of_a_killed_worker_is_given_up_and_tried_again(shop: str) -> None:
    process = start(shop)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    with psycopg.connect(shop) as connection:
        # The next run shall not train as long as the one that was killed.
        terms = connection.execute("select value_json from vae_optuna.study_user_attributes").fetchone()
        assert terms is not None
        changed = {**json.loads(terms[0]), "config": asdict(QUICK)}
        connection.execute("update vae_optuna.study_user_attributes set value_json = %s", [json.dumps(changed)])
    outcome = tune(shop, "shop", replace(QUIET, trials=2), QUICK)
    assert [trial.state for trial in outcome.trials].count("fail") == 1
    assert (outcome.trials[0].state, outcome.trials[0].is_default) == ("fail", True)
    assert outcome.count("complete", "pruned") == 2
    assert outcome.default is not None and outcome.default.number > 0


def test_workers_end_with_the_process_that_started_them(shop: str) -> None:
    process = start(shop)
    assert len(children(process.pid)) == 1
    process.kill()
    process.join()
    wait_until_alone(shop)
    assert rows(shop, "select state::text from vae_optuna.trials") == [("FAIL",)]


def test_an_interrupted_search_ends_quietly_and_leaves_no_trial_behind(
    shop: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C reaches the workers, too: one that still imports is not to tell where."""
    told: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        if not told:
            for worker in children(os.getpid()):
                os.kill(worker, signal.SIGINT)
        told.append(outcome)
        if outcome.trials[0].epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(shop, "shop", QUIET, LONG, on_progress=tell)
    assert capfd.readouterr().err == ""
    assert rows(shop, "select state::text from vae_optuna.trials") == [("FAIL",)]


# The command line


def test_the_command_prints_what_to_run_next(shop: str, run_cli: RunCli) -> None:
    done = run_cli("tune", "shop", "--trials=2", "--epochs=1", "--json", dsn=shop)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["best"]["validation_ndcg"] >= result["default"]["validation_ndcg"]
    assert len(result["trials"]) == 2
    assert result["command"][:3] == ["pgvae", "train", "shop"]
    # A search measures on no event, and publishes nothing.
    assert rows(shop, "select (select count(*) from vae.versions), (select count(*) from vae.metrics)") == [(0, 0)]
    again = run_cli("tune", "shop", "--trials=2", "--epochs=1", dsn=shop)
    assert f"next: {shlex.join(result['command'])}" in again.stdout
    trained = run_cli(*result["command"][1:], dsn=shop)
    assert trained.returncode == 0, trained.stderr
    assert_published_with(shop, result["best"]["config"])


@pytest.mark.usefixtures("in_process")
def test_train_publishes_with_the_best_configuration(shop: str, run_cli: RunCli) -> None:
    done = run_cli("tune", "shop", "--trials=2", "--epochs=2", "--train", dsn=shop)
    assert done.returncode == 0, done.stderr
    assert "published version 1 of model shop" in done.stdout
    best = tune(shop, "shop", Search(trials=2), QUICK).best
    assert best
    assert_published_with(shop, json.loads(json.dumps(asdict(best.config))))


def assert_published_with(dsn: str, config: dict[str, Any]) -> None:
    """Compares with what the version was trained with; a future_share that the training chose is kept as chosen."""
    kept = rows(dsn, "select config from vae.versions")[0][0]
    if config["future_share"] is None:
        assert kept["future_share"] in FUTURE_SHARES
        config = config | {"future_share": kept["future_share"]}
    assert {name: kept[name] for name in config} == config


def test_bad_input_is_refused_before_anything_is_made(shop: str, run_cli: RunCli) -> None:
    for arguments, message in (
        (("nothing",), 'model "nothing" does not exist'),
        (("shop", "--trials=0"), "trials is 0"),
    ):
        done = run_cli("tune", *arguments, dsn=shop)
        assert done.returncode == 1
        assert f"error: {message}" in done.stderr
        assert "hint: " in done.stderr
        assert rows(shop, "select to_regnamespace('vae_optuna') is null") == [(True,)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Search(workers=0), "workers is 0"),
        (lambda: Search(timeout=0), "timeout is 0"),
        (lambda: Search(study=" "), "the name of the study is empty"),
        (lambda: TrainingConfig(epochs=0), "epochs is 0"),
    ],
)
def test_a_search_that_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PgvaeError, match=message) as refused:
        make()
    assert refused.value.hint


@pytest.mark.usefixtures("in_process")
def test_a_study_is_for_one_model_and_one_configuration(shop: str) -> None:
    with psycopg.connect(shop) as connection:
        create_model(connection, "second", events="web.events", options={"min_events": 100, "min_users": 20})
    tune(shop, "shop", Search(trials=1), QUICK)
    with pytest.raises(PgvaeError, match="was begun with another model: shop, not second") as caught:
        tune(shop, "second", Search(trials=1, study="shop"), QUICK)
    assert caught.value.hint == "give the search another name with --study"
    with pytest.raises(PgvaeError, match="was begun with another configuration: seed 1, not 5"):
        tune(shop, "shop", Search(trials=1), replace(QUICK, seed=5))


def test_a_failed_quality_gate_is_refused_unless_forced(
    database: str, connection: psycopg.Connection, run_cli: RunCli
) -> None:
    Shop().make(connection)
    Shop().create_model(connection, options={"min_events": 10_000})
    done = run_cli("tune", "shop", "--trials=1", dsn=database)
    assert done.returncode == 1
    assert "error: the quality gate of model shop failed" in done.stderr


def test_too_few_users_are_refused(database: str, connection: psycopg.Connection) -> None:
    few = Shop(user_keys=range(8))
    few.make(connection)
    few.create_model(connection, options={"min_events": 10, "min_users": 2, "min_items": 2})
    with pytest.raises(PgvaeError, match="too few users"):
        tune(database, "shop", Search(trials=1), QUICK)


# Rights


@pytest.mark.usefixtures("in_process")
def test_trainers_share_studies_and_nobody_else_sees_them(shop: str, server: Server, role: str) -> None:
    with psycopg.connect(shop, autocommit=True) as admin:
        person = sql.Identifier(role)
        for grant in ("usage on schema web, shop", "select on all tables in schema web, shop"):
            admin.execute(sql.SQL("grant {} to {}").format(sql.SQL(grant), person))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            tune(as_role(shop, role), "shop", Search(trials=1), QUICK)
        admin.execute(sql.SQL("grant vae_operator to {}").format(person))
        try:
            with pytest.raises(PgvaeError, match="permission denied for database") as caught:
                tune(as_role(shop, role), "shop", Search(trials=1), QUICK)
            assert caught.value.hint and "create schema vae_optuna authorization vae_trainer" in caught.value.hint
            tune(shop, "shop", Search(trials=1), QUICK)
            with pytest.raises(PgvaeError, match="is no member of the role vae_trainer"):
                tune(as_role(shop, role), "shop", Search(trials=1), QUICK)
            with psycopg.connect(as_role(shop, role)) as other, pytest.raises(psycopg.errors.InsufficientPrivilege):
                other.execute("select * from vae_optuna.studies")
            admin.execute(sql.SQL("grant vae_trainer to {}").format(person))
            assert tune(as_role(shop, role), "shop", Search(trials=2), QUICK).count("complete") == 2
        finally:
            admin.execute(sql.SQL("drop owned by {}").format(person))


@pytest.mark.usefixtures("in_process")
def test_uninstall_removes_the_studies(shop: str) -> None:
    tune(shop, "shop", Search(trials=1), QUICK)
    uninstall(shop)
    assert rows(shop, "select to_regnamespace('vae_optuna') is null") == [(True,)]
