"""What monitoring costs, and what drift says of a real shop as the weeks go by after a training.

`python -m benchmarks.monitoring` on a throwaway server. The networks are random, since neither depends on what they
learned.
"""

from __future__ import annotations

import lzma
from typing import Annotated

import psycopg
import typer

from benchmarks.accuracy import DATA
from benchmarks.report import Figure, report
from benchmarks.scoring import make_model, publish_random, throwaway_server, timed
from pgvae.console import err

RETAIL = DATA / "online-retail" / "online_retail.csv.xz"
TRAINED_UNTIL = ("2011-04-01", "2011-09-01")
DAYS_LATER = (0, 7, 28, 84)
# Years of nightly and hourly refreshes.
LOG_ROWS = 50_000

_RAW = """
create table retail (invoice text, stock_code text, description text, quantity integer, at timestamp, price numeric,
    customer_id text, country text)
"""
_KNOWN = "select customer_id, stock_code, at, quantity from retail where customer_id is not null"
_LOG = """
insert into vae.refreshes (model_id, view, state, version, started_at, finished_at, seconds, row_count, mode)
select 1, r.view, 'succeeded', 1, now() - (n + 1) * interval '1 hour', now() - n * interval '1 hour', 1, 1, 'full'
from generate_series(1, %s) n
cross join (select distinct view from vae.refreshes) r
"""
_BUY = """
insert into events
select u, (random() * ({items} - 1))::integer, 'purchase', now()
from generate_series(1, {users}, 10) u
"""
_NEXT = """
insert into {model}_events {known} and at > %(until)s::timestamp + make_interval(days => %(before)s)
    and at <= %(until)s::timestamp + make_interval(days => %(days)s)
"""


def main(
    users: Annotated[int, typer.Option(help="Users of the made-up shop.")] = 200_000,
    items: Annotated[int, typer.Option(help="Items of its catalogue.")] = 20_000,
    events: Annotated[int, typer.Option(help="Events of each user.")] = 20,
) -> None:
    """Measures vae.check_drift, vae.hit_rate and vae.health; then drift on Online Retail, where it is there."""
    with throwaway_server() as dsn:
        err.print(f"making {users * events} events", highlight=False)
        make_model(dsn, users, items, events, width=16, neighbours=4, k=20)
        figures = _cost(dsn, users, items)
        if RETAIL.exists():
            figures += _retail(dsn)
    report(f"monitoring-{users}x{items}", figures, {"users": users, "items": items, "events_per_user": events})


def _cost(dsn: str, users: int, items: int) -> list[Figure]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        err.print("refreshing the recommendations", highlight=False)
        connection.execute("call vae.refresh('shop', array['recommendations'])")
        connection.execute(_BUY.format(users=users, items=items).encode())
        drift = min(timed(connection, "select * from vae.check_drift('shop')") for _ in range(2))
        hits = min(timed(connection, "select * from vae.hit_rate('shop')") for _ in range(2))
        connection.execute(_LOG, [LOG_ROWS])
        connection.execute("analyze vae.refreshes")
        health = min(timed(connection, "select * from vae.health") for _ in range(3))
    return [
        Figure(figure="vae.check_drift", value=drift, unit="s"),
        Figure(figure="vae.hit_rate", value=hits, unit="s"),
        Figure(figure=f"vae.health, {LOG_ROWS} refreshes in the log", value=1000 * health, unit="ms"),
    ]


def _retail(dsn: str) -> list[Figure]:
    """Gives the drift of the events by item and by activity, some days after the newest event of a training."""
    figures = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_RAW)
        load = "copy retail from stdin (format csv, header true)"
        with connection.cursor() as cursor, lzma.open(RETAIL) as file, cursor.copy(load) as copy:
            while chunk := file.read(1 << 20):
                copy.write(chunk)
        for until in TRAINED_UNTIL:
            model = f"retail_{until[5:7]}"
            connection.execute(f"create table {model}_events as {_KNOWN} and at <= %s", [until])
            connection.execute(
                "select * from vae.create_model(%s, events => %s::regclass, user_id => 'customer_id',"
                " item_id => 'stock_code', occurred_at => 'at')",
                [model, f"{model}_events"],
            )
            publish_random(dsn, model, width=16, neighbours=4)
            for days, before in zip(DAYS_LATER, (0, *DAYS_LATER), strict=False):
                connection.execute(
                    _NEXT.format(model=model, known=_KNOWN).encode(), {"until": until, "before": before, "days": days}
                )
                rows = connection.execute(
                    "select subject, psi, chance from vae.check_drift(%s) where subject in ('items', 'activity')",
                    [model],
                ).fetchall()
                for subject, psi, chance in rows:
                    what = f"drift of {subject}, {days} days after a training until {until}"
                    figures.append(Figure(figure=what, value=psi, unit="", peer=f"chance {chance:.3f}"))
    return figures


if __name__ == "__main__":
    typer.run(main)
