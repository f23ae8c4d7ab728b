"""Fits what an offer changes, from randomised experiments; claims it only where it can be told (docs/outcomes.md).

An S-learner (Künzel et al. 2019) of few numbers: logit P(bought) = r · (x, 1) + exposed · e · (x, 1), where x are the
logits of the calibrated probabilities of the item and of any purchase, and whether the user bought the item before.
All of x comes from heads and a network that learned before the first assignment: one that has learned from the
outcomes would know who bought. Fitted on the older assignments, judged on the newer ones by the Qini coefficient
(Radcliffe 2007).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgvae.dataset import Dataset
from pgvae.outcome_windows import Floats, Setting, Weights, newest_moment, score_parts, too_little
from pgvae.outcomes import fit_heads
from pgvae.regression import fit_logistic, standardising
from pgvae.rows import CurvePoint, Metric
from pgvae.trials import Assignments, Trial, has_bought, histories_before, trial_of
from pgvae.uplift_figures import Estimate, Gains, balance, effects, estimate, gains
from pgvae_runtime.behaviour import behaviour
from pgvae_runtime.outcomes import item_probability, outlook
from pgvae_runtime.uplift import inputs_of, uplift_of

SPLIT = "experiment"
NO_COLUMN = "the events carry no exposure: name a column for it with vae.set_exposure"
# Assignments that each kind needs in the older and in the newer part, and buyers of both kinds together.
LEAST, LEAST_BUYERS = 100, 20
# Standard deviations of the coefficients that are thought likely, per standard deviation of an input: of r, and of e,
# whose last one is the effect itself.
_LIKELY_RESPONSE, _LIKELY_CHANGE, _LIKELY_EFFECT = 2.0, 0.5, 2.0


@dataclass(frozen=True, kw_only=True)
class UpliftFit:
    """The head as tensors, by the names of pgvae_runtime.uplift.SHAPES, and what the experiment says.

    `tensors` is empty where nothing is claimed; `missing` then says why.
    """

    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    curves: list[CurvePoint] = field(default_factory=list)
    missing: str = ""


def fit_uplift(
    dataset: Dataset,
    assignments: Assignments,
    network: Callable[[float], Weights],
    *,
    horizon: int,
    max_history: int,
    seed: int,
) -> UpliftFit:
    """Gives the head of uplift of a version, and the figures of the experiment that it rests on.

    `network(until)` gives the weights of a network that learned from events before a moment only; it is asked for only
    where the experiment is random and has an effect.
    """
    trial = trial_of(dataset, assignments, horizon=horizon, seed=seed)
    if isinstance(trial, str):
        return UpliftFit(missing=trial)
    setting = Setting(dataset=dataset, horizon=horizon, max_history=max_history, seed=seed)
    subjects = _Subjects(trial, setting)
    metrics, missing = _measure_trial(trial, subjects, seed)
    if not missing and (why := too_little(trial.before, horizon, seed)):
        missing = f"before the first assignment {why}"
    if missing:
        return UpliftFit(metrics=metrics, missing=missing)
    until = newest_moment(trial.before, horizon)
    own = Setting(dataset=trial.before, horizon=horizon, max_history=max_history, seed=seed)
    learned = network(until)
    x = subjects.inputs({**learned, **fit_heads(own, learned, until)})
    older = _older(trial, seed)
    checked = trial_part(trial, ~older)
    head = fit_head(x[older], trial_part(trial, older))
    foretold = uplift_of(head, x[~older])
    rankings = {"pgvae": foretold, "response": x[~older][:, 0]}
    found = {method: gains(score, checked.cells, checked.assignments.user, seed) for method, score in rankings.items()}
    more, curves, missing = _judge(checked, foretold, found, seed)
    tensors = {} if missing else fit_head(x, trial)
    return UpliftFit(tensors=tensors, metrics=metrics + more, curves=curves, missing=missing)


def trial_part(trial: Trial, chosen: NDArray[np.bool_]) -> Trial:
    """Gives some of the assignments of a trial."""
    return Trial(
        assignments=trial.assignments.of(chosen),
        bought=trial.bought[chosen],
        before=trial.before,
        begin=trial.begin,
        horizon=trial.horizon,
    )


class _Subjects:
    """The users of a trial as they were at the moments of their assignments: G different (user, moment) pairs."""

    def __init__(self, trial: Trial, setting: Setting) -> None:
        given = trial.assignments
        pairs, self.of = np.unique(np.column_stack((given.user, given.moment)), axis=0, return_inverse=True)
        self._item, self._setting = given.item, setting
        self.moment: Floats = pairs[:, 1].astype(np.float64)
        self._history = histories_before(setting.dataset, pairs[:, 0].astype(np.int64), self.moment)
        self._has_bought = has_bought(self._history, self.of, given.item, setting.dataset.targets)

    def behaviour(self) -> Floats:
        """Gives what the users had done, of each assignment, [N, B]."""
        dataset = self._setting.dataset
        found = behaviour(
            self._history,
            self.moment,
            horizon=self._setting.horizon,
            targets=dataset.targets,
            types=len(dataset.event_types),
        )
        return np.column_stack((found[self.of], self._has_bought))

    def inputs(self, weights: Weights) -> Floats:
        """Gives what the head of uplift reads of each assignment, [N, 3]."""
        dataset = self._setting.dataset
        response, purchase = np.empty((2, len(self.of)))
        order = np.argsort(self.of, kind="stable")
        ends = np.searchsorted(self.of[order], np.arange(len(self.moment) + 1))
        for chosen, part, scores in score_parts(self._history, np.arange(len(self.moment)), weights, self._setting):
            found = outlook(weights, part, self.moment[chosen], targets=dataset.targets, types=len(dataset.event_types))
            rows = order[ends[chosen[0]] : ends[chosen[-1] + 1]]
            user = self.of[rows] - chosen[0]
            own = scores[user, self._item[rows]]
            response[rows] = item_probability(weights, found.of(user), own[:, None])[:, 0]
            purchase[rows] = found.purchase[user]
        return inputs_of(response, purchase, self._has_bought)


def _measure_trial(trial: Trial, subjects: _Subjects, seed: int) -> tuple[list[Metric], str]:
    """Gives the figures that need no model, and why nothing may be claimed; empty where something may."""
    given = trial.assignments
    users = len(np.unique(given.user))
    counts = np.bincount(trial.cells, minlength=4)
    metrics = [
        _metric("exposed", "uplift_assignments", _exact(counts[2] + counts[3]), users),
        _metric("withheld", "uplift_assignments", _exact(counts[0] + counts[1]), users),
    ]
    if not (counts[0] + counts[1] and counts[2] + counts[3]):
        kind = "exposed" if counts[0] + counts[1] else "withheld"
        return metrics, f"no assignment is {kind}: without the other kind there is nothing to compare"
    exposed, withheld, effect = effects(trial.cells, given.user, seed)
    metrics += [
        _metric("exposed", "uplift_response_rate", exposed, users),
        _metric("withheld", "uplift_response_rate", withheld, users),
        _metric(SPLIT, "uplift_average_effect", effect, users),
    ]
    area = balance(trial, subjects.behaviour(), seed)
    metrics.append(_metric(SPLIT, "uplift_balance_auc", area, users))
    older = _older(trial, seed)
    least = min(np.count_nonzero(given.exposed[part] == kind) for part in (older, ~older) for kind in (False, True))
    if least < LEAST:
        return metrics, (
            f"there are too few assignments: {counts[2] + counts[3]} exposed and {counts[0] + counts[1]} withheld,"
            f" each kind needs {LEAST} in the older half and {LEAST} in the newer one"
        )
    if counts[1] + counts[3] < LEAST_BUYERS:
        return metrics, (
            f"there are too few buyers: {counts[3]} of the exposed and {counts[1]} of the withheld,"
            f" {LEAST_BUYERS} are needed"
        )
    if area.lower > 0.5:
        return metrics, (
            f"the assignments do not look random: who is exposed can be foretold from what was known before"
            f" (AUC {_words(area, 3)}, by chance 0.5)"
        )
    if effect.lower <= 0.0 <= effect.upper:
        return metrics, f"the average effect cannot be told from none: {_words(effect, 4)}"
    return metrics, ""


def _older(trial: Trial, seed: int) -> NDArray[np.bool_]:
    """Tells which assignments fit, [N]: the older half; or half of the users where time leaves one kind too few."""
    given = trial.assignments
    older: NDArray[np.bool_] = given.moment < np.median(given.moment)
    kinds = [given.exposed[part] == kind for part in (older, ~older) for kind in (False, True)]
    if min(map(np.count_nonzero, kinds)) >= LEAST:
        return older
    half: NDArray[np.bool_] = np.random.default_rng(seed).random(int(given.user.max()) + 1)[given.user] < 0.5
    return half


def fit_head(x: Floats, trial: Trial) -> dict[str, NDArray[Any]]:
    """Gives the head fitted to assignments with inputs x, [N, 3], by maximum likelihood with ridge."""
    mean, scale = standardising(x)
    standard = (x - mean) / scale
    exposed = trial.assignments.exposed.astype(np.float64)[:, None]
    matrix = np.column_stack((standard, exposed * standard, exposed))
    count = x.shape[1]
    likely = np.array([_LIKELY_RESPONSE] * count + [_LIKELY_CHANGE] * count + [_LIKELY_EFFECT])
    fitted = fit_logistic(matrix, trial.bought.astype(np.float64), 1.0 / (likely**2 * len(x)))
    response, effect = fitted[:count] / scale, fitted[count : 2 * count] / scale
    tensors = {
        "uplift_response": np.append(response, fitted[-1] - mean @ response),
        "uplift_effect": np.append(effect, fitted[-2] - mean @ effect),
        "uplift_low": x.min(axis=0),
        "uplift_high": x.max(axis=0),
    }
    return {name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}


def _judge(
    checked: Trial, foretold: Floats, found: Mapping[str, Gains], seed: int
) -> tuple[list[Metric], list[CurvePoint], str]:
    """Gives the figures of the newer assignments, the uplift curves, and why nothing is claimed."""
    users = len(np.unique(checked.assignments.user))
    _, _, effect = effects(checked.cells, checked.assignments.user, seed)
    metrics = [
        _metric(SPLIT, "uplift_checked_effect", effect, users),
        _metric("pgvae", "uplift_checked_effect", _exact(foretold.mean()), users),
    ]
    curves = []
    for method, own in found.items():
        metrics.append(_metric(method, "uplift_qini", estimate(own.qini), users))
        lower, upper = np.percentile(own.gain[1:], [2.5, 97.5], axis=0)
        curves += [
            CurvePoint(
                curve="uplift",
                method=method,
                position=position + 1,
                x=float(own.share[position]),
                y=float(own.gain[0, position]),
                weight=float(own.share[position] * len(foretold)),
                lower=float(lower[position]),
                upper=float(upper[position]),
            )
            for position in range(len(own.share))
        ]
    metrics.append(
        _metric("response", "uplift_qini_lead", estimate(found["pgvae"].qini - found["response"].qini), users)
    )
    qini = estimate(found["pgvae"].qini)
    if qini.lower <= 0.0:
        return (
            metrics,
            curves,
            (
                "who is won by an offer cannot be foretold better than by chance:"
                f" Qini coefficient {_words(qini, 5)}, by chance 0"
            ),
        )
    return metrics, curves, ""


def _metric(method: str, name: str, value: Estimate, users: int) -> Metric:
    bounds = (None, None) if np.isnan([value.lower, value.upper]).any() else (value.lower, value.upper)
    return Metric(
        method=method,
        split=SPLIT,
        metric=name,
        k=0,
        value=value.value,
        lower=bounds[0],
        upper=bounds[1],
        user_count=users,
    )


def _exact(value: float | np.floating[Any] | np.integer[Any]) -> Estimate:
    return Estimate(value=float(value), lower=np.nan, upper=np.nan)


def _words(found: Estimate, digits: int) -> str:
    return f"{found.value:.{digits}f}, 95 % interval {found.lower:.{digits}f} to {found.upper:.{digits}f}"
