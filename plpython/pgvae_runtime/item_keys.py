"""The keys of a version's items, found by their rows in the tensors, and the other way round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np

_NAMES = ("item_key_text", "item_key_start", "item_key_hash", "item_key_item")


class ItemKeys:
    """The keys of a catalogue of I items.

    Arrays, which sessions share in the map of the weights, and no dictionary: `item_key_text` holds the keys in UTF-8,
    one after the other, and `item_key_start` [I + 1] where each begins; `item_key_hash` [I], ascending, are the keys'
    checksums, and `item_key_item` [I] the items that have them.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._text, self._start, self._hash, self._item = (arrays[name] for name in _NAMES)

    def __len__(self) -> int:
        return len(self._item)

    @staticmethod
    def arrays_of(keys: Sequence[str]) -> dict[str, Any]:
        """Gives what the keys of all items, in the order of the tensors' rows, are kept as."""
        encoded = [key.encode() for key in keys]
        hashes = np.fromiter(map(crc32, encoded), np.uint32, count=len(encoded))
        item = np.argsort(hashes, kind="stable").astype(np.int32)
        start = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return dict(zip(_NAMES, (np.frombuffer(b"".join(encoded), np.uint8), start, hashes[item], item), strict=True))

    @staticmethod
    def none() -> ItemKeys:
        """Gives the keys of an empty catalogue."""
        return ItemKeys(ItemKeys.arrays_of(()))

    @staticmethod
    def parted(arrays: Mapping[str, Any]) -> tuple[ItemKeys, dict[str, Any]]:
        """Gives the keys, and all other arrays."""
        return ItemKeys(arrays), {name: array for name, array in arrays.items() if name not in _NAMES}

    def all(self) -> Sequence[str]:
        """Gives the key of each item, in the order of the tensors' rows."""
        text = self._text.tobytes()
        return [text[begin:end].decode() for begin, end in pairwise(self._start.tolist())]

    def of_items(self, items: Iterable[int]) -> dict[int, str]:
        """Gives the key of each of these items by its row in the tensors."""
        return {item: self._bytes(item).decode() for item in items}

    def items(self, keys: Collection[str]) -> dict[str, int]:
        """Gives the row in the tensors of each of these keys; one outside the catalogue is not among them."""
        encoded = [key.encode() for key in keys]
        hashes = np.fromiter(map(crc32, encoded), np.uint32, count=len(encoded))
        begin, end = (np.searchsorted(self._hash, hashes, side).tolist() for side in ("left", "right"))
        return {
            key: item
            for key, wanted, first, last in zip(keys, encoded, begin, end, strict=True)
            for item in self._item[first:last].tolist()
            if self._bytes(item) == wanted
        }

    def item(self, key: str) -> int | None:
        """Gives the row in the tensors of this key; None outside the catalogue."""
        return self.items([key]).get(key)

    def _bytes(self, item: int) -> bytes:
        return bytes(self._text[self._start[item] : self._start[item + 1]])
