"""Public keys of users and items in the four key types; number 0 is NULL."""

from __future__ import annotations

from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from pgvae.simulate.config import KeyType
from pgvae.simulate.copying import Bytes, Column, numbers

# Digits of a text key: enough for 10 million users, the bots and the orphans.
DIGITS = 8


def key_column(kind: KeyType, prefix: str, number: NDArray[np.int64]) -> Column:
    """Gives the key column of the public numbers of users (prefix 'U') or items (prefix 'P')."""
    null = number == 0
    if kind == "bigint":
        return numbers(number, ">i8", null=null)
    if kind == "integer":
        return numbers(number, ">i4", null=null)
    payload = _uuids(prefix, number) if kind == "uuid" else _texts(prefix, number)
    return Column(payload, np.where(null, -1, payload.shape[1]).astype(np.int32))


def key_values(kind: KeyType, prefix: str, number: NDArray[np.int64]) -> list[int] | list[str]:
    """Gives the keys as what a text COPY takes: integers or strings."""
    if kind in ("bigint", "integer"):
        return [int(value) for value in number]
    payload = _uuids(prefix, number) if kind == "uuid" else _texts(prefix, number)
    return [str(UUID(bytes=row.tobytes())) if kind == "uuid" else row.tobytes().decode() for row in payload]


def _texts(prefix: str, number: NDArray[np.int64]) -> Bytes:
    digits = number[:, None] // 10 ** np.arange(DIGITS - 1, -1, -1) % 10 + ord("0")
    return np.concatenate([np.full((len(number), 1), ord(prefix)), digits], axis=1).astype(np.uint8)


def _uuids(prefix: str, number: NDArray[np.int64]) -> Bytes:
    """Gives random-looking version 4 UUIDs that depend on the number alone."""
    seed = number.astype(np.uint64) + np.uint64(ord(prefix) << 40)
    halves = np.stack([_mix(seed), _mix(~seed)], axis=1).astype(">u8")
    payload = np.ascontiguousarray(halves).view(np.uint8)
    payload[:, 6] = payload[:, 6] & 0x0F | 0x40
    payload[:, 8] = payload[:, 8] & 0x3F | 0x80
    return payload


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Gives splitmix64 of each value, a bijection of 64 bits (Steele, Lea and Flood, 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
