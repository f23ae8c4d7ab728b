"""`pgvae export`, `pgvae import`, `pgvae prune`: versions carried between databases, and old ones removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from pgvae.cli import Dsn, app
from pgvae.connection import connect
from pgvae.console import out
from pgvae.external.mode import is_external


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    file: Annotated[Path, typer.Argument(help="File to write, as in shop.safetensors.")],
    dsn: Dsn = None,
    version: Annotated[int | None, typer.Option(help="Version to export; without it, the active one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")] = False,
) -> None:
    """Write a version of a model to one file, to import it into another database.

    A safetensors file: weights, catalogue, lineage, metrics and golden users, with checksums of everything. It holds no
    event and no user of the shop. Needs the rights of an operator.
    """
    from pgvae.transfer import export_version

    with connect(dsn) as connection:
        done = export_version(connection, model, file, version=version, overwrite=overwrite)
    out.print(
        f"wrote version {done.version} of model {model} to {file}, {decimal(done.bytes)}, sha256 {done.sha256[:12]}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File that pgvae export wrote.")],
    dsn: Dsn = None,
    model: Annotated[
        str | None, typer.Option(help="Model to import into; without it, that of the same name.", show_default=False)
    ] = None,
) -> None:
    """Read a version from a file into a model of this database, where it is ready to be activated.

    The model must exist (vae.create_model) and have keys of the same types. A file that is cut short or was altered is
    refused, and nothing is imported. Needs the rights of a trainer.
    """
    from pgvae.external.run import verify_outside
    from pgvae.transfer import import_version

    with connect(dsn) as connection:
        done = import_version(connection, file, model=model)
    with connect(dsn, autocommit=True) as connection:
        if is_external(connection):
            verify_outside(connection, done.model, done.version)
    source = done.origin
    out.print(
        f"imported as version {done.version} of model {done.model}: version {source['version']} of model"
        f" {source['model']} in database {source['database']}, published {source['created_at'][:10]}",
        highlight=False,
        soft_wrap=True,
    )
    hint = f"select * from vae.activate('{done.model}', {done.version})"  # noqa: S608  # shown, never run
    out.print(f"next: {hint}", highlight=False)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    version: Annotated[int | None, typer.Option(help="Version to verify; without it, the active one.")] = None,
) -> None:
    """Check that a version gives its golden users, made-up histories, the scores of its training, and log it.

    The same as: select * from vae.verify('MODEL'). In a database without PL/Python the check runs here, and a version
    needs it once, after an upgrade again, before vae.activate lets it through. Exits with 1 where scores differ.
    """
    from pgvae.external.run import VERIFY, verify_outside

    with connect(dsn, autocommit=True) as connection:
        if is_external(connection):
            rows = verify_outside(connection, model, version)
        else:
            rows = connection.execute(VERIFY, [model, version]).fetchall()
    for number, device, passed, users, difference, detail in rows:
        found = f"the scores of {users} golden users, the largest difference is {difference:.1e}" if passed else detail
        out.print(
            f"version {number} of model {model} on {device}: {found}", highlight=False, markup=False, soft_wrap=True
        )
    if not all(row[2] for row in rows):
        raise typer.Exit(1)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    keep: Annotated[int, typer.Option(min=0, help="How many of the newest versions stay in any case.")] = 3,
) -> None:
    """Drop old versions of a model, and say what was removed and how many bytes of weights went with it.

    The active version stays, and the one that vae.rollback would go back to, and the newest ones. The same as: select *
    from vae.prune('MODEL'). Only the model's owner can.
    """
    with connect(dsn) as connection:
        removed = connection.execute("select * from vae.prune(%s, %s)", [model, keep]).fetchall()
    for version, state, created_at, size in removed:
        out.print(
            f"removed version {version} ({state}, published {created_at:%Y-%m-%d}), {decimal(size)}", highlight=False
        )
    total = decimal(sum(row[3] for row in removed))
    out.print(f"{len(removed)} versions removed, {total}" if removed else "nothing to remove", highlight=False)
