"""The true probability of a purchase, from the parameters that made the data and each user's past.

It knows what no model can know (the rates, the tastes, who has left) but nothing of the future: which of the possible
futures comes true is chance. So it is calibrated, and no model can have a lower log-loss in the long run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pgvae.connection import connect
from pgvae.errors import PgvaeError
from pgvae.simulate.behaviour import Pending
from pgvae.simulate.calendar import DAY, FUTURE_DAYS, microseconds
from pgvae.simulate.config import Constants, SimulationConfig
from pgvae.simulate.people import NEVER
from pgvae.simulate.shop import Floats, Integers, Shop

# The form of the stored parameters; it changes when the same parameters would make other data.
FORMAT = 1
USERS_AT_A_TIME = 8192


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What decides when users buy; one row per user, as in People."""

    weights: NDArray[np.float32]
    price_group: Integers
    session_rate: Floats
    churn: Floats
    pay: Floats
    churned_at: Integers

    def __len__(self) -> int:
        return len(self.churn)


@dataclass(frozen=True, kw_only=True)
class TruePurchases:
    """The true probability that each user buys anything within the horizon.

    `user_id` are the shop's keys, `alive` whether the user had not left at the beginning of the horizon,
    `probability` (users,) of at least one purchase, 0 for who has left.
    """

    user_id: list[Any]
    alive: NDArray[np.bool_]
    probability: Floats


def buying_session(shop: Shop, habits: Habits, weeks: Integers) -> Floats:
    """Gives the probability that a session contains a purchase, shape (users, weeks).

    Views are Poisson and each is bought independently given the session's interest c, so the purchases of such a
    session are Poisson with mean m = views * pay * cart_mean: sum over c of weight_c * (1 - exp(-m_c)).
    """
    per_price_group = shop.cart_mean.reshape(shop.constants.interests, -1, shop.calendar.weeks)[:, :, weeks]
    result = np.empty((len(habits), len(weeks)))
    for week in range(len(weeks)):
        cart = per_price_group[:, habits.price_group, week].T  # (users, interests)
        mean = shop.constants.views_per_session * habits.pay[:, None] * cart
        result[:, week] = -np.einsum("uc,uc->u", habits.weights, np.expm1(-mean))
    return result


