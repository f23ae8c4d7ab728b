"""How many threads the BLAS of this process may use.

NumPy has no way to say it. The library that it has loaded is found in this process's memory map and asked by name;
where that fails (another system, another BLAS) nothing is changed, and scoring is only slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# OpenBLAS as Debian builds it, and as NumPy's own wheels carry it, old and new.
_PREFIXES, _SUFFIXES = ("", "scipy_"), ("", "64_", "_64")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps BLAS to one thread meanwhile: who computes has threads of its own, or leaves the cores to others."""
    functions = _functions()
    if functions is None:
        yield
        return
    get, set_threads = functions
    before = get()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@cache
def _functions() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Gives OpenBLAS's openblas_get_num_threads and openblas_set_num_threads; None where there is no such library."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        for path in {line.split(maxsplit=5)[5] for line in lines if "blas" in line and ".so" in line}:
            library = ctypes.CDLL(path)
            for prefix in _PREFIXES:
                for suffix in _SUFFIXES:
                    get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                    set_threads = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                    if get is not None and set_threads is not None:
                        set_threads.restype = None
                        return get, set_threads
    except (OSError, IndexError):
        pass
    return None
