"""The tables of a simulated shop, with a comment on each and on each of their columns."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql

from pgvae.errors import PgvaeError
from pgvae.simulate.config import KeyType

# Each table's comment begins with it: `--replace` drops nothing that does not say so.
MARK = "Simulated by pgvae: "

KEY = "key"  # stands for the configuration's key type


@dataclass(frozen=True)
class Table:
    """A table: what its comment says, and (column, type, what the column's comment says) in order."""

    name: str
    comment: str
    columns: tuple[tuple[str, str, str], ...]


TABLES = (
    Table(
        "users",
        "the registered users of the shop, one row each; with --dirt also bots",
        (
            ("user_id", KEY, "The user."),
            ("registered_at", "timestamptz", "When the user registered."),
            ("country", "text", "ISO 3166 code of the country."),
            ("channel", "text", "Where the user came from: organic, search_ad, social, referral or email."),
            ("age_group", "text", "Age in years, as a range."),
            ("newsletter", "boolean", "Whether the user gets the newsletter."),
        ),
    ),
    Table(
        "items",
        "the catalogue, one row per item",
        (
            ("item_id", KEY, "The item."),
            ("title", "text", "The item's title."),
            ("description", "text", "A sentence about the item."),
            ("category", "text", "The category."),
            ("brand", "text", "The brand."),
            ("price", "numeric(10,2)", "List price of one unit, before promotions."),
            ("listed_at", "timestamptz", "When the item was listed; it is sold from the following week on."),
        ),
    ),
    Table(
        "events",
        "what the users did, one row per event",
        (
            ("event_id", "bigint", "The event, numbered from 1."),
            ("user_id", KEY, "The user."),
            ("item_id", KEY, "The item; null for register and search."),
            ("event_type", "text", "register, view, search, add_to_cart, purchase, review or share."),
            ("occurred_at", "timestamptz", "When it happened, to the millisecond."),
            ("quantity", "integer", "Units bought, negative for a return; null for what is not a purchase."),
            ("price", "numeric(10,2)", "Price paid for one unit; null for what is not a purchase."),
            ("rating", "smallint", "Stars of a review, 1 to 5; null for what is not a review."),
            ("query", "text", "What was searched for; null for what is not a search."),
            ("session_id", "bigint", "The visit; null for what happened outside of one, such as a review."),
        ),
    ),
    Table(
        "promotions",
        "the price promotions of the window, one row per category and week",
        (
            ("category", "text", "The category whose items are cheaper."),
            ("starts_at", "timestamptz", "The first moment of the promotion."),
            ("ends_at", "timestamptz", "The first moment after it."),
            ("discount", "double precision", "Share of the price that is taken off, 0 to 1."),
        ),
    ),
    Table(
        "true_users",
        "the truth about each user, which no model sees",
        (
            ("user_id", KEY, "The user."),
            ("user_number", "bigint", "The user's number in the simulation, from 1."),
            ("cluster", "smallint", "The strongest interest, 0-based."),
            ("interest_weights", "real[]", "Share of each interest in the user's sessions; sums to 1."),
            ("taste", "real[]", "Latent taste; its product with an item's taste is the affinity (mean 0, sd about 1)."),
            ("price_group", "smallint", "The price group, 0-based; its sensitivity is in price_sensitivity."),
            ("price_sensitivity", "double precision", "Minus the price elasticity of the choice between items."),
            ("session_rate", "double precision", "Sessions per day while alive, before the season's factor of mean 1."),
            ("pay_probability", "double precision", "Probability that an item in the cart is paid for."),
            (
                "purchase_rate",
                "double precision",
                "Purchases per day while alive, without complements and replenishing.",
            ),
            ("churn_hazard", "double precision", "Probability per day of leaving for good."),
            ("churned_at", "timestamptz", "When the user left for good; null if not before the end of the window."),
            ("no_purchase_7", "double precision", "True probability of no purchase in the 7 days after the window."),
            ("no_purchase_30", "double precision", "True probability of no purchase in the 30 days after the window."),
            ("no_purchase_90", "double precision", "True probability of no purchase in the 90 days after the window."),
        ),
    ),
    Table(
        "true_items",
        "the truth about each item, which no model sees",
        (
            ("item_id", KEY, "The item."),
            ("item_number", "bigint", "The item's number in the simulation, from 1."),
            ("taste", "real[]", "Latent position of the item in the space of tastes."),
            ("appeal", "double precision", "Base appeal, in log units of the weight in a choice."),
            ("quality", "double precision", "Stars that the item's reviews get above the average."),
            ("season_peak_day", "smallint", "Day of the year at which the category's season peaks."),
            ("season_amplitude", "double precision", "Height of the category's season, in log units."),
            ("lasts_days", "double precision", "Scale of the replenishing time in days; null for what is not used up."),
            ("complement_item_id", KEY, "The item that is often bought together with it; null if none."),
        ),
    ),
    Table(
        "true_parameters",
        "the configuration and the constants of the formulas",
        (
            ("key", "text", "The parameter."),
            ("value", "jsonb", "Its value."),
        ),
    ),
    Table(
        "true_dirt",
        "the events that are wrong on purpose (--dirt), one row each",
        (
            ("event_id", "bigint", "The event."),
            ("kind", "text", "What is wrong with it."),
        ),
    ),
)
EXPERIMENT = Table(
    "true_experiment",
    "the truth about each assignment of the experiment (--experiment), one row each",
    (
        ("event_id", "bigint", "The assignment: a row of events whose exposed is not null."),
        ("win_probability", "double precision", "Probability that the offer makes the user buy the item."),
        ("buys_anyway", "boolean", "Whether the user buys the item in the 28 days from then on without the offer."),
        ("is_won", "boolean", "Whether the offer, which was made, causes a purchase in these days."),
    ),
)
KEYS = {"users": "user_id", "items": "item_id", "events": "event_id", "true_users": "user_id", "true_items": "item_id"}
KEYS |= {"true_parameters": "key", "true_dirt": "event_id"}

TRUE_CHURN = """
create view {schema}.true_churn as
select
    t.user_id,
    h.horizon_days,
    t.churned_at is null as is_alive,
    h.no_purchase_probability
from {schema}.true_users t
cross join lateral (values
    (7, t.no_purchase_7),
    (30, t.no_purchase_30),
    (90, t.no_purchase_90)
) h (horizon_days, no_purchase_probability)
"""
TRUE_CHURN_COMMENTS = {
    "user_id": "The user.",
    "horizon_days": "Days after the end of the window: 7, 30 or 90.",
    "is_alive": "Whether the user had not left at the end of the window.",
    "no_purchase_probability": "True probability that the user buys nothing within the horizon.",
}


def create_tables(connection: psycopg.Connection, schema: str, key_type: KeyType, *, replace: bool) -> None:
    """Creates the schema where needed and the empty tables; PgvaeError where they exist and `replace` is false."""
    name = sql.Identifier(schema)
    _make_room(connection, schema, replace=replace)
    connection.execute(sql.SQL("create schema if not exists {}").format(name))
    for table in TABLES:
        _create(connection, schema, table, key_type)
    connection.execute(sql.SQL(TRUE_CHURN).format(schema=name))
    view = sql.Identifier(schema, "true_churn")
    _comment(connection, "view", view, MARK + "the truth about churn, per user and horizon.")
    for column, comment in TRUE_CHURN_COMMENTS.items():
        _comment(connection, "column", sql.Identifier(schema, "true_churn", column), comment)


def create_experiment(connection: psycopg.Connection, schema: str, key_type: KeyType) -> None:
    """Adds what an experiment needs: a column of the events, and the table of its truth."""
    connection.execute(sql.SQL("alter table {} add exposed boolean").format(sql.Identifier(schema, "events")))
    _comment(
        connection,
        "column",
        sql.Identifier(schema, "events", "exposed"),
        "True: the offer of the item was made to the user; false: chance withheld it; null: an ordinary event.",
    )
    _create(connection, schema, EXPERIMENT, key_type)


def _create(connection: psycopg.Connection, schema: str, table: Table, key_type: KeyType) -> None:
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(column), sql.SQL(key_type if kind == KEY else kind))
        for column, kind, _ in table.columns
    )
    relation = sql.Identifier(schema, table.name)
    connection.execute(sql.SQL("create table {} ({})").format(relation, columns))
    _comment(connection, "table", relation, MARK + table.comment + ".")
    for column, _, comment in table.columns:
        _comment(connection, "column", sql.Identifier(schema, table.name, column), comment)


