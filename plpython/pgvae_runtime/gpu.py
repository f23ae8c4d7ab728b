"""Scores users on a GPU: matrix products by cuBLAS, all between them by the kernels of cuda_kernels.

The mathematics is that of forward.py and scoring.py, which are its specification; nothing else of theirs is used here.
CuPy is needed for memory, streams, the compiler and cuBLAS only, none of its own kernels: then nothing of it outlives
a statement, and its memory can be given back. What runs: docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cuda_kernels as kernels
from . import device, forward
from .errors import OBJECT_IN_USE, ScoringError
from .scoring import seen_columns, unknown_users
from .store import Version
from .tokens import History

# Best items [U, k], their scores [U, k], and which users are cold starts [U].
Scored = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

# How the product with the catalogue is computed: (parts of a row, cuBLAS's compute type). All add up in float32.
PRECISIONS = {"float32": (0, 68), "tf32": (0, 77), "float16": (1, 68), "float16x3": (3, 68)}
_COMPUTE_32F = 68
_TRANSPOSED, _AS_IT_IS, _DEFAULT_ALGORITHM = 1, 0, -1
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 2}
_TO_DEVICE, _TO_HOST = 1, 2

MAX_USERS = 4096
# Fewer users at a time than this leave most of a GPU idle.
_MIN_USERS = 32
# What cuBLAS takes for itself, outside of CuPy's pool: 32 MB for each handle on a Hopper, less on others.
_CUBLAS_BYTES = 2 * 32 * 1024 * 1024
_PIECE = 1 << 16
# FP16 ends at 65504. A direction's numbers are at most 1.
_LARGEST_HALF, _DIRECTION_SCALE = 16384.0, 4096.0
# On the device at once: one batch is computed while the next one is packed and copied.
_SLOTS = 2

_TENSORS = (
    *("item_embedding", "event_type_embedding", "age_embedding", "order_embedding", "user_feature_embedding"),
    *("encoder_gate_weight", "encoder_gate_bias", "event_type_gate", "age_gate", "order_gate", "gate_recency"),
    *("encoder_weight", "encoder_bias", "mean_weight", "mean_bias", "decoder_gate_weight", "decoder_gate_bias"),
    *("decoder_weight", "decoder_bias", "decoder_output_weight"),
    *("shortcut_start", "shortcut_item", "shortcut_weight", "shortcut_recency"),
)

# Scorers of this session that hold memory of the device.
_open: set[GpuScorer] = set()


class GpuScorer:
    """Gives the best items of users, as the CPU does but for ties within 1e-5 (with precision float32 or float16x3).

    `memory` is how many bytes of the device's memory it may take. MemoryError where that is too little; whatever CuPy
    raises where the device fails. `close` gives all memory back.
    """

    def __init__(self, cupy: Any, version: Version, k: int, *, memory: int, precision: str = "float32") -> None:
        self._cupy = cupy
        self._version = version
        self._items = version.item_count
        self._k = min(k, self._items)
        if self._k > kernels.MAX_K:
            raise ValueError(f"{k} items a user are more than the {kernels.MAX_K} that the GPU ranks")
        self._width: int = version.weights["item_embedding"].shape[1]
        self._hidden: int = version.weights["encoder_weight"].shape[0]
        self._parts, self._compute = PRECISIONS[precision]
        # A multiple of 32 floats: the rows of the logits begin at a cache line.
        self._stride = -(-self._items // 32) * 32
        # For whoever nothing is known of: what is popular.
        items, values = forward.top_k(version.weights["item_popularity"][None, :], self._k)
        self._cold = items[0], values[0]
        self.users = self._users_at_a_time(memory)
        # An event takes up to 30 bytes as a token and as a seen item, of the 16 times max_history that a user is
        # reckoned with. Half of them only, as what grows leaves gaps.
        self._events = self.users * version.max_history // 4
        self._pool = cupy.cuda.MemoryPool()
        self._pool.set_limit(size=memory - _CUBLAS_BYTES)
        self._pinned = cupy.cuda.PinnedMemoryPool()
        self._waiting: deque[tuple[_Slot, int, NDArray[Any], NDArray[Any]]] = deque()
        self._done: deque[Scored] = deque()
        self._chunks: deque[int] = deque()
        self._slots: list[_Slot] = []
        self._weights: dict[str, Any] = {}
        self._function: Any = None
        self._output: Any = None
        _open.add(self)
        try:
            self._function = _compiled(cupy, self._width)
            with self._allocation():
                self._load()
                # One by one: `close` must find the first where the second fails.
                for _ in range(_SLOTS):
                    self._slots.append(_Slot(self))
        except BaseException:
            self.close()
            raise

    def __call__(self, history: History) -> Scored:
        """Gives the best items of these users."""
        self.submit(history)
        return self.collect()

    def submit(self, history: History) -> None:
        """Begins to score these users, and returns while the device computes. A shorter last batch is fine."""
        chunks = list(_chunks(history, self.users, self._events))
        self._chunks.append(len(chunks))
        for chunk in chunks:
            if len(self._waiting) == len(self._slots):
                self._finish()
            self._begin(chunk)

    def collect(self) -> Scored:
        """Waits for the users that were submitted first, and gives their best items."""
        for _ in range(self._chunks[0] - len(self._done)):
            self._finish()
        parts = [self._done.popleft() for _ in range(self._chunks.popleft())]
        items, values, cold = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return items, values, cold

    def close(self) -> None:
        """Gives the device's memory back; what fails meanwhile is left to the end of the session."""
        _open.discard(self)
        self._waiting.clear()
        # Popped: a loop's variable would keep the last one alive.
        while self._slots:
            self._slots.pop().close()
        self._weights.clear()
        self._output = self._bias = self._function = None
        with contextlib.suppress(Exception):
            self._pool.free_all_blocks()
            self._pinned.free_all_blocks()

    def _allocation(self) -> Any:
        return self._cupy.cuda.using_allocator(self._pool.malloc)

    def _users_at_a_time(self, memory: int) -> int:
        weights = self._version.weights
        parts = self._parts
        fixed = sum(weights[name].nbytes for name in _TENSORS) + 4 * self._stride
        fixed += self._items * self._width * (2 * parts if parts else 4) + (4 * _PIECE * self._width if parts else 0)
        tokens = 4 * (4 * self._version.max_history + 16)
        user = 4 * (self._stride + 4 * self._width + self._hidden + 2 * self._k) + 2 * parts * self._width + tokens
        users = int(min(MAX_USERS, (memory - _CUBLAS_BYTES - fixed) // (_SLOTS * user)))
        if users < _MIN_USERS:
            needed = fixed + _CUBLAS_BYTES + _MIN_USERS * _SLOTS * user
            raise MemoryError(f"{memory >> 20} MB of GPU memory are too little, {-(-needed >> 20)} MB are needed")
        return users

    def _load(self) -> None:
        weights = self._version.weights
        self._weights = {name: self._copied(weights[name]) for name in _TENSORS}
        bias = np.zeros(self._stride, dtype=np.float32)
        bias[: self._items] = weights["output_bias"]
        self._bias = self._copied(bias)
        output = weights["output_weight"]
        self._alpha = np.ones(1, dtype=np.float32)
        if self._parts:
            scale = _power_of_two_below(_LARGEST_HALF / max(float(np.abs(output).max(initial=0.0)), 1e-30))
            self._alpha /= np.float32(scale * _DIRECTION_SCALE)
            self._output = self._cupy.empty((self._items, self._parts * self._width), np.uint16)
            # Piece by piece: all of it in float32 would take as much memory again.
            for begin in range(0, self._items, _PIECE):
                piece = self._copied(output[begin : begin + _PIECE])
                self._to_halves(piece, self._output[begin : begin + _PIECE], scale, low_part=1)
                # Given back before the next one is taken.
                del piece
        else:
            self._output = self._copied(output)
        # The slots' streams do not wait for the one that this ran on.
        self._cupy.cuda.runtime.deviceSynchronize()

    def _copied(self, array: NDArray[Any]) -> Any:
        """Gives the array on the device. CuPy's asarray would keep pinned memory in a pool that others use."""
        array = np.ascontiguousarray(array)
        out = self._cupy.empty(array.shape, array.dtype)
        if array.size:
            self._cupy.cuda.runtime.memcpy(out.data.ptr, array.ctypes.data, array.nbytes, _TO_DEVICE)
        return out

    def _to_halves(self, rows: Any, halves: Any, scale: float, *, low_part: int) -> None:
        self._launch(
            *("to_halves", min(len(rows), 4096), np.int32(len(rows)), np.int32(self._parts)),
            *(np.int32(low_part if self._parts == 3 else -1), np.float32(scale), rows, halves),
        )

    def _launch(self, name: str, blocks: int, *arguments: Any) -> None:
        if blocks:
            self._function(name)((blocks,), (kernels.THREADS,), arguments)

    def _product(self, handle: int, left: Any, right: Any, out: Any, columns: int, *, catalogue: bool = False) -> None:
        """Writes left [U, n] · right [columns, n]^T into the first columns of the rows of `out`."""
        kind = _TYPES[left.dtype]
        alpha = self._alpha if catalogue else _ONE
        # cuBLAS counts columns first: what it sees is the transpose of everything.
        self._cupy.cuda.cublas.gemmEx(
            *(handle, _TRANSPOSED, _AS_IT_IS, columns, len(left), left.shape[1], alpha.ctypes.data),
            *(right.data.ptr, kind, right.shape[1], left.data.ptr, kind, left.shape[1], _ZERO.ctypes.data),
            *(out.data.ptr, 0, out.shape[1], self._compute if catalogue else _COMPUTE_32F, _DEFAULT_ALGORITHM),
        )

    def _begin(self, history: History) -> None:
        """Packs a chunk, and queues all its work on the stream of a free slot."""
        busy = {id(slot) for slot, *_ in self._waiting}
        slot = next(slot for slot in self._slots if id(slot) not in busy)
        users = len(history.counts)
        packed = self._pack(history)
        with self._allocation(), slot.stream:
            arrays = slot.upload(packed)
            self._queue(slot, users, arrays)
            slot.download(2 * users * self._k)
        self._waiting.append((slot, users, history.counts == 0, unknown_users(history)))

    def _pack(self, history: History) -> list[NDArray[np.int32]]:
        """Gives what a chunk brings to the device: tokens, features, seen items, each after where a user's begin."""
        tokens = history.tokens(self._version.max_history)
        known = len(self._version.weights["item_embedding"])
        for index, size in ((tokens.item, known), (tokens.event_type, len(self._version.event_types))):
            # A GPU would read beyond the end of its memory, and fail for the rest of the session.
            if len(index) and not 0 <= index.min() <= index.max() < size:
                raise IndexError(f"a history names number {index.max()} of {size}")
        kind = tokens.event_type << kernels.TYPE_SHIFT | tokens.age << kernels.AGE_SHIFT | tokens.order
        user, item = seen_columns(history, self._version.targets, self._version.columns)
        seen = np.unique(user * self._items + item)
        first_seen = np.searchsorted(seen, np.arange(len(history.counts) + 1) * self._items)
        features = tokens.features
        first_feature = np.zeros(len(tokens.start), dtype=np.int32) if features is None else features.start
        token = np.zeros(0, dtype=np.int32) if features is None else features.token
        arrays = (tokens.start, tokens.item, kind, first_feature, token, first_seen, seen % self._items)
        return [array.astype(np.int32) for array in arrays]

    def _queue(self, slot: _Slot, users: int, arrays: list[Any]) -> None:
        token_start, token_item, kind, feature_start, feature, seen_start, seen_item = arrays
        w, width = self._weights, self._width
        n, size = np.int32(users), np.int32(users * width)
        hidden_size, columns = np.int32(users * self._hidden), np.int32(self._hidden)
        warps = -(-users // (kernels.THREADS // 32))
        blocks, hidden_blocks = (-(-int(each) // kernels.THREADS) for each in (size, hidden_size))
        pooled, hidden, mean, gated = (each[:users] for each in (slot.pooled, slot.hidden, slot.mean, slot.gated))
        self._launch(
            *("pool_histories", warps, n, token_start, token_item, kind, feature_start, feature),
            *(w[f"{name}_embedding"] for name in ("item", "event_type", "age", "order", "user_feature")),
            *(w["encoder_gate_weight"], w["encoder_gate_bias"]),
            *(w[f"{name}_gate"] for name in ("event_type", "age", "order")),
            *(w["gate_recency"], pooled),
        )
        self._product(slot.handle, pooled, w["encoder_weight"], hidden, self._hidden)
        self._launch("tanh_layer", hidden_blocks, hidden_size, columns, hidden, w["encoder_bias"])
        self._product(slot.handle, hidden, w["mean_weight"], mean, width)
        self._launch("latent_mean", blocks, size, mean, pooled, w["mean_bias"])
        self._product(slot.handle, mean, w["decoder_gate_weight"], gated, width)
        self._launch("gate_latent", blocks, size, gated, mean, w["decoder_gate_bias"])
        self._product(slot.handle, gated, w["decoder_weight"], hidden, self._hidden)
        self._launch("tanh_layer", hidden_blocks, hidden_size, columns, hidden, w["decoder_bias"])
        direction = pooled
        self._product(slot.handle, hidden, w["decoder_output_weight"], direction, width)
        self._launch("decode_direction", warps, n, direction, gated)
        if self._parts:
            halves = slot.halves[:users]
            self._to_halves(direction, halves, _DIRECTION_SCALE, low_part=2)
            direction = halves
        self._product(slot.handle, direction, self._output, slot.logits[:users], self._items, catalogue=True)
        half = users * self._k
        self._launch(
            *("rank_items", users, np.int32(self._items), np.int32(self._stride), np.int32(self._k), slot.logits),
            *(self._bias, token_start, token_item, kind, slot.scratch("tokens", len(token_item))),
            *(w[f"shortcut_{name}"] for name in ("start", "item", "weight", "recency")),
            *(seen_start, seen_item, slot.scratch("seen", len(seen_item))),
            *(slot.best[:half], slot.best[half : 2 * half].view(np.float32)),
        )

    def _finish(self) -> None:
        """Waits for the oldest chunk on the device, and takes its result."""
        slot, users, cold, unknown = self._waiting[0]
        slot.stream.synchronize()
        half = users * self._k
        items = slot.results[:half].reshape(users, self._k).copy()
        values = slot.results[half : 2 * half].view(np.float32).reshape(users, self._k).copy()
        items[unknown], values[unknown] = self._cold
        self._waiting.popleft()
        self._done.append((items, values, cold))


class _Slot:
    """The memory of a chunk on its way through the device, on a stream of its own, and its pinned counterpart."""

    def __init__(self, scorer: GpuScorer) -> None:
        cupy, users, width = scorer._cupy, scorer.users, scorer._width
        self._cupy, self._pinned = cupy, scorer._pinned
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self.stream:
            self.pooled, self.mean, self.gated = (cupy.empty((users, width), np.float32) for _ in range(3))
            self.hidden = cupy.empty((users, scorer._hidden), np.float32)
            self.logits = cupy.empty((users, scorer._stride), np.float32)
            self.halves = cupy.empty((users, scorer._parts * width), np.uint16)
            self.best = cupy.empty(2 * users * scorer._k, np.int32)
        self.results = self._host(2 * users * scorer._k)
        self._inputs: Any = None
        self._staging: Any = None
        self._scratch: dict[str, Any] = {}
        # One for each stream: of a shared one cuBLAS does not promise the same result each time. CuPy sets the stream
        # with each product. Last, as nobody would destroy that of a slot that was not made.
        self.handle = cupy.cuda.cublas.create()

    def close(self) -> None:
        """Waits for what is queued, and gives back what is cuBLAS's."""
        with contextlib.suppress(Exception):
            self.stream.synchronize()
        with contextlib.suppress(Exception):
            self._cupy.cuda.cublas.destroy(self.handle)

    def upload(self, arrays: list[NDArray[np.int32]]) -> list[Any]:
        """Copies arrays to the device in one piece, and gives them there; none of them waits for it."""
        size = sum(map(len, arrays))
        if self._inputs is None or len(self._inputs) < size:
            # The stream is idle here. Somewhat larger, so that the next batches hardly need a new one.
            self._inputs = self._staging = None
            self._inputs = self._cupy.empty(size + size // 2 + 1, np.int32)
            self._staging = self._host(size + size // 2 + 1)
        np.concatenate(arrays, out=self._staging[:size])
        self._copy(self._inputs.data.ptr, self._staging.ctypes.data, 4 * size, _TO_DEVICE)
        ends = np.cumsum([len(array) for array in arrays]).tolist()
        return [self._inputs[end - len(array) : end] for array, end in zip(arrays, ends, strict=True)]

    def download(self, size: int) -> None:
        """Copies the first numbers of `best` into `results` once the stream comes to it."""
        self._copy(self.results.ctypes.data, self.best.data.ptr, 4 * size, _TO_HOST)

    def scratch(self, name: str, size: int) -> Any:
        """Gives at least so many float32 numbers, whatever they are; those of another name are others."""
        found = self._scratch.get(name)
        if found is None or len(found) < size:
            self._scratch[name] = None
            found = self._scratch[name] = self._cupy.empty(size + size // 2 + 1, np.float32)
        return found

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        self._cupy.cuda.runtime.memcpyAsync(target, source, size, kind, self.stream.ptr)

    def _host(self, size: int) -> NDArray[np.int32]:
        return np.frombuffer(self._pinned.malloc(4 * size), np.int32, size)


def score_ahead(
    plpy: Any,
    batches: Iterable[tuple[list[str], History]],
    on_gpu: Callable[[], GpuScorer],
    on_cpu: Callable[[], Callable[[History], Scored]],
    cpu_users: int,
) -> Iterator[tuple[list[str], Scored]]:
    """Gives (users, best items) of each batch, in order; while the GPU scores one, the next is read.

    A GPU that fails, at whatever moment, leaves what it has not answered to the CPU, `cpu_users` at a time, with a
    NOTICE.
    """
    scorer: GpuScorer | None = None
    fallback: Callable[[History], Scored] | None = None
    waiting: deque[tuple[list[str], History]] = deque()
    try:
        for batch in chain(batches, (None,)):
            if batch is not None:
                waiting.append(batch)
            if fallback is None:
                try:
                    if batch is not None:
                        scorer = scorer or on_gpu()
                        scorer.submit(batch[1])
                    while scorer and len(waiting) > (batch is not None):
                        result = scorer.collect()
                        yield waiting.popleft()[0], result
                # Too little memory or a driver that breaks: CuPy has many ways to say it.
                except Exception as error:
                    plpy.notice(f"the GPU failed ({device.reason(error)}); the CPU scores")
                    if scorer:
                        scorer.close()
                    scorer, fallback = None, on_cpu()
            if fallback is not None:
                while waiting:
                    users, history = waiting.popleft()
                    for chunk in _chunks(history, cpu_users):
                        chunk_users, users = users[: len(chunk.counts)], users[len(chunk.counts) :]
                        yield chunk_users, fallback(chunk)
    finally:
        if scorer:
            scorer.close()


def release(cupy: Any | None = None) -> bool:
    """Gives back all that this session holds of the GPU, CUDA's own context included; False if it holds nothing.

    CUDA has no call for "my" context: the device's primary one is reset, and with it whatever else this session's
    Python may have put there. From then on the session scores on the CPU. ScoringError where a statement of this
    session is at work on the GPU.
    """
    if _open:
        raise ScoringError(
            "a statement of this session is scoring on the GPU",
            sqlstate=OBJECT_IN_USE,
            hint="finish or close it first: what it holds is given back at its end anyway",
        )
    cupy = cupy or sys.modules.get("cupy")
    if cupy is None:
        return False
    gc.collect()
    # Compiled kernels, and what others in this session left in CuPy's own pools.
    cupy.clear_memo()
    with contextlib.suppress(Exception):
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
    released = _reset_primary_contexts()
    if released:
        device.remember_release()
    return released


def _reset_primary_contexts() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    devices, flags, active = ctypes.c_int(0), ctypes.c_uint(0), ctypes.c_int(0)
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(devices))
    released = False
    for number in range(devices.value):
        driver.cuDevicePrimaryCtxGetState(number, ctypes.byref(flags), ctypes.byref(active))
        if active.value:
            released |= driver.cuDevicePrimaryCtxReset_v2(number) == 0
    return released


_ONE, _ZERO = np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.float32)


def _compiled(cupy: Any, width: int) -> Callable[[str], Any]:
    """Gives a function from a kernel's name to the kernel, compiled for the device; nothing is written to disk."""
    before = os.environ.get("CUPY_CACHE_IN_MEMORY")
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    try:
        module = cupy.RawModule(code=kernels.SOURCE, options=kernels.options(width))
        module.compile()
    finally:
        if before is None:
            del os.environ["CUPY_CACHE_IN_MEMORY"]
        else:
            os.environ["CUPY_CACHE_IN_MEMORY"] = before
    return {name: module.get_function(name) for name in kernels.KERNELS}.__getitem__


def _chunks(history: History, size: int, most_events: int | None = None) -> Iterator[History]:
    """Gives a history in pieces, at least one: of at most `size` users, and of several only with at most so many
    events.
    """
    users = len(history.counts)
    start = np.concatenate(([0], np.cumsum(history.counts)))
    if most_events is None:
        most_events = int(start[-1])
    if users <= size and start[-1] <= most_events:
        yield history
        return
    last = 0
    while last < users:
        first = last
        fits = int(np.searchsorted(start, start[first] + most_events, side="right")) - 1
        last = min(first + size, users, max(fits, first + 1))
        yield history.take(np.arange(first, last))


def _power_of_two_below(x: float) -> float:
    return float(2.0 ** np.floor(np.log2(x)))
