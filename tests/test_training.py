"""What a training is made of: its checkpoints, batches, loss and shortcut, and data that no shop should have."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import log_softmax

from command import processes, start_server
from pgvae import checkpoints as checkpointing
from pgvae.batches import Batches
from pgvae.checkpoints import Checkpoints
from pgvae.config import FUTURE_SHARES, TrainingConfig
from pgvae.dataset import Dataset
from pgvae.errors import PgvaeError
from pgvae.item_graph import convolution
from pgvae.loop import Fit, _losses, _Run, chooses_bfloat16, fit
from pgvae.model import AttentionVae
from pgvae.ranking import make_holdout, scorer
from pgvae.rows import CHOOSING, Epoch
from pgvae.shortcut import shortcuts
from pgvae.softmax import SampledSoftmax
from pgvae.train import Listener
from pgvae.train import train as run_training
from shop import QUICK, SMALL, Shop, train
from variants import dataset_of, with_features

DAY = 86_400.0
SMALL_CONFIG = TrainingConfig(epochs=6, hidden=12, latent=8, batch_size=16, future_share=0.5, seed=3)


def some_events(users: int = 60, items: int = 40, seed: int = 1) -> Dataset:
    """Gives twelve events a user over a hundred days; users and items have features."""
    generator = np.random.default_rng(seed)
    events = [
        (user, int((user % 4) * 10 + generator.integers(0, 12)) % items, int(generator.integers(0, 2)), DAY * day)
        for user in range(users)
        for day in generator.integers(0, 100, 12)
    ]
    return with_features(dataset_of(events, users, items), 1, cold_items=3)


def trained_on(
    dataset: Dataset,
    config: TrainingConfig = SMALL_CONFIG,
    folder: Path | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Fit:
    """Trains with a validation part, so that a best epoch and a shortcut are chosen."""
    cut = float(np.quantile(dataset.occurred_at, 0.8))
    before = dataset.between(-np.inf, cut)
    return fit(
        before,
        config,
        max_history=20,
        phase="evaluate",
        validation=make_holdout(before, dataset.between(cut, np.inf)),
        checkpoints=Checkpoints(folder) if folder else None,
        on_epoch=on_epoch,
    )


def outcome(fitted: Fit) -> Any:
    """Gives all of a training's result but how long it took."""
    weights = {name: (tensor.shape, tensor.tobytes()) for name, tensor in fitted.weights.items()}
    return weights, [replace(epoch, seconds=0.0) for epoch in fitted.curve], fitted.best_epoch, fitted.shortcut


def test_a_training_leaves_pytorch_as_it_was() -> None:
    assert torch.get_deterministic_debug_mode() == 0
    modes = []
    trained_on(some_events(), on_epoch=lambda epoch: modes.append(torch.get_deterministic_debug_mode()))
    # "error", while it lasts.
    assert set(modes) == {2}
    assert torch.get_deterministic_debug_mode() == 0
    with pytest.raises(PgvaeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "pass_over_users", lambda run: (np.nan, 0.0, 0.0))
        trained_on(some_events())
    assert torch.get_deterministic_debug_mode() == 0


# Checkpoints


