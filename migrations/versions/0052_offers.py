"""Keep the offers of a model"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0052"
down_revision = "0058"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the table; models of before have no offers."""
    op.create_table(
        "offers",
        sa.Column(
            "offer_id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Number of the offer in this database.",
        ),
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("name", sa.Text(), nullable=False, comment="Name of the offer, of one model's offers."),
        sa.Column(
            "item_keys", postgresql.ARRAY(sa.Text()), nullable=False, comment="Keys of the items that are offered."
        ),
        sa.Column("value", sa.Numeric(), comment="What a buyer brings, revenue or margin; null: not said."),
        sa.Column("cost", sa.Numeric(), comment="What it costs to make the offer to one user; null: nothing."),
        sa.Column("budget", sa.Numeric(), comment="What may be spent on it in all; null: no limit."),
        sa.Column("max_users", sa.Integer(), nullable=False, comment="How many users a refresh lists at most."),
        sa.Column(
            "exclude_buyers",
            sa.Boolean(),
            nullable=False,
            comment="Whether users who bought one of the items before are left out.",
        ),
        sa.Column("starts_at", sa.DateTime(timezone=True), comment="When the offer begins; null: it has begun."),
        sa.Column(
            "ends_at",
            sa.DateTime(timezone=True),
            comment="When it ends: refreshes then list nobody for it; null: never.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the offer was defined.",
        ),
        sa.Column(
            "created_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that defined it.",
        ),
        sa.ForeignKeyConstraint(["model_id"], ["vae.models.model_id"], name="fk_offers_model_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("offer_id", name="pk_offers"),
        sa.UniqueConstraint("model_id", "name", name="uq_offers_model_id_name"),
        schema="vae",
        comment="Offers of each model: items that are offered to users, what a buyer brings and what asking costs.",
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
