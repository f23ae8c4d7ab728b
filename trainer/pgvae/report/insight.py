"""What a version's weights say, asked with a sample of users: attention, the latent map, and how it did since."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pgvae.dataset import Dataset
from pgvae.measurement import calibration_error, measure
from pgvae.ranking import make_holdout, scorer
from pgvae.splits import MIN_USERS
from pgvae.versions import PublishedVersion, read_weights, readable
from pgvae_runtime import forward
from pgvae_runtime.errors import ScoringError
from pgvae_runtime.features import FeatureBag, feature_bag
from pgvae_runtime.tokens import AGE_BUCKETS

SAMPLE_USERS = 1000
K = 20
# A gate that fewer events stand for says little.
_MIN_EVENTS = 10


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The mean attention gate, in (0, 1), of the sample's events of one kind."""

    label: str
    mean: float
    events: int


@dataclass(frozen=True, kw_only=True)
class LatentMap:
    """Users in the plane of the two widest directions of μ.

    `points` [U, 2]; `group` [U] are rows of `groups`, whose meaning `title` says, and which may have an order;
    `explained` are the two shares of the variance of μ.
    """

    points: NDArray[np.float64]
    group: NDArray[np.int64]
    groups: list[str]
    is_ordered: bool
    title: str
    explained: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Since:
    """How the version did on what the sample's users did after its training window.

    `reliability` [B, 2] holds the probability given and the probability that it should have been, by size.
    """

    users: int
    recall: float
    reliability: NDArray[np.float64]
    error: float


@dataclass(frozen=True, kw_only=True)
class Insight:
    """What could be had of a version; `missing` says why a part is None or empty."""

    users: int = 0
    by_event_type: tuple[Gate, ...] = ()
    by_age: tuple[Gate, ...] = ()
    latent: LatentMap | None = None
    since: Since | None = None
    missing: str = ""


def look_into(connection: psycopg.Connection, version: PublishedVersion) -> Insight:
    """Runs a version on a sample of the shop's users, with the rights of the connection's role."""
    if version.format != forward.FORMAT:
        return Insight(
            missing=f"the weights have format {version.format}, this release reads format {forward.FORMAT};"
            f" pgvae {version.trainer_version} can show them"
        )
    try:
        with connection.transaction():
            weights = read_weights(connection, version.version_id)
            if not weights:
                return Insight(missing="the role may read the weights of active versions only")
            sample = _read_sample(connection, version)
    except psycopg.errors.InsufficientPrivilege as error:
        return Insight(missing=f"{error.diag.message_primary}")
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        return Insight(missing=f"the shop's tables changed: {error.diag.message_primary}")
    except ScoringError as error:
        return Insight(missing=str(error))
    assert version.window_end is not None
    until = np.nextafter(version.window_end.timestamp(), np.inf)
    before, after = sample.between(-np.inf, until), sample.between(until, np.inf)
    if not len(before.user):
        return Insight(missing="no event of the training window is left in the shop's tables")
    users = np.unique(before.user)
    by_event_type, by_age = _gates(version, weights, before, users)
    return Insight(
        users=len(users),
        by_event_type=by_event_type,
        by_age=by_age,
        latent=_latent_map(version, weights, before, users),
        since=_since(version, weights, before, after),
    )


def _read_sample(connection: psycopg.Connection, version: PublishedVersion) -> Dataset:
    """Gives the cleaned events, newer ones too, of some users who were trained on: always the same ones."""
    events = sql.Identifier(version.model, "clean_events")
    items = readable(connection, "items")
    connection.execute(
        sql.SQL(
            "create temporary table pgvae_sample on commit drop as"
            " select user_id, row_number() over (order by user_id) - 1 as number from ("
            " select user_id from {} where occurred_at <= %s group by user_id order by md5(user_id::text) limit %s) s"
        ).format(events),
        [version.window_end, SAMPLE_USERS],
    )
    rows = np.array(
        connection.execute(
            sql.SQL(
                "select s.number, i.item_index, array_position(%(types)s::text[], e.event_type) - 1,"
                " extract(epoch from e.occurred_at)::float8"
                " from {} e join pgvae_sample s using (user_id)"
                " join {} i on i.version_id = %(version_id)s and i.item_key = e.item_id::text"
                " where e.event_type = any (%(types)s) order by 1, 4, 2, 3"
            ).format(events, items),
            {"types": version.event_types, "version_id": version.version_id},
        ).fetchall(),
        dtype=np.float64,
    ).reshape(-1, 4)
    count = int(connection.execute("select count(*) from pgvae_sample").fetchall()[0][0])
    keys = connection.execute(
        sql.SQL("select item_key from {} where version_id = %s order by item_index").format(items),
        [version.version_id],
    ).fetchall()
    return Dataset(
        user=rows[:, 0].astype(np.int64),
        item=rows[:, 1].astype(np.int64),
        event_type=rows[:, 2].astype(np.int64),
        occurred_at=rows[:, 3],
        weight=np.ones(len(rows), dtype=np.float32),
        item_keys=[key for (key,) in keys],
        event_types=version.event_types,
        user_count=count,
        user_features=_read_features(connection, version, count),
    )


