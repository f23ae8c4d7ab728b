"""What this session's runs over all users or items gave, for the log of refreshes, and how far one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


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


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run: rows that the view holds then, the version, how many rows were scored anew, and the mode.

    The mode is `full` or `incremental`; of a run that changed nothing, since it would not do, it names what is needed:
    `needs merge` or `needs full`. `left_out` says what the view lacks, and why; None: nothing.
    """

    row_count: int
    version: int | None
    scored_count: int
    mode: str = "full"
    left_out: str | None = None


# Counting the rows of a materialized view would run the code of the view's owner with the rights of whoever refreshes.
_last: dict[tuple[int, str], Run] = {}


def record(version: Numbered, view: str, rows: int, left_out: str | None = None) -> None:
    """Remembers that a run for a prediction view (its name without `_materialized`) is complete, and its rows."""
    keep(version.model_id, view, Run(row_count=rows, version=version.version, scored_count=rows, left_out=left_out))


def keep(model_id: int, view: str, run: Run) -> None:
    """Remembers a run as the last one for a prediction view."""
    _last[model_id, view] = run


def take(model_id: int, view: str) -> Run | None:
    """Gives the last complete run for a prediction view, once; None without one."""
    return _last.pop((model_id, view), None)


def report_progress(plpy: Any, message: str) -> None:
    """Shows a message as the session's application name in pg_stat_activity, and lets a cancel take effect."""
    plpy.execute("select pg_catalog.set_config('application_name', " + plpy.quote_literal(message[:63]) + ", true)")
