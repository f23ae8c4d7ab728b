"""The scorer on a GPU: parity with the CPU, then how fast it is, beside PyTorch on the same GPU.

`make gpu` on a machine with a GPU: it needs this checkout and a Python with numpy, torch and CuPy, nothing else. It
writes benchmarks/results/gpu-<name>.json and prints the statement that sets vae.gpu_costs to what it measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plpython"))

from pgvae_runtime import device, forward, gpu  # noqa: E402
from pgvae_runtime.gpu import PRECISIONS, GpuScorer  # noqa: E402
from pgvae_runtime.scoring import mask_seen, score_users  # noqa: E402
from pgvae_runtime.store import Version  # noqa: E402
from pgvae_runtime.tokens import AGE_BUCKETS, ORDER_BUCKETS, History, recency_of_orders  # noqa: E402

TYPES, TARGET, MAX_HISTORY = 3, 2, 500
# Two scores that differ by less are equal; of the coarser precisions docs/gpu.md gives the bounds.
TOLERANCE = {"float32": 1e-5, "float16x3": 1e-5, "tf32": 0.1, "float16": 0.1}
_PEER_TARGET = 1.3
# Seconds. After a release CUDA might wait for itself for ever.
_START_TIMEOUT = 120
_DEVICE_TO_DEVICE = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is scored: users, items, events of a user, width of all layers, links of an item, items a user gets."""

    users: int = 16_384
    items: int = 20_000
    events: int = 20
    width: int = 256
    links: int = 64
    k: int = 20
    memory: int = 4 << 30


def random_version(size: Size, seed: int = 0) -> Version:
    """Gives a version with random weights, the rows of its items of length 10: a temperature of 0.1."""
    generator = np.random.default_rng(seed)
    letters = {"I": size.items, "Z": size.width, "H": size.width, "T": TYPES, "A": AGE_BUCKETS, "O": ORDER_BUCKETS}
    letters |= {"F": 0, "1": 1, "J": size.items + 1, "L": size.items * size.links}
    weights: dict[str, Any] = {}
    for name, shape in forward.SHAPES.items():
        dimensions = [letters[letter] for letter in shape]
        weights[name] = generator.normal(0, max(dimensions[-1], 1) ** -0.5, dimensions).astype(np.float32)
    output = weights["output_weight"]
    output *= 10 / np.sqrt((output * output).sum(axis=1, keepdims=True))
    popularity = generator.random(size.items).astype(np.float32)
    weights["item_popularity"] = popularity / popularity.sum()
    weights["gate_recency"], weights["shortcut_recency"] = recency_of_orders(0.5), recency_of_orders(1.0)
    weights["shortcut_start"] = np.arange(0, size.items * size.links + 1, max(size.links, 1), dtype=np.int32)
    # Different items for each item: a step through the catalogue, from a place of chance.
    first = generator.integers(0, size.items, (size.items, 1))
    step = max(1, size.items // max(size.links, 1))
    linked = (first + step * np.arange(size.links)) % size.items
    weights["shortcut_item"] = linked.astype(np.int32).reshape(-1)
    return Version(
        version_id=1,
        version=1,
        model_id=1,
        model="shop",
        user_id_type="bigint",
        weights=weights,
        event_types={"view": 0, "add_to_cart": 1, "purchase": 2},
        targets=(TARGET,),
        max_history=MAX_HISTORY,
        user_count=size.users,
    )


def random_history(size: Size, users: int, seed: int) -> History:
    """Gives histories of about as many events as said, some of none; popular items are more frequent."""
    generator = np.random.default_rng(seed)
    counts = generator.poisson(size.events, users)
    counts[::97] = 0
    total = int(counts.sum())
    return History(
        counts=counts,
        item=(size.items * generator.random(total) ** 2).astype(np.int64),
        event_type=generator.integers(0, TYPES, total),
        occurred_at=1.7e9 + generator.random(total) * 1e7,
    )


def cpu_scores(version: Version, history: History) -> Any:
    """Gives the CPU's scores, seen items masked, [U, I]."""
    scores, _ = score_users(version.weights, history, max_history=version.max_history)
    mask_seen(scores, history, version.targets)
    return scores


def parity(cupy: Any, size: Size, users: int = 300) -> tuple[dict[str, float], dict[str, str]]:
    """Gives the largest relative difference from the CPU's ranking for each precision, and what is wrong with some.

    Compared rank by rank: items whose scores are equal may change places. A second run must give the very same.
    """
    version, history = random_version(size), random_history(size, users, 1)
    expected = cpu_scores(version, history)
    best = np.sort(expected, axis=1)[:, ::-1][:, : size.k].astype(np.float64)
    differences: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for precision in PRECISIONS:
        scorer = GpuScorer(cupy, version, size.k, memory=size.memory, precision=precision)
        try:
            items, values, _ = scorer(history)
            again, values_again, _ = scorer(history)
        finally:
            scorer.close()
        own = np.take_along_axis(expected, items.astype(np.int64), axis=1)
        shown = best > 0
        difference = max(np.abs(each / best - 1)[shown].max() for each in (own, values))
        differences[precision] = float(difference)
        # Written so that NaN is wrong.
        if not difference <= TOLERANCE[precision]:
            wrong[precision] = f"differs from the CPU by {difference:.2g}, {TOLERANCE[precision]:g} is allowed"
        if not (np.array_equal(items, again) and np.array_equal(values, values_again)):
            wrong[precision] = "gives another result for the same users"
    return differences, wrong


def seconds(synchronize: Callable[[], None], act: Callable[[], Any], rounds: int) -> float:
    """Gives the median seconds of a call, the first one left out."""
    taken = []
    for _ in range(rounds + 1):
        synchronize()
        begun = time.perf_counter()
        act()
        synchronize()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken[1:]))


