"""What the SQL functions about one user or one session call. A first call of a session imports no more than this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import forward, lists
from .entry import checked_k, translated
from .filters import Filters
from .history import read_history
from .options import TRUE_OR_FALSE, Option, from_0_to_1, named, read_options
from .scoring import score_again
from .session import GivenEvent, events_from_arrays, events_from_json, read_session, split_features
from .store import active_version

_RECOMMEND_OPTIONS = {
    "exclude_seen": TRUE_OR_FALSE,
    "candidates": named("""give the name of a candidate set, as in {"candidates": "in_stock"}"""),
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
) -> list[lists.ProbableRow]:
    """Gives (rank, item_key, score, is_cold_start, model_version, probability) of one user's best items.

    The probability is None where the version has no heads, and for a user without events.
    """
    k = checked_k(k)
    filters = _filters(options)
    if user_key is None:
        return []
    version = active_version(plpy, model_id)
    history = read_history(plpy, version, user_key, all_items=True)
    candidates = lists.chosen_candidates(plpy, version, filters)
    (rows,) = lists.probable_lists(plpy, version, history, k, filters, candidates)
    return rows


@translated
def recommend_for_users(
    plpy: Any, model_id: int, user_keys: list[str | None] | None, k: int | None, options: str | None
) -> Iterator[tuple[str, int, str, float, bool, int, float | None]]:
    """Gives (user_key, …) of the rows of `recommend` for each of these users; none for null."""
    k = checked_k(k)
    filters = _filters(options)
    if user_keys is None:
        return iter(())
    return lists.lists_of_users(plpy, active_version(plpy, model_id), user_keys, k, filters)


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
    history = read_session(plpy, version, events, features)
    candidates = lists.chosen_candidates(plpy, version, filters)
    ((rows, _),) = lists.best_lists(plpy, version, history, k, filters, candidates)
    return rows


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
