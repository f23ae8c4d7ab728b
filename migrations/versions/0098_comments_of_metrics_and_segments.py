"""Say in the comments what demand_buyers_* is, and that segments are named by events of any type"""

from __future__ import annotations

from alembic import op

revision = "0098"
down_revision = "0097"
branch_labels = None
depends_on = None

_COMMENTS = {
    (
        "metrics",
        "metric",
    ): "recall, ndcg, precision, hit_rate, mrr, map, novelty, coverage (at k), auc, and of scores that"
    " are probabilities log_loss, brier, calibration_error. ndcg_lead: pgvae's ndcg less that of this method, paired by"
    " user. demand_wape, demand_pinball, demand_coverage: of the items' units in the horizon; demand_buyers_wape,"
    " demand_buyers_pinball, demand_buyers_coverage: of their buyers. churn_auc, churn_brier, churn_log_loss, churn_ece"
    " (calibration error), churn_log_loss_lead (this method's less pgvae's): of who buys nothing. purchases_wape,"
    " purchases_bias: of the number of purchases. response_lift, response_ece, response_calibration_error,"
    " response_bias: of who buys what; audience_lift: of who buys one item. uplift_assignments, uplift_response_rate,"
    " uplift_average_effect, uplift_balance_auc, uplift_checked_effect, uplift_qini, uplift_qini_lead (pgvae's less this"
    " method's): of who buys because of an offer.",
    ("segments", "name"): "Name, by what its users have events on, of any type, more often than all users do.",
    ("segments", "top_categories"): "What its users have events on, of any type, more often than all users do, and by"
    " which factor: values of a column of the items, else keys of items.",
}


def upgrade() -> None:
    """Changes comments alone."""
    for (table, column), comment in _COMMENTS.items():
        op.alter_column(table, column, comment=comment, schema="vae")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
