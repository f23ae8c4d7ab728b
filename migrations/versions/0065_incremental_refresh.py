"""Say how much of a view a refresh computed anew"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0065"
down_revision = "0056"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns, and takes away what is replaced; every refresh of before was a full one."""
    op.add_column(
        "refreshes",
        sa.Column("scored_count", sa.BigInteger(), comment="Rows among them that this refresh computed anew."),
        schema="vae",
    )
    op.add_column(
        "refreshes",
        sa.Column(
            "mode", sa.Text(), comment="full: all rows were computed; incremental: only those of users that changed."
        ),
        schema="vae",
    )
    op.execute("update vae.refreshes set mode = 'full', scored_count = row_count where state = 'succeeded'")
    op.execute("drop function if exists vae_private.start_refresh(integer, text)")
    op.execute("drop function if exists vae_private.refresh_view(integer, text)")
    op.execute("drop function if exists vae_private.finish_refresh(bigint, bigint, integer, text)")
    # A few rows that autovacuum would never look at; without statistics of them the planner takes them for a filter that
    # lets two events in a hundred pass, and sorts all events.
    op.execute("alter table vae.event_types set (autovacuum_analyze_threshold = 1)")
    # It gives other columns.
    op.execute("drop function if exists vae_private.last_run(integer, text)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
