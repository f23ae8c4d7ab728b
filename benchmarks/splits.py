"""Public data sets as what to learn from, what to choose settings by, and what to be tested on."""

from __future__ import annotations

import csv
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae.features import Column, fit_pipeline
from pgvae.ranking import Holdout, make_holdout
from pgvae.splits import deal_out, hold_out
from pgvae_runtime.features import feature_bag

_DAY = 86_400.0
_PUBLISHED = Path(__file__).parent / "published.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set: settings are chosen by training on `part` and ranking `validation`, then `whole` is trained on.

    `published` are (method, metric, value) that others report on the same test.
    """

    name: str
    k: int
    protocol: str
    part: Dataset
    validation: Holdout
    whole: Dataset
    test: Holdout
    published: list[tuple[str, str, float]]


def read_task(folder: Path) -> Task:
    """Gives the task in a folder: one of the four known by name, or any with train.txt and test.txt, .xz or not."""
    readers = {"amazon-beauty": _beauty, "online-retail": _online_retail, "tmall-events": _tmall}
    return readers.get(folder.name, _text)(folder)


def _text(folder: Path) -> Task:
    train, test = (list(_lines(folder, name)) for name in ("train", "test"))
    users = 1 + max(line[0] for line in train + test)
    items = 1 + max(max(line[1:], default=0) for line in train + test)
    whole, after = (
        _dataset(
            np.repeat([line[0] for line in lines], [len(line) - 1 for line in lines]),
            np.concatenate([np.array(line[1:], dtype=np.int64) for line in lines]),
            users=users,
            items=items,
        )
        for lines in (train, test)
    )
    part, validation = _hold_out_items(whole)
    return Task(
        name=folder.name,
        k=20,
        protocol="fixed split; validation: a tenth of each user's training items, by chance",
        part=part,
        validation=validation,
        whole=whole,
        test=make_holdout(whole, after),
        published=_published(folder.name),
    )


def _beauty(folder: Path) -> Task:
    sequences = list(_lines(folder, "sequences"))
    counts = [len(line) - 1 for line in sequences]
    item = np.concatenate([np.array(line[1:], dtype=np.int64) for line in sequences])
    user = np.repeat([line[0] for line in sequences], counts)
    place = np.concatenate([np.arange(count) for count in counts])
    from_end = np.repeat(counts, counts) - 1 - place
    items, users = int(item.max()) + 1, int(user.max()) + 1
    with _open(folder, "item-attributes.json") as file:
        attributes = json.load(file)
    documents = [
        [json.dumps({"attributes": [str(entry) for entry in attributes[str(number)]]})]
        if str(number) in attributes
        else []
        for number in range(items)
    ]
    column = Column(source="items", column_name="attributes", is_used=True, kind="tags", reason=None)
    pipeline = fit_pipeline([column], documents, source="items")

    # A day from one purchase to the next: the data has an order, but no times.
    def until(last: int, first: int) -> Dataset:
        chosen = (from_end >= last) & (from_end < first)
        made = _dataset(user[chosen], item[chosen], users=users, items=items, at=place[chosen] * _DAY)
        return replace(made, item_pipeline=pipeline, item_features=feature_bag(pipeline, documents))

    far = len(item)
    part, whole = until(2, far), until(1, far)
    return Task(
        name=folder.name,
        k=10,
        protocol="leave one out: each user's last item is the test, the one before it validation",
        part=part,
        validation=make_holdout(part, until(1, 2)),
        whole=whole,
        test=make_holdout(whole, until(0, 1)),
        published=_published(folder.name),
    )


def _online_retail(folder: Path) -> Task:
    rows = set()
    with _open(folder, "online_retail.csv") as file:
        for row in csv.DictReader(file):
            # What the quality gate lets pass: a customer, no return.
            if row["CustomerID"] and int(row["Quantity"]) > 0:
                rows.add((int(float(row["CustomerID"])), row["StockCode"].upper(), row["InvoiceDate"]))
    customers, codes, times = zip(*sorted(rows), strict=True)
    at = np.array([datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp() for time in times])
    user, item = (np.unique(np.array(column), return_inverse=True)[1] for column in (customers, codes))
    events = _dataset(user, item, users=user.max() + 1, items=item.max() + 1, at=at)
    return _by_time(folder.name, events)


def _tmall(folder: Path) -> Task:
    with _open(folder, "events.csv") as file:
        rows = list(csv.DictReader(file))
    with _open(folder, "test_buy.csv") as file:
        bought = list(csv.DictReader(file))
    types = ("view", "add_to_cart", "purchase")
    meaning = {"fav": 0, "cart": 1, "buy": 2}
    event_type = np.array([meaning[row["event"]] for row in rows])
    user, item = (np.array([int(row[name]) for row in rows + bought]) for name in ("user", "item"))
    at = np.array([_tmall_time(int(row["ts"])) for row in rows])
    events = _dataset(
        user[: len(rows)],
        item[: len(rows)],
        users=user.max() + 1,
        items=item.max() + 1,
        at=at,
        event_type=event_type,
        event_types=types,
    )
    after = _dataset(
        user[len(rows) :],
        item[len(rows) :],
        users=user.max() + 1,
        items=item.max() + 1,
        at=np.full(len(bought), at.max() + _DAY),
        event_type=np.full(len(bought), 2),
        event_types=types,
    )
    part, validation = _hold_out_items(events)
    # No item of the test is in the user's history, of whatever type: the split masks all of it.
    seen = tuple(range(len(types)))
    return Task(
        name=folder.name,
        k=20,
        protocol="leave one out: each user's last purchase is the test; validation: a tenth of each user's purchased"
        " items, by chance; all items of the history masked",
        part=part,
        validation=replace(validation, seen=seen),
        whole=events,
        test=make_holdout(events, after, seen=seen),
        published=[],
    )


def _hold_out_items(dataset: Dataset) -> tuple[Dataset, Holdout]:
    """Gives the events without a tenth of each user's items, dealt out by chance, and that tenth."""
    pairs, part = deal_out(dataset, 10, np.random.default_rng(1))
    rest, after = hold_out(dataset, pairs[part == 0])
    return rest, make_holdout(rest, after)


