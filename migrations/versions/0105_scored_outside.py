"""A database without PL/Python: rows that were scored outside wait in a table for the refresh that stores them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0105"
down_revision = "0100"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds whether the database scores by itself, and the two tables of the staging area."""
    op.add_column(
        "installation",
        sa.Column(
            "is_external",
            sa.Boolean(),
            nullable=False,
            server_default=sa.text("false"),
            comment="Whether the database has no PL/Python, and is scored from outside.",
        ),
        schema="vae_private",
    )
    op.create_table(
        "staged_runs",
        sa.Column("token", sa.Text(), nullable=False, comment="What only the refresh knows that brought them."),
        sa.Column(
            "backend_pid",
            sa.Integer(),
            nullable=False,
            server_default=sa.text("pg_backend_pid()"),
            comment="Server process that wrote it: once that is gone, nobody will store them.",
        ),
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("view", sa.Text(), nullable=False, comment="Prediction view; or verify."),
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version that scored, see vae.versions."),
        sa.Column("row_count", sa.BigInteger(), nullable=False, comment="Rows that the view holds then."),
        sa.Column(
            "events_until", sa.DateTime(timezone=True), nullable=False, comment="Until when events count in them."
        ),
        sa.Column("left_out", sa.Text(), comment="What the content lacks, and why; null: nothing."),
        sa.Column("error", sa.Text(), comment="Why there are no rows; null: there are."),
        sa.Column("hint", sa.Text(), comment="What to do about it."),
        sa.Column("error_state", sa.Text(), comment="Its SQLSTATE."),
        sa.PrimaryKeyConstraint("token", "model_id", "view"),
        schema="vae_private",
        comment="What was scored outside and is to be stored: a row for each prediction view.",
        prefixes=["UNLOGGED"],
    )
    op.create_table(
        "staged_rows",
        sa.Column("token", sa.Text(), nullable=False, comment="What only the refresh knows that brought it."),
        sa.Column(
            "backend_pid",
            sa.Integer(),
            nullable=False,
            server_default=sa.text("pg_backend_pid()"),
            comment="Server process that wrote it: once that is gone, nobody will store it.",
        ),
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("view", sa.Text(), nullable=False, comment="Prediction view; or verify."),
        sa.Column("cells", sa.ARRAY(sa.Text()), nullable=False, comment="The columns of the row, as texts."),
        schema="vae_private",
        comment="Rows that were scored outside and are to be stored in a prediction view.",
        prefixes=["UNLOGGED"],
    )
    op.create_index("ix_staged_rows_token", "staged_rows", ["token"], schema="vae_private")
    op.execute(
        "comment on column vae.refreshes.events_until is"
        " 'Until when events count in the content: until the call of vae.refresh, whenever the view had its turn;"
        " of what was scored outside, until it was read.'"
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