def finish_tables(connection: psycopg.Connection, schema: str) -> None:
    """Adds primary keys and the indexes of events, and analyzes."""
    for table, key in KEYS.items():
        connection.execute(
            sql.SQL("alter table {} add primary key ({})").format(sql.Identifier(schema, table), sql.Identifier(key))
        )
    for key in ("user_id", "item_id"):
        connection.execute(
            sql.SQL("create index on {} ({}, occurred_at)").format(
                sql.Identifier(schema, "events"), sql.Identifier(key)
            )
        )
    for name in (table.name for table in TABLES):
        connection.execute(sql.SQL("analyze {}").format(sql.Identifier(schema, name)))


def _make_room(connection: psycopg.Connection, schema: str, *, replace: bool) -> None:
    """Drops an earlier simulation if told to; PgvaeError where a table is in the way."""
    wanted = [*(table.name for table in TABLES), EXPERIMENT.name, "true_churn"]
    found = connection.execute(
        "select c.relname, c.relkind, coalesce(obj_description(c.oid, 'pg_class'), '')"
        " from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relname = any(%s) order by c.relname",
        (schema, wanted),
    ).fetchall()
    foreign = [name for name, _, comment in found if not comment.startswith(MARK)]
    if foreign:
        raise PgvaeError(
            f"{schema}.{foreign[0]} exists and was not made by pgvae simulate",
            hint="choose another schema with --schema; pgvae never drops tables that it did not make",
        )
    if found and not replace:
        raise PgvaeError(
            f"schema '{schema}' holds a simulated shop already",
            hint="make it again with --replace, or choose another schema with --schema",
        )
    try:
        for name, kind, _ in sorted(found, key=lambda row: row[1] != "v"):  # the view first: it depends on a table
            relation = sql.Identifier(schema, name)
            connection.execute(sql.SQL("drop {} {}").format(sql.SQL("view" if kind == "v" else "table"), relation))
    except psycopg.errors.DependentObjectsStillExist as error:
        raise PgvaeError(
            f"other objects depend on {schema}.{name}: {error.diag.message_detail or ''}".strip(),
            hint="drop them first, or choose another schema with --schema",
        ) from error


def _comment(connection: psycopg.Connection, kind: str, on: sql.Identifier, comment: str) -> None:
    connection.execute(sql.SQL("comment on {} {} is {}").format(sql.SQL(kind), on, sql.Literal(comment)))
