"""What goes with what: the model asked with a history of nothing but these items, set against what is asked for anyway.

Three numbers of an item j beside given items: its share π(j | given) of the model's probability, its lift, which is
that share over the mean share π(j) of the catalogue's items, and its support, the users who have both. The share alone
ranks best sellers first, the lift alone what hardly anybody buys; the order is by share × lift = π(j | given)² / π(j),
the PMI² of Daille (1994), which lies between (Role and Nadif 2011).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, forward, limits, runs
from .errors import INVALID_PARAMETER, OUT_OF_MEMORY, ScoringError
from .history import item_type, not_in_catalogue, unknown_items
from .literals import array_element
from .scoring import score_users
from .session import check_flat, default_type, null_in_array
from .store import Version, execute
from .tokens import History

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

ORDERS = ("balanced", "score", "lift")
# Mean shares over this many items differ by some per cent from those over all, and take a tenth of a second of a
# session's first call with 20 000 items.
_SAMPLE = 256
_SAMPLE_BATCH = 64
# Support is counted for this many of the best before those below min_support are left out.
_COUNTED = 200
_KEPT_BASELINES = 4
# The shares of a batch of items take at most this much memory.
_SHARES_BYTES = 64 * 1024 * 1024
# What a pair of a user and an item bought needs in the arrays of _buyers, at most.
_BYTES_OF_A_PAIR = 24

_SUPPORT = """
select s.item_id::text as item_key, s.support
from {schema}.support($1::{key_type}[], $2::{key_type}[], $3) s
"""
_BOUGHT = """
select array_agg(distinct i.item_index) as items
from {schema}.refresh_events e
join vae_private.scoring_items i on i.version_id = $1 and i.item_key = e.item_id::text
where e.event_type = any ($2)
group by e.user_id
"""

# Of the versions that this session asked last.
_baselines: OrderedDict[int, Floats] = OrderedDict()


def baseline(version: Version) -> Floats:
    """Gives the mean share of each item over histories of one event, [I], the events' items drawn by popularity.

    It takes items at equal distances on the axis of cumulated popularity, so that it is the same in every session. In
    contrast to the popularity itself it is positive for items without an event, too.
    """
    if (known := _baselines.get(version.version_id)) is not None:
        return known
    cumulated = np.cumsum(version.weights["item_popularity"], dtype=np.float64)
    places = (np.arange(_SAMPLE) + 0.5) / _SAMPLE * cumulated[-1]
    items = np.minimum(np.searchsorted(cumulated, places), version.item_count - 1)
    total = np.zeros(version.item_count, dtype=np.float64)
    for first in range(0, _SAMPLE, _SAMPLE_BATCH):
        total += _shares(version, items[first : first + _SAMPLE_BATCH]).sum(axis=0)
    # Above what underflows: lifts are quotients.
    _baselines[version.version_id] = np.maximum(total / _SAMPLE, 1e-30).astype(np.float32)
    while len(_baselines) > _KEPT_BASELINES:
        _baselines.popitem(last=False)
    return _baselines[version.version_id]


def _shares(version: Version, items: Integers) -> Any:
    """Gives the shares of all items for histories of one of `items` each, [len(items), I]."""
    scores, _ = score_users(version.weights, _one_event_each(version, items), max_history=version.max_history)
    return scores


def _one_event_each(version: Version, items: Integers) -> History:
    count = len(items)
    return History(
        counts=np.ones(count, dtype=np.int64),
        item=items,
        event_type=np.full(count, default_type(version, "purchase")),
        occurred_at=np.zeros(count),
    )


def chosen_order(order: str, shares: Any, base: Any) -> Any:
    """Gives what is ranked by, largest first, in the shape of `shares`."""
    if order == "score":
        return shares.copy()
    return shares / base if order == "lift" else shares * (shares / base)


def given_items(plpy: Any, version: Version, name: str, keys: Sequence[str | None]) -> list[int]:
    """Gives the rows of given items, each once; ScoringError where there is none, or none of the catalogue."""
    if not keys:
        raise ScoringError(
            f"{name} is an empty array", sqlstate=INVALID_PARAMETER, hint="give at least one item, as in: array[7, 8]"
        )
    check_flat(name, keys)
    texts = [key for key in keys if key is not None]
    if len(texts) < len(keys):
        raise null_in_array(name, keys.index(None))
    known = version.item_keys.items(texts)
    unknown = [key for key in texts if key not in known]
    if not known:
        raise unknown_items(version, unknown)
    if unknown:
        plpy.notice(f"{not_in_catalogue(version, unknown)}: left out")
    return sorted(known.values())


def related(
    plpy: Any, version: Version, items: Sequence[int], event_type: int, k: int, order: str, min_support: int
) -> list[tuple[int, str, float, float, int]]:
    """Gives (rank, item_key, score, lift, support) of the k items that go best with the given ones."""
    count = len(items)
    history = History(
        counts=np.array([count]),
        item=np.array(items, dtype=np.int64),
        event_type=np.full(count, event_type),
        occurred_at=np.zeros(count),
    )
    scores, _ = score_users(version.weights, history, max_history=version.max_history)
    base = baseline(version)
    ranking = chosen_order(order, scores, base)
    ranking[:, items] = -1.0
    wanted = max(k, _COUNTED) if min_support else k
    best, values = forward.top_k(ranking, wanted)
    found = [item for item, value in zip(best[0].tolist(), values[0].tolist(), strict=True) if value >= 0]
    keys = version.item_keys.of_items({*items, *found})
    support = _support(plpy, version, [keys[item] for item in items], [keys[item] for item in found])
    kept = [item for item in found if support.get(keys[item], 0) >= min_support][:k]
    return [
        (rank, keys[item], float(scores[0, item]), float(scores[0, item] / base[item]), support.get(keys[item], 0))
        for rank, item in enumerate(kept, start=1)
    ]


def _support(plpy: Any, version: Version, items: Sequence[str], found: Sequence[str]) -> dict[str, int]:
    """Gives for found items how many users have a target event on them and on one of the given ones, with the rights of
    the caller.
    """
    rows = execute(
        plpy,
        _SUPPORT.format(schema=plpy.quote_ident(version.model), key_type=item_type(plpy, version)),
        ["text[]", "text[]", "text[]"],
        [list(items), list(found), _target_names(version)],
    )
    return {row["item_key"]: row["support"] for row in rows}


def _target_names(version: Version) -> list[str]:
    return [name for name, index in version.event_types.items() if index in version.targets]


def related_all(plpy: Any, version: Version, k: int) -> Iterator[tuple[str, str, str, str, str, int]]:
    """Gives (item_key, item_keys, scores, lifts, supports, model_version) of each item, the lists as array literals."""
    with blas.threads(limits.max_threads(plpy)):
        keys = version.item_keys.all()
        literals = [array_element(key) for key in keys]
        base = baseline(version)
        start, users, user_count = _buyers(plpy, version)
        bought = np.zeros(user_count, dtype=bool)
        # Shares, what the softmax makes of them, and the ranking.
        size = limits.users_at_once(plpy, 4 * 4 * version.item_count, max(1, _SHARES_BYTES // (4 * version.item_count)))
        for first in range(0, len(keys), size):
            items = np.arange(first, min(first + size, len(keys)))
            shares = _shares(version, items)
            ranking = chosen_order(ORDERS[0], shares, base)
            ranking[np.arange(len(items)), items] = -1.0
            # The item itself stands last; where it is among the k, the catalogue is no larger.
            best, _ = forward.top_k(ranking, k)
            best = best[:, : min(k, len(keys) - 1)]
            scores = np.take_along_axis(shares, best, axis=1)
            lifts = scores / base[best]
            for place, item in enumerate(items.tolist()):
                own = users[start[item] : start[item + 1]]
                bought[own] = True
                both = [int(bought[users[start[other] : start[other + 1]]].sum()) for other in best[place].tolist()]
                bought[own] = False
                yield (
                    keys[item],
                    "{" + ",".join([literals[other] for other in best[place].tolist()]) + "}",
                    "{" + ",".join([f"{value:.9g}" for value in scores[place].tolist()]) + "}",
                    "{" + ",".join([f"{value:.9g}" for value in lifts[place].tolist()]) + "}",
                    "{" + ",".join(map(str, both)) + "}",
                    version.version,
                )
            runs.report_progress(plpy, f"pgvae {version.model}: {first + len(items)} items related")
        runs.record(version, "related_items", len(keys))


def _buyers(plpy: Any, version: Version) -> tuple[Integers, NDArray[np.int32], int]:
    """Gives the users who have a target event on each item: item i's are users[start[i]] to users[start[i + 1]]."""
    plan = plpy.prepare(_BOUGHT.format(schema=plpy.quote_ident(version.model)), ["bigint", "text[]"])
    cursor = plpy.cursor(plan, [version.version_id, _target_names(version)])
    parts: list[NDArray[np.int32]] = []
    counts: list[int] = []
    limit, pairs = limits.max_memory(plpy), 0
    allowed = max(limit - _SHARES_BYTES, limit // 2) // _BYTES_OF_A_PAIR
    while rows := cursor.fetch(10_000):
        own = [len(row["items"]) for row in rows]
        pairs += sum(own)
        # Beyond what may be held they are only counted, so that the error can say how many there are.
        if pairs <= allowed:
            counts += own
            parts.append(np.fromiter(chain.from_iterable(row["items"] for row in rows), np.int32, count=sum(own)))
    if pairs > allowed:
        needed = pairs * _BYTES_OF_A_PAIR + _SHARES_BYTES
        raise ScoringError(
            f"vae.max_memory is {limit >> 20}MB, and who bought what, {pairs} pairs, needs {-(-needed >> 20)}MB",
            sqlstate=OUT_OF_MEMORY,
            hint=f"raise it: set vae.max_memory = '{-(-needed >> 20)}MB'",
        )
    item = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    del parts
    order = np.argsort(item, kind="stable")
    start = np.searchsorted(item[order], np.arange(version.item_count + 1))
    return start, np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order], len(counts)
