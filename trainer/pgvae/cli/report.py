"""`pgvae report`: one page about a version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pgvae.cli import Dsn, app
from pgvae.console import out


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="Name of the model, as given to vae.create_model.")],
    dsn: Dsn = None,
    version: Annotated[
        int | None, typer.Option(help="Number of the version; by default the active one, else the newest.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; by default pgvae-MODEL-VERSION.html.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="File for the model card, as Markdown.")] = None,
) -> None:
    """Write a page about a version: is it any good, what does it look at, where does it come from.

    One HTML file that loads nothing from anywhere, to read on a phone, to mail or to keep: a verdict in plain words,
    metrics beside baselines, calibration, attention, a map of people, learning curves, data quality, lineage and a
    model card. Needs the role vae_reader; what the role may not read is left out, and the page says so.
    """
    # Imported here: matplotlib takes a second to import, which `pgvae --help` should not pay.
    from pgvae.report.page import read_report, write

    found = read_report(dsn, model, version)
    name = re.sub(r"\W+", "-", model).strip("-") or "model"
    path = output or Path(f"pgvae-{name}-{found.version.version}.html")
    write(path, found.html())
    out.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if card:
        write(card, found.card())
        out.print(f"wrote {card}", highlight=False, markup=False, soft_wrap=True)