@pytest.fixture(autouse=True)
def after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_SECONDS_BETWEEN", 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The outcome of a training of some_events(), and a folder with its last checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "_SECONDS_BETWEEN", 0.0)
        return outcome(trained_on(some_events(), folder=folder)), folder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the number of each epoch that is computed."""
    computed: list[int] = []
    plain = _Run.pass_over_users

    def noted(self: _Run) -> tuple[float, float, float]:
        computed.append(len(self.curve) + 1)
        return plain(self)

    monkeypatch.setattr(_Run, "pass_over_users", noted)
    return computed


def test_the_better_share_is_chosen_and_the_result_is_that_of_a_training_with_it() -> None:
    config = replace(SMALL_CONFIG, future_share=None)
    seen: list[Epoch] = []
    fitted = trained_on(some_events(), config=config, on_epoch=seen.append)
    choosing = [epoch for epoch in seen if epoch.phase == CHOOSING]
    assert [epoch.epoch for epoch in choosing] == [*range(1, 7)] * 2
    assert [epoch.future_share for epoch in choosing] == [0.5] * 6 + [1.0] * 6
    assert fitted.curve == seen[len(choosing) :]
    best = [max(epoch.validation_ndcg or 0.0 for epoch in choosing[first : first + 6]) for first in (0, 6)]
    assert fitted.future_share == FUTURE_SHARES[int(best[1] > best[0])]
    given = trained_on(some_events(), config=replace(config, future_share=fitted.future_share))
    assert outcome(given) == outcome(fitted)
    other = trained_on(some_events(), config=replace(config, future_share=1.5 - fitted.future_share))
    assert outcome(other) != outcome(fitted)


def test_no_share_is_chosen_where_no_user_has_events_in_an_order() -> None:
    dataset = some_events()
    cut = float(np.quantile(dataset.occurred_at, 0.8))
    before = dataset.between(-np.inf, cut)
    at_once = replace(before, occurred_at=np.zeros(len(before.user)))
    fitted = fit(
        at_once,
        replace(SMALL_CONFIG, future_share=None),
        max_history=20,
        phase="test",
        validation=make_holdout(at_once, dataset.between(cut, np.inf)),
        on_epoch=lambda epoch: pytest.fail("it chooses") if epoch.phase == CHOOSING else None,
    )
    assert fitted.future_share is None
    assert fitted.shortcut_ndcg


@pytest.mark.parametrize("diverging", [*FUTURE_SHARES, None])
def test_a_share_that_diverges_is_not_chosen(monkeypatch: pytest.MonkeyPatch, diverging: float | None) -> None:
    plain = _Run.pass_over_users

    def exploding(self: _Run) -> tuple[float, float, float]:
        if len(self.curve) == 1 and diverging in (None, self.config.future_share):
            return np.inf, np.inf, np.inf
        return plain(self)

    monkeypatch.setattr(_Run, "pass_over_users", exploding)
    config = replace(SMALL_CONFIG, future_share=None, epochs=2)
    if diverging is None:
        with pytest.raises(PgvaeError, match="diverged in epoch 2"):
            trained_on(some_events(), config=config)
    else:
        fitted = trained_on(some_events(), config=config)
        assert (fitted.future_share, len(fitted.curve)) == (1.5 - diverging, 2)


def test_a_gpu_without_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: _Run) -> tuple[float, float, float]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(_Run, "pass_over_users", exhausted)
    with pytest.raises(PgvaeError, match=r"too little free memory .* Tried to allocate 2\.00 GiB\.$") as refused:
        trained_on(some_events(), config=SMALL_CONFIG)
    assert "--batch-size than 16" in refused.value.hint


def test_data_has_an_order_where_a_twentieth_of_those_with_several_events_has() -> None:
    # Users of two events each, at once but for some, and users of one event.
    def dataset(users: int, ordered: int, single: int) -> Dataset:
        events = [(user, item, 0, item * (user < ordered)) for user in range(users) for item in (0, 1)]
        return dataset_of(events + [(user, 0, 0, 0) for user in range(users, users + single)], users + single, 2)

    assert not dataset(100, ordered=1, single=0).has_order
    assert not dataset(100, ordered=5, single=0).has_order
    assert dataset(100, ordered=6, single=1000).has_order
    assert dataset(1, ordered=1, single=9).has_order
    assert not dataset(0, ordered=0, single=9).has_order


def train_and_die(folder: Path) -> None:
    """Trains in a process of its own, which is killed after its third epoch."""
    checkpointing._SECONDS_BETWEEN = 0.0

    def die(epoch: Epoch) -> None:
        if epoch.epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    trained_on(some_events(), folder=folder, on_epoch=die)


def test_a_killed_training_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, passes: list[int], finished: tuple[Any, Path]
) -> None:
    start_server()
    process = processes.Process(target=train_and_die, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    told: list[int] = []
    resumed = trained_on(some_events(), folder=tmp_path, on_epoch=lambda epoch: told.append(epoch.epoch))
    assert passes == [4, 5, 6]
    # Who watches is shown the whole curve.
    assert told == [1, 2, 3, 4, 5, 6]
    assert outcome(resumed) == finished[0]


@pytest.mark.parametrize("last", [1, 4, 6])
def test_a_training_that_an_error_ended_goes_on(
    tmp_path: Path, passes: list[int], finished: tuple[Any, Path], last: int
) -> None:
    def fail(epoch: Epoch) -> None:
        if epoch.epoch == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_on(some_events(), folder=tmp_path, on_epoch=fail)
    passes.clear()
    resumed = trained_on(some_events(), folder=tmp_path)
    assert passes == list(range(last + 1, 7))
    assert outcome(resumed) == finished[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def put_something_else(path: Path) -> None:
    torch.save({"network": {}, "curve": [1, 2]}, path)


def put_a_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def put_another_training(path: Path) -> None:
    trained_on(some_events(), replace(SMALL_CONFIG, latent=6, epochs=1), path.parent / "other")
    next((path.parent / "other").iterdir()).replace(path)


@pytest.mark.parametrize("spoil", [truncate, overwrite, empty, put_something_else, put_a_list, put_another_training])
def test_a_file_that_is_no_checkpoint_of_this_training_is_ignored(
    tmp_path: Path, passes: list[int], finished: tuple[Any, Path], spoil: Callable[[Path], None]
) -> None:
    (path,) = Path(shutil.copytree(finished[1], tmp_path / "spoilt")).iterdir()
    spoil(path)
    passes.clear()
    assert outcome(trained_on(some_events(), folder=path.parent)) == finished[0]
    assert passes == [1, 2, 3, 4, 5, 6]


def stop(epoch: Epoch) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"learning_rate": 0.005},
        {"epochs": 7},
        {"without": ("age",)},
        {"neighbours": 3},
        {"graph_neighbours": 2},
    ],
)
def test_a_changed_configuration_is_another_training(
    tmp_path: Path, passes: list[int], finished: tuple[Any, Path], changes: dict[str, Any]
) -> None:
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        trained_on(some_events(), replace(SMALL_CONFIG, **changes), tmp_path, on_epoch=stop)
    assert passes == [1]


@pytest.mark.parametrize("column", ["item", "event_type", "occurred_at", "weight", "user_features", "item_features"])
def test_changed_data_are_another_training(
    tmp_path: Path, passes: list[int], finished: tuple[Any, Path], column: str
) -> None:
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    dataset = some_events()
    value = getattr(dataset, column)
    if column.endswith("features"):
        # The same tokens in the same order, of others.
        changed = replace(value, start=np.append(np.sort(value.start[1:]), value.start[-1]))
    else:
        changed = value.copy()
        changed[5] = value[5] * 0.5 if column == "weight" else 1 - value[5] if column == "event_type" else value[5] + 1
    with pytest.raises(KeyboardInterrupt):
        trained_on(replace(dataset, **{column: changed}), folder=tmp_path, on_epoch=stop)
    assert passes == [1]


def test_where_no_checkpoint_can_be_written_the_training_goes_on_without(finished: tuple[Any, Path]) -> None:
    nowhere = Path("/dev/null/checkpoints")
    assert outcome(trained_on(some_events(), folder=nowhere)) == finished[0]
    # Called when the version is published already: what cannot be removed is no reason to fail.
    checkpoints = Checkpoints(nowhere)
    checkpoints.of(some_events(), TrainingConfig())
    checkpoints.remove()


def test_another_validation_part_is_another_training(tmp_path: Path, passes: list[int]) -> None:
    dataset = some_events()
    cuts = np.quantile(dataset.occurred_at, [0.8, 0.9])
    before = dataset.between(-np.inf, cuts[0])
    for end in (cuts[1], np.inf):
        validation = make_holdout(before, dataset.between(cuts[0], end))
        config = replace(SMALL_CONFIG, epochs=1)
        fit(before, config, max_history=20, phase="test", validation=validation, checkpoints=Checkpoints(tmp_path))
    assert passes == [1, 1]


def test_what_nobody_went_on_with_is_removed_after_a_week(tmp_path: Path) -> None:
    old, young, foreign = tmp_path / f"{1:032x}.pt", tmp_path / f"{2:032x}.pt", tmp_path / "thesis.pt"
    for path, days in ((old, 8), (young, 6), (foreign, 800)):
        path.touch()
        os.utime(path, (time.time() - DAY * days,) * 2)
    trained_on(some_events(), folder=tmp_path)
    assert young.exists()
    assert not old.exists()
    # The folder may be one that the user keeps other files in.
    assert foreign.exists()


def test_a_training_stopped_before_it_published_goes_on_and_leaves_no_checkpoint(
    trained_database: str, tmp_path: Path, passes: list[int]
) -> None:
    def stop(phase: str) -> None:
        if phase == "publish":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(trained_database, "shop", QUICK, checkpoints=tmp_path, listener=Listener(on_phase=stop))
    assert list(tmp_path.iterdir())
    assert passes
    passes.clear()
    assert run_training(trained_database, "shop", QUICK, checkpoints=tmp_path).version == 2
    assert passes == []
    assert list(tmp_path.iterdir()) == []
    with psycopg.connect(trained_database) as connection:
        digests = connection.execute(
            "select md5(string_agg(sha256::text, '' order by name, chunk)) from vae_private.tensors group by version_id"
        ).fetchall()
    # The version of the fixture was trained without an interruption.
    assert len(digests) == 2
    assert len(set(digests)) == 1


# The loss


def problem(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, items = torch.randn(9, 6, generator=generator), torch.randn(15, 6, generator=generator)
    place = torch.randperm(9 * 15, generator=generator)[:20]
    weight = torch.rand(20, generator=generator) + 0.1
    return x, items, torch.randn(15, generator=generator), place // 15, place % 15, weight


@pytest.mark.parametrize(("use_bfloat16", "tolerance"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_and_its_gradient_are_those_of_the_formula(use_bfloat16: bool, tolerance: float, seed: int) -> None:
    *inputs, row, column, weight = problem(seed)
    own, plain = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    loss = SampledSoftmax.apply(*own, row, column, weight, use_bfloat16)  # type: ignore[no-untyped-call]
    (3.0 * loss).backward()
    logits = plain[0] @ plain[1].T + plain[2]
    expected = -(weight * log_softmax(logits, dim=1)[row, column]).sum()
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for one, other in zip(own, plain, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() <= tolerance * other.grad.abs().max()


def test_a_batch_without_anything_to_guess_costs_nothing() -> None:
    x, items, bias, *_ = problem(0)
    x.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = SampledSoftmax.apply(x, items, bias, none, none, torch.zeros(0), False)  # type: ignore[no-untyped-call]
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_drawn_items_stand_for_all_in_the_mean() -> None:
    dataset = some_events(items=200)
    values = np.random.default_rng(2).normal(size=len(dataset.item_keys))
    batches = Batches(dataset, replace(SMALL_CONFIG, negatives=12, batch_size=4), max_history=20)
    true = np.exp(values[dataset.trained_items]).sum()
    sums = [
        np.exp(values[batch.candidates] + batch.log_multiplicity).sum() for _ in range(60) for batch in batches.epoch()
    ]
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - true) < 4 * error < 0.05 * true


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_is_for_gpus_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: bool
) -> None:
    # As of a Tesla T4: PyTorch multiplies in bfloat16 there, without hardware for it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or wanted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert chooses_bfloat16(TrainingConfig(), torch.device("cuda")) is wanted


def test_a_step_happens_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors of the meta device have no numbers: a step that reads one of them back, or mixes devices, fails.
    device = torch.device("meta")
    data, config = some_events(), replace(SMALL_CONFIG, negatives=8)
    network = AttentionVae(data, config, convolution(data, 4, 1)).to(device)
    on_device = torch.randn(1, device=device).new_empty
    monkeypatch.setattr(torch, "randn", lambda shape, **others: on_device(shape))
    batch = next(Batches(data, config, max_history=20).epoch())
    for use_bfloat16 in (False, True):
        losses = _losses(network, batch, SimpleNamespace(device=device), use_bfloat16=use_bfloat16)
        sum(losses).backward()
        assert all(loss.device == device for loss in losses)
        assert network.item_embedding.grad.shape == network.item_embedding.shape


# Batches


@pytest.mark.parametrize(("negatives", "future_share"), [(4096, 0.5), (5, 0.0), (5, 1.0)])
def test_a_batch_asks_for_what_it_must_and_shows_nothing_of_the_future(negatives: int, future_share: float) -> None:
    dataset = some_events(items=60)
    config = replace(SMALL_CONFIG, negatives=negatives, future_share=future_share)
    batches = Batches(dataset, config, max_history=100)
    trained = np.flatnonzero(dataset.trained_items)
    by_time = 0
    seen_users = 0
    for batch in batches.epoch():
        assert (np.diff(batch.candidates) > 0).all()
        assert np.isin(batch.candidates, trained).all()
        if negatives > len(trained):
            np.testing.assert_array_equal(batch.candidates, trained)
            assert not batch.log_multiplicity.any()
        else:
            assert np.exp(batch.log_multiplicity).sum() == pytest.approx(len(trained), rel=1e-5)
        assert ((batch.target_weight > 0) & (batch.target_weight <= 1)).all()
        places = batch.target_row * len(batch.candidates) + batch.target_column
        assert len(np.unique(places)) == len(places)
        assert batch.alone_tokens is not None
        has_features = dataset.item_features.counts() > 0
        assert has_features[batch.tokens.item[batch.alone_tokens]].all()
        seen_users += batch.tokens.user_count
    assert seen_users == batches.user_count == 60
    # What _hide says, event by event.
    rows, counts = dataset.rows_of(np.arange(60))
    at, row = dataset.occurred_at[rows], np.repeat(np.arange(60), counts)
    for _ in range(20):
        visible, wanted = batches._hide(at, row, counts)
        for user in range(60):
            own = row == user
            shown, asked, times = visible[own], wanted[own], at[own]
            if asked.all():
                continue
            by_time += 1
            cut = times[asked].min()
            assert shown.tolist() == (times < cut).tolist()
            assert asked.tolist() == (times >= cut).tolist()
    assert (by_time > 0) == (future_share > 0)


# The shortcut


def dense_links(dataset: Dataset, neighbours: int, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    items = len(dataset.item_keys)
    made = {}
    for way, links in shortcuts(dataset, neighbours, seed).items():
        matrix = np.zeros((items, items))
        np.add.at(matrix, (np.repeat(np.arange(items), np.diff(links.start)), links.item), links.weight)
        made[way] = matrix
    return made


def succession(dataset: Dataset, way: str) -> NDArray[np.float64]:
    """Gives the links by what came before what, event by event."""
    items = len(dataset.item_keys)
    counted, holders = np.zeros((items, items)), np.zeros(items)
    for user in np.unique(dataset.user):
        own = dataset.user == user
        times = sorted(set(dataset.occurred_at[own].tolist()))
        moments = [set(dataset.item[own & (dataset.occurred_at == at)].tolist()) for at in times]
        for item in set().union(*moments):
            holders[item] += 1
            first = next(number for number, held in enumerate(moments) if item in held)
            for lag in range(min(first, 10) + 1):
                near = 1 / (1 + lag)
                weight = near * (lag > 0) if way == "transitions" else 0.3 * near if lag else 1.0
                for other in moments[first - lag] - {item}:
                    counted[other, item] += weight
    return counted / (np.sqrt(np.outer(holders, holders)) + 3)


def test_the_shortcut_with_room_for_all_links_is_the_dense_formula() -> None:
    dataset = some_events()
    r = np.zeros((dataset.user_count, len(dataset.item_keys)))
    r[dataset.user, dataset.item] = 1.0
    users, items = r.sum(axis=1), np.maximum(r.sum(axis=0), 1.0)
    graph = r / np.sqrt(users)[:, None] / np.sqrt(items)
    found = dense_links(dataset, len(items))
    expected = {"cooccurrence": graph.T @ graph}
    gram = r.T @ r
    for way in found:
        if way.startswith("regression_"):
            l2 = float(way.removeprefix("regression_"))
            weights = expected[way] = np.zeros_like(gram)
            for item in range(len(items)):
                near = np.flatnonzero((gram[item] > 0) & (np.arange(len(items)) != item))
                system = gram[np.ix_(near, near)] + l2 * np.eye(len(near))
                weights[near, item] = np.linalg.solve(system, gram[near, item])
    expected |= {way: succession(dataset, way) for way in ("transitions", "baskets")}
    assert set(found) == set(expected)
    assert len(found) > 1
    for way, matrix in found.items():
        assert matrix.any()
        # Of any scale, in which an item's heaviest link weighs 1 in the mean.
        scale = (matrix * expected[way]).sum() / (expected[way] ** 2).sum()
        np.testing.assert_allclose(matrix, scale * expected[way], atol=1e-4 * np.abs(matrix).max())
        heaviest = np.abs(matrix).max(axis=1)
        assert heaviest[heaviest > 0].mean() == pytest.approx(1, rel=1e-4)


def test_the_shortcut_keeps_the_heaviest_links_of_each_item_that_it_speaks_for() -> None:
    dataset = some_events()
    few, all_of_them = dense_links(dataset, 4)["cooccurrence"], dense_links(dataset, 100)["cooccurrence"]
    for item in range(len(dataset.item_keys)):
        kept = np.flatnonzero(few[:, item])
        assert len(kept) == min(4, np.count_nonzero(all_of_them[:, item]))
        if len(kept):
            others = np.delete(all_of_them[:, item], kept)
            assert all_of_them[kept, item].min() >= others.max() - 1e-6
    assert all(np.count_nonzero(matrix, axis=0).max() <= 4 for matrix in dense_links(dataset, 4).values())


@pytest.mark.parametrize("block", [1, 100, 900])
def test_the_shortcut_is_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    dataset = some_events()
    whole = shortcuts(dataset, 8, seed=1)
    monkeypatch.setattr("pgvae.item_graph._BLOCK", block)
    for way, links in shortcuts(dataset, 8, seed=1).items():
        for name, tensor in links.tensors().items():
            np.testing.assert_array_equal(tensor, whole[way].tensors()[name])


def test_of_a_user_of_thousands_of_items_the_shortcut_counts_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgvae.item_graph._MAX_USER_ITEMS", 50)
    dataset = dataset_of([(0, item, 0, DAY * item) for item in range(150)], 1, 150)
    links = shortcuts(dataset, 150, seed=1)
    assert np.count_nonzero(np.diff(links["cooccurrence"].start)) == 50
    assert len(links["cooccurrence"].item) == 50**2
    # Of the same fifty, those that came up to ten moments before, the others' moments counted.
    kept = np.flatnonzero(np.diff(links["cooccurrence"].start))
    expected = [(one, other) for one in kept for other in kept if 0 < other - one <= 10]
    found = zip(np.repeat(np.arange(150), np.diff(links["transitions"].start)), links["transitions"].item, strict=True)
    assert sorted(found) == expected


# The graph convolution


def test_an_item_leans_on_its_most_similar_ones_the_less_the_more_users_it_has() -> None:
    dataset = some_events(users=300)
    items = len(dataset.item_keys)
    r = np.zeros((dataset.user_count, items))
    r[dataset.user, dataset.item] = 1.0
    users = r.sum(axis=0)
    cosine = r.T @ r / (np.sqrt(np.outer(users, users)) + 3.0)
    np.fill_diagonal(cosine, 0.0)
    graph = convolution(dataset, 4, seed=1)
    assert graph.item.shape == graph.weight.shape == (items, 4)
    assert users.min() == 0 and users.max() > 50
    for item in range(items):
        held = graph.weight[item] > 0
        assert np.count_nonzero(held) == min(4, np.count_nonzero(cosine[item]))
        if users[item]:
            assert graph.weight[item].sum() == pytest.approx(2.0 / (1.0 + users[item] / 50.0), rel=1e-5)
            found = cosine[item][graph.item[item]]
            np.testing.assert_allclose(np.sort(found), np.sort(cosine[item])[-4:], rtol=1e-5)
            np.testing.assert_allclose(graph.weight[item] / graph.weight[item].sum(), found / found.sum(), rtol=1e-5)


def test_the_network_leans_on_neighbours_in_training_and_its_published_rows_have_them() -> None:
    dataset = some_events()

    def published(data: Dataset, graph_neighbours: int | None) -> dict[str, Any]:
        config = replace(SMALL_CONFIG, epochs=1, graph_neighbours=graph_neighbours)
        return fit(data, config, max_history=20, phase="publish").weights

    leaning, alone = published(dataset, 4), published(dataset, 0)
    assert leaning.keys() == alone.keys()
    graph = convolution(dataset, 4, SMALL_CONFIG.seed)
    near = graph.item[np.arange(len(graph.item)), graph.weight.argmax(axis=1)]
    known = np.flatnonzero(dataset.trained_items)

    def likeness(weights: dict[str, Any]) -> float:
        rows, others = weights["output_weight"][known], weights["output_weight"][near[known]]
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
        return float(((rows * others).sum(axis=1) / lengths).mean())

    assert likeness(leaning) > likeness(alone) + 0.2
    # By default where nothing says what came first.
    assert likeness(published(dataset, None)) == likeness(alone)
    unordered = replace(dataset, occurred_at=np.zeros(len(dataset.occurred_at)))
    assert likeness(published(unordered, None)) == likeness(published(unordered, 4)) > likeness(published(unordered, 0))


# Data that no shop should have


def catalogue(kind: str) -> Dataset:
    made: dict[str, tuple[list[tuple[int, int, int, float]], int, int]] = {
        "one user": ([(0, item % 7, 1, DAY * item) for item in range(50)], 1, 7),
        "one item": ([(user, 0, 1, DAY * user) for user in range(50)], 50, 1),
        "one event": ([(0, 0, 0, 0.0)], 1, 1),
        "all users identical": ([(user, item, 1, DAY * item) for user in range(30) for item in range(8)], 30, 8),
        "each item once": ([(item % 40, item, 1, DAY * (item // 40)) for item in range(400)], 40, 400),
        "all at one time": ([(user, (user * 7 + n) % 30, n % 2, 5e8) for user in range(40) for n in range(6)], 40, 30),
        "one user of 20000 items": (
            [(0, item, 1, 60.0 * item) for item in range(20_000)]
            + [(user, user * 3 + n, 0, DAY * n) for user in range(1, 40) for n in range(5)],
            40,
            20_000,
        ),
        "one item of 200000 events": (
            [(n % 50, 0, 0, 60.0 * n) for n in range(200_000)]
            + [(user, 1 + (user + n) % 20, 1, DAY * n) for user in range(50) for n in range(8)],
            50,
            21,
        ),
    }
    return dataset_of(*made[kind])


@pytest.mark.parametrize(
    "kind",
    [
        "one user",
        "one item",
        "one event",
        "all users identical",
        "each item once",
        "all at one time",
        "one user of 20000 items",
        "one item of 200000 events",
    ],
)
def test_strange_events_give_weights_that_score(kind: str) -> None:
    dataset = catalogue(kind)
    config = replace(SMALL_CONFIG, epochs=2, negatives=64)
    fitted = fit(dataset, config, max_history=50, phase="publish")
    assert all(np.isfinite(tensor).all() for tensor in fitted.weights.values())
    scores = scorer(fitted.weights, 50)(dataset.history(np.arange(dataset.user_count)))
    assert (scores >= 0).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-4)


def test_a_best_seller_and_features_that_say_nothing_are_trained_on(database: str) -> None:
    shop = Shop()
    with psycopg.connect(database, autocommit=True) as connection:
        shop.make(connection)
        connection.execute(
            "insert into events select 1099511627776 + n %% 2000, %s, 'purchase',"
            " timestamptz '2024-01-01' + n * interval '20 seconds' from generate_series(1, 200000) n",
            [shop.items[0]],
        )
        connection.execute(
            "create table users as select distinct user_id, 5 as constant, null::text as country from events"
        )
        connection.execute(
            "create table items as select distinct item_id, 9.5 as price, null::text as kind from events"
        )
        shop.create_model(connection, users="users", items="items", options=SMALL)
        version = train(database, force=True)
        connection.execute("select * from vae.activate('shop', %s, force => true)", [version])
        query = "select item_id, score from shop.recommend(%s, 100, '{\"exclude_seen\": false}')"
        before = connection.execute(query, [shop.users[3]]).fetchall()
        assert len(before) == len(shop.items)
        assert sum(score for _, score in before) == pytest.approx(1, rel=1e-5)
        # What was never seen in training: a category, a number.
        connection.execute(
            "update users set country = 'new', constant = 1e9::integer where user_id = %s", [shop.users[3]]
        )
        assert connection.execute(query, [shop.users[3]]).fetchall() == before
        connection.execute("call vae.refresh('shop')")
        assert connection.execute("select count(distinct user_id) from shop.recommendations").fetchone() == (2000,)


def test_a_training_that_diverges_leaves_the_last_version_serving(
    trained_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "select * from shop.recommend(%s, 5)"
    with psycopg.connect(trained_database, autocommit=True) as connection:
        before = connection.execute(query, [Shop().users[0]]).fetchall()
        monkeypatch.setattr("pgvae.loop.kl_divergence", lambda mean, _: mean.sum(dim=1) * float("nan"))
        with pytest.raises(PgvaeError, match="diverged in epoch 1") as refused:
            run_training(trained_database, "shop", QUICK, checkpoints=tmp_path)
        assert "--learning-rate" in str(refused.value.hint)
        assert connection.execute("select version, state from vae.versions").fetchall() == [(1, "active")]
        assert connection.execute(query, [Shop().users[0]]).fetchall() == before
