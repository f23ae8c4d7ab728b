"""A model that an upgrade could not remake says so, until it is rebuilt"""

from __future__ import annotations

from alembic import op

revision = "0099"
down_revision = "0098"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column; the models are remade at the end of this upgrade."""
    op.execute("alter table vae.models add column rebuild_error text")
    op.execute(
        "comment on column vae.models.rebuild_error is"
        " 'Why the last upgrade of pgvae could not remake the model''s functions and views; null: they are of this"
        " release.'"
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
