"""What is wrong with the shop's tables, or the rights to them, once a query that reads them has failed."""

from __future__ import annotations

from typing import Any

from .errors import UNDEFINED_COLUMN, UNDEFINED_TABLE
from .store import execute


def missing_grants(plpy: Any, model_id: int) -> str | None:
    """Gives the statements that grant what the caller lacks to read a model's tables; None where nothing is missing."""
    query = "select vae_private.missing_grants($1) as statements"
    try:
        statements: str | None = execute(plpy, query, ["integer"], [model_id])[0]["statements"]
    except plpy.SPIError:
        # It is asked on behalf of another error, which must not be lost.
        return None
    return statements


def changed_table(plpy: Any, model_id: int) -> tuple[str, str | None] | None:
    """Gives message and hint about a table of a model that is gone or has other columns; None where all are there."""
    query = "select vae_private.check_tables(m) from vae.models m where m.model_id = $1"
    try:
        execute(plpy, query, ["integer"], [model_id])
    except plpy.SPIError as error:
        if error.sqlstate in (UNDEFINED_TABLE, UNDEFINED_COLUMN):
            return str(error), (error.spidata or (None, None, None))[2]
    return None
