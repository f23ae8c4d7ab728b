"""Named tensors as chunks of raw bytes with a digest: how weights lie in vae_private.tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ScoringError, corrupt_weights

# Far under PostgreSQL's limit of 1 GB per value, large enough that the cost per row does not count.
CHUNK_BYTES = 16 * 1024 * 1024
DTYPES = ("<f4", "<i4")


def to_chunks(array: NDArray[Any]) -> Iterator[tuple[int, str, list[int], bytes, bytes]]:
    """Gives (chunk, dtype, shape, sha256, data) of each chunk of an array."""
    dtype = array.dtype.newbyteorder("<").str
    if dtype not in DTYPES:
        raise ValueError(f"tensors are stored as {DTYPES}, not {dtype}")
    raw = np.ascontiguousarray(array, dtype=dtype).tobytes()
    for chunk, begin in enumerate(range(0, max(len(raw), 1), CHUNK_BYTES)):
        data = raw[begin : begin + CHUNK_BYTES]
        yield chunk, dtype, list(array.shape), hashlib.sha256(data).digest(), data


class Assembler:
    """Puts one tensor together from its chunks, in order, checking each digest."""

    def __init__(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        if dtype not in DTYPES or any(n < 0 for n in shape):
            raise _corrupt(name, f"it claims dtype {dtype!r} and shape {list(shape)}")
        self._name = name
        self._dtype = dtype
        self._shape = tuple(shape)
        self._next = 0
        self._filled = 0
        try:
            self._buffer = bytearray(math.prod(self._shape) * 4)
        except (MemoryError, OverflowError) as error:
            raise _corrupt(name, f"its shape {list(shape)} does not fit into memory") from error

    def add(self, chunk: int, sha256: bytes, data: bytes) -> None:
        """Takes the next chunk; ScoringError where it is out of order, too long or altered."""
        if chunk != self._next:
            raise _corrupt(self._name, f"chunk {self._next} is missing")
        if hashlib.sha256(data).digest() != sha256:
            raise _corrupt(self._name, f"the checksum of chunk {chunk} does not match its bytes")
        if self._filled + len(data) > len(self._buffer):
            raise _corrupt(self._name, f"it is longer than its shape {list(self._shape)} says")
        self._buffer[self._filled : self._filled + len(data)] = data
        self._filled += len(data)
        self._next += 1

    def finish(self) -> NDArray[Any]:
        """Gives the array, read-only; ScoringError where bytes are missing or no finite numbers."""
        if self._filled != len(self._buffer):
            raise _corrupt(self._name, f"{len(self._buffer) - self._filled} bytes are missing")
        array = np.frombuffer(self._buffer, dtype=self._dtype).reshape(self._shape)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _corrupt(self._name, "it holds values that are not finite numbers")
        array.flags.writeable = False
        return array


def _corrupt(name: str, why: str) -> ScoringError:
    return corrupt_weights(f"tensor {name!r} is corrupt: {why}")
