"""How fast an epoch is, beside a straightforward Mult-VAE with full softmax on the same data.

    python -m benchmarks.training                     30 000 users, 40 000 items, 27 purchases each
    python -m benchmarks.training --users 5000 --items 5000

Only time is measured here; what the models are worth is in benchmarks/accuracy.py.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import mult_vae
from benchmarks.report import Figure, peak_mb, report
from pgvae.config import TrainingConfig
from pgvae.dataset import Dataset
from pgvae.loop import choose_device, fit

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    users: Annotated[int, typer.Option(help="Users.")] = 30_000,
    items: Annotated[int, typer.Option(help="Items.")] = 40_000,
    purchases: Annotated[int, typer.Option(help="Purchases of a user.")] = 27,
    epochs: Annotated[int, typer.Option(help="Epochs of each, the first to warm up.")] = 3,
) -> None:
    """Measure an epoch of pgvae and of Mult-VAE; writes benchmarks/results/training-….json."""
    own, own_peak, events = _alone(_epoch_seconds, users, items, purchases, epochs)
    begun = time.perf_counter()
    peer, peer_peak = _alone(_peer_seconds, users, items, purchases)
    figures = [
        *(Figure(figure=f"pgvae epoch, {precision}", value=value, unit="s") for precision, value in own.items()),
        Figure(figure="Mult-VAE epoch", value=peer, unit="s"),
        Figure(figure="pgvae epoch over Mult-VAE epoch", value=own["auto"] / peer, unit="ratio", target=0.2),
        Figure(figure="pgvae epoch in float32 over Mult-VAE epoch", value=own["float32"] / peer, unit="ratio"),
        Figure(figure="peak memory of pgvae's training", value=own_peak, unit="MB"),
        Figure(figure="peak memory of Mult-VAE's training", value=peer_peak, unit="MB"),
    ]
    device = choose_device(TrainingConfig())
    facts: dict[str, object] = {
        "users": users,
        "items": items,
        "events": events,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "seconds_of_mult_vae": round(time.perf_counter() - begun, 1),
    }
    report(f"training-{users}x{items}", figures, facts)


def _alone(measure: Callable[..., Any], *arguments: int) -> Any:
    """Measures in a process of its own: neither's memory nor PyTorch's settings are the other's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def _epoch_seconds(users: int, items: int, purchases: int, epochs: int) -> tuple[dict[str, float], float, int]:
    """Gives pgvae's seconds per epoch by precision, the peak of memory in MB, and how many events it learned from."""
    dataset = _shop(users, items, purchases)
    seconds = {}
    # float32 too, for machines that do not multiply bfloat16 faster.
    for precision in ("auto", "float32"):
        config = TrainingConfig(neighbours=0, precision=precision)
        curve = fit(dataset, config, max_history=500, phase="speed", epochs=epochs).curve
        seconds[precision] = float(np.median([epoch.seconds for epoch in curve[1:]]))
    return seconds, peak_mb(), len(dataset.user)


def _peer_seconds(users: int, items: int, purchases: int) -> tuple[float, float]:
    """Gives the seconds of Mult-VAE's epoch, and the peak of memory in MB."""
    device = choose_device(TrainingConfig())
    seconds = mult_vae.fit(_shop(users, items, purchases), validation=None, epochs=1, device=device).epoch_seconds
    return seconds, peak_mb()


def _shop(users: int, items: int, purchases: int) -> Dataset:
    """Gives purchases of items whose popularity falls with the root of their rank, all different for a user."""
    generator = np.random.default_rng(1)
    rank = (items * generator.random((users, purchases)) ** 2).astype(np.int64)
    pairs = np.unique(np.repeat(np.arange(users), purchases) * items + rank.ravel())
    number: Any = len(pairs)
    return Dataset(
        user=pairs // items,
        item=pairs % items,
        event_type=np.zeros(number, dtype=np.int64),
        occurred_at=np.zeros(number),
        weight=np.ones(number, dtype=np.float32),
        item_keys=[str(item) for item in range(items)],
        event_types=["purchase"],
        user_count=users,
    )


if __name__ == "__main__":
    app()
