"""How fast a database answers one user at a dashboard, what a session costs, and many pairs in one statement.

`python -m benchmarks.live` on a throwaway server, with a random network.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import psycopg
import typer

from benchmarks.report import Figure, report
from benchmarks.scoring import make_model, throwaway_server, timed
from pgvae.console import err
from pgvae.server import find_bindir

_RECOMMEND = "select * from shop.recommend(%s, 10)"
# Calls of a session before those that count.
_WARM_UP = 10
_PAIRS = """
select count(s.score)
from (
    select array_agg(u) as users, array_agg((u * 7919 + n * 104729) %% {items}) as items
    from generate_series(1, %s) u, generate_series(1, 10) n
) p
cross join lateral shop.score_pairs(p.users, p.items) s
"""
_ONE_PAIR = """
select count(shop.score(u, (u * 7919 + n * 104729) %% {items})) from generate_series(1, %s) u, generate_series(1, 10) n
"""


def main(
    users: Annotated[int, typer.Option(help="Users of the shop.")] = 20_000,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 20_000,
    events: Annotated[int, typer.Option(help="Events of each user.")] = 20,
    width: Annotated[int, typer.Option(help="Width of the items' directions and of the hidden layers.")] = 200,
    neighbours: Annotated[int, typer.Option(help="Links of an item in the shortcut; 0 leaves it out.")] = 64,
    calls: Annotated[int, typer.Option(help="Live calls to time.")] = 400,
    sessions: Annotated[int, typer.Option(help="Sessions that ask at once.")] = 8,
    pace: Annotated[
        float, typer.Option(help="Mean seconds between two calls of a session, as a dashboard asks.")
    ] = 0.1,
    idle: Annotated[int, typer.Option(help="Sessions that asked once and stay open.")] = 100,
    paired: Annotated[int, typer.Option(help="Users with ten pairs each to score.")] = 20_000,
) -> None:
    """Measures live calls on a throwaway server."""
    paired = min(paired, users)
    with throwaway_server() as dsn:
        err.print(f"making {users * events} events", highlight=False)
        make_model(dsn, users, items, events, width, neighbours, 20)
        figures = [
            *_one_session(dsn, users, calls),
            *_many_sessions(dsn, users, calls, sessions),
            *_many_sessions(dsn, users, calls, sessions, pace),
            *_idle_sessions(dsn, idle),
            *_pairs(dsn, items, paired),
        ]
    facts: dict[str, object] = {
        "users": users,
        "items": items,
        "events_per_user": events,
        "width": width,
        "neighbours": neighbours,
        "sessions": sessions,
        "seconds_between_paced_calls": pace,
        "idle": idle,
        "pairs": 10 * paired,
    }
    report(f"live-{users}x{items}-w{width}-n{neighbours}", figures, facts)


def _one_session(dsn: str, users: int, calls: int) -> list[Figure]:
    first = []
    for _ in range(5):
        with psycopg.connect(dsn, autocommit=True) as connection:
            first.append(timed(connection, "select * from shop.recommend(1, 10)"))
    # The first of all sessions shares the weights with those to come.
    milliseconds = _call(dsn, users, calls)
    return [
        Figure(figure="first call of a session", value=1000 * statistics.median(first), unit="ms", target=350),
        Figure(figure="live call, median", value=statistics.median(milliseconds), unit="ms", target=4),
        Figure(figure="live call, 99th percentile", value=float(np.percentile(milliseconds, 99)), unit="ms"),
    ]


def _many_sessions(dsn: str, users: int, calls: int, sessions: int, pace: float = 0.0) -> list[Figure]:
    """Gives the latency of sessions that ask again at once, or every `pace` seconds in the mean, as pgbench has it.

    A call that is late because the one before it took too long counts from when it was due.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "recommend.sql")
        script.write_text(f"\\set user random(1, {users})\nselect * from shop.recommend(:user, 10);\n")
        rate = ["--rate", str(sessions / pace)] if pace else []
        command = [find_bindir() / "pgbench", "--no-vacuum", "--client", str(sessions), "--transactions", str(calls)]
        log = ["--log", "--log-prefix", Path(folder, "calls")]
        subprocess.run([*command, *rate, *log, "--file", script, dsn], check=True, capture_output=True)
        lines = [line.split() for path in Path(folder).glob("calls.*") for line in path.read_text().splitlines()]
    # Its session, its number in it, its microseconds. The first ones load the code and the weights, and what came due
    # meanwhile is late.
    milliseconds = [int(line[2]) / 1000 for line in lines if int(line[1]) > calls // 4]
    name = f"live call in {sessions} sessions at once" + (f", one in {1000 * pace:.0f} ms each" if pace else "")
    return [
        Figure(figure=f"{name}, median", value=statistics.median(milliseconds), unit="ms"),
        Figure(figure=f"{name}, 99th percentile", value=float(np.percentile(milliseconds, 99)), unit="ms", target=10),
    ]


def _call(dsn: str, users: int, calls: int) -> list[float]:
    """Gives the milliseconds of each call of a session, which asks again at once."""
    generator = np.random.default_rng(1)
    milliseconds = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        for user in generator.integers(1, users, _WARM_UP + calls):
            begun = time.perf_counter()
            connection.execute(_RECOMMEND, [int(user)]).fetchall()
            milliseconds.append(1000 * (time.perf_counter() - begun))
    return milliseconds[_WARM_UP:]


def _idle_sessions(dsn: str, sessions: int) -> list[Figure]:
    """Gives what the weights take of the memory in so many sessions: their proportional shares add up to one copy."""
    with ExitStack() as opened:
        pids = []
        for _ in range(sessions):
            connection = opened.enter_context(psycopg.connect(dsn, autocommit=True))
            connection.execute(_RECOMMEND, [1])
            pids.append(connection.info.backend_pid)
        own = [_kilobytes_of_map(pid) for pid in pids]
    once = own[0]["Rss"]
    return [
        Figure(
            figure=f"memory for weights of {sessions} sessions",
            value=sum(each["Pss"] for each in own) / once,
            unit="ratio",
            target=1.1,
            peer="one session",
        ),
        Figure(figure="weights", value=once / 1024, unit="MB"),
        Figure(
            figure="weights that a further session has for itself",
            value=(own[-1]["Private_Clean"] + own[-1]["Private_Dirty"]) / 1024,
            unit="MB",
        ),
    ]


def _kilobytes_of_map(pid: int) -> dict[str, int]:
    """Gives the kilobytes of the mapped weights in a process, by kind."""
    found: dict[str, int] = {}
    is_map = False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            is_map = "pgvae" in line
        elif is_map and rest[-1] == "kB":
            found[name[:-1]] = found.get(name[:-1], 0) + int(rest[0])
    return found


def _pairs(dsn: str, items: int, users: int) -> list[Figure]:
    few = max(1, users // 100)
    with psycopg.connect(dsn, autocommit=True) as connection:
        begun = time.perf_counter()
        connection.execute(_PAIRS.format(items=items).encode(), [users])
        at_once = (time.perf_counter() - begun) / (10 * users)
        begun = time.perf_counter()
        connection.execute(_ONE_PAIR.format(items=items).encode(), [few])
        each = (time.perf_counter() - begun) / (10 * few)
    return [
        Figure(figure="score_pairs", value=at_once / each, unit="ratio", peer="score for each pair, ten of a user"),
        Figure(figure="score_pairs, a million pairs", value=1e6 * at_once, unit="s"),
        Figure(figure="score, one pair", value=1000 * each, unit="ms"),
    ]


if __name__ == "__main__":
    typer.run(main)
