"""What of the server a statement over all users may take: the settings vae.max_memory and vae.max_threads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from .errors import INVALID_PARAMETER, OUT_OF_MEMORY, ScoringError

_SETTINGS = "select " + ", ".join(
    f"nullif(pg_catalog.current_setting('vae.{name}', true), '') as {name}" for name in ("max_memory", "max_threads")
)
_UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_DEFAULT = 600 << 20

Choice = TypeVar("Choice")


def max_memory(plpy: Any) -> int:
    """Gives vae.max_memory in bytes: what a statement may take beyond what the session held before."""
    value = plpy.execute(_SETTINGS)[0]["max_memory"]
    return size("max_memory", value) if value else _DEFAULT


def max_threads(plpy: Any) -> int:
    """Gives vae.max_threads: how many threads may compute at once; without the setting, one for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = plpy.execute(_SETTINGS)[0]["max_threads"]
    if value is None:
        return cores
    if not re.fullmatch(r"\s*0*[1-9]\d{0,5}\s*", value):
        raise ScoringError(
            f"vae.max_threads is {value!r}",
            sqlstate=INVALID_PARAMETER,
            hint="give a number from 1 on, as in: set vae.max_threads = 1",
        )
    return min(int(value), cores)


def size(name: str, value: str) -> int:
    """Gives the bytes of a setting as PostgreSQL writes sizes: 2GB, 512 MB, or a number of bytes."""
    found = re.fullmatch(r"\s*(\d{1,15})\s*([kMGT]?B)?\s*", value)
    if not found:
        raise ScoringError(
            f"vae.{name} is {value!r}",
            sqlstate=INVALID_PARAMETER,
            hint=f"give a size, as in: set vae.{name} = '2GB'",
        )
    return int(found[1]) * _UNITS[(found[2] or "").upper()]


def first_that_fits(limit: int, options: Iterable[tuple[int, Choice]]) -> Choice:
    """Gives the first choice whose bytes are within the limit; ScoringError with those of the last one for none."""
    needed = 0
    for needed, choice in options:
        if needed <= limit:
            return choice
    raise _too_little(limit, needed)


def _too_little(given: int, needed: int) -> ScoringError:
    return ScoringError(
        f"vae.max_memory is {given >> 20}MB, and this needs {-(-needed >> 20)}MB",
        sqlstate=OUT_OF_MEMORY,
        hint=f"raise it: set vae.max_memory = '{-(-needed >> 20)}MB'; a set of candidates needs less than all items",
    )


def users_at_once(plpy: Any, bytes_each: int, most: int) -> int:
    """Gives how many users of so many bytes fit into half the limit, `most` at most; ScoringError for none."""
    allowed = max_memory(plpy)
    users = min(most, allowed // (2 * bytes_each))
    if users < 1:
        raise _too_little(allowed, 2 * bytes_each)
    return users
