"""What all other SQL functions call: one entry point each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import audience as audiences
from . import batch, churn, device, explanations, pairs, runs, sales, segments
from .entry import checked_k, translated
from .errors import INVALID_PARAMETER, INVALID_TRANSACTION_TERMINATION, NO_DEMAND, NO_OUTCOMES, ScoringError
from .explain import explain_item
from .filters import read_candidates, restricted
from .gpu_costs import Work
from .history import read_history, unknown_items
from .options import TRUE_OR_FALSE, from_0_to_1, named, one_of, read_options, whole_number
from .related import ORDERS, given_items
from .related import related as find_related
from .related import related_all as relate_all
from .session import default_type
from .store import active_version

_EXPLAIN_OPTIONS = {"by": one_of("event", "item")}


@translated
def explain(
    plpy: Any, model_id: int, user_key: str | None, item_key: str | None, options: str | None
) -> list[tuple[Any, ...]]:
    """Gives (rank, part, item_key, event_type, at, contribution, relevance, gate, share, model_version) of each part of
    one item's logit for one user.
    """
    by = read_options(options, _EXPLAIN_OPTIONS, '{"by": "item"}').get("by", "event")
    if user_key is None or item_key is None:
        return []
    version = active_version(plpy, model_id)
    item = version.item_keys.item(item_key)
    if item is None:
        raise unknown_items(version, [item_key])
    history = read_history(plpy, version, user_key)
    parts = explain_item(version.weights, history, item, max_history=version.max_history, by_item=by == "item")
    names = {index: name for name, index in version.event_types.items()}
    keys = version.item_keys.of_items(part.item for part in parts if part.item is not None)
    speaks_for = sum(max(part.contribution, 0.0) for part in parts if part.item is not None)
    return [
        (
            rank,
            part.part,
            None if part.item is None else keys[part.item],
            None if part.event_type is None else names[part.event_type],
            part.at,
            None if part.contribution != part.contribution else part.contribution,
            None if part.relevance != part.relevance else part.relevance,
            part.gate,
            max(part.contribution, 0.0) / speaks_for if part.item is not None and speaks_for > 0 else None,
            version.version,
        )
        for rank, part in enumerate(parts, start=1)
    ]


@translated
def because(plpy: Any, model_id: int, user_key: str | None, item_key: str | None) -> str | None:
    """Gives the sentence that says why an item is recommended to a user; None for null."""
    if user_key is None or item_key is None:
        return None
    version = active_version(plpy, model_id)
    item = version.item_keys.item(item_key)
    if item is None:
        raise unknown_items(version, [item_key])
    return explanations.because(plpy, version, user_key, item)


@translated
def explain_all(plpy: Any, model_id: int) -> Iterator[explanations.Row]:
    """Gives a row per user for a materialized view, see explanations.explanations_of_all."""
    return explanations.explanations_of_all(plpy, active_version(plpy, model_id))


_RELATED_OPTIONS = {"min_support": whole_number(0), "rank_by": one_of(*ORDERS)}


@translated
def related(
    plpy: Any, model_id: int, item_key: str | None, k: int | None, options: str | None
) -> list[tuple[int, str, float, float, int, int]]:
    """Gives (rank, item_key, score, lift, support, model_version) of what goes best with an item."""
    return _related(plpy, model_id, None if item_key is None else [item_key], "purchase", k, options)


@translated
def basket(
    plpy: Any, model_id: int, item_keys: list[str | None] | None, k: int | None, options: str | None
) -> list[tuple[int, str, float, float, int, int]]:
    """Gives the rows of `related` for a cart of several items."""
    return _related(plpy, model_id, item_keys, "add_to_cart", k, options)


def _related(
    plpy: Any,
    model_id: int,
    item_keys: Sequence[str | None] | None,
    event_type: str,
    k: int | None,
    options: str | None,
) -> list[tuple[int, str, float, float, int, int]]:
    k = checked_k(k)
    chosen = read_options(options, _RELATED_OPTIONS, '{"min_support": 5}')
    if item_keys is None:
        return []
    version = active_version(plpy, model_id)
    items = given_items(plpy, version, "items", item_keys)
    rows = find_related(
        plpy,
        version,
        items,
        default_type(version, event_type, "purchase"),
        k,
        chosen.get("rank_by", ORDERS[0]),
        chosen.get("min_support", 0),
    )
    return [(*row, version.version) for row in rows]


@translated
def related_all(plpy: Any, model_id: int, k: int | None) -> Iterator[tuple[str, str, str, str, str, int]]:
    """Gives a row per item for a materialized view, see related.related_all."""
    version = active_version(plpy, model_id)
    return relate_all(plpy, version, checked_k(k))


@translated
def score_pairs(
    plpy: Any, model_id: int, user_keys: list[str | None] | None, item_keys: list[str | None] | None
) -> Iterator[pairs.Row]:
    """Gives (user_key, item_key, score) of each pair, see pairs.score_pairs; none for null."""
    if user_keys is None or item_keys is None:
        return iter(())
    return pairs.score_pairs(plpy, active_version(plpy, model_id), user_keys, item_keys)


@translated
def segment(plpy: Any, model_id: int, user_key: str | None) -> list[tuple[Any, ...]]:
    """Gives (segment, segment_name, similarity, is_cold_start, model_version) of one user, in one row."""
    if user_key is None:
        return []
    return [segments.segment_one(plpy, active_version(plpy, model_id), user_key)[1:]]


@translated
def segment_all(plpy: Any, model_id: int) -> Iterator[segments.Row]:
    """Gives a row per user for a materialized view, see segments.segment_all."""
    return segments.segment_all(plpy, active_version(plpy, model_id))


@translated
def last_run(plpy: Any, model_id: int, view: str) -> list[tuple[int, int | None, int, str, str | None]]:
    """Gives this session's last complete run for a prediction view, see runs.Run, once; no row without one."""
    run = runs.take(model_id, view)
    return [(run.row_count, run.version, run.scored_count, run.mode, run.left_out)] if run else []


