"""Keep the feature columns of a model and the feature pipeline of a version"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns; models and versions of before have no features."""
    for kind in ("user", "item"):
        op.add_column(
            "models",
            sa.Column(
                f"{kind}_features",
                postgresql.ARRAY(sa.Text()),
                server_default=sa.text("'{}'"),
                nullable=False,
                comment=f"Columns of the table of {kind}s that the model reads as features.",
            ),
            schema="vae",
        )
    op.add_column(
        "versions",
        sa.Column(
            "features",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="How columns of users and items become feature tokens: per column the kind and its categories, words"
            " or bins; left_out names the other columns and why.",
        ),
        schema="vae",
    )
    # With two arguments more it is another function, and a call could mean either.
    op.execute(
        "drop function if exists vae.create_model("
        "text, regclass, text, text, text, text, text, regclass, text, regclass, text, jsonb, jsonb)"
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
