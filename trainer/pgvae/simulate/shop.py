"""The shop itself: its catalogue, its seasons, and the probability of each choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgvae.simulate.calendar import DAY, WEEK, Calendar
from pgvae.simulate.config import Constants, SimulationConfig, random_stream
from pgvae.simulate.words import ADJECTIVES, BRANDS, BRANDS_PER_CATEGORY, CATEGORIES

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The items, sorted by category and then by the week from which they can be bought; every array is (items,).

    `number` is the public number of an item, from 1 on, in an order that tells nothing. `complement` is the index of
    the item that goes with it, or -1. `lasts` is the scale of the replenishing time in days, 0 for what is kept.
    `log_price` is relative to the category's median.
    """

    category: Integers
    week: Integers
    number: Integers
    brand: Integers
    adjective: Integers
    noun: Integers
    listed_at: Integers
    price_cents: Integers
    log_price: Floats
    taste: NDArray[np.float32]
    appeal: Floats
    quality: Floats
    lasts: Floats
    complement: Integers

    def __len__(self) -> int:
        return len(self.category)

    @classmethod
    def build(cls, config: SimulationConfig, constants: Constants, calendar: Calendar) -> tuple[Catalogue, Floats]:
        """Gives the catalogue and the taste vectors of the categories, shape (categories, dimensions)."""
        rng = random_stream(config.seed, "catalogue")
        items, kinds = config.item_count, len(CATEGORIES)

        shares = rng.dirichlet(np.full(kinds, 8.0))
        category = np.concatenate([np.arange(kinds), rng.choice(kinds, size=items - kinds, p=shares)])
        late = rng.random(items) < constants.new_item_share
        late[:kinds] = False  # each category sells something from the first day
        week = np.where(late, rng.integers(1, calendar.weeks_in_window, size=items), 0)
        order = np.lexsort((week, category))
        category, week = category[order], week[order]

        within_week = (rng.random(items) * WEEK).astype(np.int64)
        long_ago = (rng.random(items) * constants.older_item_days * DAY).astype(np.int64)
        listed_at = calendar.since + np.where(week > 0, week * WEEK - within_week, -long_ago)

        brands_of = np.argsort(rng.random((kinds, len(BRANDS))), axis=1)[:, :BRANDS_PER_CATEGORY]
        brand = brands_of[category, rng.integers(0, BRANDS_PER_CATEGORY, size=items)]
        centres = rng.standard_normal((kinds, constants.dimensions))
        brand_taste = rng.standard_normal((len(BRANDS), constants.dimensions))
        taste = (
            centres[category]
            + constants.brand_pull * brand_taste[brand]
            + constants.item_noise * rng.standard_normal((items, constants.dimensions))
        )
        centre = taste.mean(axis=0)
        taste, centres = taste - centre, centres - centre

        log_price = constants.price_sd * rng.standard_normal(items)
        median = np.array([kind.median_price for kind in CATEGORIES])[category]
        price_cents = np.maximum(np.rint(median * np.exp(log_price) * 10).astype(np.int64) * 10 - 1, 9)

        nouns = np.array([len(kind.nouns) for kind in CATEGORIES])[category]
        lasts = np.array([kind.lasts for kind in CATEGORIES], dtype=float)[category]
        return (
            cls(
                category=category,
                week=week,
                number=rng.permutation(items) + 1,
                brand=brand,
                adjective=rng.integers(0, len(ADJECTIVES), size=items),
                noun=(rng.random(items) * nouns).astype(np.int64),
                listed_at=listed_at,
                price_cents=price_cents,
                log_price=np.log(price_cents / 100 / median),
                taste=taste.astype(np.float32),
                appeal=constants.appeal_sd * rng.standard_normal(items),
                quality=constants.rating_quality_sd * rng.standard_normal(items),
                lasts=lasts * np.exp(0.15 * rng.standard_normal(items)),
                complement=_complements(rng, category, constants.complement_share),
            ),
            centres,
        )


