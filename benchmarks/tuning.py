"""Hyper-parameters of pgvae for one data set: the search of `pgvae tune`, without its database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna

from benchmarks.splits import Task
from pgvae.config import TrainingConfig
from pgvae.tune import SPACE, pruner, train_trial


def tuned(
    task: Task, default: TrainingConfig, trials: int, *, max_history: int, say: Callable[[str], None]
) -> tuple[TrainingConfig, dict[str, Any]]:
    """Gives the configuration that ranks the validation part best, and what was tried: first the default."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=default.seed),
        pruner=pruner(),
    )

    def objective(trial: optuna.Trial) -> float:
        values = {parameter.name: parameter.suggest(trial) for parameter in SPACE} if trial.number else {}
        trial.set_user_attr("values", values)
        best = train_trial(trial, replace(default, **values), task.part, task.validation, max_history=max_history)
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
