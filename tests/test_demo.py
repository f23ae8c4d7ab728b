"""`pgvae demo`, which is `make demo`, on a small shop and the throwaway server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import psycopg


def test_the_demo_goes_the_whole_way_and_can_be_run_again(
    empty_database: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for _ in range(2):
        done = run_cli("demo", "--users", "1000", "--items", "200", dsn=empty_database)
        assert done.returncode == 0, done.stderr
        assert "pgvae beats popularity" in done.stdout
        assert "yours now" in done.stdout
    with psycopg.connect(empty_database) as connection:
        rows = connection.execute(
            "select count(*), count(distinct user_id), min(rank), max(rank) from demo.recommendations"
        ).fetchone()
        assert rows is not None
        count, users, first, last = rows
        assert users >= 1000
        assert (first, last) == (1, 20)
        assert count == 20 * users
        # The visitor of a minute ago is not a cold start.
        cold = connection.execute("select bool_or(is_cold_start) from demo.recommend(1000000042)").fetchone()
        assert cold == (False,)
