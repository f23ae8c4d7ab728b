"""What NumPy does not say of its BLAS: its name, how many threads it may use, how to add a product to what is there,
whether it knows the processor.

The library that NumPy has loaded is found in this process's memory map and asked by name; where that fails (another
system, another BLAS) the threads stay as they are, and NumPy adds: scoring is only slower.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# OpenBLAS as Debian builds it, and as NumPy's own wheels carry it, old and new; and whether its integers have 64 bits.
_PREFIXES, _SUFFIXES = ("", "scipy_"), {"": ctypes.c_int, "64_": ctypes.c_int64, "_64": ctypes.c_int64}
_FUNCTIONS = "openblas_get_num_threads", "openblas_set_num_threads", "openblas_get_config", "cblas_sgemm"
Floats = NDArray[np.float32]
# The processor that OpenBLAS shall have kernels for, where somebody says so.
_CORE = "OPENBLAS_CORETYPE"
# Of a product that BLAS cannot add by itself.
COLUMNS_AT_ONCE = 1024

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112


@dataclass(frozen=True, kw_only=True)
class _Library:
    """The functions of OpenBLAS: openblas_get_num_threads, openblas_set_num_threads, cblas_sgemm; and its words about
    itself.
    """

    get_threads: Callable[[], int]
    set_threads: Callable[[int], None]
    sgemm: Callable[..., None] | None
    config: str | None


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
    library = _library()
    if library is not None and library.config is not None:
        return library.config
    return ", ".join(Path(path).name for path in _loaded()) or "unknown"


def _loaded() -> list[str]:
    """Gives the paths of the linear algebra libraries in this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = sorted({line.split(maxsplit=5)[5] for line in lines if line.count("/")})
    return [path for path in paths if any(word in Path(path).name.lower() for word in ("blas", "blis", "mkl", "atlas"))]


@cache
def _library() -> _Library | None:
    """Gives the functions of the OpenBLAS of this process; None where there is no such library."""
    for path in _loaded():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        # A wheel of numpy brings an OpenBLAS of its own, with other names.
        _know_the_processor(library)
        for prefix in _PREFIXES:
            for suffix, integer in _SUFFIXES.items():
                get_threads, set_threads, config, sgemm = (
                    getattr(library, prefix + name + suffix, None) for name in _FUNCTIONS
                )
                if get_threads is None or set_threads is None:
                    continue
                set_threads.restype = None
                if sgemm is not None:
                    sgemm.restype = None
                    number, matrix = ctypes.c_float, [ctypes.c_void_p, integer]
                    shape = [ctypes.c_int] * 3 + [integer] * 3
                    sgemm.argtypes = [*shape, number, *matrix, *matrix, number, *matrix]
                if config is not None:
                    config.restype = ctypes.c_char_p
                return _Library(
                    get_threads=get_threads,
                    set_threads=set_threads,
                    sgemm=sgemm,
                    config=config().decode(errors="replace").strip() if config is not None else None,
                )
    return None


def _know_the_processor(library: ctypes.CDLL) -> None:
    """Lets an OpenBLAS that is older than the processor use the kernels for AVX2 or AVX-512.

    What it does not know it takes for a Prescott, and multiplies five times slower: that of Debian 12 does so on Xeons
    of 2023. It looks at the processor again in what it calls itself at its start, as the environment says meanwhile.
    """
    names = ("openblas_get_corename", "gotoblas_dynamic_quit", "gotoblas_dynamic_init")
    get_core, leave, look_again = (getattr(library, name, None) for name in names)
    if get_core is None or leave is None or look_again is None or _CORE in os.environ:
        return
    get_core.restype = ctypes.c_char_p
    if get_core() != b"Prescott" or not (core := _core_for(_features_of_the_processor())):
        return
    os.environ[_CORE] = core
    leave()
    look_again()
    del os.environ[_CORE]


def _core_for(features: set[str]) -> str | None:
    if features >= {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}:
        return "SkylakeX"
    return "Haswell" if features >= {"avx2", "fma"} else None


def _features_of_the_processor() -> set[str]:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return set(next((line.split() for line in lines if line.startswith("flags")), []))
    except OSError:
        return set()