@translated
def record_run(
    plpy: Any, model_id: int, view: str, row_count: int, version: int | None, scored_count: int, mode: str
) -> None:
    """Remembers a run whose rows SQL put together, see runs.Run."""
    runs.keep(model_id, view, runs.Run(row_count=row_count, version=version, scored_count=scored_count, mode=mode))


@translated
def verify(plpy: Any, model_id: int, version_id: int) -> list[dict[str, Any]]:
    """Gives a row a device: whether a version gives its golden users the scores of its training, see verify.verify."""
    # Imported here: live calls never need it.
    from .verify import verify as run

    return run(plpy, model_id, version_id)


@translated
def release_gpu(plpy: Any) -> bool:
    """Gives back all that this session holds of a GPU, see gpu.release; False if it holds nothing."""
    # Imported here: a session that uses no GPU does not pay for it.
    from . import gpu

    return gpu.release()


@translated
def commit_refresh(plpy: Any) -> None:
    """Commits; ScoringError inside a transaction block."""
    try:
        plpy.commit()
    except plpy.spiexceptions.InvalidTransactionTermination:
        raise ScoringError(
            "a refresh commits, and cannot run inside a transaction block",
            sqlstate=INVALID_TRANSACTION_TERMINATION,
            hint="call it alone in autocommit mode (psycopg: connect(..., autocommit=True)),"
            " or from a terminal: pgvae refresh",
        ) from None


@translated
def recommend_all(
    plpy: Any, model_id: int, k: int | None, chosen: list[str] | None = None
) -> Iterator[batch.DigestedRow]:
    """Gives a row per user, or per user of the chosen keys, for a materialized view, see batch.recommend_all."""
    k = checked_k(k)
    version = active_version(plpy, model_id)
    candidates = read_candidates(plpy, version, None)
    if candidates:
        version = restricted(version, candidates)
    count = version.user_count if chosen is None else len(chosen)
    gpu = device.choose(plpy, Work.of(count, version.weights), k)
    return batch.recommend_all(plpy, gpu, version, k, chosen)


@translated
def demand(plpy: Any, model_id: int, item_key: str | None) -> list[sales.Row]:
    """Gives the forecast of one item's demand, see sales.Row; none for null."""
    if item_key is None:
        return []
    return [sales.demand_of_item(plpy, sales.forecaster(plpy, model_id), item_key)]


@translated
def demand_all(plpy: Any, model_id: int) -> Iterator[sales.Row]:
    """Gives the forecasts of all items, for a materialized view; none where the version has none, and a notice."""
    try:
        found = sales.forecaster(plpy, model_id)
    except ScoringError as error:
        if error.sqlstate != NO_DEMAND:
            raise
        return _empty(plpy, model_id, "demand", error)
    return sales.demand_of_all(plpy, found)


@translated
def churn_of_user(plpy: Any, model_id: int, user_key: str | None) -> list[churn.Row]:
    """Gives what one user will do within the horizon, see churn.Row; none for null."""
    if user_key is None:
        return []
    return [churn.churn_of_user(plpy, churn.version_with_heads(plpy, model_id), user_key)]