def _complements(rng: np.random.Generator, category: Integers, share: float) -> Integers:
    """Gives each item's complement, a random item of the category that goes with its own, or -1."""
    names = [kind.name for kind in CATEGORIES]
    goes_with = np.array([names.index(kind.goes_with) for kind in CATEGORIES])[category]
    first = np.searchsorted(category, goes_with, side="left")
    last = np.searchsorted(category, goes_with, side="right")
    partner = first + (rng.random(len(category)) * (last - first)).astype(np.int64)
    return np.asarray(np.where(rng.random(len(category)) < share, partner, -1))


@dataclass(frozen=True, kw_only=True)
class Shop:
    """The catalogue with everything that decides a choice.

    A group is an interest and a price group together: group = interest * price groups + price group. Shapes:
    `interest_taste` (interests, dimensions), `affinity` (interests, items), `discount` (weeks, categories),
    `first` (categories,), `last` (weeks, categories): the items of a category that are on sale in a week are
    first <= item < last. `item_cdf` (groups * items,) is, per group, group + the cumulated share of the items'
    weights; `category_cdf` (weeks, groups, categories) likewise with week * groups + group; `cart_mean`
    (groups, weeks) is the mean probability that a viewed item of that group and week goes into the cart.
    """

    config: SimulationConfig
    constants: Constants
    calendar: Calendar
    catalogue: Catalogue
    interest_taste: NDArray[np.float32]
    interest_prior: Floats
    affinity: NDArray[np.float32]
    discount: Floats
    first: Integers
    last: Integers
    item_cdf: Floats
    category_cdf: Floats
    cart_mean: Floats

    @classmethod
    def build(cls, config: SimulationConfig, constants: Constants) -> Shop:
        """Gives the shop of a configuration; the same configuration gives the same shop."""
        calendar = Calendar.build(config.since, config.until)
        catalogue, centres = Catalogue.build(config, constants, calendar)
        interest_taste, affinity = _interests(config, constants, catalogue, centres)
        interest_prior = random_stream(config.seed, "interests").dirichlet(np.full(constants.interests, 6.0))
        # Over the whole crowd the affinities cancel, so that the appeal alone decides how popular an item is.
        appeal = catalogue.appeal - np.log(interest_prior @ np.exp(constants.affinity_weight * affinity))
        discount = _promotions(config, constants, calendar)

        kinds = np.arange(len(CATEGORIES))
        first = np.searchsorted(catalogue.category, kinds)
        # Sorted by (category, week), the items on sale by a week are a prefix of their category.
        keys = catalogue.category * calendar.weeks + catalogue.week
        last = np.searchsorted(keys, kinds * calendar.weeks + np.arange(calendar.weeks)[:, None], side="right")

        season = np.array([[kind.peak, kind.amplitude] for kind in CATEGORIES])
        season_log = season[:, 1] * np.cos(2 * np.pi * (calendar.day_of_year[:, None] - season[:, 0]) / 365.25)

        sensitivities = constants.price_sensitivities
        groups, items = constants.interests * len(sensitivities), len(catalogue)
        item_cdf = np.empty((groups, items))
        category_cdf = np.empty((calendar.weeks, groups, len(CATEGORIES)))
        cart_mean = np.empty((groups, calendar.weeks))
        for interest in range(constants.interests):
            for price_group, sensitivity in enumerate(sensitivities):
                group = interest * len(sensitivities) + price_group
                weight = np.exp(
                    appeal + constants.affinity_weight * affinity[interest] - sensitivity * catalogue.log_price
                )
                cart = cart_probability(constants, affinity[interest], sensitivity * catalogue.log_price)
                mass = np.concatenate([[0.0], np.cumsum(weight)])
                cart_mass = np.concatenate([[0.0], np.cumsum(weight * cart)])
                item_cdf[group] = group + mass[1:] / mass[-1]

                response = np.exp(season_log) * (1 - discount) ** -sensitivity
                share = (mass[last] - mass[first]) * response
                cart_share = (cart_mass[last] - cart_mass[first]) * response * (1 + constants.promotion_lift * discount)
                total = share.sum(axis=1)
                category_cdf[:, group] = np.cumsum(share, axis=1) / total[:, None]
                cart_mean[group] = cart_share.sum(axis=1) / total
        category_cdf[..., -1] = 1.0
        category_cdf += np.arange(calendar.weeks * groups).reshape(calendar.weeks, groups, 1)
        return cls(
            config=config,
            constants=constants,
            calendar=calendar,
            catalogue=catalogue,
            interest_taste=interest_taste,
            interest_prior=interest_prior,
            affinity=affinity,
            discount=discount,
            first=first,
            last=last,
            item_cdf=item_cdf.ravel(),
            category_cdf=category_cdf.ravel(),
            cart_mean=cart_mean,
        )

    def draw_items(self, rng: np.random.Generator, week: Integers, group: Integers) -> Integers:
        """Draws an item for each (week, group): a category first, then an item of it that is on sale."""
        kinds, items = len(CATEGORIES), len(self.catalogue)
        groups = len(self.cart_mean)
        row = week * groups + group
        category = _inverse(self.category_cdf, row + rng.random(len(row))) - row * kinds
        category = np.clip(category, 0, kinds - 1)
        first, last = self.first[category], self.last[week, category]
        base = group * items
        below = np.where(first > 0, self.item_cdf[base + first - 1], group)
        upto = self.item_cdf[base + last - 1]
        found = _inverse(self.item_cdf, below + rng.random(len(row)) * (upto - below)) - base
        return np.asarray(np.clip(found, first, last - 1))

    def item_shares(self, week: int, group: int) -> Floats:
        """Gives the probability of each item to be the one that draw_items draws, shape (items,)."""
        kinds, items, groups = len(CATEGORIES), len(self.catalogue), len(self.cart_mean)
        row = week * groups + group
        of_category = np.diff(self.category_cdf[row * kinds : (row + 1) * kinds], prepend=row)
        weight = np.diff(self.item_cdf[group * items : (group + 1) * items], prepend=group)
        weight = np.where(self.catalogue.week <= week, weight, 0.0)
        on_sale = np.bincount(self.catalogue.category, weights=weight, minlength=kinds)
        return np.asarray(weight / on_sale[self.catalogue.category] * of_category[self.catalogue.category])


