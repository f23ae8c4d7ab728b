"""The GPU's part, as far as it can be tested without one: the same CUDA source, compiled to PTX and run on the CPU."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources as packages
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import benchmarks.gpu as gpu_benchmark
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cuda_on_cpu
import fake_cupy
from pgvae.config import TrainingConfig
from pgvae_runtime import batch, cuda_kernels, device, forward, gpu, verify
from pgvae_runtime.device import Gpu
from pgvae_runtime.errors import ScoringError
from pgvae_runtime.filters import Candidates, restricted
from pgvae_runtime.gpu import PRECISIONS, GpuScorer, score_ahead
from pgvae_runtime.gpu_costs import Costs, Work
from pgvae_runtime.scoring import mask_seen, score_users
from pgvae_runtime.tokens import History
from test_parity import MAX_HISTORY, TINY, random_dataset
from test_runtime import Plpy, histories, history_of, parsed, random_history, random_weights, version
from variants import random_links, random_network, torch_scores

__all__ = ["histories"]

MEMORY = 200 << 20
Kernel = Callable[[tuple[int], tuple[int], Sequence[Any]], None]


def cpu_scores(shop: Any, history: History) -> NDArray[np.float32]:
    """Gives the CPU's scores, seen items masked, [U, I]."""
    scores, _ = score_users(shop.weights, history, max_history=shop.max_history)
    mask_seen(scores, history, shop.targets)
    return scores


def assert_same_but_for_ties(items: Any, values: Any, expected: Any, *, rtol: float = 1e-5) -> None:
    """Compares a ranking with the scores that should have ranked it: it may differ only among equal ones."""
    best = np.sort(expected, axis=1)[:, ::-1][:, : items.shape[1]]
    own = np.take_along_axis(expected, items.astype(np.int64), axis=1)
    np.testing.assert_allclose(own, best, rtol=rtol)
    np.testing.assert_allclose(values, own, rtol=rtol)
    assert all(len(set(row)) == len(row) for row in items.tolist())


# The source


def nvrtc() -> ctypes.CDLL:
    """Gives NVIDIA's run-time compiler, of the package nvidia-cuda-nvrtc-cu12: it needs no GPU and no driver."""
    folder = packages.files("nvidia.cuda_nvrtc") / "lib"
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("width", [1, 256])
def test_the_source_compiles_for_gpus_without_one(architecture: str, width: int) -> None:
    compiler, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    source = cuda_kernels.SOURCE.encode()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    # The last two are what CuPy adds of its own.
    options = [f"-arch=compute_{architecture[3:]}", *cuda_kernels.options(width)]
    options += ["-ftz=true", "--device-as-default-execution-space"]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = compiler.nvrtcCompileProgram(program, len(options), given)
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert "warning" not in log.value.decode()
    compiler.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetPTX(program, ptx)
    text = ptx.value.decode()
    assert f".target {architecture}" in text
    assert all(f".visible .entry {name}(" in text for name in cuda_kernels.KERNELS)
    # The histories' sums stay in registers.
    assert ".local" not in text


def test_the_source_names_its_kernels() -> None:
    declared = cuda_kernels.SOURCE.count('extern "C" __global__')
    assert declared == len(cuda_kernels.KERNELS) == len(set(cuda_kernels.KERNELS))


@cuda_on_cpu.needs_compiler
def test_threads_that_wait_for_others_in_vain_are_seen(kernels_on_cpu: Callable[..., str]) -> None:
    before = "x[i] = tanhf(x[i] + bias[i % columns]);"
    assert cuda_kernels.SOURCE.count(before) == 1
    stuck = cuda_kernels.SOURCE.replace(before, "{ " + before + " if (threadIdx.x == 5) __syncthreads(); }")
    library = kernels_on_cpu(stuck, cuda_kernels.options(4))
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
import numpy as np, fake_cupy
from pgvae_runtime import cuda_kernels
fake_cupy.reset(lambda source, options: {library!r})
kernel = fake_cupy.RawModule(code=cuda_kernels.SOURCE).get_function("tanh_layer")
numbers = fake_cupy.asarray(np.ones(10, dtype=np.float32))
kernel((1,), (cuda_kernels.THREADS,), (np.int32(10), np.int32(10), numbers, numbers))
fake_cupy.cuda.runtime.deviceSynchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode < 0
    assert "threads wait at a barrier that others do not reach" in done.stderr


