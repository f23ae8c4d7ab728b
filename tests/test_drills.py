"""Drills: kills at random moments, many sessions while versions change. Short here; `make survival` makes them long.

Every answer is checked: it comes from one version, and is what this version answers. After every kill: the state of
before or of after, nothing in between, and the next refresh works.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import FAST, create_database
from pgvae.errors import PgvaeError
from pgvae.install import install
from pgvae.server import Server
from shop import QUICK, SMALL, Shop, keys, train_and_activate
from test_survival import rows, wait_for_restart, wait_until_alone, wait_until_down
from variants import publish_network

Connection = psycopg.Connection[Any]
Lists = dict[int, list[tuple[int, float]]]

USERS = keys("user", "bigint", 60)
SHOP = Shop(user_keys=USERS)
ITEMS = SHOP.items
REFRESH = "call vae.refresh('shop', array['recommendations'])"
WEIGHTS = (
    "select version, bool_and(sha256(data) = sha256), count(*)"
    " from vae_private.tensors join vae.versions using (version_id) group by 1"
)
KEEP = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(scope="module")
def arena(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of its own that may be killed, with a shop whose model has two versions, the first one active."""
    # What was committed must survive a kill; without fsync it does, since the system goes on.
    arena = Server(scratch / "arena", settings=FAST | {"max_connections": "120", "synchronous_commit": "on"})
    arena.up()
    create_database(arena, "crashing")
    dsn = arena.dsn("crashing")
    install(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        SHOP.make(connection)
        connection.execute("create index on events (user_id)")
        SHOP.create_model(connection, options={**SMALL, "recommendations": 5})
        train_and_activate(dsn)
        publish_network(dsn, "shop", QUICK, seed=1)
        connection.execute(REFRESH.encode())
    yield arena
    arena.remove()
    if (path := request.config.getoption("--drill-report")) and (counts := request.config.stash.get(KEEP, None)):
        Path(path).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def count(request: pytest.FixtureRequest, name: str, **counts: int) -> None:
    """Prints what a drill tried how often, and keeps it for the report."""
    print(f"\n{name}: {', '.join(f'{number} {what}' for what, number in counts.items())}")
    request.config.stash.setdefault(KEEP, {})[name] = counts


def stored(connection: Connection) -> tuple[set[int], Lists]:
    """Gives the versions and each user's list as people read them, in one statement."""
    lists: Lists = {}
    versions = set()
    for user, item, score, version in rows(
        connection, "select user_id, item_id, score, model_version from shop.recommendations order by user_id, rank"
    ):
        lists.setdefault(user, []).append((item, score))
        versions.add(version)
    return versions, lists


def scored(connection: Connection) -> Lists:
    """Gives each user's list as a full refresh would store it now."""
    found = rows(
        connection,
        "select user_key::bigint, item_keys::bigint[], scores::real[]"
        " from vae_private.recommend_all((select model_id from vae.models), 5)",
    )
    return {user: list(zip(items, scores, strict=True)) for user, items, scores in found if items}


def assert_whole(connection: Connection, *, like: int) -> None:
    """Checks that every version has its tensors, and each one published since as many as that earlier version."""
    found = rows(connection, WEIGHTS)
    assert all(whole for _, whole, _ in found)
    tensors = {version: count for version, _, count in found}
    assert tensors.keys() == {version for version, _ in states(connection)}
    assert {count for version, count in tensors.items() if version > 2} <= {tensors[like]}


def alike(left: Lists, right: Lists) -> bool:
    """Says whether two are the same lists, their scores to the rounding of batches."""
    return left.keys() == right.keys() and all(
        [item for item, _ in left[user]] == [item for item, _ in right[user]]
        and all(math.isclose(a, b, rel_tol=1e-5) for (_, a), (_, b) in zip(left[user], right[user], strict=True))
        for user in left
    )


# Many sessions


def test_every_answer_of_many_sessions_comes_from_one_version(arena: Server, request: pytest.FixtureRequest) -> None:
    sessions = request.config.getoption("--drill-sessions")
    seconds = request.config.getoption("--drill-seconds")
    dsn = arena.dsn("crashing")
    live: dict[tuple[int, int], list[Any]] = {}
    lists: dict[int, Lists] = {}
    one = "select item_id, score, model_version from shop.recommend(%s, k => 5) order by rank"
    with psycopg.connect(dsn, autocommit=True) as connection:
        for version in (2, 1):
            rows(connection, "select * from vae.activate('shop', %s, force => true)", version)
            live |= {(version, user): rows(connection, one, user) for user in USERS}
            lists[version] = scored(connection)
        connection.execute(REFRESH.encode())
    end = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def is_going() -> bool:
        """Tells whether the time is not over, or too little has happened on a slow machine."""
        enough = counts["refreshes"] > 3 and counts["activations and rollbacks"] > 10
        return time.monotonic() < end + (0 if enough else 60)

    def ask(number: int) -> None:
        """Asks live and reads what is stored, until the time is over."""
        chosen = random.Random(number)
        own: Counter[str] = Counter()
        with psycopg.connect(dsn, autocommit=True) as session:
            while is_going():
                user = chosen.choice(USERS)
                answer = rows(session, one, user)
                (version,) = {row[2] for row in answer}
                assert answer == live[version, user]
                own[f"live answers of version {version}"] += 1
                versions, found = stored(session)
                (version,) = versions
                assert alike(found, lists[version])
                own[f"readings of version {version}"] += 1
        with lock:
            counts.update(own)

    def change() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            while is_going():
                rows(session, "select * from vae.activate('shop', 2, force => true)")
                time.sleep(0.02)
                rows(session, "select * from vae.rollback('shop')")
                time.sleep(0.02)
                counts["activations and rollbacks"] += 2

    def renew() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            while is_going():
                session.execute(REFRESH.encode())
                counts["refreshes"] += 1

    with ThreadPoolExecutor(sessions + 2) as threads:
        running = [
            *(threads.submit(ask, number) for number in range(sessions)),
            threads.submit(change),
            threads.submit(renew),
        ]
        for future in running:
            future.result()
    count(request, "sessions", sessions=sessions, seconds=int(seconds), **dict(sorted(counts.items())))
    assert counts["live answers of version 1"] > 0
    assert counts["live answers of version 2"] > 0
    assert counts["activations and rollbacks"] > 10
    assert counts["refreshes"] > 3


# Kills


def few_events(connection: Connection, chosen: random.Random) -> None:
    """Gives one user an event more, so that a refresh scores that one."""
    connection.execute(
        "insert into events values (%s, %s, 'view', now())", [chosen.choice(USERS), chosen.choice(ITEMS)]
    )


def many_events(connection: Connection, chosen: random.Random) -> None:
    """Gives a third of the users an event more, so that a refresh stores everybody."""
    connection.execute(
        "insert into events select u, %s, 'view', now() from unnest(%s::bigint[]) u",
        [chosen.choice(ITEMS), chosen.sample(USERS, 20)],
    )


def other_version(connection: Connection, chosen: random.Random) -> None:
    """Puts another version into service, so that a refresh scores everybody."""
    (active,) = rows(connection, "select version from vae.versions where state = 'active'")[0]
    rows(connection, "select * from vae.activate('shop', %s, force => true)", 3 - active if active < 3 else 1)


def nothing(connection: Connection, chosen: random.Random) -> None:
    """Leaves all as it is."""


def publish(dsn: str) -> None:
    publish_network(dsn, "shop", QUICK, seed=2)


def statement(query: str) -> Callable[[str], None]:
    def act(dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            session.execute(query.encode())

    return act


ACTS: dict[str, tuple[Callable[[Connection, random.Random], None], Callable[[str], None]]] = {
    "refresh of one user": (few_events, statement(REFRESH)),
    "refresh that stores all": (many_events, statement(REFRESH)),
    "refresh after an activation": (other_version, statement(REFRESH)),
    "full refresh": (nothing, statement("call vae.refresh('shop', full => true)")),
    "activation": (nothing, statement("select * from vae.activate('shop', 2, force => true)")),
    "rollback": (other_version, statement("select * from vae.rollback('shop')")),
    "publication": (nothing, publish),
}


def states(connection: Connection) -> list[Any]:
    return rows(connection, "select version, state from vae.versions order by 1")


def processes(connection: Connection) -> list[int]:
    """Gives the server processes of all other clients of this database; none where the server has just died."""
    query = (
        "select pid from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
        " and pid <> pg_backend_pid()"
    )
    with contextlib.suppress(psycopg.OperationalError):
        return [pid for (pid,) in rows(connection, query)]
    return []


def kill(pid: int) -> None:
    """Kills a process at once; one that has ended meanwhile is as good."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ACTS)
def test_a_kill_at_any_moment_leaves_before_or_after(arena: Server, request: pytest.FixtureRequest, name: str) -> None:
    rounds = request.config.getoption("--drill-kills")
    dsn = arena.dsn("crashing")
    prepare, act = ACTS[name]
    chosen = random.Random(name)
    interrupted = 0
    duration = 0.1
    for number in range(rounds):
        with wait_for_restart(arena) as watcher:
            wait_until_alone(watcher)
            prepare(watcher, chosen)
            before, before_states = stored(watcher), states(watcher)
            with ThreadPoolExecutor(1) as threads:
                running = threads.submit(act, dsn)
                time.sleep(chosen.uniform(0, 1.2 * duration))
                # The whole server, or the process that is at it.
                victims = processes(watcher)
                if number % 2:
                    victims.insert(0, int((arena.data / "postmaster.pid").read_text().splitlines()[0]))
                for pid in victims:
                    kill(pid)
                try:
                    running.result(60)
                except (psycopg.Error, PgvaeError):
                    interrupted += 1
            if victims:
                wait_until_down(watcher)
        with wait_for_restart(arena) as connection:
            wait_until_alone(connection)
            after = stored(connection)
            assert len(after[0]) == 1
            assert alike(after[1], before[1]) or alike(after[1], scored(connection))
            found = states(connection)
            assert [state for _, state in found].count("active") == 1
            assert {state for _, state in found} <= {"ready", "active", "retired"}
            assert len(found) - len(before_states) in (0, 1)
            assert_whole(connection, like=2)
            assert rows(connection, "select count(*) from shop.recommend(%s, k => 5)", USERS[0]) == [(5,)]
            begun = time.monotonic()
            act(dsn)
            duration = time.monotonic() - begun
            connection.execute(REFRESH.encode())
            assert alike(stored(connection)[1], scored(connection))
            assert rows(connection, "select count(*) from vae.refreshes where state = 'running'") == [(0,)]
            connection.execute("delete from vae.versions where version > 2 and state <> 'active'")
    count(request, f"kill -9 during: {name}", tried=rounds, interrupted=interrupted, lost=0)


def test_a_trainer_killed_at_any_moment_leaves_nothing(
    arena: Server, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rounds = request.config.getoption("--drill-trainers")
    dsn = arena.dsn("crashing")
    chosen = random.Random(1)
    interrupted = 0
    for _ in range(rounds):
        with wait_for_restart(arena) as connection:
            before, before_states = stored(connection), states(connection)
            trainer = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pgvae.cli",
                    "train",
                    "shop",
                    "--epochs",
                    "2",
                    "--checkpoints",
                    "",
                    "--dsn",
                    dsn,
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(chosen.uniform(1, 8))
            trainer.kill()
            interrupted += trainer.wait() == -signal.SIGKILL
            wait_until_alone(connection)
            assert stored(connection) == before
            found = states(connection)
            assert found[: len(before_states)] == before_states
            assert {state for _, state in found} <= {"ready", "active", "retired"}
            assert_whole(connection, like=1)
            connection.execute("delete from vae.versions where version > 2 and state <> 'active'")
    count(request, "kill -9 of pgvae train", tried=rounds, interrupted=interrupted, lost=0)
