"""What the caller chooses about a simulated shop, and the constants of its formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Literal, get_args

import numpy as np

from pgvae.errors import PgvaeError

KeyType = Literal["bigint", "integer", "uuid", "text"]

# Rows of events that one block of users is meant to make: it bounds the memory, and it is part of the data's
# definition (each block has its own random stream), so it is no option.
BLOCK_EVENTS = 262_144

# An experiment takes the newest 112 days; before it there must be customers.
LEAST_EXPERIMENT_DAYS = 168

EARLIEST, LATEST = date(1990, 1, 1), date(2200, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The numbers in the formulas of docs/simulator.md; each simulation stores them in true_parameters."""

    dimensions: int = 16
    interests: int = 24
    categories_per_interest: int = 3
    brand_pull: float = 0.45
    item_noise: float = 0.65

    # Choice: exp(appeal + affinity_weight * affinity - sensitivity * log(relative price) + season).
    appeal_sd: float = 0.85
    affinity_weight: float = 2.8
    price_sensitivities: tuple[float, ...] = (0.3, 1.0, 2.0)
    price_group_shares: tuple[float, ...] = (0.3, 0.45, 0.25)
    price_sd: float = 0.5

    # Interests of a user: Dirichlet(interest_concentration * prior of the country).
    interest_concentration: float = 0.9

    # Funnel: views of a session ~ Poisson; cart = cart_ceiling * sigmoid(...) * (1 + promotion_lift * discount).
    views_per_session: float = 4.0
    search_probability: float = 0.28
    share_probability: float = 0.03
    cart_ceiling: float = 0.6
    cart_intercept: float = -1.6
    cart_affinity: float = 0.8
    cart_price: float = 0.4
    promotion_probability: float = 0.06
    promotion_discounts: tuple[float, ...] = (0.1, 0.2, 0.3)
    promotion_lift: float = 1.5
    pay_alpha: float = 4.0
    pay_beta: float = 4.0

    # After a purchase.
    review_probability: float = 0.15
    review_delay_days: float = 7.0
    rating_base: float = 3.3
    rating_affinity: float = 0.45
    rating_quality_sd: float = 0.5
    rating_noise_sd: float = 0.6
    complement_share: float = 0.6
    complement_probability: float = 0.3
    replenish_probability: float = 0.65
    replenish_shape: float = 3.0

    # An offer of an experiment makes its user buy: offer_ceiling * pay * sigmoid(offer_pull * affinity - threshold).
    offer_ceiling: float = 0.5
    offer_pull: float = 1.5
    offer_threshold: float = 1.5

    # Activity and lifetime.
    session_rate_shape: float = 0.6
    churn_shape: float = 2.0
    churn_mean_per_day: float = 1 / 180
    newsletter_share: float = 0.35
    newsletter_session_factor: float = 1.3
    newsletter_churn_factor: float = 0.6
    registration_exponent: float = 1.3

    # Catalogue.
    new_item_share: float = 0.2
    older_item_days: float = 1000.0

    dirt_shares: tuple[tuple[str, float], ...] = (
        ("duplicate", 0.25),
        ("null_user", 0.05),
        ("null_item", 0.05),
        ("unknown_type", 0.10),
        ("future_timestamp", 0.05),
        ("epoch_timestamp", 0.05),
        ("orphan_user", 0.10),
        ("orphan_item", 0.10),
        ("bot", 0.15),
        ("return", 0.10),
    )


CONSTANTS = Constants()


def today_utc() -> date:
    """Gives the current date in UTC."""
    return datetime.now(UTC).date()


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """The size, the window and the form of a simulated shop; PgvaeError where a value makes no sense.

    `items` None means a number scaled from `users`. `until` is exclusive, at 00:00 UTC. `chunk_rows` is how many rows
    are encoded and sent at a time: it changes the memory and the speed, never the data.
    """

    users: int = 10_000
    items: int | None = None
    days: int = 365
    events_per_user: float = 40.0
    seed: int = 0
    until: date = field(default_factory=today_utc)
    schema: str = "sim"
    key_type: KeyType = "bigint"
    dirt: float = 0.0
    experiment: float = 0.0
    replace: bool = False
    chunk_rows: int = 65_536

    def __post_init__(self) -> None:
        _in_range("users", self.users, 10, 10_000_000)
        if self.items is not None:
            _in_range("items", self.items, 20, 2_000_000)
        _in_range("days", self.days, 28, 3650)
        _in_range("events per user", self.events_per_user, 12, 2000)
        _in_range("seed", self.seed, 0, 2**63 - 1)
        _in_range("dirt", self.dirt, 0, 0.5)
        _in_range("experiment", self.experiment, 0, 1)
        if self.experiment and self.days < LEAST_EXPERIMENT_DAYS:
            raise PgvaeError(
                f"an experiment does not fit into {self.days} days",
                hint=f"give --days {LEAST_EXPERIMENT_DAYS} or more: it takes the newest 112 days",
            )
        _in_range("chunk rows", self.chunk_rows, 1, 1_000_000)
        if isinstance(self.until, datetime) or not isinstance(self.until, date):
            raise PgvaeError(f"until {self.until!r} is not a date", hint="give a date such as 2026-01-31")
        if not EARLIEST <= self.until <= LATEST:
            raise PgvaeError(f"until {self.until} is out of range", hint=f"give a date from {EARLIEST} to {LATEST}")
        if self.key_type not in get_args(KeyType):
            kinds = ", ".join(get_args(KeyType))
            raise PgvaeError(f"unknown key type '{self.key_type}'", hint=f"choose one of {kinds}")
        if not self.schema or "\0" in self.schema or len(self.schema.encode()) > 63:
            raise PgvaeError(f"schema '{self.schema}' is no name", hint="give a name of 1 to 63 bytes, such as sim")

    @property
    def since(self) -> date:
        """The first day of the window."""
        return self.until - timedelta(days=self.days)

    @property
    def item_count(self) -> int:
        """The number of items: the caller's, else min(users / 5, 40 * sqrt(users)), at least 50."""
        return self.items or max(50, min(self.users // 5, int(40 * math.sqrt(self.users))))

    @property
    def block_users(self) -> int:
        """The number of users of one block: a power of two, so that a block makes about BLOCK_EVENTS rows."""
        return int(2 ** math.floor(math.log2(BLOCK_EVENTS / self.events_per_user)))

    @property
    def blocks(self) -> int:
        """The number of blocks of users."""
        return -(-self.users // self.block_users)


def random_stream(seed: int, name: str, number: int = 0) -> np.random.Generator:
    """Gives the random stream of one part of one simulation; streams of other names or numbers are independent."""
    return np.random.default_rng(np.random.SeedSequence([seed, int.from_bytes(name.encode(), "big"), number]))


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses nan
        raise PgvaeError(f"{name} {value} is out of range", hint=f"give a number from {low} to {high}")
