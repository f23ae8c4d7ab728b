"""What a refresh costs when little has changed: against the refresh that scores everybody, on the same server.

`python -m benchmarks.refresh` on a throwaway server; the network is random, since the speed does not depend on what it
learned. The first refresh is the full one: it fills an empty view, which is cheaper than one that has to compare.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import psycopg
import typer

from benchmarks.report import Figure, report
from benchmarks.scoring import make_model, throwaway_server, timed
from pgvae.console import err

REFRESH = "call vae.refresh('shop', array['recommendations'])"
# New events for every hundredth user, of another hundredth in each round; one event in ten of theirs is deleted.
_CHANGE = """
insert into events select u, (random() * ({items} - 1))::integer, 'view', now()
from generate_series(1 + {round_number}, {users}, 100) u
"""
_DELETE = """
delete from events where user_id in (select generate_series(1 + {round_number}, {users}, 100)) and random() < 0.1
"""
_ONE_USER = "select * from shop.recommendations where user_id = {user}"
_COPY = "create table incremental as select user_id, rank, item_id, score from shop.recommendations"
# Rounding differs with the users of a batch: items of nearly equal scores may exchange their places.
_DIFFERENCES = """
select
    coalesce(max(abs(i.score - f.score) / f.score), 0)::float8,
    count(*) filter (where i.item_id is distinct from f.item_id),
    count(*) filter (where i.score is null or f.score is null)
from incremental i
full join shop.recommendations f using (user_id, rank)
"""


def main(
    users: Annotated[int, typer.Option(help="Users of the shop.")] = 20_000,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 5_000,
    events: Annotated[int, typer.Option(help="Events of each user.")] = 20,
    width: Annotated[int, typer.Option(help="Width of the items' directions and of the hidden layers.")] = 256,
    neighbours: Annotated[int, typer.Option(help="Links of an item in the shortcut; 0 leaves it out.")] = 64,
    k: Annotated[int, typer.Option(help="Recommendations per user.")] = 20,
    compare: Annotated[bool, typer.Option(help="Score everybody again at the end, and compare.")] = True,
) -> None:
    """Measures a full refresh and incremental ones on a throwaway server."""
    with throwaway_server() as dsn:
        err.print(f"making {users * events} events", highlight=False)
        make_model(dsn, users, items, events, width, neighbours, k)
        figures = _measure(dsn, users, items, k, compare)
    facts: dict[str, object] = {
        "users": users,
        "items": items,
        "events_per_user": events,
        "width": width,
        "neighbours": neighbours,
        "k": k,
    }
    report(f"refresh-{users}x{items}-w{width}-n{neighbours}-k{k}", figures, facts)


def _measure(dsn: str, users: int, items: int, k: int, compare: bool) -> list[Figure]:
    changed, lookups = [], []
    with psycopg.connect(dsn, autocommit=True) as connection:
        err.print("the full refresh", highlight=False)
        full = timed(connection, REFRESH)
        read_before = timed(connection, "select count(*) from shop.recommendations")
        unchanged = min(timed(connection, REFRESH) for _ in range(2))
        for round_number in range(3):
            err.print(f"1 % changed, round {round_number + 1} of 3", highlight=False)
            for statement in (_CHANGE, _DELETE):
                connection.execute(statement.format(items=items, users=users, round_number=round_number).encode())
            changed.append(timed(connection, REFRESH))
        err.print("the explanations", highlight=False)
        explanations = timed(connection, "call vae.refresh('shop', array['explanations'])")
        freshness = timed(connection, "select * from vae.check_freshness('shop')")
        read_after = timed(connection, "select count(*) from shop.recommendations")
        for user in range(1, users, max(1, users // 200)):
            lookups.append(timed(connection, _ONE_USER.format(user=user)))
        modes = connection.execute(
            "select mode from vae.refreshes where view = 'recommendations' order by refresh_id desc limit 3"
        ).fetchall()
        assert set(modes) == {("incremental",)}
        differing = []
        if compare:
            err.print("everybody again, to compare", highlight=False)
            connection.execute(_COPY)
            connection.execute("call vae.refresh('shop', array['recommendations'], full => true)")
            differing = connection.execute(_DIFFERENCES).fetchall()
    ratio = statistics.median(changed) / full
    figures = [
        Figure(figure="refresh, 1 % of users changed", value=ratio, unit="ratio", target=0.06, peer="full refresh"),
        Figure(figure="refresh, nothing changed", value=unchanged / full, unit="ratio", peer="full refresh"),
        Figure(
            figure="reading all recommendations, 3 % of users changed",
            value=read_after / read_before,
            unit="ratio",
            peer="the same without changes",
        ),
        Figure(figure="full refresh", value=full, unit="s"),
        Figure(figure="refresh, 1 % of users changed", value=statistics.median(changed), unit="s"),
        Figure(figure="refresh, nothing changed", value=unchanged, unit="s"),
        Figure(figure="refresh of explanations", value=explanations, unit="s"),
        Figure(figure="vae.check_freshness", value=freshness, unit="s"),
        Figure(figure="recommendations of one user", value=1000 * statistics.median(lookups), unit="ms"),
    ]
    if differing:
        score, places, missing = differing[0]
        assert missing == 0
        figures.append(
            Figure(figure="largest relative difference to a score of a full refresh", value=score, unit="", target=1e-5)
        )
        figures.append(Figure(figure="places that near-equal items exchanged", value=places, unit=f"of {users * k}"))
    return figures


if __name__ == "__main__":
    typer.run(main)
