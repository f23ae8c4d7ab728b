"""How fast a database scores: a refresh of all users against the bare matrix product and against other ways.

`python -m benchmarks.scoring` on a throwaway server; the network is random, since the speed does not depend on what it
learned. The floor is the same matrix products in the same process with the same BLAS. One user at a dashboard:
benchmarks.live.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import psycopg
import torch
import typer

from benchmarks.peers import exact_search, outside, row_by_row
from benchmarks.report import Figure, report
from pgvae.config import TrainingConfig
from pgvae.console import err
from pgvae.dataset import read_dataset, read_definition
from pgvae.install import install
from pgvae.loop import Fit
from pgvae.model import AttentionVae
from pgvae.publish import publish
from pgvae.server import Server
from pgvae.shortcut import Links
from pgvae.validation import NO_SHORTCUT

_EVENTS = """
create table events as
select u as user_id, (n_items * power(random(), 3))::bigint as item_id, 'view' as event_type,
    timestamptz '2024-01-01' + random() * interval '300 days' as occurred_at
from (select {items}::float8 - 1 as n_items) c, generate_series(1, {users}) u, generate_series(1, {events}) e
union all
-- However the events fall, each item is in one.
select 1 + i % {users}, i, 'view', timestamptz '2024-01-01' from generate_series(0, {items} - 1) i
"""
_REFRESH = "refresh materialized view {} shop.recommendations_materialized"
_JOIN = "select sum(r.score * s.sold) from {} r join sales s using (item_id)"
_OUTSIDE = "COPY out, PyTorch, topk, COPY in"
_FLOOR = """
create function pg_temp.floor_seconds(users integer, items integer, width integer, batch integer) returns float8
language plpython3u as $$
import time
import numpy as np
left = np.ones((batch, width), dtype=np.float32)
right = np.ones((items, width), dtype=np.float32)
out = np.empty((batch, items), dtype=np.float32)
begun = time.perf_counter()
for _ in range(-(-users // batch)):
    np.matmul(left, right.T, out=out)
return time.perf_counter() - begun
$$
"""


def main(
    users: Annotated[int, typer.Option(help="Users to score.")] = 20_000,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 5_000,
    events: Annotated[int, typer.Option(help="Events of each user.")] = 20,
    width: Annotated[int, typer.Option(help="Width of the items' directions and of the hidden layers.")] = 256,
    neighbours: Annotated[int, typer.Option(help="Links of an item in the shortcut; 0 leaves it out.")] = 64,
    k: Annotated[int, typer.Option(help="Recommendations per user.")] = 20,
    rounds: Annotated[int, typer.Option(help="Times that all is measured; the medians count.")] = 3,
    peers: Annotated[bool, typer.Option(help="Measure other ways, too.")] = True,
) -> None:
    """Measures a refresh on a throwaway server."""
    with throwaway_server() as dsn:
        err.print(f"making {users * events} events", highlight=False)
        make_model(dsn, users, items, events, width, neighbours, k)
        figures = _refresh(dsn, users, items, width, k, rounds, peers)
    facts: dict[str, object] = {
        "users": users,
        "items": items,
        "events_per_user": events,
        "width": width,
        "neighbours": neighbours,
        "k": k,
        "rounds": rounds,
    }
    report(f"scoring-{users}x{items}-w{width}-n{neighbours}-k{k}", figures, facts)


@contextmanager
def throwaway_server() -> Iterator[str]:
    """Gives the DSN of a server with pgvae installed that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="pgvae-bench-"))
    folder.chmod(0o755)
    settings = {"fsync": "off", "shared_buffers": "256MB", "max_wal_size": "4GB", "max_connections": "150"}
    server = Server(folder / "server", settings=settings)
    server.up()
    try:
        dsn = server.dsn("postgres")
        install(dsn)
        yield dsn
    finally:
        server.remove()
        folder.rmdir()


def make_model(dsn: str, users: int, items: int, events: int, width: int, neighbours: int, k: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_EVENTS.format(users=users, items=items, events=events))  # type: ignore[arg-type]
        connection.execute("create index on events (user_id, occurred_at)")
        connection.execute("vacuum analyze events")
        connection.execute(
            "select * from vae.create_model('shop', events => 'events', options => %s)",
            [f'{{"recommendations": {k}}}'],
        )
    publish_random(dsn, "shop", width, neighbours)


def publish_random(dsn: str, model: str, width: int, neighbours: int) -> None:
    """Publishes a network that has learned nothing, and activates it."""
    config = TrainingConfig(hidden=width, latent=width)
    with psycopg.connect(dsn) as connection:
        definition, dataset = read_definition(connection, model), read_dataset(connection, model)
        network = AttentionVae(dataset, config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 1) ** -0.5)
        weights = network.weights() | _links(len(dataset.item_keys), neighbours).tensors()
        fitted = Fit(weights=weights, best_epoch=1, curve=[], shortcut=NO_SHORTCUT)
        publish(
            connection,
            definition=definition,
            dataset=dataset,
            config=config,
            fit=fitted,
            curve=[],
            metrics=[],
            durations={},
        )
        connection.execute("select * from vae.activate(%s, 1)", [model])


