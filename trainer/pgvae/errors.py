"""The one exception that the command line turns into a message and a remedy."""

from __future__ import annotations


class PgvaeError(Exception):
    """A failure that the user can mend.

    `message` is lower-case and names the offending value; `hint` says what to do.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
