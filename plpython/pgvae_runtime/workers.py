"""Threads that compute while the main thread reads and writes.

PL/Python holds Python's lock while PostgreSQL's own code runs, and whatever touches the database must run in the main
thread. NumPy gives the lock back while it computes: so a few threads that compute go on beside it.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")

# Seconds between two looks at whether the statement was cancelled, while the main thread waits.
_PATIENCE = 0.1
# How much is read ahead of each thread.
AHEAD = 3


def map_in_order(
    functions: Sequence[Callable[[Given], Result]], given: Iterable[Given], look: Callable[[], None]
) -> Generator[Result]:
    """Gives function(each) of all that is given, in its order, each function in a thread of its own.

    At most AHEAD times as many as there are functions are read ahead. `look` is called every now and then while
    the main thread waits; what it raises, and what a function raises, ends the work. The threads have ended when
    the iterator has, however it ends.
    """
    pool = _Pool(functions)
    waiting: deque[_Job[Given, Result]] = deque()
    try:
        for each in given:
            waiting.append(pool.begin(each))
            while len(waiting) >= AHEAD * len(functions) or (waiting and waiting[0].done.is_set()):
                yield waiting.popleft().result(look)
        while waiting:
            yield waiting.popleft().result(look)
    finally:
        pool.close()


@contextmanager
def signals_kept_from_threads() -> Iterator[None]:
    """Lets threads that begin meanwhile block all signals: a new one has the mask of the one that starts it, and
    PostgreSQL's handlers belong into the main thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Job(Generic[Given, Result]):
    def __init__(self, given: Given) -> None:
        self.given = given
        self.done = threading.Event()
        self.value: Result | None = None
        self.error: BaseException | None = None

    def result(self, look: Callable[[], None]) -> Result:
        while not self.done.wait(_PATIENCE):
            look()
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class _Pool(Generic[Given, Result]):
    def __init__(self, functions: Sequence[Callable[[Given], Result]]) -> None:
        self._jobs: SimpleQueue[_Job[Given, Result] | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(function,), name="pgvae", daemon=True) for function in functions
        ]
        with signals_kept_from_threads():
            for thread in self._threads:
                thread.start()

    def begin(self, given: Given) -> _Job[Given, Result]:
        job: _Job[Given, Result] = _Job(given)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Waits for the threads, which end after what they compute at the moment."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, function: Callable[[Given], Result]) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            try:
                job.value = function(job.given)
            # Raised again in the main thread.
            except BaseException as error:
                job.error = error
            job.done.set()