def _links(items: int, neighbours: int) -> Links:
    """Gives links as pgvae.shortcut makes them: popular items, whose numbers are small, have the most, four times
    `neighbours` at most.
    """
    generator = np.random.default_rng(1)
    drawn = np.bincount((items * generator.random(items * neighbours) ** 2).astype(np.int64), minlength=items)
    counts = np.minimum(drawn, min(4 * neighbours, items // 2))
    owner = np.repeat(np.arange(items), counts)
    # Different items: a stride from a random one.
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first, stride = generator.integers(0, items, items), generator.integers(1, 3, items)
    return Links(
        start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        item=((first[owner] + place * stride[owner]) % items).astype(np.int32),
        weight=generator.normal(0, 0.5, len(owner)).astype(np.float32),
    )


def _refresh(dsn: str, users: int, items: int, width: int, k: int, rounds: int, peers: bool) -> list[Figure]:
    seconds: dict[str, list[float]] = {"floor": [], "plain": [], "concurrent": [], "reading": [], "outside": []}
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_FLOOR)
        connection.execute("select * from shop.recommend(1, 10)")
        before, megabytes = own_megabytes(connection.info.backend_pid), 0.0
        for round_number in range(rounds):
            err.print(f"refresh, round {round_number + 1} of {rounds}", highlight=False)
            row = connection.execute(
                "select pg_temp.floor_seconds(%s, %s, %s, %s)", [users, items, width, 1024]
            ).fetchone()
            seconds["floor"].append(float(row[0]) if row else 0.0)
            with peak_memory(connection.info.backend_pid) as peak:
                seconds["plain"].append(timed(connection, _REFRESH.format("")))
            megabytes = max(megabytes, peak[0] - before)
            seconds["concurrent"].append(timed(connection, _REFRESH.format("concurrently")))
            seconds["reading"].append(timed(connection, "select count(*) from shop.clean_events"))
            if peers:
                seconds["outside"].append(outside(connection, k, max_history=200))
        connection.execute("create table flat as select user_id, rank, item_id, score from shop.recommendations")
        connection.execute("create table sales as select item_id, count(*) as sold from events group by item_id")
        connection.execute("analyze flat, sales, shop.recommendations_materialized")
        for name, relation in (("join", "shop.recommendations"), ("flat join", "flat")):
            seconds[name] = [timed(connection, _JOIN.format(relation)) for _ in range(rounds)]
        connection.execute("create table in_stock as select distinct item_id from events where item_id % 10 = 0")
        connection.execute("select * from vae.set_candidates('shop', 'in_stock', 'in_stock', for_refresh => true)")
        seconds["filtered"] = [timed(connection, _REFRESH.format("")) for _ in range(rounds)]
        connection.execute("select vae.drop_candidates('shop', 'in_stock')")
        one_by_one = {"a PL/Python function for each user": row_by_row(connection, k, 200)} if peers else {}
        one_by_one |= exact_search(connection, k, 3) if peers else {}
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    plain = medians["plain"]
    figures = [
        Figure(figure="refresh", value=plain / medians["floor"], unit="ratio", target=1.6, peer="matrix product"),
        Figure(
            figure="refresh concurrently",
            value=medians["concurrent"] / plain,
            unit="ratio",
            target=1.5,
            peer="refresh",
        ),
        Figure(
            figure="join over all recommendations",
            value=medians["join"] / medians["flat join"],
            unit="ratio",
            target=1.5,
            peer="a flat table",
        ),
        Figure(figure="refresh", value=plain, unit="s"),
        Figure(figure="join over all recommendations", value=medians["join"], unit="s"),
        Figure(figure="refresh among a tenth of the items", value=medians["filtered"], unit="s"),
        Figure(figure="matrix product", value=medians["floor"], unit="s"),
        Figure(figure="reading the cleaned events", value=medians["reading"], unit="s"),
        Figure(figure="users scored", value=users / plain, unit="users/s"),
        Figure(figure="memory of a refresh beyond the session's own", value=megabytes, unit="MB", target=600),
    ]
    if peers:
        figures += [
            Figure(figure="refresh", value=plain / medians["outside"], unit="ratio", target=1 / 1.5, peer=_OUTSIDE),
            Figure(figure=_OUTSIDE, value=medians["outside"], unit="s"),
        ]
        targets = {"a PL/Python function for each user": 1 / 20}
        for name, each in one_by_one.items():
            figures += [
                Figure(
                    figure="refresh", value=plain / (users * each), unit="ratio", target=targets.get(name), peer=name
                ),
                Figure(figure=f"{name}, one user", value=1000 * each, unit="ms"),
            ]
    return figures


@contextmanager
def peak_memory(pid: int) -> Iterator[list[float]]:
    """Puts into the list the megabytes at most that a server process had for itself meanwhile."""
    most, stop = [own_megabytes(pid)], threading.Event()

    def look() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], own_megabytes(pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def own_megabytes(pid: int) -> float:
    """Gives the megabytes that a process has for itself."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def timed(connection: psycopg.Connection, query: str) -> float:
    """Gives the seconds that a statement takes."""
    begun = time.perf_counter()
    connection.execute(query.encode())
    return time.perf_counter() - begun


if __name__ == "__main__":
    typer.run(main)
