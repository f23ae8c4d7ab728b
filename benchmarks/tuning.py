"""Hyper-parameters of pgvae for one data set: the search of `pgvae tune`, without its database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna

from benchmarks.splits import Task
from pgvae.config import TrainingConfig
from pgvae.errors import PgvaeError
from pgvae.loop import fit
from pgvae.rows import CHOOSING, Epoch
from pgvae.tune import SPACE


def tuned(
    task: Task, default: TrainingConfig, trials: int, *, max_history: int, say: Callable[[str], None]
) -> tuple[TrainingConfig, dict[str, Any]]:
    """Gives the configuration that ranks the validation part best, and what was tried: first the default."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=default.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3),
    )

    def objective(trial: optuna.Trial) -> float:
        values = {parameter.name: parameter.suggest(trial) for parameter in SPACE} if trial.number else {}
        trial.set_user_attr("values", values)
        best = 0.0

        def on_epoch(epoch: Epoch) -> None:
            nonlocal best
            if epoch.phase == CHOOSING:
                return
            best = max(best, epoch.validation_ndcg or 0.0)
            trial.report(best, epoch.epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            # Epochs are ranked without shortcut and recency, so none need be chosen.
            config = replace(default, **values, neighbours=0)
            fit(
                task.part,
                config,
                max_history=max_history,
                phase="tune",
                recency=0.0,
                validation=task.validation,
                on_epoch=on_epoch,
            )
        except PgvaeError as error:
            raise optuna.TrialPruned from error
        say(f"trial {trial.number}: NDCG@20 {best:.4f} {values}")
        return best

    study.optimize(objective, n_trials=trials)
    chosen: dict[str, Any] = study.best_trial.user_attrs["values"]
    return replace(default, **chosen), {
        "trials": trials,
        "complete": len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))),
        "default_trial_ndcg": round(study.trials[0].value or 0.0, 5),
        "best_trial_ndcg": round(study.best_value, 5),
        "chosen": chosen,
    }
