"""Keep the segments of a version"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0058"
down_revision = "0065"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the table; versions of before have no segments."""
    op.create_table(
        "segments",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column(
            "segment",
            sa.Integer(),
            nullable=False,
            comment="Number of the segment, the same from one version to the next as long as most of its users stay.",
        ),
        sa.Column("place", sa.Integer(), nullable=False, comment="Row of its centre in the version's tensor, from 0."),
        sa.Column("name", sa.Text(), nullable=False, comment="Name, by what its users buy more often than others do."),
        sa.Column("share", sa.REAL(), nullable=False, comment="Share of the users when the version was trained."),
        sa.Column("mean_events", sa.REAL(), nullable=False, comment="Mean number of events of its users, then."),
        sa.Column(
            "top_categories",
            sa.Text(),
            nullable=False,
            comment="What its users buy more often than others do, and by which factor: values of a column of the items,"
            " else keys of items.",
        ),
        sa.Column(
            "similarity",
            sa.REAL(),
            nullable=False,
            comment="Mean cosine of its users and its centre: how much they resemble each other.",
        ),
        sa.Column(
            "overlap",
            sa.REAL(),
            comment="Users in common with the segment of this number in the version that was active before, of those in"
            " either; null: it is new.",
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name="fk_segments_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "segment", name="pk_segments"),
        sa.UniqueConstraint("version_id", "place", name="uq_segments_version_id_place"),
        schema="vae",
        comment="Segments of each version: groups of users with similar tastes.",
    )


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
