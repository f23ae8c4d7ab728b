"""Say in the comments that sequential rules are a baseline"""

from __future__ import annotations

from alembic import op

revision = "0094"
down_revision = "0093"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Changes a comment alone."""
    op.alter_column(
        "metrics",
        "method",
        comment="pgvae, or the baseline measured beside it on the same split: popularity, recency, item_knn, ease,"
        " graph_filter, sequential_rules; of demand last_period, exponential_smoothing; of outcomes rfm (a regression on"
        " recency, frequency and amount), base_rate, last_period, popularity, random; of uplift exposed, withheld and"
        " experiment (what happened), response (users ranked by the probability of buying).",
        schema="vae",
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
