"""Errors with the SQLSTATE and the remedy that a client sees."""

from __future__ import annotations

INVALID_PARAMETER = "22023"
INVALID_TRANSACTION_TERMINATION = "2D000"
INSUFFICIENT_PRIVILEGE = "42501"
UNDEFINED_SCHEMA = "3F000"
UNDEFINED_COLUMN = "42703"
UNDEFINED_TABLE = "42P01"
OUT_OF_MEMORY = "53200"
NOT_READY = "55000"
OBJECT_IN_USE = "55006"
QUERY_CANCELED = "57014"
UNKNOWN_MODEL = "VA001"
NO_ACTIVE_VERSION = "VA002"
INCOMPATIBLE_VERSION = "VA003"
CORRUPT_WEIGHTS = "VA004"
NO_DEMAND = "VA050"
NO_SEGMENTS = "VA058"
UNKNOWN_ITEM = "VA051"
NO_OUTCOMES = "VA052"
NO_UPLIFT = "VA053"


class ScoringError(Exception):
    """A refusal: `message` is lower-case and names the value, `hint` says what to do."""

    def __init__(self, message: str, *, sqlstate: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.sqlstate = sqlstate
        self.hint = hint


def corrupt_weights(message: str) -> ScoringError:
    """Gives the refusal of weights that are damaged, or do not fit together."""
    return ScoringError(
        message,
        sqlstate=CORRUPT_WEIGHTS,
        hint="activate another version with vae.activate or vae.rollback, then train again",
    )
