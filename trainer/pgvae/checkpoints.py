"""What an interrupted training goes on from: its state after an epoch, in a file per training."""

from __future__ import annotations

import hashlib
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgvae import __version__
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.files import home_folder
from pgvae.ranking import Holdout
from pgvae_runtime.tokens import SECONDS_PER_DAY

# Writing takes about a second for 40 000 items: a short training is sooner repeated.
_SECONDS_BETWEEN = 60.0
# What is left of a training that nobody went on with.
_KEPT_SECONDS = 7 * SECONDS_PER_DAY
_NAME = re.compile(r"[0-9a-f]{32}\.(pt|[0-9]+)")

State = dict[str, Any]


def default_folder() -> Path:
    """Gives the folder of the current user's checkpoints."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache") / "pgvae" / "checkpoints"


class Checkpoints:
    """Checkpoints in a folder, one file per training; a training is known by all that decides its result."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: set[Path] = set()

    def of(
        self, dataset: Dataset, config: TrainingConfig, validation: Holdout | None = None, **others: object
    ) -> Checkpoint:
        """Gives the checkpoint of the training of these data with this configuration, judged by this holdout."""
        digest = hashlib.sha256(repr((sorted(asdict(config).items()), others, __version__, torch.__version__)).encode())
        for array in (dataset.user, dataset.item, dataset.event_type, dataset.occurred_at, dataset.weight):
            digest.update(np.ascontiguousarray(array).data)
        for bag in (dataset.user_features, dataset.item_features):
            digest.update(np.ascontiguousarray(bag.start).data)
            digest.update(np.ascontiguousarray(bag.token).data)
        if validation is not None:
            for array in (validation.users, validation.truth_start, validation.truth_item):
                digest.update(np.ascontiguousarray(array).data)
        digest.update("\0".join((*dataset.event_types, "", *dataset.item_keys)).encode())
        path = self._folder / f"{digest.hexdigest()[:32]}.pt"
        self._used.add(path)
        return Checkpoint(path)

    def remove(self) -> None:
        """Removes those that were used: what they were for is done. Nothing was saved where nothing can be removed."""
        for path in self._used:
            with suppress(OSError):
                path.unlink()


class Checkpoint:
    """One training's file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """Gives the last state that was saved; None where there is none, or none that can be read."""
        try:
            # weights_only: a file that somebody else put there cannot run code.
            state: State = torch.load(self._path, map_location="cpu", weights_only=True)
        # No file, one cut short by a full disk, one of another PyTorch: the training begins at its beginning.
        except Exception:
            return None
        return state

    @property
    def is_due(self) -> bool:
        """Whether the last one was saved long enough ago."""
        return time.monotonic() - self._saved >= _SECONDS_BETWEEN

    def save(self, state: State) -> None:
        """Saves a state in place of the last one; whoever kills the process leaves one of the two.

        Where the disk does not take it, the training goes on without.
        """
        self._saved = time.monotonic()
        unfinished = self._path.with_suffix(f".{os.getpid()}")
        # RuntimeError is what PyTorch makes of a full disk.
        with suppress(OSError, RuntimeError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.save(state, unfinished)
                unfinished.replace(self._path)
            finally:
                unfinished.unlink(missing_ok=True)
            for path in self._path.parent.iterdir():
                # The folder may be one that the user keeps other files in.
                if _NAME.fullmatch(path.name) and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                    path.unlink(missing_ok=True)
