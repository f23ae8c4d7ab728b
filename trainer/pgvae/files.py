"""Files that a command writes: whole or not at all, and where they lie."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pgvae.errors import PgvaeError


def home_folder() -> Path:
    """Gives the current user's home; PgvaeError where there is none, as under a number without a name."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise PgvaeError(
            "this user has no home folder", hint="set HOME to a folder that this user may write to"
        ) from error


def write_file(path: Path, content: bytes, *, hint: str, mode: int = 0o666) -> None:
    """Writes a file in one step; PgvaeError with that hint where it cannot be.

    A link stays one, and a pipe or a device is written into: neither is replaced. `mode` is that of the new file, less
    the umask.
    """
    try:
        target = path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                file.write(content)
            unfinished.replace(target)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise
    except OSError as error:
        raise PgvaeError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
