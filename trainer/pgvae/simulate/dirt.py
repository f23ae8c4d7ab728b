"""What is wrong with a real shop's events: rows added to the clean ones, never changes of them."""

from __future__ import annotations

import numpy as np

from pgvae.simulate.behaviour import EVENT_TYPES, PURCHASE, SECOND, VIEW, Event, Events
from pgvae.simulate.calendar import DAY
from pgvae.simulate.shop import Shop

UNKNOWN_TYPES = ("wishlist", "PageView", "purchase_v2", "hover", "")
UNIX_EPOCH = -10_957 * DAY  # 1970-01-01, counted from 2000-01-01
ORPHANS = 1_000_000  # ids of orphans lie within this distance beyond the last real one
BOT_BURST = 2000  # views of a bot in one go, one a second


def add_dirt(
    shop: Shop, rng: np.random.Generator, clean: Events, bot: int, users: int
) -> tuple[Events, np.ndarray[tuple[int], np.dtype[np.int8]]]:
    """Gives the events with the dirt among them, sorted by time, and what each is: -1 clean, else the kind of dirt.

    The kinds are the positions in `dirt_shares`. `bot` is the user number of the block's bot, `users` the number of
    rows of the users table.
    """
    config, calendar = shop.config, shop.calendar
    parts, labels = [clean], [np.full(len(clean), -1, dtype=np.int8)]
    for label, (kind, share) in enumerate(shop.constants.dirt_shares):
        wanted = int(config.dirt * share * len(clean) + rng.random())
        if kind == "bot":
            rows = _bot(shop, rng, bot, wanted)
        else:
            of_items, of_purchases = clean["item"] > 0, clean["kind"] == PURCHASE
            pool = of_purchases if kind == "return" else of_items if kind in ("null_item", "orphan_item") else None
            numbers = np.arange(len(clean)) if pool is None else np.flatnonzero(pool)
            rows = clean[rng.choice(numbers, size=min(wanted, len(numbers)), replace=False)]
            count = len(rows)
            if kind == "null_user":
                rows["user"] = 0
            elif kind == "null_item":
                rows["item"] = 0
            elif kind == "unknown_type":
                rows["kind"] = len(EVENT_TYPES) + rng.integers(0, len(UNKNOWN_TYPES), count)
            elif kind == "future_timestamp":
                rows["at"] = calendar.until + DAY + (rng.random(count) * 3650 * DAY).astype(np.int64) // 1000 * 1000
            elif kind == "epoch_timestamp":
                rows["at"] = UNIX_EPOCH
            elif kind == "orphan_user":
                rows["user"] = users + 1 + rng.integers(0, ORPHANS, count)
            elif kind == "orphan_item":
                rows["item"] = len(shop.catalogue) + 1 + rng.integers(0, ORPHANS, count)
            elif kind == "return":
                rows["quantity"] = -rows["quantity"]
                room = np.minimum(calendar.until - rows["at"], 21 * DAY)
                rows["at"] += np.maximum((rng.random(count) * room).astype(np.int64) // 1000 * 1000, 0)
                rows["session"] = -1
        parts.append(rows)
        labels.append(np.full(len(rows), label, dtype=np.int8))
    events, label_of = np.concatenate(parts), np.concatenate(labels)
    order = np.argsort(events["at"], kind="stable")
    return events[order], label_of[order]


def _bot(shop: Shop, rng: np.random.Generator, bot: int, count: int) -> Events:
    """Gives the views of a bot: bursts of one a second over random items."""
    calendar = shop.calendar
    bursts = -(-count // BOT_BURST)
    begin = calendar.since + (rng.random(bursts) * (calendar.until - calendar.since - DAY)).astype(np.int64)
    step = np.arange(count)
    rows = np.zeros(count, dtype=Event)
    rows["at"] = (begin[step // BOT_BURST] + step % BOT_BURST * SECOND) // 1000 * 1000
    rows["user"], rows["session"], rows["kind"] = bot, -1, VIEW
    rows["item"] = rng.integers(1, len(shop.catalogue) + 1, count)
    rows["price"], rows["query"] = -1, -1
    return rows
