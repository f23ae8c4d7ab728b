"""Forget first measurements of drift whose bins had other names"""

from __future__ import annotations

from alembic import op

revision = "0091"
down_revision = "0090"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Removes drift of churn and features: against the new names of bins it would look as if all users had changed."""
    op.execute(
        "delete from vae.observations where measure = 'drift' and bins is not null"
        " and (subject = 'churn' or subject like 'users.%' or subject like 'items.%')"
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