def purchase_rate(shop: Shop, habits: Habits) -> Floats:
    """Gives the mean number of ordinary purchases per day while alive, over the window's weeks, shape (users,).

    It leaves out complements and replenishing, which come on top.
    """
    calendar = shop.calendar
    cart = shop.cart_mean[:, : calendar.weeks_in_window].mean(axis=1).reshape(shop.constants.interests, -1)
    daily = float(np.mean(calendar.daily(0, (calendar.until - calendar.since) // DAY)))
    mean = np.einsum("uc,uc->u", habits.weights, cart[:, habits.price_group].T)
    return np.asarray(habits.session_rate * daily * shop.constants.views_per_session * habits.pay * mean)


def no_purchase_probability(
    shop: Shop, habits: Habits, pending: Pending, at: int, horizons: Sequence[int]
) -> NDArray[np.float64]:
    """Gives P(no purchase within h days after the timestamp `at`) for each horizon h, shape (users, horizons).

    With S(t) = exp(-(expected buying sessions by t)) * (no replenishing by t), for a user alive at `at`:
    exp(-churn h) S(h) + integral from 0 to h of churn exp(-churn t) S(t) dt, by the trapezium rule over days.
    """
    longest = max(horizons)
    first = (at - shop.calendar.since) // DAY
    week_of_day = (first + np.arange(longest)) // 7
    weeks, column = np.unique(week_of_day, return_inverse=True)
    buying = buying_session(shop, habits, weeks)[:, column]
    daily = habits.session_rate[:, None] * shop.calendar.daily(first, longest) * buying
    log_survival = np.zeros((len(habits), longest + 1))
    np.cumsum(-daily, axis=1, out=log_survival[:, 1:])
    np.add.at(log_survival, pending.user, _log_not_replenished(shop.constants, pending, at, longest))
    survival = np.exp(log_survival)

    staying = np.exp(-habits.churn[:, None] * np.arange(longest + 1))
    leaving = -np.diff(staying, axis=1) * (survival[:, 1:] + survival[:, :-1]) / 2
    left = np.concatenate([np.zeros((len(habits), 1)), np.cumsum(leaving, axis=1)], axis=1)
    none = (staying * survival + left)[:, list(horizons)]
    return np.asarray(np.where((habits.churned_at > at)[:, None], none, 1.0))


def _log_not_replenished(constants: Constants, pending: Pending, at: int, days: int) -> Floats:
    """Gives log P(not replenished within t days after `at` | not before), t from 0 to `days`, (pending, days + 1)."""
    age = (at - pending.purchased_at) / DAY

    def replenished(elapsed: Floats) -> Floats:
        # The generator moves a delay below one day up to one day.
        reached = np.exp(-((elapsed / lasts) ** constants.replenish_shape))
        return np.where(elapsed >= 1, constants.replenish_probability * (1 - reached), 0.0)

    lasts = pending.lasts[:, None]
    before = replenished(age[:, None])
    after = replenished(age[:, None] + np.arange(days + 1))
    return np.asarray(np.log1p(-after) - np.log1p(-before))


def true_purchase_probability(
    dsn: str | None, *, schema: str = "sim", at: date | None = None, horizon_days: int = 30
) -> TruePurchases:
    """Gives the true probability of any purchase in the `horizon_days` after 00:00 UTC of `at`, for each user.

    `at` None means the end of the simulated window. Users who register at `at` or later are left out. PgvaeError where
    the schema holds no simulation, or `at` or the horizon lie outside of it.
    """
    with connect(dsn) as connection:
        config = stored_config(connection, schema)
        at = at or config.until
        if not config.since < at <= config.until:
            raise PgvaeError(
                f"{at} lies outside of the simulated window",
                hint=f"give a date after {config.since} and up to {config.until}",
            )
        longest = FUTURE_DAYS - 8 + (config.until - at).days
        if not 1 <= horizon_days <= longest:
            raise PgvaeError(f"a horizon of {horizon_days} days is out of range", hint=f"give from 1 to {longest} days")
        return _read_truth(connection, config, microseconds(at), horizon_days)


def stored_config(connection: psycopg.Connection, schema: str) -> SimulationConfig:
    """Gives the configuration that a simulated schema was made with; PgvaeError where there is none."""
    relation = sql.SQL("{}.true_parameters").format(sql.Identifier(schema)).as_string(connection)
    found = connection.execute("select to_regclass(%s)::text", (relation,)).fetchone()
    if found is None or found[0] is None:
        raise PgvaeError(
            f"schema '{schema}' holds no simulated shop", hint=f"make one with: pgvae simulate --schema {schema}"
        )
    rows = connection.execute(sql.SQL("select key, value from {}.true_parameters").format(sql.Identifier(schema)))
    parameters: dict[str, Any] = dict(rows.fetchall())
    if parameters.get("format") != FORMAT:
        raise PgvaeError(
            f"schema '{schema}' was simulated by another version of pgvae",
            hint=f"make it again with: pgvae simulate --schema {schema} --replace",
        )
    stored = parameters["config"]
    return SimulationConfig(**(stored | {"until": date.fromisoformat(stored["until"])}))


def _read_truth(connection: psycopg.Connection, config: SimulationConfig, at: int, horizon: int) -> TruePurchases:
    shop = Shop.build(config, Constants())
    schema = sql.Identifier(config.schema)
    users = connection.execute(
        sql.SQL(
            "select user_id, interest_weights, price_group, session_rate, churn_hazard, pay_probability,"
            " (extract(epoch from churned_at - '2000-01-01 00:00+00') * 1000000)::bigint"
            " from {schema}.true_users join {schema}.users using (user_id)"
            " where registered_at < '2000-01-01 00:00+00'::timestamptz + %s * interval '1 microsecond'"
            " order by user_number"
        ).format(schema=schema),
        (at,),
    ).fetchall()
    row_of = {user[0]: row for row, user in enumerate(users)}
    habits = Habits(
        weights=np.array([user[1] for user in users], dtype=np.float32).reshape(len(users), -1),
        price_group=np.array([user[2] for user in users], dtype=np.int64),
        session_rate=np.array([user[3] for user in users], dtype=float),
        churn=np.array([user[4] for user in users], dtype=float),
        pay=np.array([user[5] for user in users], dtype=float),
        churned_at=np.array([NEVER if user[6] is None else user[6] for user in users], dtype=np.int64),
    )
    bought = connection.execute(
        sql.SQL(
            "select user_id, lasts_days,"
            " (extract(epoch from max(occurred_at) - '2000-01-01 00:00+00') * 1000000)::bigint"
            " from {schema}.events join {schema}.true_users using (user_id) join {schema}.true_items using (item_id)"
            " where event_type = 'purchase' and quantity > 0 and lasts_days is not null"
            " and occurred_at < '2000-01-01 00:00+00'::timestamptz + %s * interval '1 microsecond'"
            " group by user_id, item_id, lasts_days"
        ).format(schema=schema),
        (at,),
    ).fetchall()
    rows = np.array([row_of[purchase[0]] for purchase in bought], dtype=np.int64)
    lasts = np.array([purchase[1] for purchase in bought], dtype=float)
    purchased_at = np.array([purchase[2] for purchase in bought], dtype=np.int64)
    probability = np.empty(len(users))
    for begin in range(0, len(users), USERS_AT_A_TIME):
        part = slice(begin, begin + USERS_AT_A_TIME)
        mine = (rows >= begin) & (rows < begin + USERS_AT_A_TIME)
        probability[part] = (
            1
            - no_purchase_probability(
                shop,
                Habits(**{name: getattr(habits, name)[part] for name in Habits.__dataclass_fields__}),
                Pending(user=rows[mine] - begin, lasts=lasts[mine], purchased_at=purchased_at[mine]),
                at,
                [horizon],
            )[:, 0]
        )
    return TruePurchases(
        user_id=[user[0] for user in users], alive=habits.churned_at > at, probability=np.asarray(probability)
    )
