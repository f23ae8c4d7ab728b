"""What every entry point of the SQL functions goes through: errors translated in one place, and limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import chain, islice
from typing import Any

from . import blas
from .errors import INSUFFICIENT_PRIVILEGE, INVALID_PARAMETER, UNDEFINED_COLUMN, UNDEFINED_TABLE, ScoringError
from .shop_tables import changed_table, missing_grants

MAX_K = 10_000


@contextmanager
def _translation(plpy: Any, args: Sequence[Any]) -> Iterator[None]:
    """Turns a ScoringError, or an error of a query, into a PostgreSQL error with its SQLSTATE and hint.

    `args` are those of the entry point; where there are any, the number of the model is the first.
    """
    try:
        yield
    except ScoringError as error:
        raise _postgres_error(plpy, error.message, error.sqlstate, None, error.hint) from None
    except plpy.SPIError as error:
        detail, hint = (error.spidata or (None, None, None))[1:3]
        if error.sqlstate == INSUFFICIENT_PRIVILEGE and args and (grants := missing_grants(plpy, args[0])):
            hint = f"the shop's tables are read with the rights of whoever scores; their owner can allow it: {grants}"
        message = str(error)
        if error.sqlstate in (UNDEFINED_TABLE, UNDEFINED_COLUMN) and args and (found := changed_table(plpy, args[0])):
            message, hint = found
        raise _postgres_error(plpy, message, error.sqlstate, detail, hint) from None


def _postgres_error(plpy: Any, message: str, sqlstate: str, detail: str | None, hint: str | None) -> Exception:
    # PL/Python puts the exception's class before the message, so the class has a name that people know.
    kind = type("pgvae", (plpy.Error,), {"__module__": "__main__"})
    raised: Exception = kind(message)
    vars(raised).update(sqlstate=sqlstate, detail=detail, hint=hint)
    return raised


def translated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an entry point of a function: BLAS with one thread, errors as PostgreSQL's, rows one by one."""

    @wraps(function)
    def call(plpy: Any, *args: Any) -> Any:
        with _translation(plpy, args):
            # Users of a dashboard must not fight for the cores; runs over all users have threads of their own.
            with blas.one_thread():
                found = function(plpy, *args)
            if not isinstance(found, Iterator):
                return found
            # Between two rows PL/Python gives a message of its own, and ours as the detail: most errors come before.
            first = list(islice(found, 1))
        return chain(first, _translated_rows(plpy, args, found))

    return call


def _translated_rows(plpy: Any, args: Sequence[Any], rows: Iterator[Any]) -> Iterator[Any]:
    with _translation(plpy, args):
        yield from rows


def checked_k(k: int | None) -> int:
    """Gives k; ScoringError where it is not between 1 and MAX_K."""
    if k is None or not 1 <= k <= MAX_K:
        raise ScoringError(
            f"k is {'null' if k is None else k}",
            sqlstate=INVALID_PARAMETER,
            hint=f"ask for 1 to {MAX_K} items, as in: k => 10",
        )
    return k
