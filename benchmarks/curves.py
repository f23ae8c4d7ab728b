"""How the time and the memory of a refresh grow with users and items.

`python -m benchmarks.curves` on throwaway servers, with random networks; draws docs/performance-curves.svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import psycopg
import typer

from benchmarks.report import Figure, report
from benchmarks.scoring import make_model, own_megabytes, peak_memory, throwaway_server, timed
from pgvae.console import err

PICTURE = Path(__file__).parents[1] / "docs" / "performance-curves.svg"
_REFRESH = "refresh materialized view shop.recommendations_materialized"


def main(
    users: Annotated[
        str, typer.Option(help="Numbers of users, with the catalogue of --items-beside.")
    ] = "10000,100000,1000000",
    items: Annotated[
        str, typer.Option(help="Numbers of items, with the users of --users-beside.")
    ] = "5000,20000,50000,200000",
    users_beside: Annotated[int, typer.Option(help="Users while the items grow.")] = 10_000,
    items_beside: Annotated[int, typer.Option(help="Items while the users grow.")] = 5_000,
    width: Annotated[int, typer.Option(help="Width of the items' directions and of the hidden layers.")] = 200,
    both: Annotated[str, typer.Option(help="USERSxITEMS: a refresh where both are large, for its figures alone.")] = "",
) -> None:
    """Measures refreshes of growing size on throwaway servers."""
    by_users = [_measure(int(number), items_beside, width) for number in users.split(",")]
    by_items = [_measure(users_beside, int(number), width) for number in items.split(",")]
    figures = []
    for what, points in (("users", by_users), ("items", by_items)):
        least, most = points[0], points[-1]
        figures.append(
            Figure(
                figure=f"seconds of {what}: {most[what]:.0f} against {least[what]:.0f}, for each of them",
                value=(most["seconds"] / most[what]) / (least["seconds"] / least[what]),
                unit="ratio",
                target=1.1,
                peer="growth in proportion",
            )
        )
        figures += [figure for point in points for figure in _figures(point)]
    if both:
        largest_users, largest_items = map(int, both.split("x"))
        figures += _figures(_measure(largest_users, largest_items, width))
    facts: dict[str, object] = {"width": width, "neighbours": 64, "events_per_user": 10, "k": 20}
    report(f"curves-w{width}", figures, facts)
    _draw(by_users, by_items)


def _figures(point: dict[str, float]) -> list[Figure]:
    size = f"{point['users']:.0f} users x {point['items']:.0f} items"
    return [
        Figure(figure=f"refresh of {size}", value=point["seconds"], unit="s"),
        Figure(figure=f"memory for {size}", value=point["megabytes"], unit="MB", target=600),
    ]


def _measure(users: int, items: int, width: int) -> dict[str, float]:
    err.print(f"{users} users x {items} items", highlight=False)
    with throwaway_server() as dsn:
        make_model(dsn, users, items, 10, width, 64, 20)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("select * from shop.recommend(1, 10)")
            before = own_megabytes(connection.info.backend_pid)
            with peak_memory(connection.info.backend_pid) as peak:
                seconds = timed(connection, _REFRESH)
    return {"users": users, "items": items, "seconds": seconds, "megabytes": peak[0] - before}


def _draw(by_users: list[dict[str, float]], by_items: list[dict[str, float]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, points, what in ((axes[0], by_users, "users"), (axes[1], by_items, "items")):
        axis.loglog(
            [point[what] for point in points], [point["seconds"] for point in points], marker="o", label="seconds"
        )
        axis.loglog(
            [point[what] for point in points],
            [point["megabytes"] for point in points],
            marker="s",
            linestyle="--",
            label="MB beyond the session's own",
        )
        fixed = "items" if what == "users" else "users"
        axis.set_xlabel(f"{what}, with {points[0][fixed]:.0f} {fixed}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle("A refresh: time and memory by size")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
