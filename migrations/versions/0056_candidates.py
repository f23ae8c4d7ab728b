"""Keep the candidate sets of a model"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0056"
down_revision = "0060"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the table; models of before have no candidate sets."""
    op.create_table(
        "candidates",
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("name", sa.Text(), nullable=False, comment="Name of the set, as the option candidates gives it."),
        sa.Column(
            "relation_schema", sa.Text(), nullable=False, comment="Schema of the table or view that lists the items."
        ),
        sa.Column(
            "relation_table", sa.Text(), nullable=False, comment="Name of the table or view that lists the items."
        ),
        sa.Column("item_id_column", sa.Text(), nullable=False, comment="Column that names the item."),
        sa.Column(
            "for_refresh",
            sa.Boolean(),
            nullable=False,
            comment="Whether refreshes recommend only these items; of one set of a model at most.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the set was first defined.",
        ),
        sa.Column(
            "created_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that first defined it.",
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["vae.models.model_id"], name="fk_candidates_model_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_id", "name", name="pk_candidates"),
        schema="vae",
        comment="Candidate sets: tables and views that say which items of a model may be recommended.",
    )
    op.create_index(
        "ix_candidates_for_refresh",
        "candidates",
        ["model_id"],
        unique=True,
        schema="vae",
        postgresql_where=sa.text("for_refresh"),
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
