"""`pgvae refresh`: the scheduled refresh, run from a terminal or a scheduler."""

from __future__ import annotations

from typing import Annotated, Any

import psycopg
import typer
from psycopg.rows import dict_row
from rich.markup import escape

from pgvae.cli import NOT_DONE, Dsn, app
from pgvae.connection import connect
from pgvae.console import err, out
from pgvae.external.mode import is_external


@app.command()
def refresh(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    view: Annotated[
        list[str] | None, typer.Option(help="Refresh only this prediction view; may be repeated. Without it, all.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Score all users again, whether or not anything changed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one line of JSON instead.")] = False,
    dsn: Dsn = None,
) -> None:
    """Score with a model's active version and refresh its prediction views.

    The same as: call vae.refresh('MODEL'). Exits with 0 when all views are fresh, with 1 when one could not be
    refreshed and holds its last good content, with 3 when another session is refreshing the model at this moment; see
    vae.refreshes.
    """
    with connect(dsn, autocommit=True) as connection:
        document, failure = run_refresh(connection, model, view, full=full)
    if as_json:
        out.print_json(data=document, indent=None)
    else:
        show_refreshed(document)
    if failure and document["status"] == "busy":
        err.print(escape(str(failure.diag.message_primary)), highlight=False, soft_wrap=True)
        raise typer.Exit(NOT_DONE)
    if failure:
        raise failure


def run_refresh(
    connection: psycopg.Connection, model: str, views: list[str] | None = None, *, full: bool = False
) -> tuple[dict[str, Any], psycopg.Error | None]:
    """Refreshes a model's views on an autocommit connection; gives what was done, and the error that it ended with.

    The document has `model`, `status` (succeeded, failed, busy), `views` with an entry for each that was refreshed or
    tried, and `error` where there was one.
    """
    failure: psycopg.Error | None = None
    try:
        if is_external(connection):
            # Imported here: torch is not needed, but numpy is, which a refresh in the server does without.
            from pgvae.external.run import refresh as refresh_outside

            refresh_outside(connection, model, views)
        else:
            connection.execute("call vae.refresh(%s, %s, %s)", [model, views, full])
    except psycopg.Error as error:
        failure = error
    views_done = []
    try:
        if not connection.broken:
            views_done = _refreshed(connection, model)
    except psycopg.Error as error:
        # Where there is no log to read, why not was said by the call.
        failure = failure or error
    # A view that fails at the role's own lock_timeout has the same state. Its seconds were counted; those of a refresh
    # that gave way to another session were not.
    is_busy = isinstance(failure, psycopg.errors.LockNotAvailable) and all(
        row["state"] == "succeeded" or row["seconds"] is None for row in views_done
    )
    document: dict[str, Any] = {
        "model": model,
        "status": "busy" if is_busy else "failed" if failure else "succeeded",
        "views": views_done,
        "error": None,
    }
    if failure:
        document["error"] = {
            "sqlstate": failure.sqlstate,
            "message": failure.diag.message_primary or str(failure).strip(),
            "hint": failure.diag.message_hint,
        }
    return document, failure


def show_refreshed(document: dict[str, Any]) -> None:
    """Prints a line for each view that was refreshed."""
    for row in document["views"]:
        if row["state"] == "succeeded":
            scored = f"{row['row_count']} rows scored by version {row['version']}"
            what = scored if row["version"] else "nothing to score"
            out.print(f"{document['model']}.{row['view']}: {what} in {row['seconds']:.1f} s", highlight=False)


def _refreshed(connection: psycopg.Connection, model: str) -> list[dict[str, Any]]:
    """Gives a row for each view that this session refreshed, or tried to: the last one, where a refresh began again."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(
            "select l.view, l.state, l.mode, l.row_count, l.scored_count, l.version, l.seconds, l.error"
            " from (select distinct on (r.view) r.*"
            " from vae.refreshes r join vae.models m using (model_id)"
            " where m.name = %s and r.backend_pid = pg_backend_pid() and r.state <> 'running'"
            " and r.started_at >= (select a.backend_start from pg_stat_activity a where a.pid = pg_backend_pid())"
            " order by r.view, r.refresh_id desc) l order by l.refresh_id",
            [model],
        ).fetchall()
