"""Segments: users clustered in latent space, with names, and with the same numbers from one version to the next.

Each user's mean of q(z | x) is taken as a direction. k-means finds the centroids (Lloyd 1982, seeded by k-means++,
Arthur and Vassilvitskii 2007); of several numbers of segments the one with the best simplified silhouette is taken
(Hruschka et al. 2006). Where the active version has segments, k-means begins with these, too, and what comes out is
taken while it separates about as well. The new ones take over the numbers and names of those that they have most users
in common with (Kuhn 1955). docs/segments.md tells it for people.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.versions import read_version, read_weights, readable
from pgvae_runtime.features import FeatureColumn
from pgvae_runtime.forward import FORMAT
from pgvae_runtime.ragged import ranges
from pgvae_runtime.segments import CENTROIDS, directions
from pgvae_runtime.tokens import History

# Users that centroids are fitted on, and that the silhouette is measured on; of more, so many by chance.
_MAX_USERS = 20_000
_MAX_SAMPLE = 5_000
# Segments of fewer users dissolve, unless their number is asked for.
_MIN_USERS = 10
_FEWEST, _MOST = 4, 12
_RESTARTS = 3
_ITERATIONS = 50
_ENCODED = 1024
# The share of the silhouette of segments found anew that those of the version before must have to go on. On a
# simulated shop of 3 000 users, with networks of other seeds and of older events, they had .965 to 1.017; half as many
# as are best had .88.
_ABOUT_AS_WELL = 0.95
# A label belongs to a segment where so many users of it have it, and by so much more often than all users.
_MIN_SUPPORT = 5
_MIN_LIFT = 1.2
_LABELS = 5
# Segments are the same where this share of the users of both is in both: of two of one size, half of the users.
_SAME = 1 / 3
_NAMELESS = "mixed tastes"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One segment, as a row of vae.segments.

    `share` is of the users that were clustered, `mean_events` how many events they have, `similarity` the mean cosine
    of its users and the centroid, `overlap` the share of users in both this segment and the one of the same number in
    the version before, of those in either; None: it is new.
    """

    segment: int
    name: str
    share: float
    mean_events: float
    top_categories: str
    similarity: float
    overlap: float | None


@dataclass(frozen=True, kw_only=True)
class Segments:
    """S segments and their centroids, [S, Z], of length 1, in the order of `rows`."""

    centroids: NDArray[np.float32]
    rows: tuple[Segment, ...] = ()

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Gives the tensors of a version with these segments; none where there are no segments."""
        return {CENTROIDS: self.centroids} if self.rows else {}


NO_SEGMENTS = Segments(centroids=np.zeros((0, 0), dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class Previous:
    """The segments of the active version and what assigns users to them. `highest` is the highest number ever used."""

    weights: dict[str, NDArray[Any]]
    item_keys: list[str]
    event_types: list[str]
    user_pipeline: dict[str, Any]
    names: list[tuple[int, str]]
    highest: int


def read_previous(connection: psycopg.Connection, model: str) -> Previous | None:
    """Gives the segments of the model's active version; None where there are none, or of a format of other code."""
    found = connection.execute(
        "select v.version_id, v.version, (select max(a.segment) from vae.segments a"
        " join vae.versions w using (version_id) where w.model_id = v.model_id)"
        " from vae.versions v join vae.models m using (model_id)"
        " where m.name = %s and v.state = 'active' and v.format = %s"
        " and exists (select from vae.segments s where s.version_id = v.version_id)",
        [model, FORMAT],
    ).fetchone()
    if found is None:
        return None
    version_id, number, highest = found
    version = read_version(connection, model, number)
    items = connection.execute(
        sql.SQL("select item_key from {} where version_id = %s order by item_index").format(
            readable(connection, "items")
        ),
        [version_id],
    ).fetchall()
    names = connection.execute(
        "select segment, name from vae.segments where version_id = %s order by place", [version_id]
    ).fetchall()
    weights = read_weights(connection, version_id)
    if not items or len(weights.get(CENTROIDS, ())) != len(names):
        return None
    return Previous(
        weights=weights,
        item_keys=[key for (key,) in items],
        event_types=version.event_types,
        user_pipeline=version.pipeline("users").to_json(),
        names=names,
        highest=highest,
    )


