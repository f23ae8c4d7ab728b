"""Say in the comments which metrics and baselines there are of outcomes"""

from __future__ import annotations

from alembic import op

revision = "0089"
down_revision = "0088"
branch_labels = None
depends_on = None

_COMMENTS = {
    "method": "pgvae, or the baseline measured beside it on the same split: popularity, recency, item_knn, ease,"
    " graph_filter; of demand last_period, exponential_smoothing; of outcomes rfm (a regression on recency, frequency"
    " and amount), base_rate, last_period, popularity, random.",
    "metric": "recall, ndcg, precision, hit_rate, mrr, map, novelty, coverage (at k), auc, and of scores that are"
    " probabilities log_loss, brier, calibration_error. ndcg_lead: pgvae's ndcg less that of this method, paired by"
    " user. demand_wape, demand_pinball, demand_coverage: of the items' units in the horizon. churn_auc, churn_brier,"
    " churn_log_loss, churn_ece (calibration error), churn_log_loss_lead (this method's less pgvae's): of who buys"
    " nothing. purchases_wape, purchases_bias: of the number of purchases. response_lift, response_ece,"
    " response_calibration_error, response_bias: of who buys what; audience_lift: of who buys one item.",
}


def upgrade() -> None:
    """Changes the comments alone."""
    for column, comment in _COMMENTS.items():
        op.alter_column("metrics", column, comment=comment, schema="vae")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
