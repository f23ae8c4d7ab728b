"""Runs over all users keep to vae.max_memory and vae.max_threads, and leave no thread behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest
from benchmarks.scoring import own_megabytes, peak_memory

from shop import refusal

Connection = psycopg.Connection[Any]

LISTS = "select user_key, item_keys, is_cold_start from vae_private.recommend_all((select model_id from vae.models), 5)"
EXPLANATIONS = "select user_key, item_key, because from vae_private.explain_all((select model_id from vae.models))"
# What the least batches of the tiny shop need.
LEAST = {LISTS: 56, EXPLANATIONS: 48}


def test_who_bought_what_must_fit_into_the_limit(shared_trained: Connection) -> None:
    related = "select count(*) from vae_private.related_all(1, 5)"
    shared_trained.execute("set vae.max_memory = '1kB'")
    try:
        refused = refusal(shared_trained, related)
        assert refused.sqlstate == "53200"
        assert "and who bought what, " in str(refused.message_primary)
        shared_trained.execute(str(refused.message_hint).partition(": ")[2].encode())
        assert shared_trained.execute(related).fetchone() == (12,)
    finally:
        shared_trained.execute("reset vae.max_memory")


@pytest.mark.parametrize("query", [LISTS, EXPLANATIONS], ids=["recommendations", "explanations"])
def test_a_run_over_long_histories_keeps_to_the_limit(trained: Connection, query: str) -> None:
    trained.execute(
        "insert into events select user_id, item_id, 'view', timestamptz '2024-03-01' + n * interval '1 minute'"
        " from (select user_id, min(item_id) as item_id from events group by 1) u, generate_series(1, 25000) n"
    )
    trained.execute("select * from shop.recommend((select min(user_id) from events))")
    before = own_megabytes(trained.info.backend_pid)
    trained.execute(f"set vae.max_memory = '{LEAST[query]}MB'")
    with peak_memory(trained.info.backend_pid) as most:
        found = trained.execute(query.encode()).fetchall()
    assert most[0] - before < LEAST[query]
    trained.execute("reset vae.max_memory")
    assert sorted(found) == sorted(trained.execute(query.encode()).fetchall())


def test_a_limit_that_nothing_fits_into_says_what_does(shared_trained: Connection) -> None:
    shared_trained.execute("set vae.max_memory = '8MB'")
    try:
        refused = refusal(shared_trained, LISTS)
        assert refused.sqlstate == "53200"
        assert "vae.max_memory is 8MB, and this needs" in str(refused.message_primary)
        remedy = str(refused.message_hint).removeprefix("raise it: ").partition(";")[0]
        shared_trained.execute(remedy.encode())
        assert len(shared_trained.execute(LISTS).fetchall()) == 30
        # Live calls do not ask.
        shared_trained.execute("set vae.max_memory = '1kB'")
        assert shared_trained.execute("select shop.score(user_id, item_id) > 0 from events limit 1").fetchone() == (
            True,
        )
    finally:
        shared_trained.execute("reset vae.max_memory")


def test_segments_are_read_in_batches_that_fit(shared_trained: Connection) -> None:
    query = "select * from vae_private.segment_all(1) order by 1"
    expected = shared_trained.execute(query).fetchall()
    shared_trained.execute("set vae.max_memory = '1MB'")
    try:
        refused = refusal(shared_trained, query)
        assert refused.sqlstate == "53200"
        assert "vae.max_memory is 1MB, and this needs" in str(refused.message_primary)
        shared_trained.execute("set vae.max_memory = '8MB'")
        assert shared_trained.execute(query).fetchall() == expected
    finally:
        shared_trained.execute("reset vae.max_memory")


@pytest.mark.parametrize("value", ["much", "-1MB", "1 PB"])
def test_a_limit_that_is_no_size_is_refused(shared_trained: Connection, value: str) -> None:
    shared_trained.execute("select set_config('vae.max_memory', %s, false)", [value])
    try:
        refused = refusal(shared_trained, LISTS)
        assert refused.sqlstate == "22023"
        assert f"vae.max_memory is '{value}'" in str(refused.message_primary)
    finally:
        shared_trained.execute("reset vae.max_memory")


def test_threads_are_as_many_as_allowed_and_give_the_same(shared_trained: Connection) -> None:
    expected = sorted(shared_trained.execute(LISTS).fetchall())
    try:
        for count in ("1", "64"):
            shared_trained.execute("select set_config('vae.max_threads', %s, false)", [count])
            assert sorted(shared_trained.execute(LISTS).fetchall()) == expected
        for wrong in ("0", "many", "1.5"):
            shared_trained.execute("select set_config('vae.max_threads', %s, false)", [wrong])
            refused = refusal(shared_trained, LISTS)
            assert refused.sqlstate == "22023"
            assert f"vae.max_threads is '{wrong}'" in str(refused.message_primary)
    finally:
        shared_trained.execute("reset vae.max_threads")


@pytest.mark.parametrize(
    "query",
    [
        "select count(*) from vae_private.segment_all(1)",
        "select count(*) from vae_private.related_all(1, 5)",
        # So many users that threads score them.
        f"select * from shop.score_pairs('{set(range(200))}', '{set(range(200))}')",
    ],
    ids=["segments", "related_items", "score_pairs"],
)
def test_other_runs_ask_how_many_threads_are_allowed(shared_trained: Connection, query: str) -> None:
    shared_trained.execute("set vae.max_threads = 0")
    try:
        assert "vae.max_threads is '0'" in str(refusal(shared_trained, query).message_primary)
    finally:
        shared_trained.execute("reset vae.max_threads")


THREADS = """
create function pg_temp.threads() returns text[] language plpython3u as $$
import threading
return sorted(thread.name for thread in threading.enumerate())
$$
"""


@pytest.mark.parametrize(
    "query",
    [
        "select count(1 / (user_key::bigint % 7)) from vae_private.recommend_all(1, 5)",
        "select 1 / (s.user_key::bigint % 7) from (select (vae_private.recommend_all(1, 5)).user_key) s",
        "select (vae_private.recommend_all(1, 5)).user_key limit 3",
    ],
    ids=["in an aggregate", "between two rows", "no more rows wanted"],
)
def test_no_thread_outlives_a_statement(shared_trained: Connection, query: str) -> None:
    shared_trained.execute("drop function if exists pg_temp.threads")
    shared_trained.execute(THREADS)
    if "/" in query:
        refusal(shared_trained, query)
    else:
        assert len(shared_trained.execute(query.encode()).fetchall()) == 3
    assert shared_trained.execute("select pg_temp.threads()").fetchone() == (["MainThread"],)


CORE = """
create function pg_temp.core() returns text language plpython3u as $$
import ctypes
import numpy
paths = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "openblas" in line}
tell = ctypes.CDLL(min(paths)).openblas_get_corename
tell.restype = ctypes.c_char_p
return tell().decode()
$$
"""


@pytest.mark.parametrize(("is_set", "is_left"), [("Prescott", True), (None, False)])
def test_a_processor_that_openblas_does_not_know_gets_its_kernels_all_the_same(
    shared_trained: Connection, is_set: str | None, is_left: bool
) -> None:
    score = "select shop.score(user_id, item_id) from events order by 1 limit 20"
    expected = [row[0] for row in shared_trained.execute(score)]
    with psycopg.connect(shared_trained.info.dsn, autocommit=True) as session:
        # As if OpenBLAS were older than the processor; once because somebody said so.
        session.execute(
            "do $$\nimport os\nos.environ['OPENBLAS_CORETYPE'] = 'Prescott'\nimport numpy\n"
            + ("" if is_set else "del os.environ['OPENBLAS_CORETYPE']\n")
            + "$$ language plpython3u"
        )
        try:
            session.execute(CORE)
            before = session.execute("select pg_temp.core()").fetchone()
        except (psycopg.Error, ValueError):
            pytest.skip("the server's NumPy has no OpenBLAS")
        if before != ("Prescott",) or "avx2" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("the server's OpenBLAS has no kernels for old processors, or this one is old")
        assert [row[0] for row in session.execute(score)] == pytest.approx(expected, rel=1e-5)
        assert (session.execute("select pg_temp.core()").fetchone() == ("Prescott",)) == is_left
        assert session.execute("select bool_and(passed) from vae.verify('shop')").fetchone() == (True,)
