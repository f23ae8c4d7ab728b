"""`pgvae retrain`: a training on a schedule, whose version goes live only where it is no worse."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from pgvae.activation import try_to_activate
from pgvae.cli import NOT_DONE, Dsn, app
from pgvae.cli.refresh import run_refresh, show_refreshed
from pgvae.cli.train import report_refusal, show, train_with_display
from pgvae.connection import connect
from pgvae.console import out


@app.command()
def retrain(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    activate: Annotated[
        bool, typer.Option("--activate", help="Activate the version if it passes the gates of vae.activate.")
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Refresh the prediction views after an activation.")
    ] = False,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Then drop old versions but for so many of the newest, as pgvae prune does."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number; without it, as before.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one line of JSON instead.")] = False,
) -> None:
    """Train a model again on today's events, with the configuration of its active version.

    For a scheduler. Says of each gate of vae.activate whether the new version passes: that it scores in this database
    as it was trained (vae.verify), and that on held-out events it ranks no worse than popularity and, but for chance,
    than the active version. With --activate it goes live if it passes all of them. Exits with 0 when it was activated
    (without --activate: published), with 3 when it was published but a gate refused it, so that the active version
    stays, and with 1 after an error.
    """
    if refresh and not activate:
        raise typer.BadParameter("there is nothing to refresh without --activate", param_hint="--refresh")
    # Imported here: torch takes seconds to import, which `pgvae --help` should not pay.
    from pgvae.evaluate import config_of
    from pgvae.versions import read_version

    with connect(dsn) as connection:
        before = read_version(connection, model)
    config = config_of(before.config)
    if seed is not None:
        config = replace(config, seed=seed)
    result = train_with_display(dsn, model, config, force=False)
    document: dict[str, Any] = {
        "model": model,
        "version": result.version,
        "configuration_of": before.version,
        "activated": False,
        "previous_version": None,
        "refusal": None,
        "gates": [],
        "metrics": [
            {"method": m.method, "split": m.split, "metric": m.metric, "k": m.k, "value": m.value}
            | {"lower": m.lower, "upper": m.upper}
            for m in result.metrics
        ],
        "seconds": result.durations,
        "refresh": None,
        "removed_versions": [],
    }
    failure = None
    with connect(dsn, autocommit=True) as connection:
        gates = connection.execute("select * from vae.check_activation(%s, %s)", [model, result.version]).fetchall()
        document["gates"] = [{"gate": gate, "status": status, "detail": detail} for gate, status, detail in gates]
        if not as_json:
            show(model, result)
            for gate, status, detail in gates:
                out.print(f"gate {gate}: {status}, {detail}", highlight=False, markup=False, soft_wrap=True)
        activation = try_to_activate(connection, model, result.version) if activate else None
        if activation and activation.refusal is not None:
            document["refusal"] = activation.refusal
        elif activation:
            document |= {"activated": True, "previous_version": activation.previous}
            if not as_json:
                before_it = activation.previous or "none"
                out.print(f"version {result.version} is active, before it {before_it}", highlight=False)
            if refresh:
                document["refresh"], failure = run_refresh(connection, model)
                if not as_json:
                    show_refreshed(document["refresh"])
        # Not after a lost connection, whose message is the one that counts.
        if keep is not None and not connection.broken:
            removed = connection.execute("select model_version from vae.prune(%s, %s)", [model, keep]).fetchall()
            document["removed_versions"] = [row[0] for row in removed]
            if removed and not as_json:
                out.print(f"removed versions {', '.join(str(row[0]) for row in removed)}", highlight=False)
    if as_json:
        out.print_json(data=document, indent=None)
    if activation and activation.refusal is not None:
        report_refusal(model, result.version, activation)
        raise typer.Exit(NOT_DONE)
    if failure:
        raise failure
