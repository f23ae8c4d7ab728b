"""Keep a version's forecast of demand, and curves of what was predicted against what happened"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0050"
down_revision = "0020"
branch_labels = None
depends_on = None

_METRIC_COMMENTS = {
    "split": "What was held out: temporal (the newest events), random (a share of each user's items, by chance), strong"
    " (users who were never trained on), horizon (the newest horizon_days of the model); with folds, as 5-fold strong.",
    "method": "pgvae, or the baseline measured beside it on the same split: popularity, recency, item_knn, ease,"
    " graph_filter; of demand last_period, exponential_smoothing.",
    "metric": "recall, ndcg, precision, hit_rate, mrr, map, novelty, coverage (at k), auc, and of scores that are"
    " probabilities log_loss, brier, calibration_error. ndcg_lead: pgvae's ndcg less that of this method, paired by user."
    " demand_wape, demand_pinball, demand_coverage: of the items' units in the horizon.",
    "value": "Mean over the users of the test part; coverage, calibration_error and those of demand: of all together.",
    "user_count": "Users of the test part, or of the slice; of demand: items.",
}


def upgrade() -> None:
    """Adds the column and the table; versions of before forecast no demand."""
    op.add_column(
        "versions",
        sa.Column(
            "demand",
            postgresql.JSONB(astext_type=sa.Text()),
            comment="The forecast of demand: its horizon in days, coefficients and intervals; null: there is none.",
        ),
        schema="vae",
    )
    op.create_table(
        "curves",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column(
            "curve",
            sa.Text(),
            nullable=False,
            comment="What the points show, for example demand: expected units of items against what was sold.",
        ),
        sa.Column("method", sa.Text(), nullable=False, comment="pgvae, or the baseline beside it."),
        sa.Column("position", sa.Integer(), nullable=False, comment="Place of the point in its curve, from 1."),
        sa.Column("label", sa.Text(), comment="What the point stands for, for example an item's key or a band's name."),
        sa.Column(
            "x", sa.DOUBLE_PRECISION(), nullable=False, comment="What was predicted, or how far along the curve is."
        ),
        sa.Column("y", sa.DOUBLE_PRECISION(), nullable=False, comment="What happened."),
        sa.Column(
            "lower", sa.DOUBLE_PRECISION(), comment="Lower bound of the predicted interval; null where there is none."
        ),
        sa.Column(
            "upper", sa.DOUBLE_PRECISION(), comment="Upper bound of the predicted interval; null where there is none."
        ),
        sa.Column(
            "weight",
            sa.DOUBLE_PRECISION(),
            nullable=False,
            comment="How many users, items or pairs of them the point stands for.",
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name="fk_curves_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "curve", "method", "position", name="pk_curves"),
        schema="vae",
        comment="Points of the pictures about each version: what it predicted against what happened on held-out events.",
    )
    for column, comment in _METRIC_COMMENTS.items():
        op.alter_column("metrics", column, comment=comment, schema="vae")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