def measure(cupy: Any, torch: Any, torch_device: str, size: Size, rounds: int) -> tuple[list[dict[str, Any]], Any]:
    """Gives the figures, and the constants of the cost model but gpu_start_seconds."""
    version = random_version(size)
    users = min(size.users, gpu.MAX_USERS)
    history = random_history(size, users, 2)
    synchronize = cupy.cuda.runtime.deviceSynchronize
    rows: list[dict[str, Any]] = []
    costs: dict[str, float] = {}

    def row(figure: str, value: float, unit: str, target: float | None = None, peer: str | None = None) -> None:
        met = None if target is None else value >= target
        rows.append({"figure": figure, "value": value, "unit": unit, "target": target, "met": met, "peer": peer})

    bandwidth = _copied_bytes_per_second(cupy, synchronize, size, rounds)
    row("copy within the device", bandwidth / 1e9, "GB/s")
    peer = _torch_seconds(torch, torch_device, version, users, size.k, rounds)
    row("PyTorch: product, softmax, topk", users / peer, "users/s")
    for precision in PRECISIONS:
        scorer = GpuScorer(cupy, version, size.k, memory=size.memory, precision=precision)
        try:
            chunk = next(gpu._chunks(history, scorer.users))
            share = len(chunk.counts) / users
            whole = seconds(synchronize, lambda scorer=scorer, chunk=chunk: scorer(chunk), rounds)
            # What is packed once, to see the device without the host.
            packed = scorer._pack(chunk)
            scorer._pack = lambda history, packed=packed: packed  # type: ignore[method-assign]
            device = seconds(synchronize, lambda scorer=scorer, chunk=chunk: scorer(chunk), rounds)
            slot = scorer._slots[0]
            left = slot.halves if scorer._parts else slot.pooled

            def product(scorer: Any = scorer, slot: Any = slot, left: Any = left, n: int = len(chunk.counts)) -> None:
                with slot.stream:
                    scorer._product(slot.handle, left[:n], scorer._output, slot.logits[:n], size.items, catalogue=True)

            bare = seconds(synchronize, product, rounds)
        finally:
            scorer.close()
        n = len(chunk.counts)
        # The logits once out and once in, the items' rows and the histories' rows once in.
        least = 8 * n * size.items + 4 * size.width * (size.items + int(chunk.counts.sum()))
        row(f"{precision}: against PyTorch", peer * share / device, "ratio", _PEER_TARGET, "torch product and topk")
        row(f"{precision}: share of the roofline, FLOPs", bare / device, "ratio", None, "the product alone")
        row(f"{precision}: share of the roofline, bytes", least / bandwidth / device, "ratio", None, "a copy")
        row(f"{precision}: on the device", n / device, "users/s")
        row(f"{precision}: packed on the host, too", n / whole, "users/s")
        row(f"{precision}: product alone", 2 * n * size.items * size.width / bare / 1e12, "TFLOPS")
        if precision == "float32":
            costs["gpu_flops"] = 2 * n * size.items * size.width / bare
            costs["gpu_seconds_per_logit"] = max(1e-13, (whole - bare) / (n * size.items))
    costs |= _cpu_costs(version, size, rounds)
    array = np.ones(64 << 18 if size.items > 1000 else 1000, dtype=np.float32)
    target = cupy.empty(len(array), np.float32)
    copy = seconds(
        synchronize,
        lambda: cupy.cuda.runtime.memcpy(target.data.ptr, array.ctypes.data, array.nbytes, 1),
        rounds,
    )
    costs["gpu_bytes_per_second"] = array.nbytes / copy
    return rows, costs


