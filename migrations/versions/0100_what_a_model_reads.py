"""What a model reads can be refused and changed: event types that are ignored, tables of users and items"""

from __future__ import annotations

from alembic import op

revision = "0100"
down_revision = "0098"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Words a comment anew, and drops a function that gives other columns from now on: it cannot be replaced."""
    op.execute(
        "comment on column vae.event_types.event_type is"
        " 'Standard event type that it means: view, search, add_to_cart, purchase, review, share, register; or ignore.'"
    )
    op.execute("drop function if exists vae.set_candidates(text, text, regclass, text, boolean)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
