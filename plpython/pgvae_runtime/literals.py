"""Lists of items and scores as PostgreSQL's array literals, written by NumPy.

An element at a time would take as long as the scores themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A key that is longer is no longer padded: one of 500 bytes would make all of them so wide.
_MAX_WIDTH = 40
# ",123456789e-12": nine digits are what a float4 needs to be read back as it was.
_DIGITS = 9
_SCORE_WIDTH = 1 + _DIGITS + 4
_THOUSANDS = np.array([f"{number:03d}".encode() for number in range(1000)]).view("u1").reshape(1000, 3)
_EXPONENTS = np.array([f"e-{number:02d}".encode() for number in range(100)]).view("u1").reshape(100, 4)
_POWERS = 10.0 ** np.arange(64)


class ItemLiterals:
    """Writes lists of items, given by their numbers, as array literals of their keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._elements = [array_element(key) for key in keys]
        encoded = [b"," + element.encode() for element in self._elements]
        self._width = max(map(len, encoded), default=1)
        # Blanks after an element mean nothing to PostgreSQL.
        self._padded = (
            np.array([element.ljust(self._width) for element in encoded]).view("u1").reshape(len(encoded), self._width)
            if encoded and self._width <= _MAX_WIDTH
            else None
        )

    def write(self, items: NDArray[Any], lengths: NDArray[np.int64]) -> list[str]:
        """Gives the literal of the first `lengths` [U] items of each row of [U, k]."""
        if self._padded is not None:
            return _rows(self._padded.take(items, axis=0), lengths)
        return [
            "{" + ",".join([self._elements[item] for item in row[:length]]) + "}"
            for row, length in zip(items.tolist(), lengths.tolist(), strict=True)
        ]


def array_element(text: str) -> str:
    """Gives a text as an element of a PostgreSQL array literal."""
    # Digits need no quotes, and are read faster without.
    if text.isascii() and text.isdigit():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_scores(scores: NDArray[np.float32], lengths: NDArray[np.int64]) -> list[str]:
    """Gives the literal of the first `lengths` [U] scores, 0 to 1, of each row of [U, k], exact to the last bit."""
    exact = np.maximum(scores, 0).astype(np.float64)
    # 10^exponent times the score has nine digits before the point, or ten where rounding says so.
    exponent = _DIGITS - 1 - np.floor(np.log10(np.maximum(exact, 1e-46))).astype(np.int64)
    digits = np.rint(exact * _POWERS[exponent]).astype(np.int64)
    is_long = digits >= 10**_DIGITS
    digits[is_long] //= 10
    exponent[is_long] -= 1
    high, low = np.divmod(digits, 1_000_000)
    middle, low = np.divmod(low, 1000)
    text = np.empty((*scores.shape, _SCORE_WIDTH), dtype="u1")
    text[..., 0] = ord(",")
    for place, part in enumerate((high, middle, low)):
        text[..., 1 + 3 * place : 4 + 3 * place] = _THOUSANDS[part]
    text[..., 1 + _DIGITS :] = _EXPONENTS[exponent]
    return _rows(text, lengths)


def _rows(text: NDArray[np.uint8], lengths: NDArray[np.int64]) -> list[str]:
    """Gives "{…}" of the first `lengths` [U] elements of each row of bytes [U, k, width], which begin with a comma."""
    users, k, width = text.shape
    if not k:
        return ["{}"] * users
    text[:, 0, 0] = ord("{")
    whole = text.tobytes()
    stride = k * width
    return [
        str(whole[begin : begin + length * width], "utf-8") + "}" if length else "{}"
        for begin, length in zip(range(0, users * stride, stride), lengths.tolist(), strict=True)
    ]