def _copied_bytes_per_second(cupy: Any, synchronize: Callable[[], None], size: Size, rounds: int) -> float:
    count = min(64 << 20, size.items * size.width * 16)
    one, other = cupy.empty(count, np.float32), cupy.empty(count, np.float32)
    taken = seconds(
        synchronize,
        lambda: cupy.cuda.runtime.memcpy(one.data.ptr, other.data.ptr, 4 * count, _DEVICE_TO_DEVICE),
        rounds,
    )
    return 8 * count / taken


def _torch_seconds(torch: Any, device: str, version: Version, users: int, k: int, rounds: int) -> float:
    """Gives the seconds of product, softmax and top-k alone, eager, in float32: less than what pgvae's kernels do."""
    output = torch.from_numpy(np.array(version.weights["output_weight"])).to(device)
    bias = torch.from_numpy(np.array(version.weights["output_bias"])).to(device)
    direction = torch.nn.functional.normalize(torch.randn(users, output.shape[1], device=device), dim=1)

    def rank() -> Any:
        return torch.topk(torch.softmax(torch.addmm(bias, direction, output.T), dim=1), k, dim=1)

    def synchronize() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    with torch.no_grad():
        return seconds(synchronize, rank, rounds)


def _cpu_costs(version: Version, size: Size, rounds: int) -> dict[str, float]:
    users = min(512, size.users)
    history = random_history(size, users, 3)
    direction = np.ones((users, size.width), dtype=np.float32)
    output = version.weights["output_weight"]
    logits = np.empty((users, size.items), dtype=np.float32)
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    product = seconds(nothing, lambda: np.matmul(direction, output.T, out=logits), rounds)
    whole = seconds(nothing, lambda: forward.top_k(cpu_scores(version, history), size.k), rounds)
    return {
        "cpu_flops": 2 * users * size.items * size.width / product,
        "cpu_seconds_per_logit": max(1e-13, (whole - product) / (users * size.items)),
    }


def start_seconds(cupy_import: Callable[[], Any], size: Size) -> tuple[float, bool, bool]:
    """Gives the seconds from nothing to the first batch, whether the context was released, and whether scoring goes on.

    Run in a process of its own: a release that CUDA does not survive must not take the benchmark along.
    """
    version, history = random_version(size), random_history(size, 64, 4)
    begun = time.perf_counter()
    cupy = cupy_import()

    def score() -> Any:
        scorer = GpuScorer(cupy, version, size.k, memory=size.memory)
        try:
            return scorer(history)
        finally:
            scorer.close()

    first = score()
    taken = time.perf_counter() - begun
    released = gpu.release(cupy)
    try:
        again = score()
    except Exception:
        return taken, released, False
    return taken, released, bool(np.array_equal(first[0], again[0]))