def _by_time(name: str, events: Dataset) -> Task:
    cuts = np.quantile(events.occurred_at, [0.8, 0.9])
    part, whole = events.between(-np.inf, cuts[0]), events.between(-np.inf, cuts[1])
    return Task(
        name=name,
        k=20,
        protocol="by time: the newest tenth of the events is the test, the tenth before it validation",
        part=part,
        validation=make_holdout(part, events.between(cuts[0], cuts[1])),
        whole=whole,
        test=make_holdout(whole, events.between(cuts[1], np.inf)),
        published=[],
    )


def _tmall_time(month_and_day: int) -> float:
    return datetime(2014, month_and_day // 100, month_and_day % 100, tzinfo=UTC).timestamp()


def _dataset(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    *,
    users: int,
    items: int,
    at: NDArray[np.float64] | None = None,
    event_type: NDArray[np.int64] | None = None,
    event_types: tuple[str, ...] = ("purchase",),
) -> Dataset:
    """Gives events as a database would: without times all at one moment, without types all purchases."""
    at = np.zeros(len(user)) if at is None else at
    event_type = np.zeros(len(user), dtype=np.int64) if event_type is None else event_type
    order = np.lexsort((event_type, item, at, user))
    # The weights that vae.create_model gives these types.
    weights = np.array([{"view": 1, "add_to_cart": 2, "purchase": 4}[name] for name in event_types], dtype=np.float32)
    return Dataset(
        user=user[order].astype(np.int64),
        item=item[order].astype(np.int64),
        event_type=event_type[order],
        occurred_at=at[order].astype(np.float64),
        weight=weights[event_type[order]],
        item_keys=[str(number) for number in range(items)],
        event_types=list(event_types),
        user_count=int(users),
    )


def _published(name: str) -> list[tuple[str, str, float]]:
    rows = json.loads(_PUBLISHED.read_text(encoding="utf-8")).get(name, [])
    return [(method, metric, value) for method, metric, value in rows]


def _lines(folder: Path, name: str) -> Iterator[list[int]]:
    with _open(folder, f"{name}.txt") as file:
        for line in file:
            numbers = [int(part) for part in line.split()]
            if len(numbers) > 1:
                yield numbers


def _open(folder: Path, name: str) -> TextIO:
    compressed = folder / f"{name}.xz"
    return lzma.open(compressed, "rt", encoding="utf-8") if compressed.exists() else (folder / name).open()
