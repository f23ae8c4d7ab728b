"""Drop the call whose rows now say whether the candidates are those of the refreshes"""

from __future__ import annotations

from alembic import op

revision = "0100"
down_revision = "0098"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drops a function alone, which gives other columns from now on: it cannot be replaced."""
    op.execute("drop function if exists vae.set_candidates(text, text, regclass, text, boolean)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
