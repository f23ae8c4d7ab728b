"""Stands in for CuPy where there is no GPU: the same names, strict about what is on the device and what is not.

Its arrays refuse to become NumPy arrays, as CuPy's do, so that code which runs on it moves data only where it says so.
It has the names that the runtime needs, with the parameters that they have in the source of CuPy 12, 13 and 14: a new
one belongs here only after a look at it. The text of this module also runs inside PostgreSQL.

Kernels run too, on one core: a RawModule is a library that cuda_on_cpu.py has compiled from the same source. What is
queued on a stream happens when the stream is waited for, not before, so that whoever does not wait sees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import re
import weakref
from types import SimpleNamespace

import numpy as np

# `computations` ran here. `failure` is an exception that a device raises after `countdown` more of them. `build` gives
# the path of the library of a source and its options; `libraries` are those that are there already, by digest. `used`
# of the `total` bytes of the device's memory are taken, `most` is the most that was; `handles` are cuBLAS's.
state = SimpleNamespace()


def reset(build):
    """Puts a fresh device in the place of the old one."""
    vars(state).update(computations=0, failure=None, countdown=0, build=build, libraries={})
    vars(state).update(used=0, most=0, total=1 << 30, handles=set(), seed=0)


reset(None)


class OutOfMemoryError(MemoryError):
    pass


class ndarray:
    """An array in the memory of a device."""

    # NumPy then leaves `host * device` to this class, which refuses.
    __array_ufunc__ = None

    def __init__(self, host, memory=None):
        self._host = host
        # Whoever holds a view holds the memory.
        self._memory = memory

    @property
    def data(self):
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def nbytes(self):
        return self._host.nbytes

    def view(self, dtype):
        return ndarray(self._host.view(dtype), self._memory)

    def __array__(self, *args, **kwargs):
        raise TypeError("a device array does not turn into a NumPy array by itself: use asnumpy")

    def __getitem__(self, key):
        assert isinstance(key, slice)
        return ndarray(self._host[key], self._memory)

    def __len__(self):
        return len(self._host)

    @property
    def shape(self):
        return self._host.shape

    @property
    def dtype(self):
        return self._host.dtype


def _compute():
    state.computations += 1
    if state.failure is not None:
        state.countdown -= 1
        if state.countdown < 0:
            # A copy: one that is kept would keep, in its traceback, whatever was on the way.
            raise type(state.failure)(*state.failure.args)


__version__ = "14.2.0"


def asarray(a):
    _compute()
    return ndarray(np.array(a))


def asnumpy(a):
    return a._host.copy()


# Memory


class _Memory:
    """Bytes of the device, back in their pool when nobody has them any more."""

    def __init__(self, pool, size):
        self.pool, self.size = pool, 0
        pool.take(size)
        self.size = size

    def __del__(self):
        self.pool.give(self.size)


class MemoryPool:
    """Keeps what is given back until free_all_blocks, as CuPy's does."""

    def __init__(self):
        self._limit, self._used, self._kept = None, 0, 0

    def set_limit(self, size=None, fraction=None):
        assert fraction is None, "not written"
        if size < 0:
            raise ValueError(f"memory limit size out of range: {size}")
        # 0 is no limit.
        self._limit = size or None

    def malloc(self, size):
        return _Memory(self, -(-size // 512) * 512)

    def take(self, size):
        fresh = max(0, size - self._kept)
        if self._limit is not None and self._used + self._kept + fresh > self._limit:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (limit set to: {self._limit:,} bytes).")
        if state.used + fresh > state.total:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (allocated so far: {state.used:,} bytes).")
        self._used += size
        self._kept = max(0, self._kept - size)
        state.used += fresh
        state.most = max(state.most, state.used)

    def give(self, size):
        self._used -= size
        self._kept += size

    def free_all_blocks(self, stream=None):
        state.used -= self._kept
        self._kept = 0

    def __del__(self):
        self.free_all_blocks()


class PinnedMemoryPool:
    def malloc(self, size):
        _compute()
        # Longer than what was asked for, a power of two, and not zero.
        return memoryview(bytearray(b"\x55" * max(512, 1 << (size - 1).bit_length())))

    def free_all_blocks(self):
        pass


_default_pool, _default_pinned_pool = MemoryPool(), PinnedMemoryPool()
_allocators = [_default_pool.malloc]


@contextlib.contextmanager
def _using_allocator(allocator=None):
    _allocators.append(allocator)
    try:
        yield
    finally:
        _allocators.pop()


def empty(shape, dtype=float, order="C"):
    """Gives memory that is not zero."""
    _compute()
    assert order == "C"
    host = np.empty(shape, dtype)
    host.view(np.uint8).fill(0x55) if host.ndim and host.size else None
    return ndarray(host, _allocators[-1](host.nbytes))


def get_default_memory_pool():
    return _default_pool


def get_default_pinned_memory_pool():
    return _default_pinned_pool


def clear_memo():
    pass


# Streams: what is queued runs when somebody waits.


class Stream:
    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        if not null:
            _compute()
        self._queue = []
        _streams[self.ptr] = self

    @property
    def ptr(self):
        return id(self)

    def __enter__(self):
        _current.append(self)
        return self

    def __exit__(self, *args):
        _current.pop()

    def add(self, work):
        self._queue.append(work)

    def synchronize(self):
        _compute()
        while self._queue:
            self._queue.pop(0)()


_streams = weakref.WeakValueDictionary()
_null_stream = Stream(null=True)
_current = [_null_stream]


def _device_synchronize():
    for stream in list(_streams.values()):
        stream.synchronize()


def _copy(target, source, size):
    ctypes.memmove(target, source, size)


def _memcpy(target, source, size, kind):
    _compute()
    _null_stream.synchronize()
    _copy(target, source, size)


def _memcpy_async(target, source, size, kind, stream):
    _compute()
    _streams[stream].add(lambda: _copy(target, source, size))


# Kernels and cuBLAS


class RawModule:
    # Those of CuPy that pgvae does not need are refused.
    def __init__(self, *, code, options=()):
        assert isinstance(code, str) and isinstance(options, tuple)
        self._code, self._options, self._library = code, options, None

    def compile(self, log_stream=None):
        _compute()
        digest = hashlib.sha256(repr((self._code, self._options)).encode()).hexdigest()
        if digest not in state.libraries:
            if state.build is None:
                raise RuntimeError("CuPy failed to load libnvrtc.so.12")
            state.libraries[digest] = state.build(self._code, self._options)
        self._library = ctypes.CDLL(state.libraries[digest])

    def get_function(self, name):
        if self._library is None:
            self.compile()
        signature = re.search(rf"\b{name}\(([^)]*)\)", self._code.partition('extern "C"')[2]).group(1)
        return _Kernel(getattr(self._library, "launch_" + name), signature)


_ELEMENTS = {"float": "float32", "int": "int32", "unsigned short": "uint16"}


class _Kernel:
    def __init__(self, launch, signature):
        self._launch = launch
        self._wanted = [
            (kind.replace("const ", "").strip(), bool(star))
            for kind, star in re.findall(r"([a-z ]+?)\s*(\*?)\s*\w+(?:,|$)", signature.replace("\n", " "))
        ]

    def __call__(self, grid, block, args, *, shared_mem=0):
        _compute()
        assert all(isinstance(each, tuple) for each in (grid, block, args)) and shared_mem == 0
        assert len(args) == len(self._wanted)
        cells = []
        for argument, (kind, is_pointer) in zip(args, self._wanted, strict=True):
            # CuPy passes on whatever it gets; a kernel would read it as something else.
            assert isinstance(argument, ndarray) == is_pointer, (argument, kind)
            assert argument.dtype == _ELEMENTS[kind], (argument.dtype, kind)
            if is_pointer:
                assert argument._host.flags.c_contiguous
                cells.append(ctypes.c_void_p(argument._host.ctypes.data))
            else:
                cells.append(ctypes.create_string_buffer(argument.tobytes()))
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        state.seed += 1
        seed = state.seed

        def work(held=(args, cells)):
            self._launch(ctypes.c_uint(grid[0]), ctypes.c_uint(block[0]), ctypes.c_uint(seed), pointers)

        _current[-1].add(work)


def _create_handle():
    _compute()
    state.handles.add(len(state.handles) + 1)
    return max(state.handles)


def _matrix(pointer, kind, rows, columns, length):
    """Gives a matrix that lies column by column, each of `length` numbers, as [rows, columns]."""
    dtype = {0: np.float32, 2: np.float16}[kind]
    kind_of_cell = ctypes.c_ubyte * (columns * length * np.dtype(dtype).itemsize)
    return np.frombuffer(kind_of_cell.from_address(pointer), dtype).reshape(columns, length)[:, :rows].T


def _tf32(matrix):
    """Cuts float32 to the ten bits of a mantissa that a tensor core reads: rounded towards zero, the worst case."""
    return (np.ascontiguousarray(matrix).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _gemm_ex(
    handle, transa, transb, m, n, k, alpha, a, atype, lda, b, btype, ldb, beta, c, ctype, ldc, compute_type, algo
):
    _compute()
    assert handle in state.handles
    # CuPy gives the handle the current stream.
    assert _current[-1] is not _null_stream
    assert (transa, transb, ctype, algo) == (1, 0, 0, -1) and compute_type in (68, 77)
    scale = ctypes.c_float.from_address(alpha).value
    assert ctypes.c_float.from_address(beta).value == 0.0

    def work():
        left, right = _matrix(a, atype, k, m, lda).T, _matrix(b, btype, k, n, ldb)
        if compute_type == 77:
            left, right = _tf32(left), _tf32(right)
        product = np.float32(scale) * (left.astype(np.float32) @ right.astype(np.float32))
        _matrix(c, ctype, m, n, ldc)[:] = product

    _current[-1].add(work)


cuda = SimpleNamespace(
    runtime=SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda device: {"name": b"a stand-in"},
        memGetInfo=lambda: (state.total - state.used, state.total),
        memcpy=_memcpy,
        memcpyAsync=_memcpy_async,
        deviceSynchronize=_device_synchronize,
    ),
    cublas=SimpleNamespace(
        create=_create_handle,
        destroy=lambda handle: state.handles.remove(handle),
        gemmEx=_gemm_ex,
    ),
    MemoryPool=MemoryPool,
    PinnedMemoryPool=PinnedMemoryPool,
    Stream=Stream,
    using_allocator=_using_allocator,
    get_current_stream=lambda: _current[-1],
)
