"""Scores all users of a model in bounded batches, for a materialized view."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from . import blas, limits, runs, workers
from .cpu import CpuScorer, Scored, own_bytes, shared_bytes
from .device import Gpu
from .history import MAX_EVENTS, read_histories
from .literals import ItemLiterals, write_scores
from .store import Version
from .tokens import History

# user_key, item_keys, scores, is_cold_start, model_version
Row = tuple[str, str, str, bool, int]
# And the digest of what was read of the user.
DigestedRow = tuple[str, str, str, bool, int, int | None]
# The keys of some users, and their events.
Batch = tuple[list[str], History]
Write = Callable[[list[str], Scored], list[Row]]
Read = Callable[..., Iterator[Batch]]
Result = TypeVar("Result")

# Users and numbers of a batch: more would hold up a cancel.
_MAX_BATCH = 512
_MAX_NUMBERS = 1 << 20
# What waits to be scored or to be stored: an event in three arrays, a row with its two texts, a score and its item.
_BYTES_OF_AN_EVENT, _BYTES_OF_A_ROW, _BYTES_OF_A_NUMBER = 24, 400, 64
# Stacks of the threads, the catalogue's keys, what is read from the events at one time.
_FIXED_BYTES = 24 << 20


def recommend_all(
    plpy: Any, gpu: Gpu | None, version: Version, k: int, chosen: Sequence[str] | None = None
) -> Iterator[DigestedRow]:
    """Gives (user_key, item_keys, scores, is_cold_start, model_version, digest) of each user, lists as array literals.

    `chosen` are the keys of the users to score; None scores all.

    One row per user with two array literals is the fastest way into a table that SQL can unpack. Without a GPU, and
    from where one fails on the way, the CPU scores.
    """
    keys = version.item_keys.all()
    ranked = keys if version.ranked is None else [keys[item] for item in version.ranked.tolist()]
    literals = ItemLiterals(ranked)

    def write(users: list[str], scored: Scored) -> list[Row]:
        items, scores, is_cold = scored
        # Behind the last item a score is -1.
        lengths = (scores >= 0).sum(axis=1)
        columns = literals.write(items, lengths), write_scores(scores, lengths), is_cold.tolist()
        return [(user, *row, version.version) for user, *row in zip(users, *columns, strict=True)]

    done = 0
    # Of the users who were read and are not stored yet.
    digests: dict[str, int] = {}
    read = partial(read_histories, plpy, version, keys=keys, chosen=chosen, digests=digests)
    scored = _on_cpu(plpy, version, k, read, write) if gpu is None else _on_gpu(plpy, gpu, version, k, read, write)
    with blas.one_thread(), closing(scored) as batches:
        for rows in batches:
            done += len(rows)
            runs.report_progress(plpy, f"pgvae {version.model}: {done} users scored")
            yield from [(*row, digests.pop(row[0], None)) for row in rows]
    runs.record(version, "recommendations", done)


def _on_cpu(plpy: Any, version: Version, k: int, read: Read, write: Write) -> Generator[list[Row]]:
    def rows(score: CpuScorer, batch: Batch) -> list[Row]:
        return write(batch[0], score(batch[1].distinct()))

    return score_on_cpu(plpy, version, read, rows, k=k, numbers=k)


def score_on_cpu(
    plpy: Any, version: Version, read: Read, work: Callable[[CpuScorer, Batch], Result], *, k: int = 1, numbers: int
) -> Generator[Result]:
    """Gives work(scorer, batch) of each batch that `read` gives, in as many threads as vae.max_threads and
    vae.max_memory allow, while this one reads and does what the caller does with the results: so many `numbers` a user.
    """
    threads, users, events = _sizes(limits.max_memory(plpy), limits.max_threads(plpy), version, k, numbers)
    first = CpuScorer(version, k)
    scorers = [first, *(first.fork() for _ in range(1, threads))]
    batches = read(batch_size=users, max_events=events)
    return workers.map_in_order([partial(work, scorer) for scorer in scorers], batches, lambda: look(plpy))


def _sizes(limit: int, most: int, version: Version, k: int, numbers: int) -> tuple[int, int, int]:
    """Gives how many threads, `most` at most, and users and events of a batch, fit into so many bytes; ScoringError
    where none do.
    """
    fixed = _FIXED_BYTES + shared_bytes(version)

    def needed(threads: int, users: int, events: int) -> int:
        waiting = events * _BYTES_OF_AN_EVENT + users * (_BYTES_OF_A_ROW + numbers * _BYTES_OF_A_NUMBER)
        return fixed + threads * own_bytes(version, k, users, events) + (workers.AHEAD * threads + 1) * waiting

    sizes = (
        (threads, users, MAX_EVENTS * users // _MAX_BATCH)
        for threads in range(most, 0, -1)
        for users in _users_of_a_batch(numbers)
    )
    return limits.first_that_fits(limit, ((needed(*size), size) for size in sizes))


def _users_of_a_batch(numbers: int) -> list[int]:
    """Gives how many users may be in a batch, most first, so that it gives few enough numbers."""
    most = max(1, _MAX_NUMBERS // max(1, numbers))
    return [max(1, min(_MAX_BATCH, most) // part) for part in (1, 4, 16)]


def _on_gpu(plpy: Any, gpu: Gpu, version: Version, k: int, read: Read, write: Write) -> Generator[list[Row]]:
    # Imported here: a session that uses no GPU does not pay for it.
    from .gpu import MAX_USERS, GpuScorer, score_ahead

    def on_gpu() -> GpuScorer:
        return GpuScorer(gpu.cupy, version, k, memory=gpu.memory, precision=gpu.precision)

    batches = ((users, history.distinct()) for users, history in read(batch_size=MAX_USERS))
    for users, scored in score_ahead(plpy, batches, on_gpu, lambda: CpuScorer(version, k), _MAX_BATCH):
        yield write(users, scored)


def look(plpy: Any) -> None:
    """Lets a cancel or a statement timeout take effect: they do not interrupt Python."""
    plpy.execute("select")