def report(name: str, rows: list[dict[str, Any]], facts: dict[str, Any], folder: Path) -> Path:
    """Prints the figures, the ratios first, and writes them with the facts of the machine."""
    ordered = sorted(rows, key=lambda row: row["unit"] != "ratio")
    width = max(len(row["figure"]) for row in ordered)
    for row in ordered:
        met = {True: "met", False: "not met", None: ""}[row["met"]]
        target = "" if row["target"] is None else f"target {row['target']:g} {met}"
        print(f"{row['figure']:<{width}}  {row['value']:>10.4g} {row['unit']:<8} {target}")
    folder.mkdir(exist_ok=True)
    path = folder / f"gpu-{''.join(c if c.isalnum() else '-' for c in name).strip('-').lower()}.json"
    content = {"name": path.stem, "machine": facts.pop("machine"), "facts": facts, "figures": ordered}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def found() -> tuple[Any, Any]:
    """Gives CuPy and PyTorch where both see a GPU; SystemExit with what is missing elsewhere."""
    try:
        cupy = device.import_cupy()
        import torch

        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        why = device.reason(error)
        sys.exit(f"error: no GPU can be used from here: {why}\nhint: it takes a GPU and a Python with torch and cupy")
    if not devices or not torch.cuda.is_available():
        sys.exit("error: no GPU can be used from here: CuPy or PyTorch sees none\nhint: look at nvidia-smi")
    return cupy, torch


def main() -> None:
    """Runs parity, then the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("users", 16_384),
        ("items", 20_000),
        ("events", 20),
        ("width", 256),
        ("links", 64),
        ("k", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of which the median counts")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    rounds, start = given.pop("rounds"), given.pop("start")
    size = Size(**given)
    if start:
        print(json.dumps(start_seconds(lambda: found()[0], size)))
        return
    cupy, torch = found()
    torch.backends.cuda.matmul.allow_tf32 = False
    # Widths and catalogues that fill no tile, then the size that is measured.
    compared: dict[str, dict[str, float]] = {}
    wrong: list[str] = []
    for each in (Size(items=1001, width=33, links=7, k=100), size):
        differences, failed = parity(cupy, each)
        compared[f"{each.items} items"] = differences
        for precision, difference in differences.items():
            print(f"parity at {each.items} items, {precision}: within {difference:.1e} of the CPU")
        wrong += [f"error: {precision} {why}, at {each.items} items" for precision, why in failed.items()]
        # One of the others that is wrong is measured all the same.
        if "float32" in failed:
            sys.exit("\n".join(wrong))
    rows, costs = measure(cupy, torch, "cuda", size, rounds)
    sizes = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, __file__, "--start", *sizes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_START_TIMEOUT)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", f"no answer in {_START_TIMEOUT} seconds")
    if done.returncode == 0:
        taken, released, goes_on = json.loads(done.stdout.splitlines()[-1])
        costs["gpu_start_seconds"] = taken
        rows.append({"figure": "from nothing to the first batch", "value": taken, "unit": "s"} | _NO_TARGET)
        print(f"release_gpu: context given back: {released}; scores again in the same process: {goes_on}")
    else:
        released = goes_on = None
        print(f"release_gpu: the process ended with {done.returncode}: {done.stderr[-500:]}")
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    facts = given | {
        "costs": costs,
        "parity": compared,
        "wrong": wrong,
        "context_released": released,
        "scores_after_release": goes_on,
    }
    facts["machine"] = {"gpu": name, "system": platform.platform(terse=True), "cupy": cupy.__version__}
    facts["machine"] |= {"torch": torch.__version__, "numpy": np.__version__}
    print(f"written: {report(name, rows, facts, ROOT / 'benchmarks' / 'results')}")
    print(f"alter database … set vae.gpu_costs = '{json.dumps({k: float(f'{v:.3g}') for k, v in costs.items()})}';")
    if wrong:
        sys.exit("\n".join(wrong))


_NO_TARGET = {"target": None, "met": None, "peer": None}

if __name__ == "__main__":
    main()
