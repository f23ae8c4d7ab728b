"""What this session's runs over all users or items gave, for the log of refreshes."""

from __future__ import annotations

from typing import Protocol


class Numbered(Protocol):
    """A version, or what was made of one."""

    @property
    def model_id(self) -> int:
        """The number of the model."""
        ...

    @property
    def version(self) -> int:
        """The number of the version within the model."""
        ...


# Counting the rows of a materialized view would run the code of the view's owner with the rights of whoever refreshes.
_last: dict[tuple[int, str], tuple[int, int]] = {}


def record(version: Numbered, view: str, rows: int) -> None:
    """Remembers that a run for a prediction view (its name without `_materialized`) is complete, and its rows."""
    _last[version.model_id, view] = (rows, version.version)


def take(model_id: int, view: str) -> tuple[int, int] | None:
    """Gives (rows, version) of the last complete run for a prediction view, once; None without one."""
    return _last.pop((model_id, view), None)
