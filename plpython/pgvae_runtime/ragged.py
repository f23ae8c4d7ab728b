"""Arrays of things that lie one after the other, of different lengths."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Gives where each of n things begins that lie one after the other, and where the last one ends, [n + 1]."""
    start = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=start[1:])
    return start


def places(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Gives 0 to counts[i] - 1 for each of n things, one after the other."""
    return ranges(np.zeros(len(counts), dtype=np.int64), counts)


def ranges(first: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Gives first[i], first[i] + 1 … for each of n things, counts[i] of them, one after the other."""
    start = starts(counts)
    numbers: NDArray[np.int64] = np.arange(start[-1]) + np.repeat(first - start[:-1], counts)
    return numbers


def pieces(ends: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Cuts things that end at `ends` into runs of about `most`, or of a larger one; gives (first, last) of each."""
    cuts = np.flatnonzero(np.diff(ends // most)) + 1
    edges = [0, *cuts.tolist(), len(ends)]
    return ((first, last) for first, last in pairwise(edges) if last > first)
