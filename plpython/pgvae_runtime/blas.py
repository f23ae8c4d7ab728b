"""What NumPy does not say of its BLAS: its name, how many threads it may use, how to add a product to what is there.

The library that NumPy has loaded is found in this process's memory map and asked by name; where that fails (another
system, another BLAS) the threads stay as they are, and NumPy adds: scoring is only slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# OpenBLAS as Debian builds it, and as NumPy's own wheels carry it, old and new; and whether its integers have 64 bits.
_PREFIXES, _SUFFIXES = ("", "scipy_"), {"": ctypes.c_int, "64_": ctypes.c_int64, "_64": ctypes.c_int64}
Floats = NDArray[np.float32]
# Of a product that BLAS cannot add by itself.
COLUMNS_AT_ONCE = 1024

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112


@dataclass(frozen=True, kw_only=True)
class _Library:
    """The functions of OpenBLAS: openblas_get_num_threads, openblas_set_num_threads, cblas_sgemm."""

    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]
    sgemm: Callable[..., None] | None


def one_thread() -> AbstractContextManager[None]:
    """Keeps BLAS to one thread meanwhile: who computes has threads of its own, or leaves the cores to others."""
    return threads(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Keeps BLAS to so many threads meanwhile."""
    library = _library()
    if library is None:
        yield
        return
    before = library.get_threads()
    library.set_threads(count)
    try:
        yield
    finally:
        library.set_threads(before)


def product_into(left: Floats, right: Floats, out: Floats, spare: Floats) -> Callable[[int, int], None]:
    """Gives a function that adds left [M, K] times the transpose of right [N, K] to the columns first to last of out.

    Each array has its rows as they lie in memory, perhaps with something between two of them. `spare`
    [M, COLUMNS_AT_ONCE] may be overwritten.
    """
    library = _library()
    if library is None or library.sgemm is None or not all(map(_has_whole_rows, (left, right, out))):

        def add(first: int, last: int) -> None:
            for begin in range(first, last, COLUMNS_AT_ONCE):
                own = slice(begin, min(begin + COLUMNS_AT_ONCE, last))
                product = spare[:, : own.stop - begin]
                np.matmul(left, right[own].T, out=product)
                np.add(out[:, own], product, out=out[:, own])

        return add

    # Numbers from here on: asking an array for its address takes as long as a small product.
    rows, depth = left.shape
    sgemm, size = library.sgemm, out.itemsize
    left_place, right_place, out_place = left.ctypes.data, right.ctypes.data, out.ctypes.data
    left_step, right_step, out_step = (array.strides[0] // size for array in (left, right, out))

    def add_in_place(first: int, last: int) -> None:
        sgemm(
            *(_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED, rows, last - first, depth, 1.0),
            *(left_place, left_step, right_place + first * right_step * size, right_step, 1.0),
            *(out_place + first * size, out_step),
        )

    return add_in_place


def _has_whole_rows(array: Floats) -> bool:
    return (
        array.dtype == np.float32
        and array.size > 0
        and array.strides[1] == 4
        and array.strides[0] >= 4 * array.shape[1]
    )


def library_name() -> str:
    """Gives the linear algebra library that numpy has loaded, in its own words where it is OpenBLAS."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return "unknown"
    words = ("blas", "blis", "mkl", "atlas")
    paths = sorted({line.split(None, 5)[5] for line in lines if line.count("/")})
    libraries = [path for path in paths if any(word in Path(path).name.lower() for word in words)]
    for path in libraries:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        # A wheel of numpy brings an OpenBLAS of its own, with other names.
        for name in ("openblas_get_config", "scipy_openblas_get_config64_", "openblas_get_config64_"):
            if hasattr(library, name):
                tell = getattr(library, name)
                tell.restype = ctypes.c_char_p
                return str(tell().decode(errors="replace")).strip()
    return ", ".join(Path(path).name for path in libraries) or "unknown"


@cache
def _library() -> _Library | None:
    """Gives the functions of the OpenBLAS of this process; None where there is no such library."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        for path in {line.split(maxsplit=5)[5] for line in lines if "blas" in line and ".so" in line}:
            library = ctypes.CDLL(path)
            for prefix in _PREFIXES:
                for suffix, integer in _SUFFIXES.items():
                    get_threads = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                    set_threads = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                    if get_threads is None or set_threads is None:
                        continue
                    set_threads.restype = None
                    sgemm = getattr(library, f"{prefix}cblas_sgemm{suffix}", None)
                    if sgemm is not None:
                        sgemm.restype = None
                        number, address = ctypes.c_float, ctypes.c_void_p
                        matrix = [address, integer]
                        sgemm.argtypes = [
                            *[ctypes.c_int] * 3,
                            *[integer] * 3,
                            number,
                            *matrix,
                            *matrix,
                            number,
                            *matrix,
                        ]
                    return _Library(get_threads=get_threads, set_threads=set_threads, sgemm=sgemm)
    except (OSError, IndexError):
        pass
    return None
