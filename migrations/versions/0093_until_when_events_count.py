"""The log of refreshes says until when events count: until the call, however late a view's turn came"""

from __future__ import annotations

from alembic import op

revision = "0093"
down_revision = "0092"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column; of older rows it is when they started, which is a little later than the truth."""
    op.execute("alter table vae.refreshes add column events_until timestamptz")
    op.execute("update vae.refreshes set events_until = started_at")
    op.execute("alter table vae.refreshes alter column events_until set default statement_timestamp()")
    op.execute("alter table vae.refreshes alter column events_until set not null")
    op.execute(
        "comment on column vae.refreshes.events_until is"
        " 'Until when events count in the content: until the call of vae.refresh, whenever the view had its turn.'"
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
