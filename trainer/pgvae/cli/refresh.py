"""`pgvae refresh`: for a scheduler that starts programs."""

from __future__ import annotations

from typing import Annotated

import typer
from psycopg import Connection

from pgvae.cli import Dsn, app
from pgvae.connection import connect
from pgvae.console import out


@app.command()
def refresh(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    view: Annotated[
        list[str] | None, typer.Option(help="Refresh this prediction view only; may be given several times.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Score all users again, whether or not anything changed.")
    ] = False,
    dsn: Dsn = None,
) -> None:
    """Score with a model's active version and refresh its prediction views.

    The same as: call vae.refresh('MODEL'). Exits with 0 when all views are fresh, with 1 when one could not be
    refreshed and holds its last good content; see vae.refreshes.
    """
    with connect(dsn, autocommit=True) as connection:
        try:
            connection.execute("call vae.refresh(%s, %s, %s)", [model, view, full])
        finally:
            if not connection.broken:
                _print_refreshed(connection, model)


def _print_refreshed(connection: Connection, model: str) -> None:
    """Prints a line for each view that this session refreshed."""
    rows = connection.execute(
        "select r.view, r.row_count, r.version, r.seconds from vae.refreshes r join vae.models m using (model_id)"
        " where m.name = %s and r.backend_pid = pg_backend_pid() and r.state = 'succeeded'"
        " and r.started_at >= (select a.backend_start from pg_stat_activity a where a.pid = pg_backend_pid())"
        " order by r.refresh_id",
        [model],
    ).fetchall()
    for name, count, version, seconds in rows:
        scored = f"{count} rows scored by version {version}" if version else "nothing to score"
        out.print(f"{model}.{name}: {scored} in {seconds:.1f} s", highlight=False)