def find_segments(
    dataset: Dataset,
    weights: dict[str, NDArray[Any]],
    config: TrainingConfig,
    *,
    max_history: int,
    previous: Previous | None = None,
) -> Segments:
    """Clusters the users of a dataset by a trained network; the same arguments give the same segments."""
    if config.segments == 0:
        return NO_SEGMENTS
    users = _sample(dataset.user_count, _MAX_USERS, config.seed)
    own, _ = _directions(weights, [dataset.history(part) for part in _parts(users)], max_history)
    before = _places_before(previous, dataset, users, max_history) if previous else None
    # Two threads of OpenBLAS would wait for each other in hundreds of small products, on a busy machine for seconds.
    with threadpool_limits(1, user_api="blas"):
        centroids = _cluster(own, config, before, len(previous.names) if previous else 0)
    places, similarity = nearest(own, centroids)
    # The largest first.
    order = np.argsort(-np.bincount(places, minlength=len(centroids)), kind="stable")
    centroids, places = centroids[order], np.argsort(order)[places]
    labels = _characteristics(dataset, users, places, len(centroids))
    kept = _kept(previous, places, before, len(centroids)) if previous and before is not None else {}
    highest = previous.highest if previous else 0
    events = dataset.rows_of(users)[1]
    taken = {name for _, name, _ in kept.values()}
    rows = []
    for place in range(len(centroids)):
        if place in kept:
            number, name, overlap = kept[place]
        else:
            highest += 1
            number, name, overlap = highest, "", None
        if not name or (labels[place] and name.startswith(_NAMELESS)):
            name = _name(labels[place], taken)
            taken.add(name)
        own_users = places == place
        rows.append(
            Segment(
                segment=number,
                name=name,
                share=float(own_users.mean()),
                mean_events=float(events[own_users].mean()),
                top_categories=", ".join(f"{label} {lift:.1f}×" for label, lift in labels[place]),
                similarity=float(similarity[own_users].mean()),
                overlap=overlap,
            )
        )
    return Segments(centroids=centroids, rows=tuple(rows))


