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
from pgvae.simulate.config import CONSTANTS, Constants, SimulationConfig
from pgvae.simulate.people import NEVER, People
from pgvae.simulate.shop import Floats, Integers, Shop, cart_probability

# The form of the stored parameters; it changes when the same parameters would make other data.
FORMAT = 1
# The horizons whose truth is stored beside each user, in days.
HORIZONS = (7, 30, 90)
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


def habits_of(people: People) -> Habits:
    """Gives the habits of a block's users."""
    return Habits(**{name: getattr(people, name) for name in Habits.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class TruePurchases:
    """The true probability that each user buys anything within the horizon.

    `user_id` are the shop's keys, `alive` whether the user had not left at the beginning of the horizon,
    `probability` (users,) of at least one purchase, 0 for who has left.
    """

    user_id: list[Any]
    alive: NDArray[np.bool_]
    probability: Floats


@dataclass(frozen=True, kw_only=True)
class TrueItemPurchases:
    """The true probability that each user buys each item within the horizon; `probability` (users, items)."""

    user_id: list[Any]
    item_id: list[Any]
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


def item_rates(shop: Shop, habits: Habits, week: int) -> Floats:
    """Gives the expected purchases of each item by each user per day of one week, before the calendar's intensity.

    Shape (users, items), in the catalogue's order. Complements are counted, replenishing is not.
    """
    constants, catalogue, groups = shop.constants, shop.catalogue, len(shop.constants.price_sensitivities)
    discount = shop.discount[week, catalogue.category]
    result = np.empty((len(habits), len(catalogue)))
    for price_group, sensitivity in enumerate(constants.price_sensitivities):
        chosen = np.stack([shop.item_shares(week, c * groups + price_group) for c in range(constants.interests)])
        cart = cart_probability(constants, shop.affinity, sensitivity * catalogue.log_price, discount)
        users = habits.price_group == price_group
        result[users] = habits.weights[users] @ (chosen * cart)
    result *= constants.views_per_session * (habits.session_rate * habits.pay)[:, None]
    paired = np.flatnonzero(catalogue.complement >= 0)
    paired = paired[catalogue.week[catalogue.complement[paired]] <= week]
    together = np.zeros((len(catalogue), len(habits)))
    np.add.at(together, catalogue.complement[paired], constants.complement_probability * result[:, paired].T)
    return np.asarray(result + together.T)


def no_item_purchase_probability(shop: Shop, habits: Habits, pending: Pending, at: int, horizon: int) -> Floats:
    """Gives P(no purchase of the item within `horizon` days after `at`), shape (users, items).

    The items are in the catalogue's order. The integral over the time of leaving is that of no_purchase_probability.
    It is near and not exact: two purchases of one item in one session count as independent.
    """
    first = (at - shop.calendar.since) // DAY
    daily = shop.calendar.daily(first, horizon)
    bought = (pending.user, pending.item)
    replenished = np.diff(_log_not_replenished(shop.constants, pending, at, horizon), axis=1)
    log_survival = np.zeros((len(habits), len(shop.catalogue)))
    survival, none = np.ones_like(log_survival), np.zeros_like(log_survival)
    staying = np.exp(-habits.churn[:, None] * np.arange(horizon + 1))
    rates, week = log_survival, -1
    for day in range(horizon):
        if (first + day) // 7 != week:
            week = int(first + day) // 7
            rates = item_rates(shop, habits, week)
        log_survival = log_survival - daily[day] * rates
        np.add.at(log_survival, bought, replenished[:, day])
        before, survival = survival, np.exp(log_survival)
        none += (staying[:, day] - staying[:, day + 1])[:, None] * (before + survival) / 2
    none += staying[:, -1:] * survival
    return np.asarray(np.where((habits.churned_at > at)[:, None], none, 1.0))


def true_purchase_probability(
    dsn: str | None, *, schema: str = "sim", at: date | None = None, horizon_days: int = 30
) -> TruePurchases:
    """Gives the true probability of any purchase in the `horizon_days` after 00:00 UTC of `at`, for each user.

    `at` None means the end of the simulated window. Users who register at `at` or later are left out. PgvaeError where
    the schema holds no simulation, or `at` or the horizon lie outside of it.
    """
    with connect(dsn) as connection:
        past = _Past.read(connection, schema, at, horizon_days, None)
    probability = np.empty(len(past.user_id))
    for begin in range(0, len(probability), USERS_AT_A_TIME):
        habits, pending = past.part(begin, begin + USERS_AT_A_TIME)
        none = no_purchase_probability(past.shop, habits, pending, past.at, [horizon_days])[:, 0]
        probability[begin : begin + USERS_AT_A_TIME] = 1 - none
    return TruePurchases(user_id=past.user_id, alive=past.habits.churned_at > past.at, probability=probability)


def true_item_probability(
    dsn: str | None, users: Sequence[Any], *, schema: str = "sim", at: date | None = None, horizon_days: int = 30
) -> TrueItemPurchases:
    """Gives the true probability that each of the users buys each item in the `horizon_days` after 00:00 UTC of `at`.

    `users` are keys; unknown ones and those who register at `at` or later are left out. It takes 40 bytes for each
    pair of user and item. PgvaeError as in true_purchase_probability.
    """
    with connect(dsn) as connection:
        past = _Past.read(connection, schema, at, horizon_days, list(users))
        items = connection.execute(
            sql.SQL("select item_id from {}.true_items order by item_number").format(sql.Identifier(schema))
        ).fetchall()
    none = no_item_purchase_probability(past.shop, past.habits, past.pending, past.at, horizon_days)
    by_number = np.argsort(past.shop.catalogue.number)
    return TrueItemPurchases(
        user_id=past.user_id, item_id=[item[0] for item in items], probability=1 - none[:, by_number]
    )


def stored_config(connection: psycopg.Connection, schema: str) -> SimulationConfig:
    """Gives the configuration that a simulated schema was made with; PgvaeError where there is none."""
    relation = sql.Identifier(schema, "true_parameters")
    found = connection.execute("select to_regclass(%s)::text", (relation.as_string(),)).fetchone()
    if found is None or found[0] is None:
        raise PgvaeError(
            f"schema '{schema}' holds no simulated shop", hint=f"make one with: pgvae simulate --schema {schema}"
        )
    parameters: dict[str, Any] = dict(
        connection.execute(sql.SQL("select key, value from {}").format(relation)).fetchall()
    )
    if parameters.get("format") != FORMAT:
        raise PgvaeError(
            f"schema '{schema}' was simulated by another version of pgvae",
            hint=f"make it again with: pgvae simulate --schema {schema} --replace",
        )
    stored = parameters["config"]
    return SimulationConfig(**(stored | {"until": date.fromisoformat(stored["until"]), "schema": schema}))


@dataclass(frozen=True, kw_only=True)
class _Past:
    """What is known at the timestamp `at`: the users by then, their habits and what they may replenish."""

    shop: Shop
    at: int
    user_id: list[Any]
    habits: Habits
    pending: Pending

    @classmethod
    def read(
        cls, connection: psycopg.Connection, schema: str, day: date | None, horizon: int, users: list[Any] | None
    ) -> _Past:
        """Reads the past of all users, or of the named ones."""
        config = stored_config(connection, schema)
        day = day or config.until
        if not config.since < day <= config.until:
            raise PgvaeError(
                f"{day} lies outside of the simulated window",
                hint=f"give a date after {config.since} and up to {config.until}",
            )
        longest = FUTURE_DAYS - 8 + (config.until - day).days
        if not 1 <= horizon <= longest:
            raise PgvaeError(f"a horizon of {horizon} days is out of range", hint=f"give from 1 to {longest} days")
        at = microseconds(day)
        shop = Shop.build(config, CONSTANTS)
        names = {
            "schema": sql.Identifier(schema),
            "users": sql.SQL("" if users is None else "and user_id = any(%(users)s)"),
        }
        values = {"users": users, "at": at}
        people = connection.execute(
            sql.SQL(
                "select user_id, interest_weights, price_group, session_rate, churn_hazard, pay_probability,"
                " (extract(epoch from churned_at - '2000-01-01 00:00+00') * 1000000)::bigint"
                " from {schema}.true_users join {schema}.users using (user_id)"
                " where registered_at < '2000-01-01 00:00+00'::timestamptz + %(at)s * interval '1 microsecond' {users}"
                " order by user_number"
            ).format(**names),
            values,
        ).fetchall()
        bought = connection.execute(
            sql.SQL(
                "select user_id, item_number, lasts_days,"
                " (extract(epoch from max(occurred_at) - '2000-01-01 00:00+00') * 1000000)::bigint"
                " from {schema}.events join {schema}.true_users using (user_id)"
                " join {schema}.true_items using (item_id)"
                " where event_type = 'purchase' and quantity > 0 and lasts_days is not null"
                " and occurred_at < '2000-01-01 00:00+00'::timestamptz + %(at)s * interval '1 microsecond' {users}"
                # What an offer of an experiment made a user buy, outside of a session, is not replenished.
                " and session_id is not null"
                " group by user_id, item_number, lasts_days"
            ).format(**names),
            values,
        ).fetchall()
        row_of = {user[0]: row for row, user in enumerate(people)}
        index_of = np.argsort(shop.catalogue.number)
        return cls(
            shop=shop,
            at=at,
            user_id=list(row_of),
            habits=Habits(
                weights=np.array([user[1] for user in people], dtype=np.float32).reshape(
                    len(people), CONSTANTS.interests
                ),
                price_group=np.array([user[2] for user in people], dtype=np.int64),
                session_rate=np.array([user[3] for user in people], dtype=float),
                churn=np.array([user[4] for user in people], dtype=float),
                pay=np.array([user[5] for user in people], dtype=float),
                churned_at=np.array([NEVER if user[6] is None else user[6] for user in people], dtype=np.int64),
            ),
            pending=Pending(
                user=np.array([row_of[purchase[0]] for purchase in bought], dtype=np.int64),
                item=index_of[np.array([purchase[1] for purchase in bought], dtype=np.int64) - 1],
                lasts=np.array([purchase[2] for purchase in bought], dtype=float),
                purchased_at=np.array([purchase[3] for purchase in bought], dtype=np.int64),
            ),
        )

    def part(self, begin: int, end: int) -> tuple[Habits, Pending]:
        """Gives the users from one row to another."""
        mine = (self.pending.user >= begin) & (self.pending.user < end)
        return (
            Habits(**{name: getattr(self.habits, name)[begin:end] for name in Habits.__dataclass_fields__}),
            Pending(
                user=self.pending.user[mine] - begin,
                item=self.pending.item[mine],
                lasts=self.pending.lasts[mine],
                purchased_at=self.pending.purchased_at[mine],
            ),
        )