def _read_features(connection: psycopg.Connection, version: PublishedVersion, count: int) -> FeatureBag:
    pipeline = version.pipeline("users")
    if not pipeline.size:
        return FeatureBag.empty(count)
    documents: list[list[str]] = [[] for _ in range(count)]
    query = sql.SQL("select s.number, f.features::text from {} f join pgvae_sample s using (user_id)")
    for number, document in connection.execute(query.format(sql.Identifier(version.model, "user_features"))):
        documents[number].append(document)
    return feature_bag(pipeline, documents)


def _gates(
    version: PublishedVersion, weights: forward.Weights, events: Dataset, users: NDArray[np.int64]
) -> tuple[tuple[Gate, ...], tuple[Gate, ...]]:
    tokens = events.history(users).tokens(version.max_history)
    gates = forward.encoder_gates(weights, tokens, forward.embed(weights, tokens))

    def means(kind: NDArray[np.int64], labels: list[str]) -> tuple[Gate, ...]:
        counts = np.bincount(kind, minlength=len(labels))
        sums = np.bincount(kind, weights=gates, minlength=len(labels))
        return tuple(
            Gate(label=label, mean=float(total / count), events=int(count))
            for label, total, count in zip(labels, sums, counts, strict=True)
            if count >= _MIN_EVENTS
        )

    return means(tokens.event_type, version.event_types), means(tokens.age, AGES)


def _ages() -> list[str]:
    """Gives what the age buckets hold, in days: bucket b those from 2^b - 1 to 2^(b + 1) - 2."""
    labels = ["< 1 day"]
    for bucket in range(1, AGE_BUCKETS):
        first, last = 2**bucket - 1, 2 ** (bucket + 1) - 2
        labels.append(f"{first}–{last} days" if bucket < AGE_BUCKETS - 1 else f"{first} days or more")
    return labels


AGES = _ages()


def _latent_map(
    version: PublishedVersion, weights: forward.Weights, events: Dataset, users: NDArray[np.int64]
) -> LatentMap | None:
    """Gives the first two principal components of μ (Pearson 1901); None for fewer than three users or one latent."""
    history = events.history(users)
    mean = np.asarray(forward.encode(weights, history.tokens(version.max_history)), dtype=np.float64)
    if len(mean) < 3 or mean.shape[1] < 2:
        return None
    mean -= mean.mean(axis=0)
    left, singular, right = np.linalg.svd(mean, full_matrices=False)
    # The sign of a component is arbitrary; fixed, two reports of one version look alike.
    sign = np.sign(right[np.arange(2), np.abs(right[:2]).argmax(axis=1)])
    variance = singular**2 / max(float((singular**2).sum()), 1e-30)
    group, groups, is_ordered, title = _groups(events, users)
    return LatentMap(
        points=left[:, :2] * singular[:2] * sign,
        group=group,
        groups=groups,
        is_ordered=is_ordered,
        title=title,
        explained=(float(variance[0]), float(variance[1])),
    )


def _groups(events: Dataset, users: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str], bool, str]:
    """Gives a group of each user: the main event type where that tells users apart, else how much they did."""
    row = np.searchsorted(users, events.user)
    counts = np.zeros((len(users), len(events.event_types)))
    np.add.at(counts, (row, events.event_type), 1)
    main = counts.argmax(axis=1)
    shares = np.bincount(main, minlength=len(events.event_types)) / len(users)
    if np.count_nonzero(shares >= 0.1) > 1:
        kept = np.flatnonzero(shares > 0)
        names = [events.event_types[number] for number in kept]
        return np.searchsorted(kept, main), names, False, "most frequent kind of event"
    edges = np.unique(np.quantile(counts.sum(axis=1), [0.25, 0.5, 0.75]).astype(np.int64))
    low = [1, *(edges + 1)]
    labels = [f"{a}–{b} events" if a < b else f"{a} events" for a, b in zip(low[:-1], edges, strict=True)]
    labels.append(f"{low[-1]} events or more")
    return np.searchsorted(edges, counts.sum(axis=1)), labels, True, "number of events"


def _since(version: PublishedVersion, weights: forward.Weights, before: Dataset, after: Dataset) -> Since | None:
    """Judges the version by new target events after its training window; None where too few users have one."""
    # The version knows its whole catalogue, whatever the sample bought.
    holdout = make_holdout(before, after, item_share=np.ones(len(before.item_keys)))
    if len(holdout.users) < MIN_USERS:
        return None
    measured = measure(holdout, scorer(weights, version.max_history), (K,), are_probabilities=True)
    assert measured.reliability is not None
    return Since(
        users=len(holdout.users),
        recall=float(measured.values["recall", K].mean()),
        reliability=measured.reliability / len(holdout.users),
        error=calibration_error(measured.reliability),
    )
