"""`pgvae refresh`: for a scheduler that starts programs."""

from __future__ import annotations

from typing import Annotated

import typer

from pgvae.cli import Dsn, app
from pgvae.connection import connect
from pgvae.console import out


@app.command()
def refresh(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")], dsn: Dsn = None
) -> None:
    """Score all users with a model's active version and refresh its prediction views.

    The same as: call vae.refresh('MODEL'). Exits with 0 when all views are fresh, with 1 when one could not be
    refreshed and holds its last good content; see vae.refreshes.
    """
    with connect(dsn, autocommit=True) as connection:
        connection.execute("call vae.refresh(%s)", [model])
        rows = connection.execute(
            "select r.view, r.row_count, r.version, r.seconds from vae.refreshes r"
            " where r.model_id = vae_private.model_id(%s) order by r.refresh_id desc limit 1",
            [model],
        ).fetchall()
    for view, users, version, seconds in rows:
        out.print(f"{model}.{view}: {users} users scored by version {version} in {seconds:.1f} s", highlight=False)
