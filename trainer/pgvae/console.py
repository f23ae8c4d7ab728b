"""The terminal: one console for results, one for progress and errors, one style of progress bar."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

# A file or a pipe has no width, and rich takes 80: tables would lose the ends of their columns there.
_PIPE_WIDTH = 160


class _Console(Console):
    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Prints as rich does, but a sentence in a file or a pipe stays in one line."""
        if soft_wrap is None:
            soft_wrap = not self.is_terminal and all(isinstance(each, str | Text) for each in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)


def _console(*, stderr: bool = False) -> Console:
    # A key or a name such as a:x:b stays what it is.
    console = _Console(stderr=stderr, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


out = _console()
err = _console(stderr=True)


def progress(*extra: TextColumn) -> Progress:
    """Gives a progress display on standard error; it prints nothing where that is not a terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *extra,
        console=err,
        disable=not err.is_terminal,
    )


def progress_with_detail() -> Progress:
    """Gives a progress display for steps that are not counted, but say more: in the field `detail`."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
    )
