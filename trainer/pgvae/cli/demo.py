"""`pgvae demo`: the whole way, on a simulated shop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import psycopg
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from pgvae import demo as script
from pgvae.cli import Dsn, app
from pgvae.cli.train import show, train_with_display
from pgvae.config import TrainingConfig
from pgvae.connection import connect
from pgvae.console import err, out, progress


@app.command()
def demo(
    dsn: Dsn = None,
    users: Annotated[int, typer.Option(help="Users of the simulated shop.")] = 5_000,
    items: Annotated[int, typer.Option(help="Items of the simulated shop.")] = 1_000,
    seed: Annotated[int, typer.Option(help="Seed of the shop and of the training.")] = 1,
) -> None:
    """Go the whole way on a simulated shop: server, install, events, quality gate, training, answers.

    Without --dsn it works on the embedded server, which it starts. It makes the schema demo_shop and the model demo,
    and makes them anew when run again; everything else in the database is left alone.
    """
    _step("a private PostgreSQL server")
    if dsn is None:
        from pgvae.server import Server

        Server.default().up()
        out.print(f"up, in {Server.default().home}", highlight=False, soft_wrap=True)
    from pgvae.install import install

    _step("pgvae install")
    out.print(f"pgvae {install(dsn).release} is installed", highlight=False)

    with connect(dsn, autocommit=True) as connection:
        script.drop_model(connection)
        _step(f"pgvae simulate --schema {script.SHOP} --users {users} --items {items}")
        _simulate(dsn, users, items, seed)
        _step("the model: which tables it reads")
        _ask(connection, script.CREATE_MODEL)
        _step("the quality gate: what is wrong with these events")
        _ask(connection, script.CHECK_EVENTS)
    _step(f"pgvae train {script.MODEL}")
    result = train_with_display(dsn, script.MODEL, TrainingConfig(seed=seed), force=False)
    show(script.MODEL, result)
    with connect(dsn, autocommit=True) as connection:
        _step("activate the version and refresh the predictions")
        connection.execute("select * from vae.activate(%s, %s)", [script.MODEL, result.version])
        _ask(connection, script.REFRESH)
        for question in script.QUESTIONS:
            _step(question.text)
            _ask(connection, question.query)
    _farewell(dsn)


def _step(title: str) -> None:
    out.print()
    out.rule(f"[bold]{escape(title)}", align="left")


def _simulate(dsn: str | None, users: int, items: int, seed: int) -> None:
    from pgvae.simulate import SimulationConfig, simulate

    config = SimulationConfig(users=users, items=items, seed=seed, schema=script.SHOP, dirt=0.02, replace=True)
    with progress() as bar:
        task = bar.add_task("users simulated", total=users)
        done = simulate(dsn, config, on_progress=lambda count, total: bar.update(task, completed=count))
    out.print(
        f"{done.users} users, {done.items} items, {done.events} events, 2 % of them wrong on purpose", highlight=False
    )


def _ask(connection: psycopg.Connection, query: str) -> None:
    out.print(Syntax(query, "sql", background_color="default", word_wrap=True))
    names, rows = script.answer(connection, query)
    if not names:
        return
    table = Table(box=SIMPLE_HEAD)
    for position, name in enumerate(names):
        number = bool(rows) and isinstance(rows[0][position], int | float) and not isinstance(rows[0][position], bool)
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else escape(_cell(value)) for value in row))
    out.print(table)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _farewell(dsn: str | None) -> None:
    program = ".venv/bin/pgvae" if Path(".venv/bin/pgvae").exists() else "pgvae"
    out.print()
    out.rule("[bold]yours now", align="left")
    out.print(f"  {program} psql                  SQL on this database", highlight=False)
    if dsn is None:
        out.print(f"  {program} down                  stop the server; its data stays", highlight=False)
        out.print(f"  {program} down --remove         stop it and delete it", highlight=False)
    else:
        out.print("  select vae.drop_model('demo'); drop schema demo_shop cascade;", highlight=False)
    err.print()
