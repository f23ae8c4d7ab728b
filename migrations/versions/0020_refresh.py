"""Say what a running refresh is at"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the phase of a refresh; the ones of before have ended."""
    op.add_column(
        "refreshes",
        sa.Column(
            "phase",
            sa.Text(),
            comment="What it is at: comparing, scoring or storing; null once it has ended."
            " pg_stat_activity.application_name tells more.",
        ),
        schema="vae",
    )
    op.alter_column(
        "refreshes",
        "row_count",
        comment="Rows that the view holds afterwards; of recommendations: users.",
        existing_type=sa.BigInteger(),
        existing_comment="Users in the view afterwards.",
        schema="vae",
    )
    # With arguments more it is another procedure, and a call could mean either.
    op.execute("drop procedure if exists vae.refresh(text)")
    op.execute("drop function if exists vae_private.last_scored(integer)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
