"""Drop the functions that listed comments: what builds a view comments its columns"""

from __future__ import annotations

from alembic import op

revision = "0097"
down_revision = "0094"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drops functions alone."""
    for name in ("event_comments", "demand_comments", "outcome_comments", "uplift_comments"):
        op.execute(f"drop function if exists vae_private.{name}()")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
