"""Time in the simulated shop: when people come, and which week and season it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray

# Timestamps are microseconds since 2000-01-01 00:00 UTC, which is what PostgreSQL stores and its binary COPY reads.
DAY = 86_400_000_000
WEEK = 7 * DAY
HOUR = DAY // 24
EPOCH = date(2000, 1, 1)

# Beyond the window, so that the truth about a horizon of up to a year after it can be computed.
FUTURE_DAYS = 366

WEEKDAYS = np.array([1.0, 0.92, 0.94, 1.0, 1.05, 1.12, 1.17])  # Monday first
MONTHS = np.array([0.92, 0.9, 0.95, 0.97, 1.0, 0.96, 0.9, 0.92, 1.0, 1.05, 1.25, 1.3])
HOURS = np.array(
    [4, 2, 1, 1, 1, 2, 4, 7, 9, 10, 11, 12, 13, 12, 11, 11, 12, 14, 17, 20, 22, 19, 13, 8],
    dtype=float,
)


def microseconds(day: date) -> int:
    """Gives the timestamp of 00:00 UTC of a day."""
    return (day - EPOCH).days * DAY


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """The intensity of visits over the window and a year beyond it.

    `intensity` (hours,) has mean about 1; `elapsed` (hours + 1,) is its integral in days: a user with session rate r
    makes on average r * (elapsed at b - elapsed at a) sessions between a and b.
    """

    since: int
    until: int
    intensity: NDArray[np.float64]
    elapsed: NDArray[np.float64]
    weeks: int
    weeks_in_window: int
    day_of_year: NDArray[np.float64]

    @classmethod
    def build(cls, since: date, until: date) -> Calendar:
        """Gives the calendar of a window of whole days."""
        days = (until - since).days + FUTURE_DAYS
        dates = [since + timedelta(days=day) for day in range(days)]
        daily = np.array([WEEKDAYS[day.weekday()] * MONTHS[day.month - 1] for day in dates])
        intensity = (daily[:, None] * HOURS / HOURS.mean()).ravel()
        weeks = days // 7 + 1
        midweek = [since + timedelta(days=7 * week + 3) for week in range(weeks)]
        return cls(
            since=microseconds(since),
            until=microseconds(until),
            intensity=intensity,
            elapsed=np.concatenate([[0.0], np.cumsum(intensity / 24)]),
            weeks=weeks,
            weeks_in_window=-(-(until - since).days // 7),
            day_of_year=np.array([day.timetuple().tm_yday for day in midweek], dtype=float),
        )

    def elapsed_at(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Gives the integral of the intensity from `since` to each timestamp, in days."""
        hours = (at - self.since) / HOUR
        return np.interp(hours, np.arange(len(self.elapsed), dtype=float), self.elapsed)

    def at_elapsed(self, elapsed: NDArray[np.float64]) -> NDArray[np.int64]:
        """Gives the timestamps at which the integral of the intensity reaches the values: the inverse of elapsed_at."""
        hours = np.interp(elapsed, self.elapsed, np.arange(len(self.elapsed), dtype=float))
        return np.asarray(self.since + (hours * HOUR).astype(np.int64))

    def week(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gives the number of the week of each timestamp; week 0 begins with the window."""
        return np.asarray((at - self.since) // WEEK)

    def daily(self, first: int, days: int) -> NDArray[np.float64]:
        """Gives the integral of the intensity over each of `days` days from day number `first`, shape (days,)."""
        hours = self.elapsed[24 * first : 24 * (first + days) + 1 : 24]
        return np.diff(hours)
