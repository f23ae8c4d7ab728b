"""Metrics on a terminal: a row per method, the best of each column marked, and who beats whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pgvae.rows import DESCRIPTIVE, LOWER_IS_BETTER

if TYPE_CHECKING:
    from pgvae.demand import DemandFit
    from pgvae.outcomes import OutcomeFit
    from pgvae.rows import Metric
    from pgvae.uplift import UpliftFit

# What each split is tested on.
PARTS = {
    "temporal": "the newest 10 % of the events",
    "random": "a tenth of each user's items, by chance",
    "strong": "users who were never trained on",
}
_LEAD = "ndcg_lead"


def lists_table(metrics: Sequence[Metric], title: str) -> Table:
    """Gives metrics of all users as a table, a row per method, with intervals; * marks the best of a column.

    Many columns have their intervals below the values, or a terminal would be too narrow.
    """
    shown = [metric for metric in metrics if metric.slice == "all" and metric.metric != _LEAD]
    columns = list(dict.fromkeys((metric.metric, metric.k) for metric in shown))
    cells = {(metric.method, metric.metric, metric.k): metric for metric in shown}
    methods = list(dict.fromkeys(metric.method for metric in shown))
    stacked = len(columns) > 3
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{title}, with 95 % intervals" if stacked else title,
        # Elsewhere a star says that a difference is significant.
        caption="* the best of its column" if any(name not in DESCRIPTIVE for name, _ in columns) else None,
    )
    table.add_column("method", overflow="fold")
    for name, k in columns:
        header = f"{name}@{k}" if k else name
        table.add_column(header if stacked else f"{header} (95 %)", justify="right", overflow="fold")
    for method in methods:
        row = []
        for name, k in columns:
            metric = cells.get((method, name, k))
            row.append(_cell(metric, [m for m in shown if (m.metric, m.k) == (name, k)], stacked) if metric else "")
        table.add_row(method, *row)
    return table


def slices_table(metrics: Sequence[Metric], k: int) -> Table | None:
    """Gives the NDCG at k of each slice as a table, a row per slice; * marks the best method. None without slices."""
    shown = [metric for metric in metrics if metric.metric == "ndcg" and metric.k == k]
    slices = list(dict.fromkeys(metric.slice for metric in shown if metric.slice != "all"))
    if not slices:
        return None
    methods = list(dict.fromkeys(metric.method for metric in shown))
    table = Table(box=SIMPLE_HEAD, title=f"ndcg@{k} of parts of the users and items", caption="* the best of its row")
    table.add_column("slice")
    table.add_column("users", justify="right")
    for method in methods:
        table.add_column(method, justify="right")
    for name in slices:
        row = {metric.method: metric for metric in shown if metric.slice == name}
        best = max(metric.value for metric in row.values())
        values = (f"{row[method].value:.4f}{'*' if row[method].value == best else ' '}" for method in methods)
        table.add_row(name, str(next(iter(row.values())).user_count), *values)
    return table


def verdicts(metrics: Sequence[Metric]) -> Iterator[str]:
    """Gives a sentence for each baseline: whether the paired interval of pgvae's lead in NDCG is above or below 0."""
    ndcg = {(m.method, m.k): m.value for m in metrics if m.metric == "ndcg" and m.slice == "all"}
    for lead in metrics:
        if lead.metric == _LEAD and lead.slice == "all" and lead.lower is not None and lead.upper is not None:
            verdict = "beats" if lead.lower > 0 else "loses to" if lead.upper < 0 else "does not clearly beat"
            other = ndcg[lead.method, lead.k]
            by = f": {ndcg['pgvae', lead.k] / other:.2f} times its NDCG" if other > 0 else ", whose NDCG is 0"
            yield f"pgvae {verdict} {lead.method}{by}"


def demand_verdict(fit: DemandFit) -> str:
    """Gives a sentence about the forecast of demand: how far it is off, beside its baselines, or why there is none."""
    if fit.head is None:
        return f"no forecast of demand: {fit.missing}"
    units = {(m.method, m.metric): m.value for m in fit.metrics}
    wape = {method: value for (method, metric), value in units.items() if metric == "demand_wape"}
    if not wape:
        return f"demand of {fit.head.horizon} days is not measured: of the items known before, none was sold lately"
    others = ", ".join(f"{method.replace('_', ' ')} {value:.1%}" for method, value in wape.items() if method != "pgvae")
    return (
        f"demand of {fit.head.horizon} days is off by {wape['pgvae']:.1%} of the units sold ({others});"
        f" {units['pgvae', 'demand_coverage']:.0%} of the items within the 80 % interval"
    )


def outcomes_verdict(fit: OutcomeFit) -> str:
    """Gives a sentence about who will buy: how well it is foretold, beside its baseline, or why there is nothing."""
    if not fit.tensors:
        return f"no probabilities of purchases: {fit.missing}"
    values = {(m.method, m.metric): m.value for m in fit.metrics}
    auc, loss = (
        {method: values[method, name] for method in ("pgvae", "rfm")} for name in ("churn_auc", "churn_log_loss")
    )
    return (
        f"who buys within {fit.tensors['outcome_horizon'][0]:.0f} days: AUC {auc['pgvae']:.3f},"
        f" log-loss {loss['pgvae']:.3f}"
        f" (recency, frequency and amount {auc['rfm']:.3f}, {loss['rfm']:.3f}),"
        f" calibration error {values['pgvae', 'churn_ece']:.3f};"
        f" lift of the best tenth of all offers {values['pgvae', 'response_lift']:.1f}"
        f" (popularity {values['popularity', 'response_lift']:.1f})"
    )


def uplift_verdict(fit: UpliftFit) -> str:
    """Gives a sentence about what offers change: the measured effect, and how well it is foretold or why it is not."""
    found = {(m.method, m.metric): m for m in fit.metrics}
    effect = found.get(("experiment", "uplift_average_effect"))
    measured = ""
    if effect is not None:
        counts, rates = (
            [found[kind, name].value for kind in ("exposed", "withheld")]
            for name in ("uplift_assignments", "uplift_response_rate")
        )
        measured = (
            f"experiment: {rates[0]:.2%} of {counts[0]:.0f} exposed and {rates[1]:.2%} of {counts[1]:.0f} withheld"
            " bought,"
            f" average effect {effect.value:.2%} ({effect.lower:.2%} to {effect.upper:.2%}); "
        )
    if not fit.tensors:
        return f"{measured}no uplift: {fit.missing}"
    own, other = found["pgvae", "uplift_qini"], found["response", "uplift_qini"]
    return (
        f"{measured}uplift: Qini coefficient {own.value:.4f} ({own.lower:.4f} to {own.upper:.4f}),"
        f" by the probability of buying {other.value:.4f}, by chance 0"
    )


def _cell(metric: Metric, column: Sequence[Metric], stacked: bool) -> str:
    pick = min if metric.metric in LOWER_IS_BETTER else max
    best = metric.metric not in DESCRIPTIVE and metric.value == pick(other.value for other in column)
    mark = "*" if best else " "
    if metric.lower is None or metric.upper is None:
        return f"{metric.value:.4f}{mark}"
    if stacked:
        lower, upper = (f"{bound:.4f}".removeprefix("0") for bound in (metric.lower, metric.upper))
        return f"{metric.value:.4f}{mark}\n{lower}–{upper} "
    return f"{metric.value:.4f} ({metric.lower:.4f}–{metric.upper:.4f}){mark}"
