"""What the users of one block do: sessions, funnels, complements, reviews and replenishing.

Everything is drawn for all sessions of the block at once; the events come out sorted by time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.simulate.calendar import DAY
from pgvae.simulate.people import People
from pgvae.simulate.shop import Floats, Integers, Shop, cart_probability
from pgvae.simulate.words import CATEGORIES, QUERY_ADJECTIVES
from pgvae_runtime.ragged import places

SECOND = 1_000_000
STEP = 75 * SECOND  # from one viewed item of a session to the next

EVENT_TYPES = ("register", "view", "search", "add_to_cart", "purchase", "review", "share")
REGISTER, VIEW, SEARCH, CART, PURCHASE, REVIEW, SHARE = range(7)

# What people type: a category, its nouns, and adjectives with its first noun.
QUERIES_PER_CATEGORY = 8
QUERIES = tuple(
    ([kind.name.lower(), *kind.nouns, *(f"{adjective} {kind.nouns[0]}" for adjective in QUERY_ADJECTIVES)] * 2)[query]
    for kind in CATEGORIES
    for query in range(QUERIES_PER_CATEGORY)
)

# user and item are public numbers, 0 for none; price in cents, -1 for none; rating and quantity 0 for none.
Event = np.dtype(
    [
        ("at", np.int64),
        ("user", np.int64),
        ("session", np.int64),
        ("item", np.int32),
        ("price", np.int32),
        ("query", np.int32),
        ("quantity", np.int16),
        ("kind", np.int8),
        ("rating", np.int8),
    ]
)
Events = NDArray[np.void]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """The last purchase of each consumable by each user, which may be replenished.

    `user` is the row in the block, `item` the index in the catalogue.
    """

    user: Integers
    item: Integers
    lasts: Floats
    purchased_at: Integers


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """The events of one block, sorted by time, and what its users may replenish after the window.

    `sessions` counts the `visits` and the sessions that only replenish.
    """

    events: Events
    visits: int
    sessions: int
    pending: Pending


def behave(shop: Shop, people: People, rng: np.random.Generator, first_session: int) -> Behaviour:
    """Draws all events of the users of one block within the window; sessions are numbered from `first_session`."""
    constants, calendar, catalogue = shop.constants, shop.calendar, shop.catalogue
    end = np.minimum(people.churned_at, calendar.until)

    # Sessions: one at registering, then a Poisson process with the user's rate times the calendar's intensity.
    begins, ends = calendar.elapsed_at(people.registered_at), calendar.elapsed_at(end)
    visits = rng.poisson(people.session_rate * (ends - begins))
    later = np.repeat(np.arange(len(people)), visits)
    elapsed = begins[later] + rng.random(len(later)) * (ends - begins)[later]
    session_user = np.concatenate([np.arange(len(people)), later])
    session_at = np.concatenate([people.registered_at + 30 * SECOND, calendar.at_elapsed(elapsed)])
    sessions = len(session_user)
    chosen = (np.cumsum(people.weights, axis=1)[session_user] < rng.random((sessions, 1), dtype=np.float32)).sum(axis=1)
    interest = np.minimum(chosen, constants.interests - 1)
    views = rng.poisson(constants.views_per_session, sessions)

    # Views: the items of a session follow its interest, the user's price group and the week.
    session = np.repeat(np.arange(sessions), views)
    step = places(views)
    user, at = session_user[session], session_at[session]
    price_group = people.price_group[user]
    week = np.minimum(calendar.week(at), calendar.weeks_in_window - 1)
    item = shop.draw_items(rng, week, interest[session] * len(constants.price_sensitivities) + price_group)
    searched = rng.random(len(item)) < constants.search_probability
    shared = rng.random(len(item)) < constants.share_probability

    # Funnel: into the cart by affinity, price and promotion; then paid, or not, by the user's readiness.
    sensitivity = np.array(constants.price_sensitivities)[price_group]
    carted = rng.random(len(item)) < cart_probability(
        constants,
        shop.affinity[interest[session], item],
        sensitivity * catalogue.log_price[item],
        shop.discount[week, catalogue.category[item]],
    )
    paid = carted & (rng.random(len(item)) < people.pay[user])
    partner = catalogue.complement[item]
    together = (
        paid
        & (partner >= 0)
        & (catalogue.week[partner] <= week)
        & (rng.random(len(item)) < constants.complement_probability)
    )

    viewed_at = at + step * STEP + (rng.random(len(item)) * 40 * SECOND).astype(np.int64) + 12 * SECOND
    checkout_at = at + views[session] * STEP + 60 * SECOND + step * (SECOND // 2)
    bought = _Purchases.join(
        _Purchases(user=user, item=item, at=checkout_at, session=session).keep(paid),
        _Purchases(user=user, item=partner, at=checkout_at + SECOND // 4, session=session).keep(together),
    ).keep_before(end)
    again, pending = _replenish(shop, rng, bought, end, sessions)

    def rows(kind: int, mask: NDArray[np.bool_], when: Integers, what: Integers | int, **more: Any) -> Events:
        what = what if isinstance(what, int) else catalogue.number[what[mask]]
        return _events(kind, people.number[user[mask]], what, when[mask], session[mask], **more)

    phrase = rng.integers(0, QUERIES_PER_CATEGORY, int(searched.sum()))
    query = catalogue.category[item[searched]] * QUERIES_PER_CATEGORY + phrase
    everything = np.ones(len(item), dtype=bool)
    paying = _Purchases.join(bought, again)
    parts = [
        _events(REGISTER, people.number, 0, people.registered_at, np.arange(len(people))),
        rows(SEARCH, searched, viewed_at - 10 * SECOND, 0, query=query),
        rows(VIEW, everything, viewed_at, item),
        rows(SHARE, shared, viewed_at + 9 * SECOND, item),
        rows(CART, carted, viewed_at + 15 * SECOND, item),
        rows(VIEW, together, viewed_at + 20 * SECOND, partner),
        rows(CART, together, viewed_at + 26 * SECOND, partner),
        _again(shop, people, again, VIEW, -40 * SECOND),
        _again(shop, people, again, CART, -20 * SECOND),
        _paid(shop, people, rng, paying),
        _reviews(shop, people, rng, paying),
    ]
    events = np.concatenate(parts)
    ends_of = end[events["user"] - people.number[0]]
    events = events[(events["at"] < ends_of) | (events["kind"] == REGISTER)]
    events["at"] = events["at"] // 1000 * 1000
    events["session"] += np.where(events["session"] >= 0, first_session, 0)
    events = events[np.argsort(events["at"], kind="stable")]
    return Behaviour(events=events, visits=sessions, sessions=sessions + len(again.at), pending=pending)


@dataclass(frozen=True, kw_only=True)
class _Purchases:
    """Purchases by row of the user in the block, item index, time and session."""

    user: Integers
    item: Integers
    at: Integers
    session: Integers

    def keep(self, mask: NDArray[np.bool_] | Integers) -> _Purchases:
        return _Purchases(user=self.user[mask], item=self.item[mask], at=self.at[mask], session=self.session[mask])

    def keep_before(self, end: Integers) -> _Purchases:
        return self.keep(self.at < end[self.user])

    @classmethod
    def join(cls, *parts: _Purchases) -> _Purchases:
        return cls(
            user=np.concatenate([part.user for part in parts]),
            item=np.concatenate([part.item for part in parts]),
            at=np.concatenate([part.at for part in parts]),
            session=np.concatenate([part.session for part in parts]),
        )


def _replenish(
    shop: Shop, rng: np.random.Generator, bought: _Purchases, end: Integers, first_session: int
) -> tuple[_Purchases, Pending]:
    """Draws the purchases that replace what is used up.

    Each purchase of a consumable is followed, with probability `replenish_probability`, by another one of the same
    item after a Weibull time, unless the user buys that item before then anyway: that starts a new time.
    """
    constants, catalogue = shop.constants, shop.catalogue
    current = bought.keep(catalogue.lasts[bought.item] > 0)
    current = current.keep(np.lexsort((current.at, current.item, current.user)))
    same = (np.diff(current.user) == 0) & (np.diff(current.item) == 0)
    upto = end[current.user]
    upto[:-1] = np.where(same, current.at[1:], upto[:-1])

    made, last = [], [current]
    session = first_session
    while len(current.at):
        delay = catalogue.lasts[current.item] * rng.weibull(constants.replenish_shape, len(current.at))
        due = current.at + np.maximum((delay * DAY).astype(np.int64), DAY)
        happens = (rng.random(len(due)) < constants.replenish_probability) & (due < upto)
        upto = upto[happens]
        current = _Purchases(
            user=current.user[happens],
            item=current.item[happens],
            at=due[happens],
            session=session + np.arange(happens.sum()),
        )
        session += len(current.at)
        made.append(current)
        last.append(current)

    again = _Purchases.join(*made) if made else current
    every = _Purchases.join(*last)
    every = every.keep(np.lexsort((every.at, every.item, every.user)))
    final = np.ones(len(every.at), dtype=bool)
    final[:-1] = (np.diff(every.user) != 0) | (np.diff(every.item) != 0)
    every = every.keep(final)
    return again, Pending(user=every.user, item=every.item, lasts=catalogue.lasts[every.item], purchased_at=every.at)


def _paid(shop: Shop, people: People, rng: np.random.Generator, bought: _Purchases) -> Events:
    catalogue, calendar = shop.catalogue, shop.calendar
    week = np.minimum(calendar.week(bought.at), calendar.weeks_in_window - 1)
    discount = shop.discount[week, catalogue.category[bought.item]]
    price = np.rint(catalogue.price_cents[bought.item] * (1 - discount))
    quantity = 1 + rng.poisson(np.where(catalogue.lasts[bought.item] > 0, 0.6, 0.12))
    number = catalogue.number[bought.item]
    return _events(
        PURCHASE, people.number[bought.user], number, bought.at, bought.session, price=price, quantity=quantity
    )


def _again(shop: Shop, people: People, again: _Purchases, kind: int, offset: int) -> Events:
    number = shop.catalogue.number[again.item]
    return _events(kind, people.number[again.user], number, again.at + offset, again.session)


def _reviews(shop: Shop, people: People, rng: np.random.Generator, bought: _Purchases) -> Events:
    """Draws the reviews: some days after the purchase, outside of any session, rated by the user's own affinity."""
    constants, catalogue = shop.constants, shop.catalogue
    bought = bought.keep(rng.random(len(bought.at)) < constants.review_probability)
    delay = 2 + constants.review_delay_days * rng.standard_exponential(len(bought.at))
    taste = people.weights[bought.user] @ shop.interest_taste
    affinity = np.einsum("nd,nd->n", taste, catalogue.taste[bought.item])
    rating = (
        constants.rating_base
        + constants.rating_affinity * affinity
        + catalogue.quality[bought.item]
        + constants.rating_noise_sd * rng.standard_normal(len(bought.at))
    )
    return _events(
        REVIEW,
        people.number[bought.user],
        catalogue.number[bought.item],
        bought.at + (delay * DAY).astype(np.int64),
        -1,
        rating=np.clip(np.rint(rating), 1, 5),
    )


def _events(
    kind: int,
    user: Integers,
    item: Integers | int,
    at: Integers,
    session: Integers | int,
    *,
    price: Floats | int = -1,
    quantity: Integers | int = 0,
    rating: Floats | int = 0,
    query: Integers | int = -1,
) -> Events:
    events = np.empty(len(at), dtype=Event)
    events["at"], events["user"], events["session"], events["item"] = at, user, session, item
    events["kind"], events["price"], events["quantity"] = kind, price, quantity
    events["rating"], events["query"] = rating, query
    return events
