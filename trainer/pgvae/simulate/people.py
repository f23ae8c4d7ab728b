"""The users of one block: what they like, how often they come, how long they stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgvae.simulate.calendar import DAY
from pgvae.simulate.config import random_stream
from pgvae.simulate.shop import Floats, Integers, Shop
from pgvae.simulate.words import (
    AGE_GROUPS,
    CHANNEL_PAYS,
    CHANNEL_SHARES,
    CHANNELS,
    COUNTRIES,
    COUNTRY_SHARES,
)

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class People:
    """The users of one block; every array has one row per user.

    `number` is the public number, from 1 on. `weights` (users, interests) sums to 1. `session_rate` is per day before
    the calendar's intensity, `churn` the hazard per day, `pay` the probability that what is in the cart gets paid.
    `churned_at` is the timestamp of leaving, also where it lies after the window.
    """

    number: Integers
    registered_at: Integers
    country: Integers
    channel: Integers
    age_group: Integers
    newsletter: NDArray[np.bool_]
    weights: NDArray[np.float32]
    price_group: Integers
    session_rate: Floats
    churn: Floats
    pay: Floats
    churned_at: Integers

    def __len__(self) -> int:
        return len(self.number)

    @property
    def cluster(self) -> Integers:
        """The strongest interest of each user."""
        return np.asarray(np.argmax(self.weights, axis=1))


def draw_people(shop: Shop, rng: np.random.Generator, first_number: int, count: int, rate_scale: float) -> People:
    """Draws users; `rate_scale` is the mean session rate of a user without the newsletter."""
    constants, calendar = shop.constants, shop.calendar
    traits = random_stream(shop.config.seed, "traits")
    tilt = traits.dirichlet(shop.interest_prior * constants.interests, size=len(COUNTRIES))
    ages = traits.dirichlet(np.full(len(AGE_GROUPS), 0.7), size=constants.interests)

    country = _choose(rng, np.array(COUNTRY_SHARES), count)
    channel = _choose(rng, np.array(CHANNEL_SHARES), count)
    prior = 0.5 * shop.interest_prior + 0.5 * tilt
    weights = rng.standard_gamma(constants.interest_concentration * prior[country]) + 1e-9
    weights /= weights.sum(axis=1, keepdims=True)
    cumulated = np.cumsum(ages[np.argmax(weights, axis=1)], axis=1)
    newsletter = rng.random(count) < constants.newsletter_share

    window = calendar.until - calendar.since
    registered = calendar.since + (window * rng.random(count) ** constants.registration_exponent).astype(np.int64)
    session_rate = rate_scale * rng.standard_gamma(constants.session_rate_shape, count) / constants.session_rate_shape
    churn = constants.churn_mean_per_day * rng.standard_gamma(constants.churn_shape, count) / constants.churn_shape
    churn = np.maximum(churn, 1e-5) * np.where(newsletter, constants.newsletter_churn_factor, 1.0)
    pay = rng.beta(constants.pay_alpha, constants.pay_beta, count) * np.array(CHANNEL_PAYS)[channel]
    lifetime = rng.standard_exponential(count) / churn  # days
    return People(
        number=first_number + np.arange(count, dtype=np.int64),
        registered_at=registered // 1000 * 1000,
        country=country,
        channel=channel,
        age_group=np.minimum((cumulated < rng.random((count, 1))).sum(axis=1), len(AGE_GROUPS) - 1),
        newsletter=newsletter,
        weights=weights.astype(np.float32),
        price_group=_choose(rng, np.array(constants.price_group_shares), count),
        session_rate=session_rate * np.where(newsletter, constants.newsletter_session_factor, 1.0),
        churn=churn,
        pay=np.minimum(pay, 0.95),
        churned_at=registered // 1000 * 1000 + (np.minimum(lifetime, 1e6) * DAY).astype(np.int64),
    )


def _choose(rng: np.random.Generator, shares: Floats, count: int) -> Integers:
    return np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(count)).astype(np.int64)


assert len(CHANNELS) == len(CHANNEL_SHARES) == len(CHANNEL_PAYS)
