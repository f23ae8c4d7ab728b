"""Which device scores all users, and with how much of a GPU: the settings vae.device and vae.gpu_*.

Live calls do not ask: one user is scored before a GPU would have begun.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import workers
from .cuda_kernels import MAX_K
from .errors import INVALID_PARAMETER, ScoringError
from .gpu_costs import Costs, Work
from .limits import size

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "float16x3", "tf32", "float16")

_SETTINGS = "select " + ", ".join(
    f"nullif(pg_catalog.current_setting('vae.{name}', true), '') as {name}"
    for name in ("device", "gpu_memory", "gpu_precision", "gpu_costs")
)
# Without vae.gpu_memory: others may use the same GPU.
_DEFAULT_MEMORY, _SHARE_OF_FREE_MEMORY = 2 << 30, 0.5

# Set once CUDA's context was reset. What CuPy and cuBLAS remember of it could end the process, and with it all
# sessions. In the environment of the process, since a newer runtime in the same session must know it, too.
_RELEASED = "PGVAE_GPU_RELEASED"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU to score on: CuPy, the bytes of its memory that a statement may take, and the precision of the product."""

    cupy: Any
    memory: int
    precision: str


def choose(plpy: Any, work: Work, k: int) -> Gpu | None:
    """Gives the GPU for k items for all users, by the settings and the size of the work; None: the CPU scores.

    A GPU that is wanted and cannot be used is told of with a NOTICE; under auto the CPU takes over silently.
    ScoringError for a setting that is wrong, whether or not it is needed.
    """
    row = plpy.execute(_SETTINGS)[0]
    setting = _one_of("device", row["device"] or "auto", DEVICES)
    precision = _one_of("gpu_precision", row["gpu_precision"] or "float32", PRECISIONS)
    memory = size("gpu_memory", row["gpu_memory"]) if row["gpu_memory"] else None
    costs = Costs.from_setting(row["gpu_costs"])
    if setting == "cpu" or (setting == "auto" and costs.seconds_on_cpu(work) <= costs.seconds_on_gpu(work)):
        return None
    try:
        if k > MAX_K:
            raise RuntimeError(f"it ranks at most {MAX_K} items a user, not {k}")
        if _RELEASED in os.environ:
            raise RuntimeError("this session has released it")
        # CUDA starts threads of its own with its context, which the question for its memory makes.
        with workers.signals_kept_from_threads():
            cupy = import_cupy()
            if not cupy.cuda.runtime.getDeviceCount():
                raise RuntimeError("no device")
            free = cupy.cuda.runtime.memGetInfo()[0]
        if memory is None:
            memory = min(_DEFAULT_MEMORY, int(_SHARE_OF_FREE_MEMORY * free))
    # Whatever keeps CuPy from working (not installed, no driver, no device) must not keep the query from an answer.
    except Exception as error:
        if setting == "cuda":
            plpy.notice(f"vae.device is cuda, but no GPU is usable ({reason(error)}); the CPU scores")
        return None
    return Gpu(cupy=cupy, memory=memory, precision=precision)


def remember_release() -> None:
    """Leaves this session to the CPU from now on."""
    os.environ[_RELEASED] = "yes"


def reason(error: BaseException) -> str:
    """Gives the first line of what a driver, a compiler or an import says that failed, without what it says around
    the cause.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def import_cupy() -> Any:
    """Imports CuPy. Version 14 makes a folder for compiled kernels then, and fails where it cannot; pgvae's kernels are
    never put there.
    """
    try:
        folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    # RuntimeError: nobody knows of a home.
    except (OSError, RuntimeError):
        os.environ["CUPY_CACHE_DIR"] = os.sep
    import cupy

    return cupy


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ScoringError(
            f"vae.{name} is {value!r}", sqlstate=INVALID_PARAMETER, hint=f"set it to one of {', '.join(known)}"
        )
    return value
