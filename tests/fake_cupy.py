"""Stands in for CuPy where there is no GPU: the same names, strict about what is on the device and what is not.

Its arrays refuse to become NumPy arrays and to meet them in one expression, as CuPy's do, so that code which runs on it
moves data only where it says so. It has the names that the runtime needs and that CuPy 13 was seen to have: a new
one belongs here only after a look at CuPy's own documentation. The text of this module also runs inside PostgreSQL.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

# How many computations ran here, and what makes one fail: set to an exception to see a driver break.
state = SimpleNamespace(computations=0, failure=None)


class ndarray:
    """An array in the memory of a device."""

    # NumPy then leaves `host * device` to this class, which refuses.
    __array_ufunc__ = None

    def __init__(self, host):
        self._host = host

    def __array__(self, *args, **kwargs):
        raise TypeError("a device array does not turn into a NumPy array by itself: use asnumpy")

    def __iter__(self):
        raise TypeError("iterating over a device array copies it element by element")

    def __getitem__(self, key):
        return _wrap(self._host[_unwrap(key)])

    def __setitem__(self, key, value):
        self._host[_unwrap(key)] = _unwrap(value)

    def __len__(self):
        return len(self._host)

    @property
    def shape(self):
        return self._host.shape

    @property
    def dtype(self):
        return self._host.dtype

    @property
    def T(self):
        return _wrap(self._host.T)

    def ravel(self):
        return _wrap(self._host.ravel())

    def reshape(self, *shape):
        return _wrap(self._host.reshape(*shape))

    def astype(self, dtype):
        return _wrap(self._host.astype(dtype))

    def max(self, axis=None, keepdims=False):
        return _wrap(self._host.max(axis=axis, keepdims=keepdims))

    def sum(self, axis=None, keepdims=False):
        return _wrap(self._host.sum(axis=axis, keepdims=keepdims))


def _operator(name):
    def operate(self, *others):
        result = getattr(self._host, name)(*(_unwrap(other) for other in others))
        if result is NotImplemented:
            return result
        return self if result is self._host else _wrap(result)

    return operate


_ARITHMETIC = ("add", "sub", "mul", "truediv", "matmul")
for _name in (
    *("neg", "eq", "ne", "lt", "le", "gt", "ge"),
    *(prefix + name for prefix in ("", "r", "i") for name in _ARITHMETIC),
):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _wrap(host):
    state.computations += 1
    if state.failure is not None:
        raise state.failure
    return ndarray(host) if isinstance(host, np.ndarray) else ndarray(np.asarray(host))


def _unwrap(value):
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array is not on the device: use asarray")
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrap(each) for each in value)
    return value


def _on_device(function):
    def call(*args, **kwargs):
        return _wrap(function(*_unwrap(args), **{name: _unwrap(value) for name, value in kwargs.items()}))

    return call


float32 = np.float32
zeros, empty, arange, broadcast_to = (_on_device(f) for f in (np.zeros, np.empty, np.arange, np.broadcast_to))
sort, argpartition, take_along_axis = (_on_device(f) for f in (np.sort, np.argpartition, np.take_along_axis))
cumsum, searchsorted = _on_device(np.cumsum), _on_device(np.searchsorted)
exp, sqrt, tanh, maximum, matmul = (_on_device(f) for f in (np.exp, np.sqrt, np.tanh, np.maximum, np.matmul))


def argsort(a, axis=-1, kind=None):
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    return _on_device(np.argsort)(a, axis=axis, kind="stable")


def bincount(x, weights=None, minlength=None):
    """Refuses an empty array, as CuPy does, whose size it takes from its maximum."""
    if not x.shape[0]:
        raise ValueError("zero-size array to reduction operation cupy_max which has no identity")
    return _on_device(np.bincount)(x, weights=weights, minlength=minlength or 0)


def asarray(a):
    return a if isinstance(a, ndarray) else _wrap(np.array(a))


def asnumpy(a):
    return a._host.copy()


class _Add:
    __call__ = staticmethod(_on_device(np.add))

    @staticmethod
    def at(a, indices, b):
        np.add.at(*_unwrap((a, indices, b)))

    @staticmethod
    def reduceat(array, indices, axis=0):
        """Gives differences of one running sum, as CuPy does: fast there, and inexact."""
        assert axis == 0
        values, starts = _unwrap((array, indices))
        running = np.concatenate((np.zeros_like(values[:1]), np.cumsum(values, axis=0, dtype=values.dtype)))
        return _wrap(running[np.append(starts[1:], len(values))] - running[starts])


add = _Add()

cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: 1))
