"""`pgvae prune`: versions that nobody needs any more."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from pgvae.cli import Dsn, app
from pgvae.connection import connect
from pgvae.console import out


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