# Ranking


def rank(
    cupy: ModuleType,
    logits: NDArray[np.float32],
    k: int,
    *,
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Runs rank_items on logits [U, I], without a shortcut."""
    users, items = logits.shape
    stride = -(-items // 4) * 4
    rows = np.full((users, stride), np.nan, dtype=np.float32)
    bias = np.full(stride, np.nan, dtype=np.float32)
    bias[:items] = np.linspace(-1, 1, items)
    rows[:, :items] = logits - bias[:items]
    seen = seen or [[]] * users
    start = np.cumsum([0, *map(len, seen)], dtype=np.int32)
    flat = np.array([item for own in seen for item in own], dtype=np.int32)
    nothing, numbers = cupy.asarray(np.zeros(users + 1, np.int32)), cupy.asarray(np.zeros(0, np.int32))
    no_weights = cupy.asarray(np.zeros(0, np.float32))
    best, scores = cupy.empty((users, k), np.int32), cupy.empty((users, k), np.float32)
    module = cupy.RawModule(code=cuda_kernels.SOURCE, options=cuda_kernels.options(4))
    arguments = (
        *(np.int32(items), np.int32(stride), np.int32(k), cupy.asarray(rows), cupy.asarray(bias), nothing, numbers),
        *(numbers, no_weights, nothing, numbers, no_weights, no_weights, cupy.asarray(start), cupy.asarray(flat)),
        *(cupy.empty(len(flat), np.float32), best, scores),
    )
    module.get_function("rank_items")((users,), (cuda_kernels.THREADS,), arguments)
    cupy.cuda.runtime.deviceSynchronize()
    found = cupy.asnumpy(best), cupy.asnumpy(scores)
    del best, scores, arguments, nothing, numbers, no_weights
    cupy.get_default_memory_pool().free_all_blocks()
    return found


def softmax_with_gaps(logits: NDArray[np.float32], gaps: NDArray[np.bool_]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.where(gaps, -1.0, powers / powers.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("items", [1, 3, 100, 1023, 1025, 2049, 5001])
@pytest.mark.parametrize("k", [1, 2, 10, 127, 128, 1024])
def test_the_k_best_are_those_of_a_sort(cupy: ModuleType, items: int, k: int) -> None:
    generator = np.random.default_rng(items * 1000 + k)
    k = min(k, items)
    logits = generator.normal(0, 3, (4, items)).astype(np.float32)
    # Of few different values, so that most are equal; and in an order that puts all of the best into one group.
    logits[1] = generator.integers(0, 4, items)
    logits[2] = np.sort(logits[2])[np.argsort(np.arange(items) % 1024, kind="stable")]
    seen = [generator.choice(items, int(generator.integers(0, items)), replace=False) for _ in range(3)]
    seen.append(np.arange(items))
    for own_seen in ([[]] * 4, seen):
        gaps = np.zeros(logits.shape, dtype=bool)
        for user, own in enumerate(own_seen):
            gaps[user, own] = True
        expected = softmax_with_gaps(logits, gaps)
        best, scores = rank(cupy, logits, k, seen=own_seen)
        # The bias that was taken off and comes back rounds the logits.
        assert_same_but_for_ties(best, scores, expected, rtol=1e-5)
        assert ((scores < 0) == np.take_along_axis(gaps, best.astype(int), axis=1)).all()


def test_equal_scores_come_in_the_order_of_their_columns(cupy: ModuleType) -> None:
    # More than the kernel can sort, so that it selects by radix; and few, so that it need not.
    for items in (5000, 300):
        step = np.zeros((2, items), dtype=np.float32)
        step[1, items // 2 :] = 1.0
        bias = np.linspace(-1, 1, items).astype(np.float32)
        exact = (step - bias) + bias
        best, _ = rank(cupy, step, 100)
        for user in range(2):
            order = np.lexsort((np.arange(items), -exact[user]))
            np.testing.assert_array_equal(best[user], order[:100])


def test_extreme_logits_are_ranked(cupy: ModuleType) -> None:
    logits = np.array([[0.0, -0.0, 1e-40, 88.0, -200.0, 3e38, -3e38, -1e-40, 87.9, 1e-3]], dtype=np.float32)
    bias = np.linspace(-1, 1, 10).astype(np.float32)
    exact = (logits - bias) + bias
    best, scores = rank(cupy, logits, 10)
    assert exact[0][best[0]].tolist() == sorted(exact[0].tolist(), reverse=True)
    assert scores[0].tolist() == [1.0] + [0.0] * 9


# Scoring


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("config", "items", "k"),
    [(TINY, 40, 20), (TrainingConfig(hidden=1, latent=1), 2, 2), (TrainingConfig(hidden=70, latent=33), 3000, 128)],
    ids=["tiny", "of width one", "of odd width"],
)
def test_the_gpu_ranks_as_pytorch_does_whatever_the_weights_and_histories(
    cupy: ModuleType, config: TrainingConfig, items: int, k: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    counts = [0, 0, 1, MAX_HISTORY, MAX_HISTORY + 1, 0, 0, 200, *generator.integers(0, 30, 20).tolist(), 1, 0]
    dataset, history = random_dataset(generator, counts, items)
    network, links = random_network(dataset, config, seed), random_links(dataset, seed)
    shop = version(
        network.weights() | links.tensors(),
        event_types={name: number for number, name in enumerate(dataset.event_types)},
        max_history=MAX_HISTORY,
    )
    known = (history.counts > 0) | (dataset.user_features.counts() > 0)
    expected = torch_scores(network, links, history, MAX_HISTORY)
    expected[~known] = dataset.popularity()
    mask_seen(expected, history, shop.targets)
    scorer = GpuScorer(cupy, shop, k, memory=MEMORY)
    best, scores, cold = scorer(history)
    scorer.close()
    assert_same_but_for_ties(best, scores, expected)
    np.testing.assert_array_equal(cold, history.counts == 0)
    # Of whom nothing is known, the very list of the CPU.
    np.testing.assert_array_equal(best[~known], forward.top_k(expected[~known], k)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_of_the_product_keeps_its_bound(cupy: ModuleType, precision: str) -> None:
    # Rounded inputs move a logit by at most so much of the length of an item's row, which is 1 / temperature.
    unit = {"float32": 0.0, "float16x3": 3 * 2**-22, "tf32": 2**-9 + 2**-20, "float16": 2**-10 + 2**-22}[precision]
    generator = np.random.default_rng(3)
    dataset, history = random_dataset(generator, [20] * 40, 1000)
    network, links = random_network(dataset, TrainingConfig(hidden=64, latent=64), 3), random_links(dataset, 3)
    shop = version(network.weights() | links.tensors(), max_history=MAX_HISTORY)
    length = float(np.sqrt((shop.weights["output_weight"] ** 2).sum(axis=1)).max())
    # A score is exp(logit) over a sum of such: both can move.
    bound = np.expm1(2 * unit * length) + 1e-5
    expected = cpu_scores(shop, history)
    scorer = GpuScorer(cupy, shop, 50, memory=MEMORY, precision=precision)
    best, scores, _ = scorer(history)
    scorer.close()
    own = np.take_along_axis(expected, best.astype(int), axis=1)
    error = np.abs(scores / own - 1).max()
    assert error <= bound
    if unit < 2**-12:
        assert_same_but_for_ties(best, scores, expected)
    else:
        # It is rounded indeed, and what is missed is no better than what is given, but for the bound.
        assert error > 1e-5
        cut = np.sort(expected, axis=1)[:, -50]
        assert (own >= cut[:, None] * (1 - 2 * bound)).all()


def test_a_version_of_some_candidates_ranks_as_on_the_cpu(cupy: ModuleType) -> None:
    shop, history = version(random_weights()), random_history(np.random.default_rng(2), 30, 9)
    few = restricted(shop, Candidates(name="few", items=np.array([2, 3, 11, 17])))
    expected, _ = score_users(few.weights, history, max_history=few.max_history)
    mask_seen(expected, history, few.targets, few.columns)
    scorer = GpuScorer(cupy, few, 4, memory=MEMORY)
    best, scores, _ = scorer(history)
    scorer.close()
    assert_same_but_for_ties(best, scores, expected)
    assert scores.max() > 0 > scores.min()


def test_the_same_comes_out_whichever_thread_is_first(cupy: ModuleType) -> None:
    # As the trainer makes them, an item's links lead to different items.
    weights = random_weights()
    items = len(weights["item_popularity"])
    weights["shortcut_start"] = np.arange(0, 12 * items + 1, 12, dtype=np.int32)
    weights["shortcut_item"] = np.concatenate([np.random.default_rng(i).permutation(items)[:12] for i in range(items)])
    weights["shortcut_item"] = weights["shortcut_item"].astype(np.int32)
    weights["shortcut_weight"] = np.random.default_rng(4).normal(0, 1, 12 * items).astype(np.float32)
    shop, history = version(weights), random_history(np.random.default_rng(4), 30, 40)
    results = []
    for _ in range(3):
        scorer = GpuScorer(cupy, shop, 10, memory=MEMORY)
        results.append(scorer(history))
        scorer.close()
    for best, scores, _ in results[1:]:
        np.testing.assert_array_equal(best, results[0][0])
        np.testing.assert_array_equal(scores, results[0][1])


def test_an_item_that_does_not_exist_never_reaches_the_device(cupy: ModuleType) -> None:
    shop = version(random_weights())
    scorer = GpuScorer(cupy, shop, 3, memory=MEMORY)
    before = cupy.state.computations
    for wrong in (history_of([[(shop.item_count, 0, 0.0)]]), history_of([[(0, 3, 0.0)]])):
        with pytest.raises(IndexError):
            scorer.submit(wrong)
    assert cupy.state.computations == before
    scorer.close()


# Memory


def test_it_takes_no_more_memory_than_it_may_and_gives_it_back(
    cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, history = version(random_weights()), random_history(np.random.default_rng(6), 400, 9)
    expected = cpu_scores(shop, history)
    for memory in (68 << 20, 72 << 20, 200 << 20):
        cupy.state.most = 0
        scorer = GpuScorer(cupy, shop, 8, memory=memory)
        assert 32 <= scorer.users <= gpu.MAX_USERS
        monkeypatch.setattr(scorer, "users", min(scorer.users, 37))
        best, scores, _ = scorer(history)
        assert_same_but_for_ties(best, scores, expected)
        assert 0 < cupy.state.most <= memory
        assert cupy.state.used > 0
        scorer.close()
        assert cupy.state.used == 0
        assert not cupy.state.handles


def test_long_histories_fit_into_the_memory_that_it_may_take(cupy: ModuleType) -> None:
    generator = np.random.default_rng(8)
    shop, history = version(random_weights(I=3000)), random_history(generator, 60, 500)
    history = replace(history, item=generator.integers(0, 3000, len(history.item)))
    scorer = GpuScorer(cupy, shop, 8, memory=(64 << 20) + 4_000_000)
    best, scores, _ = scorer(history)
    scorer.close()
    assert_same_but_for_ties(best, scores, cpu_scores(shop, history))


def test_weights_in_fp16_are_made_piece_by_piece(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    copied = GpuScorer._copied

    def recorded(scorer: GpuScorer, array: NDArray[Any]) -> Any:
        on_device = copied(scorer, array)
        used.append(scorer._pool._used)
        return on_device

    monkeypatch.setattr(gpu, "_PIECE", 64)
    monkeypatch.setattr(GpuScorer, "_copied", recorded)
    GpuScorer(cupy, version(random_weights(I=192)), 8, memory=MEMORY, precision="float16").close()
    assert used[-3] == used[-2] == used[-1] > used[-4]


def test_too_little_memory_says_how_much_is_needed(cupy: ModuleType) -> None:
    with pytest.raises(MemoryError, match=r"^1 MB of GPU memory are too little, 65 MB are needed$"):
        GpuScorer(cupy, version(random_weights()), 8, memory=1 << 20)


def test_more_items_than_it_ranks_are_refused(cupy: ModuleType) -> None:
    with pytest.raises(ValueError, match="1025 items a user are more than the 1024"):
        GpuScorer(cupy, version(random_weights(I=2000)), 1025, memory=MEMORY)


def test_a_session_that_used_no_gpu_has_nothing_to_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert gpu.release() is False


def test_what_is_at_work_is_not_released(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[str] = []
    monkeypatch.setattr(gpu, "_reset_primary_contexts", lambda: resets.append("reset") or True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    scorer = GpuScorer(cupy, version(random_weights()), 8, memory=MEMORY)
    with pytest.raises(ScoringError, match="a statement of this session is scoring on the GPU") as refused:
        gpu.release(cupy)
    assert refused.value.sqlstate == "55006"
    assert not resets
    scorer.close()
    assert device.choose(Plpy(device="cuda"), SMALL, 20) is not None
    assert gpu.release(cupy) is True
    assert resets == ["reset"]
    # What was reset is not touched again.
    plpy = Plpy(device="cuda")
    assert device.choose(plpy, SMALL, 20) is None
    assert plpy.notices == ["vae.device is cuda, but no GPU is usable (this session has released it); the CPU scores"]


# Batches


def on_fake(memory: int = MEMORY, precision: str = "float32") -> Gpu:
    return Gpu(cupy=fake_cupy, memory=memory, precision=precision)


def test_a_run_on_a_gpu_gives_the_rows_of_the_cpu(cupy: ModuleType, histories: list[tuple[list[str], History]]) -> None:
    on_host = parsed(batch.recommend_all(Plpy(), None, version(random_weights()), 8))
    plpy = Plpy()
    on_device = parsed(batch.recommend_all(plpy, on_fake(), version(random_weights()), 8))
    assert cupy.state.computations > 50
    assert plpy.notices == []
    assert [(row[0], row[1], row[3:]) for row in on_device] == [(row[0], row[1], row[3:]) for row in on_host]
    for one, other in zip(on_device, on_host, strict=True):
        np.testing.assert_allclose(one[2], other[2], rtol=1e-5)


def test_a_gpu_that_fails_at_whatever_moment_leaves_the_rest_to_the_cpu(
    cupy: ModuleType, histories: list[tuple[list[str], History]]
) -> None:
    on_host = parsed(batch.recommend_all(Plpy(), None, version(random_weights()), 8))
    failed = 0
    for moment in count(0, 3):
        cupy.state.failure, cupy.state.countdown = RuntimeError("cudaErrorLaunchFailure\nmore of it"), moment
        plpy = Plpy()
        rows = parsed(batch.recommend_all(plpy, on_fake(), version(random_weights()), 8))
        cupy.state.failure = None
        assert [row[:2] for row in rows] == [row[:2] for row in on_host]
        for one, other in zip(rows, on_host, strict=True):
            np.testing.assert_allclose(one[2], other[2], rtol=1e-5)
        assert cupy.state.used == 0
        assert not cupy.state.handles
        if not plpy.notices:
            break
        assert plpy.notices == ["the GPU failed (cudaErrorLaunchFailure); the CPU scores"]
        failed += 1
    assert failed > 20


def test_a_gpu_without_memory_leaves_all_to_the_cpu(
    cupy: ModuleType, histories: list[tuple[list[str], History]]
) -> None:
    on_host = parsed(batch.recommend_all(Plpy(), None, version(random_weights()), 8))
    cupy.state.total = 1000
    plpy = Plpy()
    assert parsed(batch.recommend_all(plpy, on_fake(), version(random_weights()), 8)) == on_host
    assert len(plpy.notices) == 1
    assert plpy.notices[0].startswith("the GPU failed (Out of memory allocating ")
    told = Plpy()
    assert parsed(batch.recommend_all(told, on_fake(memory=1 << 20), version(random_weights()), 8)) == on_host
    assert told.notices == ["the GPU failed (1 MB of GPU memory are too little, 65 MB are needed); the CPU scores"]


def test_what_fails_while_reading_is_no_failure_of_the_gpu(cupy: ModuleType) -> None:
    shop, history = version(random_weights()), random_history(np.random.default_rng(5), 20, 6)

    def broken() -> Any:
        yield ["a"] * 20, history
        yield ["b"] * 20, history
        raise LookupError("canceled")

    plpy = Plpy()
    rows = score_ahead(plpy, broken(), lambda: GpuScorer(cupy, shop, 3, memory=MEMORY), lambda: pytest.fail(), 10)
    assert next(rows)[0] == ["a"] * 20
    with pytest.raises(LookupError):
        next(rows)
    assert plpy.notices == []
    assert cupy.state.used == 0


def test_a_cancel_while_a_version_is_read_is_no_failure_of_the_gpu(
    cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def canceled(*args: Any) -> Any:
        raise LookupError("canceled")

    golden = verify.GoldenUsers(history=history_of([[(1, 0, 0.0)]]), top_items=[[2]], top_scores=[[0.5]])
    monkeypatch.setattr(verify, "_read_golden", lambda *args: golden)
    monkeypatch.setattr(verify.device, "choose", lambda *args: on_fake())
    monkeypatch.setattr(verify, "_version", canceled)
    plpy = Plpy()
    with pytest.raises(LookupError):
        verify.verify(plpy, 1, 1)
    assert plpy.notices == []


def test_a_run_that_is_given_up_gives_the_memory_back(
    cupy: ModuleType, histories: list[tuple[list[str], History]]
) -> None:
    rows = batch.recommend_all(Plpy(), on_fake(), version(random_weights()), 8)
    next(rows)
    assert cupy.state.used > 0
    rows.close()
    assert cupy.state.used == 0


def test_the_next_batch_is_read_while_the_gpu_has_one(cupy: ModuleType) -> None:
    shop, events = version(random_weights()), []

    def read() -> Any:
        for number in range(3):
            events.append(f"read {number}")
            yield [str(number)] * 20, random_history(np.random.default_rng(number), 20, 6)

    on_gpu, never = lambda: GpuScorer(cupy, shop, 3, memory=MEMORY), lambda: pytest.fail()
    for users, _ in score_ahead(Plpy(), read(), on_gpu, never, 10):
        events.append(f"scored {users[0]}")
    assert events == ["read 0", "read 1", "scored 0", "read 2", "scored 1", "scored 2"]


# The benchmark, which runs where there is a GPU


TINY_SIZE = gpu_benchmark.Size(users=40, items=150, events=5, width=8, links=6, k=7, memory=MEMORY)


def test_the_benchmark_compares_before_it_measures(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    differences, wrong = gpu_benchmark.parity(cupy, TINY_SIZE, users=40)
    assert wrong == {}
    assert max(differences["float32"], differences["float16x3"]) <= 1e-5 < differences["tf32"] < 0.1
    monkeypatch.setitem(gpu_benchmark.TOLERANCE, "tf32", 1e-5)
    _, wrong = gpu_benchmark.parity(cupy, TINY_SIZE, users=40)
    assert list(wrong) == ["tf32"]
    assert wrong["tf32"].startswith("differs from the CPU by ")


def test_the_benchmark_measures_and_writes(
    cupy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, costs = gpu_benchmark.measure(cupy, torch, "cpu", TINY_SIZE, 1)
    taken, released, goes_on = gpu_benchmark.start_seconds(lambda: cupy, TINY_SIZE)
    assert (released, goes_on) == (False, True)
    path = gpu_benchmark.report("A Stand-In", rows, {"machine": {}, "costs": costs}, tmp_path)
    written = json.loads(path.read_text())
    assert path.name == "gpu-a-stand-in.json"
    assert all(row["value"] > 0 for row in written["figures"])
    assert [row["figure"] for row in written["figures"] if row["target"]] == [
        f"{precision}: against PyTorch" for precision in PRECISIONS
    ]
    assert "share of the roofline" in capsys.readouterr().out
    # All that it measures is what the setting takes.
    setting = json.dumps(costs | {"gpu_start_seconds": taken})
    assert vars(Costs.from_setting(setting)) == costs | {"gpu_start_seconds": taken}
    cupy.get_default_memory_pool().free_all_blocks()


def test_the_benchmark_says_where_there_is_no_gpu() -> None:
    if gpu_is_here():
        pytest.skip("there is a GPU")
    command = [sys.executable, gpu_benchmark.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no GPU can be used from here: ")


def gpu_is_here() -> bool:
    try:
        return bool(importlib.import_module("cupy").cuda.runtime.getDeviceCount())
    except Exception:
        return False


# Which device

SMALL, LARGE = (Work(users=users, items=20_000, width=256, weight_bytes=10**8) for users in (1000, 1_000_000))


@pytest.mark.parametrize(
    ("settings", "work", "used"),
    [
        ({}, SMALL, False),
        ({"device": "auto"}, SMALL, False),
        ({"device": "auto"}, LARGE, True),
        ({"device": "cpu"}, LARGE, False),
        ({"device": "cuda"}, SMALL, True),
        # A machine on which the GPU begins at once, and one on which it never pays.
        ({"gpu_costs": '{"gpu_start_seconds": 1e-3, "gpu_bytes_per_second": 1e12}'}, SMALL, True),
        ({"gpu_costs": '{"gpu_start_seconds": 3600}'}, LARGE, False),
    ],
)
def test_the_device_follows_the_settings_and_the_size_of_the_work(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], work: Work, used: bool
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    plpy = Plpy(**settings)
    chosen = device.choose(plpy, work, 20)
    assert (chosen is not None) == used
    assert chosen is None or chosen == Gpu(cupy=fake_cupy, memory=1 << 29, precision="float32")
    assert plpy.notices == []


def test_memory_and_precision_are_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    for text, size in (("3GB", 3 << 30), (" 512 MB", 1 << 29), ("64kB", 1 << 16), ("1234567", 1234567)):
        chosen = device.choose(Plpy(device="cuda", gpu_memory=text, gpu_precision="float16x3"), SMALL, 20)
        assert chosen == Gpu(cupy=fake_cupy, memory=size, precision="float16x3")
    assert set(device.PRECISIONS) == set(PRECISIONS)


def test_more_items_than_the_gpu_ranks_are_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    silent, told = Plpy(), Plpy(device="cuda")
    assert device.choose(silent, LARGE, 1025) is device.choose(told, LARGE, 1025) is None
    assert silent.notices == []
    assert told.notices == [
        "vae.device is cuda, but no GPU is usable (it ranks at most 1024 items a user, not 1025); the CPU scores"
    ]


def test_a_failed_import_is_told_of_by_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As CuPy does it: twenty lines of advice around what happened.
    (tmp_path / "cupy.py").write_text(
        "try:\n    raise ImportError('libcuda.so.1: cannot open')\nexcept ImportError as error:\n"
        "    raise ImportError('\\n====\\nFailed to import CuPy.\\n') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    plpy = Plpy(device="cuda")
    assert device.choose(plpy, SMALL, 20) is None
    assert plpy.notices == ["vae.device is cuda, but no GPU is usable (libcuda.so.1: cannot open); the CPU scores"]


def test_cupy_is_imported_without_a_folder_for_its_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As CuPy 14 does it when it is imported.
    (tmp_path / "cupy.py").write_text(
        "import os\nfolder = os.environ.get('CUPY_CACHE_DIR', os.path.expanduser('~/.cupy/kernel_cache'))\n"
        "if not os.path.isdir(folder):\n    os.makedirs(folder, exist_ok=True)\n"
        "from fake_cupy import *\nfrom fake_cupy import cuda\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", "/proc/nobody")
    # Set first, so that what the import sets is taken back.
    monkeypatch.setenv("CUPY_CACHE_DIR", "")
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    plpy = Plpy(device="cuda")
    assert device.choose(plpy, SMALL, 20) is not None
    assert plpy.notices == []
    monkeypatch.delitem(sys.modules, "cupy")


def test_threads_of_cuda_leave_signals_to_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: list[set[signal.Signals | int]] = []

    def free() -> tuple[int, int]:
        blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return 1 << 30, 1 << 30

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(fake_cupy.cuda.runtime, "memGetInfo", free)
    for settings in ({}, {"gpu_memory": "1GB"}):
        assert device.choose(Plpy(device="cuda", **settings), SMALL, 20) is not None
    assert len(blocked) == 2
    assert all({signal.SIGINT, signal.SIGALRM, signal.SIGUSR1} <= each for each in blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("reason", ["not installed", "no device", "no driver"])
def test_without_a_usable_gpu_the_cpu_scores(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    found = no_driver if reason == "no driver" else lambda: 0
    broken = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=found)))
    monkeypatch.setitem(sys.modules, "cupy", None if reason == "not installed" else broken)
    silent, told = Plpy(), Plpy(device="cuda")
    assert device.choose(silent, LARGE, 20) is device.choose(told, SMALL, 20) is None
    assert silent.notices == []
    assert len(told.notices) == 1
    assert told.notices[0].startswith("vae.device is cuda, but no GPU is usable (")


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [
        *(("device", wrong, "set it to one of auto, cpu, cuda") for wrong in ("gpu", "CUDA", "cuda:1", "'")),
        ("gpu_precision", "fp16", "set it to one of float32, float16x3, tf32, float16"),
        *(("gpu_memory", wrong, "give a size, as in: set vae.gpu_memory = '2GB'") for wrong in ("much", "-1", "2 GiB")),
    ],
)
def test_a_wrong_setting_is_refused_by_name(setting: str, value: str, hint: str) -> None:
    with pytest.raises(ScoringError) as refused:
        device.choose(Plpy(**{setting: value}), SMALL, 20)
    assert refused.value.message == f"vae.{setting} is {value!r}"
    assert (refused.value.sqlstate, refused.value.hint) == ("22023", hint)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "'{'"),
        ("[1]", "'[1]'"),
        ('{"gpu_speed": 1}', "'gpu_speed'"),
        ('{"gpu_flops": 0}', "'gpu_flops: 0'"),
        ('{"gpu_flops": "fast"}', "'gpu_flops: fast'"),
        ('{"gpu_flops": true}', "'gpu_flops: True'"),
        ('{"gpu_flops": Infinity}', "'gpu_flops: inf'"),
    ],
)
def test_wrong_costs_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ScoringError) as refused:
        Costs.from_setting(text)
    assert refused.value.message == f"vae.gpu_costs holds {named}"


def test_the_estimates_grow_with_the_work() -> None:
    costs = Costs()
    assert costs.seconds_on_cpu(SMALL) == pytest.approx(2e7 * (512 / 4e11 + 1e-9))
    assert costs.seconds_on_gpu(SMALL) == pytest.approx(5 + 0.05 + 2e7 * (512 / 3e12 + 2e-10))
    assert costs.seconds_on_cpu(LARGE) == pytest.approx(1000 * costs.seconds_on_cpu(SMALL))
    weights = random_weights()
    work = Work.of(7, weights)
    assert (work.users, work.items, work.width) == (7, *weights["output_weight"].shape)
