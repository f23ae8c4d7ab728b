"""What docs/privacy.md says: who is taken out of the shop's tables is in no table or file of pgvae after a refresh."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import psycopg

from pgvae.transfer import export_version
from shop import Shop

Connection = psycopg.Connection[Any]

# One whose key is no item's.
USER = Shop().users[20]
assert USER not in Shop().items
# As text, and as a number in the order of either kind of machine.
TRACES = (str(USER).encode(), struct.pack("<q", USER), struct.pack(">q", USER))


def where_the_user_is(connection: Connection) -> set[str]:
    """Gives the tables and materialized views of pgvae and of the model in which any row holds the user's key."""
    relations = connection.execute(
        "select c.oid::regclass::text from pg_class c where c.relkind in ('r', 'm')"
        " and c.relnamespace in ('vae'::regnamespace, 'vae_private'::regnamespace, 'shop'::regnamespace)"
    ).fetchall()
    assert len(relations) > 20
    found = set()
    for (relation,) in relations:
        # The text of bytea is hexadecimal.
        patterns = [f"%{pattern}%" for pattern in (USER, *(trace.hex() for trace in TRACES))]
        query = f"select exists (select from {relation} t where t::text like any (%s))"
        if connection.execute(query.encode(), [patterns]).fetchone() == (True,):
            found.add(relation)
    return found


def make_predictions(connection: Connection) -> None:
    item = Shop().items[0]
    connection.execute("select vae.create_offer('shop', 'sale', array[%s::bigint])", [item])
    connection.execute("call vae.refresh('shop')")
    # The next refresh is an incremental one.
    connection.execute("insert into events values (%s, %s, 'purchase', '2024-03-01')", [USER, item])
    connection.execute("call vae.refresh('shop')")


def test_who_is_erased_from_the_shop_is_nowhere_after_a_refresh(trained: Connection) -> None:
    make_predictions(trained)
    assert {"shop.recommendations_materialized", "shop.explanations_materialized"} <= where_the_user_is(trained)
    trained.execute("delete from events where user_id = %s", [USER])
    # No view shows the user any more; beneath one, the old row and a mark that it is gone wait for a full refresh.
    trained.execute("call vae.refresh('shop')")
    for view in ("recommendations", "churn", "offer_responses", "user_segments", "explanations"):
        query = f"select count(*), count(*) filter (where user_id = %s) from shop.{view}"
        count, own = trained.execute(query.encode(), [USER]).fetchone() or (0, 1)
        assert own == 0
        assert count > 0 or view in ("churn", "offer_responses")
    assert where_the_user_is(trained) == {"shop.recommendations_materialized", "shop.recommendations_changed"}
    trained.execute("call vae.refresh('shop', full => true)")
    assert where_the_user_is(trained) == set()


def test_what_training_stores_names_nobody(trained: Connection, tmp_path: Path) -> None:
    # All predictions are gone; what is left is the version, its metrics and its golden users.
    trained.execute("delete from events")
    trained.execute("call vae.refresh('shop')")
    assert trained.execute("select count(*) > 0 from vae_private.golden_users").fetchone() == (True,)
    assert where_the_user_is(trained) == set()
    path = tmp_path / "version"
    export_version(trained, "shop", path)
    content = path.read_bytes()
    assert not any(trace in content for trace in TRACES)
