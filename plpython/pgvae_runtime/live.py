"""What the SQL functions about one user or one session call. A first call of a session imports no more than this."""

from __future__ import annotations

from typing import Any

from . import churn, forward, outcomes
from .entry import checked_k, translated
from .filters import Filters, best_items, keep_candidates, read_candidates
from .history import read_history
from .options import TRUE_OR_FALSE, Option, from_0_to_1, read_options
from .scoring import mask_seen, score_again, score_users
from .session import GivenEvent, events_from_arrays, events_from_json, read_session, split_features
from .store import Version, active_version
from .tokens import History

_RECOMMEND_OPTIONS = {
    "exclude_seen": TRUE_OR_FALSE,
    "candidates": Option(
        accepts=lambda value: isinstance(value, str),
        hint="""give the name of a candidate set, as in {"candidates": "in_stock"}""",
    ),
    "at_most": Option(
        accepts=lambda value: (
            isinstance(value, dict)
            and all(isinstance(cap, int) and not isinstance(cap, bool) and cap >= 1 for cap in value.values())
        ),
        hint="""give columns of the items' table with 1 or more, as in {"at_most": {"category": 3}}""",
    ),
    "min_score": from_0_to_1("score"),
}


@translated
def recommend(
    plpy: Any, model_id: int, user_key: str | None, k: int | None, options: str | None
) -> list[tuple[int, str, float, bool, int, float | None]]:
    """Gives (rank, item_key, score, is_cold_start, model_version, probability) of one user's best items.

    The probability is None where the version has no heads, and for a user without events.
    """
    k = checked_k(k)
    filters = _filters(options)
    if user_key is None:
        return []
    version = active_version(plpy, model_id)
    # Whoever buys something that is newer than the version is no less likely to buy again.
    history = read_history(plpy, version, user_key, all_items=True)
    items, rows, shares = _best(plpy, version, history.of_known_items(version.catalogue_size), k, filters)
    probabilities: list[float | None] = [None] * len(rows)
    if outcomes.has_heads(version.weights) and history.counts[0]:
        found, _ = churn.look_ahead(version, history)
        own = shares[:, items]
        probabilities = outcomes.item_probability(version.weights, found, own)[0].tolist()
    return [(*row, probability) for row, probability in zip(rows, probabilities, strict=True)]


def _best(
    plpy: Any, version: Version, history: History, k: int, filters: Filters
) -> tuple[list[int], list[tuple[int, str, float, bool, int]], Any]:
    """Gives the best items for the history of one user, the rows of `recommend` about them, without the probability,
    and the shares of the whole catalogue, [1, I]; of items that are left out they may be -1.
    """
    scores, cold = score_users(version.weights, history, max_history=version.max_history)
    shares = scores.copy() if filters.candidates is not None else scores
    if filters.candidates is not None:
        candidates = read_candidates(plpy, version, filters.candidates)
        assert candidates is not None  # A name gives a set, or an error.
        keep_candidates(scores, candidates)
    if filters.exclude_seen:
        mask_seen(scores, history, version.targets)
    best = best_items(plpy, version, scores, k, filters)
    items = [item for item, _ in best]
    keys = version.item_keys.of_items(items)
    rows = [
        (rank, keys[item], value, bool(cold[0]), version.version) for rank, (item, value) in enumerate(best, start=1)
    ]
    return items, rows, shares


@translated
def recommend_for(
    plpy: Any, model_id: int, events: str | None, k: int | None, options: str | None
) -> list[tuple[int, str, float, bool, int]]:
    """Gives the rows of `recommend` for a session: a JSON array of events, see session.events_from_json."""
    return _recommend_session(plpy, model_id, None if events is None else events_from_json(events), k, options)


@translated
def recommend_for_items(
    plpy: Any,
    model_id: int,
    item_keys: list[str | None] | None,
    event_types: list[str | None] | None,
    times: list[float | None] | None,
    k: int | None,
    options: str | None,
) -> list[tuple[int, str, float, bool, int]]:
    """Gives the rows of `recommend` for a session of parallel arrays; times are in seconds since 1970."""
    events = None if item_keys is None else events_from_arrays(item_keys, event_types, times)
    return _recommend_session(plpy, model_id, events, k, options)


def _recommend_session(
    plpy: Any, model_id: int, events: list[GivenEvent] | None, k: int | None, options: str | None
) -> list[tuple[int, str, float, bool, int]]:
    k = checked_k(k)
    features, others = split_features(options)
    filters = _filters(others)
    if events is None:
        return []
    version = active_version(plpy, model_id)
    return _best(plpy, version, read_session(plpy, version, events, features), k, filters)[1]


@translated
def score(plpy: Any, model_id: int, user_key: str | None, item_key: str | None) -> float | None:
    """Gives the score of one item for one user, as `recommend` does; None for an item outside the catalogue."""
    if user_key is None or item_key is None:
        return None
    version = active_version(plpy, model_id)
    item = version.item_keys.item(item_key)
    if item is None:
        return None
    return float(score_again(version, read_history(plpy, version, user_key))[0, item])


@translated
def embedding(plpy: Any, model_id: int, user_key: str | None) -> list[float] | None:
    """Gives the user's latent position, the mean of q(z | x), Z numbers; None for a user without known events."""
    if user_key is None:
        return None
    version = active_version(plpy, model_id)
    history = read_history(plpy, version, user_key)
    if not history.counts[0]:
        return None
    mean: list[float] = forward.encode(version.weights, history.tokens(version.max_history))[0].tolist()
    return mean


def _filters(options: str | None) -> Filters:
    return Filters(**read_options(options, _RECOMMEND_OPTIONS, '{"exclude_seen": false}'))