def nearest(own: NDArray[np.float32], centroids: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Gives each user's nearest centroid and the cosine with it, both [U]."""
    cosines = own @ centroids.T
    places = cosines.argmax(axis=1)
    return places, cosines[np.arange(len(own)), places]


def silhouette(own: NDArray[np.float32], centroids: NDArray[np.float32]) -> float:
    """Gives the mean over users of (b - a) / b, where a and b are the distances, 1 - cosine, to the nearest centroid
    and to the second nearest; 0 for a single one.
    """
    if len(centroids) < 2:
        return 0.0
    a, b = np.partition(1.0 - own @ centroids.T, 1, axis=1)[:, :2].T
    return float(((b - a) / np.maximum(b, 1e-9)).mean())


def _sample(count: int, most: int, seed: int) -> NDArray[np.int64]:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _parts(users: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.array_split(users, max(1, -(-len(users) // _ENCODED)))


def _directions(
    weights: dict[str, NDArray[Any]], histories: Sequence[History], max_history: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    found = [directions(weights, history, max_history=max_history) for history in histories]
    return np.concatenate([own for own, _ in found]), np.concatenate([known for _, known in found])


def _cluster(
    own: NDArray[np.float32], config: TrainingConfig, before: NDArray[np.int64] | None, count_before: int
) -> NDArray[np.float32]:
    """Gives the centroids, [S, Z]: going out from the segments of before, or of several numbers of them the best.

    Where no number is asked for, the segments of before go on only while they separate about as well as new ones: else
    their number could fall, as segments dissolve, and never rise, whatever new tastes come.
    """
    from_before = None
    if before is not None and config.segments in (None, count_before):
        known = [own[before == place] for place in range(count_before)]
        if all(len(part) for part in known):
            from_before = _lloyd(own, np.stack([part.mean(axis=0) for part in known]))
            if config.segments:
                return from_before
            from_before = _large_ones(own, from_before)
    sample = own[_sample(len(own), _MAX_SAMPLE, config.seed)]
    fresh = _search(own, sample, config)
    if from_before is None or silhouette(sample, from_before) < _ABOUT_AS_WELL * silhouette(sample, fresh):
        return fresh
    return from_before


def _search(own: NDArray[np.float32], sample: NDArray[np.float32], config: TrainingConfig) -> NDArray[np.float32]:
    """Gives the centroids, [S, Z], that separate best of those of several numbers, or of the number asked for."""
    most = min(_MOST, len(own) // _MIN_USERS)
    counts = [config.segments] if config.segments else range(max(1, min(_FEWEST, most)), max(1, most) + 1)
    generator = np.random.default_rng(config.seed)
    tried = [_lloyd(sample, _seeds(sample, count, generator)) for count in counts for _ in range(_RESTARTS)]
    if not config.segments:
        tried = [_large_ones(sample, centroids) for centroids in tried]
    found = _lloyd(own, max(tried, key=lambda centroids: silhouette(sample, centroids)))
    return found if config.segments else _large_ones(own, found)


def _large_ones(own: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives the centroids without those of too few users, the smallest first, whose users go to others."""
    while len(centroids) > 1:
        sizes = np.bincount(nearest(own, centroids)[0], minlength=len(centroids))
        if sizes.min() >= _MIN_USERS:
            break
        centroids = _lloyd(own, np.delete(centroids, sizes.argmin(), axis=0))
    return centroids


def _seeds(own: NDArray[np.float32], count: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Gives the centroids that k-means begins with, after k-means++ and a first step."""
    with warnings.catch_warnings():
        # Of clusters without users, where users are alike.
        warnings.simplefilter("ignore")
        found, _ = kmeans2(own, min(count, len(own)), iter=1, minit="++", seed=generator)
    return np.asarray(found, dtype=np.float32)


def _lloyd(own: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives the centroids of k-means by cosine, of length 1, without those that no user is nearest to.

    By cosine, as scoring does: SciPy's goes by distances, and at its end a user may be nearer to another centroid.
    """
    before = None
    for _ in range(_ITERATIONS):
        centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
        places, _ = nearest(own, centroids)
        if before is not None and (places == before).all():
            break
        filled = np.unique(places)
        centroids = np.stack([own[places == place].mean(axis=0) for place in filled])
        before = np.searchsorted(filled, places)
    centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return np.asarray(centroids[np.unique(nearest(own, centroids)[0])], dtype=np.float32)


def _places_before(
    previous: Previous, dataset: Dataset, users: NDArray[np.int64], max_history: int
) -> NDArray[np.int64]:
    """Gives each user's place among the segments of the version before, as that version sees them now; -1: not known.

    The users' features count where they are read as they were then.
    """
    known_items = {key: index for index, key in enumerate(previous.item_keys)}
    item = np.array([known_items.get(key, -1) for key in dataset.item_keys])
    known_types = {name: index for index, name in enumerate(previous.event_types)}
    event_type = np.array([known_types.get(name, -1) for name in dataset.event_types])
    same_features = previous.user_pipeline == dataset.user_pipeline.to_json()
    histories = []
    for part in _parts(users):
        history = dataset.history(part)
        kept = (item[history.item] >= 0) & (event_type[history.event_type] >= 0)
        histories.append(
            History(
                counts=np.bincount(history.users()[kept], minlength=len(part)),
                item=item[history.item[kept]],
                event_type=event_type[history.event_type[kept]],
                occurred_at=history.occurred_at[kept],
                features=history.features if same_features else None,
            )
        )
    own, known = _directions(previous.weights, histories, max_history)
    places, _ = nearest(own, previous.weights[CENTROIDS])
    return np.where(known, places, -1)


def _kept(
    previous: Previous, places: NDArray[np.int64], before: NDArray[np.int64], count: int
) -> dict[int, tuple[int, str, float]]:
    """Gives (number, name, overlap) of the segments that go on being one of the version before, by their place."""
    known = before >= 0
    shared = np.zeros((count, len(previous.names)))
    np.add.at(shared, (places[known], before[known]), 1.0)
    either = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0, keepdims=True) - shared
    overlap = shared / np.maximum(either, 1.0)
    pairs = zip(*linear_sum_assignment(overlap, maximize=True), strict=True)
    return {
        int(place): (*previous.names[old], float(overlap[place, old]))
        for place, old in pairs
        if overlap[place, old] >= _SAME
    }


def _characteristics(
    dataset: Dataset, users: NDArray[np.int64], places: NDArray[np.int64], count: int
) -> list[list[tuple[str, float]]]:
    """Gives (label, lift) of the labels that tell most about each segment, of the items that its users have events on.

    The labels are the values of the first column that tells three in four of the segments apart, or else of the one
    that tells most of them.
    """
    rows, counts = dataset.rows_of(users)
    pairs = np.unique(np.repeat(np.arange(len(users)), counts) * len(dataset.item_keys) + dataset.item[rows])
    best: list[list[tuple[str, float]]] = []
    columns: Sequence[FeatureColumn | None] = _telling_columns(dataset.item_pipeline.columns) or [None]
    for column in columns:
        found = _set_apart(dataset, pairs, places, count, column)
        if not best or sum(map(bool, found)) > sum(map(bool, best)):
            best = found
        if 4 * sum(map(bool, best)) >= 3 * count:
            break
    return best


def _set_apart(
    dataset: Dataset,
    pairs: NDArray[np.int64],
    places: NDArray[np.int64],
    count: int,
    column: FeatureColumn | None,
) -> list[list[tuple[str, float]]]:
    """Gives (label, lift) of each segment's labels of one column; none where nothing sets it apart.

    `pairs` are the different user * I + item of the events. Lift is the label's share in the segment's pairs over its
    share in all of them; the labels come in the order of share times log lift, which is what each adds to the
    divergence of the two distributions.
    """
    labels, item, label = _labels(dataset, column)
    user, pair_item = np.divmod(pairs, len(dataset.item_keys))
    order = np.argsort(item, kind="stable")
    item, label = item[order], label[order]
    first, last = np.searchsorted(item, pair_item, "left"), np.searchsorted(item, pair_item, "right")
    user = np.repeat(user, last - first)
    chosen = label[ranges(first, last - first)]
    having = np.unique(user * len(labels) + chosen)
    support = np.zeros((count, len(labels)))
    np.add.at(support, (places[having // len(labels)], having % len(labels)), 1.0)
    amounts = np.zeros((count, len(labels)))
    np.add.at(amounts, (places[user], chosen), 1.0)
    overall = amounts.sum(axis=0) / max(amounts.sum(), 1.0)
    shares = amounts / np.maximum(amounts.sum(axis=1, keepdims=True), 1.0)
    lift = np.divide(shares, overall, out=np.ones_like(shares), where=overall > 0)
    weight = np.where((support >= _MIN_SUPPORT) & (lift >= _MIN_LIFT), shares * np.log(np.maximum(lift, 1.0)), 0.0)
    found = []
    for place in range(count):
        best = np.argsort(-weight[place], kind="stable")[:_LABELS]
        found.append([(labels[number], float(lift[place, number])) for number in best if weight[place, number] > 0])
    return found


def _labels(
    dataset: Dataset, column: FeatureColumn | None
) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
    """Gives the labels and the (item, label) pairs: values of a column of the items, else their keys."""
    if column is None:
        numbers = np.arange(len(dataset.item_keys))
        return dataset.item_keys, numbers, numbers
    bag = dataset.item_features
    item = np.repeat(np.arange(len(bag)), bag.counts())
    own = (bag.token >= column.first) & (bag.token < column.first + column.size)
    # "23" names nothing without "seller_id".
    labels = [f"{column.name} {entry}" for entry in column.vocabulary] if _is_coded(column) else column.vocabulary
    return labels, item[own], bag.token[own] - column.first


def _telling_columns(columns: Sequence[FeatureColumn]) -> list[FeatureColumn]:
    """Gives the columns whose values can name a segment, those first that people understand best: what is called
    category, then categories, tags and words, and last those whose values are no words themselves.
    """
    kinds = ("category", "tags", "words")
    fitting = [column for column in columns if column.kind in kinds and column.size > 1]
    return sorted(fitting, key=lambda c: ("categor" not in c.name.lower(), _is_coded(c), kinds.index(c.kind)))


def _is_coded(column: FeatureColumn) -> bool:
    """Says whether the values of a column tell nothing without its name: numbers, true and false."""
    return all(entry.isdigit() or entry in ("true", "false") for entry in column.vocabulary)


def _name(labels: Sequence[tuple[str, float]], taken: set[str]) -> str:
    """Gives a name that no other segment has: the two labels that tell most, or more of them."""
    words = [label for label, _ in labels]
    for count in range(min(2, len(words)), len(words) + 1):
        name = ", ".join(words[:count]) or _NAMELESS
        if name not in taken:
            return name
    base = ", ".join(words[:2]) or _NAMELESS
    return next(f"{base} ({n})" for n in range(2, len(taken) + 3) if f"{base} ({n})" not in taken)
