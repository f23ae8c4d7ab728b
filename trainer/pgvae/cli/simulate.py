"""`pgvae simulate`: a shop whose truth is known."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, get_args

import typer
from psycopg import sql
from rich.table import Table
from rich.text import Text

from pgvae import console
from pgvae.cli import Dsn, app
from pgvae.errors import PgvaeError
from pgvae.simulate import KeyType, SimulationConfig, SimulationSummary, simulate
from pgvae.simulate.config import today_utc


@app.command("simulate")
def simulate_command(
    dsn: Dsn = None,
    schema: Annotated[str, typer.Option(help="Schema to fill; it is created where needed.")] = "sim",
    users: Annotated[int, typer.Option(help="Number of users.")] = 10_000,
    items: Annotated[int | None, typer.Option(help="Number of items; by default scaled from the users.")] = None,
    days: Annotated[int, typer.Option(help="Length of the window in days.")] = 365,
    events_per_user: Annotated[float, typer.Option(help="Mean number of events per user.")] = 40.0,
    seed: Annotated[int, typer.Option(help="The same seed and options give the same data.")] = 0,
    until: Annotated[str | None, typer.Option(help="Day after the last one, in UTC; today without it.")] = None,
    key_type: Annotated[str, typer.Option(help=f"Type of the keys: {', '.join(get_args(KeyType))}.")] = "bigint",
    dirt: Annotated[float, typer.Option(help="Share of wrong events to add: duplicates, nulls, bots, returns …")] = 0.0,
    experiment: Annotated[
        float, typer.Option(help="Share of the users who take part in a randomised experiment of offers.")
    ] = 0.0,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier simulation in the schema.")] = False,
) -> None:
    """Fill a schema with a simulated shop whose true tastes, rates and churn are kept beside it."""
    config = SimulationConfig(
        users=users,
        items=items,
        days=days,
        events_per_user=events_per_user,
        seed=seed,
        until=today_utc() if until is None else _date(until),
        schema=schema,
        key_type=key_type,  # type: ignore[arg-type]  # SimulationConfig refuses what is no key type
        dirt=dirt,
        experiment=experiment,
        replace=replace,
    )
    with console.progress() as bar:
        task = bar.add_task("users simulated", total=config.users)

        def show(done: int, total: int) -> None:
            # The index is built after the last user, and takes half as long as all of them.
            bar.update(task, completed=done, description="users simulated" if done < total else "building the index")

        summary = simulate(dsn, config, on_progress=show)
    _show(config, summary)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise PgvaeError(f"until '{text}' is not a date", hint="give a date such as 2026-01-31") from error


def _show(config: SimulationConfig, summary: SimulationSummary) -> None:
    console.out.print(Text(f"simulated shop in schema {config.schema}, {config.since} to {config.until}"))
    rows = Table()
    rows.add_column("what")
    rows.add_column("rows", justify="right")
    for name, count in (("users", summary.users), ("items", summary.items), ("events", summary.events)):
        rows.add_row(name, f"{count:,}")
    for kind, count in summary.events_by_type.items():
        rows.add_row(f"  {kind or '(empty)'}", f"{count:,}")
    if summary.dirt:
        rows.add_row("wrong on purpose", f"{sum(summary.dirt.values()):,}")
    for kind, count in summary.dirt.items():
        rows.add_row(f"  {kind}", f"{count:,}")
    console.out.print(rows)
    if summary.experiment is not None:
        trial = summary.experiment
        console.out.print(
            f"experiment: {trial.exposed:,} of {trial.assignments:,} assigned users got their offer; its true average"
            f" effect is {trial.effect:.4f}",
            highlight=False,
        )
    rate = summary.events / summary.write_seconds
    console.out.print(
        f"written in {summary.write_seconds:.1f} s ({rate:,.0f} events/s), indexed in {summary.index_seconds:.1f} s",
        highlight=False,
    )
    plain = re.fullmatch("[a-z_][a-z0-9_]*", config.schema)
    schema = config.schema if plain else sql.Identifier(config.schema).as_string()
    command = sql.SQL("select * from vae.create_model('shop', events => {}, users => {}, items => {}{})").format(
        *(sql.Literal(f"{schema}.{table}") for table in ("events", "users", "items")),
        sql.SQL("" if summary.experiment is None else ", exposure_column => 'exposed'"),
    )
    console.out.print(Text(f"next, in psql:\n    {command.as_string()};"), soft_wrap=True)
