"""Hold metrics of slices"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COMMENTS = {
    "method": "pgvae, or the baseline measured beside it on the same split: popularity, recency, item_knn, ease, graph_filter.",
    "split": "What was held out: temporal (the newest events), random (a share of each user's items, by chance), strong (users who were never trained on); with folds, as 5-fold strong.",
    "metric": "recall, ndcg, precision, hit_rate, mrr, map, novelty, coverage (at k), auc, and of scores that are probabilities log_loss, brier, calibration_error. ndcg_lead: pgvae's ndcg less that of this method, paired by user.",
    "k": "Length of the list that was judged; 0 where a metric judges no list.",
    "value": "Mean over the users of the test part; coverage and calibration_error: of all users together.",
    "lower": "Lower bound of the 95 % bootstrap interval over users; null where there is none.",
    "upper": "Upper bound of the 95 % bootstrap interval over users; null where there is none.",
    "user_count": "Users of the test part, or of the slice.",
}


def upgrade() -> None:
    op.add_column(
        "metrics",
        sa.Column(
            "slice",
            sa.Text(),
            server_default=sa.text("'all'"),
            nullable=False,
            comment="all, or the part of the users or items that was judged: by activity, account age or category.",
        ),
        schema="vae",
    )
    op.drop_constraint("pk_metrics", "metrics", schema="vae")
    op.create_primary_key(
        "pk_metrics", "metrics", ["version_id", "method", "split", "slice", "metric", "k"], schema="vae"
    )
    for column, comment in _COMMENTS.items():
        op.alter_column("metrics", column, comment=comment, schema="vae")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
