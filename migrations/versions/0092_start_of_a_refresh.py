"""A refresh starts when its row is written, not when the transaction of the view before it began"""

from __future__ import annotations

from alembic import op

revision = "0092"
down_revision = "0091"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Changes the default; rows that are there keep their times."""
    op.execute("alter table vae.refreshes alter column started_at set default clock_timestamp()")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
