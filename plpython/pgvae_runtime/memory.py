"""How much of the server's memory a statement over all users may take: the setting vae.max_memory."""

from __future__ import annotations

import re
from typing import Any

from .errors import INVALID_PARAMETER, OUT_OF_MEMORY, ScoringError

_SETTING = "select nullif(pg_catalog.current_setting('vae.max_memory', true), '') as max_memory"
_UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_DEFAULT = 600 << 20


def limit(plpy: Any) -> int:
    """Gives vae.max_memory in bytes: what a statement may take beyond what the session held before."""
    value = plpy.execute(_SETTING)[0]["max_memory"]
    return size("max_memory", value) if value else _DEFAULT


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


def too_little(given: int, needed: int) -> ScoringError:
    """Gives the error for a limit that nothing fits into."""
    return ScoringError(
        f"vae.max_memory is {given >> 20}MB, and this needs {-(-needed >> 20)}MB",
        sqlstate=OUT_OF_MEMORY,
        hint=f"raise it: set vae.max_memory = '{-(-needed >> 20)}MB'; a set of candidates needs less than all items",
    )


def users_at_once(plpy: Any, bytes_each: int, most: int) -> int:
    """Gives how many users of so many bytes fit into half the limit, `most` at most; ScoringError for none."""
    allowed = limit(plpy)
    users = min(most, allowed // (2 * bytes_each))
    if users < 1:
        raise too_little(allowed, 2 * bytes_each)
    return users