def cart_probability(
    constants: Constants, affinity: NDArray[np.float32], price_pain: Floats, discount: Floats | float = 0.0
) -> Floats:
    """Gives the probability that a viewed item goes into the cart; `price_pain` is sensitivity * log relative price."""
    logit = constants.cart_intercept + constants.cart_affinity * affinity - constants.cart_price * price_pain
    return np.asarray(constants.cart_ceiling / (1 + np.exp(-logit)) * (1 + constants.promotion_lift * discount))


def _interests(
    config: SimulationConfig, constants: Constants, catalogue: Catalogue, centres: Floats
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gives the interests' taste vectors, scaled so that the affinity over the catalogue has standard deviation 1."""
    rng = random_stream(config.seed, "tastes")
    shuffled = np.argsort(rng.random((constants.interests, len(CATEGORIES))), axis=1)
    taste = centres[shuffled[:, : constants.categories_per_interest]].sum(axis=1) + rng.standard_normal(
        (constants.interests, constants.dimensions)
    )
    scale = (taste @ catalogue.taste.T).std(axis=1)
    taste = (taste / scale[:, None]).astype(np.float32)
    return taste, taste @ catalogue.taste.T


def _promotions(config: SimulationConfig, constants: Constants, calendar: Calendar) -> Floats:
    """Gives the discount of each category in each week, mostly 0; shape (weeks, categories)."""
    rng = random_stream(config.seed, "promotions")
    shape = (calendar.weeks, len(CATEGORIES))
    depth = np.array(constants.promotion_discounts)[rng.integers(0, len(constants.promotion_discounts), size=shape)]
    return np.where(rng.random(shape) < constants.promotion_probability, depth, 0.0)


def _inverse(cdf: Floats, values: Floats) -> Integers:
    """Gives the first position whose cumulated weight exceeds each value.

    Sorted values walk through the table in order: 5 times faster than at random where it exceeds the caches.
    """
    order = np.argsort(values)
    found = np.empty(len(values), dtype=np.int64)
    found[order] = np.searchsorted(cdf, values[order], side="right")
    return found
