"""`pgvae install` and `pgvae uninstall`: what a database holds."""

from __future__ import annotations

from typing import Annotated

import typer

from pgvae.cli import Dsn, app
from pgvae.connection import connect
from pgvae.console import err, out


@app.command()
def install(
    dsn: Dsn = None,
    external: Annotated[
        bool | None,
        typer.Option(
            "--external/--no-external",
            help="Do without PL/Python, where it is forbidden: `pgvae refresh` then scores where it runs, and functions"
            " for one user refuse. Without the option as it is installed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Install pgvae into a database, or upgrade it: tables, functions, views, roles and the scoring code.

    Needs a superuser, since scoring runs in PL/Python; with --external a role that may create schemas and roles. All
    of it is one transaction, and running it again is safe: a failed upgrade leaves the database as it was. Models and
    their versions stay.
    """
    from pgvae.install import install as run

    done = run(dsn, external=external)
    models = f", {done.models} model{'s' if done.models > 1 else ''} rebuilt" if done.models else ""
    for warning in done.warnings:
        err.print(f"warning: {warning}", highlight=False, markup=False)
    out.print(f"pgvae {done.release} is installed{models}", highlight=False)
    out.print(f"  runtime  {done.digest[:12]}", highlight=False)
    following = "select * from vae.create_model('shop', events => 'public.events', …)"
    if done.outdated:
        following = f"pgvae retrain {(done.silent or done.outdated)[0]} --activate --refresh"
        scoring = [name for name in done.outdated if name not in done.silent]
        for state, names in (("not scoring until trained again", done.silent), ("scoring on", scoring)):
            if names:
                line = f"  trained by other code, and {state}: {', '.join(names)}"
                out.print(line, highlight=False, markup=False, soft_wrap=True)
    elif done.models or done.warnings:
        following = "select * from vae.health where severity > 0"
    out.print(f"  next     {following}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def uninstall(
    dsn: Dsn = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove pgvae from a database: exactly what it made, so the shop's own tables stay.

    That includes every model with its versions and predictions. Refuses where other objects, such as a view of yours,
    use what it would remove.
    """
    from pgvae.install import uninstall as run

    with connect(dsn) as connection:
        name = connection.info.dbname
    if not yes:
        typer.confirm(f"remove pgvae and all of its models from the database {name}?", abort=True)
    left = run(dsn)
    out.print(f"pgvae is removed from the database {name}", highlight=False)
    for line in left:
        err.print(f"left in place: {line}", highlight=False)