@translated
def explain_churn(plpy: Any, model_id: int, user_key: str | None) -> list[tuple[int, str, float, int]]:
    """Gives (rank, reason, contribution, model_version) of what speaks most for no purchase of one user."""
    if user_key is None:
        return []
    version = churn.version_with_heads(plpy, model_id)
    return churn.explained(version, read_history(plpy, version, user_key, all_items=True))


@translated
def churn_all(plpy: Any, model_id: int) -> Iterator[churn.Row]:
    """Gives the same of all users, for a materialized view; none where the version has no heads, and a notice."""
    try:
        version = churn.version_with_heads(plpy, model_id)
    except ScoringError as error:
        if error.sqlstate != NO_OUTCOMES:
            raise
        return _empty(plpy, model_id, "churn", error)
    return churn.churn_of_all(plpy, version)


def _empty(plpy: Any, model_id: int, view: str, error: ScoringError) -> Iterator[Any]:
    """Gives no row of a prediction view, says why, and remembers that this is what the active version has to say."""
    plpy.notice(f"{error.message}; the view stays empty", hint=error.hint)
    runs.record(active_version(plpy, model_id), view, 0)
    return iter(())


@translated
def response(plpy: Any, model_id: int, user_key: str | None, item_keys: list[str | None] | None) -> float | None:
    """Gives P(a user buys one of the items within the horizon); None for null, and for a user without events."""
    if user_key is None or item_keys is None or item_keys == [None]:
        return None
    version = churn.version_with_heads(plpy, model_id)
    items = audiences.offered_items(version, "items", item_keys)
    return audiences.response_of(plpy, version, user_key, items)


@translated
def uplift(plpy: Any, model_id: int, user_key: str | None, item_key: str | None) -> float | None:
    """Gives by how much an offer raises P(a user buys an item); None for null, and where it is not known."""
    if user_key is None or item_key is None:
        return None
    version = churn.version_with_heads(plpy, model_id)
    items = audiences.offered_items(version, "items", [item_key])
    return audiences.uplift_of_user(plpy, version, user_key, items)


@translated
def offer_audiences(plpy: Any, model_id: int) -> Iterator[audiences.OfferRow]:
    """Gives the users of all offers, for a materialized view; none where the version has no heads, and a notice."""
    offers = audiences.read_offers(plpy, model_id)
    if not offers:
        runs.record(active_version(plpy, model_id), "offer_responses", 0)
        return iter(())
    try:
        version = churn.version_with_heads(plpy, model_id)
    except ScoringError as error:
        if error.sqlstate != NO_OUTCOMES:
            raise
        return _empty(plpy, model_id, "offer_responses", error)
    return audiences.offer_audiences(plpy, version, offers)


_AUDIENCE_OPTIONS = {
    "exclude_buyers": TRUE_OR_FALSE,
    "min_probability": from_0_to_1("probability"),
    "rank_by": one_of(audiences.RESPONSE, audiences.UPLIFT),
    "among": named("""give the name of a relation, as in {"among": "public.subscribers"}"""),
    "among_key": named("give the name of its column of users"),
}
_MOST_USERS = 10_000_000


@translated
def audience(
    plpy: Any, model_id: int, item_keys: list[str | None] | None, k: int | None, options: str | None
) -> Iterator[audiences.Row]:
    """Gives the k users who are likeliest to buy one of the items, see audience.Row; none for null."""
    if k is None or not 1 <= k <= _MOST_USERS:
        raise ScoringError(
            f"k is {'null' if k is None else k}",
            sqlstate=INVALID_PARAMETER,
            hint=f"ask for 1 to {_MOST_USERS} users, as in: k => 1000",
        )
    chosen = read_options(options, _AUDIENCE_OPTIONS, '{"exclude_buyers": true}')
    if "among_key" in chosen and "among" not in chosen:
        raise ScoringError(
            f"option 'among_key' is {chosen['among_key']!r}, and 'among' is not given",
            sqlstate=INVALID_PARAMETER,
            hint=f"name the relation whose column it is: {_AUDIENCE_OPTIONS['among'].hint}",
        )
    if item_keys is None or item_keys == [None]:
        return iter(())
    version = churn.version_with_heads(plpy, model_id)
    items = audiences.offered_items(version, "items", item_keys)
    rank_by = chosen.get("rank_by", audiences.RESPONSE)
    if rank_by == audiences.UPLIFT:
        audiences.check_uplift(version, "rank_by", len(items))
    relation, column = chosen.pop("among", None), chosen.pop("among_key", None)
    among = None if relation is None else audiences.read_users(plpy, version, relation, column)
    return audiences.audience_of(plpy, version, audiences.Criteria(items=items, k=k, among=among, **chosen))
