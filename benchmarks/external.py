"""How long `pgvae refresh` takes in a database without PL/Python, against `vae.refresh` inside, on one machine.

`python -m benchmarks.external` on a throwaway server, whose one database is switched over and back in each round.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import psycopg
import typer

from benchmarks.report import Figure, report
from benchmarks.scoring import make_model, throwaway_server, timed
from pgvae.cli.refresh import run_refresh
from pgvae.console import err
from pgvae.install import install

_VIEW = "recommendations"
_NEIGHBOURS, _K = 64, 20


def main(
    users: Annotated[int, typer.Option(help="Users to score.")] = 20_000,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 5_000,
    events: Annotated[int, typer.Option(help="Events of each user.")] = 20,
    width: Annotated[int, typer.Option(help="Width of the items' directions and of the hidden layers.")] = 200,
    rounds: Annotated[int, typer.Option(help="Pairs of refreshes; the medians count.")] = 5,
) -> None:
    """Measures a refresh of the recommendations of all users, inside and outside in turn."""
    seconds: dict[str, list[float]] = {"inside": [], "outside": []}
    with throwaway_server() as dsn:
        err.print(f"making {users * events} events", highlight=False)
        make_model(dsn, users, items, events, width, _NEIGHBOURS, _K)
        for number in range(rounds):
            err.print(f"round {number + 1} of {rounds}", highlight=False)
            install(dsn, external=False)
            with psycopg.connect(dsn, autocommit=True) as connection:
                seconds["inside"].append(timed(connection, f"call vae.refresh('shop', array['{_VIEW}'], true)"))
            install(dsn, external=True)
            with psycopg.connect(dsn, autocommit=True) as connection:
                begun = time.perf_counter()
                _, failure = run_refresh(connection, "shop", [_VIEW])
                seconds["outside"].append(time.perf_counter() - begun)
            if failure:
                raise failure
    inside, outside = (statistics.median(seconds[name]) for name in ("inside", "outside"))
    ratios = [beside / within for within, beside in zip(seconds["inside"], seconds["outside"], strict=True)]
    figures = [
        Figure(figure="refresh scored outside", value=statistics.median(ratios), unit="ratio", peer="refresh inside"),
        Figure(figure="the same, least of the pairs", value=min(ratios), unit="ratio", peer="refresh inside"),
        Figure(figure="the same, most of the pairs", value=max(ratios), unit="ratio", peer="refresh inside"),
        Figure(figure="refresh inside", value=inside, unit="s"),
        Figure(figure="refresh scored outside", value=outside, unit="s"),
    ]
    facts: dict[str, object] = {"users": users, "items": items, "events_per_user": events, "width": width, "k": _K}
    report(f"external-{users}x{items}-w{width}", figures, facts | {"rounds": rounds})


if __name__ == "__main__":
    typer.run(main)
