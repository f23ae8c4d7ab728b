"""A cancel ends every run over all users or items after the batch at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from conftest import create_database, drop_database
from pgvae.connection import connect
from pgvae.dataset import read_dataset, read_definition
from pgvae.loop import Fit
from pgvae.publish import publish
from pgvae.segments import Segment, Segments
from pgvae.server import Server
from pgvae.validation import NO_SHORTCUT
from pgvae_runtime import behaviour, outcomes
from pgvae_runtime.demand import FEATURES, Equation, Head, Interval
from shop import QUICK, Shop
from variants import random_links, random_network

Connection = psycopg.Connection[Any]

NOTHING = Interval(
    intercept=0, coefficients=[0.0] * len(FEATURES), expected=[0.1, 1], low=[0, 0], high=[0, 0], deviation=[0, 0]
)
DEMAND = Equation(intercept=0, coefficients=[0.0] * len(FEATURES), share=0.5, half_life=10, shock=0, interval=NOTHING)
# What each batch of a module goes through, and the settings that make batches of one user or item.
SCORED = {
    "recommendations": ("batch", "write_scores", "batch._MAX_BATCH = 1"),
    "churn": ("churn", "reasons_of", "churn._BATCH = 1"),
    "explanations": ("explanations", "_parts", "explanations._USERS = 1"),
    "offer_responses": ("audience", "_answers", "batch._MAX_NUMBERS = 1"),
    "user_segments": ("segments", "directions", "segments._USERS = 1"),
    "demand": ("sales", "_numbers", "sales._BATCH = 1"),
    "related_items": ("related", "chosen_order", "related._SHARES_BYTES = 1"),
    "audience": ("audience", "_answers", "batch._MAX_NUMBERS = 1"),
    "score_pairs": ("pairs", "_scores", "batch._MAX_NUMBERS = 1; pairs._FEW = 0"),
    "recommend_for_users": ("lists", "best_lists", "lists._FEW = 1"),
}
CALLS = {
    "audience": "select * from shop.audience((select min(item_id) from events))",
    "score_pairs": "select p.* from (select array_agg(user_id) as users, array_agg(item_id) as items from events) e,"
    " shop.score_pairs(e.users, e.items) p",
    "recommend_for_users": "select p.* from (select array_agg(user_id) as users from events) e,"
    " shop.recommend_for_users(e.users) p",
}
# The cancel comes in this call of the function; of thirty users or twelve items there would have been more. Beyond the
# batch at hand there is what waits for the only thread that computes, or what a batch calls the function twice for.
CANCELLED_AT, AHEAD = 5, 4
# Python sees no signal, PostgreSQL does: it is what pg_cancel_backend sends.
CANCEL_IN_A_BATCH = """
do $do$
import importlib, os, signal, sys

(package,) = {{name.partition(".")[0] for name in sys.modules if name.startswith("pgvae_runtime_")}}
module = importlib.import_module(package + ".{module}")
for setting in "{setting}".split("; "):
    name, _, value = setting.partition(" = ")
    owner, _, name = name.partition(".")
    setattr(importlib.import_module(package + "." + owner), name, int(value))
function = module.{function}
seen = sys.modules["seen"] = []

def counted(*args, **named):
    seen.append(1)
    if len(seen) == {cancelled_at}:
        os.kill(os.getpid(), signal.SIGINT)
    return function(*args, **named)

module.{function} = counted
$do$ language plpython3u
"""
SEEN = """
do $do$
import sys
plpy.execute(f"select set_config('test.seen', '{len(sys.modules['seen'])}', false)")
$do$ language plpython3u
"""


@pytest.fixture(scope="module")
def whole(server: Server, template: str) -> Iterator[str]:
    """The DSN of a shop whose version has all that a version can have, at random."""
    name = "stopping"
    create_database(server, name, template)
    dsn = server.dsn(name)
    shop = Shop()
    with connect(dsn, autocommit=True) as connection:
        shop.make(connection)
        shop.create_model(connection)
    with connect(dsn) as connection:
        dataset = read_dataset(connection, "shop")
        weights = random_network(dataset, QUICK, 1).weights() | random_links(dataset, 1).tensors()
        b = behaviour.count(len(dataset.event_types))
        segment = Segment(segment=1, name="all", share=1, mean_events=12, top_categories="", similarity=1, overlap=None)
        publish(
            connection,
            definition=read_definition(connection, "shop"),
            dataset=dataset,
            config=QUICK,
            fit=Fit(weights=weights, best_epoch=1, curve=[], shortcut=NO_SHORTCUT),
            curve=[],
            metrics=[],
            durations={},
            demand=Head(horizon=10, is_whole=True, units=DEMAND, buyers=DEMAND),
            segments=Segments(centroids=np.eye(1, QUICK.latent, dtype=np.float32), rows=(segment,)),
            outcomes={name: np.ones(b if size == "B" else 1, np.float32) for name, size in outcomes.SHAPES.items()},
        )
        connection.execute("select * from vae.activate('shop', 1)")
        connection.execute("select vae.create_offer('shop', 'sale', array[(select min(item_id) from events)])")
    with connect(dsn, autocommit=True) as connection:
        connection.execute("call vae.refresh('shop')")
    yield dsn
    drop_database(server, name)


@pytest.mark.parametrize("run", list(SCORED))
def test_a_cancel_acts_after_the_batch_at_hand(whole: str, run: str) -> None:
    module, function, setting = SCORED[run]
    change = CANCEL_IN_A_BATCH.format(module=module, function=function, setting=setting, cancelled_at=CANCELLED_AT)
    with psycopg.connect(whole, autocommit=True) as connection:
        connection.execute("set vae.max_threads = 1")
        connection.execute("select * from shop.recommend(0)")
        connection.execute(change.encode())
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute(CALLS.get(run, f"call vae.refresh('shop', array['{run}'], full => true)").encode())
        connection.execute(SEEN)
        seen = int(connection.execute("show test.seen").fetchall()[0][0])
    assert CANCELLED_AT <= seen <= CANCELLED_AT + AHEAD < min(len(Shop().users), len(Shop().items))
