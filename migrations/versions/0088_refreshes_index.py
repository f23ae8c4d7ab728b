"""Find the last refresh of a view, and those that run, however long the log is"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0088"
down_revision = "0087"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the indexes."""
    op.create_index("ix_refreshes_view", "refreshes", ["model_id", "view", sa.text("(-refresh_id)")], schema="vae")
    op.create_index(
        "ix_refreshes_running", "refreshes", ["model_id"], schema="vae", postgresql_where=sa.text("state = 'running'")
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
